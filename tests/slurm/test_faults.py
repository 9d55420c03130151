"""Each fault of `make faults` once, at the smallest size that shows it.

Those that `make faults` runs beside the others run on one worker of xdist, with the other tests of SLURM, the rest on another.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.lab import load, perform
from tests.report import line

FAULTS = load()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group("beside" if fault.beside else "faults")) for name, fault in FAULTS.items()]
)
def test_fault(name: str, mnist5k: Path, few: Path, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue("cluster") if FAULTS[name].slurm else None
    seed = random.SystemRandom().randrange(2**32)
    print(f"--seed {seed}")
    rows = []
    for row in perform(FAULTS[name], data=mnist5k, few=few, thorough=False, seed=seed, cluster=cluster):
        rows.append(row)
        print(line(row))
    assert rows, "a fault without rows shows nothing"
    assert [row for row in rows if not row.ok] == []
