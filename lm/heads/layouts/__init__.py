"""Heads as others write them.

`tensor_files` opens what they wrote: names and shapes first, values when they are needed, and nothing but tensors.
`medusa` tells the Medusa layouts apart by the names of their tensors and turns each into what `BlockHeads` has.
Configurations of others are read for names and for notices: what a file holds is what its tensors say.

May import `lm.heads.nets`; must not import `lm.heads.block_heads`.
"""
