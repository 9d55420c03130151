"""Over the course of training, and over several workloads: when a target is reached, what is known until then, at which loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from analysis.estimate.samples import MARGIN, Difference, Interval, judged

Array = NDArray[np.float64]


def reached(at: Sequence[float] | Array, errors: Sequence[float] | Array, target: float) -> float:
    """The first place in `at` (epochs, steps or seconds, ascending) whose error is at most `target`; inf when none is.

    NaN errors are skipped; a target that is NaN is never reached. ValueError for sequences of unequal length.
    """
    places, values = _curve(at, errors)
    good = np.flatnonzero(values <= target)
    return float(places[good[0]]) if len(good) else math.inf


def area(at: Sequence[float] | Array, errors: Sequence[float] | Array, until: float) -> float:
    """Mean error, in points, of the answer at hand from the first one until `until`; NaN when there is none.

    Between two places of `at` (ascending) the earlier answer stands, as the anytime rule has it.
    """
    places, values = _curve(at, errors)
    known = ~np.isnan(values) & (places < until)
    places, values = places[known], values[known]
    if not len(places):
        return math.nan
    lengths = np.diff([*places, until])
    return float((values * lengths).sum() / lengths.sum())


def _curve(at: Sequence[float] | Array, errors: Sequence[float] | Array) -> tuple[Array, Array]:
    places, values = np.asarray(at, dtype=float), np.asarray(errors, dtype=float)
    if places.shape != values.shape or places.ndim != 1:
        raise ValueError(f"curve: {places.shape} places and {values.shape} errors; must be of one length")
    if (np.diff(places) <= 0).any():
        raise ValueError("curve: places must ascend")
    return places, values


LEAST = 8
"""trials, over both arms, from which a gap has an interval"""


def gap(
    a: Mapping[str, Array] | pd.DataFrame, b: Mapping[str, Array] | pd.DataFrame, *, margin: float = MARGIN, family: int = 1
) -> Difference:
    """The generalisation gap: error of a minus error of b, in points, at equal training loss (the paper's Figure 3, right).

    Each side has columns `loss` (train_eval/loss, above 0) and `error` (points), a row a trial, one trial a configuration.
    Only trials whose loss lies in the range that both reach count. Error = quadratic in log(loss) + gap for a, by least
    squares; t interval with HC3 standard errors (MacKinnon and White 1985), as the spread grows with the error. Below
    zero a generalises better than b where both have optimised equally well. No interval below `LEAST` trials or 3 a side.
    `family`: as of `difference`.
    """
    sides = [pd.DataFrame({"loss": side["loss"], "error": side["error"]}, dtype=float) for side in (a, b)]
    sides = [side[np.isfinite(side.error) & np.isfinite(side.loss) & (side.loss > 0)] for side in sides]
    low = max((side.loss.min() if len(side) else math.inf) for side in sides)
    high = min((side.loss.max() if len(side) else -math.inf) for side in sides)
    near = [side[(side.loss >= low) & (side.loss <= high)] for side in sides]
    n_a, n_b = map(len, near)
    n, method = (min(n_a, n_b), n_a, n_b), "matched training loss"
    if min(n_a, n_b) < 3 or n_a + n_b < LEAST:
        note = f"{n_a} and {n_b} trials at training losses that both reach: too few"
        return judged(lambda _: None, math.nan, n, method, margin, family, note=note)
    both = pd.concat(near)
    x = np.log(both.loss.to_numpy())
    x = (x - x.mean()) / (x.std() or 1.0)
    design = np.stack([np.ones_like(x), x, x * x, np.repeat([1.0, 0.0], [n_a, n_b])], axis=1)
    inverse = np.linalg.pinv(design.T @ design)
    rest = both.error.to_numpy() - design @ (inverse @ (design.T @ both.error.to_numpy()))
    leverage = np.einsum("ki,ij,kj->k", design, inverse, design)
    weighted = design * (rest / np.clip(1 - leverage, 1e-6, None))[:, None]
    se = math.sqrt(float((inverse @ weighted.T @ weighted @ inverse)[3, 3]))
    value = float((inverse @ (design.T @ both.error.to_numpy()))[3])

    def at(level: float) -> Interval | None:
        half = float(special.stdtrit(n_a + n_b - 4, 0.5 + level / 2)) * se
        return (value - half, value + half) if se > 0 else None

    return judged(at, value, n, method, margin, family)


def performance_profile(times: pd.DataFrame, factors: Sequence[float]) -> pd.DataFrame:
    """The share of workloads on which an arm reaches the target within a factor of the fastest arm (Dolan and More 2002).

    `times`: a row a workload, a column an arm, time or steps to target, inf where it was not reached; NaN (not run) is
    refused with ValueError, as leaving it out would favour somebody. Rows: `factors` (at least 1), columns: arms. A
    workload that no arm solves counts against all. With few workloads this describes them and carries no interval.
    """
    unknown = [(workload, arm) for arm in times for workload in times.index[times[arm].isna()]]
    if unknown:
        workload, arm = unknown[0]
        raise ValueError(f"times: {arm} has none on {workload}; use inf for a target that was not reached")
    fastest = times.min(axis=1)
    ratio = times.div(fastest, axis=0).where(np.isfinite(times), math.inf)
    shares = {arm: [float((ratio[arm] <= factor).mean()) for factor in factors] for arm in times}
    return pd.DataFrame(shares, index=pd.Index(factors, name="factor"))
