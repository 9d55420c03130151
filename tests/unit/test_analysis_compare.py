"""Selection, counting, flags and sentences on hand-made tables of trials."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis.compare import Comparison, compare, interval, published, scope, sentence, signed
from analysis.runs import Records
from harness import study
from harness.config import Reference, WorkloadFile
from harness.store import Store
from tests.synthetic import STUDY

NAN = math.nan


def trial(
    arm: str, config: str, seed: int, state: str = "finished", val: float = 0.95, holdout: float = 0.95, **more: Any
) -> dict[str, Any]:
    measured = state == "finished"
    return {
        "trial_id": f"{config}-{seed}", "arm": arm, "phase": "finalists", "seed": seed, "state": state, "planned": True, "config": config,
        "run_id": f"run-{config}-{seed}", "total_steps": 245, "budget.epochs": 7.0, "budget.global_batch_size": 100,
        "optimizer.lr": 0.01, "decay.weight_decay": 0.1,
        "anytime/val_top1": val if measured else NAN, "anytime/holdout_top1": holdout if measured else NAN,
    } | more  # fmt: skip


def undecided(arm: str) -> dict[str, Any]:
    return trial(arm, "", 0, "pending") | {"trial_id": None, "config": None, "run_id": None}


def compared(
    tmp_path: Path, rows: list[dict[str, Any]], finalists: bool = True, arms: tuple[str, ...] = ("AdamWR", "SGDWR"), **more: Any
) -> Comparison:
    blocks = {arm: STUDY["arms"].get(arm, STUDY["arms"]["AdamWR"] | {"schedule": {"name": "cosine"}}) for arm in arms}
    document = STUDY | {"arms": blocks, "finalists": STUDY["finalists"] if finalists else None} | more
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    table = pd.DataFrame([row if finalists else row | {"phase": "search"} for row in rows])
    return compare(Records(study.load(path), Store(tmp_path), {}, pd.DataFrame(), {}, table))


def seeds(arm: str, config: str, vals: list[float], **more: Any) -> list[dict[str, Any]]:
    return [trial(arm, config, 1000 + i, val=val, **more) for i, val in enumerate(vals)]


ADAM, SGD = seeds("AdamWR", "a", [0.95, 0.951, 0.952]), seeds("SGDWR", "s", [0.94, 0.941, 0.943])


# ------------------------------------------------------------------------------------------------- selection


def test_selection_reads_the_holdout_and_never_the_reported_split(tmp_path: Path) -> None:
    rows = [*seeds("AdamWR", "good", [0.90, 0.90], holdout=0.97), *seeds("AdamWR", "lucky", [0.99, 0.98], holdout=0.96), *SGD]
    arm = compared(tmp_path, rows).arms[0]
    assert arm.configuration == "good"
    assert arm.error.value == pytest.approx(10)
    assert arm.candidates == 2


def test_selection_is_by_the_mean_over_seeds(tmp_path: Path) -> None:
    one_lucky_seed = [trial("AdamWR", "wild", 1, holdout=0.99), trial("AdamWR", "wild", 2, holdout=0.80)]
    steady = [trial("AdamWR", "steady", 1, holdout=0.95), trial("AdamWR", "steady", 2, holdout=0.94)]
    assert compared(tmp_path, [*one_lucky_seed, *steady, *SGD]).arms[0].configuration == "steady"


def test_a_diverged_seed_ranks_last_and_a_failed_one_is_left_out(tmp_path: Path) -> None:
    diverged = [trial("AdamWR", "d", 1, holdout=0.99), trial("AdamWR", "d", 2, "diverged")]
    failed = [trial("AdamWR", "f", 1, holdout=0.90), trial("AdamWR", "f", 2, "failed")]
    arm = compared(tmp_path, [*diverged, *failed, *SGD]).arms[0]
    assert (arm.configuration, arm.error.n, arm.failed, arm.diverged, arm.finished) == ("f", 1, 1, 1, 2)


def test_the_best_trial_is_the_one_with_the_best_holdout(tmp_path: Path) -> None:
    rows = [trial("AdamWR", "a", 1, holdout=0.93, val=0.99), trial("AdamWR", "a", 2, holdout=0.94, val=0.90), *SGD]
    assert compared(tmp_path, rows).arms[0].best_trial_id == "a-2"


def test_without_any_holdout_several_configurations_cannot_be_told_apart(tmp_path: Path) -> None:
    rows = [*seeds("AdamWR", "x", [0.9], holdout=NAN), *seeds("AdamWR", "y", [0.8], holdout=NAN), *seeds("SGDWR", "s", [0.9], holdout=NAN)]
    several, single = compared(tmp_path, rows).arms
    assert several.configuration is None
    assert "anytime/holdout_top1 is missing" in several.notes[0]
    assert single.configuration == "s"  # one configuration needs no choice


# -------------------------------------------------------------------------------------------------- counting


def test_every_planned_trial_is_counted_once(tmp_path: Path) -> None:
    states = ["finished", "failed", "diverged", "pending", "running", "interrupted", "queued", "cancelled"]
    rows = [trial("AdamWR", "a", i, state) for i, state in enumerate(states)] + [trial("AdamWR", "a", 99, val=NAN), *SGD]
    arm = compared(tmp_path, rows).arms[0]
    assert (arm.planned, arm.finished, arm.failed, arm.diverged, arm.missing, arm.pending) == (9, 1, 2, 1, 5, 3)
    assert arm.planned == arm.finished + arm.failed + arm.diverged + arm.missing


def test_a_diverged_seed_of_the_reported_configuration_leaves_no_mean_and_no_verdict(tmp_path: Path) -> None:
    comparison = compared(tmp_path, [*ADAM, trial("AdamWR", "a", 1003, "diverged"), *SGD])
    arm = comparison.arms[0]
    assert (arm.error.value, arm.error.interval, arm.error.n, arm.error.diverged) == (math.inf, None, 3, 1)
    assert "1 of 4 seeds diverged (1003), so there is no mean; the other 3: 4.90 points" in arm.notes
    assert {pair.difference.verdict for pair in comparison.pairs} == {"undecided"}


@pytest.mark.parametrize(("val", "said"), [(NAN, "anytime/val_top1 is missing"), (math.inf, "anytime/val_top1 is missing")])
def test_a_finished_seed_without_a_value_is_said_and_not_made_up(tmp_path: Path, val: float, said: str) -> None:
    arm = compared(tmp_path, [*ADAM, trial("AdamWR", "a", 1003, val=val), *SGD]).arms[0]
    assert (arm.error.n, arm.error.missing, arm.missing) == (3, 1, 1)
    assert any(said in note and "1003" in note for note in arm.notes)


def test_undecided_finalists_leave_an_arm_without_a_number(tmp_path: Path) -> None:
    comparison = compared(tmp_path, [undecided("AdamWR"), *SGD])
    arm = comparison.arms[0]
    assert (arm.configuration, arm.best_trial_id, arm.error.n, arm.pending) == (None, None, 0, 1)
    assert math.isnan(arm.error.value)
    assert "the search has not decided the finalists yet" in arm.notes
    assert "cannot be compared" in sentence(comparison.pairs[0], comparison.workload)


def test_a_finalist_that_the_search_left_nameless_is_not_waited_for(tmp_path: Path) -> None:
    search = [trial("AdamWR", "a", 0) | {"phase": "search"}] + [trial("AdamWR", c, 0, "diverged") | {"phase": "search"} for c in "bc"]
    arm = compared(tmp_path, [*search, *ADAM, undecided("AdamWR"), *SGD]).arms[0]
    assert (arm.pending, arm.missing, arm.unended) == (0, 1, 0)
    assert "1 trial of finalists will never be: too few configurations of the search finished" in arm.notes
    failed = [*search[:1], trial("AdamWR", "b", 0, "failed") | {"phase": "search"}, search[2]]
    retried = compared(tmp_path, [*failed, *ADAM, undecided("AdamWR"), *SGD]).arms[0].notes
    assert any("will never be, unless what failed of the search is run again (submit --retry): too few" in note for note in retried)
    nobody = compared(tmp_path, [*search[1:], undecided("AdamWR"), *SGD]).arms[0]
    assert nobody.notes[0] == "no trial of phase finalists finished"
    running = compared(tmp_path, [*search[1:], trial("AdamWR", "a", 0, "running") | {"phase": "search"}, undecided("AdamWR"), *SGD]).arms[0]
    assert (running.pending, running.notes) == (2, ("the search has not decided the finalists yet",))


# ----------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_in_the_order_of_the_study_by_both_methods(tmp_path: Path) -> None:
    comparison = compared(tmp_path, [*ADAM, *SGD, *seeds("AdamW", "w", [0.93, 0.92])], arms=("AdamWR", "SGDWR", "AdamW"))
    assert [(p.a, p.b, p.difference.method) for p in comparison.pairs] == [
        (a, b, method) for a, b in (("AdamWR", "SGDWR"), ("AdamWR", "AdamW"), ("SGDWR", "AdamW")) for method in ("welch", "paired")
    ]
    assert any("3 pairs of arms" in flag for flag in comparison.flags)
    assert [p.difference.n for p in comparison.pairs] == [3, 3, 2, 2, 2, 2]


def test_a_sentence_claims_what_the_interval_allows(tmp_path: Path) -> None:
    def said(adam: list[float], sgd: list[float]) -> str:
        comparison = compared(tmp_path, [*seeds("AdamWR", "a", adam), *seeds("SGDWR", "s", sgd)])
        return sentence(comparison.pairs[0], comparison.workload)

    better, worse = said([0.95, 0.951, 0.952], [0.94, 0.941, 0.942]), said([0.94, 0.941, 0.942], [0.95, 0.951, 0.952])
    assert better.startswith("On mnist5k_cnn (1,000 validation images), AdamWR ended with a lower validation error than SGDWR:")
    assert "AdamWR − SGDWR = −1.00 points of error, 95 % interval −1.23 to −0.77 (Welch, n = 3 and 3 seeds)" in better
    assert "a higher validation error than SGDWR" in worse
    undecided = said([0.95, 0.94, 0.93], [0.95, 0.941, 0.928])
    assert "undecided" in undecided
    assert "remain possible" in undecided
    close = [0.95, 0.9501, 0.9502, 0.9503]
    assert "equivalent within ±0.2 points" in said(close, close[::-1])
    assert "AdamWR and SGDWR cannot be compared: AdamWR: one value: no interval." in said([0.95], [0.94, 0.95])


@pytest.mark.parametrize("state", ["running", "pending", "interrupted"])
def test_a_verdict_before_the_end_is_called_not_final(tmp_path: Path, state: str) -> None:
    """Read after each of seeds 2 to 8, equal arms are once called apart in 14 % of studies, not in 5."""

    def said(rows: list[dict[str, Any]]) -> str:
        comparison = compared(tmp_path, rows)
        return sentence(comparison.pairs[0], comparison.workload)

    whole = said([*ADAM, *SGD])
    assert "AdamWR ended with a lower validation error" in whole and "Not final" not in whole
    open_ones = [trial("AdamWR", "a", seed, state) for seed in (1003, 1004)]
    assert said([*ADAM, *SGD, *open_ones]).startswith(f"{whole} Not final: 2 trials of the two arms have not ended")
    assert said([*ADAM, *SGD, trial("AdamWR", "a", 1003, "failed")]) == whole


def test_an_equivalent_of_several_pairs_names_both_intervals(tmp_path: Path) -> None:
    """The table's 90 % interval is the one of this pair alone."""
    close = [0.95, 0.9501, 0.9502, 0.9503]
    rows = [row for arm in ("AdamWR", "SGDWR", "AdamW") for row in seeds(arm, arm, close)]
    comparison = compared(tmp_path, rows, arms=("AdamWR", "SGDWR", "AdamW"))
    text, d = sentence(comparison.pairs[0], comparison.workload), comparison.pairs[0].difference
    assert d.interval90 is not None and d.simultaneous90 is not None
    assert f"the 90 % interval is {interval(d.interval90)}, and {interval(d.simultaneous90)} together with the other 2." in text


