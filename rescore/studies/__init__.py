"""Studies: traces or finished runs in, records of numbers out, and the tables that show them (docs/analyses.md).

`analysis` reads traces and runs (repetition, confidence, oracle curves, ranks, calibration, outcomes), `comparison`
holds one run against another, `block_length` and `verify_curve` measure this machine, `cost` counts what a decoded
token costs, `ngram_mixing` chooses weights of n-gram models by replay, `perplexity` is the base's own,
`overlap` finds text that was trained on.

A new study is a module with a function that returns a frozen record, a table in `tables`, and a definition of every
number in docs/analyses.md. Imports runs and the main path; never reports.
"""
