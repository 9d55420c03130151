"""Tuning budgets and wins against brute force, statsmodels, scipy and rliable; where there is no interval, it says so."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from rliable import metrics
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from analysis.estimate import beats, median, noninferior_from, tuned, tuned_difference
from analysis.estimate.samples import between_ranks

RNG = np.random.default_rng(20)
A, B = 20 + RNG.chisquare(3, 32), 21 + RNG.chisquare(3, 32)


@pytest.mark.parametrize(("n", "q"), [(6, 0.5), (9, 0.5), (40, 0.5), (32, 0.13), (100, 0.04), (7, 0.9)])
def test_the_ranks_hold_the_quantile_as_the_binomial_says(n: int, q: float) -> None:
    ranks = between_ranks(n, q)

    def missed(lower: int, upper: int) -> tuple[float, float]:
        below = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
        return math.fsum(below[: lower + 1]), math.fsum(below[upper + 1 :])

    possible = [(lo, up) for lo, up in itertools.combinations(range(n), 2) if max(missed(lo, up)) <= 0.025]
    if ranks is None:
        assert not possible
    else:
        assert ranks == min(possible, key=lambda pair: pair[1] - pair[0])


def test_the_median_is_the_sign_tests() -> None:
    found = median([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, math.inf])
    assert (found.value, found.interval, found.diverged) == (4.0, (1.0, math.inf), 1)
    assert median([1.0, 2.0]).interval is None
    assert median([]).note == "no value"
    assert median([1.0, math.inf]).value == math.inf


@pytest.mark.parametrize("budget", [1, 2, 5, 16])
def test_tuned_is_the_median_of_simulated_tuning(budget: int) -> None:
    rng = np.random.default_rng(1)
    bests = [float(rng.choice(A, budget).min()) for _ in range(20_000)]
    ordered = np.sort(A)
    place = int(np.searchsorted(ordered, tuned(A, budget).value))
    assert abs(place - int(np.searchsorted(ordered, statistics.median_low(bests)))) <= 1  # 20,000 draws may end one point beside


def test_tuned_gives_no_interval_where_the_points_carry_none() -> None:
    assert tuned(A, 5).interval is not None
    beyond = tuned(A, 16)
    assert beyond.interval is None
    assert beyond.note == "uncalibrated at n = 16: 32 points carry no interval there"
    assert tuned_difference(A, B, 16).verdict == "undecided"
    assert "uncalibrated at n = 16" in tuned_difference(A, B, 16).note


def test_diverged_points_count_as_worst_and_missing_ones_not() -> None:
    with_inf, with_nan = [*A, math.inf, math.inf], [*A, math.nan]
    assert tuned(with_inf, 1).value >= tuned(A, 1).value
    assert (tuned(with_inf, 1).diverged, tuned(with_nan, 1).missing) == (2, 1)
    assert tuned(with_nan, 3) == tuned(A, 3) or tuned(with_nan, 3).value == tuned(A, 3).value
    assert tuned_difference([math.inf] * 8, [math.inf] * 8, 1).verdict == "undecided"


def test_a_tuned_difference_says_what_is_far_apart() -> None:
    assert tuned_difference(A, np.asarray(A) + 30, 2).verdict == "better"
    assert tuned_difference(np.asarray(A) + 30, A, 2).verdict == "worse"
    assert tuned_difference(A, A, 2).value == 0


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_wins_equal_every_pair_of_searches(budget: int) -> None:
    a, b = [3.0, 1.0, 5.0, math.inf, 4.0], [2.0, 4.0, 6.0, 1.0]
    pairs = list(itertools.product(itertools.combinations(a, budget), itertools.combinations(b, budget)))
    won = sum((min(x) < min(y)) + 0.5 * (min(x) == min(y)) for x, y in pairs) / len(pairs)
    assert beats(a, b, budget).value == pytest.approx(won, abs=1e-12)


def test_wins_of_single_trials_are_rliables_and_scipys() -> None:
    found = beats(A, B, 1).value
    assert found == pytest.approx(metrics.probability_of_improvement(-A[:, None], -B[:, None]), abs=1e-9)
    assert found == pytest.approx(stats.mannwhitneyu(B, A).statistic / (len(A) * len(B)), abs=1e-9)


def test_the_interval_of_wins_is_statsmodels_clopper_pearson() -> None:
    found = beats(A, B, 4)
    pairs = 32 // 4
    expected = proportion_confint(found.value * pairs, pairs, method="beta")
    assert found.interval == pytest.approx(expected, abs=1e-9)
    assert found.n == pairs
    assert beats(A, np.asarray(A) + 100, 4).interval == (pytest.approx(0.6306, abs=1e-4), 1.0)


def test_wins_without_two_pairs_of_searches_have_no_interval() -> None:
    assert beats(A, B, 17).interval is None
    with pytest.raises(ValueError, match="budget: 33 of 32 points"):
        beats(A, B, 33)


def test_noninferior_from_is_the_first_budget_from_which_all_show_it() -> None:
    assert noninferior_from(A, np.asarray(A) + 30) == 1
    assert noninferior_from(np.asarray(A) + 30, A) is None
    wide = [100.0] * 40 + [20.0] * 24  # bad luck matters less the more one tries
    steady = [21.0] * 64
    first = noninferior_from(wide, steady, margin=1)
    assert first is not None and first > 1
    assert all(tuned_difference(wide, steady, n, margin=1).noninferior for n in range(first, 13))
    assert not tuned_difference(wide, steady, first - 1, margin=1).noninferior
