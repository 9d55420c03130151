"""Jobs on this machine: where they run, how they are told to stop, and what keeps a Ctrl-C from killing them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from harness import schedule
from harness.config import BadInput, Trial
from harness.store import TrialFolder
from launch.ledger import is_alive
from launch.status import label

SECONDS_TO_SAVE = 60.0
"""that running trials have to save themselves when told to stop"""
SECONDS_APART = 30.0
"""that a rank may end before its peers"""
SECONDS_TO_BEGIN = 5.0
"""after which a stopped job that holds no trial has nothing left to save"""


# -------------------------------------------------------------------------------------------------- places


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that jobs may use, by the driver's word: nothing here imports torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        try:
            return [int(n) for n in named.split(",") if n.strip() and int(n) >= 0]
        except ValueError:
            raise BadInput(f"CUDA_VISIBLE_DEVICES: {named!r} must be numbers; e.g. 0,1") from None
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


def places(max_parallel: int, ranks: int, gpus: Sequence[int]) -> list[list[int]]:
    """The GPUs of each place where one trial can run; none of them anywhere when they are too few for a trial."""
    if len(gpus) < ranks:
        return [[] for _ in range(max_parallel)]
    return [list(gpus[i * ranks : (i + 1) * ranks]) for i in range(min(max_parallel, len(gpus) // ranks))]


# ------------------------------------------------------------------------------------------------- signals


class Stop:
    """Counts SIGINT, SIGTERM and SIGHUP while it is entered, in place of what they would do."""

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Stop:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        self._before = [(n, signal.signal(n, self._count)) for n in numbers]
        return self

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if number == signal.SIGHUP:  # the terminal is gone, and writing there would raise
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
                os.dup2(nowhere.fileno(), sys.stderr.fileno())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)


@contextmanager
def deaf_to_the_terminal() -> Iterator[None]:
    """Processes started meanwhile never see a Ctrl-C or a closed terminal, which go to every process there.

    submitit's controller would answer by killing its ranks within a second; the submitter tells it when it is time.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------------------------- jobs


@dataclass
class Running:
    """A trial at work: in a job of ours, in one that an earlier submitter left (`job`), or under neither (by hand)."""

    trial: Trial
    folder: TrialFolder
    place: int | None
    attempt: int
    job: Mapping[str, Any] | None = None
    """job_id and place, as in the ledger"""
    process: Any = None
    """submitit's job, when this process started it"""
    parted: float | None = None
    """when a rank was first seen to have ended before its peers, of time.monotonic(); inf while none has; None before all were there"""

    def done(self) -> bool:
        if self.process is not None:
            return bool(self.process.done())
        if self.job is not None:
            return not is_alive(self.job, self.folder.logs)
        return not self.folder.is_running()

    def has_lost_a_rank(self, ranks: int) -> bool:
        """Whether one ended SECONDS_APART ago and others have not: over NCCL they wait for it until backend.timeout_seconds, and submitit
        waits for them."""
        if self.job is None:
            return False
        try:
            there = len(Path(f"/proc/{self.job['job_id']}/task/{self.job['job_id']}/children").read_text().split())
        except OSError:
            return False
        if there == ranks:
            self.parted = math.inf
        elif self.parted is not None:
            self.parted = min(self.parted, time.monotonic())
        return 0 < there < ranks and self.parted is not None and time.monotonic() - self.parted > SECONDS_APART

    def signal(self, number: signal.Signals) -> None:
        """To submitit's controller: it forwards SIGTERM to the ranks, and they end when it is killed."""
        if self.job is not None and not self.done():
            with suppress(ProcessLookupError):  # it ended this moment
                os.kill(int(self.job["job_id"]), number)


def wind_down(running: Sequence[Running], stop: Stop | None = None) -> None:
    """Tells the jobs to save and end, and returns when they have; kills those that do not, or all when asked again."""
    began = time.monotonic()
    again = stop.asked + 1 if stop else math.inf
    told = -math.inf
    killed: list[Running] = []
    left = [r for r in running if r.job is not None]
    while left := [r for r in left if not r.done()]:
        now = time.monotonic()
        for one in left:
            listens = one.folder.is_running()
            if now - began > (SECONDS_TO_SAVE if listens else SECONDS_TO_BEGIN) or (stop and stop.asked >= again):
                one.signal(signal.SIGKILL)
                killed.append(one)
            elif told < began or (now - told > 1 and not listens):  # what comes while a rank starts up may be lost
                one.signal(signal.SIGTERM)
        told = now if now - told > 1 else told
        time.sleep(0.1)
    patience = time.monotonic() + SECONDS_TO_BEGIN
    while any(one.folder.is_running() for one in killed) and time.monotonic() < patience:
        time.sleep(0.1)  # ranks end a moment after their controller


def saved(running: Running) -> str:
    """What is left of a stopped trial."""
    steps = running.folder.state().committed
    return f"{label(running.trial)}: {f'saved, {steps}' if steps else 'nothing to save, 0'} of {schedule.total_steps(running.trial)} steps"
