"""Block heads: from one final hidden state of the base LM to the lattice of the next h tokens.

`nets` has the networks of heads 2..h, one class an architecture: a new one is a `HeadNet` with an entry in `NETS`;
`projection` the vocabulary projections that others' heads bring along, and those to a part of the vocabulary; `layouts`
the files that others' come in. `block_heads` loads, saves and runs them; head 1 is the base's own.
Checkpoints are those of `lm.checkpoint`, and those that are shipped or lie on users' disks must stay readable.

May import `lm.base`; must not import `lm.training`, which trains them.
"""
