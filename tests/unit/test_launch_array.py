"""What SLURM is given, and what the ledger and a trial's lives say of it, without SLURM."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness import provenance
from harness.config import BadInput, Slurm
from harness.store import Store
from harness.study import LoadedStudy, load
from launch import array, slurm, snapshot, submit
from launch.ledger import Ledger, Life
from launch.status import _unsaved, hours
from tests.synthetic import STUDY, write_study
from tests.trials import trial


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedStudy:
    return write_study(Store(tmp_path), STUDY)


def stamp(second: float) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()


def life(attempt: int, began: float, ended: float | None, **fields: Any) -> Life:
    started = {"attempt": attempt, "time": stamp(began), "ranks": 4}
    return Life(started, None if ended is None else {"attempt": attempt, "time": stamp(ended), "state": "interrupted", **fields})


def journal(attempt: int, *lines: tuple[float, str]) -> list[dict[str, Any]]:
    return [{"attempt": attempt, "timestamp": second * 1000, "event": event} for second, event in lines]


def test_gpu_hours_used_and_lost() -> None:
    hour = 3600.0
    lives = [
        life(1, 0, 2 * hour),  # stopped half an hour after its last checkpoint
        life(2, 10 * hour, None),  # killed with its supervisor: ends at its last line
        life(3, 20 * hour, 21 * hour, state="finished"),
    ]
    lines = [
        *journal(1, (0.1 * hour, "start"), (1.5 * hour, "checkpoint")),
        *journal(2, (10.1 * hour, "start"), (10.5 * hour, "checkpoint"), (10.75 * hour, "metrics")),
        *journal(3, (20.2 * hour, "start"), (20.9 * hour, "checkpoint"), (21 * hour, "end")),
    ]
    used, lost = hours(lives, lines, now=99 * hour)
    assert used == pytest.approx(4 * (2 + 0.75 + 1))
    assert lost == pytest.approx(4 * (0.5 + 0.25 + 0.1 + 0.2))  # since the checkpoints, and two restarts
    running, _ = hours([life(1, 0, None)], journal(1, (60, "start")), now=hour)
    assert running == pytest.approx(4)


def test_hours_of_a_trial_that_nobody_runs_stand_still() -> None:
    assert hours([life(1, 0, None)], journal(1, (60, "start"), (3600, "metrics")), now=None)[0] == pytest.approx(4)


def test_a_life_that_claimed_no_number_has_none_of_the_next_ones_lines() -> None:
    lives = [life(1, 0, 360), life(1, 400, 4000, state="finished")]
    lines = journal(1, (400, "start"), (3900, "checkpoint"), (4000, "end"))
    assert hours(lives, lines, now=None) == (pytest.approx(4 * (360 + 3600) / 3600), pytest.approx(4 * 360 / 3600))


def test_a_save_that_failed_is_told_until_one_succeeds() -> None:
    lines = [*journal(1, (1, "checkpoint")), {"event": "warning", "message": "the checkpoint of step 7 could not be written (full)"}]
    assert _unsaved(lines) == lines[-1]["message"]
    assert _unsaved([*lines, *journal(1, (3, "checkpoint"))]) is None


def test_lines_of_the_ledger_are_folded_by_submission_and_life(tmp_path: Path) -> None:
    ledger, one = Ledger(tmp_path), trial(seed=1)
    ledger.append("queued", one, 1, token="a", index=0)
    ledger.append("submitted", one, 1, token="a", index=0, job_id="7_0")
    ledger.append("started", one, 1, token="a", job_id="7_0", life=0, step=0)
    ledger.append("started", one, 2, token="a", job_id="7_0", life=1, step=0)
    ledger.append("ended", one, 1, token="a", job_id="7_0", life=0, kind="killed")  # from a node that was cut off
    ledger.append("queued", one, 3, token="b", index=4)
    ledger.append("submitted", one, 1, token="a", index=0, job_id="7_0")  # late, of the submission before
    entry = ledger.entries()[one.trial_id]
    assert (entry.token, entry.index, entry.job_id, entry.since) == ("b", 4, None, 2)
    assert [life.ended and life.ended["kind"] for life in entry.lives] == ["killed", None]


def test_a_line_torn_by_a_full_disk_swallows_none(tmp_path: Path) -> None:
    ledger, one = Ledger(tmp_path), trial(seed=1)
    ledger.append("queued", one, 1, token="a", index=0)
    with open(ledger.path, "a") as file:
        file.write('{"event": "submi')
    ledger.append("submitted", one, 1, token="a", index=0, job_id="7_0")
    assert [line["event"] for line in ledger.lines()] == ["queued", "submitted"]


def test_many_processes_append_whole_lines(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from launch.ledger import Ledger; from tests.trials import trial
one = trial(seed=int(sys.argv[2]))
for n in range(200): Ledger(Path(sys.argv[1])).append("started", one, n, filler="x" * 3000)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(seed)]) for seed in range(4)]
    assert [w.wait(120) for w in writers] == [0] * 4
    lines = list(Ledger(tmp_path).lines())
    assert sorted((line["seed"], line["attempt"]) for line in lines) == [(s, n) for s in range(4) for n in range(200)]


def test_the_snapshot_is_what_runs(tmp_path: Path) -> None:
    code = snapshot.take(tmp_path / "study")
    assert snapshot.take(tmp_path / "study") == code, "unchanged code is kept once"
    described = json.loads((code / "snapshot.json").read_text())
    assert described["code"] == code.name and described["commit"] == provenance.code()["commit"]
    assert (code / "uncommitted.diff").exists() and not list(code.rglob("__pycache__"))
    (tmp_path / "harness").mkdir()  # in the working directory, which must not be looked at
    (tmp_path / "harness" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    where = "import harness.config, launch.task, analysis; print(harness.config.__file__, launch.task.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=snapshot.environment(code), capture_output=True, text=True)
    assert found.stdout.split() == [str(code / "harness" / "config.py"), str(code / "launch" / "task.py")], found.stderr


def test_trials_share_tasks_and_arrays_are_as_few_as_the_cluster_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [trial(seed=n) for n in range(25)]
    assert [len(ids) for ids in array.packed(trials, 10)] == [10, 10, 5]
    monkeypatch.setattr(slurm, "max_array_size", lambda: 4)
    one, three = (Slurm(executor="slurm", time_minutes=60, trials_per_task=n) for n in (1, 3))
    assert [len(part) for part in array._arrays(trials, one, None)] == [4] * 6 + [1]
    assert [len(part) for part in array._arrays(trials, three, None)] == [12, 12, 1]
    assert [len(part) for part in array._arrays(trials, one, 6)] == [4, 2], "no more tasks than the user may have"


def test_nothing_is_queued_for_a_script_that_cannot_be_made(loaded: LoadedStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import sbatch

    def unanswered(cluster: Slurm) -> None:
        raise slurm.SlurmError("sbatch: no answer within 60 s")

    monkeypatch.setattr(sbatch, "check", unanswered)
    shape = Slurm(executor="slurm", time_minutes=60).shape(1)
    with pytest.raises(slurm.SlurmError):
        array._submit_array(loaded, Store(tmp_path), shape, [trial(study=loaded.name)], tmp_path / "code")
    assert not list(Ledger(Store(tmp_path).study(loaded.name)).lines())


def test_ranks_that_do_not_divide_the_batch_are_found_on_the_login_node(loaded: LoadedStudy, tmp_path: Path) -> None:
    eight = Slurm(executor="slurm", time_minutes=60, gpus_per_node=8, overrides={"finalists": {"nodes": 2}})
    with pytest.raises(BadInput, match=r"budget\.global_batch_size: .* is not divisible by"):
        array.check(loaded, Store(tmp_path), eight)


def test_an_option_that_cannot_be_checked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch is installed, and knows no cluster: a laptop."""
    from launch import sbatch

    def run(*command: str) -> str:
        raise slurm.SlurmError("sbatch: fatal: Could not establish a configuration source")

    monkeypatch.setattr(sbatch.shutil, "which", lambda name: name)
    monkeypatch.setattr(sbatch.slurm, "run", run)
    with pytest.raises(BadInput, match=r"^sbatch.exclude: cannot be checked, since sbatch does not run here: .* configuration source$"):
        sbatch.check(Slurm(executor="slurm", gpus_per_node=8, time_minutes=10, sbatch={"exclude": "n1"}))


def test_a_retried_search_leaves_its_arms_finalists_open(synthetic_store: Path) -> None:
    """They would be those of the survivors, and trained for nothing where the retried point wins."""
    store = Store(synthetic_store)
    synthetic, cluster = load(store.study("synthetic") / "study.yaml"), Slurm(executor="slurm", time_minutes=60)

    def missing(phase: str | None, retry: bool) -> list[tuple[str, str]]:
        return [(t.arm, t.phase) for t in array.Work(synthetic, store, cluster, phase, retry).missing]

    assert missing(None, False) == [("AdamWR", "finalists")] * 2
    assert missing(None, True) == [("AdamWR", "search")]
    assert missing("finalists", True) == [("AdamWR", "finalists")] * 2
    lines = submit.dry_run(synthetic, store, None, True)
    assert sum(line.startswith("later   AdamWR seed 100") for line in lines) == 5
