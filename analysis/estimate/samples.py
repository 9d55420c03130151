"""One arm and two arms over their seeds: means, medians, differences, and what a difference allows to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

Interval = tuple[float, float]
Sample = Mapping[int, float] | Sequence[float] | NDArray[np.float64] | pd.Series
"""Values of one arm: by seed (a mapping or a Series, whose index is the seed), or in the order of the seeds."""

Method = Literal["welch", "paired"]
Verdict = Literal["better", "worse", "equivalent", "undecided"]

MARGIN = 0.2
"""points of error within which two arms count as equivalent, unless the study says otherwise"""

LEVEL = 0.95

NO_SPREAD = 1e-9
"""points: a smaller spread is rounding, and an interval computed from it would claim certainty"""


@dataclass(frozen=True)
class Estimate:
    """A mean or a share with its uncertainty, in the unit of the sample."""

    value: float
    """NaN when there is nothing to average; inf when a run diverged"""
    standard_error: float | None
    interval: Interval | None
    n: int
    """values the estimate rests on: neither missing nor diverged"""
    missing: int = 0
    diverged: int = 0
    level: float = LEVEL
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """a minus b, in percentage points of error; below zero a is better."""

    value: float
    standard_error: float | None
    interval: Interval | None
    """two-sided, at `level`, of this difference alone"""
    interval90: Interval | None
    """the equivalence test's (TOST at 5 %): inside +-margin means equivalent; its upper end is the one-sided 95 % bound"""
    n: int
    """seeds of the smaller sample; pairs for method paired"""
    n_a: int
    n_b: int
    method: str
    verdict: Verdict
    margin: float
    correlation: float | None = None
    """of the two arms over their common seeds (Pearson); None below three pairs or without spread"""
    correlation_interval: Interval | None = None
    """Fisher's, at `level`; three pairs carry none"""
    correlation_n: int = 0
    """common seeds"""
    level: float = LEVEL
    note: str = ""
    family: int = 1
    """differences that are judged together"""
    simultaneous: Interval | None = None
    """`interval` widened so that all of the family's hold together at `level` (Bonferroni); the verdict's"""
    simultaneous90: Interval | None = None
    """`interval90` widened the same way; the verdict's"""

    @property
    def noninferior(self) -> bool:
        """a is shown to be at most `margin` worse than b (one-sided 5 %, over the family)."""
        return self.simultaneous90 is not None and self.simultaneous90[1] < self.margin


@dataclass(frozen=True)
class _Terms:
    """What a difference is judged by."""

    margin: float
    level: float
    family: int


# ----------------------------------------------------------------------------------------------- one sample


def mean(values: Sample, level: float = LEVEL) -> Estimate:
    """Mean with Student's t interval over the values, taken as independent. One value has no interval."""
    all_values = series(values).to_numpy()
    finite, missing, diverged = sorted_out(all_values)
    n = len(finite)
    if n == 0 and diverged == 0:
        return Estimate(math.nan, None, None, 0, missing, level=level, note="no value")
    if diverged:
        return Estimate(math.inf, None, None, n, missing, diverged, level, f"{diverged} of {n + diverged} diverged: no mean")
    value = float(finite.mean())
    if n == 1:
        return Estimate(value, None, None, 1, missing, level=level, note="one value: no interval")
    if np.ptp(finite) < NO_SPREAD:
        return Estimate(value, 0.0, None, n, missing, level=level, note=f"all {n} values are equal: no interval")
    se = float(finite.std(ddof=1) / math.sqrt(n))
    return Estimate(value, se, _interval(value, se, n - 1, level), n, missing, level=level)


