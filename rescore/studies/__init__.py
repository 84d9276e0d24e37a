"""Studies: traces or evaluations in, records of numbers out, and the tables that show them (docs/analyses.md).

`analysis` reads traces and evaluations (repetition, confidence, oracle curves, ranks, calibration, outcomes),
`comparison` sets one evaluation against another, `draft_vocabulary` heads of few tokens against those of all,
`until_divergence` says what lossy acceptance keeps as far as a trace knows it (docs/numbers.md), `block_length` says
which blocks pay on this machine, `cost` counts what a decoded token costs, `ngram_mixing` chooses weights of n-gram
models by replay, `perplexity` is the base's own, `overlap` finds text that was trained on. N-gram models side by side
are a suite: docs/suites/ngrams.yaml.

`tree_building` finds the lists of choices that would have been accepted longest.

A new study is a module with a function that returns a frozen `records.Record`, a table in `tables`, and a definition of
every number in docs/analyses.md; `analysis` says how an analysis is added there. Imports runs and the main path; never
reports.
"""
