"""What a trial takes at scale, on paper: bytes of a rank, bytes on the wire, a checkpoint, images to read, points to track.

Pure arithmetic, in bytes and seconds, of numbers that somebody states: parameters, a GPU's speed, a network's. `make bench` holds moments
and copies against engines that run (tests/benchmarks/sharding.py), a test the points against a journal. Activations are not
counted: they depend on the micro-batch and not on the number of ranks. `python -m launch.scaling` prints the tables of the README.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from harness import schedule
from harness.config import Backend, Optimizer, Trial
from harness.study import load, planned
from launch.terminal import duration, table

FP32 = 4
"""bytes: weights, gradients and moments are fp32 in every precision but fp64 (bf16 is autocast)"""

LOGGED = 9
"""points of every logged step: harness.train"""

SPEED = 5
"""points of every evaluation on a GPU of a known peak: harness.speed; on a CPU there are two fewer"""

SPLIT = 3
"""points of every evaluation of a split, and one more from the first completed cycle on: the answer at hand"""

CYCLE_END = 3
"""points of a cycle's end: train_eval/loss, weights/norm, weights/update_ratio; adam/v_below_eps is one more"""

BACKWARD = 2 / 3
"""of a step's arithmetic is the backward pass, under which communication can hide"""


@dataclass(frozen=True)
class Bytes:
    """Of one rank."""

    weights: float
    gradients: float
    moments: float
    copy: float
    """DeepSpeed's fp32 copy of its part of the weights"""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.copy


def moments(optimizer: Optimizer) -> int:
    """Numbers that the optimizer keeps of a parameter."""
    return 2 if optimizer.name == "adam" else int(optimizer.momentum > 0)


def memory(parameters: int, kept: int, backend: Backend, world: int) -> Bytes:
    """What a rank holds between two steps, gradients included; `kept`: numbers that the optimizer keeps of a parameter.

    DeepSpeed 1-3 hold the gradients of their part twice, as reduced and flattened for the step.
    """
    whole, part = float(FP32 * parameters), FP32 * parameters / world
    if backend.name == "ddp":
        return Bytes(whole, whole, kept * (part if backend.zero_stage else whole), 0.0)
    if backend.name == "deepspeed":
        if backend.zero_stage == 0:
            return Bytes(whole, whole, kept * whole, 0.0)
        return Bytes(part if backend.zero_stage == 3 else whole, 2 * part, kept * part, part)
    return Bytes(part, part, kept * part, 0.0)


