"""The tables of a report, as finished text, and their numbers in full for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from analysis.compare import ArmResult, Comparison, interval, seed_correlation, signed
from analysis.estimate import Difference, Estimate, Interval
from analysis.maps import Map
from analysis.runs import Records
from analysis.searches import Searches
from analysis.training import Anytime, Catching, Cost, Gap


@dataclass(frozen=True)
class Table:
    """Rows of finished text under their headings; the first `text_columns` are words, the others numbers."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int


METHOD_NAMES = {"welch": "Welch", "paired": "paired by seed", "seeds x images": "seeds × images"}


def arms_table(comparison: Comparison) -> Table:
    rows = tuple(
        (
            arm.name,
            ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in arm.parameters.items()) or "—",
            str(arm.error.n),
            _points(arm.error.value, arm),
            " to ".join(f"{end:.2f}".replace("-", "−") for end in arm.error.interval) if arm.error.interval else "none",
            f"{arm.sampling.standard_error:.2f}" if arm.sampling.standard_error is not None else "—",
            _points(arm.holdout.value, arm),
            f"{arm.finished} of {arm.planned}",
            str(arm.failed),
            str(arm.diverged),
            f"{arm.missing} ({arm.pending} pending)" if arm.pending else str(arm.missing),
        )
        for arm in comparison.arms
    )
    columns = ("Arm", "Best configuration", "n", "Error (%)", "95 % interval", "Sampling error", "Holdout error (%)")
    images = f"{comparison.workload.data.val_samples:,}"
    note = (
        "Error: validation top-1 error at the end of the budget, answer of the last completed cycle, mean over n seeds of the best "
        "configuration, Student's t interval. Best: by mean holdout error. Sampling error: binomial standard error of "
        f"{images} images, in points."
    )
    return Table("arms", "Arms", note, (*columns, "Trials with a result", "Failed", "Diverged", "Missing"), rows, 2)


def pairs_table(comparison: Comparison) -> Table:
    together = max((pair.difference.family for pair in comparison.pairs), default=1)
    rows = tuple(
        (
            f"{pair.a} − {pair.b}",
            METHOD_NAMES[pair.difference.method] + (", declared" if pair.declared else ""),
            pair.difference.verdict,
            str(pair.difference.n) if pair.difference.method == "paired" else f"{pair.difference.n_a}, {pair.difference.n_b}",
            signed(pair.difference.value) if math.isfinite(pair.difference.value) else "—",
            interval(pair.difference.interval) if pair.difference.interval else "none",
            interval(pair.difference.interval90) if pair.difference.interval90 else "none",
            *([interval(pair.difference.simultaneous) if pair.difference.simultaneous else "none"] if together > 1 else []),
            seed_correlation(pair.difference) or "—",
        )
        for pair in comparison.pairs
    )
    margin = max((pair.difference.margin for pair in comparison.pairs), default=0.0)
    note = (
        "Points of error, below zero the first arm is better. better, worse: the 95 % interval excludes 0; equivalent: the 90 % interval "
        f"lies within ±{margin:g} points (two one-sided tests at 5 %); else undecided. Seed correlation: over the n "
        "seeds that both arms have, Fisher's interval."
    )
    columns = ["Difference", "Method", "Verdict", "n", "Points", "95 % interval", "90 % interval", "Seed correlation"]
    if together > 1:
        columns.insert(-1, f"95 % for all {together}")
        note += (
            f" Verdicts hold for all {together} pairs together: they go by wider intervals (Bonferroni), of which the 95 % one is shown."
        )
    return Table("differences", "Differences", note, tuple(columns), rows, 3)


def trials_table(records: Records) -> Table:
    rows = tuple(
        (
            str(row["arm"]),
            str(row["phase"]),
            row["trial_id"] if isinstance(row["trial_id"], str) else "undecided",
            row["state"] if row["planned"] else f"{row['state']}, not in the study",
            row["last_error"] if isinstance(row["last_error"], str) else "",
            str(row["seed"]),
            str(row["step"]) if pd.isna(row["total_steps"]) else f"{row['step']} of {row['total_steps']}",
            str(row["attempts"]),
            f"{100 * (1 - row['anytime/val_top1']):.2f}" if math.isfinite(row["anytime/val_top1"]) else "—",
        )
        for row in records.trials.to_dict("records")
    )
    note = "Error: validation, answer of the last cycle that the trial completed. Steps: as far as MLflow has them."
    columns = ("Arm", "Phase", "Trial", "State", "Last error", "Seed", "Steps", "Attempts", "Error (%)")
    return Table("trials", "Every trial", note, columns, rows, 5)


def _points(value: float, arm: ArmResult) -> str:
    if math.isfinite(value):
        return f"{value:.2f}"
    return "diverged" if arm.error.diverged else "—"


