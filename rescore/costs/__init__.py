"""What a decoding step costs on one machine, and what follows from it.

`table` is the record of `rescore bench costs`, `measuring` makes it, and verify curves, `kept` finds it again: for a
base LM with its heads on this machine, or in a file. `predicting` says what speed-up the steps of a decode would give
by it; `joint:nodes=auto` drafts by it (`rescore.rescorers.joint_plan`). All times are milliseconds.
"""
