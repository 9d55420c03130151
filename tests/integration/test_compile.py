"""What two ranks compile: no graph for the throw-away pass of DDP alone, and one for every block of FSDP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from harness import engine
from harness.config import Trial
from harness.data import order
from harness.dist import Ranks
from tests.benchmarks.shard_rank import batch
from tests.equivalence import groups
from tests.integration import ranks  # noqa: F401 - its list of preloaded modules must not come after this one's
from tests.trials import trial

groups.preload()

RGB = {"channels": 3, "mean": [0.5] * 3, "std": [0.3] * 3}


def compiled(model: str, size: int, recipe: dict[str, Any] | None = None, **backend: Any) -> Trial:
    return trial(
        model=model, data=RGB | {"image_size": size}, recipe=recipe or {}, backend={"compile": True} | backend,
        budget={"epochs": 7, "global_batch_size": 8},
    )  # fmt: skip


CASES = {
    "resnet18 channels_last": compiled("resnet18", 32, channels_last=True),
    "shake-shake": compiled("shake_26_2x64d", 8),
    "mixup": compiled("resnet18", 32, {"mixup": 0.2}),
    "fsdp convnext": compiled("convnext_tiny", 32, name="fsdp"),
}


@dataclass(frozen=True)
class Compiled:
    """Graphs after building, and after each of two steps. Fails where torch gives up and runs a block as it is written."""

    name: str
    trial: Trial

    world = 2
    needs = ()
    cost = 1
    group = ("compile",)

    def execute(self, place: Ranks, root: Path) -> list[int]:
        from torch._dynamo.testing import CompileCounter

        torch._dynamo.reset()
        counter, plain, found = CompileCounter(), nn.Module.compile, []
        with (
            mock.patch.object(nn.Module, "compile", lambda module, **options: plain(module, backend=counter, **options)),
            mock.patch.object(torch._dynamo.config, "fail_on_recompile_limit_hit", True),
        ):
            worker = engine.build(self.trial, place)
            found.append(counter.frame_count)
            images, labels = batch(self.trial, place)
            recipe = self.trial.workload.recipe
            for step in range(2):
                mix = order.mixing(self.trial.seed, step, recipe.mixup, recipe.cutmix, images.shape[-1])
                worker.train_step(images, labels, lr=1e-3, weight_decay=1e-3, step=step, mix=mix)
                found.append(counter.frame_count)
        return found


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = [Compiled(name, t) for name, t in CASES.items()]
    return groups.execute(runs, tmp_path_factory.mktemp("compile"), "cpu", 2, lambda run: None)


@pytest.mark.parametrize("name", [name for name in CASES if "fsdp" not in name])
def test_the_throw_away_pass_of_ddp_compiles_what_steps_run(graphs: dict[str, Any], name: str) -> None:
    built, *stepped = graphs[name]
    assert built > 0
    assert stepped == [built, built]


def test_a_block_for_every_drop_rate_is_compiled(graphs: dict[str, Any]) -> None:
    built, first, second = graphs["fsdp convnext"]
    assert built == 0
    assert first == second > 9, "ConvNeXt's blocks have nine rates"
