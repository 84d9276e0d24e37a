"""Faster forwards for decoding, of any base LM: the same numbers but for rounding, and what can't be made faster stays.

`packed` lays the weights of linear layers out for few rows. `layer_program` watches a decoder layer and writes down
what it computes as a program of tensors; `compiled` has programs compiled, once for a machine, and `compiled_layer`
runs them. `graphs` are forwards of fixed shapes, which a GPU records and plays back.

Knows nothing about heads, drafts or acceptance. What is changed in a model, only `lm.base.model.BaseLM` asks for.
"""
