"""The figures of a report: tables in, matplotlib figures out, nothing computed here that is a claim.

Okabe and Ito's colours, which colour-blind readers tell apart, each with a line style and a marker of its own for print in
grey. Figures are made without pyplot, so they need no display and leave no global state behind.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.compare import ArmResult, Comparison
from analysis.runs import Records
from harness import schedule
from harness.config import Trial

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


def curves(records: Records, comparison: Comparison) -> pd.DataFrame:
    """A row an evaluation of a reported trial: arm, seed, step, epoch, error, anytime (points), cycle_end.

    `anytime` is the error of the last completed cycle's answer, NaN before one has ended.
    """
    ids = [trial_id for arm in comparison.arms for trial_id in arm.trial_ids]
    rows = records.history[records.history.trial_id.isin(ids)]
    ends = {trial_id: set(schedule.cycle_ends(records.configs[trial_id])) for trial_id in ids}
    out = rows[["trial_id", "arm", "seed", "step", "epoch"]].copy()
    for name, metric in (("error", "val/top1"), ("anytime", "anytime/val_top1")):
        out[name] = 100 * (1 - rows[metric]) if metric in rows else math.nan
    out["cycle_end"] = [step + 1 in ends[trial_id] for trial_id, step in zip(out.trial_id, out.step, strict=True)]
    return out.dropna(subset=["error", "anytime"], how="all").reset_index(drop=True)


def reported(records: Records, comparison: Comparison) -> dict[str, Trial]:
    """arm -> one trial of its reported configuration; arms without one are not there."""
    return {arm.name: records.configs[arm.trial_ids[0]] for arm in comparison.arms if arm.trial_ids}


# -------------------------------------------------------------------------------------------------- figures


def error_by_epoch(table: pd.DataFrame, comparison: Comparison) -> Figure:
    """Validation error by epoch: an arm's mean over the seeds of its reported configuration, a band from the lowest to the highest."""
    drawn = table[np.isfinite(table.error)]
    with _figure(3.6) as (figure, (axes,)):
        for name, look in looks(comparison).items():
            rows = drawn[drawn.arm == name]
            if rows.empty:
                continue
            band = rows.groupby("epoch").error.agg(["mean", "min", "max", "count"])
            axes.fill_between(band.index, band["min"], band["max"], color=look.color, alpha=0.18, linewidth=0)
            axes.plot(band.index, band["mean"], color=look.color, linestyle=look.line)
            axes.plot(band.index, band["mean"], linestyle="none", color=look.color, marker=".", markersize=4)
            ends = band[band.index.isin(rows.epoch[rows.cycle_end])]
            axes.plot(ends.index, ends["mean"], linestyle="none", color=look.color, marker=look.marker, markeredgecolor="white")
            _key(axes, look, f"{name} ({_n(band['count'])})")
        _finish(axes, drawn, "error", f"{comparison.workload.name}: error by epoch", "no validation error was recorded")
    return figure


def anytime(table: pd.DataFrame, comparison: Comparison) -> Figure:
    """Error of the answer at hand: the last completed cycle's, so a step at every cycle end and nothing before the first."""
    drawn = table[np.isfinite(table.anytime)]
    with _figure(3.6) as (figure, (axes,)):
        for name, look in looks(comparison).items():
            rows = drawn[drawn.arm == name]
            if rows.empty:
                continue
            band = rows[rows.cycle_end].groupby("epoch").anytime.agg(["mean", "min", "max", "count"])
            until = [*band.index[1:], 1.04 * rows.epoch.max()]  # an answer stays the answer after the end
            axes.step([*band.index, until[-1]], [*band["mean"], band["mean"].iloc[-1]], where="post", color=look.color, linewidth=0.5)
            for start, end, low, high in zip(band.index, until, band["min"], band["max"], strict=True):
                axes.fill_between([start, end], low, high, color=look.color, alpha=0.18, linewidth=0)
            axes.hlines(band["mean"], band.index, until, color=look.color, linestyle=look.line, linewidth=1.7)
            axes.plot(band.index, band["mean"], linestyle="none", color=look.color, marker=look.marker, markeredgecolor="white")
            _key(axes, look, f"{name} ({_n(band['count'])})")
        _finish(axes, drawn, "anytime", f"{comparison.workload.name}: error of the last completed cycle", "no trial has completed a cycle")
    return figure


def schedules(trials: Mapping[str, Trial], comparison: Comparison) -> Figure:
    """eta and lambda by epoch, of one trial an arm (arm -> its resolved config)."""
    with _figure(4.4, rows=2) as (figure, (above, below)):
        for name, look in looks(comparison).items():
            for cycle in _sampled(trials[name]) if name in trials else ():
                for axes, column in ((above, 1), (below, 2)):
                    axes.plot(cycle[:, 0], cycle[:, column], color=look.color, linestyle=look.line)
        for name, trial in trials.items():
            _key(above, looks(comparison)[name], f"{name} (n = 1 configuration)", marker=False)
            ends = [end / schedule.steps_per_epoch(trial) for end in schedule.cycle_ends(trial)]
            for axes in (above, below):
                _mark(axes, ends)
        above.set_title(f"{comparison.workload.name}: schedules of the reported configurations (exact)")
        above.set_ylabel("η (share of α)")
        below.set_ylabel("λ (weight decay)")
        below.set_xlabel("Epoch")
        if trials:
            above.legend(loc="upper center", ncols=min(3, len(trials)), bbox_to_anchor=(0.5, -0.02))
        for axes in (above, below):
            axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
            axes.set_xlim(left=0)
            axes.grid(visible=False, axis="x")
            if not trials:
                _say(axes, "no configuration is decided yet")
    return figure


