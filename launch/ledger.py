"""runs/STUDY/ledger.jsonl: which trial was given to which job, append-only; and who is alive.

A line: time, event, trial_id (the hash of its config), arm, seed, phase, attempt, and more by event:

    queued      given to a submission (SLURM: token, index; code: the snapshot it runs)
    submitted   job_id; a local one: place; a SLURM one: token, index
    withdrawn   SLURM: sbatch refused that submission
    started     SLURM: a life of a trial begins: job_id, life (0-based, of the job), nodes, ranks, step
    ended       a local one: state; a SLURM one: state, kind, step, seconds, checkpoint, run_id, error
    requeued    SLURM: kind (preempted | time limit | node | disk | elsewhere), why this array task goes back into the queue
    avoids      SLURM: nodes, where its ranks failed and this array task is not run again; why
    cancelled   taken out of the queue, or stopped

`attempt` is the number that the job will claim, so that a record of an earlier attempt is told from this one's. Several
processes on several machines append: whole lines, each write under a lock where the file system has locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.config import Trial


class Ledger:
    """The ledger of one study folder."""

    def __init__(self, study: Path) -> None:
        self.path = study / "ledger.jsonl"

    def append(self, event: str, trial: Trial, attempt: int, **fields: Any) -> None:
        self.extend([line(event, trial, attempt, **fields)])

    def extend(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines as made by `line`, together."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(one) + "\n" for one in lines).encode()
        with open(self.path, "a+b", buffering=0) as file:
            with suppress(OSError):  # on NFS two machines may else append at the same place; some file systems have no locks
                fcntl.lockf(file, fcntl.LOCK_EX)
            size = os.fstat(file.fileno()).st_size
            torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a full disk: it must not swallow these
            rest = b"\n" + text if torn else text
            while rest:  # a disk that has room for a part takes that, and says how much
                rest = rest[file.write(rest) :]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line, in order; a torn one is passed over."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for raw in text.splitlines():
            try:
                read = json.loads(raw)
                read["trial_id"], read["event"]
            except (ValueError, KeyError, TypeError):
                continue
            yield read

    def newest(self) -> dict[str, dict[str, Any]]:
        """trial id -> its last line."""
        return {read["trial_id"]: read for read in self.lines()}

    def entries(self) -> dict[str, Entry]:
        """trial id -> all that is known of it."""
        found: dict[str, Entry] = {}
        for read in self.lines():
            entry = found.setdefault(read["trial_id"], Entry())
            entry.newest = read
            match read["event"]:
                case "queued":
                    entry.token, entry.index, entry.code, entry.job_id = read.get("token"), read.get("index"), read.get("code"), None
                    entry.since, entry.cancelled, entry.avoids = len(entry.lives), False, {}
                case "submitted" if read.get("token") == entry.token:
                    entry.job_id = read["job_id"]
                case "cancelled" if read.get("token") == entry.token:
                    entry.cancelled = True
                case "started":
                    entry.lives.append(Life(read))
                case "avoids" if read.get("token") == entry.token:
                    entry.avoids[read["nodes"]] = read["why"]
                case "ended" | "requeued" as event:
                    for life in reversed(entry.lives):  # of an older life, when a node that was cut off comes back
                        if life.started["attempt"] == read["attempt"] and getattr(life, event) is None:
                            setattr(life, event, read)
                            break
        return found


def line(event: str, trial: Trial, attempt: int, **fields: Any) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "trial_id": trial.trial_id,
        "arm": trial.arm,
        "seed": trial.seed,
        "phase": trial.phase,
        "attempt": attempt,
        **fields,
    }


@dataclass
class Life:
    """One life of a trial in a SLURM job; without `ended` it runs, or was killed with its supervisor."""

    started: dict[str, Any]
    ended: dict[str, Any] | None = None
    requeued: dict[str, Any] | None = None


@dataclass
class Entry:
    """A trial's lines, folded."""

    newest: dict[str, Any] = field(default_factory=dict)
    token: str | None = None
    """the SLURM submission that it was last given to"""
    index: int | None = None
    """of the array task in it"""
    code: str | None = None
    """the snapshot that it runs"""
    job_id: str | None = None
    """None while sbatch has not answered"""
    lives: list[Life] = field(default_factory=list)
    since: int = 0
    """lives before the newest submission"""
    cancelled: bool = False
    """taken back since then; a life that runs saves itself first"""
    avoids: dict[str, str] = field(default_factory=dict)
    """nodes that its array task is kept from -> why"""

    @property
    def lives_on(self) -> bool:
        """A life has begun and not ended, as far as anybody wrote down."""
        return bool(self.lives) and self.lives[-1].ended is None


def is_alive(newest: Mapping[str, Any], logs: Path) -> bool:
    """Whether the job of a ledger line still has its controller on this machine, and its number no new owner."""
    try:
        command = Path(f"/proc/{int(newest['job_id'])}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, KeyError, ValueError):
        return False
    return str(logs) in command


class Submitter:
    """One submitter a study: runs/STUDY/submit.lock, let go of by the kernel however the process ends."""

    def __init__(self, study: Path) -> None:
        self.path = study / "submit.lock"

    @contextmanager
    def lock(self, patience: float = 0.25) -> Iterator[bool]:
        """Whether this process is the study's submitter now; False while another one is, for `patience` seconds.

        On a file system without locks it always is; what two submitters then give to SLURM twice still runs once.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+") as file:
            until = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        yield False
                        return
                    time.sleep(0.05)  # perhaps only somebody who asks, see `holder`
                except OSError:
                    break
            with suppress(OSError):  # for those who ask; a full disk must not keep anybody from cancelling
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"{socket.gethostname()} {os.getpid()}".encode())
            yield True

    def holder(self) -> tuple[str, int] | None:
        """Host and process of the submitter; None when nobody is, or on a file system without locks."""
        try:
            with open(self.path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    host, pid = file.read().split()
                    return host, int(pid)
        except (OSError, ValueError):
            pass
        return None
