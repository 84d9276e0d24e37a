"""What other programs read: one module for each of them. `openfst` writes an n-gram automaton and a lattice of a trace
as text.

An export takes objects of the main path and writes files; nothing imports it but the command.
"""
