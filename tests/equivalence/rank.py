"""What one rank does: training runs through harness.engine, one after the other in one process group."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from harness import checkpoint, engine, models, optim
from harness.config import Trial
from harness.data.order import share
from harness.dist import Ranks, joined
from harness.journal import Journal
from harness.schedule import schedule
from harness.store import TrialFolder
from tests.equivalence import control
from tests.equivalence.problem import Course, Digits, State

TIMEOUT_SECONDS = 60
"""of a collective"""


class Failed(RuntimeError):
    """Why a run has no result."""


class Measured(NamedTuple):
    """What a run says beside its checkpoints."""

    evaluation: control.Evaluation | None
    unlike: list[str]
    """entries of the model that was evaluated which are not, bit for bit, those of the checkpoint"""


@dataclass(frozen=True)
class ControlRun:
    """control.run as a job beside the others."""

    name: str
    arm: str
    course: Course
    precision: str = "fp32"
    marks: tuple[int, ...] = ()
    reverse: bool = False
    device: str = "cpu"

    world = 1
    needs = ()

    @property
    def group(self) -> tuple[Any, ...]:
        return (self.world, "control", self.name if self.device == "cpu" else "")

    @property
    def cost(self) -> float:
        return 0.03 * self.course.steps

    def execute(self, ranks: Ranks, root: Path) -> control.Outcome:
        initial = torch.load(root / "initial.pt")
        record = tape(root, self.arm) if self.precision == "bf16" else None
        return control.run(
            self.arm, self.course, Digits.read(root), initial, self.precision,
            marks=self.marks, reverse=self.reverse, record=record, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True)
class EngineRun:
    """Steps [start, stop) of a trial through its engine; checkpoints after `saves` and `stop` steps."""

    name: str
    trial: Trial
    course: Course
    world: int
    stop: int
    start: int = 0
    saves: tuple[int, ...] = ()
    source: str | None = None
    """the run whose checkpoint after `start` steps is loaded"""
    stale: Mapping[int, int] = field(default_factory=dict)
    """step -> the step whose lambda it wrongly takes"""
    replayed: ControlRun | None = None
    """the control whose recorded gradients are fed in"""

    @property
    def needs(self) -> tuple[str, ...]:
        """Runs that must be done before."""
        return tuple(name for name in (self.source, self.replayed and self.replayed.name) if name)

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs that may share a process group; not of two precisions, because DeepSpeed has globals."""
        return (self.world, str(self.trial.backend), self.trial.workload.recipe.precision)

    @property
    def cost(self) -> float:
        """Core seconds, roughly."""
        return 1 + (self.stop - self.start) * self.world * (0.03 if self.trial.backend.name == "deepspeed" else 0.015)

    def execute(self, ranks: Ranks, root: Path) -> Measured:
        digits, folder = Digits.read(root), trial_folder(root, self.name)
        replay = Replay(np.load(tape(root, self.replayed.arm), mmap_mode="r"), ranks) if self.replayed else None
        saving: checkpoint.Saving | None = None  # committed later: training goes on meanwhile
        with replay.installed(self.trial.workload.model.name) if replay else nullcontext():
            worker = engine.build(self.trial, ranks)
            if self.source is not None:
                worker.load(saved(trial_folder(root, self.source), self.start))
            for step in range(self.start, self.stop):
                images, labels = (torch.from_numpy(self._share(array, ranks)) for array in digits.batch(self.course, step))
                if replay is not None:
                    replay.start(step)
                    labels = torch.zeros_like(labels)
                eta, _, lam = schedule(self.trial, step)
                if step in self.stale:
                    lam = schedule(self.trial, self.stale[step])[2]
                lr, weight_decay = optim.hyperparameters(self.trial.optimizer, self.trial.decay, eta, lam)
                worker.train_step(images, labels, lr=lr, weight_decay=weight_decay, step=step)
                if step + 1 in (*self.saves, self.stop):
                    self._commit(saving, folder)
                    saving = checkpoint.Saving(folder, ranks, self.trial.trial_id, 1, step + 1, worker.save(), {})
        self._commit(saving, folder)
        network = worker.evaluation_model()
        if ranks.rank != 0:
            return Measured(None, [])
        stored = saved(folder, self.stop).load("model.pt")
        unlike = sorted(name for name, value in network.state_dict().items() if not torch.equal(value.cpu(), stored[name]))
        return Measured(None if replay else control.evaluate(network, digits, ranks.device, raw=True), unlike)

    def _commit(self, saving: checkpoint.Saving | None, folder: TrialFolder) -> None:
        if saving is not None:
            failure = saving.commit(Journal(folder.journal, self.trial.trial_id, 1))
            assert failure is None, failure

    @staticmethod
    def _share(array: np.ndarray, ranks: Ranks) -> np.ndarray:
        return array[share(np.arange(len(array)), ranks.rank, ranks.world_size)]


