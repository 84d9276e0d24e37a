"""What finished runs look like: one HTML page that needs nothing else (`page`, with the lattice explorer), the same as
Markdown and CSV (`exports`), and one example in the terminal (`inspection`, `inspection_view`).

`sources` gathers runs, traces and analyses, `headline` says what is in them, `charts` draws, `sweeps` finds tuned
weights again, `token_text` makes tokens visible. Text of others is escaped where it enters a page. Imports everything
below; nothing below imports it.
"""
