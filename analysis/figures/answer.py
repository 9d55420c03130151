"""The answer in one picture: arms, and differences between them."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compare import ArmResult, Comparison
from analysis.figures.frame import framed, instead, looks, rows, say


def result(comparison: Comparison) -> Figure:
    """The answer in one picture: above each arm's seeds with mean and interval, below each difference with its interval."""
    arms, pairs = max(1, len(comparison.arms)), max(1, len(comparison.pairs))
    with framed(1.8 + 0.42 * (arms + pairs), rows=2, shared=False, heights=(arms, pairs)) as (figure, (above, below)):
        _arms(above, comparison)
        _differences(below, comparison)
    return figure


def _arms(axes: Axes, comparison: Comparison) -> None:
    for place, (arm, look) in enumerate(zip(comparison.arms, looks(comparison).values(), strict=True)):
        seeds = [error for error in arm.errors.values() if math.isfinite(error)]
        offsets = 0.16 + 0.08 * (np.arange(len(seeds)) % 2)
        axes.scatter(seeds, place + offsets, s=16, marker=look.marker, color=look.color, alpha=0.5, linewidths=0)
        if math.isfinite(arm.error.value):
            half = [[arm.error.value - arm.error.interval[0]], [arm.error.interval[1] - arm.error.value]] if arm.error.interval else None
            axes.errorbar(arm.error.value, place - 0.08, xerr=half, fmt=look.marker, color=look.color, capsize=3, markeredgecolor="white")
        else:
            instead(axes, place, "no estimate")
    rows(axes, [f"{arm.name}\n{of_arm(arm)}" for arm in comparison.arms])
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
            instead(axes, place - 0.25, "no interval")
        if math.isfinite(d.value):
            half = [[d.value - d.interval[0]], [d.interval[1] - d.value]] if d.interval else None
            filled = "#222222" if pair.declared else "white"
            if d.family > 1 and d.simultaneous is not None:
                axes.plot(d.simultaneous, (place, place), color="#222222", linewidth=0.7)
            axes.errorbar(d.value, place, xerr=half, fmt=look[pair.a].marker, color="#222222", markerfacecolor=filled, capsize=3)
    rows(
        axes,
        [
            f"{p.a} − {p.b}\n{p.difference.method[:1].upper()}{p.difference.method[1:].replace(' x ', ' × ')}, n = {p.difference.n}"
            for p in comparison.pairs
        ],
    )
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1.5 * margin), max(high, 1.5 * margin))
    axes.set_xlabel(f"Points of error (band: ±{margin:g})")
    family = max((pair.difference.family for pair in comparison.pairs), default=1)
    axes.set_title("Differences, 95 % interval" + (f" (thin: of all {family} together)" if family > 1 else ""))
    if not comparison.pairs:
        say(axes, "one arm: nothing to compare")


def of_arm(arm: ArmResult) -> str:
    gone = f", {arm.error.diverged} diverged" if arm.error.diverged else ""
    return f"n = {arm.error.n}{gone}"
