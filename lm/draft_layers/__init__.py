"""Draft layers: small networks that continue a base LM's text from the states inside it, one token a step.

`net` says what one is: token and state in, the next state and logits out, with keys and values of its own. `eagle`
has EAGLE-1, -2 and -3, `mtp` the layers that some models bring with them, with transformers' blocks, `hydra` Hydra's
heads, which have no attention. A new kind is a `DraftNet` with a `NetSource` that checks its files before it is read.

May import `lm.base` and `lm.heads.layouts.tensor_files`; knows nothing of lattices or of who asks.
"""
