"""What other programs read. `openfst` writes an n-gram automaton and a lattice of a trace as text, `heads` block heads
in others' layouts; `result` gives one result of an evaluation to inference engines and benchmarks, whose schemas are in
`engines`. `vllm_heads` is a model that vLLM loads.

A new format for results is a record in `engines`, a name in `result.Format` and its case in `result._made`.

An export takes objects of the main path and gives text or files; nothing imports it but the command (and vLLM).
"""
