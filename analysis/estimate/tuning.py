"""What tuning with a budget of n trials yields, from the trials of one search, and how two searches compare at equal n.

The intervals take the points of a search as independent draws from its box; quasi-random points are spread more evenly than
that, which makes the intervals a little wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis.estimate.samples import LEVEL, MARGIN, Difference, Estimate, Interval, Sample, between_ranks, judged, series

UNCALIBRATED = "uncalibrated at n = {budget}: {n} points carry no interval there"


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


def expected_best(values: Sample, budget: int, replacement: bool = True, best: Literal["min", "max"] = "min") -> BestOf:
    """The best of `budget` of the n values, exactly, over all draws with or without replacement.

    Dodge et al. 2019 (arXiv 1909.03004) for the maximum, mirrored for errors (`best="min"`, the default). The formula takes
    the n values as independent draws of a search; quasi-random points are not, so it approximates there. ValueError when
    no value is there, budget < 1, or budget > n without replacement.
    """
    found, missing = tried(values, budget)
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
    found, missing = tried(values, budget)
    if draws < 1:
        raise ValueError(f"draws: {draws} must be at least 1; e.g. 1000")
    bests = rng.choice(found, size=(draws, budget)).min(axis=1)
    # a quantile that is one of the values, so that inf (diverged) is never interpolated
    low, first, median, third, high = np.quantile(bests, [0.025, 0.25, 0.5, 0.75, 0.975], method="inverted_cdf")
    return BestOf(
        float(median), float(median), (float(first), float(third)), (float(low), float(high)), budget, len(found), missing, f"{draws} draws"
    )


def tuned(values: Sample, budget: int, level: float = LEVEL) -> Estimate:
    """The error that half of all searches of `budget` points end below, with an interval that redraws the search itself.

    The median of the best of n independent draws is a quantile of a single one, F^-1(1 - 2^(-1/n)), so that two of the
    points that were tried hold it between them: exact for any box, at least `level`. Where even the best point is not known
    to lie below the quantile (n above about a fifth of the points) there is no interval. Diverged points are inf and count
    as worst. ValueError as for `expected_best`.
    """
    found, missing = tried(values, budget)
    ordered, n = np.sort(found), len(found)
    q = -math.expm1(-math.log(2) / budget)
    value = float(ordered[max(math.ceil(q * n - 1e-9), 1) - 1])
    diverged = int(np.isposinf(found).sum())
    ranks = between_ranks(n, q, level)
    if ranks is None:
        return Estimate(value, None, None, n - diverged, missing, diverged, level, UNCALIBRATED.format(budget=budget, n=n))
    return Estimate(value, None, (float(ordered[ranks[0]]), float(ordered[ranks[1]])), n - diverged, missing, diverged, level)


def tuned_difference(a: Sample, b: Sample, budget: int, *, margin: float = MARGIN, family: int = 1) -> Difference:
    """`tuned` of a minus `tuned` of b, both with `budget` trials, in points of error.

    The interval joins the two (MOVER: Zou and Donner 2008): as far from the difference as the nearer end of the one and the
    farther end of the other together. Without an interval on both sides there is none, and no verdict.
    """

    def joined(level: float) -> Interval | None:
        of_a, of_b = tuned(a, budget, level), tuned(b, budget, level)
        ends = [*(of_a.interval or (math.nan,)), *(of_b.interval or (math.nan,))]
        if not np.isfinite(ends).all():
            return None
        (low_a, high_a), (low_b, high_b) = ends[:2], ends[2:]
        down, up = math.hypot(of_a.value - low_a, high_b - of_b.value), math.hypot(high_a - of_a.value, of_b.value - low_b)
        return value - down, value + up

    here_a, here_b = tuned(a, budget), tuned(b, budget)
    value = here_a.value - here_b.value if math.isfinite(here_a.value) or math.isfinite(here_b.value) else math.nan
    n_a, n_b = here_a.n + here_a.diverged, here_b.n + here_b.diverged
    note = next((f"{name}: {e.note}" for name, e in (("a", here_a), ("b", here_b)) if e.note), "")
    return judged(joined, value, (min(n_a, n_b), n_a, n_b), f"tuned with {budget}", margin, family, note=note)


def noninferior_from(a: Sample, b: Sample, margin: float = MARGIN, family: int = 1) -> int | None:
    """The smallest budget from which on, as far as intervals reach, a tuned is shown at most `margin` points worse than b tuned.

    None when no budget shows it. The budgets are looked at one by one, each at one-sided 5 % over the `family`.
    """
    shown = []
    for budget in range(1, min(tried(a, 1)[0].size, tried(b, 1)[0].size) // 2 + 1):
        found = tuned_difference(a, b, budget, margin=margin, family=family)
        if found.simultaneous90 is None:
            break
        shown.append(found.noninferior)
    missed = [place for place, good in enumerate(shown) if not good]
    first = (missed[-1] + 1 if missed else 0) + 1
    return first if first <= len(shown) else None


def beats(a: Sample, b: Sample, budget: int, level: float = LEVEL) -> Estimate:
    """The probability that a tuned with `budget` trials ends with a lower error than b tuned with as many; ties count half.

    The unbiased estimate over all choices of `budget` of the points of each search (at budget 1 Mann and Whitney's
    U / (n_a n_b), rliable's probability of improvement). It varies at most as much as the share of wins in as many
    separate pairs of searches as the points allow (Hoeffding 1948, U-statistics), m = n // budget: the interval is Clopper
    and Pearson's of m such pairs, wide at a large budget and never too narrow. None below two pairs. `n` is m.
    """
    (of_a, _), (of_b, _) = tried(a, budget), tried(b, budget)
    points = min(len(of_a), len(of_b))
    if budget > points:
        raise ValueError(f"budget: {budget} of {points} points cannot be drawn; at most {points}")
    ordered_a, ordered_b = np.sort(of_a), np.sort(of_b)
    won = (ordered_a[:, None] < ordered_b[None, :]) + 0.5 * (ordered_a[:, None] == ordered_b[None, :])
    value = min(1.0, float(_best_of(len(of_a), budget) @ won @ _best_of(len(of_b), budget)))
    pairs = points // budget
    if pairs < 2:
        return Estimate(value, None, None, pairs, level=level, note=UNCALIBRATED.format(budget=budget, n=points))
    tail, wins = (1 - level) / 2, value * pairs
    low = float(special.betaincinv(wins, pairs - wins + 1, tail)) if wins > 0 else 0.0
    high = float(special.betainccinv(wins + 1, pairs - wins, tail)) if wins < pairs else 1.0
    return Estimate(value, None, (low, high), pairs, level=level)


def _best_of(n: int, budget: int) -> NDArray[np.float64]:
    """P(the lowest of `budget` of n values drawn without replacement is the i-th lowest), i ascending."""
    reached = [math.comb(n - i, budget) / math.comb(n, budget) for i in range(n + 1)]
    return -np.diff(reached)


def tried(values: Sample, budget: int) -> tuple[NDArray[np.float64], int]:
    """(the values that are there, diverged ones included as inf, number missing)."""
    all_values = series(values).to_numpy()
    found = all_values[~np.isnan(all_values)]
    if budget < 1:
        raise ValueError(f"budget: {budget} must be at least 1")
    if len(found) == 0:
        raise ValueError("values: none is there to draw from")
    return found, len(all_values) - len(found)
