"""launch.rank with a fault built in, for the `python:` key of a cluster file: `PYTHON .../faulty_rank.py FAULT -u -m launch.rank ...`.

FAULT is `ARM=WHAT@STEP,...` or `*=...` for every arm; WHAT is a method of Faults, which the call of train_step of that number meets,
or `deaf`: to the signal of that number.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any


class Faults:
    """What can happen at the n-th step of this process (n = 1, 2, ...), before it is taken."""

    def __init__(self, at: int) -> None:
        self.at = at

    def crash(self, n: int) -> None:
        """Rank 1, so that the others lose a peer."""
        if n == self.at and os.environ["RANK"] == "1":
            raise AssertionError("the loss must be below 7")

    def exhaust_memory(self, n: int) -> None:
        if n == self.at:
            raise MemoryError("cannot allocate 80 GB")

    def hang(self, n: int) -> None:
        """Rank 1 enters no collective any more; once a trial."""
        if n == self.at and os.environ["RANK"] == "1":
            with suppress(FileExistsError), open(_trial().path / "hung", "x"):
                time.sleep(3600)

    def slow(self, n: int) -> None:
        """`at` milliseconds a step, in the first life of the job."""
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
            time.sleep(self.at / 1000)

    def fork(self, n: int) -> None:
        """Four children, as data workers are: they inherit the signal handlers, and end with their rank."""
        for _ in range(4 if n == self.at else 0):
            if os.fork() == 0:
                parent = os.getppid()
                while os.getppid() == parent:
                    time.sleep(0.2)
                os._exit(0)

    def pace(self, n: int) -> None:
        """`at` milliseconds a step, always."""
        time.sleep(self.at / 1000)

    def thrice(self, n: int) -> None:
        """`at` milliseconds a step, until the job has been requeued three times."""
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < 3:
            time.sleep(self.at / 1000)


def _trial() -> Any:
    from harness.store import Store

    store, study, trial = sys.argv[1:4]
    return Store(Path(store)).trial(study, trial)


def main() -> None:
    given, module = sys.argv[1], sys.argv[4]
    assert sys.argv[2:4] == ["-u", "-m"], sys.argv
    sys.argv = sys.argv[4:]
    arm = _trial().read_config().arm
    for one in given.split(","):
        of, what = one.split("=")
        if of in ("*", arm):
            kind, at = what.split("@")
            if kind == "deaf":
                _deafen(int(at))
            else:
                _build_in(kind, int(at))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _deafen(signal: int) -> None:
    from harness.stopping import StopRequest

    plain = StopRequest._note

    def note(self: StopRequest, number: int, frame: FrameType | None = None) -> None:
        if number != signal:
            plain(self, number, frame)

    StopRequest._note = note  # type: ignore[method-assign]


def _build_in(what: str, at: int) -> None:
    from harness.engine import Engine

    met, plain, count = getattr(Faults(at), what), Engine.train_step, 0

    def train_step(self: Engine, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        met(count)
        return plain(self, *args, **options)

    Engine.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
