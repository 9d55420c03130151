"""What a number of seeds can show: pure functions of it and of an assumed seed sd, by the t distributions that the analysis uses.

Two arms have n seeds each and errors with one sd, unrelated between arms, as runs of different optimizers nearly are; so paired or not
the difference of the means has a standard error of sd * sqrt(2 / n), and only the degrees of freedom differ: n - 1 paired, else 2n - 2.
"""

from __future__ import annotations

import math

SEED_SDS = (0.07, 0.10, 0.13)
"""points of error: the range found on ImageNet (AlgoPerf, arXiv 2306.07179)"""
POWER, LEVEL = 0.8, 0.05


def smallest_difference(seeds: int, sd: float, paired: bool, family: int = 1) -> float | None:
    """The true difference that a two-sided t test at LEVEL finds with POWER, in the units of sd; None below two seeds.

    Exact, by the noncentral t distribution, both rejection regions counted. `family`: the number of pairs that the study
    judges together, each at LEVEL / family (Bonferroni), as the report's verdicts go.
    """
    if seeds < 2:
        return None
    from scipy.optimize import brentq  # half a second, which other commands need not spend
    from scipy.stats import nct, t

    df = _df(seeds, paired)
    limit = t.isf(LEVEL / family / 2, df)
    shift = brentq(lambda nc: nct.sf(limit, df, nc) + (1 - nct.sf(-limit, df, nc)) - POWER, 1.0, 10 + 3 * limit, xtol=1e-12)
    return float(shift) * _standard_error(seeds, sd)


def narrowest_margin(seeds: int, sd: float, paired: bool, family: int = 1) -> float | None:
    """Half the width of the 90 % interval, in the units of sd; None below two seeds. `family`: as above.

    Two one-sided tests at LEVEL (TOST) cannot show equivalence within a smaller margin, even where two means are equal.
    """
    if seeds < 2:
        return None
    from scipy.stats import t

    return float(t.isf(LEVEL / family, _df(seeds, paired))) * _standard_error(seeds, sd)


def _df(seeds: int, paired: bool) -> int:
    return seeds - 1 if paired else 2 * seeds - 2


def _standard_error(seeds: int, sd: float) -> float:
    return sd * math.sqrt(2 / seeds)
