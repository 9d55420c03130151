"""Ids that name results, points that do not move, finalists that wait for the holdout."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import config, study
from harness.config import BadInput
from tests.trials import trial

DEMO = Path("configs/study/demo.yaml")


def written(tmp_path: Path, document: dict[str, Any], name: str = "s") -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def demo() -> dict[str, Any]:
    return yaml.safe_load(DEMO.read_text())


def ids(path: Path, *overrides: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for p in study.planned(study.load(path, overrides), {}):
        if p.trial is not None:
            found.setdefault(p.arm, []).append(p.trial.trial_id)
    return found


def test_the_id_is_the_same_for_ever_and_in_every_process() -> None:
    assert trial().trial_id == "2fdc4566be16"  # a change here renames every result that users have
    code = "from tests.trials import trial; print(trial().trial_id)"
    for salt in ("0", "1"):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": salt})
        assert out.stdout.strip() == "2fdc4566be16", out.stderr


@pytest.mark.parametrize(
    "over",
    [
        {"seed": 1},
        {"optimizer": {"name": "adam", "lr": 2e-3}},
        {"optimizer": {"name": "adam", "lr": 1e-3, "eps": 1e-6}},
        {"decay": {"name": "decoupled", "weight_decay": 0.05}},
        {"decay": {"name": "decoupled", "weight_decay": 0.05, "normalised": True, "exempt_1d": True}},
        {"schedule": {"name": "cosine_restarts", "t_0": 1, "t_mult": 3}},
        {"budget": {"epochs": 7, "global_batch_size": 50}},
        {"recipe": {"label_smoothing": 0.1}},
        {"recipe": {"precision": "bf16"}},
        {"data": {"holdout_per_class": 40}},
        {"data": {"train_on": "train+holdout"}},
        {"data": {"name": "other"}},
    ],
)
def test_what_defines_the_result_changes_the_id(over: dict[str, Any]) -> None:
    assert trial(**over).trial_id != trial().trial_id


@pytest.mark.parametrize(
    "over",
    [
        {"arm": "B"},
        {"phase": "finalists"},
        {"study": "other"},
        {"backend": {"zero_stage": 1, "micro_batch_size": 10}},
        {"evaluation": {"log_every_steps": 3}},
        {"checkpoint": {"keep": 9}},
        {"data": {"path": "/elsewhere"}},
        {"optimizer": {"name": "adam", "lr": 0.001, "eps": 1e-8, "betas": [0.9, 0.999]}},  # defaults, written out
        {"schedule": {"name": "cosine_restarts", "t_0": 1.0, "t_mult": 2.0, "warmup_epochs": 0}},
        {"budget": {"epochs": 7.0, "global_batch_size": 100}},
    ],
)
def test_what_does_not_keeps_it(over: dict[str, Any]) -> None:
    assert trial(**over).trial_id == trial().trial_id


@pytest.mark.parametrize("sampler", ["sobol", "halton"])
def test_more_points_seeds_or_arms_change_no_existing_id(tmp_path: Path, demo: dict[str, Any], sampler: str) -> None:
    demo["sampler"] = {"name": sampler}
    before = ids(written(tmp_path, demo))
    more = copy.deepcopy(demo)
    more["search"] = {"points": 11, "seeds": 2}
    more["arms"] = {"New": copy.deepcopy(demo["arms"]["SGDWR"]) | {"schedule": {"name": "cosine"}}} | more["arms"]
    after = ids(written(tmp_path, more))
    for arm, old in before.items():
        assert [i for i in after[arm] if i in old] == old  # all there, in the same order
        assert after[arm][::2][: len(old)] == old  # the prefix property: seed 0 of the first points
        assert len(after[arm]) == 22


def test_arms_draw_different_points_and_values_are_within_the_box(demo: dict[str, Any], tmp_path: Path) -> None:
    demo["search"]["points"] = 64
    planned = [p.trial for p in study.planned(study.load(written(tmp_path, demo)), {}) if p.trial]
    lr = {arm: [t.optimizer.lr for t in planned if t.arm == arm] for arm in ("AdamWR", "SGDWR")}
    assert all(0.001 <= v <= 0.01 for v in lr["AdamWR"])
    assert all(0.01 <= v <= 0.1 for v in lr["SGDWR"])
    assert max(abs(a / 0.001 - b / 0.01) for a, b in zip(lr["AdamWR"], lr["SGDWR"], strict=True)) > 0.1
    assert len({round(v, 12) for v in lr["AdamWR"]}) == 64


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path, demo: dict[str, Any]) -> None:
    demo |= {"sampler": {"name": "grid"}, "search": {"seeds": 2}}
    del demo["finalists"]
    for arm in demo["arms"].values():
        arm["space"] = {"optimizer.lr": {"log_uniform": [0.001, 0.1], "num": 3}, "decay.weight_decay": {"choice": [0, 0.1]}}
    trials = [p.trial for p in study.planned(study.load(written(tmp_path, demo)), {}) if p.trial]
    assert len(trials) == 2 * 6 * 2
    assert {t.optimizer.lr for t in trials} == {0.001, 0.01, 0.1}


@pytest.mark.parametrize("sampler", ["sobol", "halton"])
def test_the_points_of_an_arm_are_distinct_and_more_of_them_move_none(tmp_path: Path, demo: dict[str, Any], sampler: str) -> None:
    space = {"optimizer.lr": {"choice": [0.05, 0.1, 0.2]}, "schedule.t_mult": {"choice": [1, 2, 3]}}
    demo["arms"] = {"A": {"optimizer": {"name": "sgd"}, "schedule": {"name": "cosine_restarts", "t_0": 1}, "space": space}}
    demo |= {"sampler": {"name": sampler}, "finalists": {"top": 2, "seeds": 2}}
    file = written(tmp_path, demo)
    all_of_them = ids(file, "search.points=9")["A"]
    assert len(set(all_of_them)) == 9
    for n in range(2, 9):
        assert ids(file, f"search.points={n}")["A"] == all_of_them[:n]
    chosen = study.planned(study.load(file, ["search.points=9"]), dict.fromkeys(all_of_them, 0.5))
    assert len({p.trial.trial_id for p in chosen if p.trial and p.phase == "finalists"}) == 4, "two configurations"
    with pytest.raises(
        BadInput, match=r"s\.yaml: search\.points: 10 must be at most the 9 configuration\(s\) .* A; e\.g\. search\.points=9$"
    ):
        ids(file, "search.points=10")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["arms.SGDWR.space.optimizer.lr={log_uniform: [1, 1.00002]}", "arms.SGDWR.space.decay.weight_decay={choice: [0]}"],
         "search.points: 4 must be at most the 3 configuration(s) of the space of arm SGDWR; e.g. search.points=3"),
        (["arms.SGDWR.space.optimizer.lr={choice: [0.1, 1e-1]}"], "arms.SGDWR.space.optimizer.lr.choice: '1e-1' is there twice; leave one out"),
        (["arms.SGDWR.space.optimizer.lr_in_buffer={choice: [true, 'on']}", "search.points=8", "arms.SGDWR.space.optimizer.lr={choice: [1]}", "arms.SGDWR.space.decay.weight_decay={choice: [0, 1, 2, 3]}"],
         "arms.SGDWR: two points of its space are one trial,"),
        (["sampler.name=grid", "search.points=null", *(f"arms.{arm}.space.{key}.num=2" for arm in ("AdamWR", "SGDWR") for key in ("optimizer.lr", "decay.weight_decay")),
          "arms.SGDWR.space.optimizer.lr={uniform: [1, 1.00002], num: 9}"], "arms.SGDWR.space.optimizer.lr.num: 9 points, of which 3 differ in six digits; e.g. a wider axis"),
    ],
)  # fmt: skip
def test_points_that_would_coincide_are_refused(over: list[str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        study.load(DEMO, over)
    assert str(error.value).startswith(f"{DEMO}: {message}"), str(error.value)


GRID = ["sampler.name=grid", "search.points=null", "arms.AdamWR.space={}", "arms.AdamWR.optimizer.lr=1", "arms.AdamWR.decay.weight_decay=1"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([*GRID, "arms.SGDWR.space.optimizer.lr.num=1000000", "arms.SGDWR.space.decay.weight_decay.num=2"],
         "search: 2000001 points of 2 arm(s) x 1 seed(s) = 2000001 trials, must be at most 20000; e.g. num: 141"),
        ([*GRID, "arms.SGDWR.space.optimizer.lr.num=3", "arms.SGDWR.space.decay.weight_decay.num=3", "search.seeds=10000", "finalists=null"],
         "search: 10 points of 2 arm(s) x 10000 seed(s) = 100000 trials, must be at most 20000; e.g. fewer search.seeds"),
        (["search.points=100000"], "search: 200000 points of 2 arm(s) x 1 seed(s) = 200000 trials, must be at most 20000; e.g. search.points=10000"),
        (["finalists={top: 3, seeds: 10000}"], "finalists: 6 configurations x 10000 seed(s) = 60000 trials, must be at most 20000; e.g. finalists.seeds=3333"),
    ],
)  # fmt: skip
def test_more_trials_than_a_plan_bears_are_refused_before_they_are_made(
    over: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "points", lambda *_: pytest.fail("points are drawn"))
    with pytest.raises(BadInput) as error:
        study.load(DEMO, over)
    assert str(error.value) == f"{DEMO}: {message}"


def test_every_axis_of_a_grid_without_num_is_named() -> None:
    with pytest.raises(BadInput) as error:
        study.load(DEMO, GRID)
    missing = "num: missing; sampler grid needs the points along each axis; e.g. 5"
    assert str(error.value).splitlines() == [f"{DEMO}: arms.SGDWR.space.{key}.{missing}" for key in ("decay.weight_decay", "optimizer.lr")]


def test_what_the_study_says_itself_is_not_also_an_override_of_its_workload(tmp_path: Path, demo: dict[str, Any]) -> None:
    demo |= {"budget": {"epochs": 3}, "evaluation": {"every_epochs": 1}}
    file = written(tmp_path, demo)
    twice = r"s\.yaml: workload\.{0}: {1} is set, and {0}: {2} too, which stands before it; set {0}$"
    with pytest.raises(BadInput, match=twice.format("budget.epochs", 7, 3)):
        study.load(file, ["workload.budget.epochs=7"])
    with pytest.raises(BadInput, match=twice.format("evaluation.every_epochs", 2, 1)):
        study.load(file, ["workload.evaluation={every_epochs: 2}"])
    assert study.load(file, ["workload.budget.global_batch_size=50"]).workload.budget.global_batch_size == 50
    with pytest.raises(BadInput, match=twice.format("budget.epochs", 7, 3)):
        study.load(written(tmp_path, demo | {"workload": {"name": "mnist5k_cnn", "budget": {"epochs": 7}}}))
    complete = study.load(DEMO).workload.model_dump(mode="json", exclude_unset=True)
    file = written(tmp_path, demo | {"workload": complete})
    assert complete["budget"]["epochs"] == 7 and study.load(file).workload.budget.epochs == 3, "its defaults"
    with pytest.raises(BadInput, match=twice.format("budget.epochs", 9, 3)):
        study.load(file, ["workload.budget.epochs=9"])


def test_an_arm_that_is_not_in_the_file_is_set_whole(tmp_path: Path, demo: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as error:
        study.load(DEMO, ["arms.Adamwr.optimizer.eps=1e-7"])
    line = "--set 'arms.Adamwr.optimizer.eps=1e-7': 'Adamwr' is no arm; did you mean 'AdamWR'? valid: AdamWR, SGDWR; a new one is set whole; e.g."
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    demo["arms"]["C0.9"] = {"optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "cosine"}}
    assert ids(DEMO, "arms.New={optimizer: {name: sgd, lr: 0.1}, schedule: {name: cosine}}", "arms.New.optimizer.lr=0.2")["New"]
    loaded = study.load(written(tmp_path, demo), ["arms.C0.9.optimizer.lr=0.3"])
    assert loaded.study.arms["C0.9"].optimizer["lr"] == 0.3, "a dot in the name of an arm"


def test_a_value_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    deep = "[" * 3000
    with pytest.raises(BadInput, match=r"^--set 'budget\.epochs=\[+\.\.\.\[+': '\[+\.\.\.\[+' is not a YAML value"):
        study.load(DEMO, [f"budget.epochs={deep}"])
    (tmp_path / "s.yaml").write_text(f"name: {deep}")
    with pytest.raises(BadInput, match=r"s\.yaml: not valid YAML: it is nested too deeply$"):
        study.load(tmp_path / "s.yaml")


def test_finalists_wait_for_the_whole_search_and_are_the_best_by_mean_holdout(tmp_path: Path, demo: dict[str, Any]) -> None:
    demo["search"] = {"points": 3, "seeds": 2}
    demo["finalists"] = {"top": 2, "seeds": 2}
    loaded = study.load(written(tmp_path, demo))
    search = [p.trial for p in study.planned(loaded, {}) if p.arm == "AdamWR" and p.trial]
    assert len(search) == 6
    values = [0.5, 0.9, 0.8, 0.7, 0.6, 0.6]  # means 0.7, 0.75, 0.6
    results: dict[str, float | None] = {t.trial_id: v for t, v in zip(search, values, strict=True)}

    def finalists(known: dict[str, float | None]) -> list[study.Planned]:
        return [p for p in study.planned(loaded, known) if p.arm == "AdamWR" and p.phase == "finalists"]

    partial = dict(list(results.items())[:-1])
    assert [p.trial for p in finalists(partial)] == [None] * 4
    chosen = finalists(results)
    assert [(p.seed, p.trial.optimizer.lr) for p in chosen if p.trial] == [
        (1000, search[2].optimizer.lr), (1001, search[2].optimizer.lr), (1000, search[0].optimizer.lr), (1001, search[0].optimizer.lr),
    ]  # fmt: skip
    assert all(p.trial is None for p in study.planned(loaded, results) if p.arm == "SGDWR" and p.phase == "finalists")
    results[search[2].trial_id] = None  # failed or diverged: ranks last, never first
    assert [p.trial.optimizer.lr for p in finalists(results) if p.trial][::2] == [search[0].optimizer.lr, search[4].optimizer.lr]
    assert all(p.trial is None for p in finalists(dict.fromkeys(results)))


def test_seed_0_of_every_arm_sees_the_same_data_and_initial_weights_by_construction() -> None:
    """Nothing but the seed reaches order, augmentation and initial weights: their functions take no arm."""
    loaded = study.load(DEMO)
    for p in study.planned(loaded, {}):
        assert p.trial is None or p.trial.seed == p.seed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms.AdamWR.optimizer.momentum=0.9", "arms.AdamWR.optimizer.momentum: unknown key; valid: betas, eps, lr, name"),
        ("arms.AdamWR.foo=1", "arms.AdamWR.foo: unknown key; valid: boxes, decay, gradient_scale, optimizer, schedule, space"),
        ("arms.AdamWR.optimizer.name=adamw", "arms.AdamWR.optimizer.name: 'adamw' is not known"),
        ("arms.AdamWR.space.optimizer.foo.log_uniform=[1,2]", "arms.AdamWR.space.optimizer.foo: unknown key; valid: betas"),
        ("arms.SGDWR.space.optimizer.momentum.uniform=[0.5,1.5]", "arms.SGDWR.optimizer.momentum: 0.9 is fixed and also an axis of space"),
        ("arms.AdamWR.schedule.warmup_epochs=99", "arms.AdamWR.schedule.warmup_epochs: 99 must not exceed the first cycle"),
        ("search.seeds=-1", "search.seeds: -1 must be a count from 1 to 10000, or a list"),
        ("search.seeds=[-1]", "search.seeds: -1 must be greater"),
        ("finalists.top=5", "finalists.top: 5 must be at most search.points, 4"),
        ("budget=5", "budget: 5 must be"),
        ("..=3", "must be KEY=VALUE with a dotted key"),
        ("workload=imagenet", "workload: 'imagenet' is not in configs/workload; did you mean 'imagenet_vit_s16'? valid: cifar10_"),
        ("workload.data.holdout_per_class=400", "data.holdout_per_class 400 of 10 classes must be fewer than train_samples 4000; e.g. 40"),
        ("budget.epoch=3", "budget.epoch: unknown key; did you mean 'epochs'?"),
        ("ranks=3", "budget.global_batch_size: 100 is not divisible by 3 ranks; e.g. 2 or 4 rank(s), or a batch of 99 or 102"),
        ("search.points=null", "search.points: missing; arm AdamWR has a space to search; e.g. 8"),
        ("nonsense", "--set 'nonsense': must be KEY=VALUE"),
        ("backend.name=horovod", "backend.name: 'horovod' must be 'ddp', 'deepspeed' or 'fsdp'"),
    ],
)
def test_mistakes_are_named_where_the_user_wrote_them(override: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        study.load(DEMO, [override])
    assert message in str(error.value).splitlines()[0], str(error.value)


def test_two_arms_with_one_trial_are_refused(tmp_path: Path, demo: dict[str, Any]) -> None:
    fixed = {"optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "cosine"}}
    with pytest.raises(BadInput, match=r"arms.B: its trial [0-9a-f]{12} \(seed 0\) is also one of arm A"):
        study.load(written(tmp_path, demo | {"arms": {"A": fixed, "B": fixed}}))


def test_overrides_reach_the_trial() -> None:
    loaded = study.load(DEMO, ["budget.epochs=3", "workload.recipe.label_smoothing=0.1", "backend.zero_stage=1"])
    first = study.planned(loaded, {})[0].trial
    assert first is not None
    assert (first.budget.epochs, first.budget.global_batch_size) == (3, 100)
    assert (first.workload.recipe.label_smoothing, first.workload.recipe.translate) == (0.1, 2)
    assert first.backend.zero_stage == 1


def test_the_stored_study_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/STUDY/study.yaml is the study as resolved, overrides and workload included: loading it gives the same ids."""
    loaded = study.load(DEMO, ["budget.epochs=3", "workload.recipe.translate=1"])
    stored = tmp_path / "study.yaml"
    stored.write_text(loaded.text())
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "nowhere")  # configs of another day
    again = study.load(stored)
    assert json.dumps([p.trial.identity() for p in study.planned(again, {}) if p.trial]) == json.dumps(
        [p.trial.identity() for p in study.planned(loaded, {}) if p.trial]
    )


