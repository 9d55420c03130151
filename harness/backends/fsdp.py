"""torch's fully_shard (FSDP2): weights, gradients and optimizer state sharded by rows over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from harness import optim
from harness.config import Trial
from harness.dist import Ranks, ensure_group
from harness.engine import Engine, Slice, load_buffers

SMALL = 0.1
"""share of a network's parameters up to which a part is gathered in one piece"""


def units(net: nn.Module) -> Iterator[nn.Module]:
    """What is gathered in one piece: the parts of the network, those of its large parts in their place, down to blocks.

    A block (an element of a Sequential that is none itself) stays whole: it may use its parts' weights without calling them, as
    attention does. Parameters outside of all units are left to the root.
    """
    whole = _elements(net)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for part in module.children():
            block = isinstance(module, nn.Sequential) and not isinstance(part, nn.Sequential)
            if block or _elements(part) <= SMALL * whole or not any(True for _ in part.children()):
                yield part
            else:
                yield from within(part)

    return (unit for unit in within(net) if _elements(unit))


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class FSDPEngine(Engine):
    """zero_stage 3 frees the gathered weights between forward and backward, 2 keeps them.

    The optimizer steps on this rank's plain local tensors, whose memory the sharded parameters share: every update is
    elementwise, and torch's fused SGD kernel has no rule for sharded tensors.
    """

    weights_are_sharded = True

    def __init__(self, trial: Trial, ranks: Ranks) -> None:
        super().__init__(trial, ranks)
        ensure_group(ranks, trial.backend.timeout_seconds)
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for unit in (*units(self._model.net), self._model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=trial.backend.zero_stage == 3)
        self._sharded: dict[str, Any] = dict(self._model.named_parameters())  # DTensors
        with torch.no_grad():
            local = {name: nn.Parameter(p.to_local()) for name, p in self._sharded.items()}
        self._local = {name: p for name, p in local.items() if p.numel()}  # more ranks than rows leave some without
        self._optimizer = optim.build(self._local.items(), trial.optimizer, trial.decay)

    def _forward(self, images: Tensor, last: bool) -> Tensor:
        assert isinstance(self._model, FSDPModule)
        self._model.set_requires_gradient_sync(last)
        self._model.set_is_last_backward(last)
        logits: Tensor = self._model(images)
        return logits

    def _update(self, lr: float, weight_decay: float) -> None:
        for name, parameter in self._local.items():
            gradient = self._sharded[name].grad
            parameter.grad = None if gradient is None else gradient.to_local()
        limit = self._trial.workload.recipe.clip_norm
        if limit is not None:
            gradients = [p.grad for p in self._local.values() if p.grad is not None]
            square = nn.utils.get_total_norm(gradients).square().to(self._ranks.device)
            td.all_reduce(square)
            nn.utils.clip_grads_with_norm_(self._local.values(), limit, square.sqrt())
        optim.write(self._optimizer, lr, weight_decay)
        self._optimizer.step()
        for p in (*self._local.values(), *self._sharded.values()):
            p.grad = None

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self._local.values()]

    def _slices(self) -> Mapping[str, Slice]:
        return {name: Slice.whole(p, self._first_row(name) * p[0].numel()) for name, p in self._local.items()}

    def _first_row(self, name: str) -> int:
        """Rows are dealt out as torch.chunk does: equal parts, rounded up, until there are none left."""
        rows = int(self._sharded[name].shape[0])
        return min(rows, self._ranks.rank * -(-rows // self._ranks.world_size))

    @torch.no_grad()
    def _full_weights(self) -> dict[str, Tensor]:
        return {name: p.full_tensor() for name, p in self._sharded.items()}

    @torch.no_grad()
    def _load_weights(self, state: dict[str, Tensor]) -> None:
        for name, piece in self._slices().items():
            piece.write(self._local[name], state[name].reshape(-1))
        load_buffers(self._model, state)
