"""The append-only record of one trial, and what of it is final.

A line is one JSON object with trial, attempt, step and timestamp (milliseconds since 1970, as MLflow wants them) and
either `metrics` or an `event`:

    start       attempt begins: resumed_from (steps already done), total_steps, world_size, host, pid, ...
    checkpoint  step = steps done; everything before that step is final. stall_seconds: how long the loop stood still for
                it; step_seconds: the mean step since the save before, to hold it against
    warning     message; of a corrupt sample that another one replaces, substituted: its number in the index
    stop        the attempt was told to stop and saved itself; the trial is interrupted
    end         state: finished | failed | diverged, error; or, from whoever runs the attempts, failed | exhausted | cancelled

`step` is the 0-based optimizer step of the CONTRACT; an evaluation stands at the last step it follows. Lines are
written whole, in one write to a file opened for appending, so several processes may append. Lines for which the disk
has no room wait in memory. A later attempt repeats the steps after the checkpoint it started from: `fold` keeps exactly
one value a (metric, step).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""of a full disk, a quota, a limit on the size of files"""

GIVEN_UP = ("exhausted", "cancelled")
"""states that an attempt cannot reach by itself"""


class Journal:
    """Appends lines of one attempt. Not for several threads at once."""

    def __init__(self, path: Path, trial_id: str, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._stamp = {"trial": trial_id, "attempt": attempt}
        self._waiting: deque[bytes] = deque()

    def write(self, step: int, **fields: Any) -> None:
        """Appends a line. Without room on the disk it is kept, and written before the next one."""
        line = {**self._stamp, "step": step, "timestamp": time.time_ns() // 1_000_000, **fields}
        self._waiting.append(json.dumps(line, separators=(",", ":")).encode())
        try:
            self._append()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise

    def _append(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            # A line torn by a full disk or a power cut must not swallow this one. It is left as it is: other processes
            # may have written behind it.
            size = os.fstat(self._file).st_size
            start = b"\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else b""
            if os.write(self._file, start + line + b"\n") >= len(start + line):  # only the end of the line may be missing
                self._waiting.popleft()

    def sync(self) -> None:
        """Everything written so far survives a power cut. Raises OSError if lines still wait for room on the disk."""
        try:
            self._append()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: {len(self._waiting)} line(s) wait to be written", str(self._path)) from None
        os.fsync(self._file)

    def close(self) -> None:
        """Raises OSError, and is closed, if lines still wait for room on the disk: they are lost then."""
        try:
            if self._waiting:
                self.sync()
        finally:
            os.close(self._file)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; an absent one is empty."""
    return lines(_text(path))


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def lines(text: bytes) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal's text, in order; a torn one is passed over."""
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and {"trial", "attempt", "step", "timestamp"} <= line.keys():
            yield line


_ATTEMPT = re.compile(rb'"attempt": ?(\d+)')


def glance(path: Path) -> Iterator[dict[str, Any]]:
    """Of the lines of a journal those that say where the trial stands, in a tenth of the time that all take.

    Every event and every evaluation's answer, and before each event, and at the end, the newest line of each attempt and
    the newest with its clock. `fold` makes the same Record of them as of the whole journal, but for points other than anytime/*.
    """
    raw, kept, newest = _text(path).splitlines(), set[int](), dict[tuple[bytes, bool], int]()
    for number, line in enumerate(raw):
        if b'"event"' in line:
            kept.update((number, *newest.values()))
        elif line.endswith(b"}}") and (attempt := _ATTEMPT.search(line)):  # whole
            if b'"anytime/' in line:
                kept.add(number)
            newest[attempt[1], b'"time/train_seconds"' in line] = number
    return lines(b"\n".join(raw[number] for number in sorted(kept.union(newest.values()))))


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    metric: str
    step: int
    value: float
    timestamp: int
    attempt: int


@dataclass
class Record:
    """A journal, folded: what is final, what is not yet, and where the trial stands."""

    settled: list[Point] = field(default_factory=list)
    """final points, one a (metric, step): before the last committed checkpoint, or all once the trial ended; a longer
    journal only appends to them"""
    pending: list[Point] = field(default_factory=list)
    """points after the last committed checkpoint, which a later attempt would repeat"""
    starts: list[dict[str, Any]] = field(default_factory=list)
    """the start line of each attempt"""
    committed: int = 0
    """steps done at the last committed checkpoint"""
    steps_done: int = 0
    end: dict[str, Any] | None = None
    """the end line; None while the trial can go on"""
    stopped: bool = False
    """the newest attempt was told to stop, and saved itself"""
    warnings: list[str] = field(default_factory=list)
    first_timestamp: int | None = None
    last_timestamp: int | None = None

    def points(self) -> list[Point]:
        return self.settled + self.pending

    def newest(self) -> dict[str, float]:
        """The newest value of each metric; anytime/* is the answer of the last completed cycle."""
        return {p.metric: p.value for p in sorted(self.points(), key=lambda p: p.step)}

    def state(self, running: bool) -> str:
        """pending | running | interrupted | cancelled | finished | failed | diverged | exhausted.

        `running`: a live process holds the trial.

        Find out whether one does *before* reading the journal: a trial that ends in between is then called running for
        a moment longer, and never interrupted.
        """
        if running:
            return "running"
        if self.end is not None:
            return str(self.end["state"])
        return "interrupted" if self.starts else "pending"


def fold(lines: Iterable[dict[str, Any]]) -> Record:
    """The journal's meaning: one value a (metric, step), the newest that nothing final stands against.

    What a committed checkpoint or the trial's end makes final is never superseded, also when a damaged checkpoint or a
    retry makes a later attempt repeat it: it may have been delivered already. Other points are replaced by the attempt
    that repeats their step. Lines that an older attempt writes after a newer one has started (split brain), or that an
    attempt writes after its end (another rank failed first), count for nothing; except that whoever ran a failed attempt
    may give the trial up, or cancel it, afterwards.
    """
    record = Record()
    settled: dict[tuple[str, int], Point] = {}
    pending: dict[tuple[str, int], Point] = {}
    newest = 0

    def settle(before: float) -> None:
        for key in [k for k in pending if k[1] < before]:
            settled[key] = pending.pop(key)

    def commit(steps: int) -> None:
        record.committed = max(record.committed, steps)
        settle(record.committed)

    for line in lines:
        attempt, step, event = int(line["attempt"]), int(line["step"]), line.get("event")
        given_up = event == "end" and line["state"] in GIVEN_UP and record.end is not None and record.end["state"] == "failed"
        if attempt < newest or (record.end is not None and event != "start" and not given_up):
            continue
        newest = attempt
        record.first_timestamp = record.first_timestamp or line["timestamp"]
        record.last_timestamp = line["timestamp"]
        if event == "start":
            commit(line["resumed_from"])  # the checkpoint is there, even if its line was lost with the process
            pending.clear()
            record.starts.append(line)
            record.end, record.stopped, record.steps_done = None, False, line["resumed_from"]
        elif event == "checkpoint":
            commit(step)
            record.steps_done = max(record.steps_done, step)
        elif event == "warning":
            record.warnings.append(line["message"])
        elif event == "stop":
            record.stopped = True
        elif event == "end":
            record.end = line
            settle(math.inf)
        elif "metrics" in line:
            record.steps_done = max(record.steps_done, step + 1)
            for metric, value in line["metrics"].items():
                if (metric, step) not in settled:
                    pending[metric, step] = Point(metric, step, value, line["timestamp"], attempt)
    record.settled, record.pending = list(settled.values()), list(pending.values())
    return record
