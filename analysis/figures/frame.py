"""What all figures share: style, looks of arms, labels, and how they are saved.

Okabe and Ito's colours, which colour-blind readers tell apart, each with a line style and a marker of its own for print in
grey. Figures are made without pyplot, so they need no display and leave no global state behind.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.compare import Comparison

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "svg.hashsalt": "wrbench",
    "svg.fonttype": "path",
}

WIDTH = 6.3
"""inches: a text column"""


@dataclass(frozen=True)
class Look:
    color: str
    line: str | tuple[int, tuple[float, ...]]
    marker: str


LOOKS = (
    Look("#0072B2", "-", "o"),
    Look("#D55E00", (0, (5, 2)), "s"),
    Look("#009E73", (0, (6, 2, 1.2, 2)), "^"),
    Look("#CC79A7", (0, (1.2, 1.6)), "D"),
    Look("#E69F00", (0, (8, 2, 1.2, 2, 1.2, 2)), "v"),
    Look("#56B4E9", (0, (3, 1.5)), "P"),
    Look("#000000", (0, (1.2, 3)), "X"),
)


def looks(comparison: Comparison) -> dict[str, Look]:
    """The same look for an arm in every figure of a study; more than seven arms repeat."""
    return {arm.name: LOOKS[i % len(LOOKS)] for i, arm in enumerate(comparison.arms)}


def png(figure: Figure) -> bytes:
    return _saved(figure, "png", {"Software": None})


def svg(figure: Figure) -> bytes:
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, metadata: Mapping[str, None]) -> bytes:
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format=kind, metadata=dict(metadata))
    return out.getvalue()


def instead(axes: Axes, place: float, text: str) -> None:
    """Where a row has nothing to draw, on the middle of the panel."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.annotate(text, (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center", color="#666666", bbox=white)


def rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def mark(axes: Axes, epochs: Iterable[float]) -> None:
    for epoch in epochs:
        axes.axvline(epoch, color="#777777", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0.5)


def key(axes: Axes, look: Look, label: str, marker: bool = True) -> None:
    """An entry of the legend."""
    axes.plot([], [], color=look.color, linestyle=look.line, marker=look.marker if marker else "", markeredgecolor="white", label=label)


def finish(axes: Axes, table: pd.DataFrame, column: str, title: str, without: str) -> None:
    """Scale, cycle ends, labels and legend of an error panel; the sentence `without` instead where there are no values."""
    axes.set_title(title)
    axes.set_ylabel("Validation error (%)")
    axes.set_xlabel("Epoch")
    if table.empty:
        say(axes, without)
        return
    lowest, highest = table[column].min(), table[column].max()
    if lowest > 0 and highest > 4 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="x")
    axes.set_xlim(0, 1.04 * table.epoch.max())
    mark(axes, sorted(set(table.epoch[table.cycle_end])))
    axes.plot([], [], color="#777777", linewidth=0.8, linestyle=(0, (1, 2)), label="end of a cycle")
    axes.legend(loc="best", fontsize=7)


def say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#666666")
    axes.set_xticks([])
    axes.set_yticks([])


def count(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"n = {high} seed{'s' if high > 1 else ''}" if low == high else f"n = {low}–{high} seeds"


@contextmanager
def framed(
    height: float, rows: int = 1, columns: int = 1, shared: bool = True, heights: Sequence[float] | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    """The figure and its panels, row by row. shared: panels of a column have one x axis. heights: of the rows, relative."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, sharex=shared and rows > 1, squeeze=False, height_ratios=heights).flat)
