"""Nodes that die, and nodes that are only cut off from SLURM while their processes live on."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from harness.study import load
from launch import slurm
from launch.status import rows
from tests.faults.kills import PAIRS, PYTHON, Undisturbed, Watched, is_alive, one, only, tallied
from tests.faults.lab import Lab, fault
from tests.report import Row, row
from tests.slurm.cluster import Cluster
from tests.slurm.study import Study, steps, until

NODES = 8
"""four are in use at once, and at most two of them lost"""
STEP = 300
"""milliseconds, in the first life: to be cut off for a while and still be training"""
SECONDS = 90
"""from the fault until it trains again"""
TO_LEAVE = 10
"""seconds"""


@dataclass
class Loss:
    """What happens to a trial."""

    name: str
    of: int
    """the rank whose node it is; 0: also of the batch script and the supervisor"""
    slurmd_alone: bool
    nodes: int

    def inflict(self, cluster: Cluster, node: str) -> None:
        (cluster.kill_slurmd if self.slurmd_alone else cluster.kill_node)(node)


LOSSES = (
    Loss("batch host dies", 0, False, 2),
    Loss("other node dies", 1, False, 2),
    Loss("slurmd of the only node dies", 0, True, 1),
    Loss("slurmd of the batch host dies", 0, True, 2),
)


@dataclass
class Case:
    loss: Loss
    study: Study
    lab: Lab
    pair: tuple[str, str]
    """backend, arm"""
    seconds: float = 0.0
    """until it trained again"""
    left: float = 0.0
    """seconds from the new attempt's claim to the end of the old one's last process"""
    node: str = ""
    wrong: list[str] = field(default_factory=list)

    def happen(self, cluster: Cluster) -> None:
        watched, folder = Watched(cluster, self.study), only(self.study)
        until(lambda: steps(folder) > 10)
        self.node, old = cluster.ranks(watched.job)[self.loss.of].node, folder.newest_attempt()
        processes = cluster.processes(watched.job)
        began = time.monotonic()
        self.loss.inflict(cluster, self.node)
        until(lambda: folder.newest_attempt() > old, every=0.1)
        claimed = (folder.attempts / str(old + 1)).stat().st_mtime
        with ThreadPoolExecutor(1) as pool:
            leaving = pool.submit(self._leave, processes, claimed)
            until(lambda: any(line["attempt"] > old and "metrics" in line for line in watched.lines()), every=0.1)
            self.seconds = time.monotonic() - began
            self.left = leaving.result()
        undisturbed = Undisturbed(self.lab, *self.pair)  # not earlier: it must not take the cores from what is timed
        self.study.wait("finished")
        until(lambda: not self.study.in_queue())
        self._judge(watched, old, claimed, undisturbed)

    @staticmethod
    def _leave(processes: Sequence[int], claimed: float) -> float:
        until(lambda: not any(map(is_alive, processes)), every=0.1)
        return time.time() - claimed

    def _judge(self, watched: Watched, old: int, claimed: float, undisturbed: Undisturbed) -> None:
        lines, lives = watched.lines(), self.study.entry(watched.folder).lives
        if differs := undisturbed.differs(watched.folder):
            self.wrong.append(differs)
        resumed = next(line["resumed_from"] for line in lines if line["attempt"] > old and line.get("event") == "start")
        late = [
            line
            for line in lines
            if line["attempt"] <= old
            and line.get("event") in ("checkpoint", "stop", "end")
            and (line["step"] > resumed or line["timestamp"] / 1000 > claimed + 5)
        ]
        if late:
            self.wrong.append(f"the old attempt went on: {late[:2]}")
        if self.loss.slurmd_alone and [life.started["life"] for life in lives] != [0, 1]:
            self.wrong.append(f"lives {[(life.started['life'], life.ended and life.ended['kind']) for life in lives]}")
        if (restarts := slurm.job(watched.job)["Restarts"]) != "1":
            self.wrong.append(f"requeued {restarts} times")


@contextmanager
def _reported(studies: Sequence[Study]) -> Iterator[set[str]]:
    """What `wrbench study status` says of the trials meanwhile; by its function: the command also delivers, and imports MLflow for it."""
    states, over = set[str](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            for study in studies:
                try:
                    states.update(found.state for found in rows(load(study.file), study.store))
                except Exception as error:  # of a thread it would be lost
                    states.add(f"{type(error).__name__}: {error}")
                over.wait(1)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield states
    finally:
        over.set()
        asking.join()


@fault("a node dies; slurmd alone dies", slurm=True, urgent=True)
def nodes(lab: Lab) -> Iterator[Row]:
    """Two trials at a time."""
    cases, states = list[Case](), set[str]()
    with lab.another_cluster(nodes=NODES) as cluster:
        for pairs in (PAIRS[:2], PAIRS[1::-1]) if lab.thorough else (PAIRS[:2],):
            for losses in (LOSSES[:2], LOSSES[2:]):
                happened = _happen(lab, cluster, losses, pairs, states)
                for name in (case.node for case in happened):
                    cluster.start_node(name)
                until(lambda: _idle(cluster) == NODES, 60)
                cases += happened
    told = ", ".join(f"{case.loss.name} ({case.pair[0]}) {case.seconds:.0f} s" for case in cases)
    yield row(
        "nodes: seconds until it trained again, at most", max(c.seconds for c in cases), SECONDS if lab.thorough else 2 * SECONDS, told
    )
    cut_off = [case for case in cases if case.loss.slurmd_alone]
    leaving = ", ".join(f"{case.loss.name} {case.left:.1f} s" for case in cut_off)
    yield row(
        "nodes: seconds until the old attempt had left, at most",
        max(c.left for c in cut_off),
        TO_LEAVE if lab.thorough else 3 * TO_LEAVE,
        f"after the claim: {leaving}",
    )
    wrong = [f"{case.loss.name} ({case.pair[0]}): {what}" for case in cases for what in case.wrong]
    yield row("nodes: trials that did not end as undisturbed", len(wrong), 0, f"of {len(cases)} {'; '.join(wrong)}")
    other = sorted(states - {"queued", "running", "finished"})
    yield row("nodes: reported as anything else than queued, running or finished", len(other), 0, f"{other or ', '.join(sorted(states))}")
    yield row("nodes: points missing or doubled in MLflow", *_tallied([case.study for case in cases]))


def _happen(lab: Lab, cluster: Cluster, losses: Sequence[Loss], pairs: Sequence[tuple[str, str]], states: set[str]) -> list[Case]:
    cases = []
    for loss, pair in zip(losses, pairs, strict=True):
        asked = {
            "python": f"{PYTHON} *=slow@{STEP}", "tasks_per_node": 2 // loss.nodes, "gpus_per_node": 2 // loss.nodes,
            "sbatch": {"exclusive": True}, "stall_timeout_seconds": 120,
        }  # fmt: skip
        study = one(lab, f"{loss.name}-{pair[0]}".replace(" ", "-"), *pair, asked)
        study.submit()
        cases.append(Case(loss, study, lab, pair))
    with _reported([case.study for case in cases]) as found, ThreadPoolExecutor() as pool:
        for happening in [pool.submit(case.happen, cluster) for case in cases]:
            happening.result()
    states |= found
    return cases


def _idle(cluster: Cluster) -> int:
    found = subprocess.run(["sinfo", "--noheader", "--partition=low", "--Node", "--format=%T"], capture_output=True, text=True, timeout=60)
    return found.stdout.split().count("idle")


def _tallied(studies: Sequence[Study]) -> tuple[int, int, str]:
    wrong, told = tallied(studies)
    return wrong, 0, told
