"""Running statistics of the same global batches in shares, on 1, 2 and 4 gloo ranks."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness import models
from harness.dist import Ranks, joined
from harness.norm import BatchNorm, layers, update_running_statistics
from tests.trials import trial

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch._dynamo", "harness.train"])  # imported once: a rank starts in a tenth of a second

GLOBAL_BATCH, NORM_BATCH, STEPS = 64, 8, 10
RUNS = {"ours": 16, "whole share": 64, "norm batch": 8, "stock": 16}
"""{run: samples of a micro-batch, or the rank's share if that is less}"""


def stock(model: nn.Module) -> nn.Module:
    """The same model with torch's own layer in place of ours."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BatchNorm):
                setattr(parent, name, nn.BatchNorm2d(child.num_features).to(child.weight.dtype))
    return model


def trained(run: str, precision: str, ranks: Ranks) -> dict[str, Tensor]:
    """The state after STEPS steps of SGD on this rank's share of the same batches, whatever the number of ranks."""
    recipe = {"norm_batch_size": NORM_BATCH, "precision": precision}
    budget = {"epochs": 1, "global_batch_size": GLOBAL_BATCH}
    model: nn.Module = models.build(trial(model="mnist5k_cnn_bn", recipe=recipe, budget=budget).workload, seed=0)
    model = stock(model) if run == "stock" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    replica = DistributedDataParallel(model) if ranks.world_size > 1 else model  # with the buffers of rank 0 for all, as by default
    share = GLOBAL_BATCH // ranks.world_size
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (GLOBAL_BATCH, 1, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator)
        own = slice(ranks.rank * share, (ranks.rank + 1) * share)
        batches = list(zip(images[own].split(RUNS[run]), labels[own].split(RUNS[run]), strict=True))
        for x, y in batches:
            (F.cross_entropy(replica(x), y) / len(batches)).backward()
        update_running_statistics(layers(model), ranks)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _rank(rank: int, world_size: int, precision: str, folder: Path) -> None:
    with (folder / f"log-{world_size}-{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"WRBENCH_RENDEZVOUS": f"file://{folder}/rendezvous-{world_size}", "CUDA_VISIBLE_DEVICES": ""}
    with joined(60) as ranks:
        torch.save({run: trained(run, precision, ranks) for run in RUNS}, folder / f"{world_size}-{rank}.pt")
    sys.exit(0)


def states(precision: str, folder: Path) -> dict[tuple[int, int], dict[str, dict[str, Tensor]]]:
    """{(world size, rank): {run: state}}."""
    found: dict[tuple[int, int], dict[str, dict[str, Tensor]]] = {}
    for world_size in (1, 2, 4):
        processes = [_server.Process(target=_rank, args=(rank, world_size, precision, folder)) for rank in range(world_size)]
        for p in processes:
            p.start()
        for p in processes:
            p.join(60)
        late = [p for p in processes if p.exitcode is None]
        for p in late:
            p.kill()
        logs = "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob(f"log-{world_size}-*")))
        assert [p.exitcode for p in processes] == [0] * world_size, logs
        found |= {(world_size, rank): torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)}
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor], kind: str) -> float:
    """The largest relative difference of the tensors whose name ends with `kind`, each by its Euclidean norm."""
    names = [name for name in b if name.endswith(kind)]
    assert len(names) >= 3
    return max(float((a[n].double() - b[n].double()).norm() / b[n].double().norm()) for n in names)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-6), ("fp64", 1e-13)])
def test_running_statistics_are_a_function_of_the_global_batch(precision: str, limit: float, tmp_path: Path) -> None:
    found = states(precision, tmp_path)
    control = found[1, 0]["ours"]
    means, variances = partial(difference, kind="running_mean"), partial(difference, kind="running_var")
    for (world_size, rank), by_run in found.items():
        for run in ("ours", "whole share", "norm batch"):
            for measure in (means, variances):
                assert measure(by_run[run], control) < limit, f"{run} on rank {rank} of {world_size}: {measure(by_run[run], control):.1e}"
        first = found[world_size, 0]["ours"]
        assert all(torch.equal(by_run["ours"][name], value) for name, value in first.items()), f"rank {rank} of {world_size} has its own"
        assert {int(v) for name, v in by_run["ours"].items() if name.endswith("num_batches_tracked")} == {STEPS}

    # the power of it: torch's layer, whose weights agree as well, is far outside of the limit
    for world_size in (2, 4):
        theirs, alone = found[world_size, 0]["stock"], found[1, 0]["stock"]
        assert difference(theirs, alone, "weight") < 10 * limit
        assert means(theirs, alone) > 0.01 and variances(theirs, alone) > 0.01
