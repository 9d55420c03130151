"""Preemptions, with and without a word of warning, and time limits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from harness import journal
from harness.store import TrialFolder
from tests.faults.kills import ARMS, PAIRS, PYTHON, only, points, tallied
from tests.faults.lab import Lab, fault
from tests.report import Row, row
from tests.slurm.study import BACKENDS, Study, repeated, steps, until

TWO_NODES = {"tasks_per_node": 1, "gpus_per_node": 1}
UNTOUCHED = {"tasks_per_node": 1, "gpus_per_node": None, "partition": "high"}
"""on the same nodes, out of reach of a preemption and not in the way of one, which takes the GPUs"""


def study(lab: Lab, name: str, backend: str, arm: str, epochs: float, cluster: dict[str, Any]) -> Study:
    """Of one trial of two ranks on two nodes."""
    document = {
        "budget": {"epochs": epochs}, "evaluation": {"log_every_steps": 5, "every_epochs": epochs / 2},
        "checkpoint": {"every_epochs": 1}, "arms": {arm: ARMS[arm]}, "backend": BACKENDS[backend],
    }  # fmt: skip
    made = Study(lab.folder / name, lab.data, cluster, **document)
    made.submit()
    return made


def preempt(victim: Study) -> float:
    """A job of high priority takes the GPUs of the nodes that the study's trial runs on; when it was submitted."""
    (standing,) = victim.trials().values()
    assert standing.task is not None
    command = ["sbatch", "--partition=high", "--nodes=2", f"--nodelist={standing.task.nodes}", "--gpus-per-node=2", "--time=1"]
    now = time.time()
    subprocess.run([*command, "--output=/dev/null", "--wrap=sleep 1"], check=True, capture_output=True, timeout=60)
    return now


def lives(victim: Study, folder: TrialFolder) -> int:
    return len(victim.entry(folder).lives)


