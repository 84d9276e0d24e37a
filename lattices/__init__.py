"""The ground floor: lattices, searches over them (exact, but for the beam of `context_search`), their statistics. Needs
numpy and numba, nothing else.

`lattice` is what block heads propose. `search` finds its p best paths by the heads alone, `ngram_search` (with
`ngram_rows`) by an n-gram `automaton` besides, `context_search` by the text so far, `pair_search` by scores of
neighbours; each refers a weight of 0 to `search`. `joined` gathers what heads and the text so far propose together;
its `likeliest` finds the best prefix tree. `oracle` and `statistics` measure, `prefix_tree` lays drafts out for
one verify call. `ngrams` is a model as arrays, `errors` the tree of a user's errors, `paths` the user's files and
folders.

A search may be replaced by a quicker one that gives the same paths in the same order, ties included. Nothing here may
import torch, `lm` or `rescore`.
"""

from lattices.paths import place_compiled_code

place_compiled_code()  # before any module here imports numba
