"""What finished runs look like: one HTML page that needs nothing else, the same as Markdown and CSV (`page`), and one
example in the terminal (`inspection`, `inspection_view`).

`sources` gathers runs, traces and analyses, `headline` says what is in them, `charts` draws, `explorer` and
`inspection` read the decodes of one example (`walks`; `joined` has what several drafters proposed), `token_text` makes
tokens visible. What a reader sees of the page is in `templates`: its words, Markdown, styles and scripts, and the texts
above the charts (`sections.toml`). Text of others is escaped where it enters a page. Imports everything below; nothing
below imports it.
"""
