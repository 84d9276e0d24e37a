"""The joined lattice: what heads, the text so far and other drafters propose at a position, together.

`lookup` is a suffix automaton over the text, `corpus_index` a suffix array over a corpus; `sources` gathers what may
follow a path, and who proposed it; `candidates` says how likely each is; `likeliest` finds the best prefix tree and its
branches; `outcomes` is what weights are fitted on. `rescore.rescorers.joint` drafts with them, `joint_fit` fits. Like
all of `lattices`: numpy and numba only.
"""
