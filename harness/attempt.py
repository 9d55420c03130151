"""One attempt: a life of a trial under a scheduler. Claims its number, keeps the journal, commits checkpoints, ends.

Only rank 0 writes, except that a rank which fails says so itself. Everything that is collective is so on every rank.
"""

from __future__ import annotations

import os
import platform
import socket
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from harness import checkpoint, correct, journal, provenance
from harness.config import BadInput, Trial
from harness.correct import BoolArray
from harness.data import decode
from harness.data.index import CorruptSample
from harness.data.loader import SUBSTITUTED_SHARE, Substitution
from harness.dist import Ranks, peer_lost
from harness.engine import Engine
from harness.journal import Journal
from harness.schedule import cycle_ends, steps_per_epoch, total_steps
from harness.store import TrialFolder, result_of, write_result

LINE = 500
"""characters of an error kept in the journal"""
PATIENCE = 20.0
"""seconds that an older attempt has to leave; after that it is taken for dead, or for stopped"""
LOOK = 2.0
"""seconds between two looks for a newer attempt: the folder may be far away"""


@dataclass(frozen=True)
class Progress:
    """How far a trial is, beside weights and moments: what a checkpoint's manifest carries."""

    steps_done: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    answer: dict[str, float] = field(default_factory=dict)
    """anytime/*: the metrics of the last completed cycle; empty before one has ended"""


