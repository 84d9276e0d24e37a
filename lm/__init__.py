"""The models: base LM, block heads, n-gram LMs, small neural LMs, their training and their files.

`base` reads tokens and gives states and logits; `heads` make lattices of states, `draft_layers` (EAGLE, MTP, Hydra)
draft from states inside the base; `neural` and `ngram` are the models that rescore; `training` makes heads and
rescorers. At the top lies what all of them need: `files` (whole or not there), `keys` (cache entries), `locks`,
`records` (typed JSON), `checkpoint` (weights and configuration), `options` (arguments with their help), `executors`
(work here or by the workers of a Ray cluster), `pages` (memory), `environment` (versions) and `text_files` (text and
rows of users; `packed_streams` unpacks them; `yaml_input` reads their YAML). `lookup_index` has corpora to look
continuations up in, `draft_vocabulary` counts their tokens; both read them as `ngram` does.

May import `lattices`, never `rescore`: nothing here knows tasks, rescorers' names or reports.
"""

import os
from pathlib import Path

from lattices.paths import working_folder


def place_downloads() -> None:
    """Points huggingface_hub and datasets to the cache directory where `~/.cache/huggingface` won't do.

    That is: it is not known (no HOME: they would make a folder called `~` in the working folder) or can't be written
    to. What is there already is still read. A user's HF_HOME goes before.
    """
    if "HF_HOME" in os.environ:
        return
    usual = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "huggingface"
    is_known = not str(usual).startswith("~")
    nearest = next(folder for folder in (usual, *usual.parents) if os.path.exists(folder) or folder == folder.parent)
    if is_known and os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return
    own = working_folder("huggingface")
    if is_known and usual.is_dir():
        # Models come from there; `datasets` writes beside what it reads, so its folders move.
        os.environ.setdefault("HF_DATASETS_CACHE", str(own / "datasets"))
        os.environ.setdefault("HF_MODULES_CACHE", str(own / "modules"))
    else:
        os.environ["HF_HOME"] = str(own)


place_downloads()  # before any module here imports transformers or datasets, which read their settings once
