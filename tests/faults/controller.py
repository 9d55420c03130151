"""SLURM's own daemons away: slurmctld restarted, or down when a signal comes; jobs that SLURM holds; no slurmdbd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import journal
from harness.store import TrialFolder
from harness.study import load
from launch.status import rows
from tests.faults.lab import Lab, fault
from tests.report import Row, row
from tests.slurm.cluster import Cluster
from tests.slurm.study import SECONDS, Study, repeated, steps, until

NODES: dict[str, Any] = {"tasks_per_node": 1, "gpus_per_node": 1, "stall_timeout_seconds": 600}
"""of a cluster file: two ranks are on two nodes"""
ONE: dict[str, Any] = {"tasks_per_node": 1, "gpus_per_node": None, "stall_timeout_seconds": 600}


@fault("slurmctld restarted in the middle; down exactly when the signal comes", slurm=True, beside=True)
def absent_controller(lab: Lab) -> Iterator[Row]:
    seldom = {"every_epochs": 5}
    budget = {"epochs": 25 if lab.thorough else 15}
    # srun itself waits some seconds for a controller: to refuse the supervisor, too, takes one that is away for longer than
    # the small size allows, or this.
    wrapped = [] if lab.thorough else [f"export PATH={_refuses_twice(lab.folder / 'bin')}:$PATH"]
    study = Study(
        lab.folder, lab.data, NODES | {"setup": wrapped}, search={"seeds": 2}, budget=budget, evaluation=seldom, checkpoint=seldom
    )
    study.submit()
    until(lambda: len(study.folders()) == 2 and all(steps(folder) > 20 for folder in study.folders()))
    through, signalled = study.folders()
    job = study.entry(signalled).job_id

    restarts = 3 if lab.thorough else 1
    for number in range(restarts):
        lab.cluster.stop_controller(signal.SIGKILL if number % 2 else signal.SIGTERM)
        time.sleep(lab.rng.uniform(1, 4))
        lab.cluster.start_controller()
        _until_further(through, 5)

    down = 60 if lab.thorough else 8  # from about 12 s on a node asks only once a minute, and resuming takes that long
    lab.cluster.stop_controller()
    assert not signalled.result.exists(), "the trial ended before it could be signalled"
    sent = time.time()
    for rank in lab.cluster.ranks(job):
        os.kill(rank.pid, signal.SIGUSR2)
    until(lambda: _saved(signalled) is not None, 60)
    saved = (_saved(signalled) or 0) - sent
    yield row(
        "USR2 while slurmctld is down: seconds until the checkpoint", saved, 10 if lab.thorough else None, f"at step {steps(signalled)}"
    )
    time.sleep(max(0, sent + down - time.time()))
    lab.cluster.start_controller()
    back = time.monotonic()
    until(lambda: signalled.newest_attempt() == 2)
    resumed = time.monotonic() - back
    study.wait("finished")

    wrong = sum(study.results()[f.path.name]["attempts"] != attempts or repeated(f) > 0 for f, attempts in ((through, 1), (signalled, 2)))
    kinds = [life.requeued and life.requeued["kind"] for life in study.entry(signalled).lives]
    note = (
        f"{restarts} restart(s), then {down} s without it: attempts {[f.newest_attempt() for f in (through, signalled)]}, requeued {kinds}"
    )
    yield row("slurmctld restarted or down: trials lost, restarted without need, or with steps repeated", wrong, 0, note)
    yield row("slurmctld back: seconds until the trial is resumed", resumed, 120 if lab.thorough else None, f"after {down} s")


def _refuses_twice(folder: Path) -> Path:
    """A folder for PATH: `scontrol requeue` fails two times, as without a controller."""
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(
        f"""#!/bin/bash
if [[ $1 == requeue && $(cat {folder}/refused 2> /dev/null | wc -l) -lt 2 ]]; then
    echo refused >> {folder}/refused
    echo "Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