class Attempt:
    """Context manager around the training loop of one process."""

    def __init__(self, trial: Trial, folder: TrialFolder, ranks: Ranks, takes_over: bool = False) -> None:
        self.trial, self.folder, self.ranks = trial, folder, ranks
        self._takes_over = takes_over
        self._resources = ExitStack()
        self._locked = False
        self._next_look = 0.0
        self._warnings: list[str] = []
        """of before the start line"""
        self._substituted: set[int] = set()
        self._saving: checkpoint.Saving | None = None
        self._saved = Progress()
        """at the save under way, else at the last one"""
        self._stall = self._step = 0.0
        """seconds: that the loop has stood still for the save under way; of the mean step between the save before and it"""
        self._ended = False

    def __enter__(self) -> Attempt:
        try:
            number = 0
            if self.ranks.rank == 0:
                number = self._claim_first() if self._takes_over else self._lock_first()
            self.number: int = self.ranks.from_rank_0(number)
            self._refuse_if_superseded(0)
            if self.ranks.rank == 0:
                if not self.folder.config.exists():
                    self.folder.write_config(self.trial)
                self.folder.result.unlink(missing_ok=True)
                self._warnings = self._tidy(number)
            self._journal = Journal(self.folder.journal, self.trial.trial_id, self.number)
        except BaseException:
            self._resources.close()
            raise
        self._resources.callback(self._journal.close)
        self._resources.callback(self._abandon)
        return self

    def _lock_first(self) -> int:
        """The number of an attempt that must not meet another one; BadInput if it does."""
        self._lock()
        return self.folder.claim()

    def _claim_first(self) -> int:
        """The number of an attempt that takes over: the claim tells an older one to leave, which lets go of the lock then.

        One that is stopped, or dead behind a file system that still holds its lock, cannot leave: it is left to the fence.
        """
        number = self.folder.claim()
        until = time.monotonic() + min(PATIENCE, self.trial.backend.timeout_seconds / 2)  # the other ranks wait for this one
        while not self._try_lock() and time.monotonic() < until:
            time.sleep(0.1)
        return number

    def _lock(self) -> None:
        self._resources.enter_context(self.folder.lock())
        self._locked = True

    def _try_lock(self) -> bool:
        with suppress(BadInput):
            self._lock()
        return self._locked

    def is_superseded(self) -> bool:
        """Whether rank 0 sees a newer attempt; it does not look at every call. False on other ranks: all act on it together."""
        if self.ranks.rank != 0 or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK
        if not self._locked:  # whoever held it at the start may be gone
            self._try_lock()
        return self.folder.is_superseded(self.number)

    def _refuse_if_superseded(self, step: int) -> None:
        """Raises Superseded on every rank if there is a newer attempt: this one leaves no word. Collective."""
        if self.ranks.from_rank_0(self.ranks.rank == 0 and self.folder.is_superseded(self.number)):
            raise checkpoint.superseded(self.trial.trial_id, self.number, step)

    def resume(self, engine: Engine, **described: Any) -> Progress:
        """Loads the newest sound checkpoint, if any, into the engine and opens the journal's attempt. Collective."""
        lines = list(journal.glance(self.folder.journal)) if self.ranks.rank == 0 else []
        reached: dict[int, int] = {}
        for line in lines:
            if "metrics" in line:
                reached[line["attempt"]] = max(reached.get(line["attempt"], 0), line["step"] + 1)
        saved, complaints = checkpoint.newest(self.folder, self.trial.trial_id, reached) if self.ranks.rank == 0 else (None, [])
        path = self.ranks.from_rank_0(str(saved.path) if saved else "")
        progress = Progress()
        if path:
            saved = checkpoint.at(Path(path))
            engine.load(saved)
            progress = Progress(**saved.manifest["progress"])
        self._saved = progress
        self._substituted = set(self.ranks.from_rank_0([line["substituted"] for line in lines if "substituted" in line]))
        before: dict[str, Any] = next((line for line in reversed(lines) if line.get("event") == "start"), {})
        for what, now in self._pixels().items():
            if before.get(what, now) != now:
                complaints = [*complaints, f"{what} was {before[what]} and is {now}: pixels of damaged or augmented images may differ"]
        self._write(progress.steps_done, event="start", resumed_from=progress.steps_done, **self._description(), **described)
        for complaint in (*self._warnings, *complaints):
            self.warn(progress.steps_done, complaint)
        return progress

    def _description(self) -> dict[str, Any]:
        """What may differ between attempts of a trial and must be known of each."""
        return {
            "total_steps": total_steps(self.trial),
            "steps_per_epoch": steps_per_epoch(self.trial),
            "world_size": self.ranks.world_size,
            "micro_batch_size": self.trial.micro_batch_size(self.ranks.world_size),
            "backend": self.trial.backend.name,
            "zero_stage": self.trial.backend.zero_stage,
            "offload_optimizer": self.trial.backend.offload_optimizer,
            "channels_last": self.trial.backend.channels_last,
            "compile": self.trial.backend.compile,
            "deterministic": self.trial.backend.deterministic,
            "device": self.ranks.device.type,
            **self._gpu(),
            "threads": torch.get_num_threads(),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "pid": os.getpid(),
            "job_id": os.environ.get("WRBENCH_JOB_ID"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": provenance.version("deepspeed"),
            **self._pixels(),
            **provenance.code(),
        }

    def _gpu(self) -> dict[str, Any]:
        """Of rank 0, and the libraries that compute and reduce there."""
        if self.ranks.device.type != "cuda":
            return {}
        versions = ("cuda", torch.version.cuda), ("cudnn", torch.backends.cudnn.version()), ("nccl", torch.cuda.nccl.version())
        return {"gpu": torch.cuda.get_device_name(self.ranks.device)} | {name: str(version) for name, version in versions}

    @staticmethod
    def _pixels() -> dict[str, Any]:
        """What pixels may depend on beside the data: of damaged images, and of augmented ones."""
        return {"decoder": decode.decoder, "torchvision": provenance.version("torchvision")}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, metrics=metrics)

    def warn(self, step: int, message: str, **more: Any) -> None:
        self._write(step, event="warning", message=message, **more)

    def keep_correct(self, step: int, split: str, own: BoolArray) -> None:
        """Writes which images of a split are right, `own` those of this rank: by rank, they are the split in order. Collective."""
        self._refuse_if_superseded(step)
        parts = self.ranks.gathered(own.tobytes())
        if self.ranks.rank == 0:
            correct.write(self.folder, split, step, np.frombuffer(b"".join(parts), dtype=bool))

    def substitutions(self, step: int, found: Iterable[Substitution]) -> dict[str, float]:
        """Warns once of each corrupt sample that any rank replaced; their number as a metric, if there are any. Collective.

        Raises CorruptSample on every rank when they are over the limit, with those of the attempts before: of its own samples
        each process only knows that they are within it.
        """
        for part in self.ranks.gathered([(s.number, f"{s.reason}; sample {s.substitute} takes its place") for s in found]):
            for number, message in part:
                if number not in self._substituted:
                    self._substituted.add(number)
                    self.warn(step, message, substituted=number)
        trained = self.trial.workload.data.trained_samples
        if len(self._substituted) > SUBSTITUTED_SHARE * trained:
            raise CorruptSample(
                f"{len(self._substituted)} of {trained} training samples are corrupt, each named in a warning: over the limit of "
                f"{SUBSTITUTED_SHARE:.0%} for on_corrupt: substitute; see: wrbench shards verify"
            )
        return {"data/substituted": float(len(self._substituted))} if self._substituted else {}

    def _write(self, step: int, **fields: Any) -> None:
        if self.ranks.rank == 0:
            self._journal.write(step, **fields)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Takes a snapshot, which is written while training goes on; commits the save before, if it is not yet. Collective."""
        self.commit()
        start = time.perf_counter()
        steps = progress.steps_done - self._saved.steps_done
        self._step = (progress.train_seconds - self._saved.train_seconds) / steps
        self._saved = progress
        self._saving = checkpoint.Saving(
            self.folder, self.ranks, self.trial.trial_id, self.number, progress.steps_done, engine.save(), {"progress": asdict(progress)}
        )
        self._stall = time.perf_counter() - start

    def written(self) -> bool:
        """Whether a save is under way and this rank's part of it is done. When all ranks say so, `commit` does not wait."""
        return self._saving is not None and self._saving.written()

    def commit(self) -> None:
        """Commits the save under way, if any; the journal up to its step is on disk before. Collective.

        A save for which there is no room on some rank's disk is given up with a warning: the run goes on, and the older
        checkpoints stay.
        """
        if self._saving is None:
            return
        start, step = time.perf_counter(), self._saved.steps_done
        failure = self._saving.commit(self._journal)
        self._saving = None
        if failure:
            self.warn(step, f"the checkpoint of step {step} could not be written ({failure}); older ones are kept")
            return
        self._stall += time.perf_counter() - start
        self._write(step, event="checkpoint", stall_seconds=self._stall, step_seconds=self._step)
        for complaint in self._tidy(self.number):
            self.warn(step, complaint)

    def _tidy(self, attempt: int) -> list[str]:
        """Removes what is no longer wanted, also what attempts before this one left unfinished; warnings, on rank 0."""
        if self.ranks.rank != 0:
            return []
        kept = self.trial.checkpoint.weights in ("all", self.trial.phase)
        return checkpoint.tidy(self.folder, self.trial.checkpoint.keep, attempt, cycle_ends(self.trial) if kept else ())

    def _abandon(self) -> None:
        if self._saving is not None:
            self._saving.abandon()

    def stop(self, steps_done: int, reason: str) -> dict[str, Any]:
        """The attempt was told to stop and has taken a snapshot: once that is committed, the trial is interrupted. Collective."""
        self.commit()
        self._refuse_if_superseded(steps_done)
        self._write(steps_done, event="stop", reason=reason)
        return result_of(self.trial, "interrupted", steps_done, self.number, self._metrics())

    def end(self, state: str, steps_done: int, weights_sha256: str | None, error: str | None = None) -> dict[str, Any]:
        """Records that the trial ended; the result.json mapping, the same on every rank. Collective.

        Raises OSError if the record cannot be written: the trial can be run again, from its newest checkpoint.
        """
        self.commit()
        self._refuse_if_superseded(steps_done)
        for complaint in self._tidy(self.number + 1):  # nothing is being written any more
            self.warn(steps_done, complaint)
        self._ended = True
        self._write(max(0, steps_done - 1), event="end", state=state, error=error)
        try:
            if self.ranks.rank == 0:
                self._journal.sync()
            result = result_of(self.trial, state, steps_done, self.number, self._metrics(), weights_sha256=weights_sha256)
            if self.ranks.rank == 0:
                write_result(self.folder, result)
        except OSError as full:
            reason = f"trial {self.trial.trial_id} has {state}, which cannot be recorded: {full.strerror}; make room and run it again"
            raise OSError(full.errno, reason, str(self.folder.path)) from full
        return result

    def _metrics(self) -> dict[str, float]:
        """The newest value of each metric in the journal. Collective."""
        metrics = journal.fold(journal.read(self.folder.journal)).newest() if self.ranks.rank == 0 else {}
        found: dict[str, float] = self.ranks.from_rank_0(metrics)
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ours = isinstance(error, Exception) and not peer_lost(error) and not isinstance(error, checkpoint.Superseded)
        try:
            with self._resources:
                if error is not None and ours and not self._ended:
                    self._fail(error)
        except OSError as lost:
            if error is None:
                raise
            error.add_note(f"the record of this could not be written: {lost}")

    def _fail(self, error: BaseException) -> None:
        if self.folder.is_superseded(self.number):
            return
        line, done = " ".join(traceback.format_exception_only(error)[-1].split())[:LINE], self._saved.steps_done
        self._journal.write(done, event="end", state="failed", error=line, rank=self.ranks.rank)
        write_result(self.folder, result_of(self.trial, "failed", done, self.number, {}, error=line))
