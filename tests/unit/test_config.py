"""Every mistake is named with its dotted key, its value, the constraint and a value that would work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from harness import config
from harness.config import BadInput, Study, parse, read_yaml
from tests.trials import trial

SUPPORTED = (
    "supported: ddp zero_stage 0, 1 (fp32, bf16, fp64); "
    "deepspeed zero_stage 0, 1, 2, 3 (fp32, bf16; offload_optimizer with 1, 2, 3; compile with 0, 1, 2); fsdp zero_stage 2, 3 (fp32, bf16, fp64)"
)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"optimizer": {"name": "adam", "lr": 1, "lrr": 1}}, "optimizer.lrr: unknown key; did you mean 'lr'? valid: betas, eps, lr, name"),
        ({"optimizer": {"name": "adam", "lr": -1}}, "optimizer.lr: -1 must be greater than 0; e.g. 0.001"),
        ({"optimizer": {"name": "adam", "lr": "fast"}}, "optimizer.lr: 'fast' must be a valid number"),
        ({"optimizer": {"name": "adam", "lr": True}}, "optimizer.lr: True must be a number; e.g. 0.001"),
        ({"optimizer": {"name": "adam", "lr": float("inf")}}, "optimizer.lr: inf must be a finite number; e.g. 0.001"),
        ({"optimizer": {"name": "adamw", "lr": 1}}, "optimizer.name: 'adamw' is not known; did you mean 'adam'? valid: sgd, adam"),
        ({"optimizer": {"lr": 1}}, "optimizer.name: missing; valid: adam, sgd"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.lr: missing; e.g. 0.001"),
        ({"optimizer": {"name": "adam", "lr": 1, "betas": [0.9, 1.2]}}, "optimizer.betas.1: 1.2 must be less than 1; e.g. [0.9, 0.999]"),
        ({"decay": {"name": "none", "weight_decay": 1}}, "decay.weight_decay: unknown key; valid: name"),
        ({"decay": {"name": "l2", "weight_decay": 1, "units": "torch"}}, "decay.units: unknown key; valid: exempt_1d, name, weight_decay"),
        (
            {"decay": {"name": "decoupled", "weight_decay": 1, "normalised": True, "units": "torch"}},
            "decay.units: 'torch' has no meaning for normalised decay, which is always in paper units; leave units out",
        ),
        ({"budget": {"epochs": 0.001, "global_batch_size": 100}}, "budget.epochs: 0.001 is less than one optimizer step; e.g. 0.02857"),
        (
            {"budget": {"epochs": 1, "global_batch_size": 5000}},
            "budget.global_batch_size: 5000 must be at most the 3500 samples trained on; e.g. 100",
        ),
        (
            {"schedule": {"name": "cosine_restarts", "t_0": 1e308}},
            "schedule.t_0: 1e+308 must be less than or equal to 100000; e.g. 1",
        ),
        (
            {"schedule": {"name": "cosine_restarts", "t_0": 1, "t_mult": 1e308}},
            "schedule.t_mult: 1e+308 must be less than or equal to 100000",
        ),
        ({"schedule": {"name": "cosine", "warmup_epochs": 1e308}}, "schedule.warmup_epochs: 1e+308 must be less than or equal to 100000"),
        ({"schedule": {"name": "step", "milestones": [1e308]}}, "schedule.milestones.0: 1e+308 must be less than or equal to 100000"),
        ({"backend": {"zero_stage": 4}}, "backend.zero_stage: 4 must be 0, 1, 2 or 3; e.g. 1"),
        ({"backend": {"zero_stage": 3}}, f"backend.zero_stage: 3 is not supported by ddp; {SUPPORTED}"),
        ({"backend": {"name": "fsdp", "zero_stage": 1}}, f"backend.zero_stage: 1 is not supported by fsdp; {SUPPORTED}"),
        ({"backend": {"offload_optimizer": True}}, "backend.offload_optimizer: true is not supported by ddp zero_stage 0, whose"),
        (
            {"backend": {"name": "deepspeed", "offload_optimizer": True}},
            "backend.offload_optimizer: true is not supported by deepspeed zero_stage 0",
        ),
        (
            {"backend": {"name": "deepspeed", "zero_stage": 3, "compile": True}},
            "backend.compile: true is not supported by deepspeed zero_stage 3, whose",
        ),
        (
            {"backend": {"name": "deepspeed"}, "recipe": {"precision": "fp64"}},
            f"workload.recipe.precision: fp64 is not supported by deepspeed; {SUPPORTED}",
        ),
        ({"recipe": {"clip_norm": 0}}, "workload.recipe.clip_norm: 0 must be greater than 0; e.g. 1.0"),
        (
            {"recipe": {"norm_batch_size": 50}},
            "workload.recipe.norm_batch_size: 50 has no meaning for mnist5k_cnn, which has no batch norm",
        ),
        (
            {"model": "mnist5k_cnn_bn", "recipe": {"norm_batch_size": 32}},
            "workload.recipe.norm_batch_size: 32 must divide budget.global_batch_size, 100; e.g. 25",
        ),
        (
            {"data": {"holdout_per_class": 400}},
            "workload.data.holdout_per_class 400 of 10 classes must be fewer than train_samples 4000; e.g. 40",
        ),
        ({"cats": 1}, "cats: unknown key; valid: arm, backend, budget"),
        ({"schedule": "cosine"}, "schedule: 'cosine' must be a valid dictionary"),
    ],
)
def test_mistakes_in_a_trial(over: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        trial(**over)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"test: {message}")


RAMP = {"crop": {}, "resolution": {"start": 8, "epochs": [0, 3], "multiple": 4}}
ARM = {"optimizer": {"name": "sgd"}, "schedule": {"name": "cosine"}}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"arms": {"A": ARM | {"optimiser": {}}}}, "arms.A.optimiser: unknown key; did you mean 'optimizer'?"),
        ({"arms": {"A": ARM | {"space": {"optimizer.lr": {"log": [1, 2]}}}}}, "arms.A.space.optimizer.lr: {'log': [1, 2]} must be {log_uniform"),
        ({"arms": {"A": ARM | {"space": {"optimizer.lr": {"log_uniform": [2, 1]}}}}}, "arms.A.space.optimizer.lr.log_uniform: low 2 must be below high 1"),
        ({"arms": {"A": ARM | {"space": {"optimizer.lr": {"log_uniform": [0, 1]}}}}}, "arms.A.space.optimizer.lr.log_uniform.0: 0 must be greater than 0"),
        ({"arms": {}}, "arms: {} "),
        ({"finalists": {"seeds": [0]}}, "finalists.seeds: [0] are search seeds too"),
        ({"search": {"seeds": 1002}, "finalists": {"seeds": 2}}, "finalists.seeds: [1000, 1001] are search seeds too, so selection would be reported as result; e.g. others, seeds: [1002, 1003]"),
        ({"search": {"seeds": 2}, "finalists": {"seeds": [1, 2]}}, "finalists.seeds: [1] are search seeds too, so selection would be reported as result; e.g. a count, seeds: 2"),
        ({"name": "mlflow.db"}, "name: 'mlflow.db' is a file of every store, where a study has its folder; e.g. "),
        ({"name": "MLflow.db-wal"}, "name: 'MLflow.db-wal' is a file of every store"),
        ({"search": {"points": 0}}, "search.points: 0 must be greater than or equal to 1; e.g. 8"),
        ({"sampler": {"name": "grid"}, "search": {"points": 3}}, "search.points has no meaning for sampler grid"),
    ],
)  # fmt: skip
def test_mistakes_in_a_study(over: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        parse(Study, {"name": "s", "workload": "mnist5k_cnn", "arms": {"A": ARM}} | over, "s.yaml")
    assert str(error.value).startswith(f"s.yaml: {message}")


def test_every_mistake_is_a_line() -> None:
    with pytest.raises(BadInput) as error:
        trial(optimizer={"name": "adam", "lr": -1, "eps": 0}, seed=-1)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "key 'a' is written twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "must be a mapping"),
        ("!!python/object/apply:os.system [echo]\n", "not valid YAML"),
        ("", "must be a mapping"),
        ("a: &a [*a]\n", "recursive"),
        ("a: 2026-02-31\n", "not valid YAML: day is out of range"),
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n", "key 'y' is written twice"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "key '<<' is written twice"),
    ],
)
def test_unreadable_yaml(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        read_yaml(tmp_path / "f.yaml")
    assert "\n" not in str(error.value)


def test_a_merge_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  y: 2\nc: {<<: [*b, *a], z: 3}\n")
    assert read_yaml(tmp_path / "f.yaml") == {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 2, "z": 3}}


def test_a_value_in_a_message_is_cut(tmp_path: Path) -> None:
    bomb = "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcde", "bcdef", strict=True))
    (tmp_path / "f.yaml").write_text(f"a: &a [lol]\n{bomb}\nname: *f\n")
    given = read_yaml(tmp_path / "f.yaml")
    for over in ({"name": given["name"]}, {"name": "n" * 10_000}, {"n" * 10_000: 1}, {"finalists": {"seeds": [0] * 10_000}}):
        with pytest.raises(BadInput) as error:
            parse(Study, {"name": "s", "workload": "mnist5k_cnn", "arms": {"A": ARM}} | over, "s.yaml")
        assert all(len(line) < 300 for line in str(error.value).splitlines()), str(error.value)[:1000]
    assert len(config.shown("n" * 10_000)) == len(config.shown(given["name"])) == 100


def test_resize_and_crop() -> None:
    """New fields with a default change no id; what cannot be is refused."""
    assert trial().trial_id == "2fdc4566be16"
    cropped = trial(data={"resize": 32}, recipe={"crop": {"ratio": [1, 1]}})
    assert cropped.identity()["data"]["resize"] == 32 and cropped.identity()["recipe"] == {"crop": {"ratio": [1, 1]}}
    assert trial(recipe={"crop": {}}).trial_id not in (cropped.trial_id, trial().trial_id)
    for over, said in (
        ({"data": {"resize": 20}}, "workload.data.resize: 20 must be at least image_size, 28; e.g. 32"),
        ({"recipe": {"crop": {"scale": [0.5, 0.1]}}}, r"workload.recipe.crop.scale: \[0.5, 0.1\] must not descend; e.g. \[0.08, 1\]"),
        ({"recipe": {"crop": {"scale": [0, 1]}}}, "workload.recipe.crop.scale.0: 0 must be greater than 0"),
        ({"recipe": {"border": [9]}}, "workload.recipe.border: has no effect without translate; set recipe.translate, e.g. 4"),
        ({"recipe": {"translate": 4, "border": [9, 9, 9]}}, "workload.recipe.border: has 3 levels for 1 channel"),
        ({"recipe": {"translate": 4, "border": [256]}}, "workload.recipe.border.0: 256 must be less than or equal to 255"),
    ):
        with pytest.raises(BadInput, match=said):
            trial(**over)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"data": {"eval_image_size": 28}}, "workload.data.eval_image_size: 28 is image_size; leave it out"),
        (
            {"data": {"eval_image_size": 64}},
            "workload.data.eval_image_size: 64 needs resize, the shorter side of the images that it is cut out of; e.g. resize: 73",
        ),
        ({"data": {"eval_image_size": 64, "resize": 32}}, "workload.data.resize: 32 must be at least eval_image_size, 64; e.g. 73"),
        (
            {"data": {"eval_image_size": 64, "resize": 73}, "model": "mnist5k_cnn"},
            "workload.data.eval_image_size: mnist5k_cnn takes images of one size, data.image_size, 28; leave data.eval_image_size out",
        ),
        (
            {"data": {"image_size": 32}, "model": "vit_s16", "recipe": RAMP},
            "workload.recipe.resolution: vit_s16 takes images of one size, data.image_size, 32; leave recipe.resolution out",
        ),
        (
            {"data": {"channels": 1, "mean": [0.5], "std": [0.3]}},
            "workload.data.channels: 1 is too few for resnet18; 3, with mean and std of three, reads grey images as RGB",
        ),
        ({"recipe": {"resolution": {"start": 8}}}, "workload.recipe.resolution.epochs: missing; e.g. [65, 76]"),
        (
            {"recipe": {"resolution": {"start": 8, "epochs": [3, 3]}}},
            "workload.recipe.resolution.epochs: [3, 3] must ascend; e.g. [65, 76]",
        ),
        (
            {"recipe": {"resolution": {"start": 8, "epochs": [-1, 3]}}},
            "workload.recipe.resolution.epochs.0: -1 must be greater than or equal to 0; e.g. [65, 76]",
        ),
        (
            {"recipe": {"resolution": RAMP["resolution"]}},
            "workload.recipe.resolution: needs crop, whose parts of images can be resized to any size; e.g. crop: {scale: [0.08, 1]}",
        ),
        (
            {"data": {"image_size": 160}, "recipe": {"crop": {}, "resolution": {"start": 160, "epochs": [0, 3]}}},
            "workload.recipe.resolution.start: 160 must be below data.image_size, 160, where it ends; e.g. 128",
        ),
        (
            {
                "model": "convnext_tiny",
                "data": {"image_size": 32},
                "recipe": {"crop": {}, "resolution": {"start": 32, "epochs": [0, 3], "multiple": 8}},
            },
            "workload.recipe.resolution.start: 32 must be below data.image_size, 32, where it ends; leave resolution out",
        ),
        (
            {"recipe": {"crop": {}, "resolution": {"start": 20, "epochs": [0, 3]}}},
            "workload.recipe.resolution.multiple: 32 must divide start, 20, and data.image_size, 28; e.g. 4",
        ),
    ],
)
def test_mistakes_in_image_sizes(over: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        trial(**{"model": "resnet18"} | over)
    assert str(error.value) == f"test: {message}"


def test_image_sizes_are_part_of_the_identity_and_their_defaults_are_not() -> None:
    plain = trial(model="resnet18", recipe={"crop": {}})
    assert "eval_image_size" not in plain.identity()["data"] and plain.identity()["recipe"] == {"crop": {}}
    grown = trial(model="resnet18", recipe=RAMP)
    assert grown.identity()["recipe"] == {"crop": {}, "resolution": {"start": 8, "epochs": [0.0, 3.0], "multiple": 4}}
    larger = trial(model="resnet18", recipe={"crop": {}}, data={"resize": 40, "eval_image_size": 36})
    assert larger.identity()["data"]["eval_image_size"] == 36
    assert len({plain.trial_id, grown.trial_id, larger.trial_id}) == 3


def test_global_batch_and_micro_batch_must_divide() -> None:
    t = trial(budget={"epochs": 1, "global_batch_size": 100})
    assert [t.micro_batch_size(w) for w in (1, 2, 4, 5)] == [100, 50, 25, 20]
    with pytest.raises(
        BadInput, match=r"global_batch_size: 100 is not divisible by 3 ranks; e.g. 2 or 4 rank\(s\), or a batch of 99 or 102"
    ):
        t.micro_batch_size(3)
    t = trial(budget={"epochs": 1, "global_batch_size": 100}, backend={"micro_batch_size": 20})
    assert [t.micro_batch_size(w) for w in (1, 5)] == [20, 20]
    with pytest.raises(BadInput, match=r"micro_batch_size: 20 does not divide the 50 samples .* e.g. 10"):
        t.micro_batch_size(2)


def test_norm_batches_divide_micro_batches() -> None:
    t = trial(model="mnist5k_cnn_bn", recipe={"norm_batch_size": 25}, backend={"micro_batch_size": 10})
    with pytest.raises(BadInput, match=r"norm_batch_size: 25 does not divide the micro-batch of 10 .* e.g. backend.micro_batch_size 25"):
        t.micro_batch_size(1)
    t = trial(model="mnist5k_cnn_bn", recipe={"norm_batch_size": 25})
    assert [t.micro_batch_size(w) for w in (1, 2, 4)] == [100, 50, 25]
    with pytest.raises(BadInput, match=r"norm_batch_size: 25 does not divide the micro-batch of 20 .* fewer ranks are needed"):
        t.micro_batch_size(5)


def test_fsdp_shards_everything_unless_told() -> None:
    assert trial(backend={"name": "fsdp"}).backend.zero_stage == 3
    assert trial(backend={"name": "fsdp", "zero_stage": 2}).backend.zero_stage == 2


def test_model_names_are_those_of_models_py() -> None:
    from harness import models

    assert set(get_args(config.ModelName)) == set(models.BUILDERS)


def test_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        trial().seed = 3  # type: ignore[misc]


LOGIN_NODE = [
    "harness.config",
    "harness.study",
    "harness.schedule",
    "harness.store",
    "harness.journal",
    "harness.tracking",
    "harness.deliverer",
    "harness.data.index",
    "harness.data.order",
    "launch.__main__",
    "launch.submit",
    "launch.status",
    "launch.job",
    "analysis.runs",
    "analysis.estimate",
    "analysis.report",
]


def test_nothing_imports_torch_or_mlflow_on_the_login_node() -> None:
    code = (
        f"import sys, importlib\nfor m in {LOGIN_NODE}: importlib.import_module(m)\n"
        "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'deepspeed', 'mlflow', 'torchvision'))\n"
        "assert not bad, bad[:3]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
