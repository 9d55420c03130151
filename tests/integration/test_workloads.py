"""Every workload in configs/ at a reduced size: it builds, takes ten steps, and resumes to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import engine, journal
from harness.config import Trial
from harness.data import order, shards
from harness.data.build import build
from harness.data.fixture import CLASSES
from harness.dist import Ranks as Place
from harness.draws import ShakeShake
from harness.store import Store
from harness.study import load, planned
from harness.train import train
from tests import tars
from tests.integration.ranks import finish, history
from tests.integration.test_backends import FSDP, ZERO_1, ZERO_2, ZERO_3, on
from tests.integration.test_train import ADAMW, SGDW, small
from tests.trials import Told

WORKLOADS = sorted(path.stem for path in Path("configs/workload").glob("*.yaml") if not path.stem.startswith("mnist5k"))
SIZE = {"imagenet_vit_s16": 32, "imagenet_convnext_tiny": 32, "imagenet_resnet50": 32, "imagenet_regnety_1_6gf": 32}
"""of images, pixels; 8 where it is not said"""


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 16 validation photographs."""
    out = tmp_path_factory.mktemp("photographs") / "shards"
    build("fixture", None, out, samples=80)
    return out


def reduced(folder: Path, name: str, photographs: Path) -> Trial:
    """The first trial of a study of the workload: batches of 8 in place of its own, small images, its recipe as it is."""
    size = SIZE.get(name, 8)
    path = folder / f"{name}.yaml"
    path.write_text(f"name: reduced\nworkload: {name}\narms: {{SGDWR: {{optimizer: {{name: sgd}}, schedule: {{name: cosine}}}}}}\n")
    loaded = load(
        path,
        [
            f"workload.data.path={photographs}", f"workload.data.num_classes={CLASSES}", f"workload.data.image_size={size}",
            f"workload.data.resize={size + 4}", "workload.recipe.augment=null",  # by processes: tested in test_data_workers
            "workload.recipe.precision=fp32",  # bf16 takes ten times as long on a CPU without it
            "workload.data.train_samples=64", "workload.data.holdout_per_class=1",
            "workload.data.val_samples=16", "workload.recipe.norm_batch_size=null", "budget.global_batch_size=8", "budget.epochs=1.6667",
            "evaluation.train_eval_samples=8", "evaluation.batch_size=8", "evaluation.log_every_steps=1", "checkpoint.every_epochs=100",
            f"arms.SGDWR.optimizer={{name: {'adam, lr: 0.0005' if size == 32 else 'sgd, lr: 0.02'}}}",
            "arms.SGDWR.decay={name: decoupled, weight_decay: 0.05, normalised: true}",
        ],
    )  # fmt: skip
    (trial,) = (p.trial for p in planned(loaded, {}))
    assert trial is not None
    return trial


@pytest.mark.parametrize("name", WORKLOADS)
def test_ten_steps_and_a_resume(tmp_path: Path, photographs: Path, name: str) -> None:
    t = reduced(tmp_path, name, photographs)
    undisturbed = train(t, calm := Store(tmp_path / "calm"))
    assert (undisturbed["state"], undisturbed["step"]) == ("finished", 10)
    store = Store(tmp_path / "stopped")
    assert train(t, store, stop=Told(4))["state"] == "interrupted"
    folder = store.trial(t.study, t.trial_id)
    assert 0 < journal.fold(journal.read(folder.journal)).steps_done < 10
    result = train(t, store)
    assert result["attempts"] == 2
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(folder) == history(calm.trial(t.study, t.trial_id))
    shutil.rmtree(tmp_path)  # a gigabyte of checkpoints


def test_random_layers_depend_on_neither_ranks_nor_micro_batches(tmp_path: Path, photographs: Path) -> None:
    """Shake-Shake on one rank, on two with two micro-batches each, and sharded: float64 sums in another order differ by 1e-13,
    other random numbers by more than 1e-3."""
    t = reduced(tmp_path, "cifar10_shake26_2x64d", photographs)
    t = t.model_copy(
        update={
            "workload": t.workload.model_copy(
                update={"recipe": t.workload.recipe.model_copy(update={"precision": "fp64", "norm_batch_size": 2})}
            ),
            "budget": t.budget.model_copy(update={"epochs": 0.5}),
        }
    )
    places: list[tuple[dict[str, Any], int]] = [({}, 1), ({"micro_batch_size": 2}, 2), ({"name": "fsdp", "micro_batch_size": 2}, 2)]
    losses = []
    for backend, world in places:
        one = t.model_copy(update={"backend": t.backend.model_validate(backend)})
        finish(one, store := Store(tmp_path / f"{len(losses)}"), world)
        points = history(store.trial(t.study, t.trial_id))
        losses.append([points["train/loss", step] for step in range(3)] + [points["val/loss", 2]])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-9)


