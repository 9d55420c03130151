"""kill -9 at every moment of a trial's life; ranks that stand still; trials that fail by themselves."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from harness import journal, tracking
from harness.store import TrialFolder
from tests.faults.lab import Lab, fault, tally
from tests.mlflow_server import empty_database
from tests.report import Row, row
from tests.slurm import faulty_rank
from tests.slurm.cluster import Cluster, Rank
from tests.slurm.study import ADAMW, BACKENDS, SGDW, Study, until

ARMS = {"AdamWR": ADAMW, "SGDWR": SGDW}
EPOCH, EPOCHS, SAVES, EVALUATIONS = 35, 7, 7, 17.5
"""steps an epoch; epochs; steps between two saves, and between two evaluations"""
TRIAL: dict[str, Any] = {
    "budget": {"epochs": EPOCHS},
    "evaluation": {"every_epochs": EVALUATIONS / EPOCH, "log_every_steps": 5},
    "checkpoint": {"every_epochs": SAVES / EPOCH},
}
PYTHON = f"{sys.executable} {faulty_rank.__file__}"
"""and a fault: the cluster file's `python`"""
PAIRS = (("ddp", "AdamWR"), ("deepspeed", "SGDWR"), ("ddp", "SGDWR"), ("deepspeed", "AdamWR"))
"""the first two show every backend and every arm"""


def one(lab: Lab, name: str, backend: str, arm: str, cluster: dict[str, Any] | None = None) -> Study:
    """A study of one trial of two ranks."""
    return with_database(Study(lab.folder / name, lab.data, cluster, arms={arm: ARMS[arm]}, backend=BACKENDS[backend], **TRIAL))


@cache
def _no_experiments() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="wrbench-mlflow-")
    atexit.register(folder.cleanup)
    return empty_database(Path(folder.name))


def with_database(study: Study) -> Study:
    """MLflow's tables are there: to make them takes seconds, which no fault is about."""
    if not study.store.root.exists():
        study.store.root.mkdir()
        shutil.copy(_no_experiments(), study.store.root / "mlflow.db")
    return study


class Undisturbed:
    """The trial of `one` without a fault, which runs beside the disturbed ones; once for all faults of a process."""

    _known: ClassVar[dict[tuple[str, str], tuple[str, set[tuple[str, int]], float]]] = {}

    def __init__(self, lab: Lab, backend: str, arm: str) -> None:
        self.study = one(lab, f"undisturbed-{backend}-{arm}", backend, arm)
        self.key = backend, self.study.folder(arm).path.name
        if self.key not in self._known:
            self.study.submit()

    def wait(self) -> None:
        if self.key not in self._known:
            self.study.wait("finished")
            calm = only(self.study)
            begun = next(line["timestamp"] for line in journal.read(calm.journal)) / 1000
            start_up = begun - datetime.fromisoformat(self.study.entry(calm).lives[0].started["time"]).timestamp()
            self._known[self.key] = self.study.results()[calm.path.name]["weights_sha256"], points(calm), start_up

    @property
    def start_up(self) -> float:
        """Seconds from srun to the journal's first line."""
        self.wait()
        return self._known[self.key][2]

    def differs(self, folder: TrialFolder) -> str | None:
        """In what a trial did not end like the undisturbed one; None if in nothing."""
        self.wait()
        weights, expected, _ = self._known[self.key]
        result, found = folder.finished_result(), points(folder)
        if result is None:
            return f"{folder.state().state}, without a result"
        if result["weights_sha256"] != weights:
            return "other weights"
        return f"a gap or more than one value in its metrics: {sorted(found ^ expected)[:3]}" if found != expected else None


def points(folder: TrialFolder) -> set[tuple[str, int]]:
    """(metric, step) of all that is final of a trial."""
    return {(p.metric, p.step) for p in journal.fold(journal.read(folder.journal)).settled}


def only(study: Study) -> TrialFolder:
    (folder,) = study.folders()
    return folder


