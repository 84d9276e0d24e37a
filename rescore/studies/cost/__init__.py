"""The cost model of [A], Kim et al. 2024: what a decoded token costs in bytes read and FLOPs, by method.

`decoders` are base LMs and rescorers by their configuration (the paper's as far as it is known), `model` counts,
`inputs` takes a finished run's base, heads and block efficiencies. Nothing here runs a model.
"""
