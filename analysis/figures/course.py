"""The course of training: errors by epoch, the answer at hand, schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.compare import Comparison
from analysis.figures.frame import count, finish, framed, key, looks, mark, say
from analysis.runs import Records
from harness import schedule
from harness.config import Trial


def curves(records: Records, comparison: Comparison) -> pd.DataFrame:
    """A row an evaluation of a reported trial: arm, seed, step, epoch, error, anytime (points), cycle_end.

    `anytime` is the error of the last completed cycle's answer, NaN before one has ended. Both are inf where other seeds of
    the arm were evaluated after this one had diverged: leaving it out would show the course of the survivors.
    """
    ids = [trial_id for arm in comparison.arms for trial_id in arm.trial_ids]
    rows = records.history[records.history.trial_id.isin(ids)]
    ends = {trial_id: set(schedule.cycle_ends(records.configs[trial_id])) for trial_id in ids}
    out = rows[["trial_id", "arm", "seed", "step", "epoch"]].copy()
    for name, metric in (("error", "val/top1"), ("anytime", "anytime/val_top1")):
        out[name] = 100 * (1 - rows[metric]) if metric in rows else math.nan
    out["cycle_end"] = [step + 1 in ends[trial_id] for trial_id, step in zip(out.trial_id, out.step, strict=True)]
    out = out.dropna(subset=["error", "anytime"], how="all")
    return pd.concat([out, *_diverged(out, records, comparison)], ignore_index=True)


def _diverged(evaluated: pd.DataFrame, records: Records, comparison: Comparison) -> Iterator[pd.DataFrame]:
    """The evaluations that the diverged trials did not reach and other seeds of their arms did."""
    for arm in comparison.arms:
        rows = evaluated[evaluated.arm == arm.name]
        for trial_id in arm.trial_ids:
            seed = records.configs[trial_id].seed
            if math.isinf(arm.errors.get(seed, math.nan)):
                last = rows.step[rows.trial_id == trial_id].max()  # NaN if it reached none
                later = rows[~(rows.step <= last)].drop_duplicates("step")
                yield later.assign(trial_id=trial_id, seed=seed, error=later.error + math.inf, anytime=later.anytime + math.inf)


def reported(records: Records, comparison: Comparison) -> dict[str, Trial]:
    """arm -> one trial of its reported configuration; arms without one are not there."""
    return {arm.name: records.configs[arm.trial_ids[0]] for arm in comparison.arms if arm.trial_ids}


def error_by_epoch(table: pd.DataFrame, comparison: Comparison) -> Figure:
    """Validation error by epoch: an arm's mean over the seeds of its reported configuration, a band from the lowest to the highest.

    Both end where one of the seeds has diverged.
    """
    finite = table[np.isfinite(table.error)]
    with framed(3.6) as (figure, (axes,)):
        for name, look in looks(comparison).items():
            rows = table[(table.arm == name) & table.error.notna()]
            if rows.empty:
                continue
            every = rows.groupby("epoch").error.agg(["mean", "min", "max", "count"])
            band = every[np.isfinite(every["mean"])]
            axes.fill_between(band.index, band["min"], band["max"], color=look.color, alpha=0.18, linewidth=0)
            axes.plot(band.index, band["mean"], color=look.color, linestyle=look.line)
            axes.plot(band.index, band["mean"], linestyle="none", color=look.color, marker=".", markersize=4)
            ends = band[band.index.isin(rows.epoch[rows.cycle_end])]
            axes.plot(ends.index, ends["mean"], linestyle="none", color=look.color, marker=look.marker, markeredgecolor="white")
            key(axes, look, _label(name, every["count"], rows[np.isinf(rows.error)]))
        finish(axes, finite, "error", f"{comparison.workload.name}: error by epoch", "no validation error was recorded")
    return figure


def anytime(table: pd.DataFrame, comparison: Comparison) -> Figure:
    """Error of the answer at hand: the last completed cycle's, so a step at every cycle end and nothing before the first.

    An arm's steps end at the first cycle end that one of its seeds did not reach, having diverged.
    """
    finite = table[np.isfinite(table.anytime)]
    with framed(3.6) as (figure, (axes,)):
        for name, look in looks(comparison).items():
            rows = table[(table.arm == name) & table.anytime.notna()]
            if rows.empty:
                continue
            every = rows[rows.cycle_end].groupby("epoch").anytime.agg(["mean", "min", "max", "count"])
            band = every[np.isfinite(every["mean"])]
            until = [*every.index[1:], 1.04 * rows.epoch.max()][: len(band)]  # an answer stays the answer after the end
            axes.step([*band.index, *until[-1:]], [*band["mean"], *band["mean"].iloc[-1:]], where="post", color=look.color, linewidth=0.5)
            for start, end, low, high in zip(band.index, until, band["min"], band["max"], strict=True):
                axes.fill_between([start, end], low, high, color=look.color, alpha=0.18, linewidth=0)
            axes.hlines(band["mean"], band.index, until, color=look.color, linestyle=look.line, linewidth=1.7)
            axes.plot(band.index, band["mean"], linestyle="none", color=look.color, marker=look.marker, markeredgecolor="white")
            key(axes, look, _label(name, every["count"], rows[np.isinf(rows.anytime)]))
        finish(axes, finite, "anytime", f"{comparison.workload.name}: error of the last completed cycle", "no trial has completed a cycle")
    return figure


def _label(name: str, counts: pd.Series, diverged: pd.DataFrame) -> str:
    """An arm in the legend; `diverged`: its rows without a finite error."""
    ended = f", {diverged.seed.nunique()} diverged: no mean from there" if len(diverged) else ""
    return f"{name} ({count(counts)}{ended})"


def schedules(trials: Mapping[str, Trial], comparison: Comparison) -> Figure:
    """eta and lambda by epoch, of one trial an arm (arm -> its resolved config)."""
    with framed(4.4, rows=2) as (figure, (above, below)):
        for name, look in looks(comparison).items():
            for cycle in _sampled(trials[name]) if name in trials else ():
                for axes, column in ((above, 1), (below, 2)):
                    axes.plot(cycle[:, 0], cycle[:, column], color=look.color, linestyle=look.line)
        for name, trial in trials.items():
            key(above, looks(comparison)[name], f"{name} (n = 1 configuration)", marker=False)
            ends = [end / schedule.steps_per_epoch(trial) for end in schedule.cycle_ends(trial)]
            for axes in (above, below):
                mark(axes, ends)
        above.set_title(f"{comparison.workload.name}: schedules of the reported configurations (exact)")
        above.set_ylabel("η (share of α)")
        below.set_ylabel("λ (weight decay)")
        below.set_xlabel("Epoch")
        if trials:
            above.legend(loc="upper center", ncols=min(2, len(trials)), bbox_to_anchor=(0.5, -0.02), fontsize=7)
        for axes in (above, below):
            axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
            axes.set_xlim(left=0)
            axes.grid(visible=False, axis="x")
            if not trials:
                say(axes, "no configuration is decided yet")
    return figure


def _sampled(trial: Trial) -> Iterator[np.ndarray]:
    """Rows (epoch, eta, lambda) of each cycle, at most 500 a cycle, its first and last step among them."""
    per_epoch, total = schedule.steps_per_epoch(trial), schedule.total_steps(trial)
    for start, end in schedule.cycles(trial):
        last = min(end, total) - 1
        steps = np.unique(np.linspace(start, last, 500).round().astype(int))
        yield np.array([(step / per_epoch, eta, lam) for step in steps for eta, _, lam in [schedule.schedule(trial, int(step))]])
