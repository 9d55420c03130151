"""What two ranks compile: no graph for the throw-away pass of DDP alone, and one for every block of FSDP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
from harness.store import Store
from tests.benchmarks.shard_rank import batch
from tests.equivalence import groups
from tests.integration import ranks  # noqa: F401 - its list of preloaded modules must not come after this one's
from tests.integration.test_train import small
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


def test_a_signal_while_it_compiles_reaches_the_rank_and_leaves_its_compilers_alone(few: Path, tmp_path: Path) -> None:
    """SLURM sends it to every process of a step. Without its compilers the rank would fail, on a node that is avoided then."""
    t, store = small(few, backend={"compile": True}), Store(tmp_path / "runs")
    folder = store.trial(t.study, t.trial_id)
    folder.write_config(t)
    alone = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, "-m", "launch.rank", str(store.root), t.study, t.trial_id, "--threads", "1", "--signal", "USR2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | alone,
    ) as rank:  # fmt: skip
        hit, deadline = 0, time.monotonic() + 240
        while rank.poll() is None and time.monotonic() < deadline:
            if any(command in ("cc1plus", "ld") for command in commands(rank.pid)):
                hit += 1
                for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
                    os.killpg(rank.pid, number)
            time.sleep(0.1)
        _, err = rank.communicate(timeout=10)
    assert (rank.returncode, folder.state().state) == (0, "interrupted"), err
    assert hit > 5, "too few to tell"


def commands(group: int) -> list[str]:
    """Names of the programs of a process group."""
    return subprocess.run(["ps", "-o", "comm=", "-g", str(group)], capture_output=True, text=True, check=False).stdout.split()
