"""ResNet-50 on shards of photographs, as a rank of torchrun: how fast, and whether a resumed run ends at the same bits.

    python -m torch.distributed.run --standalone --nproc-per-node N -m tests.benchmarks.gpu_train FOLDER cuda

On a CPU a small part, to test the script itself. Rank 0 writes FOLDER/found.json: a list of rows.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch

from harness import bench, checkpoint, engine, numerics
from harness.config import Trial
from harness.data import loader
from harness.data.build import build
from harness.data.fixture import CLASSES
from harness.dist import joined
from harness.schedule import steps_per_epoch
from harness.store import Store
from harness.study import load, planned
from harness.train import train
from tests.equivalence.problem import distance
from tests.report import Row, line, row
from tests.trials import Told

STUDY, FOUND = "study.yaml", "found.json"
BATCH = {"cuda": 256, "cpu": 8}
"""of a rank"""
ENOUGH = 1.1
"""times the images that training takes, read while nothing trains: with fewer cores than that the loop is held up by reading, whatever it
does"""
SHARDS, BOUND, BARE = bench.KINDS


def samples(device: str, world: int) -> int:
    """Ten batches of a rank, or what one of all ranks takes: a fifth of them is not trained on."""
    return BATCH[device] * max(10, 5 * world // 4 + 1)


def prepare(folder: Path, device: str, world: int) -> None:
    """The shards and the study, before any rank starts."""
    build("fixture", None, folder / "shards", samples=samples(device, world))
    (folder / STUDY).write_text(
        "name: gpu_check\nworkload: imagenet_resnet50\narms: {SGDW: {optimizer: {name: sgd, lr: 0.01},"
        " decay: {name: decoupled, weight_decay: 0.05, normalised: true}, schedule: {name: cosine}}}\n"
    )


def trial_of(folder: Path, device: str, world: int, *more: str) -> Trial:
    """imagenet_resnet50 as configs/ has it, SGDW, on these photographs: 256 images of 224 pixels a GPU, compiled, channels last."""
    cuda, batch = device == "cuda", BATCH[device]
    size, held = 224 if cuda else 32, samples(device, world) // 5
    fixed = {
        "workload.data.path": folder / "shards", "workload.data.num_classes": CLASSES, "workload.data.image_size": size,
        "workload.data.resize": size * 8 // 7, "workload.data.train_samples": samples(device, world) - held, "workload.data.holdout_per_class": 0,
        "workload.data.val_samples": held, "budget.global_batch_size": batch * world,
        "evaluation.train_eval_samples": batch, "evaluation.batch_size": batch, "evaluation.log_every_steps": 5, "checkpoint.every_epochs": 10_000, "backend.timeout_seconds": 600,
    }  # fmt: skip
    fixed |= (
        {"backend.compile": "true", "backend.channels_last": "true"}
        if cuda
        else {"workload.recipe.precision": "fp32", "workload.recipe.norm_batch_size": "null"}
    )
    loaded = load(folder / STUDY, [*(f"{key}={value}" for key, value in fixed.items()), *more])
    (trial,) = (p.trial for p in planned(loaded, {}))
    assert trial is not None
    return trial


def speed(folder: Path, device: str, world: int) -> Iterator[Row]:
    cuda = device == "cuda"
    trial = trial_of(folder, device, world)
    measured = bench.measure(trial, 60 if cuda else 2, 2 if cuda else 1, _told)
    rates, shown = measured.images_per_second, list(measured.lines())
    name = f"{trial.workload.model.name}, {trial.workload.data.image_size} pixels, batch {trial.budget.global_batch_size}"

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))

    fed, read = ratio(SHARDS, BOUND), measured.read_per_second / statistics.median(rates[BOUND])
    judged = cuda and read >= ENOUGH
    yield row(
        f"{name}: read while nothing trains / on a batch at hand", read, None, shown[-1] if judged else f"too little to judge: {shown[-1]}"
    )
    yield Row(f"{name}: on shards / on a batch at hand", fed, 0.97 if judged else None, not judged or fed >= 0.97, shown[0], exceeds=True)
    if judged and fed < 0.97:  # is it that threads which read and the loop share an interpreter lock?
        with patch.object(loader, "works_on_each", lambda recipe: True):
            apart = bench.measure(trial, 60, 2, _told)
        first, *_, last = apart.lines()
        both = zip(apart.images_per_second[SHARDS], apart.images_per_second[BOUND], strict=True)
        yield row(f"{name}: the same, read by processes", statistics.median(a / b for a, b in both), None, f"{first}; {last}")
    yield row(f"{name}: time of our step / of a bare loop's", ratio(BARE, BOUND), 1.02 if cuda else None, shown[1])
    yield row(f"{name}: a bare loop's images/s", statistics.median(rates[BARE]), None, shown[2])
    yield row(f"{name}: TFLOP/s a rank", measured.flops_a_second / 1e12, None, shown[-1])


def deterministic(folder: Path, device: str, world: int) -> Iterator[Row]:
    """Told to stop at its first logged step, and run again, against the same run undisturbed; and what it costs."""
    cuda = device == "cuda"
    steps = 40 if cuda else 10
    same = ("backend.deterministic=true", "evaluation.val=false")
    epochs = steps / steps_per_epoch(trial_of(folder, device, world))
    trial = trial_of(folder, device, world, *same, f"budget.epochs={epochs}")
    whole, parted = Store(folder / "whole"), Store(folder / "parted")
    undisturbed = train(trial, whole)
    _told(1, 3)
    stopped = train(trial, parted, stop=Told(0))
    _told(2, 3)
    again = train(trial, parted)
    states = [stopped["state"], again["state"], again["attempts"]]
    saved = [
        checkpoint.at(store.trial(trial.study, trial.trial_id).checkpoints / f"step-{steps}-attempt-{attempt}").load("model.pt")
        for store, attempt in ((whole, 1), (parted, 2))
    ]
    far = distance(*[{name: value.numpy() for name, value in model.items() if value.is_floating_point()} for model in saved])
    bits = "bit-equal" if undisturbed["weights_sha256"] == again["weights_sha256"] else "not bit-equal"
    note = f"{bits}; stopped at step {stopped['step']} of {steps}"
    yield row("deterministic: stopped and resumed / undisturbed", far, 0.0, note, ok=states == ["interrupted", "finished", 2])
    measured = bench.measure(trial_of(folder, device, world, *same), 30 if cuda else 2, 1, _told)
    yield row("deterministic: images/s", statistics.median(measured.images_per_second[BOUND]), None, list(measured.lines())[1])


def replicas(folder: Path, device: str, world: int) -> Iterator[Row]:
    """Twenty steps on other images on every rank, compiled where the workload is: the weights and buffers are the same on all, to the bit."""
    if world == 1:
        return
    trial = trial_of(folder, device, world)
    size, batch = trial.workload.data.image_size, BATCH[device]
    with joined(trial.backend.timeout_seconds) as ranks, numerics.switched(trial.backend):
        worker = engine.build(trial, ranks)
        draw = torch.Generator().manual_seed(ranks.rank)
        for step in range(20):
            images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=draw)
            worker.train_step(images, torch.randint(0, CLASSES, (batch,), generator=draw), lr=0.01, weight_decay=0.001, step=step)
            _told(step + 1, 20)
        found = ranks.gathered(checkpoint.weights_sha256(worker.evaluation_model().state_dict()))
    yield row(f"replicas after 20 steps on {world} ranks: other ones than rank 0's", sum(f != found[0] for f in found), 0.0)


def _told(done: int, total: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"training: {done} of {total}", file=sys.stderr, flush=True)


def main() -> None:
    folder, device = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)  # as launch sets it in a rank: sixteen threads that read, with a team of sixteen each, leave the loop no core
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found: list[Row] = []
    for section in (replicas, speed, deterministic):
        for one in section(folder, device, world):
            found.append(one)
            if rank == 0:
                print(line(one), file=sys.stderr, flush=True)
                (folder / FOUND).write_text(json.dumps([asdict(r) for r in found]))


if __name__ == "__main__":
    main()
