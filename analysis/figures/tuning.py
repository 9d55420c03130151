"""Searches drawn: maps over learning rate and weight decay, what a smaller tuning budget yields, error against training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.compare import Comparison
from analysis.figures.frame import LOOKS, framed, key, looks, say
from analysis.maps import Map
from analysis.searches import Searches


def heat_maps(maps: Sequence[Map]) -> Figure:
    """A panel a map, all on one scale: the mean error over the seeds, the best cell circled, cells that diverged crossed out."""
    shown = [m for made in maps for m in (made, made.in_torch_units) if m is not None]
    columns = 2
    with framed(0.6 + 2.9 * math.ceil(len(shown) / columns), rows=math.ceil(len(shown) / columns), columns=columns, shared=False) as (
        figure,
        panels,
    ):
        means = [_mean(m) for m in shown]
        finite = np.concatenate([mean[np.isfinite(mean)] for mean in means])
        if not len(finite):
            say(panels[0], "no cell has an error")
        low = float(finite.min()) if len(finite) else 0.0
        scale = Normalize(low, low + max(m.index.within for m in shown))
        image = None
        for axes, m, mean in zip(panels, shown, means, strict=False):
            image = axes.pcolormesh(
                np.where(np.isfinite(mean), mean, np.nan).T, cmap="cividis_r", norm=scale, edgecolors="white", linewidth=0.4
            )
            for place in np.argwhere(np.isposinf(mean)):
                axes.plot(place[0] + 0.5, place[1] + 0.5, marker="x", color="#777777", markersize=4)
            if np.isfinite(mean).any():
                best = np.unravel_index(np.where(np.isfinite(mean), mean, np.inf).argmin(), mean.shape)
                axes.plot(best[0] + 0.5, best[1] + 0.5, marker="o", markerfacecolor="none", markeredgecolor="#D55E00", markeredgewidth=1.6)
            _axis(axes, m)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        if image is not None:
            split = ", ".join(dict.fromkeys(m.split for m in shown))
            figure.colorbar(image, ax=panels, label=f"{split.capitalize()} error (%)", extend="max", shrink=0.6, aspect=30)
    return figure


def _mean(m: Map) -> np.ndarray:
    """(learning rates, decays): NaN where no seed has a value, inf where one diverged."""
    there = ~np.isnan(m.errors)
    with np.errstate(invalid="ignore"):
        return np.where(there.any(axis=2), np.where(there, m.errors, 0.0).sum(axis=2) / np.maximum(there.sum(axis=2), 1), np.nan)


def _axis(axes: Axes, m: Map) -> None:
    axes.grid(visible=False)
    for values, set_ticks in ((m.lr, axes.set_xticks), (m.weight_decay, axes.set_yticks)):
        step = 1 if len(values) <= 7 else 2
        set_ticks(
            np.arange(0, len(values), step) + 0.5, [f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") for value in values[::step]]
        )
    axes.tick_params(axis="both", labelsize=6.5, length=0)
    axes.set_xlabel("Learning rate α")
    axes.set_ylabel(m.decay_name)
    d = m.index
    share = f"interaction {d.share:z.2f}" if math.isfinite(d.share) else "no index"
    slope = f", slope {d.slope:.2f}" if math.isfinite(d.slope) else ""
    axes.set_title(f"{m.arm}\n{share}{slope}; n = {d.n} runs".replace("-0.", "−0.").replace("-1.", "−1."), fontsize=7.5)


def budget_curves(searches: Searches, comparison: Comparison) -> Figure:
    """Above: what half of all searches of a budget end below, with its interval as far as the points carry one. Below: who wins."""
    look = looks(comparison)
    with framed(5.6, rows=2) as (figure, (above, below)):
        for name, points in searches.curves.items():
            budgets = [p.budget for p in points]
            banded = [p for p in points if p.tuned.interval is not None and np.isfinite(p.tuned.interval).all()]
            ends = np.array([p.tuned.interval for p in banded]).reshape(-1, 2)
            above.fill_between([p.budget for p in banded], ends[:, 0], ends[:, 1], color=look[name].color, alpha=0.18, linewidth=0)
            above.plot(budgets, [p.tuned.value for p in points], color=look[name].color, linestyle=look[name].line)
            key(above, look[name], f"{name} (n = {points[-1].tuned.n + points[-1].tuned.diverged} points)", marker=False)
        for place, (a, b) in enumerate(dict.fromkeys((duel.a, duel.b) for duel in searches.duels)):
            wins = {d.budget: d.wins for d in searches.duels if (d.a, d.b) == (a, b)}
            low, value, high = np.array([(w.interval[0], w.value, w.interval[1]) for w in wins.values() if w.interval]).reshape(-1, 3).T
            own = LOOKS[place % len(LOOKS)]
            below.errorbar(
                np.array([float(budget) for budget, w in wins.items() if w.interval]) + 0.06 * place,
                value,
                yerr=[value - low, high - value],
                fmt=own.marker,
                color=own.color,
                linestyle=own.line,
                capsize=2,
                linewidth=1,
                markersize=3.5,
                label=f"{a} ahead of {b}",
            )
        above.set_title(f"{comparison.workload.name}: error by tuning budget (median search, 95 % interval)")
        above.set_ylabel("Holdout error (%)")
        below.set_ylabel("Probability of the\nlower holdout error")
        below.set_xlabel("Tuning budget (trials)")
        below.axhline(0.5, color="#777777", linewidth=0.8)
        below.set_ylim(0, 1)
        if searches.curves:
            medians = np.array([p.tuned.value for points in searches.curves.values() for p in points])
            medians = medians[np.isfinite(medians)]
            if len(medians):  # intervals of a single trial reach to failures, and would flatten the curves
                above.set_ylim(max(0.0, 1.5 * medians.min() - 0.5 * medians.max()), 2 * medians.max() - medians.min() + 0.1)
            above.legend(loc="upper right", fontsize=7)
        else:
            say(above, "no arm has searched enough points")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(duel.wins.interval for duel in searches.duels):
            below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=6.5, ncols=2)  # bars fill the panel
        else:
            say(below, "no two compared arms have searched enough points")
    return figure


def gap_plot(points: pd.DataFrame, comparison: Comparison, split: str) -> Figure:
    """Error against training loss, a mark a configuration. `points`: arm, loss, error."""
    drawn = points[np.isfinite(points.error) & np.isfinite(points.loss) & (points.loss > 0)]
    with framed(3.6) as (figure, (axes,)):
        for name, look in looks(comparison).items():
            own = drawn[drawn.arm == name]
            if len(own):
                axes.scatter(
                    own.loss,
                    own.error,
                    s=16,
                    marker=look.marker,
                    color=look.color,
                    linewidths=0,
                    label=f"{name} (n = {len(own)})",
                )
        axes.set_title(f"{comparison.workload.name}: error at equal training loss")
        axes.set_ylabel(f"{split.capitalize()} error (%)")
        axes.set_xlabel("Training loss, clean subset (nats)")
        if drawn.empty:
            say(axes, "no configuration has both")
            return figure
        axes.set_xscale("log")
        lowest = float(drawn.error.min())
        highest = min(float(drawn.error.max()), 4 * lowest + 9)
        axes.set_ylim(max(0.0, lowest - 1), highest + 1)
        losses = drawn.loss[drawn.error <= highest]  # those that failed have any loss
        axes.set_xlim(losses.min() / 1.2, losses.max() * 1.2)
        axes.legend(loc="best", fontsize=7)
    return figure
