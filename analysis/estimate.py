"""Pure statistics: numbers in, frozen estimates out, each with its interval and n. No files, no figures, no global random state.

Errors are in percentage points, lower is better. In every sample NaN is a missing value: it is left out and counted.
+inf is a run that diverged: it counts as worst, so a mean over it is infinite and has no interval. Where data do not carry
an interval, it is None and `note` says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

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
    """two-sided, at `level`"""
    interval90: Interval | None
    """the equivalence test's (TOST at 5 %): inside +-margin means equivalent"""
    n: int
    """seeds of the smaller sample; pairs for method paired"""
    n_a: int
    n_b: int
    method: str
    verdict: Verdict
    margin: float
    correlation: float | None = None
    """of the two arms over their common seeds (Pearson); None below three pairs or without spread"""
    level: float = LEVEL
    note: str = ""


@dataclass(frozen=True)
class BestOf:
    """The best of `budget` configurations drawn from the n that were tried: what tuning with that budget yields.

    It describes the luck of the draw among these n configurations, not the choice of the n themselves.
    """

    value: float
    """expected_best: the mean; simulated_tuning: the median"""
    median: float
    quartiles: Interval
    interval: Interval
    """central 95 % of the draws"""
    budget: int
    n: int
    missing: int
    method: str


# ----------------------------------------------------------------------------------------------- one sample


def mean(values: Sample, level: float = LEVEL) -> Estimate:
    """Mean with Student's t interval over the values, taken as independent. One value has no interval."""
    all_values = _series(values).to_numpy()
    finite, missing, diverged = _sorted_out(all_values)
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


def difference(a: Sample, b: Sample, method: Method = "welch", *, margin: float = MARGIN, level: float = LEVEL) -> Difference:
    """a minus b in percentage points of error, with its interval and a verdict on a.

    welch: independent samples of unequal variance (Welch-Satterthwaite). paired: the t interval of the differences over
    the seeds both have; samples without seeds are paired by position and must be of equal length (ValueError). Without two
    values a side there is no interval, and the verdict is undecided.
    """
    if method not in ("welch", "paired"):
        raise ValueError(f"method: {method!r} is not known; valid: welch, paired")
    by_seed = all(isinstance(sample, Mapping | pd.Series) for sample in (a, b))
    if method == "paired" and not by_seed and len(a) != len(b):
        raise ValueError(f"paired: {len(a)} and {len(b)} values without seeds cannot be paired; give them by seed")
    a, b = _series(a), _series(b)
    if method == "paired":
        return _paired(a, b, margin, level)
    return _welch(a, b, _correlation(*_common(a, b)) if by_seed else None, margin, level)


def _welch(a: pd.Series, b: pd.Series, correlation: float | None, margin: float, level: float) -> Difference:
    in_a, in_b = mean(a), mean(b)
    smaller = min(in_a.n, in_b.n)
    value = in_a.value - in_b.value

    def result(note: str = "", se: float | None = None, df: float = math.nan) -> Difference:
        return _difference(value, se, df, (smaller, in_a.n, in_b.n), "welch", correlation, margin, level, note)

    note = next((f"{name}: {e.note}" for name, e in (("a", in_a), ("b", in_b)) if e.n < 2 or e.diverged), "")
    if note or in_a.standard_error is None or in_b.standard_error is None:
        return result(note)
    squares = in_a.standard_error**2, in_b.standard_error**2
    if sum(squares) == 0:
        return result("no spread between seeds: no interval")
    df = sum(squares) ** 2 / (squares[0] ** 2 / (in_a.n - 1) + squares[1] ** 2 / (in_b.n - 1))
    return result(se=math.sqrt(sum(squares)), df=df)


def _paired(a: pd.Series, b: pd.Series, margin: float, level: float) -> Difference:
    common_a, common_b = _common(a, b)
    diverged = int(np.isposinf(a).sum() + np.isposinf(b).sum())
    if diverged:  # also where the other arm lacks the seed: leaving it out would favour the arm that diverged
        n = int((np.isfinite(common_a) & np.isfinite(common_b)).sum())
        worst = mean(a).value - mean(b).value
        return _difference(worst, None, math.nan, (n, n, n), "paired", None, margin, level, f"{diverged} diverged: no interval")
    pairs = mean(common_a - common_b)
    correlation = _correlation(common_a, common_b)
    se, note = (pairs.standard_error, "") if pairs.interval else (None, pairs.note.replace("value", "pair"))
    return _difference(pairs.value, se, pairs.n - 1, (pairs.n, pairs.n, pairs.n), "paired", correlation, margin, level, note)


