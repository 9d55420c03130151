"""One attempt: a life of a trial under a scheduler. Claims its number, keeps the journal, commits checkpoints, ends.

Only rank 0 writes, except that a rank which fails says so itself. Everything that is collective is so on every rank.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from harness import checkpoint, journal
from harness.config import Trial
from harness.data.loader import Substitution
from harness.dist import Ranks, peer_lost
from harness.engine import Engine
from harness.journal import Journal
from harness.schedule import steps_per_epoch, total_steps
from harness.store import TrialFolder, write_result

LINE = 500
"""characters of an error kept in the journal"""


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

    def __init__(self, trial: Trial, folder: TrialFolder, ranks: Ranks) -> None:
        self.trial, self.folder, self.ranks = trial, folder, ranks
        self._resources = ExitStack()
        self._substituted: set[int] = set()
        self._steps_done = 0

    def __enter__(self) -> Attempt:
        number = 0
        if self.ranks.rank == 0:
            self._resources.enter_context(self.folder.lock())
            if not self.folder.config.exists():
                self.folder.write_config(self.trial)
            number = self.folder.claim()
            self.folder.result.unlink(missing_ok=True)
            checkpoint.tidy(self.folder, self.trial.checkpoint.keep)
        self.number: int = self.ranks.from_rank_0(number)
        self._journal = Journal(self.folder.journal, self.trial.trial_id, self.number)
        self._resources.callback(self._journal.close)
        return self

    def resume(self, engine: Engine, **described: Any) -> Progress:
        """Loads the newest sound checkpoint, if any, into the engine and opens the journal's attempt. Collective."""
        saved, complaints = checkpoint.newest(self.folder, self.trial.trial_id) if self.ranks.rank == 0 else (None, [])
        path = self.ranks.from_rank_0(str(saved.path) if saved else "")
        progress = Progress()
        if path:
            saved = checkpoint.at(Path(path))
            engine.load(saved)
            progress = Progress(**saved.manifest["progress"])
        self._steps_done = progress.steps_done
        self._write(self._steps_done, event="start", resumed_from=self._steps_done, **self._description(), **described)
        for complaint in complaints:
            self.warn(self._steps_done, complaint)
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
            "device": self.ranks.device.type,
            "threads": torch.get_num_threads(),
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "pid": os.getpid(),
            "job_id": os.environ.get("WRBENCH_JOB_ID"),
            "commit": _commit(),
        }

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, metrics=metrics)

    def warn(self, step: int, message: str) -> None:
        self._write(step, event="warning", message=message)

    def substitutions(self, step: int, found: Iterable[Substitution]) -> dict[str, float]:
        """Warns once of each corrupt sample that any rank replaced; their number as a metric, if there are any. Collective."""
        for part in self.ranks.gathered([(s.number, f"{s.reason}; sample {s.substitute} takes its place") for s in found]):
            for number, message in part:
                if number not in self._substituted:
                    self._substituted.add(number)
                    self.warn(step, message)
        return {"data/substituted": float(len(self._substituted))} if self._substituted else {}

    def _write(self, step: int, **fields: Any) -> None:
        if self.ranks.rank == 0:
            self._journal.write(step, **fields)

    def save(self, engine: Engine, progress: Progress) -> None:
        """Commits a checkpoint; the journal up to there is on disk before. Collective."""
        if self.ranks.rank == 0:
            self._journal.sync()
        self._steps_done = progress.steps_done
        checkpoint.save(
            self.folder, self.ranks, self.trial.trial_id, self.number, progress.steps_done, engine.save(), {"progress": asdict(progress)}
        )
        self._write(progress.steps_done, event="checkpoint")
        if self.ranks.rank == 0:
            checkpoint.tidy(self.folder, self.trial.checkpoint.keep)

    def stop(self, steps_done: int, reason: str) -> dict[str, Any]:
        """The attempt was told to stop and has saved: the trial is interrupted."""
        self._write(steps_done, event="stop", reason=reason)
        return self._result("interrupted", steps_done, None)

    def end(self, state: str, steps_done: int, weights_sha256: str | None, error: str | None = None) -> dict[str, Any]:
        """Records that the trial ended; the result.json mapping, the same on every rank. Collective."""
        self._write(max(0, steps_done - 1), event="end", state=state, error=error)
        result = self._result(state, steps_done, weights_sha256)
        if self.ranks.rank == 0:
            write_result(self.folder, result)
        return result

    def _result(self, state: str, steps_done: int, weights_sha256: str | None) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        if self.ranks.rank == 0:
            points = journal.fold(journal.read(self.folder.journal)).points()
            metrics = {p.metric: p.value for p in sorted(points, key=lambda p: p.step)}
        return {
            "trial_id": self.trial.trial_id, "arm": self.trial.arm, "seed": self.trial.seed, "state": state, "step": steps_done,
            "total_steps": total_steps(self.trial), "attempts": self.number, "weights_sha256": weights_sha256,
            "metrics": self.ranks.from_rank_0(metrics),
        }  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._resources:
            ours = isinstance(error, Exception) and not peer_lost(error) and not isinstance(error, checkpoint.Superseded)
            if error is None or not ours:
                return
            line = " ".join(traceback.format_exception_only(error)[-1].split())[:LINE]
            self._journal.write(self._steps_done, event="end", state="failed", error=line, rank=self.ranks.rank)
            write_result(
                self.folder,
                {
                    "trial_id": self.trial.trial_id, "arm": self.trial.arm, "seed": self.trial.seed, "state": "failed",
                    "step": self._steps_done, "total_steps": total_steps(self.trial), "attempts": self.number,
                    "weights_sha256": None, "metrics": {}, "error": line,
                },
            )  # fmt: skip


def _commit() -> str | None:
    """The commit of the code that runs, marked when the working tree differs; None outside a checkout."""
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
