"""SGDW's step on a GPU in one pass over memory, all tensors in one launch. Needs triton, which comes with torch's CUDA builds.

torch has no fused SGD whose decay is decoupled, and a multiplication before it reads and writes every weight once more: 28 bytes
a parameter instead of 20, and to move them is all that a step costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""elements that one program moves"""
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(numbers, blocks, TYPE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """numbers int64: the bits of float64 lr, momentum and weight_decay, then of each tensor the addresses of weight, gradient
    and buffer; blocks int64 (m, 3): tensor, first element, elements from there on."""
    row = blocks + 3 * tl.program_id(0)
    first = tl.load(row + 1)
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.load(row + 2)
    lr = tl.load(numbers).to(tl.float64, bitcast=True).to(TYPE)
    momentum = tl.load(numbers + 1).to(tl.float64, bitcast=True).to(TYPE)
    decay = tl.load(numbers + 2).to(tl.float64, bitcast=True).to(TYPE)
    addresses = numbers + 3 + 3 * tl.load(row)
    weights = tl.load(addresses).to(tl.pointer_type(TYPE)) + first + lane
    gradients = tl.load(addresses + 1).to(tl.pointer_type(TYPE)) + first + lane
    buffers = tl.load(addresses + 2).to(tl.pointer_type(TYPE)) + first + lane
    theta = tl.load(weights, inside)
    moved = momentum * tl.load(buffers, inside) + tl.load(gradients, inside)
    tl.store(buffers, moved, inside)
    tl.store(weights, theta - decay * theta - lr * moved, inside)


def can(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Whether weights, gradients and buffers are of one type and, each three, of one order in memory without gaps."""
    return (
        columns[0][0].dtype in TYPES
        and len({t.dtype for column in columns for t in column}) == 1
        and all(_order(w) == _order(g) == _order(b) and _is_dense(w) for w, g, b in zip(*columns, strict=True))
    )


def _order(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def step(columns: Sequence[Sequence[Tensor]], lr: float, momentum: float, weight_decay: float) -> None:
    """buf <- momentum*buf + g;  theta <- theta - weight_decay*theta - lr*buf, of columns [weights, gradients, buffers] in place."""
    weights = columns[0]
    device = weights[0].device
    blocks = _blocks(tuple(w.numel() for w in weights), device)
    if not len(blocks):
        return
    numbers = torch.empty(3 + 3 * len(weights), dtype=torch.int64, pin_memory=device.type == "cuda")
    numbers[:3] = torch.tensor([lr, momentum, weight_decay], dtype=torch.float64).view(torch.int64)
    numbers[3:] = torch.tensor([t.data_ptr() for row in zip(*columns, strict=True) for t in row], dtype=torch.int64)
    with torch.cuda.device(device):
        _kernel[(len(blocks),)](numbers.to(device, non_blocking=True), blocks, TYPES[weights[0].dtype], BLOCK)


@lru_cache(maxsize=8)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [(i, first, min(BLOCK, size - first)) for i, size in enumerate(sizes) for first in range(0, size, BLOCK)]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(device)
