"""`lutserve report`: what a folder of evaluations and benchmarks says, as one page, Markdown or CSV.

`folder` reads; `matrix`, `records`, `speed`, `layers`, `search` and `recipes` turn what was read into tables
and charts; `render` writes them. Nothing here measures: every number keeps the id of its record.
"""
