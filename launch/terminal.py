"""What a terminal shows, and what a pipe gets instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output: at a terminal with colours and its width, otherwise plain and never cut."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=1000)


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Cells on one line each; only the last column gives way where the terminal is too narrow."""
    apart = 2 if any(" " in name for name in columns) else 1  # where a space may also be inside a name
    made = Table(box=None, pad_edge=False, padding=(0, apart, 0, 0), header_style="bold")
    for place, name in enumerate(columns[:-1]):
        made.add_column(name, no_wrap=True, min_width=max(len(name), *(len(row[place]) for row in rows)))
    made.add_column(columns[-1], no_wrap=True, overflow="ellipsis")
    for row in rows:
        made.add_row(*row)
    return made


@contextmanager
def bar(title: str, unit: Literal["images", "bytes", "rounds"]) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar with rate and time left on stderr; at a terminal only, and gone at the end."""
    out = Console(stderr=True)
    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), _Rate())
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal, speed_estimate_period=300) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


def duration(seconds: float | None) -> str:
    """`seconds` for people; a dash when not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
