"""Whole tables of evaluations from one YAML file.

`plan` reads the file, checked with line numbers (`read_plan`); `run` runs what is missing and goes on where it was
stopped; `files` names what a suite keeps, `tables` shows it. A suite only plans, tunes and calls `rescore.runs`.
"""
