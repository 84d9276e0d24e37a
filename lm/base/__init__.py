"""The base LM: tokens in, final hidden states and logits out.

`catalog` turns a name into a loaded `model` (GGUF files are converted there, hub models fetched), `identity` says which
one it is; `encoder_decoder` is the model with an encoder. `probe` finds out what an architecture can do, `adapters` and
`attention` change it as it is loaded. `cache` holds keys and values of what was read, and with `states` what layers saw
of it. `generation` continues many prompts, `corpus` keeps such output in a folder, `own_output` in the cache directory.
`perplexity` scores texts, `machine` counts work. `fast` makes steps of a few tokens cheaper.

A new architecture needs nothing here unless `probe` refuses it. Must not import `lm.heads`, `lm.neural`, `lm.ngram` or
`lm.training`: the base knows nothing of drafts.
"""
