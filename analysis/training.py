"""The course of training -> when an arm reaches what another ends with, what it knows until then, at which loss; and the cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import VALIDATION, ArmResult, Comparison, searched
from analysis.estimate import Difference, Estimate, area, gap, mean, median, reached
from analysis.runs import Records
from harness import journal, schedule


@dataclass(frozen=True)
class Anytime:
    """One arm's reported configuration over the budget, by the answer of the last completed cycle."""

    arm: str
    at_cycle_ends: tuple[tuple[float, Estimate], ...]
    """(epoch, validation error) at each end of a cycle"""
    area: Estimate
    """mean validation error of the answer at hand, from the first cycle's end to the budget's; of a single cycle there is none"""


@dataclass(frozen=True)
class Catching:
    """How soon `a` reaches the error that `b` ends with."""

    a: str
    b: str
    target: float
    """points: the mean final error of b"""
    epochs: Estimate
    """median over the seeds of a; inf: not reached within the budget"""
    reached: int
    """seeds of a that reach it"""
    seeds: int
    """that finished or diverged"""
    budget: float
    """epochs of b"""


@dataclass(frozen=True)
class Gap:
    a: str
    b: str
    split: str
    difference: Difference


@dataclass(frozen=True)
class Cost:
    """What the planned trials of an arm and phase took, in device-hours (hours of wall time x ranks)."""

    arm: str
    phase: str
    trials: int
    """that left a journal here"""
    ranks: int
    hours: float
    """from each attempt's start line to its last line: what it does before, no journal tells"""
    training: float
    waiting: float
    """of the training, for data"""
    repeated: float
    """steps that were trained again after an interruption"""
    attempts: int


def anytime(records: Records, comparison: Comparison) -> tuple[Anytime, ...]:
    """Arms of which no reported trial has completed a cycle are not there."""
    out = []
    for arm in comparison.arms:
        curves = _curves(records, arm)
        if not curves:
            continue
        ends: dict[float, list[float]] = {}
        for epochs, errors in curves.values():
            for epoch, error in zip(epochs, errors, strict=True):
                ends.setdefault(float(epoch), []).append(float(error))
        until = _budget(records, arm)
        at = tuple((epoch, mean(ends[epoch])) for epoch in sorted(ends))
        out.append(Anytime(arm.name, at, mean([area(*curve, until) for curve in curves.values()])))
    return tuple(out)


def catching(records: Records, comparison: Comparison) -> tuple[Catching, ...]:
    """Both directions of each comparison, where the target is known."""
    out = []
    for pair in comparison.judged:
        for a, b in ((comparison.arm(pair.a), comparison.arm(pair.b)), (comparison.arm(pair.b), comparison.arm(pair.a))):
            curves = _curves(records, a)
            if not curves or not math.isfinite(b.error.value):
                continue
            epochs = {seed: reached(*curve, b.error.value) for seed, curve in curves.items()}
            got = sum(map(math.isfinite, epochs.values()))
            out.append(Catching(a.name, b.name, b.error.value, median(epochs), got, len(epochs), _budget(records, b)))
    return tuple(out)


def _budget(records: Records, arm: ArmResult) -> float:
    trial = records.configs[arm.trial_ids[0]]
    return schedule.total_steps(trial) / schedule.steps_per_epoch(trial)


def _curves(records: Records, arm: ArmResult) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """seed -> (epochs, errors in points) at the ends of its cycles, of the reported trials that finished or diverged.

    A diverged one has the answers it gave before, then inf: leaving it out would show the course of the survivors.
    """
    history, out = records.history, {}
    if VALIDATION not in history:
        return {}
    for trial_id in arm.trial_ids:
        trial = records.configs[trial_id]
        if math.isnan(arm.errors.get(trial.seed, math.nan)):
            continue
        ends = schedule.cycle_ends(trial)
        rows = history[(history.trial_id == trial_id) & history.step.isin([end - 1 for end in ends])]
        errors = (100 * (1 - rows.set_index("step")[VALIDATION])).dropna()
        if math.isinf(arm.errors[trial.seed]):
            errors = errors.reindex([end - 1 for end in ends], fill_value=math.inf)
        if len(errors):
            out[trial.seed] = (errors.index.to_numpy(dtype=float) + 1) / schedule.steps_per_epoch(trial), errors.to_numpy(dtype=float)
    return out


