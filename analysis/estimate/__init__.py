"""Pure statistics: numbers in, frozen estimates out, each with its interval and n. No files, no figures, no global random state.

samples  one arm, two arms: mean, median, difference, difference_over_images
tuning   what a tuning budget yields: expected_best, simulated_tuning, tuned, tuned_difference, beats, noninferior_from
maps     learning rate x decay maps: decoupling_index, transfer
curves   over training and over workloads: reached, area, gap, performance_profile

Errors are in percentage points, lower is better. In every sample NaN is a missing value: it is left out and counted.
+inf is a run that diverged: it counts as worst, so a mean over it is infinite and has no interval. Where data do not carry
an interval, it is None and `note` says why. `make calibrate` shows that the intervals cover what they say.
"""

from analysis.estimate.curves import area, gap, performance_profile, reached
from analysis.estimate.maps import Decoupling, Transfer, decoupling_index, transfer
from analysis.estimate.samples import (
    LEVEL,
    MARGIN,
    Difference,
    Estimate,
    Interval,
    Method,
    Sample,
    Verdict,
    difference,
    difference_over_images,
    mean,
    median,
    sampling_error,
    verdict,
)
from analysis.estimate.tuning import (
    BestOf,
    beats,
    expected_best,
    noninferior_from,
    simulated_tuning,
    tuned,
    tuned_difference,
)

__all__ = [
    "LEVEL",
    "MARGIN",
    "BestOf",
    "Decoupling",
    "Difference",
    "Estimate",
    "Interval",
    "Method",
    "Sample",
    "Transfer",
    "Verdict",
    "area",
    "beats",
    "decoupling_index",
    "difference",
    "difference_over_images",
    "expected_best",
    "gap",
    "mean",
    "median",
    "noninferior_from",
    "performance_profile",
    "reached",
    "sampling_error",
    "simulated_tuning",
    "transfer",
    "tuned",
    "tuned_difference",
    "verdict",
]
