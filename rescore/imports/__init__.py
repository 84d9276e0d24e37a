"""Dumps of other programs as traces (docs/interop.md): `importing` is the door and writes the folder, `states` runs
heads on stored hidden states, `llama_cpp` puts a log of drafts and the outputs together.

An import gives rows of a trace and says in its settings what it had to leave open; nothing imports it but the command.
"""
