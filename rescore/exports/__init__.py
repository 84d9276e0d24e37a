"""What other programs read. `openfst` writes an n-gram automaton and a lattice of a trace as text; `result` one result
of an evaluation for inference engines and benchmarks, whose schemas are in `engines`.

An export takes objects of the main path and gives text or files; nothing imports it but the command.
"""
