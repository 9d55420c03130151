"""Estimators against scipy, textbook formulas and brute force; every refusal to give an interval."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import estimate
from analysis.compare import seed_correlation
from analysis.estimate import difference, expected_best, mean, sampling_error, simulated_tuning, verdict

A = [23.1, 23.4, 22.9, 23.3, 23.0]
B = [23.6, 23.5, 23.9, 23.2]
NAN, INF = math.nan, math.inf


# ----------------------------------------------------------------------------------------------- one sample


def test_mean_and_interval_equal_scipys() -> None:
    found, reference = mean(A), stats.ttest_1samp(A, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(A), rel=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(A), rel=1e-12)
    assert found.interval == pytest.approx((reference.low, reference.high), rel=1e-9)
    assert (found.n, found.missing, found.diverged, found.note) == (5, 0, 0, "")


@pytest.mark.parametrize(
    ("values", "n", "value", "note"),
    [
        ([], 0, NAN, "no value"),
        ([NAN, NAN], 0, NAN, "no value"),
        ([5.0], 1, 5.0, "one value: no interval"),
        ([5.0, NAN], 1, 5.0, "one value: no interval"),
        ([5.0, 5.0, 5.0 + 1e-12], 3, 5.0, "all 3 values are equal: no interval"),
        ([5.0, 6.0, INF], 2, INF, "1 of 3 diverged: no mean"),
        ([INF], 0, INF, "1 of 1 diverged: no mean"),
    ],
)
def test_no_interval_is_said(values: list[float], n: int, value: float, note: str) -> None:
    found = mean(values)
    assert (found.n, found.interval, found.note) == (n, None, note)
    assert found.value == pytest.approx(value, nan_ok=True)


def test_missing_values_are_left_out_and_counted() -> None:
    assert mean([*A, NAN]).interval == mean(A).interval
    assert mean([*A, NAN]).missing == 1


def test_an_error_cannot_be_minus_infinity() -> None:
    with pytest.raises(ValueError, match="-inf is no error rate"):
        mean([1.0, -INF])


@pytest.mark.parametrize(("wrong", "images"), [(52, 1000), (0, 1000), (1000, 1000), (11500, 50000)])
def test_sampling_error_equals_scipys_wilson_interval(wrong: int, images: int) -> None:
    found = sampling_error(100 * wrong / images, images)
    reference = stats.binomtest(wrong, images).proportion_ci(0.95, method="wilson")
    assert found.interval == pytest.approx((100 * reference.low, 100 * reference.high), abs=1e-9)
    assert found.n == images


def test_sampling_error_of_imagenets_validation_split() -> None:
    assert sampling_error(23.0, 50_000).standard_error == pytest.approx(0.188, abs=5e-4)  # PAPER.md: 0.19 points at 23 %


@pytest.mark.parametrize("error", [NAN, INF])
def test_no_error_has_no_sampling_error(error: float) -> None:
    found = sampling_error(error, 1000)
    assert math.isnan(found.value)
    assert found.standard_error is None
    assert found.interval is None


# ---------------------------------------------------------------------------------------------- two samples


def test_welch_equals_scipys() -> None:
    found = difference(A, B)
    reference = stats.ttest_ind(A, B, equal_var=False)
    for interval, level in ((found.interval, 0.95), (found.interval90, 0.90)):
        ci = reference.confidence_interval(level)
        assert interval == pytest.approx((ci.low, ci.high), rel=1e-9)
    assert found.value == pytest.approx(np.mean(A) - np.mean(B), rel=1e-12)
    assert (found.n, found.n_a, found.n_b, found.method) == (4, 5, 4, "welch")
    assert found.correlation is None  # no seeds, nothing to correlate


def test_paired_equals_scipys_over_the_common_seeds() -> None:
    a, b = dict(enumerate(A, start=1000)), dict(enumerate(B, start=1001))
    found = difference(a, b, "paired")
    reference = stats.ttest_rel(A[1:], B).confidence_interval(0.95)
    assert found.interval == pytest.approx((reference.low, reference.high), rel=1e-9)
    assert found.correlation == pytest.approx(stats.pearsonr(A[1:], B).statistic, rel=1e-9)
    assert (found.n, found.n_a, found.n_b, found.method) == (4, 4, 4, "paired")


def test_series_are_paired_by_their_index_whatever_its_order() -> None:
    by_seed = pd.Series(A, index=range(5))
    found = difference(by_seed, by_seed[::-1] + np.array([0.1, 0.2, 0.1, 0.2, 0.1]), "paired")
    assert found.value == pytest.approx(-0.14)
    assert found.interval is not None
    assert found.interval[1] < 0


def test_paired_needs_seeds_or_equal_lengths() -> None:
    with pytest.raises(ValueError, match="5 and 4 values without seeds cannot be paired"):
        difference(A, B, "paired")
    with pytest.raises(ValueError, match="seed 1 has two"):
        difference(pd.Series([1.0, 2.0], index=[1, 1]), pd.Series([1.0, 2.0]), "paired")


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="valid: welch, paired"):
        difference(A, B, "bootstrap")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["welch", "paired"])
@pytest.mark.parametrize(
    ("a", "b", "note"),
    [
        ({1: 5.0}, {1: 6.0}, "one"),
        ({}, {1: 6.0, 2: 7.0}, "no "),
        ({1: 5.0, 2: 5.1}, {}, "no "),
        ({1: 5.0, 2: INF}, {1: 6.0, 2: 6.1}, "diverged"),
        ({1: 5.0, 2: 5.2}, {1: 6.0, 2: INF}, "diverged"),
        ({1: INF, 2: 5.2}, {1: 6.0, 2: INF}, "diverged"),
        ({1: 5.0, 2: 5.0}, {1: 6.0, 2: 6.0}, "no interval"),
        ({1: NAN, 2: 5.0}, {1: 6.0, 2: NAN}, ""),
    ],
)
def test_without_an_interval_nothing_is_decided(method: estimate.Method, a: dict[int, float], b: dict[int, float], note: str) -> None:
    found = difference(a, b, method)
    assert (found.interval, found.interval90, found.standard_error, found.verdict) == (None, None, None, "undecided")
    assert note in found.note
    assert found.note


def test_disjoint_seeds_cannot_be_paired() -> None:
    found = difference({1: 5.0, 2: 5.1}, {3: 6.0, 4: 6.1}, "paired")
    assert (found.n, found.interval, found.verdict) == (0, None, "undecided")
    assert math.isnan(found.value)


def test_rounding_noise_is_no_spread() -> None:
    found = difference({1: 4.7, 2: 4.6, 3: 0.3}, {1: 4.5, 2: 4.4, 3: 0.1}, "paired")  # 0.2 each, but for the last bits
    assert found.interval is None
    assert found.verdict == "undecided"


def test_correlation_needs_three_pairs_and_spread() -> None:
    assert difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.5}, "paired").correlation is None
    assert difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.0, 2: 1.0, 3: 1.0}, "paired").correlation is None
    three = difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 3.0, 2: 2.1, 3: 1.0})
    assert three.correlation == pytest.approx(-1, abs=0.01)
    assert (three.correlation_interval, three.correlation_n) == (None, 3)
    assert seed_correlation(three) == "−1.00 (no interval, n = 3)"


def test_a_correlation_has_fishers_interval_over_the_common_seeds() -> None:
    a, b = dict(enumerate(A, start=1000)), dict(enumerate(B, start=1001))
    reference = stats.pearsonr(A[1:], B).confidence_interval(0.95)
    for method in ("welch", "paired"):
        found = difference(a, b, method)
        assert found.correlation_interval == pytest.approx((reference.low, reference.high), rel=1e-9)
        assert f"(95 % interval {reference.low:z.2f} to {reference.high:z.2f}, n = 4)".replace("-", "−") in str(seed_correlation(found))
    line = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert difference(line, line).correlation_interval is None


@pytest.mark.parametrize(
    ("interval", "interval90", "expected"),
    [
        ((-0.5, -0.1), (-0.4, -0.2), "better"),
        ((0.1, 0.5), (0.2, 0.4), "worse"),
        ((-0.21, 0.19), (-0.19, 0.17), "equivalent"),
        ((-0.25, 0.1), (-0.2, 0.05), "undecided"),  # the margin itself is not inside
        ((-0.5, 0.0), (-0.4, -0.1), "undecided"),
        ((-0.15, -0.05), (-0.14, -0.06), "better"),  # within the margin too: the sharper claim
        (None, None, "undecided"),
    ],
)
def test_verdict(interval: estimate.Interval | None, interval90: estimate.Interval | None, expected: str) -> None:
    assert verdict(interval, interval90, 0.2) == expected


def test_lower_error_is_better() -> None:
    low, high = [5.0, 5.1, 5.2], [9.0, 9.1, 9.2]
    assert difference(low, high).verdict == "better"
    assert difference(high, low).verdict == "worse"
    assert difference(low, low, margin=5).verdict == "equivalent"
    assert difference(low, low, margin=0.05).verdict == "undecided"


def test_welch_covers_the_truth() -> None:
    rng = np.random.default_rng(20)
    covered = 0
    for _ in range(2000):
        found = difference(rng.normal(23.0, 0.1, 5), rng.normal(23.2, 0.13, 8))
        assert found.interval is not None
        covered += found.interval[0] <= -0.2 <= found.interval[1]
    assert 0.935 <= covered / 2000 <= 0.965


def test_three_paired_seeds_of_sd_01_cannot_show_equivalence() -> None:
    """PAPER.md: a margin of 0.2 points cannot pass with 3 paired seeds at sd 0.1 as a rule."""
    rng = np.random.default_rng(3)
    passed = sum(difference(rng.normal(23, 0.1, 3), rng.normal(23, 0.1, 3), "paired").verdict == "equivalent" for _ in range(500))
    assert passed / 500 < 0.35


# --------------------------------------------------------------------------------------------- tuning budget


def brute_force(values: list[float], budget: int, replacement: bool) -> list[float]:
    draws = itertools.product(values, repeat=budget) if replacement else itertools.permutations(values, budget)
    return sorted(min(draw) for draw in draws)


@pytest.mark.parametrize("replacement", [True, False])
@given(st.lists(st.sampled_from([1.0, 2.0, 2.5, 4.0, 7.0, 9.0]), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_expected_best_equals_brute_force(replacement: bool, values: list[float], budget: int) -> None:
    if not replacement and budget > len(values):
        with pytest.raises(ValueError, match="without replacement"):
            expected_best(values, budget, replacement)
        return
    bests = brute_force(values, budget, replacement)
    found = expected_best(values, budget, replacement)
    assert found.value == pytest.approx(np.mean(bests), rel=1e-9)
    assert (found.quartiles[0], found.median, found.quartiles[1]) == tuple(
        np.quantile(bests, [0.25, 0.5, 0.75], method="inverted_cdf").tolist()
    )
    assert (found.n, found.budget) == (len(values), budget)


def test_expected_best_of_scores_is_mirrored() -> None:
    scores = [0.3, 0.9, 0.5]
    found = expected_best(scores, 2, best="max")
    assert found.value == pytest.approx(-expected_best([-s for s in scores], 2).value)
    assert found.value == pytest.approx((0.3 * 1 + 0.5 * 3 + 0.9 * 5) / 9)
    assert found.quartiles == (0.5, 0.9)


def test_diverged_configurations_count_as_worst() -> None:
    values = [5.0, INF, 6.0]
    assert expected_best(values, 1).value == INF
    assert expected_best(values, 2, replacement=False).value == pytest.approx((5 + 5 + 6) / 3)
    found = simulated_tuning(values, 2, 500, np.random.default_rng(0))
    assert found.median == 5.0
    assert found.interval[1] == INF


def test_missing_configurations_are_counted_and_not_drawn() -> None:
    assert expected_best([5.0, NAN, 6.0], 2).n == 2
    assert simulated_tuning([5.0, NAN], 3, 10, np.random.default_rng(0)).missing == 1


def test_simulated_tuning_draws_from_its_generator_only() -> None:
    values = np.random.default_rng(1).normal(23, 1, 100)
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    first = simulated_tuning(values, 5, 1000, np.random.default_rng(7))
    np.random.seed(1)  # noqa: NPY002
    assert simulated_tuning(values, 5, 1000, np.random.default_rng(7)) == first
    assert simulated_tuning(values, 5, 1000, np.random.default_rng(8)) != first


def test_simulated_tuning_approaches_the_exact_distribution() -> None:
    values = np.random.default_rng(1).normal(23, 1, 20)
    exact, simulated = expected_best(values, 3), simulated_tuning(values, 3, 20_000, np.random.default_rng(2))
    ordered = np.sort(values)
    for a, b in zip((exact.median, *exact.quartiles), (simulated.median, *simulated.quartiles), strict=True):
        assert abs(int(np.searchsorted(ordered, a)) - int(np.searchsorted(ordered, b))) <= 1


@pytest.mark.parametrize(("values", "budget", "draws", "said"), [([], 1, 1, "none"), ([1.0], 0, 1, "budget: 0"), ([1.0], 1, 0, "draws: 0")])
def test_impossible_draws_are_refused(values: list[float], budget: int, draws: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulated_tuning(values, budget, draws, np.random.default_rng(0))
