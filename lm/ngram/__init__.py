"""N-gram LMs, from text to what a search uses.

`corpus` (text to word ids) -> `counting` (out of core) -> `tables` (all orders) -> `estimation` (smoothing, pruning) ->
`build` (a folder with ARPA text, automaton and manifest). `arpa` reads and writes ARPA files, `mix` interpolates
models, `load` gives them to a search, `score` to a text; `kenlm` does both for KenLM's binaries. `recover` has the
counts that a model was estimated from.

Counts and probabilities equal `lmplz`'s; tests hold its output. Torch must not be imported by anything here: only what
cuts text into tokens (`lm.base.catalog`, inside functions) may bring it.
"""