Run = ControlRun | EngineRun


def tape(root: Path, arm: str) -> Path:
    """Where the gradients of an arm's bf16 control are recorded."""
    return root / f"{arm.replace(' ', '-')}.npy"


def trial_folder(root: Path, run: str) -> TrialFolder:
    return TrialFolder(root / run.replace(",", "").replace(" ", "-"))


def saved(folder: TrialFolder, step: int) -> checkpoint.Saved:
    return checkpoint.at(folder.checkpoints / f"step-{step}-attempt-1")


def state(found: checkpoint.Saved) -> State:
    """The whole of a checkpoint, from whichever backend and number of ranks."""
    model = {name: value.numpy() for name, value in found.load("model.pt").items()}
    running = {name: value for name, value in model.items() if name.endswith(("running_mean", "running_var"))}
    weights = {name: value for name, value in model.items() if name not in running and not name.endswith("num_batches_tracked")}
    moments = {
        f"{name}/{key}": value.numpy().ravel()
        for name, entry in found.optimizer_state().items()
        for key, value in entry.items()
        if value.ndim
    }
    return State(weights, running, moments)


class Replay:
    """Feeds recorded gradients through an engine: the model's loss becomes sum(parameter * gradient).

    The modules stay, with their names and classes, because sharding goes by them; what they compute is replaced. The loss
    must be the engine's own cross-entropy: two logits (z, 0) with z = 0 and label 0 have slope -1/2 in z, exactly, and
    batch sizes are powers of two, so the slope of the mean over samples with z = -2*sum(parameter * gradient) is exactly 1.
    """

    def __init__(self, gradients: np.ndarray, ranks: Ranks) -> None:
        self._gradients, self._ranks = gradients, ranks
        self._step: int | None = None
        self._micro = 0

    def start(self, step: int) -> None:
        self._step, self._micro = step, 0

    @contextmanager
    def installed(self, name: str) -> Iterator[None]:
        original = models.BUILDERS[name]
        models.BUILDERS[name] = lambda *args, **kwargs: self._replaced(original(*args, **kwargs))
        try:
            yield
        finally:
            models.BUILDERS[name] = original

    def _replaced(self, network: nn.Module) -> nn.Module:
        offsets, end = {}, 0
        for name, parameter in sorted(network.named_parameters()):
            offsets[name] = end
            end += parameter.numel()
        assert end == self._gradients.shape[2], "the control has other parameters"
        whole = network.forward
        for prefix, module in network.named_modules():
            if not list(module.children()):
                module.forward = self._leaf(module, {key: offsets[f"{prefix}.{key}"] for key, _ in module.named_parameters()})

        def forward(images: Tensor) -> Tensor:
            z = -2 * whole(torch.zeros((), device=images.device))
            self._micro += 1
            return torch.stack([z.expand(len(images)), torch.zeros(len(images), device=images.device)], dim=1)

        network.forward = forward
        return network

    def _leaf(self, module: nn.Module, offsets: Mapping[str, int]) -> Any:
        def forward(total: Tensor) -> Tensor:
            for key, offset in offsets.items():
                parameter = getattr(module, key)
                product = (parameter * self._gradient(offset, parameter)).sum()
                total = total + (product - product.detach())
            return total

        return forward

    def _gradient(self, offset: int, parameter: Tensor) -> Tensor:
        if self._step is None:  # a pass of the engine's own, before training
            return torch.zeros_like(parameter)
        micro_batch = self._ranks.rank * self._gradients.shape[1] // self._ranks.world_size + self._micro
        flat = np.array(self._gradients[self._step, micro_batch, offset : offset + parameter.numel()])
        return torch.from_numpy(flat).reshape(parameter.shape).to(parameter.device)


def work(env: Mapping[str, str], runs: Sequence[Run], root: Path, connection: Connection, log: Path) -> None:
    """A rank's process. Sends (name, result) of each run in turn, or (name, Failed) and ends."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    if torch.cuda.is_available():  # fp32 is fp32, and what should be bit-equal can be
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    name = runs[0].name
    try:
        with joined(TIMEOUT_SECONDS) as ranks:
            for run in runs:
                name = run.name
                connection.send((name, run.execute(ranks, root)))
            ranks.barrier()
            os._exit(0)  # torch may hang while it takes gloo down; everything is sent
    except BaseException:
        connection.send((name, Failed(traceback.format_exc())))
        os._exit(1)
