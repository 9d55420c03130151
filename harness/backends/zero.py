"""DeepSpeed's ZeRO: the one place that imports deepspeed.

Stage 0 keeps everything on every rank; 1 shards the optimizer state and an fp32 copy of the weights, 2 the gradients too,
3 the weights too. The optimizer is ours (harness.optim), handed over; DeepSpeed is given no optimizer section (which
turns "Adam" into AdamW), no scheduler and no precision section: bf16 is autocast inside the model, since DeepSpeed's own
torch_autocast sums the gradients of linear and convolution layers in bf16.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from harness import optim
from harness.config import Trial
from harness.dist import Ranks, ensure_group
from harness.engine import Engine, Slice, load_buffers


class DeepSpeedEngine(Engine):
    def __init__(self, trial: Trial, ranks: Ranks) -> None:
        super().__init__(trial, ranks)
        ensure_group(ranks, trial.backend.timeout_seconds)
        self._deepspeed = _imported(ranks, trial.backend.timeout_seconds)
        self._stage = trial.backend.zero_stage
        self.weights_are_sharded = self._stage == 3
        self._named: dict[str, Any] = dict(self._model.named_parameters())  # DeepSpeed gives them attributes
        self._optimizer = optim.build(self._named.items(), trial.optimizer, trial.decay)
        self._engine, self._zero, _, _ = self._deepspeed.initialize(model=self._model, optimizer=self._optimizer, config=self._config())

    def _config(self) -> dict[str, Any]:
        trial, parameters = self._trial, sum(p.numel() for p in self._named.values())
        zero: dict[str, Any] = {"stage": self._stage, "reduce_bucket_size": min(parameters, 500_000_000)}  # the default: 2 GB, always
        if self._stage == 3:
            zero["stage3_param_persistence_threshold"] = 10_000  # elements: norms and biases stay gathered
        if trial.backend.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self._ranks.device.type == "cuda"}
        batch = trial.budget.global_batch_size
        return {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": self._micro,
            "gradient_accumulation_steps": batch // self._ranks.world_size // self._micro,
            "gradient_clipping": trial.workload.recipe.clip_norm or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # anything but its own list, of torch's Adam by exact type
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }

    def _forward(self, images: Tensor, last: bool) -> Tensor:
        logits: Tensor = self._engine(images)
        return logits

    def _backward(self, loss: Tensor, count: int, last: bool) -> None:
        self._engine.backward(loss)  # divides by the number of micro-batches
        if not last:
            self._engine.step()  # counts the micro-batch

    def _update(self, lr: float, weight_decay: float) -> None:
        optim.write(self._optimizer, lr, weight_decay)
        self._engine.step()
        if getattr(self._zero, "overflow", False):
            self._poison()

    @torch.no_grad()
    def _poison(self) -> None:
        """Makes the weights NaN, as a step with a non-finite gradient does elsewhere: ZeRO leaves such a step out in silence."""
        for p in self._named.values():
            p.data.fill_(torch.nan)
            if self._stage == 3:
                p.ds_tensor.data.fill_(torch.nan)

    def _weights(self) -> list[Tensor]:
        if self._stage == 3:  # without the padding, which is whatever was in memory
            return [piece.read(piece.tensor.detach()) for piece in self._slices().values()]
        return [p.detach() for p in self._named.values()]

    def _slices(self) -> Mapping[str, Slice]:
        if self._stage == 0:
            return {name: Slice.whole(p) for name, p in self._named.items()}
        found = {name: self._slice_3(p) if self._stage == 3 else self._slice_1_2(p) for name, p in self._named.items()}
        return {name: piece for name, piece in found.items() if piece is not None and piece.count}

    def _slice_1_2(self, parameter: Any) -> Slice | None:
        """Each param group is one flat tensor, cut in equal parts, whatever parameters a cut goes through."""
        fragment = parameter._hp_mapping
        if fragment is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[fragment.param_group_index]
        where = fragment.hp_fragment_address
        return Slice(flat, where.start, fragment.lp_fragment_address.start, where.numel)

    def _slice_3(self, parameter: Any) -> Slice:
        """Each parameter is cut in equal parts, the last one padded."""
        group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = self._ranks.rank * size
        return Slice(self._zero.fp32_partitioned_groups_flat[group], offset, start, max(0, min(size, parameter.ds_numel - start)))

    @torch.no_grad()
    def _full_weights(self) -> dict[str, Tensor]:
        with self._deepspeed.zero.GatheredParameters(list(self._named.values())):
            return {name: p.detach().clone() for name, p in self._named.items()}

    @torch.no_grad()
    def _load_weights(self, state: dict[str, Tensor]) -> None:
        load_buffers(self._model, state)
        with self._deepspeed.zero.GatheredParameters(list(self._named.values()), modifier_rank=0, enabled=self._stage == 3):
            for name, p in self._named.items():
                p.copy_(state[name])
        if self._stage:
            self._zero.refresh_fp32_params()


def _imported(ranks: Ranks, timeout_seconds: int) -> Any:
    """The deepspeed module, joined to torch's process group."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)  # DeepSpeed takes it for the number of the device
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)  # its calls
    deepspeed = _without_mlflow()
    # An extension for all_reduce in inference, which would be compiled at the start of a first trial, by every rank, under a
    # lock that a kill leaves behind (pytorch#189245).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator  # Muon, unused, is compiled at import
    deepspeed.utils.logger.setLevel(logging.ERROR)  # its warnings are about what is chosen here on purpose
    # What an earlier trial of this process left behind belongs to a process group that is gone; and the group that
    # DeepSpeed would make for itself would wait for a lost peer for half an hour.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = td.new_group(timeout=timedelta(seconds=timeout_seconds))
    return deepspeed


def _without_mlflow() -> Any:
    """Imports deepspeed. Its autotuner, which nothing here uses, would import all of MLflow: half of the seconds that a rank takes."""
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # to import it raises ImportError, which the autotuner expects
    try:
        import deepspeed
    finally:
        if sys.modules["mlflow"] is None:
            del sys.modules["mlflow"]
    return deepspeed