def test_the_sampling_error_of_the_split_stands_beside(tmp_path: Path) -> None:
    text = scope(compared(tmp_path, [*ADAM, *SGD]))
    assert "1,000 images" in text
    assert "0.68 (AdamWR), 0.74 (SGDWR) points" in text
    assert scope(compared(tmp_path, [undecided("AdamWR"), undecided("SGDWR")])) == "No error was measured."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.574, "−0.57"),
        (0.2, "+0.20"),
        (-0.0004, "−0.0004"),
        (1e-15, "0.00"),
        (0.0, "0.00"),
        (-12.0, "−12.00"),
        (0.275 - 1e-15, "+0.28"),
        (1.025, "+1.03"),
    ],
)
def test_a_small_difference_keeps_its_sign(value: float, text: str) -> None:
    assert signed(value) == text


# ----------------------------------------------------------------------------------------------------- flags


def flags(tmp_path: Path, rows: list[dict[str, Any]], finalists: bool = True, **more: Any) -> str:
    return "\n".join(compared(tmp_path, rows, finalists, **more).flags)


def test_a_complete_and_equal_study_has_no_flag(tmp_path: Path) -> None:
    same = {"tag.commit": "c1", "tag.world_size": "2"}
    assert flags(tmp_path, [row | same for row in [*ADAM, *SGD]]) == ""


