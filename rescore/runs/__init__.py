"""Runs: what is evaluated, how it is kept, and how it is read back.

`evaluation` replays or decodes live every rescorer on every task; `inputs` gives the examples and traces it works on,
`weights` and `tuning` the rescorers' alphas, `summary` makes a `Result` of finished examples. `records` are the typed
records of the files that a run leaves (docs/formats.md), `results` writes them and goes on with them, `finished` reads
them; `tables` shows them. `suite`, `suite_plan`, `suite_files` and `suite_page` do the same for tasks x rescorers x k
from one YAML file; `leave_out` reads lists of examples to leave out.

May be changed freely but for the records, which are file formats: a changed field needs a new schema number and
docs/formats.md. Imports tasks, rescorers and the main path (`rescore.tracing`, `replay`, `decoding`, `accounting`);
never studies or reports.
"""