def tallied(studies: Sequence[Study]) -> tuple[int, str]:
    """(what is wrong in MLflow after a sync, in words)."""
    found = []
    for study in studies:
        sent, left = tracking.sync(study.store, study.name)
        assert not sent.failed and not left, (sent, left)
        found.append(tally(study.store, study.name))
    told = f"{sum(t.trials for t in found)} trials, {sum(t.runs for t in found)} runs, {sum(t.settled for t in found)} points"
    return sum(t.wrong for t in found), f"{told}; wrong: {[str(t) for t in found if t.wrong]}"


def send(pids: Sequence[int], number: signal.Signals) -> int:
    """How many were there to get it."""
    reached = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            reached += 1
    return reached


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


class Watched:
    """One trial on the cluster, as somebody sees it who means it harm."""

    def __init__(self, cluster: Cluster, study: Study) -> None:
        self.cluster, self.study, self.folder = cluster, study, only(study)
        until(lambda: study.entry(self.folder).job_id)
        self.job = study.entry(self.folder).job_id
        self._seen: set[int] = set()
        self._read, self._lines = 0, list[dict[str, Any]]()

    def lines(self) -> list[dict[str, Any]]:
        """Of the journal; only what is new is read."""
        with suppress(FileNotFoundError), open(self.folder.journal, "rb") as file:
            file.seek(self._read)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            self._lines += journal.lines(whole)
        return self._lines

    def ranks(self, count: int = 2) -> list[Rank]:
        """Of the next life, once they are there."""
        found: list[Rank] = []

        def there() -> bool:
            found[:] = [rank for rank in self.cluster.ranks(self.job) if rank.pid not in self._seen]
            return len(found) == count

        until(there, every=0.05)
        self._seen |= {rank.pid for rank in found}
        return found


# ------------------------------------------------------------------------------------------------------ kill -9

PHASES = ("start-up", "step", "save", "evaluation", "exit")
EVALUATED = {max(1, round(i * EVALUATIONS)) for i in range(1, round(EPOCHS * EPOCH / EVALUATIONS) + 1)}
"""steps done at each evaluation"""


@dataclass
class Kill:
    phase: str
    """that it is meant to fall in"""
    whole: bool
    """all ranks at once"""
    fell: str = ""
    seconds: float = 0.0
    """until the next life trained; 0 if that was killed before"""


class Victim(Watched):
    def suffer(self, kills: Sequence[Kill], rng: random.Random) -> None:
        """One kill a life."""
        for kill, following in zip(kills, [*kills[1:], None], strict=True):
            reached = 0
            while not reached:  # a life may end by itself, e.g. if its port was taken
                ranks, before = self.ranks(), len(self.lines())
                self._wait_for(kill.phase, before, rng)
                reached = send([r.pid for r in (ranks if kill.whole else [rng.choice(ranks)])], signal.SIGKILL)
                if kill.phase == "exit" and not reached:
                    kill.fell = "nowhere"
                    return
            moment = time.monotonic()
            kill.fell = self._phase(before)
            if kill.fell == "exit":
                return
            if following is not None and following.phase == "start-up":
                continue  # which is over once the next life trains
            starts = self._starts()
            until(lambda starts=starts: self._starts() > starts, every=0.05)
            kill.seconds = time.monotonic() - moment

    def _starts(self) -> int:
        return sum(line.get("event") == "start" for line in self.lines())

    def _wait_for(self, phase: str, before: int, rng: random.Random) -> None:
        """Returns at a random moment of the phase, or of the life's next one. `before`: lines of the lives before."""
        began, patience, count = time.monotonic(), rng.uniform(0, 3), rng.randint(1, 4)
        claims = self.folder.newest_attempt()

        def happened() -> bool:
            own = self.lines()[before:]
            logged = [line["step"] + 1 for line in own if "train/loss" in line.get("metrics", {})]
            match phase:
                case "start-up":
                    claimed = self.folder.newest_attempt() > claims  # seconds of importing come before
                    return bool(own) or claimed if count % 2 else time.monotonic() - began > patience
                case "step":
                    return len(logged) > count
                case "save":
                    return len(logged) > count and bool(self._partial())
                case "evaluation":
                    return len(EVALUATED & set(logged)) >= (count + 1) // 2
            return any(line.get("event") == "end" for line in own)

        until(happened, every=0.002)
        if phase != "start-up":
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.3 if phase == "exit" else 0.03)]))

    def _partial(self) -> list[Path]:
        """Checkpoints that are being written."""
        return list(self.folder.checkpoints.glob(".step-*"))

    def _phase(self, before: int) -> str:
        """Where the ranks were, who have just been killed."""
        partial, own = self._partial(), self.lines()[before:]
        metrics = [line for line in own if "metrics" in line]
        if any(line.get("event") == "end" for line in own):
            return "exit"
        if not metrics:  # imports, the claim, the model, the checkpoint to go on from
            return "start-up"
        if metrics[-1]["step"] + 1 in EVALUATED and "train/loss" in metrics[-1]["metrics"]:
            return "evaluation"
        return "save" if partial else "step"