def test_every_step_seed_and_micro_batch_draws_anew(tmp_path: Path, photographs: Path) -> None:
    """What the layers were given is what harness.data.order says of seed, step and place."""
    t = reduced(tmp_path, "cifar10_shake26_2x64d", photographs)
    t = t.model_copy(update={"backend": t.backend.model_validate({"micro_batch_size": 2}), "seed": 5})
    images, labels = torch.randint(0, 255, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 10
    worker = engine.build(t, Place(0, 0, 1, torch.device("cpu")))
    layers = [m for m in worker._model.modules() if isinstance(m, ShakeShake)]
    given: list[torch.Tensor] = []
    plain = ShakeShake.uniform

    def uniform(self: ShakeShake, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self is layers[3]:
            assert self._given is not None
            given.append(self._given)
        return plain(self, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShakeShake, "uniform", uniform)
        for step in (0, 7):
            worker.train_step(images, labels, lr=0.01, weight_decay=0.0, step=step)
    assert len(given) == 8, "four micro-batches of each step"
    for place, step in enumerate((0, 7)):
        drawn = order.layer_draws(5, step, 2 * len(layers), 8)[6:8]
        assert torch.equal(torch.cat(given[4 * place : 4 * place + 4], dim=1), torch.from_numpy(drawn))


UNTRAINED, TRAINED = 1.39, 0.46
"""val/loss of four classes by chance (log 4), and as measured after the ten steps"""


def test_shake_shake_learns_from_images_of_imagenet32s_shape(tmp_path: Path) -> None:
    """Four colours under noise, 32 x 32, by the workload's own recipe: at least half of the way to what was measured."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [170, 170, 40]])
    for split, count in (("train", 160), ("val", 40)):
        samples = []
        for number in range(count):
            pixels = np.clip(colours[number % 4] + rng.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            samples.append((f"{split}{number:03d}", {"png": tars.png(pixels), "cls": str(number % 4).encode()}))
        tars.write(tmp_path / "shards" / f"{split}-0.tar", samples)
    shards.index_shards(tmp_path / "shards")
    path = tmp_path / "study.yaml"
    path.write_text("name: learns\nworkload: imagenet32_shake26_2x64d\narms: {SGDR: {optimizer: {name: sgd}, schedule: {name: cosine}}}\n")
    loaded = load(
        path,
        [
            f"workload.data.path={tmp_path / 'shards'}", "workload.data.num_classes=4", "workload.data.train_samples=160",
            "workload.data.holdout_per_class=1", "workload.data.val_samples=40", "workload.recipe.norm_batch_size=null",
            "budget.global_batch_size=15", "budget.epochs=1", "evaluation.train_eval_samples=4", "evaluation.batch_size=40",
            "arms.SGDR.optimizer={name: sgd, lr: 0.02}", "arms.SGDR.decay={name: none}",
        ],
    )  # fmt: skip
    (trial,) = (p.trial for p in planned(loaded, {}))
    assert trial is not None
    result = train(trial, Store(tmp_path))
    assert result["step"] == 10
    assert result["metrics"]["val/loss"] < (UNTRAINED + TRAINED) / 2
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("arm", [ADAMW, SGDW], ids=["adamw", "sgdw"])
@pytest.mark.parametrize("backend", [{}, ZERO_1, ZERO_2, ZERO_3, FSDP], ids=["ddp", "deepspeed-1", "deepspeed-2", "deepspeed-3", "fsdp"])
def test_reset_moments_leaves_the_weights_alone(few: Path, backend: dict[str, Any], arm: dict[str, Any]) -> None:
    """The step after it is that of an optimizer that never took one, from the same weights."""
    one = on(backend, few, arm, budget={"epochs": 1, "global_batch_size": 25})
    images, labels = torch.randint(0, 255, (25, 1, 28, 28), dtype=torch.uint8), torch.arange(25) % 10

    def stepped(worker: engine.Engine) -> dict[str, torch.Tensor]:
        worker.train_step(images, labels, lr=0.01, weight_decay=0.001, step=0)
        return {name: value.detach().clone() for name, value in worker._state().items()}

    worker = engine.build(one, Place(0, 0, 1, torch.device("cpu")))
    stepped(worker)
    before = stepped(worker)
    worker.reset_moments()
    after = stepped(worker)
    fresh = engine.build(one, Place(0, 0, 1, torch.device("cpu")))
    fresh._load_weights({name: value.clone() for name, value in before.items()})
    expected = stepped(fresh)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert any(not torch.allclose(after[name], before[name], rtol=1e-6, atol=1e-7) for name in before)


def test_moments_are_reset_at_every_restart_and_nowhere_else(tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the attempt that resumes at a restart."""
    t = small(few, **SGDW, schedule={"name": "cosine_restarts", "t_0": 3 / 7, "t_mult": 2, "reset_moments": True})
    seen: list[int] = []
    taken = 0
    plain_reset, plain_step = engine.Engine.reset_moments, engine.Engine.train_step

    def reset(self: engine.Engine) -> None:
        seen.append(taken)
        plain_reset(self)

    def step(self: engine.Engine, *args: Any, **options: Any) -> engine.Step:
        nonlocal taken
        taken = options["step"] + 1
        return plain_step(self, *args, **options)

    monkeypatch.setattr(engine.Engine, "reset_moments", reset)
    monkeypatch.setattr(engine.Engine, "train_step", step)
    undisturbed = train(t, Store(tmp_path / "calm"))
    assert seen == [3, 9]
    store = Store(tmp_path / "stopped")
    train(t, store, stop=Told(8))  # asked once a step: it stops after the ninth
    taken = 9
    result = train(t, store)
    assert seen == [3, 9, 3, 9]
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    kept = small(few, **SGDW)
    assert kept.trial_id != t.trial_id
    assert train(kept, Store(tmp_path / "kept"))["weights_sha256"] != undisturbed["weights_sha256"]
