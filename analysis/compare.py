"""The tables -> what they say of each arm and of each pair of arms: selection, estimates, flags, and sentences that claim no more.

Selection reads the holdout only; the validation split is reported and decides nothing. Everything here is a pure function
of `runs.Records`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pandas as pd

from analysis.estimate import Difference, Estimate, Method, difference, difference_over_images, mean, sampling_error
from analysis.runs import UNDELIVERED, Records
from harness.config import Arm, BadInput, Choice, LogUniform, Trial, WorkloadFile
from harness.correct import correct
from harness.store import ENDED, RETRIED, SEARCHED_BLIND
from harness.study import LoadedStudy, axis_values

HOLDOUT, VALIDATION = "anytime/holdout_top1", "anytime/val_top1"
"""The answer of the last completed cycle: what selection reads, and what is reported."""

FAILED = ("failed", "exhausted", "cancelled")
"""Lost to infrastructure: left out of every estimate, and counted."""

PENDING = ("pending", "queued", "running", UNDELIVERED)
"""Part of the missing ones: may still come by itself."""


def searched(study: LoadedStudy) -> tuple[str, str]:
    """(metric, name of its split) that the points of a search have: the reported one only where no finalists follow to be reported."""
    reports = study.study.finalists is None and study.workload.evaluation.val
    return (VALIDATION, "validation") if reports else (HOLDOUT, "holdout")


METHODS: tuple[Method, ...] = ("welch", "paired")

OUTER = 0.1
"""share of an axis, at either end, where a best point hints that the box was too small"""


@dataclass(frozen=True)
class ArmResult:
    """What is known of one arm. planned = finished + failed + diverged + missing; pending is a part of missing."""

    name: str
    planned: int
    finished: int
    """trials with a result: of the reported phase a validation error, of the search a holdout error"""
    failed: int
    diverged: int
    missing: int
    pending: int
    unended: int
    """the pending ones, and those that were interrupted or cancelled, which the next submission goes on with"""
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
    at_edge: tuple[str, ...]
    """of these, those in the outer tenth of their axis, in words"""
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
    declared: bool
    """by the study's method: the one a verdict is taken from"""
    unended: int = 0
    """trials of both arms that wait, run or were interrupted: until they end the verdict is not the study's"""


@dataclass(frozen=True)
class Comparison:
    study: str
    workload: WorkloadFile
    arms: tuple[ArmResult, ...]
    pairs: tuple[Pair, ...]
    """each of the study's comparisons by every method that its data allow, the declared one first"""
    flags: tuple[str, ...]
    """what makes the comparison less than fair or less than complete, one line each"""
    imagenet: str
    """what can be said of ImageNet, always said"""

    def arm(self, name: str) -> ArmResult:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def judged(self) -> tuple[Pair, ...]:
        """The comparisons by the declared method."""
        return tuple(pair for pair in self.pairs if pair.declared)


def compare(records: Records) -> Comparison:
    """Arms, pairs and flags of a study. Pairs, method and margin are those its file declares; the pairs are judged together."""
    table, study = records.trials[records.trials.planned], records.study
    phase = "finalists" if study.study.finalists else "search"
    arms = {name: _arm(name, table[table.arm == name], phase, records) for name in study.study.arms}
    declared = study.study.analysis.comparisons or ()
    pairs = tuple(pair for a, b in declared for pair in _pairs(arms[a], arms[b], len(declared), records))
    flags = tuple(_flags(records, tuple(arms.values()), len(declared)))
    return Comparison(study.name, study.workload, tuple(arms.values()), pairs, flags, _imagenet(table, study.workload))


def _pairs(a: ArmResult, b: ArmResult, family: int, records: Records) -> Iterator[Pair]:
    declared, unended = records.study.study.analysis, a.unended + b.unended
    for method in sorted(METHODS, key=lambda method: method != declared.method):
        found = difference(a.errors, b.errors, method, margin=declared.margin, family=family)
        yield Pair(a.name, b.name, found, method == declared.method, unended)
    of_a, of_b = _bits(a, records), _bits(b, records)
    if of_a is not None and of_b is not None and of_a.shape[1] == of_b.shape[1]:
        yield Pair(a.name, b.name, difference_over_images(of_a, of_b, margin=declared.margin, family=family), False, unended)


