"""Training of block heads, fine-tuned bases, neural rescorers and learned bigrams.

`run` goes from corpora to a folder; `options` has what can be chosen. `trainer` is the loop (schedule, checkpoints,
resume) and what trainings on text share; `heads` (with `tuned_base`), `rescorer` and `bigram` are the trainings. `data`
gives states and targets, `losses` what is minimised, `workers` the processes of one training.

Everything random follows from (seed, step): a resumed training is the same training. Options are frozen records that
check themselves. Nothing else in `lm` may import this folder.
"""
