"""The searches of a study -> what each arm reaches with a smaller tuning budget, and which arm wins at equal budgets.

All by holdout error, which chose the configurations: the validation split never saw the points of the search.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from analysis.compare import HOLDOUT, Comparison, errors_by_seed
from analysis.estimate import Difference, Estimate, beats, expected_best, mean, noninferior_from, tuned, tuned_difference
from analysis.runs import Records
from harness.config import DERIVED, Arm

FEWEST = 4
"""points of a search, below which there is no curve"""


@dataclass(frozen=True)
class BudgetPoint:
    budget: int
    """trials of the search"""
    tuned: Estimate
    """half of all such searches end below"""
    expected: float
    """the expected best (Dodge et al.), inf where a draw may hold diverged points only"""


@dataclass(frozen=True)
class Duel:
    """Two arms tuned with the same number of trials."""

    a: str
    b: str
    budget: int
    wins: Estimate
    """the probability that a ends with the lower error"""
    difference: Difference


@dataclass(frozen=True)
class Searches:
    errors: Mapping[str, tuple[float, ...]]
    """arm -> holdout error of each configuration, in points: inf diverged, NaN lost to infrastructure or not there yet"""
    curves: Mapping[str, tuple[BudgetPoint, ...]]
    """arm -> budgets up to half its points; arms with fewer than FEWEST points are not there"""
    duels: tuple[Duel, ...]
    """the study's comparisons and its nested arms, at every budget that both curves have"""
    noninferior: Mapping[tuple[str, str], int | None]
    """(a, b) -> the budget from which a is shown non-inferior to b"""
    nested: tuple[tuple[str, str], ...]
    """(wider, narrower): the same arm, the narrower holding at a fixed value what the wider also searches"""

    def shown(self, a: str, b: str) -> str | None:
        """The budgets for which a is shown non-inferior to b: nothing is shown beyond those that the points give an interval."""
        first = self.noninferior.get((a, b))
        last = max((d.budget for d in self.duels if (d.a, d.b) == (a, b) and d.difference.simultaneous90 is not None), default=0)
        return None if first is None else f"{first} to {last}" if first < last else str(first)


def searches(records: Records, comparison: Comparison) -> Searches:
    arms, margin = records.study.study.arms, records.study.study.analysis.margin
    table = records.trials[records.trials.planned & (records.trials.phase == "search")]
    errors = {name: tuple(_errors(table[table.arm == name])) for name, arm in arms.items() if arm.space}
    curves = {name: tuple(_curve(values)) for name, values in errors.items() if _there(values) >= FEWEST}
    nested = tuple((wide, narrow) for wide in arms for narrow in arms if _holds(arms[wide], arms[narrow]))
    pairs = [(pair.a, pair.b) for pair in comparison.judged]
    pairs += [pair for pair in nested if pair not in pairs]
    duels, from_budget = [], {}
    for a, b in pairs:
        if a not in curves or b not in curves:
            continue
        for budget in range(1, min(len(curves[a]), len(curves[b])) + 1):
            found = tuned_difference(errors[a], errors[b], budget, margin=margin, family=len(pairs))
            duels.append(Duel(a, b, budget, beats(errors[a], errors[b], budget), found))
        from_budget[a, b] = noninferior_from(errors[a], errors[b], margin, len(pairs))
    return Searches(errors, curves, tuple(duels), from_budget, nested)


def _errors(rows: pd.DataFrame) -> Iterator[float]:
    """Of each configuration the mean over its search seeds."""
    for _, group in rows.groupby("config", sort=False):
        values = errors_by_seed(group, HOLDOUT)
        yield mean(values).value if values else math.nan


def _there(values: tuple[float, ...]) -> int:
    return sum(not math.isnan(value) for value in values)


def _curve(values: tuple[float, ...]) -> Iterator[BudgetPoint]:
    for budget in range(1, _there(values) // 2 + 1):
        yield BudgetPoint(budget, tuned(values, budget), expected_best(values, budget, replacement=False).value)


def _holds(wide: Arm, narrow: Arm) -> bool:
    """The two differ in nothing but what `wide` searches and `narrow` holds fixed."""
    free = {name: {field for key in arm.space for field in _fields(key)} for name, arm in (("wide", wide), ("narrow", narrow))}
    if not free["narrow"] < free["wide"]:
        return False
    both = free["wide"] | free["narrow"]

    def fixed(arm: Arm) -> dict[str, object]:
        return {
            f"{block}.{field}": value
            for block in ("optimizer", "decay", "schedule")
            for field, value in getattr(arm, block).items()
            if f"{block}.{field}" not in both
        }

    same_box = {key: axis for key, axis in wide.space.items() if key in narrow.space}
    return fixed(wide) == fixed(narrow) and all(narrow.space[key] == axis for key, axis in same_box.items())


def _fields(key: str) -> tuple[str, ...]:
    """The fields that an axis sets, blocks' top-level names: optimizer.one_minus_beta1 -> optimizer.momentum, optimizer.betas."""
    return tuple(field.removesuffix(".0") for field in DERIVED.get(key, (key,)))
