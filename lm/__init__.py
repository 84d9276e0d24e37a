"""The models: base LM, block heads, generation, training, checkpoints. Knows lattices, not tasks."""

from lm.library_folders import place_downloads

place_downloads()  # before any module here imports transformers or datasets
