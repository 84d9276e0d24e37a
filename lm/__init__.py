"""The models: base LM, block heads, generation, training, checkpoints. Knows lattices, not tasks."""
