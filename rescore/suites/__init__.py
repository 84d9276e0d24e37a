"""Whole tables of evaluations from one YAML file.

`plan` is what the file says, checked with line numbers; `run` runs what is missing and goes on where it was stopped;
`files` names what a suite keeps, `tables` shows it. A suite only plans, tunes and calls `rescore.runs`.
"""
