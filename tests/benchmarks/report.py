"""Rows of a benchmark: {name, figure, limit, ok, note}, and `refused` with the reason in the note."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

Row = dict[str, Any]


def row(name: str, figure: float, limit: float | None, note: str) -> Row:
    """Without a limit a figure is printed and not judged."""
    return {"name": name, "figure": round(figure, 4), "limit": limit, "ok": limit is None or bool(figure <= limit), "note": note}


def failed(name: str, reason: str) -> Row:
    return {"name": name, "figure": None, "limit": None, "ok": False, "note": reason}


def refused(name: str, reason: str) -> Row:
    """Not measured here, which is no failure."""
    return {"name": name, "figure": None, "limit": None, "ok": True, "refused": True, "note": reason}


def spread(ratios: Sequence[float]) -> str:
    return f"median of {len(ratios)} pairs, from {min(ratios):.3f} to {max(ratios):.3f}"


def console() -> Console:
    """Where it is no terminal, wide enough that no line of a table is folded."""
    return Console(width=None if sys.stdout.isatty() else 170, highlight=False)


def publish(name: str, rows: Sequence[Row], shown: Sequence[Row] = ()) -> int:
    """Writes build/NAME.json, prints the rows and the verdict; the exit status. shown: rows of tables, printed if not ok."""
    path = Path("build") / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(list(rows), indent=1) + "\n")
    out = console()
    for r in rows:
        if r not in shown or not r["ok"]:
            verdict = "refused" if r.get("refused") else "ok" if r["ok"] else "FAIL"
            out.print(f"{verdict:<7} {r['name']:<60} {_of(r):<20} {r['note']}", markup=False, soft_wrap=True)
    passed, judged = all(r["ok"] for r in rows), [r for r in rows if r["limit"] is not None or not r["ok"]]
    worst = max(judged, key=lambda r: (not r["ok"], _badness(r)), default=None)
    told = f"{worst['name']} {_of(worst)}" if worst else "none"
    print(f"{'PASS' if passed else 'FAIL'} {name}: {len(rows)} cells, {sum(bool(r.get('refused')) for r in rows)} refused, worst {told}")
    return 0 if passed else 1


def _of(row: Row) -> str:
    figure = "-" if row["figure"] is None else f"{row['figure']:.4g}"
    return figure if row["limit"] is None else f"{figure} of {'>' if row.get('exceeds') else ''}{row['limit']:.4g}"


def _badness(row: Row) -> float:
    """Above 1: not within the limit."""
    if row["limit"] is None or row["figure"] is None:
        return 0.0
    over, under = (row["limit"], row["figure"]) if row.get("exceeds") else (row["figure"], row["limit"])
    return float(over / under) if under else float(over > 0) * 1e9
