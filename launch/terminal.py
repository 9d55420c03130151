"""What a terminal shows, and what a pipe gets instead."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output: at a terminal with colours and its width, otherwise plain and never cut."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=1000)


def table(out: Console, *columns: str, cut: str | None = None) -> Table:
    """An empty table whose cells stay on one line; column `cut` gives way where the terminal is too narrow."""
    made = Table(box=SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1 if name == cut and out.is_terminal else None)
    return made


def duration(seconds: float | None) -> str:
    """`seconds` for people; a dash when not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