def test_unequal_budgets_are_flagged(tmp_path: Path) -> None:
    longer = seeds("SGDWR", "s", [0.94, 0.95], total_steps=490, **{"budget.epochs": 14.0})
    said = flags(tmp_path, [*ADAM, *longer])
    assert "unequal budgets: epochs: AdamWR 7, SGDWR 14" in said
    assert "unequal budgets: optimizer steps: AdamWR 245, SGDWR 490" in said
    search = [trial("AdamWR", c, 0) for c in "abc"] + [trial("SGDWR", "s", 0)]
    assert "unequal budgets: configurations searched: AdamWR 3, SGDWR 1" in flags(tmp_path, search, finalists=False)


@pytest.mark.parametrize("tag", ["world_size", "backend", "micro_batch_size", "commit", "zero_stage", "deterministic", "data_sha256"])
def test_mixed_circumstances_are_flagged(tmp_path: Path, tag: str) -> None:
    name, column = tag.replace("_", " "), f"tag.{tag}"
    within = [row | {column: "y" if i == 1 else "x"} for i, row in enumerate([*ADAM, *SGD])]
    assert f"{name} differs within an arm: AdamWR x (2), y (1); SGDWR x (3)" in flags(tmp_path, within)
    between = [row | {column: row["arm"][0]} for row in [*ADAM, *SGD]]
    assert f"{name} differs between the arms: AdamWR A (3); SGDWR S (3)" in flags(tmp_path, between)