def _taken_back(folder: TrialFolder) -> list[int]:
    """Steps that each life but the first took back from the one before."""
    lines = list(journal.read(folder.journal))
    starts = [i for i, line in enumerate(lines) if line.get("event") == "start"]
    return [journal.fold(lines[:i]).steps_done - lines[i]["resumed_from"] for i in starts[1:]]


@fault("kill -9 of one rank, of a whole step", slurm=True)
def kills(lab: Lab) -> Iterator[Row]:
    name, done, wrong, studies, again, elsewhere = "kill -9", list[Kill](), list[str](), list[Study](), [0], list[str]()
    for pairs in (PAIRS[::2], PAIRS[1::2]) if lab.thorough else (PAIRS[:2],):
        whole = iter(lab.rng.sample([True, False] * 5, 10))
        plans = []
        for number, (backend, arm) in enumerate(pairs):
            phases = list(PHASES[:-1] if lab.thorough else PHASES[number:-1:2])
            lab.rng.shuffle(phases)
            study = one(lab, f"{backend}-{arm}", backend, arm, {"max_retries": 5, "stall_timeout_seconds": 120})
            study.submit()
            plans.append((study, [Kill(phase, next(whole)) for phase in [*phases, "exit"]], random.Random(lab.rng.random())))
        calm = [Undisturbed(lab, backend, arm) for backend, arm in pairs]
        with ThreadPoolExecutor() as pool:
            suffering = [pool.submit(Victim(lab.cluster, study).suffer, planned, rng) for study, planned, rng in plans]
            for one_of_them in suffering:
                one_of_them.result()
        for (study, planned, _), undisturbed in zip(plans, calm, strict=True):
            study.wait("finished")
            until(lambda study=study: not study.in_queue())
            folder, lives = only(study), study.entry(only(study)).lives
            if differs := undisturbed.differs(folder):
                wrong += [f"{study.file.parent.name}: {differs}"] * len(planned)
            again += _taken_back(folder)
            expected = sum(kill.fell not in ("exit", "nowhere") for kill in planned) + 1
            lived = sum(life.ended is None or life.ended["kind"] != "port" for life in lives)
            if any(life.started["life"] or life.requeued for life in lives) or not expected <= lived <= expected + 1:
                elsewhere.append(
                    f"{study.file.parent.name}: {[(life.started['life'], life.ended and life.ended['kind']) for life in lives]}"
                )
            studies.append(study)
            done += planned
    fell = Counter(kill.fell for kill in done)
    histogram = ", ".join(f"{phase} {fell[phase]}" for phase in (*PHASES, *(fell.keys() - set(PHASES))))
    told = f"fell in {histogram}; {sum(kill.whole for kill in done)} of whole steps"
    yield row(f"{name}: kills after which a trial did not end as undisturbed", len(wrong), 0, f"{len(done)} kills: {told} {wrong or ''}")
    yield row(f"{name}: kinds of moments not hit", len(set(PHASES) - set(fell)), 0 if lab.thorough else None)
    yield row(f"{name}: trials not retried in place", len(elsewhere), 0, "; ".join(elsewhere))
    yield row(f"{name}: steps taken again, at most", max(again), 2 * SAVES, "a save every 7 steps, of which one may be on its way")
    yield row(f"{name}: points missing or doubled in MLflow", *_with(tallied(studies), 0))
    seconds = sorted(kill.seconds for kill in done if kill.seconds)
    yield row(f"{name}: seconds until it trained again, at most", seconds[-1], None, f"median {seconds[len(seconds) // 2]:.1f}")


