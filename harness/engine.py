"""The backend seam: train_step, reset_moments, evaluation_model, save, load.

Accumulation, gradient synchronisation, clipping and sharding live below it; what every backend shares (the order of
micro-batches, the loss, batch norm's running statistics, the form of a checkpoint) is here once. `build` is the only
place that looks at the backend's name, and each backend's library is imported in its own module of harness.backends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness import checkpoint, draws, mixing, models, norm, optim
from harness.config import Trial
from harness.data.order import Mixing
from harness.dist import Ranks


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports."""

    loss: Tensor
    """0-d, on the device: mean cross-entropy of this rank's share of the batch, as mixed, without smoothing"""
    measured: dict[str, float]
    """weights/norm, weights/update_ratio and, for adam, adam/v_below_eps, when asked for; the same on every rank"""


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + count) of a flattened parameter, and where the optimizer keeps them."""

    tensor: Tensor
    """what the optimizer steps on: the parameter, or a flat partition of several; the key of its state"""
    offset: int
    """place of the first element in `tensor`"""
    start: int
    """place of the first element in the flattened parameter"""
    count: int

    @classmethod
    def whole(cls, tensor: Tensor, start: int = 0) -> Slice:
        return cls(tensor, 0, start, tensor.numel())

    def read(self, state: Tensor) -> Tensor:
        """These elements of a state of `tensor`, flat, in C order whatever the memory format."""
        return state.reshape(-1)[self.offset : self.offset + self.count]

    def write(self, state: Tensor, flattened: Tensor) -> None:
        """Fills these elements of a state of `tensor` from the same state of the whole parameter, flattened."""
        piece = flattened[self.start : self.start + self.count]
        if self.count == state.numel():
            state.copy_(piece.reshape(state.shape))
        else:
            state.view(-1)[self.offset : self.offset + self.count].copy_(piece)


class Engine(ABC):
    """A model, its optimizer and the ranks it is spread over. The public methods are all that the loop knows."""

    weights_are_sharded = False
    _optimizer: torch.optim.Optimizer
    """the one whose state holds this rank's moments"""

    def __init__(self, trial: Trial, ranks: Ranks) -> None:
        self._trial, self._ranks = trial, ranks
        self._micro = trial.micro_batch_size(ranks.world_size)
        self._format = torch.channels_last if trial.backend.channels_last else torch.contiguous_format
        self._model = models.build(trial.workload, trial.seed).to(ranks.device)
        self._norms, self._drawn = norm.layers(self._model), draws.layers(self._model)
        self._gathered: nn.Module | None = None
        if trial.backend.compile:
            torch._dynamo.config.recompile_limit = 64  # FSDP compiles by block: ConvNeXt's nine drop rates are nine graphs, at every size
            self._model.compile(dynamic=False)  # a graph for each size of a schedule, the same ones after a resume

    def train_step(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        lr: float,
        weight_decay: float,
        step: int,
        mix: Mixing | None = None,
        measure: bool = False,
    ) -> Step:
        """One optimizer step on this rank's share of the global batch: images uint8 (n, C, H, W), labels (n,). Collective.

        lr and weight_decay as harness.optim means them; mix as harness.mixing does. step: 0-based, what random layers draw by.
        """
        self._gathered = None
        if not self._model.training:
            self._model.train()
        batches = list(zip(images.split(self._micro), labels.split(self._micro), strict=True))
        losses = []
        for index, (x, y) in enumerate(batches):
            first = self._ranks.rank * len(images) + index * self._micro
            draws.assign(self._drawn, self._trial.seed, step, self._trial.budget.global_batch_size, first, len(x), self._ranks.device)
            losses.append(self._micro_step(x, y, mix, len(batches), index == len(batches) - 1))
        norm.update_running_statistics(self._norms, self._ranks)
        before = [w.clone() for w in self._weights()] if measure else []
        self._update(lr, weight_decay)
        return Step(torch.stack(losses).mean() if len(losses) > 1 else losses[0], self._measure(before) if measure else {})

    def _micro_step(self, images: Tensor, labels: Tensor, mix: Mixing | None, count: int, last: bool) -> Tensor:
        """Adds one of `count` micro-batches to the gradients; its loss without smoothing, 0-d."""
        device, smoothing = self._ranks.device, self._trial.workload.recipe.label_smoothing
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if mix is not None:
            images = mixing.images(images, mix, models.DTYPES[self._trial.workload.recipe.precision])
        logits = self._forward(images.contiguous(memory_format=self._format), last)
        loss = mixing.cross_entropy(logits, labels, mix, smoothing)
        self._backward(loss, count, last)
        return mixing.cross_entropy(logits.detach(), labels, mix) if smoothing else loss.detach()

    @torch.no_grad()
    def reset_moments(self) -> None:
        """As if the optimizer had not taken a step yet: the weights stay."""
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def evaluation_model(self) -> nn.Module:
        """The full model in evaluation mode; its forward is free of collectives. Collective; the next train_step ends it."""
        if not self.weights_are_sharded:
            return self._model.eval()
        if self._gathered is None:
            self._gathered = models.build(self._trial.workload, self._trial.seed).to(self._ranks.device)
            self._gathered.load_state_dict(self._state())
        return self._gathered.eval()

    def _state(self) -> dict[str, Tensor]:
        """Weights and buffers, full, by name: what is evaluated and what is saved. Collective."""
        state: dict[str, Tensor] = self._model.state_dict()
        return state | self._full_weights() if self.weights_are_sharded else state

    def save(self) -> dict[str, dict[str, Any]]:
        """This rank's part of a checkpoint, {file name: state by parameter name}, as live tensors. Collective."""
        weights = self._state()
        files: dict[str, dict[str, Any]] = {"model.pt": weights} if self._ranks.rank == 0 else {}
        pieces = {
            name: {"start": piece.start} | {k: piece.read(v) if v.ndim else v for k, v in self._optimizer.state[piece.tensor].items()}
            for name, piece in self._slices().items()
            if self._optimizer.state.get(piece.tensor) and (self._ranks.rank == 0 or self._trial.backend.zero_stage)  # whole at stage 0
        }
        return files | ({f"optimizer-{self._ranks.rank}.pt": pieces} if pieces else {})

    def load(self, saved: checkpoint.Saved) -> None:
        """Weights, buffers and moments of a checkpoint written by any backend at any world size. Collective."""
        self._gathered = None
        self._load_weights(saved.load("model.pt"))
        stored = saved.optimizer_state()
        for name, piece in self._slices().items():
            state = self._optimizer.state[piece.tensor]
            for key, value in stored.get(name, {}).items():
                if value.ndim == 0:
                    state[key] = value.to(piece.tensor.device)
                else:
                    if key not in state:
                        state[key] = torch.zeros_like(piece.tensor)
                    piece.write(state[key], value)

    @torch.no_grad()
    def _measure(self, before: list[Tensor]) -> dict[str, float]:
        now = self._weights()
        squares = [_squares(now), _squares([a - b for a, b in zip(now, before, strict=True)])]
        size, change = (s**0.5 for s in (self._ranks.sums(squares) if self.weights_are_sharded else squares))
        out = {"weights/norm": size, "weights/update_ratio": change / size}
        if self._trial.optimizer.name == "adam":
            _, beta2 = self._trial.optimizer.betas
            counts = [0.0, 0.0]
            for piece in self._slices().values():
                state = self._optimizer.state[piece.tensor]
                v_hat = piece.read(state["exp_avg_sq"]) / (1 - beta2 ** float(state["step"]))
                counts[0] += float((v_hat.sqrt() < self._trial.optimizer.eps).sum())
                counts[1] += v_hat.numel()
            below, elements = self._ranks.sums(counts)
            out["adam/v_below_eps"] = below / elements
        return out

    # What a backend supplies.

    @abstractmethod
    def _forward(self, images: Tensor, last: bool) -> Tensor:
        """Logits; `last`: of the step's last micro-batch."""

    def _backward(self, loss: Tensor, count: int, last: bool) -> None:
        """Adds 1/count of the loss's gradient; after the last one the gradients are means over the ranks."""
        (loss / count if count > 1 else loss).backward()

    @abstractmethod
    def _update(self, lr: float, weight_decay: float) -> None:
        """Clips, writes lr and weight_decay into the param groups, steps, drops the gradients."""

    @abstractmethod
    def _weights(self) -> list[Tensor]:
        """The weights as the optimizer has them: all of them, or this rank's share if they are sharded."""

    @abstractmethod
    def _slices(self) -> Mapping[str, Slice]:
        """{parameter name: what of its optimizer state this rank holds}."""

    @abstractmethod
    def _load_weights(self, state: dict[str, Tensor]) -> None:
        """The full state, on the CPU, into weights and buffers. Collective."""

    def _full_weights(self) -> dict[str, Tensor]:
        """Where weights are sharded, all of them by name. Collective."""
        raise NotImplementedError


def load_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in state:
            buffer.copy_(state[name])


def _squares(tensors: list[Tensor]) -> float:
    """Sum of the squares of all elements, in float64."""
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum())


def build(trial: Trial, ranks: Ranks) -> Engine:
    """The engine of trial.backend. Imports that backend's library and no other. Collective."""
    optim.agree(ranks, trial.decay)
    if trial.backend.name == "deepspeed":
        from harness.backends.zero import DeepSpeedEngine

        return DeepSpeedEngine(trial, ranks)
    if trial.backend.name == "fsdp":
        from harness.backends.fsdp import FSDPEngine

        return FSDPEngine(trial, ranks)
    from harness.backends.ddp import DDPEngine

    return DDPEngine(trial, ranks)
