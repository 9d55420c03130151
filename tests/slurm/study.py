"""A study on the cluster under test, driven through the command line as a user drives it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from harness import journal
from harness.store import Store, TrialFolder
from harness.study import load
from launch.ledger import Ledger
from launch.standing import Standing, job_name, standings

SECONDS = 600.0
"""no wait in these tests should last so long"""

ADAMW = {
    "optimizer": {"name": "adam", "lr": 0.002},
    "decay": {"name": "decoupled", "weight_decay": 0.05, "normalised": True},
    "schedule": {"name": "cosine_restarts", "t_0": 1, "t_mult": 2},
}
SGDW = ADAMW | {"optimizer": {"name": "sgd", "lr": 0.05}}
BACKENDS = {"ddp": {"name": "ddp"}, "deepspeed": {"name": "deepspeed", "zero_stage": 1}}


class Study:
    """A study file, a cluster file and a store in one folder."""

    def __init__(self, folder: Path, data: Path, cluster: dict[str, Any] | None = None, **document: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = str(document.pop("name", "mine"))
        self.file, self.cluster, self.store = folder / f"{self.name}.yaml", folder / "cluster.yaml", Store(folder / "runs")
        base = {
            "workload": {"name": "mnist5k_cnn", "data": {"path": str(data)}},
            "arms": {"AdamWR": ADAMW},
            "search": {"seeds": 1},
            "ranks": 2,
            "budget": {"epochs": 3},
        }
        self.file.write_text(yaml.safe_dump(base | document))
        asked = {
            "executor": "slurm", "tasks_per_node": 2, "gpus_per_node": 2, "time_minutes": 10, "signal_lead_seconds": 30,
            "partition": "low", "stall_timeout_seconds": 240,
        }  # fmt: skip
        self.cluster.write_text(yaml.safe_dump(asked | (cluster or {})))

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        where = ["--cluster", str(self.cluster)] if command in ("submit", "plan") else []
        group = [] if command in ("sync", "report") else ["study"]
        return subprocess.Popen(
            [sys.executable, "-m", "launch", *group, command, str(self.file), *where, "--store", str(self.store.root), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, *options: str) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)"""
        process = self.start(command, *options)
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out, err

    def submit(self, *options: str) -> str:
        """What a submission prints that must succeed."""
        code, out, err = self.run("submit", *options)
        assert code == 0, out + err
        return out

    def trials(self) -> dict[str, Standing]:
        """trial id -> where it stands."""
        return standings(self.store, self.name).trials

    def folders(self) -> list[TrialFolder]:
        return self.store.trials(self.name)

    def folder(self, arm: str = "AdamWR") -> TrialFolder:
        """Of the arm's first trial of the search, also before it is submitted."""
        from harness.study import planned

        trial = next(p.trial for p in planned(load(self.file), {}) if p.arm == arm and p.trial is not None)
        return self.store.trial(self.name, trial.trial_id)

    def entry(self, folder: TrialFolder) -> Any:
        return Ledger(self.store.study(self.name)).entries()[folder.path.name]

    def wait(self, *states: str, seconds: float = SECONDS) -> dict[str, Standing]:
        """Returns when every trial is in one of these states."""

        def there() -> bool:
            return bool(found := self.trials()) and all(s.state in states for s in found.values())

        try:
            until(there, seconds, every=0.5)
        except AssertionError:
            told = {trial_id: (s.state, s.task, s.entry.newest) for trial_id, s in self.trials().items()}
            raise AssertionError(f"waited {seconds:.0f} s for {states}: {told}\n{self.logs()}") from None
        return self.trials()

    def logs(self) -> str:
        """The last lines of every log, for a failure's message."""
        paths = [*self.store.study(self.name).glob("submissions/*/*_log.*"), *self.store.study(self.name).glob("trials/*/logs/*_log.err")]
        return "\n".join(f"== {p}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-12:]) for p in sorted(paths))

    def results(self) -> dict[str, dict[str, Any]]:
        return {f.path.name: json.loads(f.result.read_text()) for f in self.folders() if f.result.exists()}

    def in_queue(self) -> list[str]:
        return subprocess.run(
            ["squeue", "--noheader", "--array", f"--name={job_name(self.name)}", "--format=%i"], capture_output=True, text=True, timeout=60
        ).stdout.split()


def until(condition: Callable[[], Any], seconds: float = SECONDS, every: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain"
        time.sleep(every)


def refuse(folder: Path, program: str, what: str, error: str) -> None:
    """A SLURM command in this folder that does all but one thing."""
    folder.mkdir(exist_ok=True)
    no = f'if [ "$1" = {what} ]; then echo "{error}" >&2; exit 1; fi'
    (folder / program).write_text(f'#!/bin/bash\n{no}\nexec {shutil.which(program)} "$@"\n')
    (folder / program).chmod(0o755)


def steps(folder: TrialFolder) -> int:
    """Optimizer steps of which the trial's journal tells."""
    return journal.fold(journal.glance(folder.journal)).steps_done


def repeated(folder: TrialFolder) -> int:
    """Logged steps that more than one attempt took."""
    seen: dict[int, set[int]] = {}
    for line in journal.read(folder.journal):
        if "train/loss" in line.get("metrics", {}):
            seen.setdefault(line["step"], set()).add(line["attempt"])
    return sum(len(attempts) > 1 for attempts in seen.values())
