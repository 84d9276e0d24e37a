"""The models: base LM, block heads, n-gram LMs, small neural LMs, their training and their files.

`base` reads tokens and gives states and logits; `heads` make lattices of states; `neural` and `ngram` are the models
that rescore; `training` makes heads and rescorers. At the top lies what all of them need: `files` (whole or not there),
`checkpoint` (weights and configuration), `keys` of caches, `locks`, `text_files` of users, `memory`.

May import `lattices`, never `rescore`: nothing here knows tasks, rescorers' names or reports.
"""

from lm.library_folders import place_downloads

place_downloads()  # before any module here imports transformers or datasets
