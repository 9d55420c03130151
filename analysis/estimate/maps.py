"""Maps of error over learning rate and weight decay: do the two decouple, and where does the best decay lie?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.estimate.samples import LEVEL, Interval

Array = NDArray[np.float64]

WITHIN = 10.0
"""points of error above a map's best, from which on a cell no longer counts"""

RIDGE = 1e-9

DRAWS = 400
"""simulated maps behind an interval"""

DROWNED = 1 / 3
"""of the variation between cells; where noise makes up more, what is left of it is too little to tell a share of (a flat map would
often be called all interaction)"""

LEAST_FREE = 4
"""degrees of freedom that the interaction must have, and the noise for an interval"""


@dataclass(frozen=True)
class Decoupling:
    """How far learning rate and weight decay act separately on the error, near the best of a map."""

    share: float
    """of the error's variation, the part that is interaction, not additive in the two; 0 for a separable map; NaN without variation"""
    share_interval: Interval | None
    slope: float
    """how far the best log10(weight decay) moves a decade of learning rate; 0 for a separable map, -1 where their product counts"""
    slope_interval: Interval | None
    best: float
    """log10 of the best weight decay, at the best learning rate; NaN where the map shows no basin"""
    best_interval: Interval | None
    cells: int
    """cells that count: within `within` points of the best"""
    n: int
    """runs behind them"""
    diverged: int
    """runs of the whole map"""
    missing: int
    within: float
    noise: float | None
    """standard deviation between seeds in a cell, in points; None with one seed a cell"""
    level: float = LEVEL
    note: str = ""


def decoupling_index(
    errors: Array | Sequence[Sequence[float]],
    lr: Sequence[float] | Array,
    weight_decay: Sequence[float] | Array,
    *,
    rng: np.random.Generator,
    within: float = WITHIN,
    level: float = LEVEL,
) -> Decoupling:
    """Interaction share and slope of the good basin of a map.

    `errors` in points: (learning rates, decays) or (learning rates, decays, seeds); NaN missing, inf diverged. A cell is the
    mean of its seeds and weighs 1 at the best error of the map, falling linearly to 0 at `within` points above it, so that
    divergent corners do not count and no cell drops out at a bound.

    share: residual of the weighted least-squares fit of a row effect plus a column effect (two-way analysis of variance),
    over the variation about the weighted mean, both less what noise between seeds adds on average. Rows and columns are
    categories: swapping or reordering them, or another unit on an axis, changes nothing. Without replicates the noise counts
    as interaction, which `note` says. NaN where noise is more than `DROWNED` of the variation.
    slope: of the valley line d f/d log(decay) = 0 of a weighted quadratic in log10 of both.
    Intervals: symmetric, of `DRAWS` maps simulated from the fitted one, its interaction shrunk to the estimated share, with noise of
    the size found and as uncertain as few seeds leave it.
    ValueError for a map whose shape is not that of its axes, or with an axis that does not ascend.
    """
    found = np.asarray(errors, dtype=float)
    found = found[:, :, None] if found.ndim == 2 else found
    axes = [np.asarray(axis, dtype=float) for axis in (lr, weight_decay)]
    if found.ndim != 3 or found.shape[:2] != (len(axes[0]), len(axes[1])):
        raise ValueError(f"errors: shape {np.shape(errors)}; must be ({len(axes[0])}, {len(axes[1])}) or with seeds last")
    if any((axis <= 0).any() or (np.diff(axis) <= 0).any() for axis in axes):
        raise ValueError("lr, weight_decay: must be above 0 and ascend")
    there = ~np.isnan(found)
    runs = there.sum(axis=2)
    diverged = int(np.isposinf(found).sum())
    mean = np.where(runs > 0, np.where(there, found, 0.0).sum(axis=2) / np.maximum(runs, 1), np.inf)  # a diverged seed makes it inf
    sigma, df = _noise(found, mean, within)

    weights = _weights(mean, within)
    counted = weights > 0

    def result(share: float, slope: float, best: float, note: str, intervals: Sequence[Interval | None] = (None, None, None)) -> Decoupling:
        of_share, of_slope, of_best = intervals
        numbers = int(counted.sum()), int(runs[counted].sum()), diverged, int((~there).sum())
        return Decoupling(share, of_share, slope, of_slope, best, of_best, *numbers, within, sigma, level, note)

    if not counted.any():
        return result(math.nan, math.nan, math.nan, "no cell has an error")
    variance = np.where(runs > 0, (sigma or 0.0) ** 2 / np.maximum(runs, 1), 0.0)
    fits = _Fits(*(np.log10(axis) for axis in axes))
    if fits.free(weights) < LEAST_FREE:
        return result(math.nan, math.nan, math.nan, f"too few cells within {within:g} points of the best")
    share, slope, best = (float(found[0]) for found in fits.of(mean[None], within, variance))
    if sigma is None or df < LEAST_FREE:
        return result(share, slope, best, "one seed a cell: noise counts as interaction, no interval")
    truth = fits.shrunk(mean, weights, min(max(share, 0.0), 1.0))
    # the noise is known from few seeds: as Student's t does, each map is drawn with one of the sizes that it may have
    noise = variance * (df / rng.chisquare(df, size=(DRAWS, 1, 1)))
    drawn = truth + np.sqrt(noise) * rng.standard_normal((DRAWS, *truth.shape))
    again = fits.of(drawn, within, noise * (rng.chisquare(df, size=(DRAWS, 1, 1)) / df))  # and estimated anew in each
    centre = [float(found[0]) for found in fits.of(truth[None], within, 0 * variance)]
    intervals = [_about(*of, level) for of in zip((share, slope, best), again, centre, strict=True)]
    note = "" if intervals[2] else "the map shows no basin whose best decay could be told"
    if intervals[0] is not None:
        intervals[0] = max(0.0, intervals[0][0]), min(1.0, intervals[0][1])
    if fits.noise(mean, weights, variance) > DROWNED or (intervals[0] is not None and intervals[0][0] >= intervals[0][1]):
        share, intervals[0] = math.nan, None
        note = "; ".join(filter(None, ("the cells differ too little beyond the noise between seeds to tell a share", note)))
    return result(share, slope, best, note, intervals)


