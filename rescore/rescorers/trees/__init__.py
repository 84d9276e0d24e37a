"""Rescorers that draft a tree of the lattice's entries, not p single paths: after Medusa and EAGLE-2.

`choices` holds trees of ranks (the published lists, files), `growth` makes them from how often which ranks were right,
`rescorers` draft a fixed tree (Medusa) or the one that scores highest at each step (EAGLE-2). Needs lattices and
rescorers only; traces come in as arrays.
"""
