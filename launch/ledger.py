"""runs/STUDY/ledger.jsonl: which trial was given to which job, append-only; and who is alive.

A line: time, event (queued | submitted | ended), trial_id, arm, seed, phase, attempt, and from `submitted` on job_id
and slot, at `ended` the state. `attempt` is the number that the job will claim, so that a record of an earlier attempt
is told from this one's.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.config import Trial


class Ledger:
    """The ledger of one study folder."""

    def __init__(self, study: Path) -> None:
        self.path = study / "ledger.jsonl"

    def append(self, event: str, trial: Trial, attempt: int, **fields: Any) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "trial_id": trial.trial_id,
            "arm": trial.arm,
            "seed": trial.seed,
            "phase": trial.phase,
            "attempt": attempt,
            **fields,
        }
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)

    def newest(self) -> dict[str, dict[str, Any]]:
        """trial id -> its last line; a torn line is passed over."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        lines: dict[str, dict[str, Any]] = {}
        for raw in text.splitlines():
            try:
                line = json.loads(raw)
                lines[line["trial_id"]] = line
            except (ValueError, KeyError, TypeError):
                continue
        return lines


def is_alive(line: Mapping[str, Any], logs: Path) -> bool:
    """Whether the job of a ledger line still has its controller on this machine, and its number no new owner."""
    try:
        command = Path(f"/proc/{int(line['job_id'])}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, KeyError, ValueError):
        return False
    return str(logs) in command


class Submitter:
    """One submitter a study: runs/STUDY/submit.lock, let go of by the kernel however the process ends."""

    def __init__(self, study: Path) -> None:
        self.path = study / "submit.lock"

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process is the study's submitter now; False while another one is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+") as file:
            for _ in range(5):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)  # perhaps only somebody who asks, see `pid`
            else:
                yield False
                return
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield True

    def pid(self) -> int | None:
        """The submitter's process; None when nobody is."""
        try:
            with open(self.path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(file.read())
        except (FileNotFoundError, ValueError):
            pass
        return None
