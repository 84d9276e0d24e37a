"""Runs: what is evaluated, how it is kept, and how it is read back.

`inputs` names a task with its models, `recording` opens its trace (`models` records it), `run` says with what it is
decoded: `evaluation` replays or decodes live every run on every task, in units of `work`. `weights` and `tuning` give
the rescorers' alphas, `summary` makes a `Result` of finished examples. `records` are the typed records of the files
that an evaluation leaves (docs/formats.md), `log` writes them and goes on with them, `evaluated` reads them; `tables`
shows them.

May be changed freely but for the records, which are file formats: a changed field needs a new schema number and
docs/formats.md. Imports tasks, rescorers, costs and the main path (`rescore.tracing`, `replaying`, `decoding`,
`accounting`); never studies or reports.
"""
