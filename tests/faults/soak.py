"""`make soak`: a quarter of an hour with a random fault a minute; then everything must be as if there had been none."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import journal
from launch.status import hours
from tests.faults.kills import PYTHON
from tests.faults.lab import a_cluster, digits, put_right, tally
from tests.report import Row, publish, row
from tests.slurm.cluster import Cluster
from tests.slurm.study import ADAMW, BACKENDS, SGDW, Study, repeated, until

SHAPE = {"tasks_per_node": 1, "gpus_per_node": 1, "max_retries": 10, "stall_timeout_seconds": 60}
"""two nodes of one rank each; a fault a minute may well hit a trial several times before its first checkpoint"""
PACE = {"python": f"{PYTHON} *=pace@250"}
"""of the trials that faults hit: a quarter of a second a step, in which they wait, so that the undisturbed ones have little to do"""
EPOCHS_A_MINUTE = 5
"""of 35 steps: three quarters of the time, the rest goes to starts"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    print(f"{options.minutes:g} minutes, --seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="wrbench-soak-") as folder, a_cluster() as (cluster, absent):
        if cluster is None:
            print(f"error: {absent}", file=sys.stderr)
            return 1
        return publish("soak", soak(Path(folder), cluster, options.minutes, random.Random(options.seed)))


def soak(folder: Path, cluster: Cluster, minutes: float, rng: random.Random) -> list[Row]:
    data, _ = digits(folder)
    arms, epochs = {"AdamWR": ADAMW, "SGDWR": SGDW}, max(3, round(EPOCHS_A_MINUTE * minutes))

    def submitted(kind: str, cluster_file: dict[str, Any]) -> list[Study]:
        found = [
            Study(folder / f"{kind}-{name}", data, cluster_file, name=name, arms=arms, backend=backend, budget={"epochs": epochs}, ranks=2)
            for name, backend in BACKENDS.items()
        ]
        for study in found:
            study.submit()
        return found

    studies = submitted("faults", SHAPE | PACE)
    done, end = [], time.monotonic() + 60 * minutes
    while time.monotonic() < end and any(s.live for study in studies for s in study.trials().values()):
        time.sleep(min(rng.uniform(40, 80), max(0.0, end - time.monotonic())))
        fault = rng.choice(FAULTS)
        done.append(fault.__name__)
        print(f"{(end - time.monotonic()) / 60:5.1f} min left: {fault.__name__}: {fault(cluster, studies, rng)}", flush=True)
    print("no more faults", flush=True)
    for study in studies:
        until(lambda study=study: not any(s.live for s in study.trials().values()), 900)
        with suppress(AssertionError):
            study.submit("--retry")  # what a node's end took with it
        study.wait("finished", seconds=900)
    left = _left(cluster, studies)
    put_right(cluster)
    undisturbed = submitted("none", SHAPE)
    differ = 0
    for faulty, calm in zip(studies, undisturbed, strict=True):
        calm.wait("finished", seconds=1800)
        weights = [{key: r["weights_sha256"] for key, r in study.results().items()} for study in (faulty, calm)]
        differ += sum(weights[0].get(key) != value for key, value in weights[1].items())
    rows = [row("soak: trials whose final weights differ", differ, 0, f"of 4, after {', '.join(done) or 'nothing'}")]
    rows.append(row("soak: processes, temporary files and jobs left", len(left), 0, "; ".join(left)))
    for study in studies:
        study.run("sync")
        counted = tally(study.store, study.name)
        rows.append(row(f"soak: {study.name}: points missing, doubled or in no journal", counted.wrong, 0, str(counted)))
    return [*rows, _effective(studies)]


def _effective(studies: list[Study]) -> Row:
    trained = used = 0.0
    again = 0
    for study in studies:
        for folder in study.folders():
            lines = list(journal.read(folder.journal))
            seconds = [line["metrics"]["time/train_seconds"] for line in lines if "time/train_seconds" in line.get("metrics", {})]
            trained += 2 * seconds[-1] / 3600
            used += hours(study.entry(folder).lives, lines, time.time())[0]
            again += repeated(folder)
    return Row("soak: effective training time", trained / used, None, True, f"of {used:.2f} rank-hours; {again} logged steps taken twice")


def _left(cluster: Cluster, studies: list[Study]) -> list[str]:
    time.sleep(10)  # a job's last process ends a moment after its record
    found = [f"job {job}" for job in subprocess.run(["squeue", "-h", "-o", "%i %T %r"], capture_output=True, text=True).stdout.splitlines()]
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and b"launch.rank" in (process / "cmdline").read_bytes():
                environment = (process / "environ").read_bytes()
                if os.fsencode(str(cluster.folder)) in environment:
                    found.append(f"process {process.name}")
    for study in studies:
        root = study.store.study(study.name)
        found += [str(p.relative_to(root)) for p in root.rglob("*") if p.name.startswith(".") or p.name.endswith((".tmp", "save_tmp"))]
    return found


# ------------------------------------------------------------------------------------------------------ faults


def _running(studies: list[Study]) -> list[str]:
    return [s.task.job_id for study in studies for s in study.trials().values() if s.state == "running" and s.task]


def _ranks(cluster: Cluster, studies: list[Study], rng: random.Random) -> list[int]:
    jobs = _running(studies)
    return [rank.pid for rank in cluster.ranks(rng.choice(jobs))] if jobs else []


def _send(pids: list[int], number: signal.Signals) -> str:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return f"{number.name} to {len(pids)} process(es)"


def preemption(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    nodes = rng.choice(["n[1-2]", "n[3-4]", "n[2-3]", "n[1-4]"])
    command = ["sbatch", "-p", "high", "-w", nodes, "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 3"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() + f" on {nodes}"


def killed_rank(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    pids = _ranks(cluster, studies, rng)
    return _send([rng.choice(pids)] if pids else [], signal.SIGKILL)


def killed_step(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    return _send(_ranks(cluster, studies, rng), signal.SIGKILL)


def stopped_rank(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    pids = _ranks(cluster, studies, rng)
    return _send([rng.choice(pids)] if pids else [], signal.SIGSTOP)


def dead_node(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    return _without(cluster, rng, cluster.kill_node)


def cut_off_node(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    return _without(cluster, rng, cluster.kill_slurmd)


def _without(cluster: Cluster, rng: random.Random, end: Callable[[str], None]) -> str:
    name = rng.choice(["n1", "n2", "n3", "n4"])
    end(name)
    time.sleep(30)
    cluster.start_node(name)
    return f"{name}, back after 30 s"


def restarted_controller(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    seconds = rng.uniform(1, 30)
    cluster.stop_controller()
    time.sleep(seconds)
    cluster.start_controller()
    return f"away for {seconds:.0f} s"


def submitters(cluster: Cluster, studies: list[Study], rng: random.Random) -> str:
    started = [rng.choice(studies).start("submit") for _ in range(4)]
    return " | ".join(p.communicate(timeout=240)[0].splitlines()[0] for p in started)


FAULTS = (preemption, killed_rank, killed_step, stopped_rank, dead_node, cut_off_node, restarted_controller, submitters)


if __name__ == "__main__":
    sys.exit(main())