def test_data_and_model_may_both_be_changed_of_a_workload_file() -> None:
    loaded = study.load(DEMO, ["workload.model.name=mnist5k_mlp", "workload.data.holdout_per_class=20"])
    first = study.planned(loaded, {})[0].trial
    assert first is not None
    assert (first.workload.model.name, first.workload.data.holdout_per_class) == ("mnist5k_mlp", 20)
    assert (first.workload.data.name, first.workload.recipe.translate) == ("mnist5k", 2), "the rest is the file's"


def test_a_workload_of_no_file_is_told_what_it_lacks(tmp_path: Path, demo: dict[str, Any]) -> None:
    workload = {"name": "mine", "model": {"name": "mnist5k_mlp"}, "data": {"name": "mine"}}
    with pytest.raises(BadInput, match=r"\(workload mine\): workload.data.path: missing"):
        study.load(written(tmp_path, demo | {"workload": workload}))


def test_a_budget_that_cuts_a_cycle_is_warned_of() -> None:
    assert study.warnings(study.load(DEMO)) == []
    lines = study.warnings(study.load(DEMO, ["budget.epochs=5"]))
    assert lines[0] == "budget.epochs: 5 cuts cycle 3 of AdamWR, which ends at epoch 7; budgets that end a cycle: 3 or 7"
    assert len(lines) == 2


