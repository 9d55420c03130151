"""The tables -> what they say of each arm and of each pair of arms: selection, estimates, flags, and sentences that claim no more.

Selection reads the holdout only; the validation split is reported and decides nothing. Everything here is a pure function
of `runs.Records`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.estimate import MARGIN, Difference, Estimate, Method, difference, mean, sampling_error
from analysis.runs import Records
from harness.config import WorkloadFile

HOLDOUT, VALIDATION = "anytime/holdout_top1", "anytime/val_top1"
"""The answer of the last completed cycle: what selection reads, and what is reported."""

FAILED = ("failed", "exhausted", "cancelled")
"""Lost to infrastructure: left out of every estimate, and counted."""

PENDING = ("pending", "queued", "running")
"""Part of the missing ones: may still come by itself."""

METHODS: tuple[Method, ...] = ("welch", "paired")
"""The first is the one a verdict is taken from."""


@dataclass(frozen=True)
class ArmResult:
    """What is known of one arm. planned = finished + failed + diverged + missing; pending is a part of missing."""

    name: str
    planned: int
    finished: int
    """trials with a reported error"""
    failed: int
    diverged: int
    missing: int
    pending: int
    phase: str
    """whose trials the estimate is made of: finalists, or search in a study without them"""
    searched: int
    """configurations of the search"""
    candidates: int
    """of these, the configurations of that phase: what the best one was chosen among"""
    configuration: str | None
    """`config` of the best configuration in the table of trials; None when nothing can be chosen"""
    parameters: Mapping[str, Any]
    """its searched values, by dotted key"""
    trial_ids: tuple[str, ...]
    """its trials in that phase, in the order of their seeds"""
    best_trial_id: str | None
    """of these, the one with the lowest holdout error"""
    errors: Mapping[int, float]
    """seed -> validation error in points; inf diverged, NaN finished without a value"""
    holdout: Estimate
    error: Estimate
    sampling: Estimate
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    a: str
    b: str
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    study: str
    workload: WorkloadFile
    arms: tuple[ArmResult, ...]
    pairs: tuple[Pair, ...]
    """every pair of arms by every method, the order of METHODS within a pair"""
    flags: tuple[str, ...]
    """what makes the comparison less than fair or less than complete, one line each"""
    imagenet: str
    """what can be said of ImageNet, always said"""


def compare(records: Records, margin: float = MARGIN) -> Comparison:
    """Arms, pairs and flags of a study. `margin` of equivalence in points of error."""
    table, study = records.trials[records.trials.planned], records.study
    phase = "finalists" if study.study.finalists else "search"
    arms = tuple(_arm(name, table[table.arm == name], phase, records) for name in study.study.arms)
    pairs = tuple(
        Pair(a.name, b.name, difference(a.errors, b.errors, method, margin=margin))
        for a, b in itertools.combinations(arms, 2)
        for method in METHODS
    )
    return Comparison(study.name, study.workload, arms, pairs, tuple(_flags(records, arms)), _imagenet(table, study.workload))


# ---------------------------------------------------------------------------------------------------- an arm


def errors_by_seed(rows: pd.DataFrame, metric: str = VALIDATION) -> dict[int, float]:
    """seed -> error in points at the end of the budget, of the rows of one configuration.

    Diverged is inf, finished without a (finite) value NaN; failed and missing trials are not there.
    """
    ended = rows[rows.state.isin(["finished", "diverged"])]
    return {
        int(row["seed"]): math.inf if row["state"] == "diverged" else 100 * (1 - row[metric]) if math.isfinite(row[metric]) else math.nan
        for row in ended.to_dict("records")
    }


def _arm(name: str, rows: pd.DataFrame, phase: str, records: Records) -> ArmResult:
    failed, diverged = rows.state.isin(FAILED), rows.state == "diverged"
    finished = (rows.state == "finished") & rows[VALIDATION].map(math.isfinite)
    missing = ~(failed | diverged | finished)
    in_phase = rows[rows.phase == phase]
    best, candidates, notes = _best(in_phase)
    chosen = in_phase[in_phase.config == best] if best else in_phase.iloc[:0]
    errors, holdout = errors_by_seed(chosen), errors_by_seed(chosen, HOLDOUT)
    error = mean(errors)
    finite_holdout = {seed: value for seed, value in holdout.items() if math.isfinite(value)}
    best_seed = min(finite_holdout, key=lambda seed: finite_holdout[seed], default=None)
    notes += _seed_notes(chosen, errors) if best else []
    if phase == "search" and candidates > 1:
        notes.append("chosen and reported on the same runs (no finalists with fresh seeds): optimistic")
    return ArmResult(
        name=name,
        planned=len(rows),
        finished=int(finished.sum()),
        failed=int(failed.sum()),
        diverged=int(diverged.sum()),
        missing=int(missing.sum()),
        pending=int(rows.state.isin(PENDING).sum()),
        phase=phase,
        searched=int(rows[rows.phase == "search"].config.nunique()),
        candidates=candidates,
        configuration=best,
        parameters=_parameters(name, chosen, records),
        trial_ids=tuple(chosen.trial_id),
        best_trial_id=next((i for i, seed in zip(chosen.trial_id, chosen.seed, strict=True) if seed == best_seed), None),
        errors=errors,
        holdout=mean(holdout),
        error=error,
        sampling=sampling_error(error.value, records.study.workload.data.val_samples),
        notes=tuple(notes),
    )


def _best(rows: pd.DataFrame) -> tuple[str | None, int, list[str]]:
    """(configuration with the lowest mean holdout error over its seeds, number of configurations, what hinders the choice).

    A seed that diverged makes the mean infinite, so it ranks behind every configuration without; among such, fewer
    divergences come first. The first found wins among equals. A single configuration needs no holdout.
    """
    groups = {str(config): group for config, group in rows.dropna(subset="config").groupby("config", sort=False)}
    ended = {config: group for config, group in groups.items() if (group.state == "finished").any()}
    if not ended:
        why = (
            "the search has not decided the finalists yet"
            if rows.trial_id.isna().any()
            else f"no trial of phase {rows.phase.max()} finished"
        )
        return None, len(groups), [why]
    if len(groups) == 1:
        return next(iter(ended)), 1, []
    ranked = []
    for place, (config, group) in enumerate(ended.items()):
        errors = [e for e in errors_by_seed(group, HOLDOUT).values() if not math.isnan(e)]
        finite = [e for e in errors if math.isfinite(e)]
        if finite:
            ranked.append((mean(errors).value, len(errors) - len(finite), mean(finite).value, place, config))
    if not ranked:
        return None, len(groups), [f"{HOLDOUT} is missing, so no configuration can be chosen"]
    partly = f"chosen among the {len(ranked)} of {len(groups)} configurations that have a holdout result"
    return min(ranked)[-1], len(groups), [partly] if len(ranked) < len(groups) else []


def _seed_notes(chosen: pd.DataFrame, errors: Mapping[int, float]) -> list[str]:
    """What the seeds behind an estimate lack."""
    out = []
    gone = chosen[~chosen.state.isin(["finished", "diverged"])]
    if len(gone):
        states = ", ".join(f"seed {row['seed']} {row['state']}" for row in gone.to_dict("records"))
        out.append(f"{len(gone)} of {len(chosen)} seeds not in the estimate: {states}")
    diverged = [seed for seed, error in errors.items() if math.isinf(error)]
    if diverged:
        others = mean([error for error in errors.values() if math.isfinite(error)])
        rest = f"; the other {others.n}: {others.value:.2f} points" if others.n else ""
        out.append(f"{len(diverged)} of {len(chosen)} seeds diverged ({', '.join(map(str, diverged))}), so there is no mean{rest}")
    unread = [seed for seed, error in errors.items() if math.isnan(error)]
    if unread:
        out.append(f"{VALIDATION} is missing for finished seed{'s' if len(unread) > 1 else ''} {', '.join(map(str, unread))}")
    return out


def _parameters(name: str, chosen: pd.DataFrame, records: Records) -> dict[str, Any]:
    """The searched values of the chosen configuration; of an arm that searches nothing, its learning rate and decay."""
    keys = list(records.study.study.arms[name].space) or ["optimizer.lr", "decay.weight_decay"]
    if chosen.empty:
        return {}
    row = chosen.iloc[:1].to_dict("records")[0]
    return {key: row[key] for key in keys if row.get(key) is not None and row[key] == row[key]}


# ----------------------------------------------------------------------------------------------------- flags


def _flags(records: Records, arms: tuple[ArmResult, ...]) -> Iterator[str]:
    table = records.trials[records.trials.planned]
    yield from _unequal_budgets(table)
    yield from _mixed(records)
    for arm in arms:
        parts = {"failed": arm.failed, "diverged": arm.diverged, "missing": arm.missing - arm.pending, "pending": arm.pending}
        lost = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
        if lost:
            yield f"{arm.name}: {arm.planned - arm.finished} of {arm.planned} planned trials have no result ({lost})"
        for note in arm.notes:
            yield f"{arm.name}: {note}"
    left_over = records.trials[~records.trials.planned]
    if len(left_over):
        yield f"{len(left_over)} trials in the store are not of the study as it stands now; they count nowhere"
    if len(arms) > 2:
        yield f"{math.comb(len(arms), 2)} pairs of arms are compared; the intervals are not adjusted for that"


def _unequal_budgets(table: pd.DataFrame) -> Iterator[str]:
    names = {"budget.epochs": "epochs", "budget.global_batch_size": "global batch size", "total_steps": "optimizer steps"}
    for column, title in names.items():
        if column in table:
            by_arm = {str(arm): sorted(set(group[column].dropna())) for arm, group in table.groupby("arm", sort=False)}
            if len({tuple(values) for values in by_arm.values()}) > 1:
                said = (f"{arm} {'/'.join(f'{v:g}' for v in values)}" for arm, values in by_arm.items())
                yield f"unequal budgets: {title}: {', '.join(said)}"
    search = table[table.phase == "search"]
    points = search.groupby("arm", sort=False).config.nunique().to_dict()
    if len(set(points.values())) > 1:
        yield "unequal budgets: configurations searched: " + ", ".join(f"{arm} {n}" for arm, n in points.items())
    ended = search.state.isin(["finished", "diverged"]).groupby(search.arm, sort=False).sum().to_dict()
    if len(set(points.values())) == 1 and len(set(ended.values())) > 1:
        yield "unequal search: trials that finished or diverged: " + ", ".join(f"{arm} {n}" for arm, n in ended.items())


def _mixed(records: Records) -> Iterator[str]:
    """Circumstances that must not matter, and are said when they differ within an arm or between arms."""
    table = records.trials[records.trials.planned & records.trials.run_id.notna()]
    for name in ("world_size", "micro_batch_size", "backend", "zero_stage", "compile", "channels_last", "device", "commit", "data_sha256"):
        values = table.get(f"tag.{name}", pd.Series(dtype=str)).dropna().str.replace(r"\b([0-9a-f]{10})[0-9a-f]{30,}\b", r"\1", regex=True)
        counts = {str(arm): Counter(of_arm) for arm, of_arm in values.groupby(table.arm, sort=False)}
        if len(set(values)) > 1:
            where = "within an arm" if any(len(of_arm) > 1 for of_arm in counts.values()) else "between the arms"
            said = (f"{arm} {', '.join(f'{value} ({n})' for value, n in of_arm.most_common())}" for arm, of_arm in counts.items())
            yield f"{name.replace('_', ' ')} differs {where}: {'; '.join(said)}"


# ------------------------------------------------------------------------------------------------- sentences

FULL_IMAGENET = re.compile(r"(imagenet|ilsvrc)([-_]?(1k|2012))?", re.IGNORECASE)
"""Names of the full data set; ImageNet32 and the like are other data sets."""


def _imagenet(table: pd.DataFrame, workload: WorkloadFile) -> str:
    if not FULL_IMAGENET.fullmatch(workload.data.name):
        return "ImageNet: not measured."
    measured = int(table[VALIDATION].map(math.isfinite).sum())
    return f"ImageNet: {measured} trials measured." if measured else "ImageNet: not measured."


def sentence(pair: Pair, workload: WorkloadFile) -> str:
    """What the difference allows to say about `a` against `b` on this workload."""
    d, a, b = pair.difference, pair.a, pair.b
    where = f"On {workload.name} ({workload.data.val_samples:,} validation images)"
    if d.interval is None or d.interval90 is None:
        why = re.sub(r"^[ab](?=: )", lambda side: {"a": a, "b": b}[side[0]], d.note)
        return f"{where}, {a} and {b} cannot be compared: {why}."
    seeds = f"{d.n} seeds common to both, paired" if d.method == "paired" else f"Welch, n = {d.n_a} and {d.n_b} seeds"
    found = f"{a} − {b} = {signed(d.value)} points of error, 95 % interval {interval(d.interval)} ({seeds})"
    if d.verdict == "better":
        return f"{where}, {a} ended with a lower validation error than {b}: {found}."
    if d.verdict == "worse":
        return f"{where}, {a} ended with a higher validation error than {b}: {found}."
    if d.verdict == "equivalent":
        return f"{where}, {a} and {b} are equivalent within ±{d.margin:g} points: {found}; the 90 % interval is {interval(d.interval90)}."
    widest = max(abs(d.interval[0]), abs(d.interval[1]))
    undecided = f"it is undecided whether {a} or {b} has the lower validation error"
    return f"{where}, {undecided}: {found}. Differences up to {widest:.2f} points remain possible."


def scope(comparison: Comparison) -> str:
    """What the intervals over seeds leave out."""
    found = {arm.name: arm.sampling.standard_error for arm in comparison.arms if arm.sampling.standard_error is not None}
    if not found:
        return "No error was measured."
    errors = ", ".join(f"{error:.2f} ({name})" for name, error in found.items())
    text = (
        "The intervals are over seeds: they hold for these validation images and these searches. The sampling error of "
        f"{comparison.workload.data.val_samples:,} images, which seeds do not show, is {errors} points (one binomial standard error)"
    )
    if len(found) == 2:
        both = math.hypot(*found.values())
        return f"{text}; {both:.2f} for a difference, less as far as both err on the same images."
    return f"{text}."


def signed(points: float) -> str:
    """+0.12, −0.04, and −0.0008 rather than −0.00, which would hide on which side of zero it is."""
    rounded = f"{points:+.2f}" if abs(points) >= 0.005 else f"{points:+.1g}" if abs(points) > 1e-9 else "0.00"
    return rounded.replace("-", "−")


def interval(pair: tuple[float, float]) -> str:
    return f"{signed(pair[0])} to {signed(pair[1])}"
