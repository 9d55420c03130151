"""`make faults`: what goes wrong in practice, done to real runs; each fault yields rows with figures and limits.

lab.py     how a fault is registered, what it is given, how faults are run and told
others     the faults, by what breaks; every module of this package is loaded

A fault is a generator of rows (tests/report.py):

    @fault("the disk full for a while", slurm=False)
    def full_disk(lab: Lab) -> Iterator[Row]:
        ...
        yield row("disk full: points lost", lost, 0)

`python -m tests.faults [FAULT ...] [--once] [--seed N]`; tests/slurm/test_faults.py runs each once, at its smallest.
"""
