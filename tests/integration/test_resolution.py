"""Training images that grow, and evaluation at a larger size still, through train(): the sizes, every sample, a resume in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import engine, models
from harness.config import Data, Trial
from harness.data import order
from harness.norm import Norm
from harness.store import Store
from harness.train import train
from tests.integration.ranks import history
from tests.photographs import BATCH, GROWING, VAL, a_trial, make
from tests.trials import Told

SIZES = [size for size in (16, 20, 24, 28, 32, 32, 32) for _ in range(2)]
"""of each of two steps in seven epochs"""
EVALUATED = 38


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "photographs")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """(in training, images, pixels of a side) of each forward pass; a tiny network stands in for resnet18."""
    passes: list[tuple[bool, int, int]] = []

    class Tiny(nn.Sequential):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.any():  # the clock counts operations on a black one
                passes.append((self.training, len(images), images.shape[-1]))
            logits: torch.Tensor = super().forward(images)
            return logits

    def build(data: Data, norm: Norm) -> nn.Module:
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, data.num_classes)
        return Tiny(nn.Conv2d(data.channels, 8, 3, 2, bias=False), norm(8), nn.ReLU(), *pooled)

    monkeypatch.setitem(models.BUILDERS, "resnet18", build)
    return passes


def growing(photographs: Path, recipe: dict[str, Any]) -> Trial:
    return a_trial(
        photographs, GROWING | recipe, data={"eval_image_size": EVALUATED}, budget={"epochs": 7, "global_batch_size": BATCH},
        evaluation={"log_every_steps": 1, "batch_size": 5, "train_eval_samples": 7}, checkpoint={"every_epochs": 100},
    )  # fmt: skip


def test_what_is_trained_on_and_evaluated(tmp_path: Path, photographs: Path, seen: list[tuple[bool, int, int]]) -> None:
    assert train(growing(photographs, {}), Store(tmp_path))["state"] == "finished"
    assert [one for one in seen if one[0]] == [(True, BATCH, size) for size in SIZES]
    cycle_ends = 3  # 1, 3 and 7 epochs
    evaluated = [one for one in seen if not one[0]]
    assert {size for _, _, size in evaluated} == {EVALUATED}
    assert sum(count for _, count, _ in evaluated) == cycle_ends * (VAL + 7), "every sample of val and train_eval, once each"


@pytest.mark.parametrize("stopped_after", [3, 6, 9])
def test_a_resume_in_between_is_bit_equal(
    tmp_path: Path, photographs: Path, seen: list[tuple[bool, int, int]], monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """With CutMix, whose boxes are of the step's images."""
    t = growing(photographs, {"cutmix": 1.0})
    mixed: list[tuple[int, Any]] = []
    plain: Callable[..., engine.Step] = engine.Engine.train_step

    def step(self: engine.Engine, *args: Any, **options: Any) -> engine.Step:
        mixed.append((options["step"], options["mix"]))
        return plain(self, *args, **options)

    monkeypatch.setattr(engine.Engine, "train_step", step)
    undisturbed = train(t, calm := Store(tmp_path / "calm"))
    assert mixed == [(n, order.mixing(0, n, 0.0, 1.0, size)) for n, size in enumerate(SIZES)]
    seen.clear()
    store = Store(tmp_path / "stopped")
    assert train(t, store, stop=Told(stopped_after))["state"] == "interrupted"
    result = train(t, store)
    assert [size for training, _, size in seen if training] == SIZES, "no step twice"
    assert result["attempts"] == 2
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    assert history(store.trial(t.study, t.trial_id)) == history(calm.trial(t.study, t.trial_id))