def test_the_ids_of_the_demo_stay() -> None:
    assert ids(DEMO) == {
        "AdamWR": ["15b61228cf3e", "4fa99a6fa96a", "f7538a48916f", "b19ed5703e22"],
        "SGDWR": ["29bdeca72c7d", "8e941319072c", "393d1e46c51c", "3f23c9a54bed"],
    }


# ------------------------------------------------------------------------------------------------------ boxes

PROTOCOL = Path("configs/study/mnist5k_adamwr_vs_sgdwr.yaml")


def test_each_box_is_an_arm_of_its_own() -> None:
    loaded = study.load(PROTOCOL)
    assert list(loaded.study.arms) == [f"{arm}.{box}" for arm in ("AdamWR", "AdamWR-eps", "SGDWR") for box in ("narrow", "broad")]
    trials = [p.trial for p in study.planned(loaded, {}) if p.trial]
    assert Counter(t.arm for t in trials) == dict.fromkeys(loaded.study.arms, 16)
    assert len({t.trial_id for t in trials}) == 96, "each box draws points of its own"
    for t in trials:
        (low, high), value = loaded.study.arms[t.arm].space["decay.weight_decay"].log_uniform, t.decay.weight_decay
        assert low <= value <= high
    assert max(t.decay.weight_decay for t in trials if t.arm == "SGDWR.broad") > 0.4, "the broad box is broad"