def _with(found: tuple[int, str], limit: float) -> tuple[int, float, str]:
    return found[0], limit, found[1]


# ------------------------------------------------------------------------------------------------------- stalls


@dataclass
class Stall:
    what: str
    of: Callable[[list[Rank]], list[Rank]]
    """the ranks to stop; none: one stops by itself"""
    name: str


STALLS = (
    Stall("rank 0 stopped", lambda ranks: ranks[:1], "zero"),
    Stall("a collective that one rank never enters", lambda ranks: [], "hang"),
    Stall("the other rank stopped", lambda ranks: ranks[1:], "other"),
    Stall("all ranks stopped", lambda ranks: ranks, "all"),
)


def _stand_still(lab: Lab, stall: Stall, study: Study) -> tuple[float, str | None]:
    """(seconds from the last line to the retry's decision, what was wrong)."""
    watched = Watched(lab.cluster, study)
    until(lambda: any("metrics" in line for line in watched.lines()), every=0.02)
    ranks, life = lab.cluster.ranks(watched.job), len(study.entry(watched.folder).lives) - 1
    send([rank.pid for rank in stall.of(ranks)], signal.SIGSTOP)
    until(lambda: study.entry(watched.folder).lives[life].ended, every=0.1)
    last, ended = watched.lines()[-1]["timestamp"] / 1000, study.entry(watched.folder).lives[life].ended
    seconds = datetime.fromisoformat(ended["time"]).timestamp() - last
    if ended["kind"] not in ("stalled", "communication"):  # the latter where a peer's collective times out first, after 45 s
        return seconds, f"{stall.what}: ended as {ended['kind']}: {ended['error']}"
    left = [rank for rank in ranks if is_alive(rank.pid)]
    return seconds, f"{stall.what}: ranks {left} live on" if left else None


@fault("one rank stopped, a collective that hangs", slurm=True, beside=True)
def stalls(lab: Lab) -> Iterator[Row]:
    if lab.thorough:
        groups = [[(stall, *pair) for stall in STALLS] for pair in PAIRS[:2]]
    else:
        groups = [[(STALLS[0], *PAIRS[0]), (STALLS[1], *PAIRS[1]), (STALLS[3], *PAIRS[0])]]  # in the last no peer is left to notice
    seconds, wrong, studies, timeout = dict[str, float](), list[str](), list[Study](), 20
    for group in groups:
        calm = {pair: Undisturbed(lab, *pair) for pair in dict.fromkeys((backend, arm) for _, backend, arm in group)}
        timeout = max(timeout, 3 * round(max(undisturbed.start_up for undisturbed in calm.values())))  # a start-up must be no stall
        begun = []
        for stall, backend, arm in group:
            asked = {"stall_timeout_seconds": timeout, "max_retries": 20} | (
                {"python": f"{PYTHON} *=hang@40"} if stall.name == "hang" else {}
            )
            study = one(lab, f"{stall.name}-{backend}", backend, arm, asked)
            study.submit()
            begun.append((stall, backend, study, calm[backend, arm]))
        with ThreadPoolExecutor() as pool:
            stood = pool.map(lambda given: _stand_still(lab, given[0], given[2]), begun)
            for (stall, backend, *_), (took, what) in zip(begun, stood, strict=True):
                seconds[f"{stall.what} ({backend})"] = took - timeout
                wrong += [what] if what else []
        for *_, study, undisturbed in begun:
            study.wait("finished")
            if differs := undisturbed.differs(only(study)):
                wrong.append(f"{study.file.parent.name}: {differs}")
            studies.append(study)
    told = ", ".join(f"{what} {s:.1f} s" for what, s in seconds.items())
    yield row("standing still: seconds beyond stall_timeout until retried", max(seconds.values()), 15, f"{told}; stall_timeout {timeout} s")
    yield row("standing still: trials that did not end as undisturbed", len(wrong), 0, f"{len(studies)} trials {wrong or ''}")