def _bits(arm: ArmResult, records: Records) -> np.ndarray | None:
    """(seeds, validation images) of the reported runs, right or wrong; None unless all that have an error kept them, of the same images."""
    rows = records.trials[records.trials.trial_id.isin(arm.trial_ids)]
    errors = {str(i): arm.errors.get(int(seed), math.nan) for i, seed in zip(rows.trial_id, rows.seed, strict=True)}
    ids = [i for i, error in errors.items() if math.isfinite(error)]
    if not ids or any(math.isinf(error) for error in errors.values()):
        return None
    try:
        found = [correct(records.store.trial(records.study.name, i), "val") for i in ids]
    except BadInput:
        return None
    there = [bits for bits in found if bits is not None]
    agree = all(abs(100 * (1 - bits.mean()) - errors[i]) < 1e-6 for i, bits in zip(ids, found, strict=True) if bits is not None)
    return np.stack(there) if len(there) == len(ids) and agree and len({len(bits) for bits in there}) == 1 else None


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
    # a point of the search is not evaluated on the validation split where finalists are
    answer = rows[VALIDATION].where(rows.phase == phase, rows[HOLDOUT])
    finished = (rows.state == "finished") & answer.map(math.isfinite)
    missing = ~(failed | diverged | finished)
    in_phase = rows[rows.phase == phase]
    search_states = rows.state[rows.phase == "search"]
    search_ended = bool(len(search_states) and search_states.isin(ENDED).all())
    never = rows.trial_id.isna() & search_ended  # finalists that an ended search has not named
    waits = ~rows.state.isin(ENDED) & ~never
    best, candidates, notes = _best(in_phase[~never[in_phase.index]], phase)
    if never.any():
        unless = ", unless what failed of the search is run again (submit --retry)" if search_states.isin(RETRIED).any() else ""
        notes.append(f"{counted(never.sum(), 'trial')} of finalists will never be{unless}: too few configurations of the search finished")
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
        pending=int((rows.state.isin(PENDING) & waits).sum()),
        unended=int(waits.sum()),
        phase=phase,
        searched=int(rows[rows.phase == "search"].config.nunique()),
        candidates=candidates,
        configuration=best,
        parameters=_parameters(name, chosen, records),
        at_edge=tuple(_at_edge(name, chosen, records)),
        trial_ids=tuple(chosen.trial_id),
        best_trial_id=next((i for i, seed in zip(chosen.trial_id, chosen.seed, strict=True) if seed == best_seed), None),
        errors=errors,
        holdout=mean(holdout),
        error=error,
        sampling=sampling_error(error.value, records.study.workload.data.val_samples),
        notes=tuple(notes),
    )


def _best(rows: pd.DataFrame, phase: str) -> tuple[str | None, int, list[str]]:
    """(configuration with the lowest mean holdout error over its seeds, number of configurations, what hinders the choice).

    A seed that diverged makes the mean infinite, so it ranks behind every configuration without; among such, fewer
    divergences come first. The first found wins among equals. A single configuration needs no holdout.
    """
    groups = {str(config): group for config, group in rows.dropna(subset="config").groupby("config", sort=False)}
    ended = {config: group for config, group in groups.items() if (group.state == "finished").any()}
    if not ended:
        why = "the search has not decided the finalists yet" if rows.trial_id.isna().any() else f"no trial of phase {phase} finished"
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


def _reported(chosen: pd.DataFrame, records: Records) -> Trial | None:
    return records.configs.get(chosen.trial_id.iloc[0]) if len(chosen) else None


def _parameters(name: str, chosen: pd.DataFrame, records: Records) -> dict[str, Any]:
    """The searched values of the chosen configuration; of an arm that searches nothing, its learning rate and decay."""
    arm, trial = records.study.study.arms[name], _reported(chosen, records)
    if trial is None:
        return {}
    fixed = {"optimizer.lr": trial.optimizer.lr, "decay.weight_decay": getattr(trial.decay, "weight_decay", None)}
    values = axis_values(arm, trial) or fixed
    return {key: value for key, value in values.items() if value is not None}