def numbers(comparison: Comparison) -> pd.DataFrame:
    """table.csv: a row an arm, then a row a difference; empty where there is no number."""
    arms = [
        {
            "kind": "arm", "name": arm.name, "method": "t", "n": arm.error.n, "points": finite(arm.error.value),
            "ci95_low": (arm.error.interval or (None, None))[0], "ci95_high": (arm.error.interval or (None, None))[1],
            "sampling_error": arm.sampling.standard_error, "holdout_points": finite(arm.holdout.value), "planned": arm.planned,
            "finished": arm.finished, "failed": arm.failed, "diverged": arm.diverged, "missing": arm.missing, "pending": arm.pending,
            "configuration": arm.configuration, "best_trial_id": arm.best_trial_id, "parameters": json.dumps(dict(arm.parameters)),
        }
        for arm in comparison.arms
    ]  # fmt: skip
    pairs = [
        {
            "kind": "difference", "name": f"{pair.a} - {pair.b}", "method": d.method, "n": d.n, "points": finite(d.value),
            "ci95_low": (d.interval or (None, None))[0], "ci95_high": (d.interval or (None, None))[1],
            "n_a": d.n_a, "n_b": d.n_b, "correlation": d.correlation, "margin": d.margin, "verdict": d.verdict, "family": d.family,
            "ci95_simultaneous_low": (d.simultaneous or (None, None))[0], "ci95_simultaneous_high": (d.simultaneous or (None, None))[1],
        }
        for pair in comparison.pairs
        for d in [pair.difference]
    ]  # fmt: skip
    counts = ["n", "n_a", "n_b", "family", "planned", "finished", "failed", "diverged", "missing", "pending"]
    return pd.DataFrame([*arms, *pairs]).astype({name: "Int64" for name in counts if name in {*arms[0], *(pairs or arms)[0]}})


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------- what else the data allow


def budgets_table(searches: Searches) -> Table:
    """Of every comparison, at budgets that double."""
    rows = []
    for a, b in searches.noninferior:
        reach = {arm: {p.budget: p for p in searches.curves[arm]} for arm in (a, b)}
        for duel in searches.duels:
            if (duel.a, duel.b) == (a, b) and duel.budget & (duel.budget - 1) == 0:
                sides = [_with_interval(reach[arm][duel.budget].tuned) for arm in (a, b)]
                best = " / ".join(_points_or(reach[arm][duel.budget].expected) for arm in (a, b))
                wins = (
                    f"{duel.wins.value:.2f} ({_range(duel.wins.interval, '.2f')})"
                    if duel.wins.interval
                    else f"{duel.wins.value:.2f} (none)"
                )
                shown = searches.shown(a, b) or "not shown"
                rows.append((f"{a} − {b}", str(duel.budget), *sides, best, wins, duel.difference.verdict, shown))
    note = (
        "Holdout error, in %, that half of all searches of a budget end below, with the 95 % interval that two of the points give it; "
        "none: the points are too few for that budget. Expected best: its mean over searches (Dodge et al., without replacement). "
        "Ahead: probability that the first arm ends with the lower holdout error. "
        "Non-inferior from: trials from which the first arm is shown at most the margin behind. Points are taken as independent draws."
    )
    columns = ("Arms", "Trials", "First", "Second", "Expected best", "First ahead (95 % interval)", "Verdict", "Non-inferior from")
    return Table("budgets", "Tuning budgets", note, columns, tuple(rows), 1)


def maps_table(maps: Iterable[Map]) -> Table:
    rows = []
    for m in (one for made in maps for one in (made, made.in_torch_units) if one is not None):
        d = m.index
        best = f"{10**d.best:.2g} ({10 ** d.best_interval[0]:.2g} to {10 ** d.best_interval[1]:.2g})" if d.best_interval else "no basin"
        rows.append(
            (
                m.arm, m.decay_name,
                f"{d.share:z.2f}".replace("-", "−") if math.isfinite(d.share) else "—", _range(d.share_interval, ".2f"),
                signed(d.slope) if math.isfinite(d.slope) else "—", interval(d.slope_interval) if d.slope_interval else "none",
                best, f"{d.cells} of {m.errors.shape[0] * m.errors.shape[1]}", str(d.n), str(d.diverged), d.note or "—",
            )
        )  # fmt: skip
    note = (
        "Interaction: the share of the error's variation near the best that is not additive in learning rate and decay; 0 where the two "
        "decouple. Slope: decades that the best decay moves a decade of learning rate; 0 where they decouple, −1 where only their product "
        "counts. In torch's units (λ / α) a decoupled map must show a slope of about −1: the positive control. Cells: within "
        "10 points of the best, weighted by how near."
    )
    columns = (
        "Arm",
        "Decay",
        "Interaction",
        "95 % interval",
        "Slope",
        "95 % interval of it",
        "Best decay",
        "Cells",
        "n",
        "Diverged",
        "Note",
    )
    return Table("decoupling", "Do learning rate and decay decouple?", note, columns, tuple(rows), 2)


