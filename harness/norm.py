"""Batch normalisation whose result does not depend on the number of ranks.

torch's own layer folds every forward pass of its own rank into the running statistics, so they depend on how a global
batch is cut up: relative differences near 1 between one, two and four ranks whose weights agree to 1e-7. Here a forward
pass only collects, and `update_running_statistics` folds in once per optimizer step what all micro-batches of all ranks
have collected.

A *group* is norm_batch_size contiguous samples, normalised together. Over the G groups of a global batch, with mean m_g
and unbiased variance v_g of a channel of group g,

    running_mean ← (1 − momentum) running_mean + momentum Σ m_g / G
    running_var  ← (1 − momentum) running_var  + momentum Σ v_g / G

Variances are averaged, not pooled, and the spread of the m_g does not enter. The expectation is then that of torch's own
layer at batch size norm_batch_size, the noise 1/√G of it. The variance of the pooled batch is another quantity: pixels of
one image are correlated, so even the unbiased variance grows with the number of images it is taken over, and evaluation
would divide by something other than training did, the more so the larger the global batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

from harness.dist import Ranks

Norm = Callable[[int], nn.Module]
"""number of channels -> the layer that normalises them"""


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d that normalises groups of `norm_batch_size` samples (None: all of a forward pass) in training.

    Input and output (N, C, H, W), in the same memory order. Parameters, buffers and evaluation mode are nn.BatchNorm2d's.
    ValueError when norm_batch_size does not divide N in training.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, norm_batch_size: int | None = None) -> None:
        super().__init__(num_features)
        self.norm_batch_size = norm_batch_size
        self.collected = torch.zeros(3, num_features, dtype=torch.float64)
        """sums over the groups since the last update of their means, their unbiased variances, and 1.
        No buffer: it stays float64 whatever the model's dtype, and DDP may give every rank the buffers of rank 0"""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.collected = self.collected.to(self.running_mean.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        samples, together = len(input), self.norm_batch_size or len(input)
        if samples == together:
            return self._normalised(input)
        if samples % together:
            raise ValueError(f"norm_batch_size: {together} does not divide the {samples} samples of a forward pass")
        if torch.compiler.is_compiling():
            return self._all_normalised(input.unflatten(0, (-1, together)))
        return torch.cat([self._normalised(group) for group in input.split(together)])

    def _normalised(self, group: Tensor) -> Tensor:
        found = self.running_mean.new_ones(3, self.num_features)
        # with momentum 1 torch leaves just this group's mean and unbiased variance in the buffers it is given
        out = F.batch_norm(group, found[0], found[1], self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        self.collected.add_(found)
        return out

    def _all_normalised(self, groups: Tensor) -> Tensor:
        """The same of (G, n, C, H, W) in one expression, of which a compiler makes a kernel or two. Group by group a ResNet-50 at
        256 images has 424 norms: they took it minutes, and each would be a launch."""
        wide = groups.to(torch.promote_types(groups.dtype, torch.float32))
        variances, means = torch.var_mean(wide, (1, 3, 4), correction=0, keepdim=True)
        weight, bias = (t.reshape(1, 1, -1, 1, 1) for t in (self.weight, self.bias))
        out = (wide - means) * (variances + self.eps).rsqrt() * weight + bias
        elements = wide[0, :, 0].numel()
        with torch.no_grad():
            found = torch.cat((means, variances * (elements / (elements - 1)), torch.ones_like(means)), dim=1).sum(0)
            self.collected.add_(found.reshape(3, -1))
        return out.to(groups.dtype).flatten(0, 1)


def layers(model: nn.Module) -> list[BatchNorm]:
    """To be found once: a walk over a large network takes the host as long as some steps have."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


@torch.no_grad()
def update_running_statistics(layers: list[BatchNorm], ranks: Ranks) -> None:
    """Folds what a model's layers collected since the last call, on all ranks, into the running statistics. Once per optimizer step.

    Collective over the default process group, unless there are none. Leaves the same statistics on every
    rank; a layer that no sample went through keeps its own. num_batches_tracked counts the updates.
    """
    if not layers:
        return
    sums = torch.cat([layer.collected for layer in layers], dim=1)
    if ranks.world_size > 1:
        td.all_reduce(sums)
    groups = sums[2:]
    means, any_group = sums[:2] / groups.clamp(min=1), groups.clamp(max=1)
    by_layer = torch.cat([means, any_group]).to(layers[0].running_mean.dtype).split([layer.num_features for layer in layers], dim=1)
    weights = torch._foreach_mul([found[2] for found in by_layer], [layer.momentum for layer in layers])
    torch._foreach_lerp_([layer.running_mean for layer in layers], [found[0] for found in by_layer], weights)
    torch._foreach_lerp_([layer.running_var for layer in layers], [found[1] for found in by_layer], weights)
    torch._foreach_add_([layer.num_batches_tracked for layer in layers], 1)
    discard_statistics(layers)


def discard_statistics(layers: list[BatchNorm]) -> None:
    """Forgets what was collected since the last update: for a pass that is no part of training."""
    if layers:
        torch._foreach_zero_([layer.collected for layer in layers])
