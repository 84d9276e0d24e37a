"""Generation for users: one prompt or many, from text to text, with stop strings and streaming.

`live` is the Python API (`generate`, `Generator`), `generating` the command `rescore generate`, `custom` the callable
for `model.generate(custom_generate=...)` of transformers, `growing_text` text that grows token by token. The loop
itself is `rescore.decoding`.
"""
