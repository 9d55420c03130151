"""Random numbers inside a network that depend neither on ranks nor on micro-batches.

torch's own random layers draw from their process's generator: another number of ranks, another micro-batch or a resume is
another run. A layer here is given its numbers before every forward pass in training: one or more for each sample, functions of
(seed, step, layer, place in the global batch) alone, from harness.data.order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.data import order


class Drawn(nn.Module):
    """A layer that is random in training. Its numbers are uniform in [0, 1), one half each before `assign` has given any."""

    numbers = 1
    """a sample"""

    def __init__(self) -> None:
        super().__init__()
        self._given: Tensor | None = None  # (numbers, samples), fp32

    def uniform(self, like: Tensor) -> tuple[Tensor, ...]:
        """`numbers` tensors that broadcast against `like` (N, ...) over all but the first dimension, in its dtype."""
        given = like.new_full((self.numbers, len(like)), 0.5) if self._given is None else self._given.to(like.dtype)
        return given.reshape(self.numbers, len(like), *[1] * (like.ndim - 1)).unbind()


def layers(model: nn.Module) -> list[Drawn]:
    return [module for module in model.modules() if isinstance(module, Drawn)]


def assign(layers: list[Drawn], seed: int, step: int, global_batch_size: int, first: int, samples: int, device: torch.device) -> None:
    """Gives every random layer of a model its numbers for the samples [first, first + samples) of a step's global batch."""
    if not layers:
        return
    drawn = order.layer_draws(seed, step, sum(layer.numbers for layer in layers), global_batch_size)[:, first : first + samples]
    given = torch.from_numpy(drawn.copy()).to(device, non_blocking=True)
    for layer, own in zip(layers, given.split([layer.numbers for layer in layers]), strict=True):
        layer._given = own


class ShakeShake(Drawn):
    """Two branches of a residual block, summed with random weights (arXiv 1705.07485): Shake forward, Shake backward, Image.

    Training: the output is α a + (1 − α) b and the gradients are those of β a + (1 − β) b, α and β drawn anew for every image,
    block and step. Evaluation: the mean of both.
    """

    numbers = 2

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.training:
            return torch.lerp(b, a, 0.5)
        shaken: Tensor = _Shaken.apply(a, b, *self.uniform(a))  # type: ignore[no-untyped-call]
        return shaken


class _Shaken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return torch.lerp(b, a, alpha)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (beta,) = gradients, ctx.saved_tensors
        to_a = gradient * beta
        return to_a, gradient - to_a, None, None


class StochasticDepth(Drawn):
    """Leaves a residual branch out for a share `p` of the images, and scales it by 1 / (1 - p) for the others (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return branch
        (u,) = self.uniform(branch)
        return branch * ((u >= self.p) / (1 - self.p)).to(branch.dtype)
