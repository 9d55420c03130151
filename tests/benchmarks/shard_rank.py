"""What one rank does for the benchmark of sharded optimizers: bytes held, seconds an update, stall of a save.

The runs are carried out by tests.equivalence.groups. Every result is a list, one entry a rank.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness import checkpoint, engine, models
from harness.config import Trial
from harness.dist import Ranks
from harness.engine import Engine
from harness.journal import Journal
from harness.store import TrialFolder

LINEAR = {"linear25": (2048, 6), "linear300": (4096, 18)}
"""net -> width and number of its square layers"""


def net(name: str) -> nn.Module:
    """Linear layers and their biases: forward and backward cost next to nothing, the optimizer what it costs anywhere."""
    width, depth = LINEAR[name]
    skipped = torch.nn.utils.skip_init  # drawing 300M random numbers takes longer than all that is measured
    inputs = 3 * IMAGE_SIZE**2
    layers = [skipped(nn.Linear, inputs, width), *(skipped(nn.Linear, width, width) for _ in range(depth)), skipped(nn.Linear, width, 10)]
    with torch.no_grad():
        for layer in layers:
            outputs, inputs = layer.weight.shape
            torch.outer(torch.rand(outputs), torch.rand(inputs) * (4 / inputs), out=layer.weight)  # keeps activations near 1
            layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), *layers)


IMAGE_SIZE = 8


def batch(trial: Trial, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This rank's share of a global batch: uint8 noise, labels."""
    data, share = trial.workload.data, trial.budget.global_batch_size // ranks.world_size
    images = torch.randint(0, 256, (share, data.channels, data.image_size, data.image_size), dtype=torch.uint8)
    return images, torch.randint(0, data.num_classes, (share,))


class Clock:
    """Seconds between two looks, with what the device still has to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = 0.0

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._last = self._last, time.perf_counter()
        return self._last - before


# ------------------------------------------------------------------------------------------------- memory


class Held(NamedTuple):
    """Bytes of one rank."""

    weights: int
    gradients: int
    """the most at any time from the beginning of the update"""
    moments: int
    copy: int
    """what the optimizer steps on instead of the weights"""
    buckets: int
    """DeepSpeed's, kept between steps, for gradients on their way"""
    peak: int
    """of all memory since before the engine was built, activations included; on a CPU: resident"""


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """{address: bytes} of the memory behind them, shared memory once."""
    plain = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return {address: size for address, size in found.items() if address}


@dataclass(frozen=True)
class Memory:
    """Two steps of an engine; list[Held]."""

    name: str
    trial: Trial
    world: int
    net: str

    needs = ()

    @property
    def group(self) -> tuple[Any, ...]:
        return (self.name,)

    cost = 1

    def execute(self, ranks: Ranks, root: Path) -> list[Held]:
        with replaced_model(self.net):
            before = Peak(ranks.device)
            worker = engine.build(self.trial, ranks)
            gradients = MostGradients(worker)
            for _ in range(2):
                worker.train_step(*batch(self.trial, ranks), lr=1e-6, weight_decay=1e-6, step=0)
            weights = storages(whole_weights(worker))
            stepped = storages(piece.tensor for piece in worker._slices().values())
            states = (worker._optimizer.state[piece.tensor] for piece in worker._slices().values())
            held = Held(
                sum(weights.values()),
                gradients.bytes,
                sum(storages(v for state in states for v in state.values() if v.ndim).values()),
                sum(size for address, size in stepped.items() if address not in weights),
                sum(storages(buckets(worker)).values()),
                before.bytes(),
            )
        return [Held(*h) for h in ranks.gathered(list(held))]


def whole_weights(worker: Engine) -> list[Tensor]:
    """The parameters, and, where DeepSpeed shards them, this rank's parts."""
    parameters: list[Any] = list(worker._model.parameters())
    return [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]


def buckets(worker: Engine) -> list[Tensor]:
    kept = getattr(getattr(worker, "_zero", None), "ipg_buckets", {})
    held = [tensor for bucket in kept.values() for tensor in ([bucket.buffer] if isinstance(bucket.buffer, Tensor) else bucket.buffer)]
    return [tensor for tensor in held if tensor is not None]


class MostGradients:
    """Looks at the beginning of every update and of every step of a torch optimizer inside it."""

    def __init__(self, worker: Engine) -> None:
        self.bytes = 0
        self._worker = worker
        self._parameters = list(worker._model.parameters())
        around(worker, lambda update: (self._look(), update()))
        register_optimizer_step_pre_hook(lambda *_: self._look())

    def _look(self) -> None:
        stepped = [piece.tensor for piece in self._worker._slices().values()]
        found = [p.grad for p in (*self._parameters, *stepped)]
        if getattr(self._worker, "_stage", 0):  # DeepSpeed's own places for them
            zero: Any = self._worker._zero  # type: ignore[attr-defined]
            found += [g for group in zero.averaged_gradients.values() for g in group or ()]
            found += [getattr(p, "grad_accum", None) for p in self._parameters]
            found += [zero.grad_partitions_flat_buffer] if hasattr(zero, "grad_partitions_flat_buffer") else []
        self.bytes = max(self.bytes, sum(storages(g for g in found if g is not None).values()))


