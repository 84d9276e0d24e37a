"""Small neural models that rescore drafts, as they are used; `lm.training` makes them.

`model` finds, loads and runs a small causal LM, whole or as a delta of layers of the base; `learned_bigram` reads
low-rank scores of neighbouring tokens. Named sizes are `model.SIZES`.

May import `lm.base` and `lm.checkpoint`; must not import `lm.training`, nor know which rescorer asks.
"""
