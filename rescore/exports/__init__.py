"""What other programs read: one module for each of them. `openfst` writes an n-gram automaton and a lattice of a trace
as text, `heads` block heads in others' layouts; `vllm_heads` is a model that vLLM loads.

An export takes objects of the main path and writes files; nothing imports it but the command (and vLLM).
"""