@dataclass(frozen=True)
class LossPoints:
    """Each searched configuration at the end of its budget, the mean over its seeds."""

    table: pd.DataFrame
    """arm, loss (train_eval/loss), error (points)"""
    split: str
    """of the error: validation, or holdout where the study has finalists"""


def loss_points(records: Records) -> LossPoints:
    table = records.trials
    rows = table[table.planned & (table.phase == "search") & (table.state == "finished")]
    metric, split = searched(records.study)
    loss = rows.get("train_eval/loss", math.nan)
    points = pd.DataFrame({"arm": rows.arm, "loss": loss, "error": 100 * (1 - rows[metric]), "config": rows.config})
    return LossPoints(points.groupby(["arm", "config"], as_index=False)[["loss", "error"]].mean(), split)


def gaps(records: Records, comparison: Comparison, points: LossPoints) -> tuple[Gap, ...]:
    """The generalisation gap of each comparison over the points of both searches; judged together, as the comparisons are."""
    margin, of = records.study.study.analysis.margin, dict(list(points.table.groupby("arm")))
    none = points.table.iloc[:0]
    judged = comparison.judged
    return tuple(Gap(p.a, p.b, points.split, gap(of.get(p.a, none), of.get(p.b, none), margin=margin, family=len(judged))) for p in judged)


def costs(records: Records) -> tuple[Cost, ...]:
    """Of the trials that the study plans, in its order, from the journals of the store; without them (another machine's) there is none."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for trial_id in records.trials.trial_id[records.trials.planned].dropna():
        trial = records.configs[trial_id]
        lines = list(journal.glance(records.store.trial(records.study.name, trial_id).journal))
        for place, life in enumerate(_lives(lines)):
            rows.setdefault((trial.arm, trial.phase), []).append({"trials": float(place == 0), **life})
    out = []
    for (arm, phase), lives in rows.items():
        total = pd.DataFrame(lives).sum()
        ranks = int(max(life["ranks"] for life in lives))
        hours = {name: float(total[name]) / 3600 for name in ("hours", "training", "waiting", "repeated")}
        out.append(Cost(arm, phase, trials=int(total.trials), ranks=ranks, attempts=len(lives), **hours))
    return tuple(out)


def _lives(lines: list[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """Of each attempt in a journal: seconds x ranks of wall time, of training, of waiting for data, of steps trained again."""
    clock = waited = steps = 0.0
    for number in dict.fromkeys(line["attempt"] for line in lines):
        own = [line for line in lines if line["attempt"] == number]
        start = next((line for line in own if line.get("event") == "start"), None)
        if start is None:
            continue
        again = max(0.0, steps - start["resumed_from"]) * (clock / steps if steps else 0.0)
        began, ranks = clock - again, start["world_size"]
        ticks = [line["metrics"] for line in own if "time/train_seconds" in line.get("metrics", {})]
        clock = ticks[-1]["time/train_seconds"] if ticks else began
        waited_before, waited = waited, clock * ticks[-1].get("data/wait_fraction", 0.0) if ticks else waited
        steps = max([line["step"] + 1 for line in own if "metrics" in line], default=start["resumed_from"])
        yield {
            "ranks": ranks,
            "hours": ranks * (own[-1]["timestamp"] - start["timestamp"]) / 1000,
            "training": ranks * max(0.0, clock - began),
            "waiting": ranks * max(0.0, waited - waited_before),
            "repeated": ranks * again,
        }
