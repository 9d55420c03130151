"""Targets, areas, gaps and profiles against hand counts and statsmodels; images as a second source of chance."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind

from analysis.estimate import area, difference, difference_over_images, gap, performance_profile, reached

NAN, INF = math.nan, math.inf


def test_reached_is_the_first_place_at_or_below_the_target() -> None:
    assert reached([1, 3, 7], [9.0, 5.0, 4.0], 5.0) == 3
    assert reached([1, 3, 7], [9.0, NAN, 4.0], 5.0) == 7
    assert reached([1, 3], [9.0, 8.0], 5.0) == INF
    assert reached([1, 3], [9.0, 8.0], NAN) == INF
    with pytest.raises(ValueError, match="must ascend"):
        reached([3, 1], [9.0, 8.0], 5.0)
    with pytest.raises(ValueError, match="must be of one length"):
        reached([3], [9.0, 8.0], 5.0)


def test_the_area_is_the_mean_of_the_answer_at_hand() -> None:
    assert area([1, 3], [9.0, 5.0], 7) == pytest.approx((2 * 9 + 4 * 5) / 6)
    assert area([1, 3, 7], [9.0, 5.0, 1.0], 7) == pytest.approx((2 * 9 + 4 * 5) / 6)
    assert math.isnan(area([7], [9.0], 7))
    assert area([1, 3], [INF, 5.0], 7) == INF


def made(n: int, shift: float, rng: np.random.Generator) -> pd.DataFrame:
    loss = np.exp(rng.uniform(-3, 0, n))
    return pd.DataFrame({"loss": loss, "error": 20 + 2 * np.log(loss) + np.log(loss) ** 2 + shift + 0.1 * rng.standard_normal(n)})


def test_the_gap_is_that_of_a_regression_with_hc3() -> None:
    rng = np.random.default_rng(4)
    a, b = made(20, 0.5, rng), made(15, 0.0, rng)
    found = gap(a, b)
    low, high = max(a.loss.min(), b.loss.min()), min(a.loss.max(), b.loss.max())
    both = pd.concat([a.assign(arm=1.0), b.assign(arm=0.0)])
    both = both[(both.loss >= low) & (both.loss <= high)]
    both["x"] = np.log(both.loss)
    fit = smf.ols("error ~ x + I(x**2) + arm", both).fit(cov_type="HC3", use_t=True)
    assert found.value == pytest.approx(fit.params.arm, abs=1e-9)
    assert found.interval == pytest.approx(tuple(fit.conf_int().loc["arm"]), abs=1e-8)
    assert found.verdict == "worse"
    assert found.n_a + found.n_b == len(both)


def test_a_gap_of_losses_that_never_meet_is_no_gap() -> None:
    a = pd.DataFrame({"loss": [0.1, 0.2, 0.3, 0.4], "error": [1.0, 2.0, 3.0, 4.0]})
    found = gap(a, a.assign(loss=a.loss + 10))
    assert math.isnan(found.value)
    assert (found.interval, found.verdict) == (None, "undecided")
    assert "0 and 0 trials at training losses that both reach" in found.note
    assert gap(a.iloc[:0], a).interval is None
    assert gap(a.assign(error=[1.0, INF, NAN, 2.0]), a).n_a == 2


def test_a_profile_counts_workloads_within_a_factor() -> None:
    times = pd.DataFrame({"a": [10.0, 20.0, INF, INF], "b": [12.0, 10.0, 5.0, INF]}, index=list("wxyz"))
    found = performance_profile(times, [1, 1.2, 2])
    assert found.a.tolist() == [0.25, 0.25, 0.5]
    assert found.b.tolist() == [0.5, 0.75, 0.75]
    with pytest.raises(ValueError, match="a has none on x"):
        performance_profile(times.mask(times == 20), [1])


A, B = [23.1, 23.4, 22.9, 23.3, 23.0], [23.6, 23.5, 23.9, 23.2]


def test_differences_are_statsmodels() -> None:
    found = difference(A, B)
    reference = CompareMeans(DescrStatsW(A), DescrStatsW(B))
    assert found.interval == pytest.approx(reference.tconfint_diff(usevar="unequal"), abs=1e-9)
    for margin in (0.2, 0.7, 0.9):
        p = ttost_ind(np.array(A), np.array(B), -margin, margin, usevar="unequal")[0]
        inside = found.interval90 is not None and -margin < found.interval90[0] and found.interval90[1] < margin
        assert inside == (p < 0.05)


def test_a_family_widens_what_is_judged_and_not_what_stands_alone() -> None:
    alone, one_of_six = difference(A, B), difference(A, B, family=6)
    assert one_of_six.interval == alone.interval == alone.simultaneous
    assert one_of_six.simultaneous is not None and alone.interval is not None
    wide = CompareMeans(DescrStatsW(A), DescrStatsW(B)).tconfint_diff(alpha=0.05 / 6, usevar="unequal")
    assert one_of_six.simultaneous == pytest.approx(wide, abs=1e-9)
    nearer = [value + 0.05 for value in B]
    assert (difference(A, nearer).verdict, difference(A, nearer, family=6).verdict) == ("better", "undecided")


def test_noninferior_is_the_one_sided_bound() -> None:
    assert difference(A, B).noninferior
    assert not difference(B, A).noninferior
    assert difference(B, A, margin=2).noninferior


def bits(seeds: int, images: int, rng: np.random.Generator, common: np.ndarray, weak: float) -> np.ndarray:
    return common + weak * rng.standard_normal((seeds, 1)) + rng.standard_normal((seeds, images)) < 1


def test_images_widen_the_interval_as_a_bootstrap_over_both_does() -> None:
    """The pigeonhole bootstrap counts the seed x image part thrice where it is once; with that taken off they must agree."""
    rng = np.random.default_rng(6)
    common = 0.8 * rng.standard_normal(400)
    a, b = bits(40, 400, rng, common, 0.3), bits(40, 400, rng, 0.7 * common + 0.5 * rng.standard_normal(400), 0.3)
    found = difference_over_images(a, b)
    drawn = []
    for _ in range(3000):
        images = rng.integers(0, 400, 400)
        of_a, of_b = a[rng.integers(0, 40, 40)][:, images], b[rng.integers(0, 40, 40)][:, images]
        drawn.append(100 * (of_b.mean() - of_a.mean()))
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.06)  # 3,000 draws: 1.3 %; n - 1 for n: 1.3 %; the part counted twice
    seeds_only = difference(100 * (1 - a.mean(axis=1)), 100 * (1 - b.mean(axis=1)))
    assert found.value == pytest.approx(seeds_only.value)
    assert found.standard_error is not None and seeds_only.standard_error is not None
    assert found.standard_error > seeds_only.standard_error


def test_images_need_seeds_and_one_order() -> None:
    one = np.ones((1, 10), dtype=bool)
    assert "fewer than two seeds" in difference_over_images(one, one).note
    assert "no spread" in difference_over_images(np.ones((3, 10), dtype=bool), np.ones((3, 10), dtype=bool)).note
    with pytest.raises(ValueError, match=r"bits: shapes \(1, 10\) and \(1, 9\)"):
        difference_over_images(one, one[:, :9])