def _about(value: float, drawn: Array, centre: float, level: float) -> Interval | None:
    """The symmetric bootstrap interval (Hall 1988: its coverage errs by an order less than that of two single quantiles).

    None unless nearly every simulated map has the number.
    """
    known = drawn[np.isfinite(drawn)]
    if len(known) < 0.99 * len(drawn) or not math.isfinite(value - centre):
        return None
    half = float(np.quantile(np.abs(known - centre), level))
    return value - half, value + half


@dataclass(frozen=True)
class Transfer:
    """How far the best decay moves from one budget to another, in octaves (factors of two); 0 when it transfers."""

    normalised: float
    """of lambda_norm"""
    normalised_interval: Interval | None
    raw: float
    """of the raw lambda, in paper units"""
    raw_interval: Interval | None
    note: str = ""


def transfer(shorter: Decoupling, longer: Decoupling, steps: tuple[int, int]) -> Transfer:
    """The paper's third claim: lambda_norm moves less between budgets than lambda.

    Both maps are over normalised decay; `steps`: optimizer steps of the cycle that their lambda_norm is normalised by, in
    the same order. As lambda = lambda_norm / sqrt(steps), the raw shift is the normalised one less half an octave a doubling
    of the steps. The interval joins those of the two optima (MOVER).
    """
    octaves = math.log2(10)
    moved = octaves * (longer.best - shorter.best)
    fixed = 0.5 * math.log2(steps[1] / steps[0])
    if shorter.best_interval is None or longer.best_interval is None:
        return Transfer(moved, None, moved - fixed, None, "a map shows no basin, so there is no interval")
    (low_a, high_a), (low_b, high_b) = shorter.best_interval, longer.best_interval
    down = octaves * math.hypot(longer.best - low_b, high_a - shorter.best)
    up = octaves * math.hypot(high_b - longer.best, shorter.best - low_a)
    interval = (moved - down, moved + up)
    return Transfer(moved, interval, moved - fixed, (interval[0] - fixed, interval[1] - fixed))


def _noise(found: Array, mean: Array, within: float) -> tuple[float | None, int]:
    """(standard deviation between seeds of a cell, its degrees of freedom), pooled over the cells that count."""
    counted = (_weights(mean, within) > 0)[:, :, None] & np.isfinite(found)
    df = int((counted.sum(axis=2) - 1).clip(min=0).sum())
    if df == 0:
        return None, 0
    squares = np.where(counted, found - np.where(np.isfinite(mean), mean, 0.0)[:, :, None], 0.0) ** 2
    return math.sqrt(float(squares.sum()) / df), df


def _weights(maps: Array, within: float) -> Array:
    """(..., learning rates, decays), of maps of the same shape. A map without any finite cell has no weight."""
    best = np.where(np.isfinite(maps), maps, np.inf).min(axis=(-2, -1), keepdims=True)
    return np.where(np.isfinite(maps), np.clip(1 - (maps - np.where(np.isfinite(best), best, 0.0)) / within, 0.0, None), 0.0)


