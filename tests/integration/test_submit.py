"""Studies through the command line, submitit and real training: what is submitted once, stopped, killed and gone on with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import journal
from harness.config import Local
from harness.store import Store, TrialFolder
from harness.study import load
from launch import status, submit

SECONDS = 180.0
"""no wait in these tests should last so long"""


class Study:
    """A study file and its store, driven as a user drives them."""

    def __init__(self, folder: Path, data: Path, **document: Any) -> None:
        self.file = folder / "mine.yaml"
        self.store = Store(folder / "runs")
        arms = {
            "A": {"optimizer": {"name": "adam", "lr": 0.002}, "schedule": {"name": "cosine"}},
            "B": {"optimizer": {"name": "sgd", "lr": 0.05}, "schedule": {"name": "cosine"}},
        }
        base = {"workload": {"name": "mnist5k_cnn", "data": {"path": str(data)}}, "arms": arms, "search": {"seeds": 1}}
        self.file.write_text(yaml.safe_dump(base | document))

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        """In a session of its own, as a terminal has."""
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "study", command, str(self.file), "--store", str(self.store.root), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, *options: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        return ended(self.start(command, *options))

    def states(self) -> dict[tuple[str, str], status.Row]:
        """(arm, phase) -> its row of the status"""
        return {(row.arm, row.phase): row for row in status.rows(load(self.file), self.store)}

    def folder(self, arm: str) -> TrialFolder:
        """Of the arm's first trial."""
        return self.store.trial("mine", str(self.states()[arm, "search"].trial_id))


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def wait(until: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def rank_pids(folder: TrialFolder, study: Study) -> list[int]:
    """Processes of the ranks of the job that runs a trial, rank 0 first."""
    lines = [json.loads(line) for line in (study.store.study("mine") / "ledger.jsonl").read_text().splitlines()]
    job = next(line["job_id"] for line in reversed(lines) if line["trial_id"] == folder.path.name and line["event"] == "submitted")
    return sorted(int(pid) for pid in Path(f"/proc/{job}/task/{job}/children").read_text().split())


@pytest.fixture
def short(tmp_path: Path, mnist5k: Path) -> Study:
    return Study(tmp_path, mnist5k, ranks=1, budget={"epochs": 1}, finalists={"top": 1, "seeds": 1})


def test_a_study_is_run_once_and_a_failed_trial_does_not_stop_it(short: Study) -> None:
    b = short.folder("B")
    first = short.start("submit")
    wait(short.folder("A").is_running)
    broken = yaml.safe_load(b.config.read_text())
    broken["workload"]["data"]["path"] = "nowhere"
    b.config.write_text(yaml.safe_dump(broken))
    said = f"submitted 0, running 1, finished 0\nanother submission runs them: process {first.pid} on {socket.gethostname()}\n"
    assert short.run("submit") == (0, said, "")

    code, out, err = ended(first)
    assert code == 1, err
    assert "submitted 3, running 0, finished 2, failed 1\n" in out
    assert [line for line in err.splitlines() if "B seed 0" in line and "failed" in line and "nowhere" in line]
    rows = short.states()
    assert {key: row.state for key, row in rows.items()} == {
        ("A", "search"): "finished", ("A", "finalists"): "finished", ("B", "search"): "failed", ("B", "finalists"): "pending",
    }  # fmt: skip
    assert "nowhere" in rows["B", "search"].last_error
    assert rows["A", "search"].run_id is not None

    code, out, err = short.run("submit")
    assert code == 1 and "submitted 0, running 0, finished 2" in out and "--retry" in err

    code, out, err = short.run("submit", "--retry")
    assert code == 0, err
    assert "submitted 2, running 0, finished 4\n" in out
    assert [row.attempts for row in short.states().values()] == [1, 1, 2, 1]


def test_stopped_and_killed_trials_are_gone_on_with(tmp_path: Path, mnist5k: Path) -> None:
    arms = {"A": {"optimizer": {"name": "adam", "lr": 0.002}, "schedule": {"name": "cosine"}}}
    named = tmp_path / "my rüns"  # as an address this would be my%20r%C3%BCns, where ranks do not find one another
    named.mkdir()
    study = Study(named, mnist5k, ranks=2, budget={"epochs": 7}, arms=arms)
    folder = study.folder("A")

    def further_than(steps: int) -> Callable[[], bool]:
        return lambda: folder.is_running() and folder.state().step > steps

    # Ctrl-C at the terminal, which every process of the session gets
    submitter = study.start("submit")
    wait(further_than(1))
    os.killpg(submitter.pid, signal.SIGINT)
    code, out, err = ended(submitter)
    assert code == 130, err
    record = journal.fold(journal.read(folder.journal))
    saved = record.committed
    assert record.stopped and 0 < saved < 245
    assert f"saved, {saved} of 245 steps" in out and f"to go on: wrbench study submit {shlex.quote(str(study.file))}" in out
    assert study.states()["A", "search"].state == "interrupted"

    # a rank is killed
    submitter = study.start("submit")
    wait(further_than(saved))
    os.kill(rank_pids(folder, study)[1], signal.SIGKILL)
    code, out, err = ended(submitter)
    assert code == 1 and "interrupted" in err, err
    starts = journal.fold(journal.read(folder.journal)).starts
    assert [start["resumed_from"] for start in starts] == [0, saved]

    # the submitter is killed: its job goes on, and is not doubled
    submitter = study.start("submit")
    wait(lambda: folder.newest_attempt() == 3 and folder.is_running())
    submitter.kill()
    submitter.wait()
    code, out, err = study.run("submit")
    assert code == 0, err
    assert "is running already: waiting for it" in out and "submitted 0, running 0, finished 1" in out
    result = json.loads(folder.result.read_text())
    assert (result["state"], result["attempts"], result["step"]) == ("finished", 3, 245)


def test_ranks_that_would_wait_for_a_dead_one_are_ended(tmp_path: Path, mnist5k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NCCL, which notices no death; submitit waits for them too."""
    monkeypatch.setattr("launch.local.SECONDS_APART", 1.0)
    study = Study(
        tmp_path,
        mnist5k,
        ranks=2,
        budget={"epochs": 30},
        arms={"A": {"optimizer": {"name": "sgd", "lr": 0.05}, "schedule": {"name": "cosine"}}},
    )
    folder = study.folder("A")

    def disturb() -> None:
        wait(lambda: folder.is_running() and folder.state().step > 5)
        stands, dies = rank_pids(folder, study)
        os.kill(stands, signal.SIGSTOP)
        os.kill(dies, signal.SIGKILL)

    with ThreadPoolExecutor() as pool:
        disturbed = pool.submit(disturb)
        again = {"phase": None, "retry": False, "again": "", "sync": ""}
        assert submit.submit(load(study.file), study.store, Local(executor="local"), **again) == 1
        disturbed.result()
    assert not folder.is_running() and folder.state().state == "interrupted"


def test_detached_and_cancelled(tmp_path: Path, mnist5k: Path) -> None:
    study = Study(tmp_path, mnist5k, ranks=1, budget={"epochs": 50})
    folder = study.folder("A")
    code, out, _ = study.run("submit", "--detach")
    assert code == 0 and "in the background" in out
    log = Path(out.rpartition("log: ")[2].strip())
    wait(lambda: folder.is_running() and folder.state().step > 1)
    code, out, err = study.run("cancel")
    assert code == 0 and "saved, " in out, err
    assert {row.state for row in study.states().values()} == {"interrupted", "pending"}
    assert "interrupted; to go on" in log.read_text()
    assert study.run("cancel") == (0, "nothing of mine is running\n", "")


def test_debug_runs_in_this_process(short: Study) -> None:
    code, out, err = short.run("submit", "--cluster", "debug", "--phase", "search")
    assert code == 0, err
    assert "submitted 2, running 0, finished 2" in out
    starts = journal.fold(journal.read(short.folder("A").journal)).starts
    assert [start["world_size"] for start in starts] == [1]
