"""Charts of a report: Plotly figures as JSON, without colours of text and ground, which the page's theme gives.

`figures` has the pieces that all are made of and `style` one colour and marker for each rescorer; `rescorer_charts`,
`cost_charts` and `head_charts` each make sections: charts of one kind, and their numbers as a table.
To add one: a function here that returns a `Section`, and its words in `templates/sections.toml`.
"""
