"""`make equivalence`: every backend equals a slow single-process control.

problem.py  the digits, the arms, the trials: all that the control and the engines have in common
control.py  the control: stock layers and the NumPy optimizers of tests/reference.py
rank.py     what one rank does: training runs through harness.engine, one after the other
groups.py   process groups side by side: started, watched, started anew without a run that failed
cells.py    the rows of the table: which runs each needs, its figure and its limit
report.py   from cells to rows, which tests/report.py prints and writes
"""
