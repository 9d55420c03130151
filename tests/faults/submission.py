"""Submitters that die, that are answered nothing, that are many, and requests that SLURM refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.ledger import Ledger
from tests.faults.lab import Lab, fault
from tests.report import Row, row
from tests.slurm.study import SECONDS, Study, until

SMALL: dict[str, Any] = {"tasks_per_node": 1, "gpus_per_node": None, "stall_timeout_seconds": 600}
"""of a cluster file: one rank a trial, so that many fit the machine"""

RANKS = 10
"""of a trial that no node and not all nodes together could run"""

SUBMITTER = """
import contextlib, os, signal, sys
from launch import __main__, array, ledger

point = sys.argv.pop(1)
extend, call = ledger.Ledger.extend, array._call

def extend_or_die(self, lines):
    event = lines[0]["event"]
    if point == f"before {event}":
        os.kill(os.getpid(), signal.SIGKILL)
    extend(self, lines)
    if point == f"after {event}":
        os.kill(os.getpid(), signal.SIGKILL)

def wait_and_call(*arguments):
    print("ready", flush=True)
    sys.stdin.readline()
    return call(*arguments)

@contextlib.contextmanager
def no_lock(self, patience=0.0):
    yield True

ledger.Ledger.extend = extend_or_die
if point == "without a lock":
    array._call, ledger.Submitter.lock = wait_and_call, no_lock
__main__.main()
"""
"""`wrbench`, but the first argument says where it is killed; or it takes no lock, and waits before sbatch for a line on stdin"""

POINTS = {
    "before the queued lines": "before queued",
    "before sbatch": "after queued",
    "while sbatch runs": "",  # by a wrapper
    "before the submitted lines": "before submitted",
    "after all": "after submitted",
}


def _study(lab: Lab, name: str, trials: int, cluster: Mapping[str, Any] | None = None, ranks: int = 1) -> Study:
    shape = SMALL | dict(cluster or {})
    return Study(lab.folder / name, lab.data, shape, name=name, ranks=ranks, budget={"epochs": 0.2}, search={"seeds": trials})


def _wrapper(folder: Path, body: str) -> dict[str, str]:
    """Environment in which `sbatch` is this script; $real is the real one, $PPID the submitter."""
    folder.mkdir(exist_ok=True)
    script = folder / "sbatch"
    script.write_text(f'#!/bin/bash\nreal=$(PATH=${{PATH#*:}} command -v sbatch)\n[ "$1" = --help ] && exec "$real" --help\n{body}\n')
    script.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def _start(study: Study, point: str = "", environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUBMITTER, point, "study", "submit", str(study.file), "--cluster", str(study.cluster), "--store", str(study.store.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(environment or {}),
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out + err


def _submit_until_complete(study: Study) -> None:
    """As a person does: submit, wait for what is queued, submit again, until there is nothing to submit."""
    while "submitted 0, running 0" not in (said := study.submit()) or "queued 0" not in said:
        until(lambda: not any(s.live for s in study.trials().values()), every=0.5)
    with suppress(AssertionError):
        until(lambda: not study.in_queue(), 30)  # a task ends a moment after its trial


def _wrong(study: Study, trials: int) -> tuple[int, str]:
    """(trials that did not run exactly once in one attempt of one job, and tasks left in the queue; what was seen)."""
    ledger = list(Ledger(study.store.study(study.name)).lines())
    standings = study.trials()
    wrong, told = abs(len(standings) - trials), []
    for trial_id, s in standings.items():
        jobs = {one["job_id"] for one in ledger if one["trial_id"] == trial_id and one["event"] == "started"}
        claimed = study.store.trial(study.name, trial_id).newest_attempt()
        if (s.state, s.record.attempts, claimed, len(jobs)) != ("finished", 1, 1, 1):
            wrong += 1
            ends = [life.ended and f"{life.ended['kind']} {life.ended['error'] or ''}" for life in s.entry.lives]
            told.append(f"{trial_id}: {s.state}, {claimed} attempts, jobs {sorted(jobs)}, ends {ends}")
    orphans = study.in_queue()
    return wrong + len(orphans), "; ".join([*told, *(f"in the queue: {orphan}" for orphan in orphans)])


@fault("the submitter killed at five points", slurm=True)
def killed_submitter(lab: Lab) -> Iterator[Row]:
    trials = 2 if lab.thorough else 1
    # SLURM takes the job of a submitter that is dead: at once, or after the next one has found nothing in the queue and submitted anew.
    slow = 'kill -KILL $PPID; until [ -e "$0.go" ]; do sleep 0.1; done; exec "$real" "$@"'
    cases = {name: (point, "") for name, point in POINTS.items()}
    cases["while sbatch runs"] = ("", 'kill -KILL $PPID; exec "$real" "$@"')
    cases["while sbatch runs, which takes longer than the next submission"] = ("", slow)
    studies = {}
    for number, (name, (point, body)) in enumerate(cases.items()):
        study = studies[name] = _study(lab, f"killed{number}", trials)
        wrapper = lab.folder / f"bin{number}"
        code, said = _end(_start(study, point, _wrapper(wrapper, body) if body else None))
        assert code == -signal.SIGKILL, f"{name}: {said}"
        study.submit()
        (wrapper / "sbatch.go").touch() if body else None
    until(lambda: len(set(_tokens_known_to_slurm(study))) == 2)  # the slow sbatch has been accepted too
    for name, study in studies.items():
        _submit_until_complete(study)
        wrong, told = _wrong(study, trials)
        yield row(f"submitter killed {name}: trials not run exactly once", wrong, 0, told or f"{trials} trial(s)")


def _tokens_known_to_slurm(study: Study) -> list[str]:
    """Comments of the study's jobs, also of those that have just ended."""
    name = f"JobName=wrbench-{study.name} "
    printed = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True, timeout=60, check=True).stdout
    return [line.split(" Comment=")[1].split()[0] for line in printed.splitlines() if name in line]