def median(values: Sample, level: float = LEVEL) -> Estimate:
    """Median with the sign test's interval between two of the values: exact for any distribution, at least `level`.

    A diverged value (or a target never reached) is inf and counts as worst, so the median or an end of the interval may be
    inf. Fewer than six values carry no interval at 95 %. The standard error is not defined.
    """
    all_values = series(values).to_numpy()
    _, missing, diverged = sorted_out(all_values)
    found = np.sort(all_values[~np.isnan(all_values)])
    n = len(found)
    if n == 0:
        return Estimate(math.nan, None, None, 0, missing, level=level, note="no value")
    ranks = between_ranks(n, 0.5, level)
    value = float(found[n // 2]) if n % 2 or not np.isfinite(found[n // 2]) else float(found[n // 2 - 1 : n // 2 + 1].mean())
    if ranks is None:
        return Estimate(value, None, None, n - diverged, missing, diverged, level, f"{n} values are too few for an interval")
    return Estimate(value, None, (float(found[ranks[0]]), float(found[ranks[1]])), n - diverged, missing, diverged, level)


@cache
def between_ranks(n: int, q: float, level: float = LEVEL) -> tuple[int, int] | None:
    """Places (0-based, in ascending order) of two of n independent values that hold the q-quantile between them.

    Distribution-free, by the binomial distribution of how many values lie below the quantile, each end at (1 - level)/2 at
    most (David and Nagaraja, Order Statistics, 7.1). None where even the extreme values are not enough.
    """
    tail, below = (1 - level) / 2, stats.binom(n, q)
    lower = int(below.ppf(tail))  # the largest l with P(fewer than l below) <= tail
    upper = int(below.isf(tail)) + 1  # the smallest u with P(at least u below) <= tail
    return (lower - 1, upper - 1) if lower >= 1 and upper <= n else None


def sampling_error(error: float, images: int, level: float = LEVEL) -> Estimate:
    """The binomial sampling error of an error rate measured on a finite split.

    `error` in percentage points, of `images` independent images. Standard error in points; Wilson's interval: how far the
    rate of this one set of weights on all images like these may lie from the one on this split. Seeds do not show it.
    """
    if not math.isfinite(error):
        return Estimate(math.nan, None, None, images, level=level, note="no error to put an interval on")
    p, z = error / 100, float(stats.norm.ppf(0.5 + level / 2))
    centre = (p + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(p * (1 - p) / images + z * z / (4 * images * images))
    interval = (100 * max(0.0, centre - half), 100 * min(1.0, centre + half))
    return Estimate(error, 100 * math.sqrt(p * (1 - p) / images), interval, images, level=level)


# ---------------------------------------------------------------------------------------------- two samples


def difference(
    a: Sample, b: Sample, method: Method = "welch", *, margin: float = MARGIN, level: float = LEVEL, family: int = 1
) -> Difference:
    """a minus b in percentage points of error, with its interval and a verdict on a.

    welch: independent samples of unequal variance (Welch-Satterthwaite). paired: the t interval of the differences over
    the seeds both have; samples without seeds are paired by position and must be of equal length (ValueError). Without two
    values a side there is no interval, and the verdict is undecided. `family` is the number of differences that are judged
    together: a false verdict anywhere among them is as rare as for a single one.
    """
    terms = _Terms(margin, level, family)
    if method not in ("welch", "paired"):
        raise ValueError(f"method: {method!r} is not known; valid: welch, paired")
    by_seed = all(isinstance(sample, Mapping | pd.Series) for sample in (a, b))
    if method == "paired" and not by_seed and len(a) != len(b):
        raise ValueError(f"paired: {len(a)} and {len(b)} values without seeds cannot be paired; give them by seed")
    a, b = series(a), series(b)
    if method == "paired":
        return _paired(a, b, terms)
    return _welch(a, b, _correlation(*_common(a, b), terms.level) if by_seed else None, terms)


def _welch(a: pd.Series, b: pd.Series, correlation: Estimate | None, terms: _Terms) -> Difference:
    in_a, in_b = mean(a), mean(b)
    smaller = min(in_a.n, in_b.n)
    value = in_a.value - in_b.value

    def result(note: str = "", se: float | None = None, df: float = math.nan) -> Difference:
        return _difference(value, se, df, (smaller, in_a.n, in_b.n), "welch", terms, correlation, note)

    note = next((f"{name}: {e.note}" for name, e in (("a", in_a), ("b", in_b)) if e.n < 2 or e.diverged), "")
    if note or in_a.standard_error is None or in_b.standard_error is None:
        return result(note)
    squares = in_a.standard_error**2, in_b.standard_error**2
    if sum(squares) == 0:
        return result("no spread between seeds: no interval")
    df = sum(squares) ** 2 / (squares[0] ** 2 / (in_a.n - 1) + squares[1] ** 2 / (in_b.n - 1))
    return result(se=math.sqrt(sum(squares)), df=df)


def _paired(a: pd.Series, b: pd.Series, terms: _Terms) -> Difference:
    common_a, common_b = _common(a, b)
    diverged = int(np.isposinf(a).sum() + np.isposinf(b).sum())
    if diverged:  # also where the other arm lacks the seed: leaving it out would favour the arm that diverged
        n = int((np.isfinite(common_a) & np.isfinite(common_b)).sum())
        worst = mean(a).value - mean(b).value
        return _difference(worst, None, math.nan, (n, n, n), "paired", terms, note=f"{diverged} diverged: no interval")
    pairs = mean(common_a - common_b)
    correlation = _correlation(common_a, common_b, terms.level)
    se, note = (pairs.standard_error, "") if pairs.interval else (None, pairs.note.replace("value", "pair"))
    return _difference(pairs.value, se, pairs.n - 1, (pairs.n, pairs.n, pairs.n), "paired", terms, correlation, note)


Bits = NDArray[np.bool_]
"""(seeds, images): whether the weights of a seed are right on an image, the images in one order for every seed and arm"""


def difference_over_images(a: Bits, b: Bits, *, margin: float = MARGIN, level: float = LEVEL, family: int = 1) -> Difference:
    """a minus b in points of error, for other seeds *and* other images like these: the interval adds the draw of the images.

    Seeds are nested in arms and crossed with the images, which all arms share. The variance of the mean difference is the
    sum of the seeds' and of the images' part, each estimated from its marginal means, less the seed x image part that both
    contain (two-way analysis of variance; what a bootstrap over seeds and images converges to, which counts that part
    twice: Owen 2007, The pigeonhole bootstrap). Satterthwaite's degrees of freedom. ValueError for other shapes.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"bits: shapes {a.shape} and {b.shape}; must be (seeds, images) of the same images")
    terms, images = _Terms(margin, level, family), a.shape[1]
    n = (min(len(a), len(b)), len(a), len(b))
    value = 100 * float(b.mean() - a.mean()) if min(n) else math.nan
    if min(n) < 2 or images < 2:
        return _difference(value, None, math.nan, n, "seeds x images", terms, note="fewer than two seeds a side: no interval")
    of_a, of_b = _crossed(a), _crossed(b)
    by_image = 100 * (b.mean(axis=0) - a.mean(axis=0))
    seeds = (of_a[0], of_b[0])
    of_images = max(0.0, float(by_image.var(ddof=1)) / images - of_a[1] - of_b[1])
    variance = sum(seeds) + of_images
    if variance == 0:
        return _difference(value, None, math.nan, n, "seeds x images", terms, note="no spread: no interval")
    df = variance**2 / (seeds[0] ** 2 / (len(a) - 1) + seeds[1] ** 2 / (len(b) - 1) + of_images**2 / (images - 1))
    return _difference(value, math.sqrt(variance), df, n, "seeds x images", terms)


def _crossed(bits: Bits) -> tuple[float, float]:
    """(variance of the mean over seeds, the part of it that is seed x image), in points squared."""
    right = 100.0 * bits
    seeds, images = right.shape
    by_seed, by_image = right.mean(axis=1), right.mean(axis=0)
    residual = right - by_seed[:, None] - by_image[None, :] + right.mean()
    mean_square = float((residual**2).sum()) / ((seeds - 1) * (images - 1))
    return float(by_seed.var(ddof=1)) / seeds, mean_square / (seeds * images)


def _difference(
    value: float,
    se: float | None,
    df: float,
    n: tuple[int, int, int],
    method: str,
    terms: _Terms,
    correlation: Estimate | None = None,
    note: str = "",
) -> Difference:
    def at(level: float) -> Interval | None:
        return _interval(value, se, df, level) if se is not None else None

    found = judged(at, value, n, method, terms.margin, terms.family, terms.level, note)
    found = replace(found, standard_error=se)
    if correlation is None:
        return found
    return replace(found, correlation=correlation.value, correlation_interval=correlation.interval, correlation_n=correlation.n)


def judged(
    at: Callable[[float], Interval | None],
    value: float,
    n: tuple[int, int, int],
    method: str,
    margin: float = MARGIN,
    family: int = 1,
    level: float = LEVEL,
    note: str = "",
) -> Difference:
    """The difference `value` with its verdict, from what gives its interval at a level. n: smaller sample, a, b."""
    together, together90 = at(1 - (1 - level) / family), at(1 - 0.10 / family)
    return Difference(
        value=value,
        standard_error=None,
        interval=at(level),
        interval90=at(0.90),
        n=n[0],
        n_a=n[1],
        n_b=n[2],
        method=method,
        verdict=verdict(together, together90, margin),
        margin=margin,
        level=level,
        note=note,
        family=family,
        simultaneous=together,
        simultaneous90=together90,
    )


def verdict(interval: Interval | None, interval90: Interval | None, margin: float = MARGIN) -> Verdict:
    """Of a against b, on the error a - b: what the intervals allow to say and no more.

    better: the interval lies below 0; worse: above 0; equivalent: the 90 % interval lies within +-margin (two one-sided
    tests at 5 %); undecided otherwise, and without intervals.
    """
    if interval is None or interval90 is None:
        return "undecided"
    if interval[1] < 0:
        return "better"
    if interval[0] > 0:
        return "worse"
    return "equivalent" if -margin < interval90[0] and interval90[1] < margin else "undecided"


# ------------------------------------------------------------------------------------------------- samples


def series(values: Sample) -> pd.Series:
    """The sample as a Series, NaN where a value is missing. ValueError when a seed has two values."""
    series = values.astype(float) if isinstance(values, pd.Series) else pd.Series(values, dtype=float)
    if not series.index.is_unique:
        raise ValueError(f"values: seed {series.index[series.index.duplicated()][0]} has two")
    return series


def _common(a: pd.Series, b: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Both at the seeds that both have a value for."""
    seeds = a.dropna().index.intersection(b.dropna().index)
    return a[seeds], b[seeds]


def sorted_out(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int, int]:
    """(finite values, number missing, number diverged). ValueError for -inf, which no error can be."""
    if np.isneginf(values).any():
        raise ValueError("values: -inf is no error rate")
    return values[np.isfinite(values)], int(np.isnan(values).sum()), int(np.isposinf(values).sum())


def _interval(value: float, se: float, df: float, level: float) -> Interval:
    half = float(special.stdtrit(df, 0.5 + level / 2)) * se
    return value - half, value + half


def _correlation(a: pd.Series, b: pd.Series, level: float) -> Estimate | None:
    """Pearson's, with Fisher's interval (atanh of it is about normal): of both as drawn from one bivariate normal distribution."""
    x, y = a.to_numpy(), b.to_numpy()
    n = len(x)
    if n < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()) or min(np.ptp(x), np.ptp(y)) < NO_SPREAD:
        return None
    found = float(np.corrcoef(x, y)[0, 1])
    if n == 3 or abs(found) >= 1:
        return Estimate(found, None, None, n, level=level, note="no interval")
    half = float(special.ndtri(0.5 + level / 2)) / math.sqrt(n - 3)
    return Estimate(found, None, (math.tanh(math.atanh(found) - half), math.tanh(math.atanh(found) + half)), n, level=level)