def test_a_box_is_overridden_where_it_is_written() -> None:
    loaded = study.load(PROTOCOL, ["arms.SGDWR.boxes.broad.optimizer.lr.log_uniform=[7, 8]"])
    rates = [p.trial.optimizer.lr for p in study.planned(loaded, {}) if p.trial and p.arm == "SGDWR.broad"]
    assert 7 <= min(rates) < max(rates) <= 8


def test_a_study_with_boxes_is_stored_as_it_is_read(tmp_path: Path) -> None:
    loaded = study.load(PROTOCOL)
    (tmp_path / "study.yaml").write_text(loaded.text())
    again = study.load(tmp_path / "study.yaml")
    assert again.study.analysis == loaded.study.analysis
    assert {name: arm.model_dump() for name, arm in again.study.arms.items()} == {
        n: arm.model_dump() for n, arm in loaded.study.arms.items()
    }
    assert [p.trial and p.trial.trial_id for p in study.planned(again, {})] == [
        p.trial and p.trial.trial_id for p in study.planned(loaded, {})
    ]


def pairs(*arms: str, boxes: dict[str, tuple[str, ...]] | None = None, declared: list[list[str]] | None = None) -> list[str]:
    """The comparisons of a study of plain arms and of arms with boxes."""
    plain = {name: {"optimizer": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "cosine"}} for name in arms}
    boxed = {
        name: {"optimizer": {"name": "sgd"}, "schedule": {"name": "cosine"}, "boxes": {b: {"optimizer.lr": {"choice": [1]}} for b in found}}
        for name, found in (boxes or {}).items()
    }
    document = {"name": "s", "workload": "w", "arms": plain | boxed} | ({"analysis": {"comparisons": declared}} if declared else {})
    return [f"{a} {b}" for a, b in config.parse(config.Study, document, "s").analysis.comparisons or ()]


