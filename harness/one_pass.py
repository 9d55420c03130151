"""Decoupled steps on a GPU in one pass over memory, all tensors in one launch. Needs triton, which comes with torch's CUDA builds.

To move weights, gradients and moments is all that a step costs: 20 bytes a parameter in fp32 for SGDW, 28 for AdamW. torch has no
fused SGD whose decay is decoupled, and a multiplication before it moves 8 more; its fused AdamW reaches three quarters of what a
copy does on an H100 at the size of a ResNet-50 (tests/benchmarks/reports).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""elements that one program moves"""
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

Columns = Sequence[Sequence[Tensor]]
"""weights, gradients and each kind of moments, in the same order"""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sgdw(numbers, blocks, TYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """numbers: lr, momentum, weight_decay as float64, then of each tensor the addresses of weight, gradient and buffer.
    blocks int64 (m, 3): a tensor, the first element, elements from there on. Both as _launch fills them."""
    row = blocks + 3 * tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.load(row + 2)
    places = tl.load(row + 1) + lane
    lr = tl.load(numbers).to(tl.float64, bitcast=True).to(TYPE)
    momentum = tl.load(numbers + 1).to(tl.float64, bitcast=True).to(TYPE)
    decay = tl.load(numbers + 2).to(tl.float64, bitcast=True).to(TYPE)
    addresses = numbers + 3 + 3 * tl.load(row)
    weights = tl.load(addresses).to(tl.pointer_type(TYPE)) + places
    gradients = tl.load(addresses + 1).to(tl.pointer_type(TYPE)) + places
    buffers = tl.load(addresses + 2).to(tl.pointer_type(TYPE)) + places
    theta = tl.load(weights, inside)
    moved = momentum * tl.load(buffers, inside) + tl.load(gradients, inside)
    tl.store(buffers, moved, inside)
    tl.store(weights, theta - decay * theta - lr * moved, inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _adamw(numbers, blocks, TYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """numbers: lr, 1 - beta1, 1 - beta2, eps, weight_decay, log beta1, log beta2, then of each tensor the addresses of weight,
    gradient, first and second moment and of the steps taken with this one, float32."""
    row = blocks + 3 * tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.load(row + 2)
    places = tl.load(row + 1) + lane
    addresses = numbers + 7 + 5 * tl.load(row)
    steps = tl.load(tl.load(addresses + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
    correction1 = 1 - tl.exp(steps * tl.load(numbers + 5).to(tl.float64, bitcast=True))
    correction2 = 1 - tl.exp(steps * tl.load(numbers + 6).to(tl.float64, bitcast=True))
    lr = (tl.load(numbers).to(tl.float64, bitcast=True) / correction1).to(TYPE)
    shrink = (1 / tl.sqrt(correction2)).to(TYPE)
    new1 = tl.load(numbers + 1).to(tl.float64, bitcast=True).to(TYPE)
    new2 = tl.load(numbers + 2).to(tl.float64, bitcast=True).to(TYPE)
    eps = tl.load(numbers + 3).to(tl.float64, bitcast=True).to(TYPE)
    decay = tl.load(numbers + 4).to(tl.float64, bitcast=True).to(TYPE)
    weights = tl.load(addresses).to(tl.pointer_type(TYPE)) + places
    gradients = tl.load(addresses + 1).to(tl.pointer_type(TYPE)) + places
    firsts = tl.load(addresses + 2).to(tl.pointer_type(TYPE)) + places
    seconds = tl.load(addresses + 3).to(tl.pointer_type(TYPE)) + places
    theta, gradient = tl.load(weights, inside), tl.load(gradients, inside)
    first, second = tl.load(firsts, inside), tl.load(seconds, inside)
    first += new1 * (gradient - first)
    second += new2 * (gradient * gradient - second)
    tl.store(firsts, first, inside)
    tl.store(seconds, second, inside)
    root = tl.sqrt(second) if TYPE == tl.float64 else tl.sqrt_rn(second)  # noqa: SIM300
    tl.store(weights, theta - decay * theta - lr * first / (root * shrink + eps), inside)


def probe() -> None:
    """Raises what keeps the kernels from running on this process's GPU: triton compiles them at their first use."""
    columns = [[torch.zeros(1, device="cuda")] for _ in range(4)]
    sgdw(columns[:3], 0.0, 0.0, 0.0)
    adamw(columns, [torch.ones((), device="cuda")], 0.0, (0.0, 0.0), 1.0, 0.0)


def can(columns: Columns) -> bool:
    """Whether weights, gradients and moments are of one type and, one by one, of one order in memory without gaps."""
    types = {t.dtype for column in columns for t in column}
    return len(types) <= 1 and types <= TYPES.keys() and all(map(_alike, *columns))


def _alike(weight: Tensor, *others: Tensor) -> bool:
    order = _order(weight.shape, weight.stride())
    return order is not None and all(_order(t.shape, t.stride()) == order for t in others)


@lru_cache(maxsize=4096)
def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Dimensions of more than one element, from the innermost; None where there are gaps between elements, or overlaps."""
    if 0 in shape:
        return ()
    order = sorted((d for d, size in enumerate(shape) if size > 1), key=lambda d: strides[d])
    expected = 1
    for dimension in order:
        if strides[dimension] != expected:
            return None
        expected *= shape[dimension]
    return tuple(order)


def sgdw(columns: Columns, lr: float, momentum: float, weight_decay: float) -> None:
    """buf <- momentum*buf + g;  theta <- theta - weight_decay*theta - lr*buf, of columns theta, g and buf, in place."""
    _launch(_sgdw, [lr, momentum, weight_decay], columns)


def adamw(columns: Columns, steps: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """theta <- theta - weight_decay*theta - lr*mhat/(sqrt(vhat)+eps), of columns theta, g, m and v, in place.

    steps: taken so far with this one, a float32 of each tensor on its device.
    """
    beta1, beta2 = betas
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    _launch(_adamw, [lr, 1 - beta1, 1 - beta2, eps, weight_decay, *logs], [*columns, steps])


def _launch(kernel: Any, scalars: Sequence[float], columns: Columns) -> None:
    weights = columns[0]
    if not any(w.numel() for w in weights):
        return
    device = weights[0].device
    blocks = _blocks(tuple(w.numel() for w in weights), device)
    bits = torch.tensor(scalars, dtype=torch.float64).view(torch.int64)
    addresses = torch.tensor([t.data_ptr() for row in zip(*columns, strict=True) for t in row], dtype=torch.int64)
    numbers = torch.cat([bits, addresses]).pin_memory().to(device, non_blocking=True)
    with torch.cuda.device(device):
        kernel[(len(blocks),)](numbers, blocks, TYPES[weights[0].dtype], BLOCK)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    parts = [torch.arange(0, size, BLOCK) for size in sizes]
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor([len(part) for part in parts]))
    first = torch.cat(parts)
    return torch.stack([tensors, first, (torch.tensor(sizes)[tensors] - first).clamp(max=BLOCK)], dim=1).to(device)