def _at_edge(name: str, chosen: pd.DataFrame, records: Records) -> Iterator[str]:
    """Where the best point hints that the box was too small, axis by axis."""
    arm, trial = records.study.study.arms[name], _reported(chosen, records)
    for key, value in axis_values(arm, trial).items() if trial is not None else ():
        axis = arm.space[key]
        if isinstance(axis, Choice):
            continue
        (low, high), scale = (axis.log_uniform, math.log) if isinstance(axis, LogUniform) else (axis.uniform, float)
        place = (scale(value) - scale(low)) / (scale(high) - scale(low))
        if not OUTER <= place <= 1 - OUTER:
            yield f"{key} {value:g} lies in the outer tenth of {low:g} to {high:g}"


# ----------------------------------------------------------------------------------------------------- flags


def _flags(records: Records, arms: tuple[ArmResult, ...], family: int) -> Iterator[str]:
    table = records.trials[records.trials.planned]
    yield from _unequal_budgets(table)
    yield from _unequal_spaces(records.study.study.arms)
    yield from _mixed(records)
    if late := (table.state == UNDELIVERED).sum():
        yield f"{late} of {len(table)} planned trials have finished, but MLflow lacks their last points: they are pending; wrbench sync"
    here = table.trial_id.map(
        lambda trial_id: isinstance(trial_id, str) and records.store.trial(records.study.name, trial_id).config.is_file()
    )
    if here.any() and (elsewhere := (table.run_id.notna() & ~here).sum()):
        yield f"{elsewhere} of {len(table)} planned trials are no longer in this store: what MLflow has of them counts"
    for arm in arms:
        parts = {"failed": arm.failed, "diverged": arm.diverged, "missing": arm.missing - arm.pending, "pending": arm.pending}
        lost = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
        if lost:
            yield f"{arm.name}: {arm.planned - arm.finished} of {arm.planned} planned trials without a result ({lost})"
        for note in arm.notes:
            yield f"{arm.name}: {note}"
        if arm.at_edge:
            yield f"{arm.name}: best point at the edge of its box: {'; '.join(arm.at_edge)}"
    if records.study.study.finalists is None and records.study.workload.evaluation.val:
        unread = table[(table.state == "finished") & table[VALIDATION].isna()].trial_id
        if blind := sum(records.store.trial(records.study.name, str(i)).is_blind() for i in unread):
            yield f"{blind} of {counted(len(table), 'planned trial')} {SEARCHED_BLIND}"
    seeds, analysis = {arm.name: arm.error.n for arm in arms}, records.study.study.analysis
    for a, b in (analysis.comparisons or ()) if analysis.method == "welch" else ():
        few, many = sorted((seeds[a], seeds[b]))
        if few == 2 < many:
            yield f"{a} and {b}: two seeds against {many}: Welch's test calls equal arms different in up to 11 % of studies, not in 5 %"
    left_over = records.trials[~records.trials.planned]
    if len(left_over):
        yield f"not of the study as it stands now, and counted nowhere: {counted(len(left_over), 'trial')} in the store"
    if family > 1:
        yield f"{family} pairs of arms are judged together: the verdicts go by intervals that are widened for that (Bonferroni)"


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


def _unequal_spaces(arms: Mapping[str, Arm]) -> Iterator[str]:
    """Searches of another number of dimensions, and decay that spares norms and biases in one arm only."""
    dimensions = {name: len(arm.space) for name, arm in arms.items()}
    if len({n for n in dimensions.values() if n}) > 1:
        yield "unequal search: dimensions: " + ", ".join(f"{name} {n}" for name, n in dimensions.items())
    spared = {name: bool(arm.decay.get("exempt_1d", False)) for name, arm in arms.items() if arm.decay.get("name") != "none"}
    if len(set(spared.values())) > 1:
        yield "decay.exempt_1d differs between the arms: " + ", ".join(f"{name} {str(value).lower()}" for name, value in spared.items())


def _mixed(records: Records) -> Iterator[str]:
    """Circumstances that must not matter, and are said when they differ within an arm or between arms."""
    table = records.trials[records.trials.planned & records.trials.run_id.notna()]
    for name in (
        "world_size", "micro_batch_size", "backend", "zero_stage", "compile", "channels_last", "deterministic", "device", "gpu", "commit",
        "data_sha256",
    ):  # fmt: skip
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
    return f"ImageNet: {counted(measured, 'trial')} measured." if measured else "ImageNet: not measured."


