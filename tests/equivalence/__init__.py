"""`make equivalence`: every backend equals a slow single-process control.

    problem.py  the digits, the arms, the trials: all that the control and the engines have in common
    control.py  the control: stock layers, the NumPy optimizers of tests/reference.py, no harness/engine.py or optim.py
    rank.py     one rank: training runs through harness.engine, one after the other in one process group
    ranks.py    process groups side by side: started, watched, restarted without the run that failed
    cells.py    the rows of the table: which runs each needs, its figure and its limit
"""
