"""(optimizer, decay) -> a torch optimizer and its param groups. Exact updates, torch's fused kernels underneath.

What a step reads from its param group, written there before each step (`hyperparameters`):

    lr            eta_t * alpha
    weight_decay  decoupled: eta_t * lambda, the share of the weights that this step removes (paper units)
                  l2: lambda, the coefficient of theta in the gradient

so that the decoupled step is theta <- (1 - weight_decay) * theta - (lr * direction), with the weights from before the
step in the decay (Algorithms 1 and 2 of arXiv 1711.05101v3). torch's own AdamW multiplies the two numbers instead.
Moments and step counts live in the optimizer's state and persist through restarts; nothing counts calls of step(),
because sharded optimizers may call it once a group.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import L2, Adam, Decoupled, NoDecay, Sgd
from harness.dist import Ranks


@contextmanager
def _restored(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Puts back lr and weight_decay, which a step rewrites into what torch's kernel takes."""
    before = [(group["lr"], group["weight_decay"]) for group in groups]
    try:
        yield
    finally:
        for group, (lr, weight_decay) in zip(groups, before, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay


def _decay(weights: list[Tensor], weight_decay: float) -> None:
    """theta <- theta - weight_decay*theta. Not times 1 - weight_decay, which fp32 rounds by up to 3e-8, for all weights alike."""
    if weights and weight_decay:
        torch._foreach_add_(weights, weights, alpha=-weight_decay)


def _decay_first(group: dict[str, Any]) -> None:
    """Of the parameters that this step moves; the kernel decays no more."""
    _decay([p for p in group["params"] if p.grad is not None], group["weight_decay"])
    group["weight_decay"] = 0.0


def _kernels(weights: list[Tensor]) -> ModuleType | None:
    """harness.one_pass, for weights on a GPU where its kernels run, here and on every other rank."""
    return _one_pass() if _everywhere and weights and all(w.is_cuda for w in weights) else None


_everywhere = True
"""no rank of this trial is known to step by torch's kernels"""


def agree(ranks: Ranks, decay: NoDecay | L2 | Decoupled) -> None:
    """On a GPU, every rank steps by the same kernels: replicas would else drift apart by rounding. Collective."""
    global _everywhere
    unused = ranks.device.type != "cuda" or decay.name != "decoupled"
    possible = unused or _one_pass() is not None
    _everywhere = ranks.sums([possible])[0] == ranks.world_size
    if possible and not _everywhere:
        warnings.warn("steps are torch's, in more passes over memory, since triton cannot make ours on another rank", stacklevel=2)


@cache
def _one_pass() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("harness.one_pass")
    try:
        kernels.probe()
    except Exception as error:  # no compiler, no home to write to, a GPU that is too old: what triton then raises is anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"steps are torch's, in more passes over memory, since triton cannot make ours: {reason}", stacklevel=1)
        return None
    return kernels


class SGDW(torch.optim.Optimizer):
    """buf <- momentum*buf + g;  theta <- theta - lr*buf - weight_decay*theta_before.

    On a GPU by harness.one_pass where that can. Else torch's fused SGD kernel after the decay: on a CPU one tensor after the
    other, so that it finds in the cache some of what has just decayed.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            columns = [moved, [p.grad for p in moved]] + ([[self._buffer(p) for p in moved]] if group["momentum"] else [])
            if group["momentum"] and (kernels := _kernels(moved)) and kernels.can(columns):
                kernels.sgdw(columns, group["lr"], group["momentum"], group["weight_decay"])
                continue
            on_cpu = all(p.is_cpu for p in moved)
            parts = ([[t] for t in row] for row in zip(*columns, strict=True)) if on_cpu else [columns]
            for parameters, gradients, *buffers in parts:
                _decay(parameters, group["weight_decay"])
                torch._fused_sgd_(
                    parameters, gradients, buffers[0] if buffers else [], lr=group["lr"], momentum=group["momentum"],
                    weight_decay=0.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
                )  # fmt: skip

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


class AdamW(torch.optim.AdamW):
    """theta <- theta - lr*mhat/(sqrt(vhat)+eps) - weight_decay*theta_before.

    On a GPU by harness.one_pass where that can. torch's kernel removes lr*weight_decay of the weights, so it is handed
    weight_decay / lr: fused speed, and the product is exact to one rounding in float64.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self._in_one_pass():
            return
        with _restored(self.param_groups):
            for group in self.param_groups:
                if group["lr"]:
                    group["weight_decay"] /= group["lr"]
                else:
                    _decay_first(group)
            super().step()

    def _in_one_pass(self) -> bool:
        """Takes the step, if harness.one_pass can, and says whether it did."""
        moved = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        kernels = _kernels([p for part in moved for p in part])
        if kernels is None:
            return False
        states = [[self._state_of(p) for p in part] for part in moved]
        columns = [
            [part, [p.grad for p in part], [s["exp_avg"] for s in found], [s["exp_avg_sq"] for s in found]]
            for part, found in zip(moved, states, strict=True)
        ]
        if not all(kernels.can(column) for column in columns):
            return False
        for group, column, found in zip(self.param_groups, columns, states, strict=True):
            if found:
                steps = [s["step"] for s in found]
                torch._foreach_add_(steps, 1)
                kernels.adamw(column, steps, group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return True

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """As torch's fused AdamW begins with it."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


class SGDLrInBuffer(torch.optim.SGD):
    """Algorithm 1 as printed, with L2: buf <- momentum*buf + lr*(g + weight_decay*theta);  theta <- theta - buf.

    Gradients are scaled in place and the kernel runs at lr 1.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with _restored(self.param_groups):
            for group in self.param_groups:
                _scale_gradients(group)
                group["weight_decay"] *= group["lr"]
                group["lr"] = 1.0
            super().step()


class SGDWLrInBuffer(torch.optim.SGD):
    """Algorithm 1 as printed: buf <- momentum*buf + lr*g;  theta <- theta - buf - weight_decay*theta_before."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with _restored(self.param_groups):
            for group in self.param_groups:
                _decay_first(group)
                _scale_gradients(group)
                group["lr"] = 1.0
            super().step()


def _scale_gradients(group: dict[str, Any]) -> None:
    """g <- lr*g, in place: gradients are dropped after the step."""
    gradients = [p.grad for p in group["params"] if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, group["lr"])


def optimizer_class(optimizer: Sgd | Adam, decay: NoDecay | L2 | Decoupled) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and the arguments it takes beside param groups; what a sharding wrapper needs."""
    cls: type[torch.optim.Optimizer]
    decoupled = decay.name == "decoupled"
    if optimizer.name == "adam":
        cls = AdamW if decoupled else torch.optim.Adam
        return cls, {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": 0.0, "fused": True}
    arguments = {"lr": optimizer.lr, "momentum": optimizer.momentum, "weight_decay": 0.0}
    if decoupled and not optimizer.lr_in_buffer:
        return SGDW, arguments
    cls = torch.optim.SGD if not optimizer.lr_in_buffer else SGDWLrInBuffer if decoupled else SGDLrInBuffer
    return cls, arguments | {"fused": True}


def param_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], decay: NoDecay | L2 | Decoupled) -> list[dict[str, Any]]:
    """One group of the parameters that decay, one of those that do not; an empty group is left out."""
    decaying: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        a_value_a_channel = parameter.ndim == 0 or parameter.numel() == len(parameter)  # the layer scales of ConvNeXt are (C, 1, 1)
        spared = decay.name == "none" or (decay.exempt_1d and a_value_a_channel)
        (exempt if spared else decaying).append(parameter)
    return [{"params": group, "decays": decays} for group, decays in ((decaying, True), (exempt, False)) if group]


def build(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Sgd | Adam, decay: NoDecay | L2 | Decoupled
) -> torch.optim.Optimizer:
    """The optimizer over parameters of any floating dtype, at lr = alpha and no decay until `write` sets them."""
    cls, arguments = optimizer_class(optimizer, decay)
    return cls(param_groups(named_parameters, decay), **arguments)


def hyperparameters(optimizer: Sgd | Adam, decay: NoDecay | L2 | Decoupled, eta: float, lam: float) -> tuple[float, float]:
    """(lr, weight_decay) of one step from the schedule's eta and lambda, in the meaning of this module's head."""
    return eta * optimizer.lr, eta * lam if decay.name == "decoupled" else lam


def write(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets the next step's lr in every group, and its weight_decay in those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