def test_selection_and_report_on_the_same_runs_is_said_where_it_applies(tmp_path: Path) -> None:
    several = [trial("AdamWR", "a", 0, holdout=0.9), trial("AdamWR", "b", 0, holdout=0.95), trial("SGDWR", "s", 0)]
    said = flags(tmp_path, several, finalists=False)
    assert "AdamWR: chosen and reported on the same runs" in said
    assert "SGDWR: chosen" not in said  # a single configuration was not chosen
    assert "chosen and reported" not in flags(tmp_path, [*ADAM, *SGD])


def test_two_seeds_against_more_are_told(tmp_path: Path) -> None:
    """100,000 simulated pairs of 2 and 8 seeds: 10.7 % where sds are 4 and 1, 9.1 % where they are equal; of 2 and 2 at most 4.2 %."""
    assert "AdamWR and SGDWR: two seeds against 3: " in flags(tmp_path, [*ADAM[:2], *SGD])
    assert "two seeds" not in flags(tmp_path, [*ADAM, *SGD])
    assert "two seeds" not in flags(tmp_path, [*ADAM[:2], *SGD[:2]])
    assert "two seeds" not in flags(tmp_path, [*ADAM[:2], *SGD], analysis={"method": "paired"})


def test_trials_outside_the_study_count_nowhere_and_are_said(tmp_path: Path) -> None:
    comparison = compared(tmp_path, [*ADAM, *SGD, trial("SGDWR", "old", 5, val=0.99) | {"planned": False}])
    assert comparison.arms[1].planned == 3
    assert any(flag.endswith("counted nowhere: 1 trial in the store") for flag in comparison.flags)


