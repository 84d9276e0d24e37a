"""The pipeline: tasks, decoding and traces, rescorers, verification, accounting, results."""
