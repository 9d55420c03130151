"""What a trial takes at scale, on paper: bytes of a rank, bytes on the wire, a checkpoint, images to read, points to track.

Pure arithmetic, in bytes and seconds, of numbers that somebody states: parameters, a GPU's speed, a network's. Tests hold peaks of
memory, the wire and points against real steps and a journal (tests/integration/test_scaling.py, tests/unit/test_scaling.py), and
`make bench` moments and copies against engines that run (tests/benchmarks/sharding.py). Activations are not counted, nor autocast's
copies of the weights, 2 bytes a parameter: they do not depend on the number of ranks. `python -m launch.scaling` prints the tables
of launch/README.md.
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

FORWARD, BACKWARD = 1 / 3, 2 / 3
"""of a step's arithmetic is in either pass"""

BUCKET = 500_000_000
"""elements that DeepSpeed reduces at once: harness.backends.zero, and never more than the parameters"""

PREFETCH = 50_000_000
"""elements that DeepSpeed 3 gathers at once: stage3_prefetch_bucket_size, its default"""

LIVE = 1_000_000_000
"""elements that DeepSpeed 3 keeps gathered: stage3_max_live_parameters and stage3_max_reuse_distance, their defaults"""

UNIT = 0.25
"""share of the parameters in FSDP's largest unit at most, ResNet-18 (0.40) and the digits' networks aside: tests/unit/test_models.py"""


@dataclass(frozen=True)
class Bytes:
    """Of one rank."""

    weights: float
    gradients: float
    """as the update finds them"""
    moments: float
    copy: float
    """DeepSpeed's fp32 copy of its part of the weights"""
    passing: float
    """at the peak of a step: gradients in whatever form, gathered weights, buffers"""

    @property
    def peak(self) -> float:
        """The most that is held at a time; a model does not fit if this and its activations do not."""
        return self.weights + self.moments + self.copy + self.passing


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step, by what can hide them at best."""

    forward: float
    backward: float
    exposed: float
    """while nothing computes"""
    last: float
    """of `backward`, under the last micro-batch's alone"""
    micro_batches: int

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exposed

    def exposed_seconds(self, bytes_per_second: float) -> float:
        """Of every step, however long."""
        return self.exposed / bytes_per_second

    def hiding_seconds(self, bytes_per_second: float) -> float:
        """The shortest arithmetic of a step, forward and backward, under which the rest can hide."""
        return max(self.forward / FORWARD, self.micro_batches * self.last / BACKWARD) / bytes_per_second


def moments(optimizer: Optimizer) -> int:
    """Numbers that the optimizer keeps of a parameter."""
    return 2 if optimizer.name == "adam" else int(optimizer.momentum > 0)


def memory(parameters: int, kept: int, backend: Backend, world: int, micro_batches: int = 1, unit: float = UNIT) -> Bytes:
    """`kept`: numbers that the optimizer keeps of a parameter; `unit`: share of the parameters in FSDP's largest unit.

    DDP accumulates beside its buckets. DeepSpeed copies gradients into a bucket, and that once more to send it; at the update 1-3
    hold those of their part twice, as reduced and flattened. DeepSpeed 3 keeps its bucket, and what it has gathered until the
    backward pass. FSDP accumulates whole gradients. With offload_optimizer moments and copy are in the host's memory.
    """
    whole, part, accumulates = float(FP32 * parameters), FP32 * parameters / world, micro_batches > 1
    if backend.name == "ddp":
        held = kept * (part if backend.zero_stage else whole)
        return Bytes(whole, whole, held, 0.0, whole * (1 + (accumulates and world > 1)))
    if backend.name == "deepspeed":
        bucket = float(FP32 * min(parameters, BUCKET))
        if backend.zero_stage == 0:
            return Bytes(whole, whole, kept * whole, 0.0, whole + bucket)
        gathered = float(FP32 * (min(parameters, LIVE) + min(parameters, PREFETCH)))
        reduced = part * (accumulates + (parameters > BUCKET))
        passing = {1: whole + bucket, 2: 2 * bucket + reduced, 3: bucket + part + gathered}[backend.zero_stage]
        return Bytes(part if backend.zero_stage == 3 else whole, 2 * part, kept * part, part, passing)
    gathered = 3 * unit * whole if backend.zero_stage == 3 else (1 + 2 * unit) * whole
    gradients = whole if accumulates else part * (backend.zero_stage == 3)  # at stage 2 the weights are gone once gradients are there
    return Bytes(part, part, kept * part, 0.0, gathered + gradients)