# ----------------------------------------------------------------------------------- trials that fail by themselves

FAILING: dict[str, tuple[str | None, str, int, str]] = {
    # arm: (fault, how it ends, lives, its error; max_retries is 1)
    "Sound": (None, "finished", 1, ""),
    "Crashes": ("crash@3", "failed", 2, "assertion: AssertionError: the loss must be below 7 (2 times without"),
    "CrashesLater": ("crash@20", "finished", 3, ""),
    "OutOfMemory": ("exhaust_memory@3", "failed", 2, "out of memory: MemoryError: cannot allocate 80 GB (2 times without"),
    "Diverges": (None, "diverged", 1, ""),
}


def _failing(lab: Lab, backend: str) -> Study:
    arms = {arm: ADAMW | {"optimizer": {"name": "adam", "lr": 0.002 + 1e-5 * n}} for n, arm in enumerate(FAILING)}
    arms["Diverges"] = SGDW | {"optimizer": {"name": "sgd", "lr": 1e12}}
    faults = ",".join(f"{arm}={what}" for arm, (what, *_) in FAILING.items() if what)
    study = Study(
        lab.folder / f"failing-{backend}", lab.data, {"python": f"{PYTHON} {faults}", "max_retries": 1, "array_parallelism": 3},
        arms=arms, backend=BACKENDS[backend], **TRIAL | {"budget": {"epochs": 1}},
    )  # fmt: skip
    study.submit()
    return study


def _misconfigured(lab: Lab, backend: str) -> Study:
    """Its data are there when it is submitted, and gone when it starts."""
    data = lab.folder / f"data-{backend}"
    shutil.copytree(lab.data, data)
    study = Study(
        lab.folder / f"misconfigured-{backend}", data, {"setup": [f"rm -r {data}"]}, arms={"AdamWR": ADAMW}, backend=BACKENDS[backend]
    )
    study.submit()
    return study


@fault("a trial that always crashes", slurm=True)
def failing(lab: Lab) -> Iterator[Row]:
    wrong, told = list[str](), list[str]()
    for backend in ("ddp", "deepspeed") if lab.thorough else ("ddp",):
        study, misconfigured = _failing(lab, backend), _misconfigured(lab, backend)
        for s in (study, misconfigured):
            until(lambda s=s: not s.in_queue())
        trials = study.trials()
        expected = {study.folder(arm): (arm, *FAILING[arm][1:]) for arm in FAILING}
        expected |= {misconfigured.folder(): ("Misconfigured", "failed", 1, "configuration: harness.config.BadInput: ")}
        for folder, (arm, state, lives, error) in expected.items():
            standing = (trials | misconfigured.trials())[folder.path.name]
            lived = [life.ended["kind"] for life in standing.entry.lives if life.ended]
            found = standing.state, len(lived) - lived.count("port"), standing.entry.newest.get("error") or ""
            told.append(f"{arm} {found[0]} after {found[1]}")
            if found[:2] != (state, lives) or error not in found[2]:
                wrong.append(f"{backend} {arm}: {found}, not {(state, lives, error)}")
    yield row("trials that fail by themselves: ended otherwise than they should", len(wrong), 0, "; ".join(wrong) or ", ".join(told))
