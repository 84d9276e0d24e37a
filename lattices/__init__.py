"""The ground floor: lattices, searches over them, their statistics. Needs numpy and numba, nothing else."""