def anytime_table(course: Iterable[Anytime]) -> Table:
    rows = tuple(
        (
            one.arm, f"{epoch:g}", str(estimate.n), _points_or(estimate.value),
            _range(estimate.interval, ".2f"), _with_interval(one.area) if place == 0 else "",
        )
        for one in course
        for place, (epoch, estimate) in enumerate(one.at_cycle_ends)
    )  # fmt: skip
    note = (
        "Validation error of the answer at hand, at each end of a cycle; its mean from the first such end to the end of the budget "
        "(a single cycle has no answer before its end)."
    )
    return Table("anytime", "Anytime", note, ("Arm", "Epoch", "n", "Error (%)", "95 % interval", "Mean until the end"), rows, 1)


def catching_table(found: Iterable[Catching]) -> Table:
    rows = tuple(
        (
            one.a, one.b, f"{one.target:.2f}", f"{one.reached} of {one.seeds}",
            f"{one.epochs.value:g}" if math.isfinite(one.epochs.value) else "not reached",
            _range(one.epochs.interval, "g"), f"{one.budget / one.epochs.value:.2g}" if math.isfinite(one.epochs.value) else "—",
        )
        for one in found
    )  # fmt: skip
    note = (
        "Epochs until an arm's answer is as good as what the other ends with: median over seeds, sign test's interval (six seeds at least)."
    )
    columns = ("Arm", "Reaches the final error of", "Error (%)", "Seeds", "Epochs", "95 % interval", "Times sooner")
    return Table("catching", "Epochs to another arm's final error", note, columns, rows, 2)


def gaps_table(gaps: Iterable[Gap]) -> Table:
    rows = tuple(
        (
            f"{one.a} − {one.b}", one.split, f"{one.difference.n_a}, {one.difference.n_b}",
            signed(one.difference.value) if math.isfinite(one.difference.value) else "—",
            interval(one.difference.interval) if one.difference.interval else "none", one.difference.verdict,
            one.difference.note or _widened(one.difference) or "—",
        )
        for one in gaps
    )  # fmt: skip
    note = (
        "Difference in error between configurations of equal training loss (least squares on a quadratic in its logarithm, HC3), over the "
        "losses that both arms reach: below zero the first arm generalises better where both optimise equally well."
    )
    return Table("gap", "Generalisation gap", note, ("Arms", "Error of", "n", "Points", "95 % interval", "Verdict", "Note"), rows, 2)


def _widened(d: Difference) -> str:
    """Where an interval excludes zero: the one that the verdict goes by, if it is another."""
    if d.family == 1 or d.interval is None or d.simultaneous is None or d.interval[0] <= 0 <= d.interval[1]:
        return ""
    return f"{interval(d.simultaneous)} together with the other {d.family - 1}, by which the verdict goes"


def costs_table(costs: Iterable[Cost]) -> Table:
    rows = tuple(
        (
            one.arm, one.phase, str(one.trials), str(one.ranks), str(one.attempts), f"{one.hours:.3g}", f"{one.training:.3g}",
            f"{one.waiting:.2g}", f"{one.repeated:.2g}", f"{max(0.0, one.hours - one.training):.2g}",
        )
        for one in costs
    )  # fmt: skip
    note = (
        "Device-hours (wall time x ranks) of the trials that the study plans, from an attempt's first line in its journal to its last. "
        "What an attempt does before (imports, data, building the engine) is not in them; wrbench study status, under SLURM, counts it. "
        "Repeated: steps trained again after an interruption, part of training. Rest: evaluation, saves."
    )
    columns = ("Arm", "Phase", "Trials", "Ranks", "Attempts", "Hours", "Training", "Waiting for data", "Repeated", "Rest")
    return Table("cost", "Cost", note, columns, rows, 2)


def _with_interval(estimate: Estimate) -> str:
    value = _points_or(estimate.value)
    return f"{value} ({_range(estimate.interval, '.2f')})" if math.isfinite(estimate.value) else value


def _points_or(value: float) -> str:
    """Points, or what stands in their place."""
    return f"{value:.2f}" if math.isfinite(value) else "diverged" if math.isinf(value) else "—"


def _range(pair: Interval | None, style: str) -> str:
    return f"{pair[0]:{style}} to {pair[1]:{style}}".replace("-", "−") if pair else "none"