class _Fits:
    """The weighted least-squares fits of maps over the same axes, of many maps at once: (maps, learning rates, decays)."""

    def __init__(self, x: Array, y: Array) -> None:
        """`x`, `y`: log10 of the axes."""
        rows = np.repeat(np.eye(len(x)), len(y), axis=0)
        columns = np.tile(np.eye(len(y))[:, 1:], (len(x), 1))  # the first column's effect is in the rows'
        self.additive = np.hstack([rows, columns])
        self.middle = float(y.mean())
        u, v = (grid.ravel() for grid in np.meshgrid(x - x.mean(), y - y.mean(), indexing="ij"))
        self.quadratic = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=1)

    def free(self, weights: Array) -> int:
        """Degrees of freedom that the additive fit leaves to the interaction."""
        counted = weights.ravel() > 0
        return int(counted.sum() - np.linalg.matrix_rank(self.additive[counted]))

    def of(self, maps: Array, within: float, variance: Array) -> tuple[Array, Array, Array]:
        """(share, slope, best), each (maps,). `variance` of the noise of a cell, which the share is corrected by."""
        z, w = _flat(maps, _weights(maps, within))
        return self._share(z, w, np.broadcast_to(variance, maps.shape).reshape(z.shape)), *self._basin(z, w)

    def shrunk(self, mean: Array, weights: Array, share: float) -> Array:
        """The map with its interaction, in the cells that count, made smaller so that its share is `share`."""
        (z,), (w,) = flat = _flat(mean[None], weights[None])
        (fit,), _ = _fitted(self.additive, *flat)
        average = (w * z).sum() / w.sum()
        rest, additive = (w * (z - fit) ** 2).sum(), (w * (fit - average) ** 2).sum()
        scale = math.sqrt(share / (1 - share) * additive / rest) if rest > 0 and share < 1 else 1.0
        return np.where(w > 0, fit + min(scale, 1.0) * (z - fit), mean.ravel()).reshape(mean.shape)

    def noise(self, mean: Array, weights: Array, variance: Array) -> float:
        """The part of the map's weighted variation that noise adds on average; above 1 where it varies less than noise alone does."""
        (z,), (w,) = _flat(mean[None], weights[None])
        total = w.sum()
        found = float((w * (z - (w * z).sum() / total) ** 2).sum())
        noise = float((w * (1 - w / total) * variance.ravel()).sum())
        return noise / found if found > 0 else 0.0

    def _share(self, z: Array, w: Array, variance: Array) -> Array:
        fit, leverage = _fitted(self.additive, z, w)
        total = w.sum(axis=1, keepdims=True)
        average = (w * z).sum(axis=1, keepdims=True) / total
        interaction = (w * (z - fit) ** 2).sum(axis=1) - (w * (1 - leverage) * variance).sum(axis=1)
        everything = (w * (z - average) ** 2).sum(axis=1) - (w * (1 - w / total) * variance).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(everything > 0, interaction / everything, math.nan)

    def _basin(self, z: Array, w: Array) -> tuple[Array, Array]:
        """(slope of the valley, log10 of the best decay); NaN where the error does not curve upwards, along the decay or at all."""
        normal, target = _normal(self.quadratic, z, w)
        _, to_lr, to_decay, lr, across, decay = np.linalg.solve(normal, target[:, :, None])[:, :, 0].T
        bowl = 4 * lr * decay - across**2
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = np.where(decay > 0, -across / (2 * decay), math.nan)
            best = np.where((decay > 0) & (bowl > 0), self.middle + (across * to_lr - 2 * lr * to_decay) / bowl, math.nan)
        return slope, best


def _fitted(design: Array, z: Array, w: Array) -> tuple[Array, Array]:
    """(fit, leverage of a cell on its own fit), each (maps, cells)."""
    normal, target = _normal(design, z, w)
    inverse = np.linalg.inv(normal)
    fit = (target[:, None, :] @ inverse)[:, 0, :] @ design.T
    return fit, w * (inverse.reshape(len(z), -1) @ _products(design).T)


def _normal(design: Array, z: Array, w: Array) -> tuple[Array, Array]:
    """The normal equations of each map; the ridge only serves terms without weight, whose coefficients nothing reads."""
    terms = design.shape[1]
    return (w @ _products(design)).reshape(-1, terms, terms) + RIDGE * np.eye(terms), (w * z) @ design


def _products(design: Array) -> Array:
    return (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)


def _flat(maps: Array, weights: Array) -> tuple[Array, Array]:
    """(values, weights), each (maps, cells); a cell without weight has value 0, so that inf does not spread."""
    w = weights.reshape(len(maps), -1)
    return np.where(w > 0, maps.reshape(len(maps), -1), 0.0), w