class Peak:
    """The most memory in use since construction, over what was in use then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._resident()

    def bytes(self) -> int:
        return (torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else self._resident()) - self._before

    @staticmethod
    def _resident() -> int:
        kilobytes = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(kilobytes[1]) if kilobytes else 0


# ------------------------------------------------------------------------------------------------- update


@dataclass(frozen=True)
class Update:
    """One update of an engine in turn with torch's fused optimizer on parameters that are not sharded.

    list of (engine's seconds, fused optimizer's seconds), one a repetition, each of the rank that took longest. Timed are
    everything after the last backward pass, up to dropping the gradients; before that, ranks meet.
    """

    name: str
    trial: Trial
    world: int
    net: str
    repetitions: int

    needs = ()
    cost = 1

    @property
    def group(self) -> tuple[Any, ...]:
        return (self.world, str(self.trial.backend), "update")

    def execute(self, ranks: Ranks, root: Path) -> list[tuple[float, float]]:
        clock, seconds = Clock(ranks.device), []

        def timed(update: Callable[[], None]) -> None:
            ranks.barrier()
            clock.lap()
            update()
            seconds.append(clock.lap())

        with replaced_model(self.net):
            worker = engine.build(self.trial, ranks)
            fused, gradients = self._fused(models.build(self.trial.workload, 0).to(ranks.device))
        around(worker, timed)
        for _ in range(WARM_UP + self.repetitions):
            worker.train_step(*batch(self.trial, ranks), lr=1e-6, weight_decay=1e-6, step=0)
            for p, gradient in gradients.items():
                p.grad = gradient.clone()
            timed(lambda: (fused.step(), fused.zero_grad(set_to_none=True)))  # type: ignore[arg-type, return-value]
        by_rank = torch.tensor(ranks.gathered(seconds))
        longest = by_rank.max(dim=0).values.view(-1, 2)[WARM_UP:]
        return [(float(ours), float(theirs)) for ours, theirs in longest]

    def _fused(self, model: nn.Module) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, Tensor]]:
        gradients = {p: torch.full_like(p, 1e-3) for p in model.parameters()}
        if self.trial.optimizer.name == "sgd":
            return torch.optim.SGD(gradients, lr=1e-6, momentum=0.9, weight_decay=0.01, fused=True), gradients
        return torch.optim.AdamW(gradients, lr=1e-6, weight_decay=0.01, fused=True), gradients


WARM_UP = 2


# -------------------------------------------------------------------------------------------------- stall


class Stalled(NamedTuple):
    """Seconds, medians over the saves of one rank."""

    step: float
    """of a train_step while nothing is being saved"""
    snapshot: float
    """collecting this rank's part and copying it: training stands still"""
    commit: float
    """after the files are written: training stands still"""
    background: float
    """from the snapshot until every rank's files are written; training goes on"""
    slowed: float
    """a train_step in that time"""


@dataclass(frozen=True)
class Stall:
    """Saves while training goes on; list[Stalled]."""

    name: str
    trial: Trial
    world: int
    saves: int

    needs = ()
    cost = 1

    @property
    def group(self) -> tuple[Any, ...]:
        return (self.world, str(self.trial.backend), "stall")

    def execute(self, ranks: Ranks, root: Path) -> list[Stalled]:
        worker, clock = engine.build(self.trial, ranks), Clock(ranks.device)
        folder = TrialFolder(root / self.name.replace(" ", "-"))
        folder.path.mkdir(exist_ok=True)
        journal = Journal(folder.journal, self.trial.trial_id, 1)
        images, labels = batch(self.trial, ranks)

        def step() -> float:
            clock.lap()
            worker.train_step(images, labels, lr=1e-6, weight_decay=1e-6, step=0)
            return clock.lap()

        quiet, slowed, snapshots, commits, background = [], [], [], [], []
        for _ in range(3):
            step()
        for save in range(self.saves):
            quiet += [step() for _ in range(3)]
            ranks.barrier()
            clock.lap()
            saving = checkpoint.Saving(folder, ranks, self.trial.trial_id, 1, save + 1, worker.save(), {})
            snapshots.append(clock.lap())
            began = time.perf_counter()
            while ranks.sums([float(saving.written())])[0] < ranks.world_size:
                slowed.append(step())
            background.append(time.perf_counter() - began)
            clock.lap()
            failure = saving.commit(journal)
            commits.append(clock.lap())
            if failure:
                raise OSError(failure)
            if ranks.rank == 0:
                checkpoint.tidy(folder, 1, 1)
        journal.close()
        found = Stalled(*(statistics.median(values) for values in (quiet, snapshots, commits, background, slowed)))
        return [Stalled(*s) for s in ranks.gathered(list(found))]


# -------------------------------------------------------------------------------------------------- shared


@contextmanager
def replaced_model(name: str) -> Iterator[None]:
    """Makes models.build give a net of LINEAR for mnist5k_cnn; another name leaves everything as it is."""
    before = models.BUILDERS["mnist5k_cnn"]
    if name in LINEAR:
        models.BUILDERS["mnist5k_cnn"] = lambda data, norm: net(name)
    try:
        yield
    finally:
        models.BUILDERS["mnist5k_cnn"] = before


def around(worker: Engine, look: Callable[[Callable[[], None]], object]) -> None:
    """Has every update of an engine go through `look`, which is given the update as a function."""
    update = worker._update
    worker._update = lambda lr, weight_decay: look(lambda: update(lr, weight_decay)) and None  # type: ignore[method-assign, func-returns-value]