def _difference(
    value: float,
    se: float | None,
    df: float,
    n: tuple[int, int, int],
    method: str,
    correlation: float | None,
    margin: float,
    level: float,
    note: str,
) -> Difference:
    interval = _interval(value, se, df, level) if se is not None else None
    interval90 = _interval(value, se, df, 0.90) if se is not None else None
    judged = verdict(interval, interval90, margin)
    return Difference(value, se, interval, interval90, *n, method, judged, margin, correlation, level, note)


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


# --------------------------------------------------------------------------------------------- tuning budget


def expected_best(values: Sample, budget: int, replacement: bool = True, best: Literal["min", "max"] = "min") -> BestOf:
    """The best of `budget` of the n values, exactly, over all draws with or without replacement.

    Dodge et al. 2019 (arXiv 1909.03004) for the maximum, mirrored for errors (`best="min"`, the default). The formula takes
    the n values as independent draws of a search; quasi-random points are not, so it approximates there. ValueError when
    no value is there, budget < 1, or budget > n without replacement.
    """
    found, missing = _tried(values, budget)
    n = len(found)
    if not replacement and budget > n:
        raise ValueError(f"budget: {budget} of {n} values cannot be drawn without replacement; at most {n}")
    ordered = np.sort(found) if best == "max" else np.sort(found)[::-1]  # from worst to best
    if replacement:
        reached = [(i / n) ** budget for i in range(n + 1)]
    else:
        reached = [math.comb(i, budget) / math.comb(n, budget) for i in range(n + 1)]
    weights = np.diff(reached)  # P(the best of the draw is the i-th from the worst)
    value = math.fsum(w * v for w, v in zip(weights, ordered, strict=True) if w > 0)

    def quantile(q: float) -> float:
        """Smallest value, in ascending order, that at least a share q of the draws do not exceed."""
        order = np.argsort(ordered, kind="stable")
        place = int(np.searchsorted(np.cumsum(weights[order]), q - 1e-12))
        return float(ordered[order][min(place, n - 1)])

    method = "expected best, with replacement" if replacement else "expected best, without replacement"
    quartiles, interval = (quantile(0.25), quantile(0.75)), (quantile(0.025), quantile(0.975))
    return BestOf(value, quantile(0.5), quartiles, interval, budget, n, missing, method)


def simulated_tuning(values: Sample, budget: int, draws: int, rng: np.random.Generator) -> BestOf:
    """Median and quartiles of the lowest of `budget` values drawn with replacement, over `draws` draws (AlgoPerf 2.3.2).

    Lower is better; every draw comes from `rng`. ValueError as for `expected_best`, and for draws < 1.
    """
    found, missing = _tried(values, budget)
    if draws < 1:
        raise ValueError(f"draws: {draws} must be at least 1; e.g. 1000")
    bests = rng.choice(found, size=(draws, budget)).min(axis=1)
    # a quantile that is one of the values, so that inf (diverged) is never interpolated
    low, first, median, third, high = np.quantile(bests, [0.025, 0.25, 0.5, 0.75, 0.975], method="inverted_cdf")
    return BestOf(
        float(median), float(median), (float(first), float(third)), (float(low), float(high)), budget, len(found), missing, f"{draws} draws"
    )


# ------------------------------------------------------------------------------------------------- samples


def _series(values: Sample) -> pd.Series:
    series = values.astype(float) if isinstance(values, pd.Series) else pd.Series(values, dtype=float)
    if not series.index.is_unique:
        raise ValueError(f"values: seed {series.index[series.index.duplicated()][0]} has two")
    return series


def _common(a: pd.Series, b: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Both at the seeds that both have a value for."""
    seeds = a.dropna().index.intersection(b.dropna().index)
    return a[seeds], b[seeds]


def _sorted_out(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], int, int]:
    """(finite values, number missing, number diverged). ValueError for -inf, which no error can be."""
    if np.isneginf(values).any():
        raise ValueError("values: -inf is no error rate")
    return values[np.isfinite(values)], int(np.isnan(values).sum()), int(np.isposinf(values).sum())


def _tried(values: Sample, budget: int) -> tuple[NDArray[np.float64], int]:
    """(the values that are there, diverged ones included as inf, number missing)."""
    all_values = _series(values).to_numpy()
    found = all_values[~np.isnan(all_values)]
    if budget < 1:
        raise ValueError(f"budget: {budget} must be at least 1")
    if len(found) == 0:
        raise ValueError("values: none is there to draw from")
    return found, len(all_values) - len(found)


def _interval(value: float, se: float, df: float, level: float) -> Interval:
    half = float(stats.t.ppf(0.5 + level / 2, df)) * se
    return value - half, value + half


def _correlation(a: pd.Series, b: pd.Series) -> float | None:
    x, y = a.to_numpy(), b.to_numpy()
    if len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()) or min(np.ptp(x), np.ptp(y)) < NO_SPREAD:
        return None
    return float(np.corrcoef(x, y)[0, 1])
