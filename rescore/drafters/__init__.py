"""Drafters: what may come next at a position, as lattices that rescorers and the verification choose from."""
