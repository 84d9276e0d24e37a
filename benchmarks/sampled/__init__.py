"""Sampled decodes of a tiny model in great numbers, for `check_sampling.py` and the tests: its law is known exactly.

`models` makes the models and says in which ways they can be drafted with; `decodes` decodes, counts, and measures how
far the outputs are from the law; `enumerated` follows every outcome of each random decision instead of drawing one.
"""
