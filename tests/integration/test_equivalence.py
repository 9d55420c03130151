"""A representative part of `make equivalence`, through the same functions: fewer steps, still two restarts."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.equivalence import groups, report
from tests.equivalence.cells import Cell, Results, control_run, table
from tests.equivalence.problem import BACKENDS, MOVED, SHORT
from tests.equivalence.rank import ControlRun, EngineRun
from tests.integration import ranks  # noqa: F401 - its list of preloaded modules must not come after this one's
from tests.report import Row, publish

groups.preload()

NORMALISED = "|".join(MOVED)
TAKEN = [
    rf"(ddp|deepspeed|fsdp) \d( offload)?, ({NORMALISED})",
    rf"control reordered, ({NORMALISED})",
    rf"mistake: .*, ({NORMALISED})",
    r"(ddp|deepspeed|fsdp) \d bf16 recorded gradients, AdamW normalised",
    rf"ddp 0 saved at world 2, resumed at 2, ({NORMALISED})",
    rf"ddp 0 resumed on a restart, ({NORMALISED})",
    r"(ddp 1|deepspeed [12]) saved at world 2, resumed at 4, SGDW normalised",
    r"deepspeed 3 saved at world 1, resumed at 2, AdamW normalised",
    r"fsdp 3 saved at world 2, resumed at 1, AdamW normalised",
    r"saved by ddp 0, resumed by (deepspeed 1|fsdp 3), SGDW normalised",
    r"saved by (deepspeed 3|fsdp 3), resumed by ddp 0, AdamW normalised",
    r"deepspeed 1 evaluated at worlds .*, AdamW normalised",
]
CELLS = [cell for cell in table(SHORT) if any(re.fullmatch(pattern, cell.name) for pattern in TAKEN)]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.name: row for row in report.rows(CELLS, SHORT)}


@pytest.mark.parametrize("name", [cell.name for cell in CELLS])
def test_cell(rows: dict[str, Row], name: str) -> None:
    assert rows[name].ok, rows[name]
    assert not rows[name].refused, rows[name]


def test_every_pattern_takes_a_cell() -> None:
    for pattern in TAKEN:
        assert any(re.fullmatch(pattern, cell.name) for cell in CELLS), pattern


class Killed(ControlRun):
    def execute(self, *_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_fails_costs_its_own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank killed, one run that raises on every rank, and the runs that shared its process group."""
    good = next(cell for cell in CELLS if cell.name == "ddp 0, SGDW normalised")
    (run,) = (run for run in good.runs if isinstance(run, EngineRun))
    beyond = replace(run, name="beyond the end", stop=SHORT.steps + 1)
    resumed = replace(run, name="resumed from it", start=SHORT.steps + 1, source=beyond.name)
    killed = Killed("killed", "SGDW normalised", SHORT)

    def judge(run: EngineRun, results: Results, name: str) -> Row:
        results.of(run)
        return Row(name, 0.0, 0.0, True)

    bad = [Cell(run.name, (run,), partial(judge, run)) for run in (beyond, killed)]
    bad.append(Cell(resumed.name, (beyond, resumed), partial(judge, resumed)))
    found = {row.name: row for row in report.rows([*bad, good], SHORT)}
    assert found[good.name].ok, found[good.name]
    assert "step: 36 must be in [0, 36)" in found[beyond.name].note
    assert "exit code -9" in found[killed.name].note
    assert found[resumed.name].note == "needs beyond the end, which failed"
    assert not any(found[cell.name].ok for cell in bad)

    monkeypatch.chdir(tmp_path)
    assert publish("equivalence", list(found.values())) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL equivalence: 4 cells, 0 refused, worst ")


def test_a_refused_cell_fails_only_where_refusing_is_not_allowed() -> None:
    refused = partial(Cell, runs=(), judge=lambda results, name: Row(name, 0.0, 0.0, True), refused="not supported upstream")
    rows = [
        refused(name).row(Results({}, Path(), SHORT)) for name in ("fsdp 3, SGD-L2", "deepspeed 2 bf16 end to end, SGD-L2", "ddp 1, SGD-L2")
    ]
    assert [row.ok for row in rows] == [True, True, False]
    assert all(row.refused and row.note == "not supported upstream" for row in rows)


def test_the_whole_table_has_every_cell() -> None:
    names = [cell.name for cell in table(SHORT)]
    assert len(set(names)) == len(names)
    fp32 = {name for name in names if re.fullmatch(r"(ddp [01]|deepspeed [0-3]|fsdp 3), .*", name)}
    assert len(fp32) == len(BACKENDS) * 6
    assert not any(cell.refused for cell in table(SHORT))
    assert control_run(SHORT, MOVED[0]).marks == (SHORT.steps,)
