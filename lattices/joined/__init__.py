"""The joined lattice: what heads, the text so far and other drafters propose at a position, together.

`lookup` is a suffix automaton over the text, `corpus_index` a suffix array of a large corpus; `candidates` gathers what
may follow a path and says how likely each is, `likeliest` finds the best prefix tree and its branches.
`rescore.rescorers.joint` drafts with them, `joint_fit` fits the weights. Like all of `lattices`: numpy and numba only.
"""
