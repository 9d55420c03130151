"""How faults are run and told; the faults themselves are in tests/slurm/test_faults.py."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from harness.journal import Journal
from harness.store import Store
from tests.faults.lab import Fault, Lab, perform, tally
from tests.report import Row, failed, line, publish, refused, row
from tests.trials import trial


def performed(fault: Fault, tmp_path: Path, seed: int = 7) -> list[Row]:
    return list(perform(fault, data=tmp_path, few=tmp_path, thorough=False, seed=seed, scratch=tmp_path))


def test_a_fault_that_raises_is_a_failed_row_and_leaves_nothing(tmp_path: Path) -> None:
    def rows(lab: Lab) -> Iterator[Row]:
        (lab.folder / "file").touch()
        yield row("first", 0, 0)
        raise ValueError("a\nreason")

    first, second = performed(Fault("breaks", False, rows), tmp_path)
    assert first.ok and not second.ok
    assert second.name == "breaks" and second.note.startswith("ValueError: a reason (test_faults.py:")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_draws_the_same_with_the_same_seed_whichever_ran_before(tmp_path: Path) -> None:
    def rows(lab: Lab) -> Iterator[Row]:
        yield row("drawn", lab.rng.random(), None)

    one, other = Fault("one", False, rows), Fault("other", False, rows)
    drawn = [performed(fault, tmp_path)[0].figure for fault in (one, other, one)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert performed(one, tmp_path, seed=8)[0].figure != drawn[0]


def test_without_a_cluster_there_is_none_to_work_with(tmp_path: Path) -> None:
    def rows(lab: Lab) -> Iterator[Row]:
        yield row(str(lab.cluster), 0, 0)

    assert "slurm=False" in performed(Fault("wrong", False, rows), tmp_path)[0].note


ROWS = [row("fine", 1.0, 2.0), row("worse", 1.5, 2.0, "a note"), refused("elsewhere", "no GPU"), row("told", 9.0, None)]


@pytest.mark.parametrize(
    ("more", "last"),
    [
        ([], "PASS some: 4 cells, 1 refused, worst worse 1.5 of 2"),
        ([row("over", 3.0, 2.0)], "FAIL some: 5 cells, 1 refused, worst over 3 of 2"),
        ([failed("broken", "why")], "FAIL some: 5 cells, 1 refused, worst broken -"),
        ([replace(row("below", 0.5, None), limit=2.0, exceeds=True)], "PASS some: 5 cells, 1 refused, worst below 0.5 of >2"),
        ([row("never", float("nan"), 1.0)], "FAIL some: 5 cells, 1 refused, worst never nan of 1"),
        ([row("else", 0.0, 1.0, "what else is wrong", ok=False)], "FAIL some: 5 cells, 1 refused, worst else 0 of 1"),
    ],
)
def test_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[Row], last: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert publish("some", [*ROWS, *more]) == last.startswith("FAIL")
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == last and told[:-1] == [line(r, width=len(max((r.name for r in [*ROWS, *more]), key=len))) for r in [*ROWS, *more]]
    written = json.loads(Path("build/some.json").read_text())
    assert written[1] == {"name": "worse", "figure": 1.5, "limit": 2.0, "ok": True, "note": "a note", "refused": False, "exceeds": False}
    publish("some", [*ROWS, *more], shown=[*ROWS, *more])
    assert len(capsys.readouterr().out.splitlines()) == 1 + sum(not r.ok for r in more)


def test_tally_counts_what_is_missing_doubled_and_foreign(tmp_path: Path) -> None:
    store, t = Store(tmp_path), trial(study="s")
    folder = store.trial("s", t.trial_id)
    folder.write_config(t)
    journal = Journal(folder.journal, t.trial_id, 1)
    for step in range(3):
        journal.write(step, metrics={"loss": 1.0})
    journal.write(2, event="end", state="finished")
    stamps = [json.loads(text)["timestamp"] for text in folder.journal.read_text().splitlines()[:3]]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.executescript(
            "CREATE TABLE experiments (experiment_id, name); CREATE TABLE runs (run_uuid, experiment_id, lifecycle_stage);"
            "CREATE TABLE tags (run_uuid, key, value); CREATE TABLE metrics (run_uuid, key, step, timestamp, value);"
            "INSERT INTO experiments VALUES (1, 's'), (2, 'other');"
            "INSERT INTO runs VALUES ('r', 1, 'active'), ('gone', 1, 'deleted'), ('else', 2, 'active');"
        )
        database.executemany("INSERT INTO tags VALUES (?, 'trial_id', ?)", [(run, t.trial_id) for run in ("r", "gone", "else")])

        def holds(*points: tuple[int, int]) -> str:
            database.execute("DELETE FROM metrics")
            database.executemany("INSERT INTO metrics VALUES ('r', 'loss', ?, ?, 1.0)", points)
            database.commit()
            return str(tally(store, "s"))

        whole = list(enumerate(stamps))
        assert holds(*whole) == "1 trials, 1 runs, 3 points, 0 missing, 0 doubled, 0 in no journal"
        assert holds(*whole[:2]).endswith("1 missing, 0 doubled, 0 in no journal")
        assert holds(*whole, whole[0]).endswith("0 missing, 1 doubled, 0 in no journal")
        assert holds(*whole, (2, stamps[2] + 1)).endswith("0 missing, 1 doubled, 1 in no journal")
        assert tally(store, "s").wrong == 2
        database.execute("INSERT INTO runs VALUES ('r2', 1, 'active')")
        database.execute("INSERT INTO tags VALUES ('r2', 'trial_id', ?)", [t.trial_id])
        assert holds(*whole).startswith("1 trials, 2 runs") and tally(store, "s").wrong == 1