@fault("sbatch's answer lost", slurm=True)
def lost_answer(lab: Lab) -> Iterator[Row]:
    trials = 2 if lab.thorough else 1
    studies: dict[str, Study] = {}
    for name, body in {
        "it ends with 1": '"$real" "$@" > /dev/null; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1',
        "it prints nothing": '"$real" "$@" > /dev/null',
    }.items():
        study = studies[name] = _study(lab, f"lost{len(studies)}", trials)
        code, said = _end(_start(study, environment=_wrapper(lab.folder / f"lost-bin{len(studies)}", body)))
        assert code == 0 and f"submitted {trials}" in said, said
    for name, study in studies.items():
        _submit_until_complete(study)
        wrong, told = _wrong(study, trials)
        yield row(f"sbatch's answer lost, {name}: trials not run exactly once", wrong, 0, told or f"{trials} trial(s)")


@fault("ten submitters at once", slurm=True)
def ten_submitters(lab: Lab) -> Iterator[Row]:
    trials = 6 if lab.thorough else 2
    study, unlocked = _study(lab, "ten", trials), _study(lab, "unlocked", trials // 2)
    ended = [_end(process) for process in [_start(study) for _ in range(10)]]
    assert not [said for code, said in ended if code], ended
    submitted = [int(said.split("submitted ")[1].split(",")[0]) for _, said in ended]

    # Two that both believe to hold the lock, each of which has written its queued lines before either calls sbatch.
    both = [_start(unlocked, "without a lock") for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        code, said = _end(process)  # its stdin is closed: it goes on
        assert code == 0, said
    assert len(set(_tokens_known_to_slurm(unlocked))) == 2, "SLURM was to be given two arrays"

    for given in (study, unlocked):
        _submit_until_complete(given)
    wrong, told = _wrong(study, trials)
    yield row(
        "ten submitters at once: trials not run exactly once", wrong + abs(sum(submitted) - trials), 0, told or f"submitted {submitted}"
    )
    wrong, told = _wrong(unlocked, trials // 2)
    yield row(
        "two submitters without a lock: trials not run exactly once", wrong, 0, told or f"{trials // 2} trial(s), given to SLURM twice"
    )


@fault("wrong partition, account or an impossible request", slurm=True)
def refused_request(lab: Lab) -> Iterator[Row]:
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "partition": ({"partition": "nowhere"}, "Invalid partition name"),
        "more GPUs than a node has": ({"gpus_per_node": RANKS, "tasks_per_node": RANKS}, "node configuration is not available"),
    }
    yield from _refusals(lab, cases)
    enforced: dict[str, tuple[dict[str, Any], str]] = {
        "account": ({"account": "nobodys"}, "Invalid account"),
        "more nodes than there are": ({"gpus_per_node": 1}, "requested than permitted"),  # elsewhere SLURM lets such a job wait for good
    }
    with lab.another_cluster(nodes=1, enforce=True):
        yield from _refusals(lab, enforced)


def _refusals(lab: Lab, cases: Mapping[str, tuple[Mapping[str, Any], str]]) -> Iterator[Row]:
    """cases: what is asked for, and some of SLURM's words for what is wrong with it."""
    at_once = {}
    for name, (asked, _) in cases.items():
        study = _study(lab, f"refused-{name.split()[1] if ' ' in name else name}", 2, asked, ranks=RANKS if "more" in name else 1)
        at_once[name] = study, study.start("submit")
    for name, (study, process) in at_once.items():
        out, err = process.communicate(timeout=SECONDS)
        folder = study.store.study(study.name)
        found = {
            "exit status": int(process.returncode != 1),
            "lines of the message": abs(len(err.splitlines()) - 1)
            + int(not (err.startswith("error: sbatch: ") and cases[name][1] in err and "(asked for: partition " in err)),
            "submitted lines": sum(one["event"] == "submitted" for one in Ledger(folder).lines()),
            "submission folders": len(list((folder / "submissions").iterdir())),
            "trials not pending": sum(s.state != "pending" for s in study.trials().values()),
            "tasks in the queue": len(study.in_queue()),
        }
        told = ", ".join(f"{what}: {count}" for what, count in found.items() if count)
        yield row(
            f"refused by sbatch, {name}: things wrong",
            sum(found.values()),
            0,
            f"{told} {err.strip()} {out.strip() if told else ''}".strip(),
        )