def preempted(victim: Study, times: int, total: int, rng: random.Random) -> list[float]:
    """Preempts the trial so often, at random steps; seconds from each to the checkpoint that the ranks then committed."""
    folder, seconds = only(victim), []
    for number, at in enumerate(sorted(rng.sample(range(total // 20, total * 9 // 10), times))):
        until(lambda n=number: lives(victim, folder) == n + 1)
        begun = steps(folder)
        until(lambda at=at, begun=begun: steps(folder) >= max(at, begun + 5), every=0.02)
        asked = preempt(victim)
        until(lambda n=number: lives(victim, folder) == n + 2 or victim.entry(folder).lives[n].requeued)
        attempt = victim.entry(folder).lives[number].started["attempt"]
        saved = [
            line["timestamp"] / 1000
            for line in journal.read(folder.journal)
            if line["attempt"] == attempt and line.get("event") == "checkpoint"
        ]
        seconds.append(max(saved) - asked if saved else float("inf"))
    return seconds


def differences(pairs: list[tuple[Study, Study]]) -> list[str]:
    """Of pairs (disturbed, undisturbed), those that did not end alike."""
    found = []
    for disturbed, calm in pairs:
        for one in (disturbed, calm):
            one.wait("finished", seconds=600)
        weights = [next(iter(one.results().values()))["weights_sha256"] for one in (disturbed, calm)]
        if weights[0] != weights[1]:
            found.append(f"{disturbed.file.parent.name}: other weights")
        elif points(only(disturbed)) != points(only(calm)):
            found.append(f"{disturbed.file.parent.name}: other points")
    return found


def workers_left() -> int:
    """Processes of faulty_rank, or forked from one, that are still there."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            count += b"faulty_rank.py" in (process / "cmdline").read_bytes()
    return count


@fault("preemptions at random steps, USR2 heard", slurm=True)
def heard(lab: Lab) -> Iterator[Row]:
    pairs, times, epochs = (PAIRS, 5, 80) if lab.thorough else (PAIRS[:2], 1, 10)
    calm = {pair: study(lab, f"calm-{'-'.join(pair)}", *pair, epochs, UNTOUCHED) for pair in pairs}
    draws = {pair: random.Random(lab.rng.random()) for pair in pairs}
    done: dict[tuple[str, str], Study] = {}

    def disturb(pair: tuple[str, str]) -> list[float]:
        python = {"python": f"{PYTHON} *=fork@1"} if pair == PAIRS[0] else {}
        done[pair] = study(lab, "-".join(pair), *pair, epochs, TWO_NODES | python)
        return preempted(done[pair], times, 35 * epochs, draws[pair])

    with ThreadPoolExecutor(2) as pool:  # two trials at a time are preempted: the cluster has four nodes
        seconds = [second for found in pool.map(disturb, pairs) for second in found]
    differ = differences([(done[pair], calm[pair]) for pair in pairs])
    count = len(seconds)
    trained = [json.loads(only(done[p]).result.read_text())["metrics"]["time/train_seconds"] for p in pairs]
    yield row(
        f"preempted {count} times: trials that differ from undisturbed ones", len(differ), 0,
        f"of {len(pairs)}, bit for bit, trained for {min(trained):.0f} to {max(trained):.0f} s; {'; '.join(differ)}",
    )  # fmt: skip
    yield row(f"preempted {count} times: steps repeated", sum(repeated(only(s)) for s in done.values()), 0)
    yield row(
        f"preempted {count} times: seconds to the checkpoint, at most", max(seconds), 10, f"median {sorted(seconds)[count // 2]:.1f} s"
    )
    wrong, told = tallied(list(done.values()))
    yield row(f"preempted {count} times: wrong in MLflow", wrong, 0, told)
    errors = [p for s in done.values() for p in s.store.root.rglob("*_result.pkl")]
    time.sleep(1)
    yield row(
        f"preempted {count} times: error pickles, forked workers left", len(errors) + workers_left(), 0, "4 workers a rank in one trial"
    )


def _warned_otherwise(lab: Lab, what: str, pair: tuple[str, str], **options: Any) -> Iterator[Row]:
    times, epochs = (3, 40) if lab.thorough else (1, 10)
    with lab.another_cluster(preempt_send_user_signal=False, **options):
        calm = study(lab, f"{what}-calm", *pair, epochs, UNTOUCHED)
        victim = study(lab, what, *pair, epochs, TWO_NODES)
        folder, again = only(victim), []
        for number, at in enumerate(sorted(lab.rng.sample(range(35, 35 * epochs * 9 // 10), times))):
            until(lambda n=number: lives(victim, folder) == n + 1)
            begun = steps(folder)
            until(lambda at=at, begun=begun: steps(folder) >= max(at, begun + 5), every=0.02)
            preempt(victim)
            until(lambda n=number: lives(victim, folder) == n + 2)
            until(lambda n=number: len(starts(folder)) >= n + 2)
            again.append(_taken_again(folder, number))
        differ = differences([(victim, calm)])
        wrong, told = tallied([victim])
    yield row(
        f"{what}: trials that differ from an undisturbed one", len(differ), 0, f"{pair[0]}, {pair[1]}, {times} times; {'; '.join(differ)}"
    )
    yield row(f"{what}: steps lost at a time, at most", max(again), 35, "a checkpoint every 35 steps")
    yield row(f"{what}: wrong in MLflow", wrong, 0, told)


def starts(folder: TrialFolder) -> list[dict[str, Any]]:
    return [line for line in journal.read(folder.journal) if line.get("event") == "start"]


def _taken_again(folder: TrialFolder, number: int) -> int:
    """Logged steps of life `number` beyond where the next one began."""
    first, then = starts(folder)[number : number + 2]
    logged = [
        line["step"] + 1
        for line in journal.read(folder.journal)
        if line["attempt"] == first["attempt"] and "train/loss" in line.get("metrics", {})
    ]
    return max([*logged, then["resumed_from"]]) - then["resumed_from"]


@fault("preemption where only TERM comes", slurm=True)
def only_term(lab: Lab) -> Iterator[Row]:
    yield from _warned_otherwise(lab, "only TERM", PAIRS[1], grace_seconds=30)


@fault("preemption by KILL with no warning", slurm=True)
def only_kill(lab: Lab) -> Iterator[Row]:
    yield from _warned_otherwise(lab, "only KILL", PAIRS[0], grace_seconds=0, kill_wait=2)


@fault("time limit", slurm=True)
def time_limit(lab: Lab) -> Iterator[Row]:
    """A job of one minute hears its signal 10 to 40 s before the end; steps are slowed down so that it takes several."""
    backend, arm = PAIRS[1]
    limit = {"time_minutes": 1, "signal_lead_seconds": 10}
    slow = TWO_NODES | limit | {"python": f"{PYTHON} *=pace@{500 if lab.thorough else 300}"}
    if lab.thorough:
        calm = study(lab, "calm", backend, arm, 5, UNTOUCHED)
        long = study(lab, "long", backend, arm, 5, slow | {"max_timeouts": 20})
    short = study(lab, "short", *PAIRS[0], 5, slow | {"max_timeouts": 1 if lab.thorough else 0})
    short.wait("exhausted", seconds=400)
    folder = only(short)
    kinds = [life.ended["kind"] for life in short.entry(folder).lives]
    short.run("sync")
    status = next(iter(json.loads(short.run("status", "--json")[1])["trials"]))
    lost = (
        (status["state"] != "exhausted") + (json.loads(folder.result.read_text())["state"] != "exhausted") + (folder.state().committed == 0)
    )
    yield row("past max_timeouts: exhausted nowhere said, or its steps lost", lost, 0, f"{', '.join(kinds)}; {status['last_error']}")
    short.cluster.write_text(yaml.safe_dump(yaml.safe_load(short.cluster.read_text()) | {"python": sys.executable, "time_minutes": 10}))
    code, out, _ = short.run("submit")
    assert code == 1 and "--retry" in _, out + _
    saved = folder.state().committed
    short.submit("--retry")
    short.wait("finished")
    yield row("exhausted, then --retry: steps repeated", repeated(folder), 0, f"went on from step {saved}")
    if lab.thorough:
        differ = differences([(long, calm)])
        reached = [life.ended["kind"] for life in long.entry(only(long)).lives].count("time limit")
        yield Row("time limit reached, times", reached, 2.5, reached >= 3, "each time requeued; ended finished", exceeds=True)
        yield row("time limit: trials that differ from an undisturbed one", len(differ), 0, "; ".join(differ))
        yield row("time limit: steps repeated", repeated(only(long)), 0)


@fault("none", slurm=True)
def none(lab: Lab) -> Iterator[Row]:
    """The same study on SLURM and by the local executor, four ranks each."""
    document: dict[str, Any] = {
        "arms": ARMS, "backend": BACKENDS["deepspeed"], "ranks": 4, "budget": {"epochs": 3 if lab.thorough else 1},
        "search": {"seeds": 2 if lab.thorough else 1}, "finalists": {"top": 1, "seeds": 2},
    }  # fmt: skip
    there, here = Study(lab.folder / "slurm", lab.data, **document), Study(lab.folder / "local", lab.data, **document)
    here.cluster.write_text(yaml.safe_dump({"executor": "local", "ranks": 4}))
    there.submit()
    there.wait("finished")
    there.submit()  # the finalists
    there.wait("finished")
    here.submit()
    tables = []
    for one in (there, here):
        code, out, err = one.run("report")
        assert code == 0, out + err
        tables.append((one.store.study(one.name) / "report" / "table.csv").read_text())
    weights = [{key: r["weights_sha256"] for key, r in one.results().items()} for one in (there, here)]
    unfinished = sum(s.state != "finished" for s in there.trials().values())
    yield row("no fault: trials not FINISHED", unfinished, 0, f"of {len(there.trials())}, two nodes of two ranks, DeepSpeed ZeRO-1")
    yield row("no fault: weights other than the local executor's", sum(weights[0][k] != weights[1].get(k) for k in weights[0]), 0)
    differ = sum(a != b for a, b in zip(*(t.splitlines() for t in tables), strict=True))
    yield row("no fault: lines of the report's table other than the local executor's", differ, 0, f"of {len(tables[0].splitlines())}")
