"""The course of training and the answers, on hand-made records of a small study."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis import figures, tables
from analysis.compare import HOLDOUT, VALIDATION, Pair, compare
from analysis.estimate import beats, tuned_difference
from analysis.questions import _at_equal_budgets, _percent, answers
from analysis.report import escape_latex
from analysis.runs import Records
from analysis.searches import Duel, Searches, searches
from analysis.training import LossPoints, anytime, catching, gaps
from harness import schedule, study
from harness.store import Store
from tests.synthetic import STUDY

Curve = list[float]
"""validation error (points) at the ends of cycles, at epochs 1, 3 and 7; fewer: diverged after the last"""


def made(tmp_path: Path, curves: dict[str, list[Curve]], **more: Any) -> Records:
    """A study of one configuration an arm, reported as searched: arm -> a curve a seed."""
    arms = {arm: STUDY["arms"].get(arm, STUDY["arms"]["AdamWR"]) for arm in curves}
    seeds = len(next(iter(curves.values())))
    document = STUDY | {"arms": arms, "search": {"points": 1, "seeds": seeds}, "finalists": None} | more
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    loaded = study.load(tmp_path / "study.yaml")
    rows, points, configs = [], [], {}
    for place, trial in enumerate(p.trial for p in study.planned(loaded, {}) if p.trial):
        curve, ends = curves[trial.arm][place % seeds], schedule.cycle_ends(trial)
        finished = len(curve) == len(ends)
        answer = 1 - curve[-1] / 100 if finished else math.nan
        rows.append(
            {
                "trial_id": trial.trial_id, "arm": trial.arm, "phase": trial.phase, "seed": trial.seed, "planned": True,
                "state": "finished" if finished else "diverged", "config": trial.configuration, "run_id": trial.trial_id,
                HOLDOUT: answer, VALIDATION: answer,
            }
        )  # fmt: skip
        for end, error in zip(ends, curve, strict=False):
            values = {VALIDATION: 1 - error / 100, "val/top1": 1 - error / 100, "epoch": end / schedule.steps_per_epoch(trial)}
            points += [(trial.trial_id, metric, end - 1, value) for metric, value in values.items()]
        configs[trial.trial_id] = trial
    frame = pd.DataFrame(points, columns=["trial_id", "metric", "step", "value"]).astype({"trial_id": "category", "metric": "category"})
    return Records(loaded, Store(tmp_path), {}, frame, configs, pd.DataFrame(rows))


def test_a_run_that_diverged_counts_in_the_course_of_training(tmp_path: Path) -> None:
    """It has the answers that it gave, then none: not the course of those that survived."""
    records = made(tmp_path, {"AdamWR": [[9.0, 5.0, 4.0], [9.0, 4.0, 4.2], [9.0], [9.5, 6.0]], "SGDWR": [[9.0, 6.0, 4.0]] * 4})
    comparison = compare(records)
    adam, _ = anytime(records, comparison)
    assert [(epoch, one.value, one.n) for epoch, one in adam.at_cycle_ends] == [
        (1, pytest.approx(9.125), 4), (3, math.inf, 3), (7, math.inf, 2),
    ]  # fmt: skip
    assert (adam.area.value, adam.area.diverged) == (math.inf, 1)  # one had an answer until the end of the last cycle
    (caught,) = (one for one in catching(records, comparison) if (one.a, one.b) == ("AdamWR", "SGDWR"))
    assert (caught.target, caught.reached, caught.seeds) == (pytest.approx(4.0), 2, 4)
    assert caught.epochs.value == math.inf  # of the two survivors it is 5
    assert [row[3] for row in tables.anytime_table([adam]).rows] == ["9.12", "diverged", "diverged"]


def test_a_line_ends_where_a_seed_has_diverged(tmp_path: Path) -> None:
    """Beyond, it would be the mean of those that survived."""
    curves = {
        "AdamWR": [[9.0, 5.0, 4.0], [9.0, 4.0, 4.2], [9.0], [9.5, 6.0]],
        "SGDWR": [[9.0, 6.0, 4.0]] * 4,
        "Third": [[], *[[9, 6, 4.0]] * 3],
    }
    records = made(tmp_path, curves)
    comparison = compare(records)
    table = figures.curves(records, comparison)
    for drawn, epochs in ((figures.error_by_epoch, ({1}, {1, 3, 7}, set())), (figures.anytime, ({1, 3}, {1, 3, 7, 1.04 * 7}, set()))):
        (axes,) = drawn(table, comparison).axes
        for look, expected in zip(figures.looks(comparison).values(), epochs, strict=True):
            assert {x for line in axes.lines if line.get_color() == look.color for x in np.asarray(line.get_xdata())} == expected
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()][:3] == [
            "AdamWR (n = 4 seeds, 2 diverged: no mean from there)",
            "SGDWR (n = 4 seeds)",
            "Third (n = 4 seeds, 1 diverged: no mean from there)",
        ]


def test_gaps_are_judged_together_as_the_comparisons_are(tmp_path: Path) -> None:
    """Six of them called two equal arms apart in a fifth of all studies, not in a twentieth."""
    records = made(tmp_path, {arm: [[9.0, 5.0, 4.0]] * 2 for arm in ("AdamWR", "SGDWR", "Third", "Fourth")})
    rng = np.random.default_rng(3)
    loss = np.exp(rng.uniform(-3, 0, 80))
    arm = np.repeat(["AdamWR", "SGDWR", "Third", "Fourth"], 20)
    error = 20 + 2 * np.log(loss) + 0.24 * (arm == "Third") + 0.3 * rng.standard_normal(80)
    found = gaps(records, compare(records), LossPoints(pd.DataFrame({"arm": arm, "loss": loss, "error": error}), "holdout"))
    assert {one.difference.family for one in found} == {6}
    alone = [one for one in found if one.difference.interval and not one.difference.interval[0] <= 0 <= one.difference.interval[1]]
    together = [one for one in alone if one.difference.verdict in ("better", "worse")]
    assert len(together) < len(alone)
    notes = [row[-1] for row in tables.gaps_table(found).rows]
    assert sum("together with the other 5, by which the verdict goes" in note for note in notes) == len(alone)


def test_a_pair_that_differs_in_schedule_too_is_not_passed_off_as_the_effect_of_one_thing(tmp_path: Path) -> None:
    adam, sgd = STUDY["arms"]["AdamWR"], STUDY["arms"]["SGDWR"]
    arms = {"AdamWR": adam, "Adam": adam | {"decay": {"name": "l2"}, "schedule": {"name": "cosine"}}, "SGDWR": sgd}
    arms |= {"SGDW": sgd | {"schedule": {"name": "cosine"}}, "SGDR": sgd | {"decay": {"name": "l2"}}}
    curves = {"AdamWR": [[9.0, 5.0, 4.0]] * 2, "Adam": [[4.0]] * 2, "SGDWR": [[9.0, 5.0, 4.1]] * 2}
    curves |= {"SGDW": [[4.0]] * 2, "SGDR": [[9.0, 6.0, 5.0]] * 2}
    for name in arms:
        arms[name] = arms[name] | {"space": {"optimizer.lr": {"log_uniform": [0.01, 0.1]}}}
        arms[name]["decay"] = arms[name]["decay"] | {"weight_decay": 0.01}
    records = made(tmp_path, curves, arms=arms)
    found = compare(records)
    pays, behind, _ = answers(records, found, searches(records, found), ())
    differ = "differ in their schedules too"
    assert pays.text.count(differ) == 2  # AdamWR and Adam, SGDW and SGDR; not SGDWR and SGDR
    assert "AdamWR and Adam cannot be compared" in pays.text
    assert "(cosine_restarts and cosine), so this is not the effect of the decay alone." in pays.text
    assert behind.text.count(differ) == 1 and "the effect of the optimizer alone" in behind.text


@pytest.mark.parametrize(
    ("adam", "sgd", "how"),
    [
        ({"warmup_epochs": {"uniform": [0, 0.5]}}, {"warmup_epochs": {"uniform": [0, 0.5]}}, None),
        ({"warmup_epochs": {"uniform": [0, 0.5]}}, {"warmup_epochs": {"uniform": [0, 1]}}, "schedule.warmup_epochs"),
        ({"warmup_epochs": {"uniform": [0, 0.5]}}, {}, "schedule.warmup_epochs"),
        ({"warmup_epochs": 0}, {}, None),
        ({"t_mult": 1, "eta_min": 0.1}, {}, "schedule.t_mult, schedule.eta_min"),
    ],
)
def test_schedules_differ_as_they_are_written_and_not_as_they_are_drawn(
    tmp_path: Path, adam: dict[str, Any], sgd: dict[str, Any], how: str | None
) -> None:
    """The first trials of two arms that search the same schedule have two of its values."""
    arms = {}
    for name, changes in (("AdamWR", adam), ("SGDWR", sgd)):
        arm = STUDY["arms"][name]
        axes = {f"schedule.{key}": value for key, value in changes.items() if isinstance(value, dict)}
        held = {key: value for key, value in changes.items() if not isinstance(value, dict)}
        arms[name] = arm | {"space": arm["space"] | axes, "schedule": arm["schedule"] | held}
    records = made(tmp_path, dict.fromkeys(arms, [[9.0, 5.0, 4.0]] * 2), arms=arms)
    found = compare(records)
    _, behind, _ = answers(records, found, searches(records, found), ())
    assert "AdamWR" in behind.text
    told = behind.text.partition("These two differ in their schedules too (")[2].partition(")")[0]
    assert told == (how or "")


def test_what_the_points_do_not_reach_is_not_called_shown() -> None:
    """Steady a beats broad b for few trials and loses to it for many, of which sixteen points cannot tell."""
    rng = np.random.default_rng(2)
    a, b = 20.8 + 0.3 * rng.random(16), 20 + rng.chisquare(3, 16)
    duels = tuple(Duel("a", "b", k, beats(a, b, k), tuned_difference(a, b, k)) for k in range(1, 9))
    found = Searches({}, {}, duels, {("a", "b"): 1}, ())
    assert duels[-1].wins.value < 0.5 and duels[-1].difference.simultaneous90 is None
    assert found.shown("a", "b") == "1 to 3"
    assert Searches({}, {}, duels, {("a", "b"): 3}, ()).shown("a", "b") == "3"
    assert Searches({}, {}, duels, {("a", "b"): None}, ()).shown("a", "b") is None
    pair = Pair("a", "b", duels[0].difference, declared=True)
    said = " ".join(_at_equal_budgets(pair, found))
    assert said.endswith("that a is at most 0.2 points behind, by holdout error, is shown for tuning with 1 to 3 trials.")


def test_a_share_just_below_zero_is_no_negative_zero_and_latex_knows_every_character() -> None:
    assert [_percent(share) for share in (-0.004, -0.03, 0.204)] == ["0", "−3", "20"]
    # pdflatex stops at a Greek letter: "Unicode character not set up for use with LaTeX"
    assert escape_latex("λ_norm, λ / α; seeds × images") == r"$\lambda$\_norm, $\lambda$ / $\alpha$; seeds $\times$ images"
