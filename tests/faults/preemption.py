"""Preemptions, with and without a word of warning; time limits; and a study that nothing disturbs."""

from __future__ import annotations

import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from itertools import pairwise
from sqlite3 import connect
from typing import Any, ClassVar

import yaml

from harness import journal
from harness.store import TrialFolder
from tests.faults.kills import ARMS, PAIRS, PYTHON, only, points, tallied, with_database
from tests.faults.lab import Lab, fault
from tests.report import Row, row
from tests.slurm.cluster import Cluster
from tests.slurm.study import BACKENDS, Study, repeated, steps, until

INTERVAL = 35
"""steps between two checkpoints: an epoch"""
EPOCHS = 6
"""of the trials that are preempted; faulty_rank's `pace` gives them their seconds, so that a slow machine has no more to do"""
WHOLE_GPUS = {"tasks_per_node": 1, "gpus_per_node": None, "sbatch": {"gres": "gpu:2"}}
"""two nodes and all their GPUs, so that a job which wants these takes them from this trial alone"""
UNTOUCHED = {"tasks_per_node": 1, "gpus_per_node": None, "partition": "high"}
"""on the same nodes, out of reach of a preemption and not in the way of one, which takes the GPUs"""
DEAF = f"*=deaf@{signal.SIGTERM:d}"
"""for ranks that hear nothing before KILL: without grace SLURM still sends TERM, some seconds earlier"""
LATE = f"*=deaf@{signal.SIGUSR2:d}"
"""for ranks that hear of a time limit by TERM alone, when it is there"""
FORKED = 4
"""children of each rank, by faulty_rank's `fork`"""


