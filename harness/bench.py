"""`wrbench bench train`: images a second of the loop on shards, of the same loop on a batch at hand, and of a bare loop.

The three take turns, round by round, in one process, so that what else the machine does meets them alike. On a batch that is on the
device already nothing is read: the bound of the loop on shards. The bare loop is what one would write without any of this: the same
network, compiled or not, torch's fused optimizer, no journal, no schedule. Nothing is evaluated, saved or tracked.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import engine, models, numerics, optim, speed
from harness.config import Trial
from harness.data import loader, order, workers
from harness.dist import Ranks, joined
from harness.schedule import schedule, total_steps

AHEAD = 2
"""steps that the host may be ahead of the device, in every kind as loader.on_device has it on shards"""
KINDS = ("ours, on shards", "ours, on a batch at hand", "bare loop")

LARGE = 31 << 20
"""bytes. Freeing one such block, as a first evaluation does, raises glibc's mmap threshold; before that, steps on a CPU spend a third of
their time on page faults"""


@dataclass(frozen=True)
class Measured:
    images_per_second: dict[str, list[float]]
    """kind -> one a round, all ranks together"""
    step_seconds: dict[str, list[float]]
    """kind -> each step of this rank, from the end of the step before to its own, by the device's clock"""
    host_seconds: dict[str, list[float]]
    """kind -> of each step, what this process takes to hand it to the device, the wait for its batch left out; on a CPU the step itself"""
    read_per_second: float
    """images a second, all ranks together, that the same batches are read at while nothing trains"""
    wait_fraction: float
    """of the loop on shards: share of its time spent waiting for a batch"""
    flops_a_second: float
    """of this rank, on the batch at hand: speed.flops_an_image by the median step"""
    device: str
    peak_bytes: int | None
    """of the device's memory, ours and the bare loop's together; None on a CPU"""

    def lines(self) -> Iterator[str]:
        best = statistics.median(self.images_per_second[KINDS[1]])
        on_a_device = self.peak_bytes is not None
        for kind in KINDS:
            rates, steps = self.images_per_second[kind], sorted(self.step_seconds[kind])
            p50, p99 = (1e3 * steps[min(len(steps) - 1, int(q * len(steps)))] for q in (0.5, 0.99))
            host = f", {1e3 * statistics.median(self.host_seconds[kind]):.2f} ms of it the host's" if on_a_device else ""
            yield (
                f"{kind:<26}{statistics.median(rates):>12,.1f} images/s ({min(rates):,.1f} to {max(rates):,.1f}), "
                f"{statistics.median(rates) / best:.3f} of the batch at hand; step p50 {p50:.2f} ms{host}, p99 {p99:.2f} ms"
            )
        ours, bare = (self.images_per_second[kind] for kind in KINDS[1:])
        ratio = statistics.median(b / o for o, b in zip(ours, bare, strict=True))
        yield f"time of our step / of the bare one, both on the batch at hand, median of {len(ours)} rounds: {ratio:.3f}"
        peak = speed.peak(self.device)
        share = f"{self.flops_a_second / peak:.0%} of its {peak / 1e12:.0f} in bf16" if peak else "its peak is not known here"
        memory = f"; peak memory {self.peak_bytes / 1e9:.2f} GB" if self.peak_bytes is not None else ""
        yield (
            f"waiting for data: {self.wait_fraction:.1%} of the loop on shards, read at {self.read_per_second:,.0f} images/s while nothing "
            f"trains; {self.flops_a_second / 1e12:.3f} TFLOP/s a rank on "
            f"{self.device}, {share}{memory}"
        )