def traffic(parameters: int, backend: Backend, world: int, micro_batches: int = 1) -> Sent:
    """By ring algorithms: (n - 1) / n of the weights a gather, a scatter or a broadcast; an all-reduce is two.

    DeepSpeed 0-2 all-reduce (use_multi_rank_bucket_allreduce, its default), 2 every micro-batch, and the backward pass waits for it
    (overlap_comm, off by default); 1 and 2 then gather their weights, as ZeroRedundancyOptimizer sends its own. DeepSpeed 3 gathers
    and scatters every micro-batch, and overlaps all but the first bucket gathered and the last one reduced; beyond half of LIVE it
    gathers again in the backward pass, at most what is said here. FSDP gathers every micro-batch, at stage 3 once more in the
    backward pass, and reduces after the last. One unit of FSDP at either end, and DDP's last bucket, hide under nothing either: not
    taken off.
    """
    once, m = FP32 * parameters * (world - 1) / world, micro_batches
    if backend.name == "ddp":
        return Sent(0.0, 2 * once, once * (backend.zero_stage == 1), 2 * once, m)
    if backend.name == "deepspeed" and backend.zero_stage < 3:
        return Sent(0.0, 0.0, once * {0: 2, 1: 3, 2: 2 * m + 1}[backend.zero_stage], 0.0, m)
    if backend.name == "deepspeed":
        first, last = min(1.0, PREFETCH / parameters), min(1.0, BUCKET / parameters)
        under = (1 - last + max(0.0, 1 - LIVE / 2 / parameters)) * once
        return Sent((1 - first) * once * m, under * m, (first + last) * once * m, under, m)
    again = once * (backend.zero_stage == 3)
    return Sent(once * m, once + again * m, 0.0, once + again, m)


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


SIZES = {"ResNet-50, 26M": (25_557_032, 0.24), "ViT-L, 304M": (304_326_632, 1 / 24), "1B": (1_000_000_000, 1 / 24)}
"""parameters, and the share of them in the largest block"""
WORLDS = (8, 64, 1024)
BACKENDS = (
    *(Backend(name="ddp", zero_stage=stage) for stage in (0, 1)),
    *(Backend(name="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)),
    *(Backend(name="fsdp", zero_stage=stage) for stage in (2, 3)),
)
MICRO_BATCHES = (1, 4)
NETWORK = 25e9
"""bytes a second of a rank: 200 Gb/s"""
DISK = 1e9
"""bytes a second that a checkpoint is written with"""
A_CORE = 640
"""images a second that a core reads, decodes and resizes: `make bench-data`, 109 kB a photograph"""


def _either(form: str, *values: float) -> str:
    """One of them where they look the same."""
    return " or ".join(dict.fromkeys(format(value, form) for value in values))


def main() -> None:
    out = Console(width=140, highlight=False)
    out.print(
        f"Of a rank, AdamW, at {' or '.join(map(str, MICRO_BATCHES))} micro-batches a step: GB at the peak without activations, by GPUs; "
        f"GB sent; at {NETWORK / 1e9:g} GB/s,\nms of a step in which nothing computes, and of the least arithmetic that can hide the rest",
        soft_wrap=True,
    )
    cells = []
    for label, (size, unit) in SIZES.items():
        for backend in BACKENDS:
            sent = [traffic(size, backend, WORLDS[-1], count) for count in MICRO_BATCHES]
            held = ([memory(size, 2, backend, world, count, unit).peak / 1e9 for count in MICRO_BATCHES] for world in WORLDS)
            row = [_either(".2f", *peaks) for peaks in held] + [_either(".2f", *(each.total / 1e9 for each in sent))]
            row += [
                _either(".0f", *(1e3 * seconds(each, NETWORK) for each in sent)) for seconds in (Sent.exposed_seconds, Sent.hiding_seconds)
            ]
            cells.append([label, f"{backend.name} {backend.zero_stage}", *row])
    out.print(table(("parameters", "backend", *(f"{world:,}" for world in WORLDS), "sent", "exposed", "hides the rest"), cells))

    out.print("\nA checkpoint with AdamW's moments")
    cells = []
    for label, (size, _) in SIZES.items():
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
