"""One rank of the loop benchmark: `ours` is train() with journal and delivery; `bare` is a plain PyTorch loop.

Prints {"steps": seconds between the ends of consecutive optimizer steps}. Both use the same model, batches, gloo DDP and
one thread a rank. Intervals that hold an evaluation, a checkpoint's snapshot or commit, or (at first) DDP's regrouping are
left out.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness import models
from harness.attempt import Attempt
from harness.config import Trial
from harness.data import loader
from harness.schedule import steps_per_epoch, total_steps
from harness.store import Store, TrialFolder
from harness.train import train

WARM_UP = 10


def ours(trial: Trial, store: Store) -> tuple[list[float], set[int]]:
    """(the end of each step, how many had ended at each commit of a checkpoint): it comes when its files are written, steps later."""
    ends: list[float] = []
    commits: set[int] = set()

    class Watched(Attempt):
        def commit(self) -> None:
            commits.add(len(ends))
            super().commit()

    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    with patch("harness.train.Attempt", Watched):
        train(trial, store)
    return ends, commits


def bare(trial: Trial) -> list[float]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    td.init_process_group("gloo", init_method=os.environ["WRBENCH_RENDEZVOUS"], rank=rank, world_size=world)
    data = loader.open_data(trial.workload.data)
    batches = list(loader.train_batches(data, trial, rank, world, 0, total_steps(trial)))
    model = DistributedDataParallel(models.build(trial.workload, trial.seed), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.optimizer.lr, weight_decay=0.01, fused=True)
    ends = []
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    td.destroy_process_group()
    return ends


def main() -> None:
    kind, root, folder = sys.argv[1:]
    torch.set_num_threads(1)
    trial = TrialFolder(Path(folder)).read_config()
    ends, commits = ours(trial, Store(Path(root))) if kind == "ours" else (bare(trial), set())
    interrupted = {s for s in range(0, total_steps(trial), steps_per_epoch(trial))} | commits
    print(json.dumps({"steps": [b - a for i, (a, b) in enumerate(itertools.pairwise(ends), 1) if i >= WARM_UP and i not in interrupted]}))
    sys.stdout.flush()
    os._exit(0)  # torch may hang while it takes gloo down; the figures are out


if __name__ == "__main__":
    main()
