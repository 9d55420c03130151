"""The decoupling index on maps whose answer is known, and against a regression of statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf

from analysis.estimate import Decoupling, decoupling_index, transfer

LR, DECAY = np.logspace(-3, 0, 7), np.logspace(-4, -1, 7)
X, Y = np.meshgrid(np.arange(7) - 3.0, np.arange(7) - 3.0, indexing="ij")


def index(errors: np.ndarray, seed: int = 0) -> Decoupling:
    return decoupling_index(errors, LR, DECAY, rng=np.random.default_rng(seed))


def noisy(errors: np.ndarray, sd: float = 0.3, seeds: int = 2) -> np.ndarray:
    return errors[:, :, None] + sd * np.random.default_rng(5).standard_normal((*errors.shape, seeds))


SEPARABLE, DIAGONAL = 5 + X**2 + Y**2, 5 + (X + Y) ** 2 + 0.2 * (X - Y) ** 2


def test_a_separable_map_has_no_interaction_and_no_slope() -> None:
    found = index(SEPARABLE)
    assert abs(found.share) < 1e-8  # the ridge of the fit
    assert abs(found.slope) < 1e-6
    assert found.best == pytest.approx(math.log10(DECAY[3]), abs=1e-6)


def test_a_diagonal_map_has_both() -> None:
    found = index(noisy(DIAGONAL))
    assert found.share > 0.35
    assert found.slope == pytest.approx(-0.8 / 1.2, abs=0.05)
    assert found.share_interval is not None and found.share_interval[0] > 0.3
    assert found.slope_interval is not None and found.slope_interval[1] < -0.5


def test_any_separable_shape_is_separable() -> None:
    found = index(5 + np.abs(X) ** 1.5 + 0.3 * np.exp(Y / 2))
    assert abs(found.share) < 1e-8


def test_the_share_is_that_of_a_weighted_regression() -> None:
    errors = DIAGONAL + np.random.default_rng(3).standard_normal((7, 7))
    weights = np.clip(1 - (errors - errors.min()) / 10, 0, None)
    table = pd.DataFrame({"z": errors.ravel(), "x": X.ravel().astype(int), "y": Y.ravel().astype(int), "w": weights.ravel()})
    table = table[table.w > 0]
    fit = smf.wls("z ~ C(x) + C(y)", table, weights=table.w).fit()
    average = np.average(table.z, weights=table.w)
    expected = fit.ssr / (table.w * (table.z - average) ** 2).sum()
    assert index(errors).share == pytest.approx(expected, rel=1e-7)  # the ridge again


def test_diverged_corners_and_missing_seeds_do_not_count() -> None:
    errors = noisy(SEPARABLE)
    worse = errors.copy()
    worse[6, 6] = math.inf
    worse[0, 0, 1] = math.nan
    found, whole = index(worse), index(errors)
    assert (found.diverged, found.missing) == (2, 1)
    assert found.share == pytest.approx(whole.share, abs=0.02)


def test_without_replicates_noise_counts_as_interaction_and_it_says_so() -> None:
    found = index(SEPARABLE + np.random.default_rng(1).standard_normal((7, 7)))
    assert found.share > 0.02
    assert found.share_interval is None
    assert "one seed a cell" in found.note


@pytest.mark.parametrize(
    ("errors", "note"),
    [
        (np.full((7, 7), math.nan), "no cell has an error"),
        (np.full((7, 7), math.inf), "no cell has an error"),
        (np.where((X == 0) & (Y == 0), 5.0, 90.0), "too few cells within 10 points of the best"),
    ],
)
def test_maps_that_tell_nothing_say_so(errors: np.ndarray, note: str) -> None:
    found = index(errors)
    assert math.isnan(found.share)
    assert (found.share_interval, found.note) == (None, note)


@pytest.mark.parametrize("height", [0.0, 0.02, 0.05])
def test_a_map_that_is_mostly_noise_is_called_neither_separable_nor_interaction(height: float) -> None:
    """Of 200 flat maps 61 were called interaction by an interval above zero, 13 by one whose ends were in the wrong order."""
    rng = np.random.default_rng(7)
    found = [index(20 + height * (X**2 + Y**2)[:, :, None] + 0.5 * rng.standard_normal((7, 7, 2)), seed) for seed in range(60)]
    told = [one for one in found if one.share_interval is not None]
    assert sum(one.share_interval[0] > 0 for one in told if one.share_interval) <= 3  # 5 % of 60
    assert all(one.share_interval[0] < one.share_interval[1] for one in told if one.share_interval)
    assert all(math.isnan(one.share) and "too little beyond the noise" in one.note for one in found if one.share_interval is None)


def test_shapes_and_axes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"errors: shape \(7, 6\)"):
        index(SEPARABLE[:, :6])
    with pytest.raises(ValueError, match="must be above 0 and ascend"):
        decoupling_index(SEPARABLE, LR[::-1], DECAY, rng=np.random.default_rng(0))


def test_the_raw_decay_moves_by_half_an_octave_a_doubling_less_than_the_normalised_one() -> None:
    shorter, longer = index(noisy(SEPARABLE)), index(noisy(5 + X**2 + (Y - 1) ** 2))  # half a decade further
    found = transfer(shorter, longer, (1000, 8000))
    assert found.normalised == pytest.approx(0.5 * math.log2(10), abs=0.2)
    assert found.raw == pytest.approx(found.normalised - 1.5)
    assert found.normalised_interval is not None
    assert found.normalised_interval[0] < found.normalised < found.normalised_interval[1]