# -------------------------------------------------------------------------------------------------- ImageNet


def workload_with_data(comparison: Comparison, name: str) -> WorkloadFile:
    workload = comparison.workload
    return workload.model_copy(update={"data": workload.data.model_copy(update={"name": name})})


@pytest.mark.parametrize(
    ("name", "measured"),
    [("imagenet", True), ("ilsvrc2012", True), ("ImageNet-1k", True), ("imagenet32", False), ("imagenet64", False), ("mnist5k", False)],
)
def test_imagenet_is_measured_only_by_trials_of_imagenet(tmp_path: Path, name: str, measured: bool) -> None:
    from analysis.compare import _imagenet

    comparison = compared(tmp_path, [*ADAM, *SGD])
    workload = workload_with_data(comparison, name)
    assert comparison.imagenet == "ImageNet: not measured."
    table = pd.DataFrame([*ADAM, *SGD])
    assert (_imagenet(table, workload) == "ImageNet: 6 trials measured.") is measured
    assert _imagenet(table.assign(**{"anytime/val_top1": NAN}), workload) == "ImageNet: not measured."


def test_the_published_number_stands_beside_the_lowest_error_here(tmp_path: Path) -> None:
    comparison = compared(tmp_path, [*ADAM, *SGD])
    assert published(comparison) is None, "mnist5k has no reference"
    reference = Reference(
        source="a paper", top1_error=4.0, parameters=1, gpu="A100", images_per_second=1, departures=("budget.epochs: 3 instead of 9",)
    )

    def beside(**changes: object) -> str | None:
        workload = comparison.workload.model_copy(update={"reference": reference.model_copy(update=changes)})
        return published(replace(comparison, workload=workload))

    lowest = min(comparison.arms, key=lambda arm: arm.error.value)
    said = beside()
    assert said is not None and said.startswith(
        f"Published: a top-1 error of 4.00 % (a paper). Here {lowest.name} has {lowest.error.value:.2f} %"
    )
    compared_in = "n = 3, the lowest of 2 arms). Of data, network, recipe, budget and warm-up, "
    left = ". Optimizer, decay, the rest of the schedule and tuning are the arm's own and are not compared."
    assert said.endswith(f"{compared_in}these are known to differ: budget.epochs: 3 instead of 9{left}")
    assert str(beside(departures=())).endswith(f"{compared_in}none is known to differ{left}")
    assert beside(top1_error=None) is None
    unmeasured = replace(comparison, arms=tuple(replace(arm, error=replace(arm.error, value=NAN)) for arm in comparison.arms))
    workload = comparison.workload.model_copy(update={"reference": reference})
    assert "Nothing is measured here." in str(published(replace(unmeasured, workload=workload)))