def _sampled(trial: Trial) -> Iterator[np.ndarray]:
    """Rows (epoch, eta, lambda) of each cycle, at most 500 a cycle, its first and last step among them."""
    per_epoch, total = schedule.steps_per_epoch(trial), schedule.total_steps(trial)
    for start, end in schedule.cycles(trial):
        last = min(end, total) - 1
        steps = np.unique(np.linspace(start, last, 500).round().astype(int))
        yield np.array([(step / per_epoch, eta, lam) for step in steps for eta, _, lam in [schedule.schedule(trial, int(step))]])


def result(comparison: Comparison) -> Figure:
    """The answer in one picture: each arm's seeds with mean and interval, and each difference with its interval."""
    rows = max(len(comparison.arms), len(comparison.pairs))
    with _figure(1.5 + 0.42 * rows, columns=2) as (figure, (left, right)):
        _arms(left, comparison)
        _differences(right, comparison)
    return figure


def png(figure: Figure) -> bytes:
    return _saved(figure, "png", {"Software": None})


def svg(figure: Figure) -> bytes:
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, metadata: Mapping[str, None]) -> bytes:
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format=kind, metadata=dict(metadata))
    return out.getvalue()


# --------------------------------------------------------------------------------------------------- panels


def _arms(axes: Axes, comparison: Comparison) -> None:
    for place, (arm, look) in enumerate(zip(comparison.arms, looks(comparison).values(), strict=True)):
        seeds = [error for error in arm.errors.values() if math.isfinite(error)]
        offsets = 0.16 + 0.08 * (np.arange(len(seeds)) % 2)
        axes.scatter(seeds, place + offsets, s=16, marker=look.marker, color=look.color, alpha=0.5, linewidths=0)
        if math.isfinite(arm.error.value):
            half = [[arm.error.value - arm.error.interval[0]], [arm.error.interval[1] - arm.error.value]] if arm.error.interval else None
            axes.errorbar(arm.error.value, place - 0.08, xerr=half, fmt=look.marker, color=look.color, capsize=3, markeredgecolor="white")
        else:
            _instead(axes, place, "no estimate")
    _rows(axes, [f"{arm.name}\n{_of(arm)}" for arm in comparison.arms])
    axes.set_xlabel("Validation error (%)")
    axes.set_title("Seeds, mean, 95 % interval")
    if not any(map(math.isfinite, (error for arm in comparison.arms for error in arm.errors.values()))):
        axes.set_xticks([])


def _differences(axes: Axes, comparison: Comparison) -> None:
    look = looks(comparison)
    margin = max((pair.difference.margin for pair in comparison.pairs), default=0.0)
    axes.axvspan(-margin, margin, color="#000000", alpha=0.07, linewidth=0)
    axes.axvline(0, color="#444444", linewidth=0.8)
    for place, pair in enumerate(comparison.pairs):
        d = pair.difference
        if d.interval is None:
            _instead(axes, place - 0.25, "no interval")
        if math.isfinite(d.value):
            half = [[d.value - d.interval[0]], [d.interval[1] - d.value]] if d.interval else None
            filled = "#222222" if pair.declared else "white"
            axes.errorbar(d.value, place, xerr=half, fmt=look[pair.a].marker, color="#222222", markerfacecolor=filled, capsize=3)
    _rows(
        axes,
        [
            f"{p.a} − {p.b}\n{p.difference.method[:1].upper()}{p.difference.method[1:].replace(' x ', ' × ')}, n = {p.difference.n}"
            for p in comparison.pairs
        ],
    )
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1.5 * margin), max(high, 1.5 * margin))
    axes.set_xlabel(f"Points of error (band: ±{margin:g})")
    axes.set_title("Differences, 95 % interval")
    if not comparison.pairs:
        _say(axes, "one arm: nothing to compare")


def _instead(axes: Axes, place: float, text: str) -> None:
    """Where a row has nothing to draw, on the middle of the panel."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.annotate(text, (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center", color="#666666", bbox=white)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _mark(axes: Axes, epochs: Iterable[float]) -> None:
    for epoch in epochs:
        axes.axvline(epoch, color="#777777", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0.5)


def _key(axes: Axes, look: Look, label: str, marker: bool = True) -> None:
    """An entry of the legend."""
    axes.plot([], [], color=look.color, linestyle=look.line, marker=look.marker if marker else "", markeredgecolor="white", label=label)


def _finish(axes: Axes, table: pd.DataFrame, column: str, title: str, without: str) -> None:
    """Scale, cycle ends, labels and legend of an error panel; the sentence `without` instead where there are no values."""
    axes.set_title(title)
    axes.set_ylabel("Validation error (%)")
    axes.set_xlabel("Epoch")
    if table.empty:
        _say(axes, without)
        return
    lowest, highest = table[column].min(), table[column].max()
    if lowest > 0 and highest > 4 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="x")
    axes.set_xlim(0, 1.04 * table.epoch.max())
    _mark(axes, sorted(set(table.epoch[table.cycle_end])))
    axes.plot([], [], color="#777777", linewidth=0.8, linestyle=(0, (1, 2)), label="end of a cycle")
    axes.legend(loc="upper right")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#666666")
    axes.set_xticks([])
    axes.set_yticks([])


def _n(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"n = {high} seed{'s' if high > 1 else ''}" if low == high else f"n = {low}–{high} seeds"


def _of(arm: ArmResult) -> str:
    gone = f", {arm.error.diverged} diverged" if arm.error.diverged else ""
    return f"n = {arm.error.n}{gone}"


@contextmanager
def _figure(height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, sharex=rows > 1, squeeze=False).flat)
