"""What a supervisor makes of the lives before this one, and of where a trial stands; without SLURM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from harness.config import Slurm
from harness.store import Store
from launch import slurm, task
from launch.ledger import Entry, Ledger, Life
from launch.standing import _of_slurm
from launch.task import End, Supervisor
from tests.trials import trial

PLACE = {"token": "t", "job_id": "7_0", "life": 0, "nodes": "n1", "ranks": 1, "step": 0}


def supervising(root: Path) -> Supervisor:
    made = Supervisor.__new__(Supervisor)  # its __init__ wants to be in a job
    made.store = Store(root)
    made.ledger = Ledger(made.store.study("s"))
    made.cluster = Slurm(executor="slurm", time_minutes=10, signal_lead_seconds=30, max_retries=2)
    made.job_id, made.nodes, made.attempt, made.terminated, made.began = "7_0", "n1", 1, False, time.monotonic()
    return made


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    return supervising(tmp_path)


@pytest.mark.parametrize(("kind", "hopeless"), [("terminated", False), ("superseded", False), ("preempted", False), ("error", True)])
def test_ends_that_are_no_failure_do_not_use_up_the_retries(supervisor: Supervisor, kind: str, hopeless: bool) -> None:
    t = trial()
    folder = supervisor.store.trial("s", t.trial_id)
    folder.write_config(t)
    supervisor.ledger.append("queued", t, 1, token="t", index=0)
    for attempt, how in enumerate([kind, kind, "error"], 1):
        supervisor.ledger.append("started", t, attempt, **PLACE)
        supervisor.ledger.append("ended", t, attempt, kind=how, state="interrupted", step=0)
    supervisor.attempt = folder.newest_attempt()
    supervisor.given = type("Given", (), {"token": "t"})()
    assert supervisor._is_hopeless(End(folder.state(), "error", "boom"), t, folder) is hopeless


@pytest.mark.parametrize(
    ("lives", "hopeless"),
    [
        ([("n1", "error", "boom"), ("n2", "error", "boom")], True),
        ([("n1", "error", "boom"), ("n1", "error", "boom")], False),  # there was no other node
        ([("n1", "error", "bang"), ("n2", "error", "boom")], False),
        ([("n1", "node", "boom"), ("n2", "node", "boom")], False),  # there are more than two bad nodes on earth
        ([("n1", "node", "boom"), ("n2", "node", "boom"), ("n3", "node", "boom")], True),  # max_retries
    ],
)
def test_the_same_error_on_a_second_node_is_the_trials_own(
    supervisor: Supervisor, lives: list[tuple[str, str, str]], hopeless: bool
) -> None:
    t = trial()
    folder = supervisor.store.trial("s", t.trial_id)
    folder.write_config(t)
    supervisor.ledger.append("queued", t, 1, token="t", index=0)
    for node, kind, error in lives:
        supervisor.ledger.append("started", t, 1, **PLACE | {"nodes": node})
        supervisor.ledger.append("ended", t, 1, kind=kind, error=error, state="interrupted", step=0)
    supervisor.attempt = folder.newest_attempt()
    supervisor.given = type("Given", (), {"token": "t"})()
    assert supervisor._is_hopeless(End(folder.state(), *lives[-1][1:]), t, folder) is hopeless


@pytest.mark.parametrize(
    ("said", "kind", "rank", "expected"),
    [
        ("srun: error: n3: tasks 4-5: Exited with exit code 1\nsrun: error: n2: task 3: Exited with exit code 1\n", "error", 3, "n2"),
        ("srun: error: n3: tasks 4-5: Exited with exit code 1\nsrun: error: n2: task 3: Terminated\n", "error", None, "n3"),
        ("srun: error: n3: tasks 4-5: Exited with exit code 1\n", "communication", 4, "n[1-3]"),  # who did not answer?
        ("srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection failure\n", "node", None, "n2"),
        ("", "error", 0, "n[1-3]"),
    ],
)
def test_the_node_of_the_rank_that_failed_is_blamed(
    supervisor: Supervisor, tmp_path: Path, said: str, kind: str, rank: int | None, expected: str
) -> None:
    supervisor.nodes = "n[1-3]"
    (tmp_path / "7_0.0.1_srun_log.err").write_text(said)
    assert supervisor._to_blame(kind, rank, tmp_path / "7_0.0.1") == expected


def test_a_life_is_late_once_the_signal_may_have_come(supervisor: Supervisor) -> None:
    assert not supervisor._is_late()
    supervisor.began -= 600 - 30 - 60  # SLURM may send it a minute early
    assert supervisor._is_late()


def _watching(root: Path, what: str, pid: Connection) -> None:
    """Watches ranks that never write a line, for at most two seconds; its exit status: whether they were ended for that."""
    with subprocess.Popen(["sleep", "60"]) as ranks, pytest.MonkeyPatch.context() as patched:
        made = supervising(root)
        made.cluster = made.cluster.model_copy(update={"stall_timeout_seconds": 2})
        patched.setattr(task, "SUSPENDED", 1.0)
        patched.setattr(made, "_kill_ranks", subprocess.Popen.kill)
        if what == "full":
            patched.setattr(task, "_has_room", lambda folder: False)
        folder = made.store.trial("s", "t")
        folder.path.mkdir(parents=True)
        pid.send(ranks.pid)
        sys.exit(made._watch(ranks, folder))


@pytest.mark.parametrize("what", ["stalled", "suspended", "full"])
def test_a_job_that_was_suspended_or_has_no_room_has_not_stalled(tmp_path: Path, what: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    watching = spawn.Process(target=_watching, args=(tmp_path, what, there))
    watching.start()
    ranks = here.recv()
    assert watching.pid is not None
    if what == "suspended":  # as SLURM does it, all processes of the job
        time.sleep(1)  # it watches by then
        os.kill(watching.pid, signal.SIGSTOP)
    if what != "stalled":
        time.sleep(4)
        os.kill(watching.pid, signal.SIGCONT)
        time.sleep(1)
        os.kill(ranks, signal.SIGKILL)
    watching.join(60)
    assert watching.exitcode == (1 if what == "stalled" else 0)


def test_only_the_last_step_says_how_the_last_step_ended(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = "7_0|RUNNING\n7_0.batch|RUNNING\n7_0.0|OUT_OF_MEMORY\n7_0.10|FAILED\n7_0.2|OUT_OF_MEMORY\n"
    monkeypatch.setattr(slurm, "run", lambda *command, seconds: printed)
    assert supervisor._slurms_word() is None
    printed += "7_0.11|OUT_OF_MEMORY\n"
    assert supervisor._slurms_word() == "OUT_OF_MEMORY"


def test_a_trial_runs_also_when_a_cut_off_node_wrote_last(tmp_path: Path) -> None:
    def started(life: int) -> dict[str, Any]:
        return {"event": "started", "attempt": life + 1, "life": life}

    late = {"event": "ended", "attempt": 1, "kind": "superseded"}
    entry = Entry(newest=late, token="t", job_id="7_0", lives=[Life(started(0), late), Life(started(1))])
    queued = slurm.Task("7_0", "RUNNING", "", "n2", "t", "me")
    assert _of_slurm(Store(tmp_path).trial("s", "t").state(), entry, queued, known=True) == "running"
