"""Charts of a report: Plotly figures as JSON, without colours of text and ground, which the page's theme gives.

`figures` has the pieces that all are made of and `style` one colour and marker for each rescorer; `head_charts`,
`rescorer_charts`, `cost_charts` and `cost_model_charts` each make sections: a title, how to read it, charts, and their
numbers as rows.
"""
