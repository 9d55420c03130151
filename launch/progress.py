"""Progress of a submission: a bar at a terminal, a plain line every few seconds in a pipe or a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from launch.terminal import console, duration

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Snapshot:
    """Where all trials of a submission stand together."""

    steps: int
    """optimizer steps done, over all trials; a trial that diverged counts in full"""
    total_steps: int
    finished: int
    running: int
    waiting: int
    failed: int
    best: tuple[float, str] | None
    """highest holdout/top1 at the last completed cycle among finished trials, and its arm"""
    seconds_left: float | None

    def trials(self) -> str:
        text = f"{self.finished} finished, {self.running} running, {self.waiting} waiting"
        return f"{text}, {self.failed} failed" if self.failed else text

    def leader(self) -> str:
        return f"best holdout/top1 {self.best[0]:.3f} ({self.best[1]})" if self.best else "no holdout/top1 yet"


class View(Protocol):
    """How a submission is watched."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
    def say(self, text: str) -> None: ...
    def update(self, now: Snapshot) -> None: ...


class Lines:
    """Plain text."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        self._out.print(text, markup=False, soft_wrap=True)
        self._out.file.flush()

    def update(self, now: Snapshot) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            share = now.steps / max(1, now.total_steps)
            self.say(
                f"{share:4.0%}  step {now.steps} of {now.total_steps}, {duration(now.seconds_left)} left; {now.trials()}; {now.leader()}"
            )


class _TwoLines(Progress):
    """The bar, and below it what does not fit beside it on a narrow terminal."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.below, no_wrap=True, overflow="ellipsis")


class Bar:
    """A live bar over all steps of all trials."""

    def __init__(self, out: Console) -> None:
        steps, left = TextColumn("{task.completed:.0f}/{task.total:.0f} steps"), TextColumn("{task.fields[left]} left")
        self._progress = _TwoLines(
            BarColumn(bar_width=None), TaskProgressColumn(), steps, left, console=out, refresh_per_second=2, expand=True
        )
        self._task = self._progress.add_task("steps", total=1, left="-")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def update(self, now: Snapshot) -> None:
        self._progress.below = f"{now.trials()}; {now.leader()}"
        self._progress.update(self._task, total=now.total_steps, completed=now.steps, left=duration(now.seconds_left))


def view(plain: bool) -> View:
    """A bar where somebody looks at it; lines otherwise, and wherever a bar would get in the way."""
    out = console()
    return Bar(out) if out.is_terminal and not plain else Lines(out)
