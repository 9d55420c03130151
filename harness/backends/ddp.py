"""torch's DistributedDataParallel: gradients summed over the ranks; optimizer state whole, or sharded (zero_stage 1)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness import draws, norm, optim
from harness.config import Trial
from harness.data import order
from harness.dist import Ranks
from harness.engine import Engine, Slice


class DDPEngine(Engine):
    """zero_stage 1 is ZeroRedundancyOptimizer, which gives each parameter whole to one rank."""

    def __init__(self, trial: Trial, ranks: Ranks) -> None:
        super().__init__(trial, ranks)
        if trial.backend.channels_last:
            self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = optim.param_groups(self._model.named_parameters(), trial.decay)
        cls, arguments = optim.optimizer_class(trial.optimizer, trial.decay)
        if trial.backend.zero_stage == 1 and ranks.world_size > 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # costs a second of CPU to import

            self._sharded = ZeroRedundancyOptimizer(groups, optimizer_class=cls, **arguments)
            self._whole: torch.optim.Optimizer = self._sharded
            self._optimizer: torch.optim.Optimizer = self._sharded.optim
        else:
            self._whole = self._optimizer = cls(groups, **arguments)
        self._replica: nn.Module = self._model
        if ranks.world_size > 1:
            with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.11 knows no other name
                warnings.simplefilter("ignore", FutureWarning)
                self._replica = DistributedDataParallel(self._model, gradient_as_bucket_view=True, broadcast_buffers=False)
            self._settle_buckets()

    def _settle_buckets(self) -> None:
        """One throw-away backward pass, of what step 0 is fed: any other format or type would be compiled for it alone.

        DDP regroups its buckets after the first one, and with more than two ranks the grouping decides the order of
        sums. A fresh run and a resumed one must have it behind them alike, to be equal to the last bit.
        """
        trial, device, samples = self._trial, self._ranks.device, self._micro
        data, recipe = trial.workload.data, trial.workload.recipe
        images = torch.zeros(samples, data.channels, data.image_size, data.image_size, dtype=torch.uint8)
        mix = order.mixing(trial.seed, 0, recipe.mixup, recipe.cutmix, data.image_size)
        draws.assign(self._drawn, trial.seed, 0, trial.budget.global_batch_size, 0, samples, device)
        self._micro_step(images, torch.zeros(samples, dtype=torch.int64), mix, 1, last=True)
        self._whole.zero_grad(set_to_none=True)
        norm.discard_statistics(self._norms)

    def _forward(self, images: Tensor, last: bool) -> Tensor:
        if isinstance(self._replica, DistributedDataParallel):
            self._replica.require_backward_grad_sync = last  # what no_sync() sets
        logits: Tensor = self._replica(images)
        return logits

    def _update(self, lr: float, weight_decay: float) -> None:
        limit = self._trial.workload.recipe.clip_norm
        if limit is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        optim.write(self._whole, lr, weight_decay)
        self._whole.step()
        self._whole.zero_grad(set_to_none=True)

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self._model.parameters()]

    def _slices(self) -> Mapping[str, Slice]:
        own = {p for group in self._optimizer.param_groups for p in group["params"]}
        return {name: Slice.whole(p) for name, p in self._model.named_parameters() if p in own}

    def _load_weights(self, state: dict[str, Tensor]) -> None:
        self._model.load_state_dict(state)