exec {shutil.which("scontrol")} "$@"
"""
    )
    script.chmod(0o755)
    return folder


def _until_further(folder: TrialFolder, more: int) -> None:
    now = steps(folder)
    until(lambda: steps(folder) >= now + more)


def _saved(folder: TrialFolder) -> float | None:
    """Seconds since 1970 of the checkpoint with which the trial stopped; None if it has not."""
    lines = list(journal.read(folder.journal))
    if not any(line.get("event") == "stop" for line in lines):
        return None
    return float(next(line["timestamp"] for line in reversed(lines) if line.get("event") == "checkpoint") / 1000)


# --------------------------------------------------------------------------------------------------------- held


@fault("a job that SLURM holds", slurm=True, beside=True)
def held(lab: Lab) -> Iterator[Row]:
    study = Study(lab.folder, lab.data, ONE, ranks=1, budget={"epochs": 4})
    study.submit()
    (folder,) = study.folders()
    until(lambda: steps(folder) > 20)
    job = study.entry(folder).job_id
    subprocess.run(["scontrol", "requeuehold", job], check=True, timeout=60)
    until(lambda: (task := study.trials()[folder.path.name].task) is not None and task.held, 60)
    command = f"scontrol release {job}"
    (told,) = json.loads(study.run("status", "--json")[1])["trials"]
    shown = study.run("status")[1]
    silent = [what for what, text in (("status --json", str(told["reason"])), ("status", shown)) if command not in text]
    yield row("held job: places that do not say how to release it", len(silent), 0, ", ".join(silent) or str(told["reason"]))
    said = study.submit()
    study.wait("finished")
    wrong = int(
        f"released 1 task(s) held after a failed launch or for want of room: {job}" not in said or "submitted 0" not in said
    ) + repeated(folder)
    attempts = folder.newest_attempt()
    yield row("held job: not released by the next submission, or steps repeated", wrong + abs(attempts - 2), 0, said.splitlines()[0])


# -------------------------------------------------------------------------------------------------- no slurmdbd


@fault("no slurmdbd", slurm=True, beside=True)
def no_accounting(lab: Lab) -> Iterator[Row]:
    with lab.another_cluster(accounting=False) as cluster:
        assert subprocess.run(["sacct"], capture_output=True, timeout=60).returncode != 0, "sacct answers"
        yield from _ends(lab, cluster, "without slurmdbd")
    if lab.thorough:
        yield from _ends(lab, lab.cluster, "with slurmdbd")


def _ends(lab: Lab, cluster: Cluster, where: str) -> Iterator[Row]:
    """One row a kind of end: how long it took until the rows of `status --json` had it, and whether that command says it."""
    long: dict[str, Any] = {"ranks": 1, "budget": {"epochs": 1000}, "evaluation": {"every_epochs": 20}, "checkpoint": {"every_epochs": 20}}
    lasting = {"time_minutes": 1, "signal_lead_seconds": 40, "max_timeouts": 0}
    studies = {
        state: Study(lab.folder / where.split()[0] / state, lab.data, ONE | shape, name=state, **document)
        for state, shape, document in (
            *([("exhausted", lasting, long)] if lab.thorough else []),  # a minute
            ("failed", {"max_retries": 0}, long),
            ("cancelled", {}, long),
            ("finished", {}, {"ranks": 1, "budget": {"epochs": 0.2}}),
        )
    }
    for study in studies.values():
        study.submit()

    def kill() -> None:
        for rank in cluster.ranks(studies["failed"].entry(studies["failed"].folder()).job_id):
            os.kill(rank.pid, signal.SIGKILL)

    to_do: dict[str, Callable[[], Any]] = {"failed": kill, "cancelled": lambda: studies["cancelled"].start("cancel")}
    told: dict[str, float] = {}

    def all_told() -> bool:
        for state, study in studies.items():
            if state in to_do and steps(study.folder()) > 0:
                to_do.pop(state)()
            ended = None if state in told else _end(study, state)
            if ended is not None and rows(load(study.file), study.store)[0].state == state:
                told[state] = time.time() - ended
        return len(told) == len(studies)

    try:
        until(all_told, 180)
    except AssertionError:
        raise AssertionError(f"not told: { {state: study.trials() for state, study in studies.items() if state not in told} }") from None
    with suppress(AssertionError):
        until(lambda: not any(study.in_queue() for study in studies.values()), 60)
    asked = {state: study.start("status", "--json") for state, study in studies.items()}
    for state, study in studies.items():
        (trial,) = json.loads(asked[state].communicate(timeout=SECONDS)[0])["trials"]
        stays = trial["state"] == state and not study.in_queue()
        note = f"{trial['state']}, {trial['job_id']}: {trial['last_error'] or 'no error'}"
        yield row(f"{where}: seconds until status says {state}", told[state], 10 if lab.thorough else 30, note, ok=stays)


def _end(study: Study, state: str) -> float | None:
    """Seconds since 1970 when the trial's ranks wrote their last line; None while they are alive, or have not begun."""
    folder = study.folder()
    lines = list(journal.read(folder.journal))
    own = [line for line in lines if not (line.get("event") == "end" and line["state"] == state and state in ("failed", "exhausted"))]
    if not own or folder.is_running():
        return None
    return float(own[-1]["timestamp"] / 1000)
