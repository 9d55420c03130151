"""What every check prints and writes: a line a row, build/NAME.json, and the verdict as the last line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console


@dataclass(frozen=True)
class Row:
    """One cell of a check: its figure, and whether that is good enough."""

    name: str
    figure: float | None
    limit: float | None
    """None: the figure is printed and not judged"""
    ok: bool
    note: str = ""
    refused: bool = False
    """not measured, for the reason in the note"""
    exceeds: bool = False
    """the figure must be above its limit"""

    @property
    def badness(self) -> float:
        """Above 1: not within the limit."""
        if self.limit is None or self.refused:
            return 0.0 if self.ok else math.inf
        if self.figure is None or math.isnan(self.figure):
            return math.inf
        over, under = (self.limit, self.figure) if self.exceeds else (self.figure, self.limit)
        return over / under if under else (0.0 if over == 0 else math.inf)


def row(name: str, figure: float, limit: float | None, note: str = "", ok: bool = True) -> Row:
    """ok: False if something else than the figure is wrong."""
    return Row(name, figure, limit, ok and (limit is None or bool(figure <= limit)), note)


def failed(name: str, reason: str) -> Row:
    return Row(name, None, None, False, reason)


def refused(name: str, reason: str) -> Row:
    """Not measured here, which is no failure."""
    return Row(name, None, None, True, reason, refused=True)


def spread(ratios: Sequence[float]) -> str:
    return f"median of {len(ratios)} pairs, from {min(ratios):.3f} to {max(ratios):.3f}"


def console() -> Console:
    """Where it is no terminal, wide enough that no line of a table is folded."""
    return Console(width=None if sys.stdout.isatty() else 170, highlight=False)


def line(row: Row, style: str = ".4g", width: int = 60) -> str:
    """verdict, name, figure and limit, note. style: of the figures; width: of the name."""
    verdict = "refused" if row.refused else "ok" if row.ok else "FAIL"
    return f"{verdict:<7} {row.name:<{width}} {_of(row, style):<20} {row.note}".rstrip()


def publish(name: str, rows: Sequence[Row], shown: Sequence[Row] = (), style: str = ".4g") -> int:
    """Writes build/NAME.json, prints the rows and the verdict; the exit status. shown: printed before, so again only if not ok."""
    path = Path("build") / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([_plain(r) for r in rows], indent=1) + "\n")
    told = [r for r in rows if not (r.ok and r in shown)]
    width = max((len(r.name) for r in told), default=0)
    for r in told:
        print(line(r, style, width))
    worst = max((r for r in rows if r.limit is not None or not r.ok), key=lambda r: (not r.ok, r.badness), default=None)
    passed, skipped = all(r.ok for r in rows), sum(r.refused for r in rows)
    worst_told = f"{worst.name} {_of(worst, style)}" if worst else "none"
    print(f"{'PASS' if passed else 'FAIL'} {name}: {len(rows)} cells, {skipped} refused, worst {worst_told}", flush=True)
    return 0 if passed else 1


def _of(row: Row, style: str) -> str:
    figure = "-" if row.figure is None else format(row.figure, style)
    return figure if row.limit is None else f"{figure} of {'>' if row.exceeds else ''}{row.limit:{style}}"


def _plain(row: Row) -> dict[str, object]:
    """JSON knows no NaN and no infinity."""
    return asdict(row) | {"figure": row.figure if row.figure is not None and math.isfinite(row.figure) else None}