def test_what_is_compared() -> None:
    both = ("narrow", "broad")
    assert pairs("A", "B", "C0.9") == ["A B", "A C0.9", "B C0.9"]
    assert pairs(boxes={"A": both, "B": both}) == ["A.narrow B.narrow", "A.broad B.broad"]
    assert pairs(boxes={"A": both, "B": ("broad",)}) == ["A.broad B.broad"]
    assert pairs("P", boxes={"A": both}) == ["P A.narrow", "P A.broad"]
    assert pairs("P", "Q", boxes={"A": both}, declared=[["Q", "P"], ["A", "P"]]) == ["Q P", "A.narrow P", "A.broad P"]
    assert pairs(boxes={"A": both, "B": both}, declared=[["A.broad", "A.narrow"]]) == ["A.broad A.narrow"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["arms.SGDWR.space.optimizer.lr.log_uniform=[1,2]"], "arms.SGDWR.space: stands beside boxes narrow, broad; write its axes"),
        (["arms.SGDWR.boxes.broad={}"], "arms.SGDWR.boxes.broad: has no axes; e.g."),
        (["arms.SGDWR.boxes.broad.schedule.t_0.uniform=[1,2]"], "arms.SGDWR.boxes.narrow: lacks schedule.t_0, an axis of broad"),
        (["arms.SGDWR.boxes.wide={}"], "arms.SGDWR.boxes.wide: has no axes"),
        (["arms.SGDWR.boxes.broad.optimizer.lr.log=1"], "arms.SGDWR.boxes.broad.optimizer.lr.log: unknown key; valid: log_uniform, num"),
        (["arms.SGDWR.boxes.broad.optimizer.lr.log_uniform=[2,1]"], "arms.SGDWR.boxes.broad.optimizer.lr.log_uniform: low 2 must be below high 1"),
        (["arms.SGDWR.decay.weight_decay=1"], "arms.SGDWR.decay.weight_decay: 1 is fixed and also an axis of boxes.narrow"),
        (["arms.SGDWR.boxes.narrow.schedule.t_0.uniform=[90,99]", "arms.SGDWR.boxes.broad.schedule.t_0.choice=[-1]"], "arms.SGDWR.schedule.t_0: 1 is fixed"),
        (["arms.SGDWR.boxes.narrow.optimizer.foo.uniform=[1,2]", "arms.SGDWR.boxes.broad.optimizer.foo.uniform=[1,2]"], "arms.SGDWR.boxes.narrow.optimizer.foo: unknown key; valid: lr"),
        (["arms.SGDWR.optimizer.foo=1"], "arms.SGDWR.optimizer.foo: unknown key; valid: lr"),
        (["sampler.name=grid", "search.points=null"], "arms.AdamWR.boxes.narrow.decay.weight_decay.num: missing; sampler grid needs"),
        (["analysis.comparisons=[[AdamWR, SGD]]"], "analysis.comparisons: 'SGD' is no arm; valid: AdamWR.narrow"),
        (["analysis.comparisons=[[AdamWR, AdamWR]]"], "analysis.comparisons: [AdamWR, AdamWR] is an arm and itself; name two of"),
        (["analysis.comparisons=[[AdamWR, SGDWR], [SGDWR.broad, AdamWR.broad]]"], "analysis.comparisons: SGDWR.broad against AdamWR.broad is there twice"),
        (["analysis.method=anova"], "analysis.method: 'anova' must be 'welch' or 'paired'"),
        (["analysis.margin=0"], "analysis.margin: 0 must be greater than 0; e.g. 0.2"),
        (["evaluation.test={name: v2, path: there}"], "evaluation.test.samples: missing; e.g. 10000"),
    ],
)  # fmt: skip
def test_mistakes_in_boxes_and_comparisons_are_named_where_they_are_written(over: list[str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        study.load(PROTOCOL, over)
    assert message in str(error.value).splitlines()[0], str(error.value)


def test_a_box_that_bears_the_name_of_an_arm_is_refused() -> None:
    with pytest.raises(BadInput, match=r"arms\.A\.narrow: is also a box of A; give it another name"):
        pairs("A.narrow", boxes={"A": ("narrow",)})
    with pytest.raises(BadInput, match=r"analysis\.comparisons: \[A, B\] share no box; name two of A\.narrow, B\.broad"):
        pairs(boxes={"A": ("narrow",), "B": ("broad",)}, declared=[["A", "B"]])


# ----------------------------------------------------------------------------------------------- derived axes


@pytest.mark.parametrize("box", ["narrow", "broad"])
@pytest.mark.parametrize("name", ["AdamWR", "AdamWR-eps", "SGDWR"])
def test_the_point_of_a_trial_is_found_again_to_the_last_digit(name: str, box: str) -> None:
    loaded = study.load(PROTOCOL, ["search.points=256"])
    arm = loaded.study.arms[f"{name}.{box}"]
    for point in study.points(f"{name}.{box}", arm, loaded.study):
        trial = study.resolve(loaded, f"{name}.{box}", point, "search", 0)
        assert study.axis_values(arm, trial) == point


def test_derived_axes_are_the_fields_that_the_paper_names() -> None:
    loaded = study.load(PROTOCOL, ["arms.AdamWR-eps.optimizer.betas=[null, 0.99]", "arms.AdamWR.optimizer.betas=null"])
    for p in study.planned(loaded, {}):
        if p.trial is None:
            continue
        point, optimizer = study.axis_values(loaded.study.arms[p.arm], p.trial), p.trial.optimizer
        beta1 = optimizer.betas[0] if optimizer.name == "adam" else optimizer.momentum
        assert beta1 == pytest.approx(1 - point["optimizer.one_minus_beta1"], abs=1e-15)
        if optimizer.name == "adam":
            assert optimizer.betas[1] == (0.99 if p.arm.startswith("AdamWR-eps") else 0.999)
        if "optimizer.effective_lr" in point:
            assert optimizer.eps == point["optimizer.eps"]
            assert optimizer.lr == pytest.approx(point["optimizer.effective_lr"] * (optimizer.eps + 0.001), rel=1e-11)


def test_the_effective_rate_takes_eps_from_the_arm_or_its_default(demo: dict[str, Any], tmp_path: Path) -> None:
    arm = demo["arms"]["AdamWR"]
    arm |= {"gradient_scale": 0.25, "space": {"optimizer.effective_lr": {"choice": [0.5]}}, "decay": {"name": "none"}}
    rate = lambda: study.planned(study.load(written(tmp_path, demo)), {})[0].trial.optimizer.lr  # type: ignore[union-attr]  # noqa: E731
    demo["search"]["points"] = 1
    assert rate() == 0.5 * (1e-8 + 0.25)
    arm["optimizer"]["eps"] = "1e-1"  # YAML reads 1e-1 as text
    assert rate() == pytest.approx(0.5 * 0.35, rel=1e-12)
    arm["optimizer"]["eps"] = "small"
    with pytest.raises(BadInput, match=r"arms\.AdamWR\.optimizer\.eps: 'small' must be a number; e\.g\. 1e-08"):
        rate()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("arms.SGDWR.optimizer.momentum=0.9", "arms.SGDWR.optimizer.momentum: 0.9 is fixed and also set by the axis optimizer.one_minus_beta1; remove"),
        ("arms.AdamWR.optimizer.betas=[0.9, 0.99]", "arms.AdamWR.optimizer.betas: [0.9, 0.99] is fixed and also set by the axis optimizer.one_minus_beta1; write [null, beta2]"),
        ("arms.AdamWR.optimizer.betas=[null, 1.5]", "arms.AdamWR.optimizer.betas.1: 1.5 must be less than 1"),
        ("arms.AdamWR-eps.optimizer.lr=0.1", "arms.AdamWR-eps.optimizer.lr: 0.1 is fixed and also set by the axis optimizer.effective_lr"),
        ("arms.AdamWR-eps.boxes.narrow.optimizer.lr.choice=[1]", "arms.AdamWR-eps.boxes.broad: lacks optimizer.lr"),
        ("arms.AdamWR-eps.gradient_scale=null", "arms.AdamWR-eps.gradient_scale: missing; the axis optimizer.effective_lr needs it"),
        ("arms.AdamWR-eps.gradient_scale=0", "arms.AdamWR-eps.gradient_scale: 0 must be greater than 0; e.g. 0.001"),
        ("arms.SGDWR.gradient_scale=0.1", "arms.SGDWR.gradient_scale: 0.1 has no meaning without the axis optimizer.effective_lr"),
        ("arms.AdamWR-eps.optimizer.name=sgd", "arms.AdamWR-eps.boxes.narrow.optimizer.effective_lr: is of adam, which has eps, not of 'sgd'"),
        ("arms.SGDWR.boxes.broad.optimizer.one_minus_beta1.log_uniform=[0.1,2]", "arms.SGDWR.boxes.broad.optimizer.one_minus_beta1: 2.0 must be a number above 0 and at most 1"),
        ("arms.SGDWR.boxes.broad.optimizer.one_minus_beta1={choice: [high]}", "arms.SGDWR.boxes.broad.optimizer.one_minus_beta1: 'high' must be a number"),
    ],
)  # fmt: skip
def test_mistakes_in_derived_axes(over: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        study.load(PROTOCOL, [over])
    assert message in str(error.value).splitlines()[0], str(error.value)


def test_two_axes_for_one_field_are_refused(demo: dict[str, Any], tmp_path: Path) -> None:
    space = {"optimizer.momentum": {"choice": [0.9]}, "optimizer.one_minus_beta1": {"choice": [0.1]}}
    demo["arms"]["SGDWR"] |= {"optimizer": {"name": "sgd", "lr": 0.1}, "space": space}
    with pytest.raises(BadInput, match=r"arms\.SGDWR\.space\.optimizer\.one_minus_beta1: sets optimizer\.momentum, which is an axis too"):
        study.load(written(tmp_path, demo))


# ----------------------------------------------------------------------------------------------------- phases


def test_only_finalists_see_the_validation_split() -> None:
    loaded = study.load(DEMO)
    search = [p.trial for p in study.planned(loaded, {}) if p.trial]
    everything = study.planned(loaded, {t.trial_id: 0.5 for t in search})
    assert [(p.phase, p.trial.evaluation.val) for p in everything if p.trial] == [(p.phase, p.phase == "finalists") for p in everything]
    assert {p.phase for p in everything} == {"search", "finalists"}
    alone = study.planned(study.load(DEMO, ["finalists=null"]), {})
    assert all(p.trial and p.trial.evaluation.val for p in alone), "without finalists the search is what is reported"
    assert [p.trial.trial_id for p in alone if p.trial] == [t.trial_id for t in search]
    unseen = study.planned(study.load(DEMO, ["finalists=null", "evaluation.val=false"]), {})
    assert not any(p.trial and p.trial.evaluation.val for p in unseen)


def test_a_test_set_changes_no_id_and_is_for_finalists() -> None:
    test = "evaluation.test={name: v2, path: there, samples: 9}"
    loaded = study.load(DEMO, [test])
    assert ids(DEMO) == ids(DEMO, test)
    assert loaded.workload.evaluation.test is not None and loaded.workload.evaluation.test.path == Path("there").absolute()
    assert study.warnings(loaded) == []
    assert study.warnings(study.load(DEMO, [test, "finalists=null"]))[0].startswith(
        "evaluation.test: v2 is for finalists, of which there are none"
    )