def traffic(parameters: int, backend: Backend, world: int, micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step, by ring algorithms: (n - 1) / n of the weights a gather, a scatter or a broadcast.

    An all-reduce is two. Sharded gradients are reduced for every micro-batch, and sharded weights gathered twice for each.
    """
    once = FP32 * parameters * (world - 1) / world
    if backend.name == "ddp":
        return once * (3 if backend.zero_stage else 2)  # ZeroRedundancyOptimizer also sends its weights
    if backend.name == "deepspeed":
        return once * {0: 2, 1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[backend.zero_stage]
    return once * micro_batches * (3 if backend.zero_stage == 3 else 2)


def hiding_seconds(sent: float, bytes_per_second: float) -> float:
    """The shortest step whose backward pass can hide bytes on the wire: the bound of overlap."""
    return sent / bytes_per_second / BACKWARD


def checkpoint_bytes(parameters: int, kept: int) -> int:
    """Weights and moments, over all ranks, whatever the backend; buffers are left out."""
    return FP32 * parameters * (1 + kept)


def written_bytes(parameters: int, kept: int, backend: Backend, world: int) -> float:
    """Of a checkpoint, by rank 0, which writes all weights and, where they are sharded, its part of the moments."""
    return FP32 * parameters * (1 + kept / (world if backend.zero_stage else 1))


def pixel_share(trial: Trial) -> float:
    """Pixels of a training image in the mean over all steps, as a share of image_size squared: a step's time is nearly proportional.

    1 without a schedule of resolutions.
    """
    total, per_epoch = schedule.total_steps(trial), schedule.steps_per_epoch(trial)
    pixels = sum(schedule.image_size(trial, first) ** 2 * min(per_epoch, total - first) for first in range(0, total, per_epoch))
    return pixels / total / trial.workload.data.image_size**2


def points(trial: Trial) -> int:
    """Metric points of one trial in MLflow; a finalist's further test set is not counted."""
    ends, evaluated = schedule.cycle_ends(trial), schedule.evaluations(trial)
    every = trial.evaluation.log_every_steps
    logged = evaluated | schedule.checkpoints(trial) | set(range(every, schedule.total_steps(trial) + 1, every))
    splits = (trial.workload.data.holdout_samples > 0) + trial.evaluation.val
    answered = sum(step >= ends[0] for step in evaluated) if ends else 0
    at_ends = CYCLE_END + (trial.optimizer.name == "adam")
    return LOGGED * len(logged) + SPEED * len(evaluated) + splits * (SPLIT * len(evaluated) + answered) + at_ends * len(ends)


SIZES = {"ResNet-50, 26M": 25_557_032, "ViT-L, 304M": 304_326_632, "1B": 1_000_000_000}
WORLDS = (8, 64, 1024)
BACKENDS = (
    *(Backend(name="ddp", zero_stage=stage) for stage in (0, 1)),
    *(Backend(name="deepspeed", zero_stage=stage) for stage in (1, 2, 3)),
    *(Backend(name="fsdp", zero_stage=stage) for stage in (2, 3)),
)
NETWORK = 25e9
"""bytes a second of a rank: 200 Gb/s"""
DISK = 1e9
"""bytes a second that a checkpoint is written with"""
A_CORE = 640
"""images a second that a core reads, decodes and resizes: `make bench-data`, 109 kB a photograph"""


def main() -> None:
    out = Console(width=140, highlight=False)
    out.print(
        f"Of a rank, AdamW, one micro-batch a step: GB held, GB sent, and the shortest step that can hide it at {NETWORK / 1e9:g} GB/s"
    )
    cells = []
    for label, size in SIZES.items():
        for backend in BACKENDS:
            held = (f"{memory(size, 2, backend, world).total / 1e9:.2f}" for world in WORLDS)
            sent = traffic(size, backend, WORLDS[-1])
            hides = f"{1e3 * hiding_seconds(sent, NETWORK):.0f} ms"
            cells.append([label, f"{backend.name} {backend.zero_stage}", *held, f"{sent / 1e9:.2f}", hides])
    out.print(table(("parameters", "backend", *(f"{world} GPUs" for world in WORLDS), f"sent, {WORLDS[-1]:,} GPUs", "step"), cells))

    out.print("\nA checkpoint with AdamW's moments")
    cells = []
    for label, size in SIZES.items():
        seconds = (written_bytes(size, 2, backend, 64) / DISK for backend in (BACKENDS[0], BACKENDS[-1]))
        cells.append([label, f"{checkpoint_bytes(size, 2) / 1e9:.2f} GB", *(f"{s:.1f} s" for s in seconds)])
    out.print(table(("parameters", "size", f"rank 0 writes, at {DISK / 1e9:g} GB/s, for", "sharded over 64"), cells))

    loaded = load("configs/study/imagenet_adamwr_vs_sgdwr.yaml")
    trial, reference = next(p.trial for p in planned(loaded, {}) if p.arm == "AdamWR" and p.trial is not None), loaded.workload.reference
    assert reference is not None
    seconds_a_trial = schedule.total_steps(trial) * trial.budget.global_batch_size / reference.images_per_second / 8
    out.print(f"\n1,000 trials of {loaded.name}, eight GPUs each at {reference.images_per_second:,.0f} images/s")
    cells = []
    for gpus in WORLDS:
        at_once, cores = gpus // 8, gpus * reference.images_per_second / A_CORE
        rate = points(trial) * at_once / seconds_a_trial * 3600
        all_in_all = duration(1000 / at_once * seconds_a_trial)
        cells.append([f"{gpus:,}", f"{at_once}", all_in_all, f"{cores:,.0f} ({cores / gpus:.1f})", f"{rate:,.0f}"])
    out.print(table(("GPUs", "trials at a time", "time in all", "cores that read (a GPU)", "points an hour to MLflow"), cells))


if __name__ == "__main__":
    main()
