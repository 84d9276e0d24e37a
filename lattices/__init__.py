"""The ground floor: lattices, searches over them, their statistics. Needs numpy and numba, nothing else."""

from lattices.paths import place_compiled_code

place_compiled_code()  # before any module here imports numba