def measure(trial: Trial, steps: int, rounds: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Measured:
    """`rounds` rounds of `steps` steps of each kind, after one round that is not counted. Collective."""
    with joined(trial.backend.timeout_seconds) as ranks, numerics.switched(trial.backend):
        recipe = trial.workload.recipe
        data = loader.open_data(trial.workload.data, recipe)
        torch.empty(LARGE, dtype=torch.uint8)
        ours, bare = engine.build(trial, ranks), _bare(trial, ranks)
        images, labels = next(_batches(data, trial, ranks))
        shards = _batches(data, trial, ranks)
        waited = 0.0

        def read() -> tuple[Tensor, Tensor]:
            nonlocal waited
            began = time.perf_counter()
            batch = next(shards)
            waited += time.perf_counter() - began
            return batch

        takes: dict[str, Callable[[int], object]] = {
            KINDS[0]: lambda step: _step(ours, trial, step, *read()),
            KINDS[1]: lambda step: _step(ours, trial, step, images, labels),
            KINDS[2]: lambda _: bare(images, labels),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        host: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(rounds + 1):
            for turn, kind in enumerate(KINDS[number % 3 :] + KINDS[: number % 3], 1):  # each kind follows each
                ranks.barrier()
                marks = [_mark(ranks.device)]
                for step in range(steps):
                    if step >= AHEAD:
                        _wait(marks[-AHEAD])
                    began, before = time.perf_counter(), waited
                    takes[kind](step)
                    if number:
                        host[kind].append(time.perf_counter() - began - (waited - before))
                    marks.append(_mark(ranks.device))
                ends = _seconds(marks)
                if number:
                    rates[kind].append(steps * trial.budget.global_batch_size / (ends[-1] - ends[0]))
                    seconds[kind] += [b - a for a, b in itertools.pairwise(ends)]
                if not number:
                    waited = 0.0
                progress(number * len(KINDS) + turn, (rounds + 1) * len(KINDS))
        ready = workers.AHEAD * data.threads if loader.works_on_each(recipe) else loader.AHEAD
        reading = _reading(shards, ready, steps, trial, ranks)
        cuda = ranks.device.type == "cuda"
        flops = speed.flops_an_image(ours.evaluation_model(), images.shape[1], images.shape[-1]) * len(images)
        return Measured(
            images_per_second=rates,
            step_seconds=seconds,
            host_seconds=host,
            read_per_second=reading,
            wait_fraction=waited / sum(seconds[KINDS[0]]),
            flops_a_second=flops / statistics.median(seconds[KINDS[1]]),
            device=torch.cuda.get_device_name(ranks.device) if cuda else f"a CPU, {torch.get_num_threads()} thread(s)",
            peak_bytes=torch.cuda.max_memory_allocated(ranks.device) if cuda else None,
        )


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """Now, in the device's queue of work: to wait for each step would keep the host from preparing the next one meanwhile."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait(mark: float | torch.cuda.Event) -> None:
    """Until the device has come to it."""
    if not isinstance(mark, float):
        mark.synchronize()


def _seconds(marks: list[float | torch.cuda.Event]) -> list[float]:
    """Of each mark since the first; waits for the device."""
    first = marks[0]
    if not isinstance(first, float):
        torch.cuda.synchronize()
    return [mark - first if isinstance(mark, float) else first.elapsed_time(mark) / 1e3 for mark in marks]  # type: ignore[operator, union-attr]


def _reading(batches: Iterator[loader.Batch], ready: int, steps: int, trial: Trial, ranks: Ranks) -> float:
    """images/s, all ranks together, after the batches that may be `ready` before."""
    for _ in range(ready + 1):
        next(batches)
    ranks.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * trial.budget.global_batch_size / (time.perf_counter() - began)


def _batches(data: loader.DataSet, trial: Trial, ranks: Ranks) -> Iterator[loader.Batch]:
    """The trial's batches, from the first again once they are used up."""
    while True:
        read = loader.train_batches(data, trial, ranks.rank, ranks.world_size, 0, total_steps(trial))
        yield from loader.on_device(read, ranks.device)


def _step(worker: engine.Engine, trial: Trial, step: int, images: Tensor, labels: Tensor) -> None:
    """What the loop of harness.train does between two logged steps."""
    eta, _, lam = schedule(trial, step % total_steps(trial))
    lr, weight_decay = optim.hyperparameters(trial.optimizer, trial.decay, eta, lam)
    recipe = trial.workload.recipe
    mix = order.mixing(trial.seed, step, recipe.mixup, recipe.cutmix, images.shape[-1])
    worker.train_step(images, labels, lr=lr, weight_decay=weight_decay, step=step, mix=mix)


def _bare(trial: Trial, ranks: Ranks) -> Callable[[Tensor, Tensor], None]:
    """A step of the same network with torch's own fused optimizer and DDP, in micro-batches as ours."""
    model = models.build(trial.workload, trial.seed).to(ranks.device)
    if trial.backend.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if trial.backend.compile:
        model.compile(dynamic=False)
    replica: nn.Module = model
    if ranks.world_size > 1:
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.11 knows no other name
            warnings.simplefilter("ignore", FutureWarning)
            replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    lr = 1e-6
    adam = trial.optimizer.name == "adam"
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr, fused=True) if adam else torch.optim.SGD(model.parameters(), lr, 0.9, fused=True)
    )
    micro = trial.micro_batch_size(ranks.world_size)
    smoothing = trial.workload.recipe.label_smoothing
    memory_format = torch.channels_last if trial.backend.channels_last else torch.contiguous_format

    def step(images: Tensor, labels: Tensor) -> None:
        parts = len(images) // micro
        for x, y in zip(images.split(micro), labels.split(micro), strict=True):
            loss = F.cross_entropy(replica(x.contiguous(memory_format=memory_format)), y, label_smoothing=smoothing)
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
