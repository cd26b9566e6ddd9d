"""The paper's tables and figures, trained here and set beside the paper's own numbers (arXiv 2511.01743).

published   the paper's numbers
units       what has to be trained for a table or a figure
folder      paper.json: what has been measured, and with which data and settings
work        trains and measures units; stops and continues
measured    the figures of one unit
cells       ours beside theirs; where the order of methods differs
tables      as text, CSV and LaTeX
figures     figures 3, 4a and 4b and the learning curves, as data and as a page
plots       the same as PDF and PNG
commands    nmoe-train table, nmoe-train figure
"""
