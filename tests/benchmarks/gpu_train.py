"""ResNet-50 on shards of photographs, as a rank of torchrun: how fast, and whether a resumed run ends at the same bits.

    python -m torch.distributed.run --standalone --nproc-per-node N -m tests.benchmarks.gpu_train FOLDER cuda

On a CPU a small part, to test the script itself. Rank 0 writes FOLDER/found.json: a list of rows.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from harness import bench, checkpoint
from harness.config import Trial
from harness.data.build import build
from harness.data.fixture import CLASSES
from harness.stopping import StopRequest
from harness.store import Store
from harness.study import load, planned
from harness.train import train
from tests.equivalence.problem import distance
from tests.report import Row, row

STUDY, FOUND = "study.yaml", "found.json"
SAMPLES = {"cuda": 2560, "cpu": 80}
"""a fifth of them is not trained on"""
SHARDS, BOUND, BARE = bench.KINDS


def prepare(folder: Path, device: str) -> None:
    """The shards and the study, before any rank starts."""
    build("fixture", None, folder / "shards", samples=SAMPLES[device])
    (folder / STUDY).write_text(
        "name: gpu_check\nworkload: imagenet_resnet50\narms: {SGDW: {optimizer: {name: sgd, lr: 0.01},"
        " decay: {name: decoupled, weight_decay: 0.05, normalised: true}, schedule: {name: cosine}}}\n"
    )


def resnet50(folder: Path, device: str, world: int, *more: str) -> Trial:
    """imagenet_resnet50 as configs/ has it, SGDW, on these photographs: 256 images of 224 pixels a GPU, compiled, channels last."""
    cuda, samples = device == "cuda", SAMPLES[device]
    batch, size = (256, 224) if cuda else (8, 32)
    fixed = {
        "workload.data.path": folder / "shards", "workload.data.num_classes": CLASSES, "workload.data.image_size": size,
        "workload.data.resize": size * 8 // 7, "workload.data.train_samples": samples * 4 // 5, "workload.data.holdout_per_class": 0,
        "workload.data.val_samples": samples // 5, "budget.global_batch_size": batch * world, "evaluation.train_eval_samples": 8,
        "evaluation.log_every_steps": 5, "checkpoint.every_epochs": 10_000, "backend.timeout_seconds": 600,
    }  # fmt: skip
    fixed |= {"backend.compile": "true", "backend.channels_last": "true"} if cuda else {"workload.recipe.precision": "fp32"}
    fixed |= {} if cuda else {"workload.recipe.norm_batch_size": "null"}
    loaded = load(folder / STUDY, [*(f"{key}={value}" for key, value in fixed.items()), *more])
    (trial,) = (p.trial for p in planned(loaded, {}))
    assert trial is not None
    return trial


def speed(trial: Trial, device: str) -> list[Row]:
    cuda = device == "cuda"
    measured = bench.measure(trial, steps=60 if cuda else 2, rounds=3 if cuda else 1, progress=_told)
    rates, shown = measured.images_per_second, list(measured.lines())
    name = f"ResNet-50, {trial.workload.data.image_size} pixels, batch {trial.budget.global_batch_size}"

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))

    fed = ratio(SHARDS, BOUND)
    return [
        Row(f"{name}: on shards / on a batch at hand", fed, 0.97 if cuda else None, not cuda or fed >= 0.97, shown[0], exceeds=True),
        row(f"{name}: time of our step / of a bare loop's", ratio(BARE, BOUND), 1.02 if cuda else None, shown[1]),
        row(f"{name}: a bare loop's images/s", statistics.median(rates[BARE]), None, shown[2]),
        row(f"{name}: TFLOP/s a rank", measured.flops_a_second / 1e12, None, shown[-1]),
    ]


def _told(done: int, total: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"training: {done} of {total} rounds", file=sys.stderr, flush=True)


def resumed(folder: Path, device: str, world: int) -> Row:
    """Told to stop at its first logged step, and run again, against the same run undisturbed; deterministic kernels."""
    steps, per_epoch = (40, SAMPLES["cuda"] * 4 // 5 // (256 * world)) if device == "cuda" else (10, SAMPLES["cpu"] * 4 // 5 // (8 * world))
    trial = resnet50(folder, device, world, f"budget.epochs={steps / per_epoch}")
    torch.backends.cudnn.deterministic = True
    whole = train(trial, Store(folder / "whole"))
    told = StopRequest()
    told.signal = "USR2"
    stopped = train(trial, parted := Store(folder / "parted"), stop=told)
    again = train(trial, parted)
    assert (stopped["state"], again["state"], again["attempts"]) == ("interrupted", "finished", 2), (stopped, again)
    models = [checkpoint.at(store.trial(trial.study, trial.trial_id).checkpoints / f"step-{steps}-attempt-{attempt}").load("model.pt")
              for store, attempt in ((Store(folder / "whole"), 1), (parted, 2))]  # fmt: skip
    weights = [{name: value.numpy() for name, value in model.items() if value.is_floating_point()} for model in models]
    note = f"{'bit-equal' if whole['weights_sha256'] == again['weights_sha256'] else 'not bit-equal'}, stopped at step {stopped['step']} of {steps}"
    return row("ResNet-50: stopped, resumed, against undisturbed", distance(*weights), 0.0, note)


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    if device == "cpu":
        torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = speed(resnet50(folder, device, world), device)
    found.append(resumed(folder, device, world))
    if rank == 0:
        (folder / FOUND).write_text(json.dumps([asdict(r) for r in found]))


if __name__ == "__main__":
    main()