class Pair:
    """A trial of two ranks on two nodes that will be disturbed, and the same one undisturbed, once for all faults of a process."""

    _known: ClassVar[dict[tuple[str, float], tuple[str, Any]]] = {}
    """(backend, arm, epochs) -> weights and points of the undisturbed one"""

    def __init__(self, lab: Lab, name: str, backend: str, arm: str, epochs: float, cluster: dict[str, Any]) -> None:
        self.name, self._lab, self._epochs = f"{name} {backend} {arm}", lab, epochs
        self._key = f"{backend} {arm}", epochs
        self._document = {
            "budget": {"epochs": epochs}, "evaluation": {"log_every_steps": 1, "every_epochs": epochs / 2},
            "checkpoint": {"every_epochs": 1}, "arms": {arm: ARMS[arm]}, "backend": BACKENDS[backend],
        }  # fmt: skip
        self.study = self._study(self.name, cluster)
        self.study.submit()
        self.folder: TrialFolder = only(self.study)
        self.calm: Study | None = None

    def _study(self, name: str, cluster: dict[str, Any]) -> Study:
        return with_database(Study(self._lab.folder / name.replace(" ", "-"), self._lab.data, cluster, **self._document))

    def submit_calm(self) -> None:
        if self._key not in self._known:
            self.calm = self._study(f"calm {self.name}", UNTOUCHED)
            self.calm.submit()

    @property
    def total(self) -> int:
        return round(INTERVAL * self._epochs)

    @property
    def job_id(self) -> str:
        return str(self.study.entry(self.folder).job_id)

    def ended(self) -> list[str]:
        """How each life but one that goes on ended."""
        return [life.ended["kind"] for life in self.study.entry(self.folder).lives if life.ended is not None]

    def requeued(self) -> int:
        return sum(life.requeued is not None for life in self.study.entry(self.folder).lives)

    def starts(self) -> list[dict[str, Any]]:
        return [line for line in journal.glance(self.folder.journal) if line.get("event") == "start"]

    def difference(self) -> str | None:
        """In what it ended unlike the undisturbed one; None if in nothing."""
        self.study.wait("finished", seconds=900)
        if self.calm is not None:
            self.calm.wait("finished", seconds=900)
            self._known[self._key] = self._outcome(only(self.calm))
        weights, logged = self._outcome(self.folder)
        expected_weights, expected_logged = self._known[self._key]
        if weights != expected_weights:
            return f"{self.name}: other weights"
        return None if logged == expected_logged else f"{self.name}: other points"

    @staticmethod
    def _outcome(folder: TrialFolder) -> tuple[str, Any]:
        return json.loads(folder.result.read_text())["weights_sha256"], points(folder)

    def preempt(self) -> float:
        """A job of high priority takes the GPUs of the nodes that the trial runs on; seconds since 1970 when it was submitted."""
        task = self.study.trials()[self.folder.path.name].task
        assert task is not None
        command = ["sbatch", "--partition=high", "--nodes=2", f"--nodelist={task.nodes}", "--gpus-per-node=2", "--time=1"]
        now = time.time()
        subprocess.run([*command, "--output=/dev/null", "--wrap=sleep 1"], check=True, capture_output=True, timeout=60)
        return now

    def preempted(self, steps_at: Sequence[int], forked: tuple[Cluster, int] | None = None) -> list[float]:
        """Preempts it once it has done so many steps, each time in another life; when, each.

        forked: (cluster, children that each rank then has).
        """
        when: list[float] = []
        lives = 0
        for at in sorted(steps_at):
            until(partial(self._has_done, lives, at), every=0.1)
            if forked is not None:
                cluster, children = forked
                until(partial(_are_there, cluster, self.job_id, 2 * (1 + children)))
            lives = len(self.starts())
            when.append(self.preempt())
        until(partial(self._has_done, lives, 0))
        return when

    def _has_done(self, lives: int, at: int) -> bool:
        """Whether a life after the first `lives` trains, and is so far."""
        starts = self.starts()
        return len(starts) > lives and steps(self.folder) > max(at, starts[-1]["resumed_from"])

    def answered(self, when: Sequence[float]) -> list[float]:
        """Seconds from each preemption to the checkpoint that the ranks of that life committed before they stopped; inf for none."""
        lines, found = list(journal.read(self.folder.journal)), []
        for start, moment in zip(self.starts(), when, strict=False):
            own = [line for line in lines if line["attempt"] == start["attempt"]]
            saved = [line["timestamp"] / 1000 - moment for line in own if line.get("event") == "checkpoint"]
            found.append(saved[-1] if saved and own[-1].get("event") == "stop" else math.inf)
        return found

    def lost(self) -> list[int]:
        """Steps that each life but the last had done beyond where the next one began."""
        starts, lines = self.starts(), list(journal.read(self.folder.journal))
        done = []
        for first, then in pairwise(starts):
            own = [line["step"] + 1 for line in lines if line["attempt"] == first["attempt"] and "metrics" in line]
            done.append(max([first["resumed_from"], *own]) - then["resumed_from"])
        return done

    def under_way(self) -> int:
        """Steps that the loop at most went on while a checkpoint was written: what is then lost, beside an interval."""
        newest, longest = 0, 0
        for line in journal.read(self.folder.journal):
            newest = line["step"] + 1 if "metrics" in line else newest
            if line.get("event") == "checkpoint":
                longest = max(longest, newest - line["step"])
        return longest


def _are_there(cluster: Cluster, job_id: str, count: int) -> bool:
    return len(cluster.processes(job_id)) >= count


