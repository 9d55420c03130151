"""From cells to rows: does the runs, tells how far it is."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from harness import models
from tests.equivalence import groups
from tests.equivalence.cells import Cell, Results
from tests.equivalence.problem import ARMS, BACKENDS, Course, Digits, make
from tests.equivalence.rank import Run
from tests.report import Row

RANKS_A_GPU = 8
"""of different groups at a time: their networks are small, and most of what they wait for is the host"""


def worlds(device: str) -> tuple[int, ...]:
    return tuple(w for w in (1, 2, 4) if device == "cpu" or w <= torch.cuda.device_count())


def rows(cells: Sequence[Cell], course: Course, device: str = "cpu", progress: bool = False) -> list[Row]:
    """Does the runs that the cells need, each once, and judges the cells. A run that fails costs only its own cells."""
    runs = list({run.name: run for cell in cells for run in cell.runs}.values())
    with tempfile.TemporaryDirectory(prefix="wrbench-equivalence-") as folder:
        root = Path(folder)
        Digits.build().write(root)
        torch.save(_initial(course), root / "initial.pt")
        capacity = RANKS_A_GPU * torch.cuda.device_count() if device == "cuda" else 2 * (os.cpu_count() or 1)
        found = groups.execute(runs, root, device, capacity, _Progress(runs) if progress else lambda run: None)
        results = Results(found, root, course)
        return [cell.row(results) for cell in cells]


def _initial(course: Course) -> dict[str, torch.Tensor]:
    trial = make(course, next(iter(ARMS)), BACKENDS[0])
    return models.build(trial.workload, trial.seed).state_dict()


class _Progress:
    """A line that is rewritten on a terminal, else a line every tenth."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs, self._total = len(runs), sum(run.cost for run in runs)
        self._done, self._cost, self._told, self._start = 0, 0.0, 0.0, time.monotonic()

    def __call__(self, run: Run) -> None:
        self._done, self._cost = self._done + 1, self._cost + run.cost
        share, passed = self._cost / self._total, time.monotonic() - self._start
        terminal = sys.stderr.isatty()
        if not terminal and share < self._told + 0.1 and self._done < self._runs:
            return
        self._told = share
        line = f"{self._done} of {self._runs} runs, {passed / 60:.1f} min, about {max(0.0, passed * (1 / share - 1)) / 60:.1f} min left"
        print(
            f"\r\x1b[K{line}" if terminal else line, end="" if terminal and self._done < self._runs else "\n", file=sys.stderr, flush=True
        )
