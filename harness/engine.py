"""The backend seam: train_step, evaluation_model, save, load.

Accumulation, mixed precision, gradient synchronisation and sharding live below it. `build` is the only place that
looks at the backend's name.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness import checkpoint, models, optim
from harness.config import Trial
from harness.dist import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""of weights and optimizer state; bf16 is autocast over fp32 weights"""


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports."""

    loss: Tensor
    """0-d, on the device: mean plain cross-entropy of this rank's share of the batch, whatever smoothing trains"""
    measured: dict[str, float]
    """weights/norm, weights/update_ratio and, for adam, adam/v_below_eps, when asked for; the same on every rank"""


class Engine(Protocol):
    def train_step(self, images: Tensor, labels: Tensor, *, lr: float, weight_decay: float, measure: bool = False) -> Step:
        """One optimizer step on this rank's share of the global batch: images uint8 (n, C, H, W), labels (n,). Collective.

        lr and weight_decay as harness.optim means them.
        """

    def evaluation_model(self) -> nn.Module:
        """The full model in evaluation mode; its forward is free of collectives. The next train_step leaves that mode."""

    def save(self) -> dict[str, dict[str, Any]]:
        """This rank's part of a checkpoint, {file name: state by parameter name}. Collective."""

    def load(self, saved: checkpoint.Saved) -> None:
        """Weights, buffers and moments of a checkpoint written at any world size. Collective."""


class DDPEngine:
    """torch's DistributedDataParallel, with ZeroRedundancyOptimizer at zero_stage 1. gloo on CPUs, NCCL on GPUs."""

    def __init__(self, trial: Trial, ranks: Ranks) -> None:
        self._trial, self._ranks = trial, ranks
        self._micro = trial.micro_batch_size(ranks.world_size)
        self._model = models.build(trial.workload.model, trial.workload.data, trial.seed, DTYPES[trial.workload.recipe.precision])
        self._model.to(ranks.device)
        named = list(self._model.named_parameters())
        groups = optim.param_groups(named, trial.decay)
        cls, arguments = optim.optimizer_class(trial.optimizer, trial.decay)
        self._sharded = trial.backend.zero_stage == 1 and ranks.world_size > 1
        if self._sharded:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # costs a second of CPU to import

            self._optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=cls, **arguments)
            self._local: torch.optim.Optimizer = self._optimizer.optim
        else:
            self._optimizer = self._local = cls(groups, **arguments)
        self._replica: nn.Module = self._model
        if ranks.world_size > 1:
            self._replica = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """One throw-away backward pass.

        DDP regroups its buckets after the first one, and with more than two ranks the grouping decides the order of
        sums. A fresh run and a resumed one must have it behind them alike, to be equal to the last bit.
        """
        buffers = [b.clone() for b in self._model.buffers()]
        data = self._trial.workload.data
        images = torch.zeros(self._micro, data.channels, data.image_size, data.image_size, dtype=torch.uint8, device=self._ranks.device)
        self._replica(images).sum().backward()
        self._optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self._model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def train_step(self, images: Tensor, labels: Tensor, *, lr: float, weight_decay: float, measure: bool = False) -> Step:
        if not self._model.training:
            self._replica.train()
        batches = list(zip(images.split(self._micro), labels.split(self._micro), strict=True))
        losses = [self._backward(x, y, len(batches), index == len(batches) - 1) for index, (x, y) in enumerate(batches)]
        before = [p.detach().clone() for p in self._model.parameters()] if measure else []
        optim.write(self._optimizer, lr, weight_decay)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return Step(torch.stack(losses).mean() if len(losses) > 1 else losses[0], self._measure(before) if measure else {})

    def _backward(self, images: Tensor, labels: Tensor, count: int, last: bool) -> Tensor:
        """Adds one of `count` micro-batches to the gradients, which the last one sums over the ranks; its plain loss, 0-d."""
        recipe, device = self._trial.workload.recipe, self._ranks.device
        replica = self._replica
        with replica.no_sync() if isinstance(replica, DistributedDataParallel) and not last else nullcontext():
            with torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bf16" else nullcontext():
                logits = replica(images.to(device, non_blocking=True))
            logits = logits.to(DTYPES[recipe.precision])
            labels = labels.to(device, non_blocking=True)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            (loss / count if count > 1 else loss).backward()
        return F.cross_entropy(logits.detach(), labels) if recipe.label_smoothing else loss.detach()

    @torch.no_grad()
    def _measure(self, before: list[Tensor]) -> dict[str, float]:
        now = [p.detach() for p in self._model.parameters()]
        norm = _norm(now)
        out = {"weights/norm": norm, "weights/update_ratio": _norm([a - b for a, b in zip(now, before, strict=True)]) / norm}
        if self._trial.optimizer.name == "adam":
            _, beta2 = self._trial.optimizer.betas
            counts = [0.0, 0.0]
            for state in self._own_state().values():
                v_hat = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
                counts[0] += float((v_hat.sqrt() < self._trial.optimizer.eps).sum())
                counts[1] += v_hat.numel()
            below, elements = self._ranks.sums(counts)
            out["adam/v_below_eps"] = below / elements
        return out

    def _own_state(self) -> dict[str, dict[str, Any]]:
        """{parameter name: optimizer state} of the parameters whose state this rank holds."""
        state = self._local.state
        return {name: state[p] for name, p in self._model.named_parameters() if p in state}

    def evaluation_model(self) -> nn.Module:
        return self._model.eval()

    def save(self) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        if self._ranks.rank == 0:
            files["model.pt"] = self._model.state_dict()
        if self._ranks.rank == 0 or self._sharded:
            files[f"optimizer-{self._ranks.rank}.pt"] = self._own_state()
        return files

    def load(self, saved: checkpoint.Saved) -> None:
        self._model.load_state_dict(saved.load("model.pt"))
        own = {p for group in self._local.param_groups for p in group["params"]}
        stored = saved.optimizer_state()
        for name, parameter in self._model.named_parameters():
            if parameter in own and name in stored:
                self._local.state[parameter] = {key: value.to(self._ranks.device) for key, value in stored[name].items()}


def _norm(tensors: list[Tensor]) -> float:
    """Euclidean norm of all elements, summed in float64."""
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def build(trial: Trial, ranks: Ranks) -> Engine:
    return DDPEngine(trial, ranks)