def draw(lab: Lab, pair: Pair, times: int) -> list[int]:
    """Steps that leave seconds of training for the preemption to come in."""
    return lab.rng.sample(range(pair.total // 20, pair.total * 7 // 10), times)


def unlike(pairs: Sequence[Pair]) -> list[str]:
    return [found for pair in pairs if (found := pair.difference())]


def left_behind(cluster: Cluster, pairs: Sequence[Pair], seconds: float = 10) -> int:
    """Processes of the trials' jobs that are there still when these have left the queue."""
    until(lambda: not any(pair.study.in_queue() for pair in pairs))
    until_then, count = time.monotonic() + seconds, 1
    while count and time.monotonic() < until_then:
        count = sum(len(cluster.processes(pair.job_id)) for pair in pairs)
        time.sleep(0.2)
    return count


@fault("preemptions at random steps, USR2 heard", slurm=True)
def heard(lab: Lab) -> Iterator[Row]:
    """Thorough: all trials at a time, on eight nodes, slow enough that each trains for a minute. Else: two, on the cluster's four."""
    chosen, times, pace = (PAIRS, 5, 300) if lab.thorough else (PAIRS[:2], 1, 60)
    with lab.another_cluster(nodes=8) if lab.thorough else nullcontext(lab.cluster) as cluster:
        pairs = []
        for number, (backend, arm) in enumerate(chosen):
            python = f"{PYTHON} {'' if number % 2 else '*=fork@1,'}*=pace@{pace}"
            pairs.append(Pair(lab, "heard", backend, arm, EPOCHS, WHOLE_GPUS | {"python": python}))
        at = [draw(lab, pair, times) for pair in pairs]
        forked = [None if number % 2 else (cluster, FORKED) for number in range(len(pairs))]
        with ThreadPoolExecutor(len(pairs)) as pool:
            for pair in pairs:
                pool.submit(pair.submit_calm)
            when = list(pool.map(Pair.preempted, pairs, at, forked))
        differ = unlike(pairs)
        left = left_behind(cluster, pairs)
        seconds = sorted(second for pair, moments in zip(pairs, when, strict=True) for second in pair.answered(moments))
        ends = [kind for pair in pairs for kind in pair.ended()]
        wrong, told = tallied([pair.study for pair in pairs])
    name = f"preempted {len(seconds)} times"
    yield row(f"{name}: trials that differ from undisturbed ones", len(differ), 0, f"of {len(pairs)}, bit for bit; {'; '.join(differ)}")
    yield row(f"{name}: ends taken for something else", abs(len(seconds) - ends.count("preempted")), 0, f"at steps {at}")
    yield row(f"{name}: steps repeated", sum(repeated(pair.folder) + sum(pair.lost()) for pair in pairs), 0)
    yield row(f"{name}: seconds to the checkpoint, at most", seconds[-1], 10, f"median {seconds[len(seconds) // 2]:.1f} s")
    yield row(f"{name}: wrong in MLflow", wrong, 0, told)
    errors = [path for pair in pairs for path in pair.study.store.root.rglob("*_result.pkl")]
    yield row(f"{name}: error pickles", len(errors), 0, f"{FORKED} forked children a rank in every other trial")
    yield row(f"{name}: processes left", left, 0)
    trained = min(json.loads(pair.folder.result.read_text())["metrics"]["time/train_seconds"] for pair in pairs)
    limit = 60 if lab.thorough else None
    yield Row(f"{name}: seconds that the shortest trial trains", trained, limit, limit is None or trained > limit, exceeds=True)


@fault("preemption where only TERM comes, and KILL with no warning", slurm=True)
def otherwise(lab: Lab) -> Iterator[Row]:
    times, pace = (3, 120) if lab.thorough else (1, 60)
    with lab.another_cluster(preempt_send_user_signal=False, grace_seconds=30, kill_wait=5, nodes=8 if lab.thorough else 4) as cluster:
        abrupt = ["PartitionName=abrupt", "Nodes=ALL", "PriorityTier=1", "PreemptMode=REQUEUE", "GraceTime=0"]
        subprocess.run(["scontrol", "create", *abrupt], check=True, capture_output=True, timeout=60)
        python = f"{PYTHON} *=pace@{pace}"
        kinds: dict[str, dict[str, Any]] = {
            "only TERM": WHOLE_GPUS | {"python": python},
            "only KILL": WHOLE_GPUS | {"python": f"{python},{DEAF}", "partition": "abrupt"},
        }
        chosen = {"only KILL": (PAIRS[0], PAIRS[3]), "only TERM": (PAIRS[1], PAIRS[2])}
        pairs = {
            kind: [Pair(lab, kind, *pair, EPOCHS, kinds[kind]) for pair in chosen[kind][: None if lab.thorough else 1]] for kind in kinds
        }
        every = [pair for of_kind in pairs.values() for pair in of_kind]
        at = [draw(lab, pair, times) for pair in every]
        with ThreadPoolExecutor(len(every)) as pool:
            for pair in every:
                pool.submit(pair.submit_calm)
            when = dict(zip((p.name for p in every), pool.map(Pair.preempted, every, at), strict=True))
        for kind, of_kind in pairs.items():
            differ = unlike(of_kind)
            wrong, told = tallied([pair.study for pair in of_kind])
            left = left_behind(cluster, of_kind)
            lost = [steps_lost for pair in of_kind for steps_lost in pair.lost()]
            moved = max(pair.under_way() for pair in of_kind)
            what = f"{len(lost)} of {times * len(of_kind)} times; {', '.join(p.name for p in of_kind)}"
            yield row(
                f"{kind}: trials that differ from undisturbed ones", len(differ), 0, f"{what}; {'; '.join(differ)}",
                ok=len(lost) == times * len(of_kind),
            )  # fmt: skip
            heard = [second for pair in of_kind for second in pair.answered(when[pair.name])]
            if kind == "only TERM":
                yield row(f"{kind}: steps lost at a time, at most", max(lost), 0, f"saved {max(heard):.1f} s after the signal at most")
            else:
                yield row(
                    f"{kind}: steps lost at a time, at most", max(lost), INTERVAL + moved,
                    f"{lost}; a checkpoint every {INTERVAL} steps, written within {moved}", ok=all(map(math.isinf, heard)),
                )  # fmt: skip
            yield row(f"{kind}: wrong in MLflow, processes left", wrong + left, 0, told)


@fault("time limit", slurm=True, beside=True)
def time_limit(lab: Lab) -> Iterator[Row]:
    """SLURM sends the signal 10 to 40 s before the end of a minute. Steps are slow until the limit has come often enough.

    One trial hears of the limit, which is brought forward, by TERM alone.
    """
    often, epochs = (3, EPOCHS) if lab.thorough else (1, 3)
    slow = "*=thrice@1000" if lab.thorough else "*=slow@500"  # for three lives, for one: too slow to end in them
    limit = {"tasks_per_node": 1, "gpus_per_node": 1, "time_minutes": 1, "signal_lead_seconds": 10}
    limit |= {"python": f"{PYTHON} {slow}"}  # type: ignore[dict-item]
    (of_long, of_short) = ((PAIRS[0], PAIRS[1]), (PAIRS[2], PAIRS[3])) if lab.thorough else (PAIRS[:1], PAIRS[1:2])
    long = [Pair(lab, "long", *pair, epochs, limit | {"max_timeouts": often}) for pair in of_long]
    short = [Pair(lab, "short", *pair, epochs, limit | {"max_timeouts": often - 1}) for pair in of_short]
    late = Pair(lab, "late", *PAIRS[0], epochs, limit | {"python": f"{PYTHON} *=slow@500,{LATE}", "time_minutes": 10})
    until(lambda: steps(late.folder) > 5)
    _change(late, "EndTime=now+1")  # SLURM looks every half a minute

    def let_end(pair: Pair) -> None:
        """Once the limit has come often enough, and before it comes once more."""
        until(lambda: pair.requeued() == (1 if pair is late else often), 150 if pair is late else 400)
        _change(pair, "TimeLimit=10")

    with ThreadPoolExecutor() as pool:
        list(pool.map(let_end, [*long, late]))
    unsaid, told = [], []
    for pair in short:
        pair.study.wait("exhausted", seconds=400)
        assert pair.study.run("sync")[0] == 0
        (status,) = json.loads(pair.study.run("status", "--json")[1])["trials"]
        said = {"status": status["state"], "result.json": json.loads(pair.folder.result.read_text())["state"], "MLflow": _in_mlflow(pair)}
        unsaid += [f"{where}: {state}" for where, state in said.items() if state not in ("exhausted", "FAILED")]
        told.append(f"{pair.name}: {', '.join(pair.ended())} by step {pair.folder.state().committed}; {status['last_error']}")
    yield row("past max_timeouts: places that do not say exhausted", len(unsaid), 0, f"{'; '.join(told)} {'; '.join(unsaid)}")

    saved = [pair.folder.state().committed for pair in short]
    for pair in short:
        given = yaml.safe_load(pair.study.cluster.read_text())
        pair.study.cluster.write_text(yaml.safe_dump(given | {"python": shlex.quote(sys.executable), "time_minutes": 10}))
        code, out, err = pair.study.run("submit")
        assert code == 1 and "--retry" in err, out + err
        pair.study.submit("--retry")
    for pair in (*long, *short):
        pair.submit_calm()
    differ, again = unlike(short), [pair.starts()[-1]["resumed_from"] for pair in short]
    yield row(
        "exhausted, then --retry: trials that differ from undisturbed ones", len(differ), 0, f"went on from steps {again}; {'; '.join(differ)}",
        ok=again == saved and min(saved) > 0,
    )  # fmt: skip
    differ = unlike(long)
    limits = [[kind for kind in pair.ended() if kind == "time limit"] for pair in long]
    requeued = [pair.requeued() for pair in long]
    right = all(len(found) == count == often for found, count in zip(limits, requeued, strict=True))
    yield row(
        f"time limit {often} times: trials that differ from undisturbed ones", len(differ), 0,
        f"of {len(long)}, requeued {requeued} times; {'; '.join(differ)}", ok=right,
    )  # fmt: skip
    told_late = f"ended as {', '.join(late.ended())}, requeued {late.requeued()} time(s)"
    yield row("time limit told by SIGTERM alone: trials that differ from undisturbed ones", len(unlike([late])), 0, told_late,
              ok=late.ended() == ["time limit", "finished"] and late.requeued() == 1)  # fmt: skip
    every = [*long, *short, late]
    yield row("time limit: steps repeated", sum(repeated(pair.folder) + sum(pair.lost()) for pair in every), 0)
    wrong, said_of = tallied([pair.study for pair in every])
    yield row("time limit: wrong in MLflow", wrong, 0, said_of)


def _change(pair: Pair, what: str) -> None:
    """By scontrol, which refuses while the ranks of a job that was requeued past its limit still end."""

    def accepted() -> bool:
        nonlocal said
        done = subprocess.run(["scontrol", "update", f"JobId={pair.job_id}", what], capture_output=True, text=True, timeout=60, check=False)
        said = done.stderr.strip()
        return done.returncode == 0

    said = ""
    try:
        until(accepted, 30)
    except AssertionError as error:
        raise RuntimeError(f"scontrol update {what} of {pair.name}: {said}") from error


def _in_mlflow(pair: Pair) -> str:
    with closing(connect(pair.study.store.root / "mlflow.db", timeout=60)) as database:
        query = "SELECT r.status FROM runs r JOIN tags t USING (run_uuid) WHERE t.key = 'trial_id' AND t.value = ?"
        (state,) = database.execute(query, [pair.folder.path.name]).fetchall()
    return str(state[0])


@fault("none", slurm=True)
def none(lab: Lab) -> Iterator[Row]:
    """The same study on SLURM and by the local executor at the same time, four ranks a trial."""
    document: dict[str, Any] = {
        "arms": ARMS, "backend": BACKENDS["deepspeed"], "ranks": 4, "budget": {"epochs": 2 if lab.thorough else 1},
    }  # fmt: skip
    if lab.thorough:
        document |= {"finalists": {"top": 1, "seeds": 1}}
    there, here = (Study(lab.folder / name, lab.data, {"time_minutes": 30}, **document) for name in ("slurm", "local"))
    here.cluster.write_text(yaml.safe_dump({"executor": "local", "ranks": 4}))
    locally = here.start("submit")
    for _ in range(2 if lab.thorough else 1):  # finalists are known when the search has ended
        there.submit()
        there.wait("finished", seconds=600)
    out, err = locally.communicate(timeout=900)
    assert locally.returncode == 0, out + err
    reports = []
    for one in (there, here):
        code, out, err = one.run("report")
        assert code == 0, out + err
        folder = one.store.study(one.name) / "report"
        reports.append([*(folder / "table.csv").read_text().splitlines(), *(folder / "summary.json").read_text().splitlines()])
    weights = [{key: r["weights_sha256"] for key, r in one.results().items()} for one in (there, here)]
    unfinished = sum(s.state != "finished" for s in there.trials().values())
    yield row("no fault: trials not FINISHED", unfinished, 0, f"of {len(there.trials())}, two nodes of two ranks, DeepSpeed ZeRO-1")
    others = sum(weights[0].get(key) != weights[1].get(key) for key in weights[0].keys() | weights[1].keys())
    yield row("no fault: weights other than the local executor's", others, 0)
    differ = abs(len(reports[0]) - len(reports[1])) + sum(a != b for a, b in zip(*reports, strict=False))
    yield row(
        "no fault: lines of the report other than the local executor's", differ, 0, f"of {len(reports[0])}, table.csv and summary.json"
    )