def sentence(pair: Pair, workload: WorkloadFile) -> str:
    """What the difference allows to say about `a` against `b` on this workload, and whether that may still change."""
    if not pair.unended:
        return _sentence(pair, workload)
    are = "trials of the two arms have" if pair.unended > 1 else "trial of the two arms has"
    return (
        f"{_sentence(pair, workload)} Not final: {pair.unended} {are} not ended, and whoever reads verdicts as seeds come in and stops at "
        "a welcome one is wrong more often than the intervals say."
    )


def _sentence(pair: Pair, workload: WorkloadFile) -> str:
    d, a, b = pair.difference, pair.a, pair.b
    where = f"On {workload.name} ({workload.data.val_samples:,} validation images)"
    if d.interval is None or d.interval90 is None:
        why = re.sub(r"^[ab](?=: )", lambda side: {"a": a, "b": b}[side[0]], d.note)
        return f"{where}, {a} and {b} cannot be compared: {why}."
    seeds = f"{d.n} seeds common to both, paired" if d.method == "paired" else f"Welch, n = {d.n_a} and {d.n_b} seeds"
    if d.family > 1 and d.simultaneous is not None:
        seeds += f"; {interval(d.simultaneous)} together with the other {d.family - 1}"
    found = f"{a} − {b} = {signed(d.value)} points of error, 95 % interval {interval(d.interval)} ({seeds})"
    if d.verdict == "better":
        return f"{where}, {a} ended with a lower validation error than {b}: {found}."
    if d.verdict == "worse":
        return f"{where}, {a} ended with a higher validation error than {b}: {found}."
    if d.verdict == "equivalent":
        within = interval(d.interval90)
        if d.family > 1 and d.simultaneous90 is not None:
            within += f", and {interval(d.simultaneous90)} together with the other {d.family - 1}"
        return f"{where}, {a} and {b} are equivalent within ±{d.margin:g} points: {found}; the 90 % interval is {within}."
    widest = max(map(abs, d.simultaneous or d.interval))
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


def published(comparison: Comparison) -> str | None:
    """The number that was published for the workload beside the lowest error here, in what they are known to differ, and what is open."""
    reference = comparison.workload.reference
    if reference is None or reference.top1_error is None:
        return None
    errors = {arm.name: arm.error for arm in comparison.arms if math.isfinite(arm.error.value)}
    here = "Nothing is measured here"
    if errors:
        name, error = min(errors.items(), key=lambda item: item[1].value)
        over = " to ".join(f"{end:.2f}".replace("-", "−") for end in error.interval) if error.interval else "none"
        among = f", the lowest of {len(errors)} arms" if len(errors) > 1 else ""
        here = f"Here {name} has {error.value:.2f} % (95 % interval {over}, n = {error.n}{among})"
    differ = f"these are known to differ: {'; '.join(reference.departures)}" if reference.departures else "none is known to differ"
    return (
        f"Published: a top-1 error of {reference.top1_error:.2f} % ({reference.source}). {here}. Of data, network, recipe, budget and "
        f"warm-up, {differ}. Optimizer, decay, the rest of the schedule and tuning are the arm's own and are not compared."
    )


def signed(points: float) -> str:
    """+0.12, −0.04, and −0.0008 rather than −0.00, which would hide on which side of zero it is."""
    # half up, of what is not rounding: means of eight seeds often end in a 5, and one mean by two methods is to read the same
    hundredths = Decimal(f"{points:.9f}").quantize(Decimal("0.01"), ROUND_HALF_UP)
    rounded = f"{hundredths:+}" if abs(points) >= 0.005 else f"{points:+.1g}" if abs(points) > 1e-9 else "0.00"
    return rounded.replace("-", "−")


def counted(number: int, what: str) -> str:
    """1 trial, 2 trials"""
    return f"{number} {what}{'' if number == 1 else 's'}"


def interval(pair: tuple[float, float]) -> str:
    return f"{signed(pair[0])} to {signed(pair[1])}"


def seed_correlation(d: Difference) -> str | None:
    """0.42 (95 % interval −0.41 to 0.87, n = 8); three seeds carry no interval."""
    if d.correlation is None:
        return None
    low_high = " to ".join(f"{end:z.2f}" for end in d.correlation_interval or ())
    how = f"95 % interval {low_high}" if low_high else "no interval"
    return f"{d.correlation:z.2f} ({how}, n = {d.correlation_n})".replace("-", "−")
