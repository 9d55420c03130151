"""Where things lie on disk: runs/STUDY/trials/ID/..., and where a trial stands.

    runs/STUDY/trials/ID/config.yaml  journal.jsonl  result.json  checkpoints/step-N-attempt-K/  weights/step-N.pt  correct/  logs/

No torch: the login node reads states from here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from harness import journal
from harness.config import BadInput, Trial, parse, read_yaml
from harness.schedule import total_steps

_EXCLUSIVE = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
"""struct flock of a write lock on a whole file, belonging to the open file (not to the process, which may open it again)"""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""what a file system without locks answers"""

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast, which a thousand trials make felt

ENDED_WELL = ("finished", "diverged")
"""states of trials that have a result"""
RETRIED = ("failed", "exhausted")
"""states of trials that are run again only when somebody asks for it"""
ENDED = (*ENDED_WELL, *RETRIED)
"""states of trials that do not go on by themselves; the next submission goes on with cancelled ones, as with interrupted ones"""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when it is whole and on disk, and otherwise goes: also after a power cut."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole content or nothing, in a folder made for it if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_names(folder: Path) -> None:
    """The names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class TrialState:
    """Where a trial stands, by its own record (a scheduler may know that it is queued)."""

    state: str
    """pending | running | interrupted | cancelled | finished | failed | diverged | exhausted"""
    step: int
    total_steps: int | None
    attempts: int
    committed: int
    """steps done at the newest committed checkpoint: where a next attempt begins"""
    stopped: bool
    """the newest attempt was told to stop, and saved itself"""
    answer: dict[str, float]
    """anytime/*: the metrics of the last completed cycle"""
    last_error: str | None
    seconds_per_step: float | None


SEARCHED_BLIND = "searched without val, since finalists were configured then; keep finalists, or use another name"


class TrialFolder:
    """The folder of one trial. `claim` fences attempts; `lock` says that one is alive on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.journal = path / "journal.jsonl"
        self.result = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "weights"
        self.correct = path / "correct"
        self.attempts = path / "attempts"
        self.logs = path / "logs"
        self._lock = path / "lock"

    def write_config(self, trial: Trial) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, yaml.dump(trial.model_dump(mode="json", exclude_unset=True), Dumper=_Dumper, sort_keys=False))

    def read_config(self) -> Trial:
        return parse(Trial, read_yaml(self.config), str(self.config))

    def is_blind(self) -> bool:
        """Whether the trial ran without the validation split, as one of a search that finalists were to follow."""
        try:
            return not self.read_config().evaluation.val
        except BadInput:  # written by another version
            return False

    def claim(self) -> int:
        """The next attempt number, for this process alone: from now on older attempts may commit nothing."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        number = self.newest_attempt() + 1
        while True:
            try:
                handle = os.open(self.attempts / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                number += 1
                continue
            with os.fdopen(handle, "w") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
            return number

    def newest_attempt(self) -> int:
        """The highest number claimed; 0 before the first attempt.

        The folder is listed, and no name looked up: NFS asks the server when a folder is opened, and remembers names.
        """
        return max((int(p.name) for p in self.attempts.glob("*") if p.name.isdigit()), default=0)

    def is_superseded(self, attempt: int) -> bool:
        """Whether a newer attempt has been claimed, so that what this one writes counts no more."""
        return self.newest_attempt() > attempt

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by rank 0 while an attempt lives; the kernel lets go of it however the process ends. BadInput if it is held.

        On a file system without locks nothing is held and nobody refused: claims alone keep attempts apart there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as file:
            try:
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _EXCLUSIVE)
            except (BlockingIOError, PermissionError):
                raise BadInput(f"trial {self.path.name}: an attempt is running already; wait for it, or stop it") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield

    def finished_result(self) -> dict[str, Any] | None:
        """result.json of a finished trial, else None.

        Passed over if a superseded attempt wrote it, or if the journal, cut or an older copy, does not tell of the end.
        """
        result = self._result()
        if not result or result["state"] != "finished" or self.is_superseded(result["attempts"]):
            return None
        end = journal.fold(journal.glance(self.journal)).end
        return result if end is not None and end["state"] == "finished" else None

    def _result(self) -> dict[str, Any] | None:
        try:
            result = json.loads(self.result.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return result if isinstance(result, dict) else None

    def is_running(self) -> bool:
        """Whether somebody holds the lock; never on a file system without locks.

        Asks without taking it: a slow asker must not keep an attempt from starting.
        """
        try:
            with open(self._lock) as file:
                (kind,) = struct.unpack_from("h", fcntl.fcntl(file, fcntl.F_OFD_GETLK, _EXCLUSIVE))
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return bool(kind != fcntl.F_UNLCK)

    def bytes(self) -> int:
        """Of all files below the folder, each once whatever its names; what goes away meanwhile counts or not."""
        sizes: dict[tuple[int, int], int] = {}
        for folder, _, names in os.walk(self.path):
            for name in names:
                with suppress(FileNotFoundError):
                    found = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - a thousand trials are a lot of Paths
                    sizes[found.st_dev, found.st_ino] = found.st_size
        return sum(sizes.values())

    def state(self) -> TrialState:
        running = self.is_running()
        record = journal.fold(journal.glance(self.journal))
        state = record.state(running)
        if state in ENDED_WELL and (self._result() or {}).get("state") != state:
            state = "running" if running else "interrupted"  # killed between the two: the last steps are to be done again
        start: dict[str, Any] = record.starts[-1] if record.starts else {}
        seconds = [p for p in record.points() if p.metric == "time/train_seconds"]
        return TrialState(
            state=state,
            step=record.steps_done,
            total_steps=start.get("total_steps"),
            attempts=max(len(record.starts), self.newest_attempt()),
            committed=record.committed,
            stopped=record.stopped,
            answer={name: value for name, value in record.newest().items() if name.startswith("anytime/")},
            last_error=(record.end or {}).get("error"),
            seconds_per_step=seconds[-1].value / (seconds[-1].step + 1) if seconds else None,
        )


class Store:
    """The folder given by --store."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        there = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not there.is_dir():
            raise BadInput(f"--store {root}: not writable, {there} is not a folder; e.g. --store ./runs")

    def study(self, name: str) -> Path:
        return self.root / name

    def trial(self, study: str, trial_id: str) -> TrialFolder:
        return TrialFolder(self.root / study / "trials" / trial_id)

    def trials(self, study: str) -> list[TrialFolder]:
        """Every trial folder of a study, also of trials that have left the study file."""
        folder = self.root / study / "trials"
        return [TrialFolder(p) for p in sorted(folder.glob("*")) if p.is_dir()]

    def check_trials(self, study: str) -> None:
        """BadInput unless the store has trials of the study: where it is mistyped there is nothing to read, and nothing to write."""
        if not self.root.is_dir():
            raise BadInput(f"--store {self.root}: there is no store; e.g. --store ./runs")
        if not self.trials(study):
            known = ", ".join(sorted({p.parent.parent.name for p in self.root.glob("*/trials/*")})) or "nothing"
            raise BadInput(
                f"--store {self.root}: there are no trials of {study}, but of: {known}; another --store, or first wrbench study submit"
            )

    def results(self, study: str) -> dict[str, float | None]:
        """trial id -> holdout/top1 at the last completed cycle of every ended trial (None: failed or diverged)."""
        states = {folder.path.name: folder.state() for folder in self.trials(study)}
        return {
            trial_id: s.answer.get("anytime/holdout_top1") if s.state == "finished" else None
            for trial_id, s in states.items()
            if s.state in ENDED
        }

    def check_writable(self) -> None:
        """BadInput unless a file can be made in the store, now rather than after an hour."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise BadInput(f"--store {self.root}: not writable ({error.strerror}); e.g. --store ./runs") from None


def result_of(trial: Trial, state: str, step: int, attempt: int, metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    """The mapping of result.json."""
    return {
        "trial_id": trial.trial_id, "arm": trial.arm, "seed": trial.seed, "state": state, "step": step,
        "total_steps": total_steps(trial), "attempts": attempt, "weights_sha256": None, "metrics": metrics, **more,
    }  # fmt: skip


def write_result(folder: TrialFolder, result: dict[str, Any]) -> None:
    write_atomically(folder.result, json.dumps(result, indent=2) + "\n")


def close(folder: TrialFolder, state: str, error: str, attempt: int | None = None) -> bool:
    """Ends the record of a trial for whoever ran its attempts, which are over: failed, exhausted or cancelled; whether it did.

    `attempt` is the newest that the caller knows of (0: none has begun; left out: whichever is the newest): once there is a
    newer one, or the trial has a result, nothing is written. An attempt after this opens the record again.
    """
    newest = folder.newest_attempt()
    if attempt is not None and newest > attempt:
        return False
    record = journal.fold(journal.read(folder.journal))
    if record.end is not None and (record.end["state"] != "failed" or state not in journal.GIVEN_UP):
        return False
    trial = folder.read_config()
    book = journal.Journal(folder.journal, trial.trial_id, newest)
    try:
        book.write(max(0, record.steps_done - 1), event="end", state=state, error=error)
        book.sync()
    finally:
        book.close()
    write_result(folder, result_of(trial, state, record.steps_done, newest, record.newest(), error=error))
    return True
