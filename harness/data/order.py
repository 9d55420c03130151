"""Which sample stands where, and how it is shifted: pure functions of the seed and the step.

Nothing here depends on ranks, workers or the arm, so arms with one seed see the same images in the same order, whatever
they run on. Counter-based random numbers (Philox), keyed: any epoch is drawn directly, and a resume replays nothing. Only the
raw 64-bit words are used, which NumPy keeps stable over its versions (NEP 19); its `permutation` is not. No torch here.

A *position* is a place in the view of the samples trained on, 0..n-1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

ORDER, AUGMENTATION = 1, 2  # streams that share no random word


class Augmentation(NamedTuple):
    """One draw for each of n samples."""

    dx: IntArray
    """pixels to the right, in [-translate, translate]"""
    dy: IntArray
    """pixels down, in [-translate, translate]"""
    flip: npt.NDArray[np.bool_]
    """left and right exchanged"""


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int) -> IntArray:
    """The epoch's order of all n positions; read-only, shape (n,). Every order has the same chance."""
    order = np.argsort(_words(seed, ORDER, epoch, n), kind="stable")
    order.setflags(write=False)
    return order


def batch_positions(seed: int, step: int, steps_per_epoch: int, global_batch_size: int, n: int) -> IntArray:
    """Positions of the global batch of a 0-based optimizer step, shape (global_batch_size,).

    An epoch is its first steps_per_epoch * global_batch_size <= n places in the permutation, each position at most once.
    """
    if not 0 < steps_per_epoch * global_batch_size <= n:
        raise ValueError(f"{steps_per_epoch} batches of {global_batch_size} do not fit {n} samples")
    epoch, batch = divmod(step, steps_per_epoch)
    return permutation(seed, epoch, n)[batch * global_batch_size : (batch + 1) * global_batch_size]


def share(positions: IntArray, rank: int, world_size: int) -> IntArray:
    """This rank's part of a global batch: the rank-th of world_size contiguous parts of equal size."""
    size, rest = divmod(len(positions), world_size)
    if rest:
        raise ValueError(f"a global batch of {len(positions)} has no equal parts for {world_size} ranks")
    return positions[rank * size : (rank + 1) * size]


@lru_cache(maxsize=2)
def augmentation(seed: int, epoch: int, n: int, translate: int) -> Augmentation:
    """The epoch's draws for every position, whether or not a batch takes it; read-only arrays of shape (n,)."""
    words = _words(seed, AUGMENTATION, epoch, n)
    span, bits = np.uint64(2 * translate + 1), np.uint64(21)
    low = np.uint64((1 << 21) - 1)
    dx, dy = (((words >> shift) & low) * span >> bits for shift in (np.uint64(0), bits))
    draws = Augmentation(
        dx.astype(np.int64) - translate,
        dy.astype(np.int64) - translate,
        (words >> np.uint64(63)).astype(bool),
    )
    for array in draws:
        array.setflags(write=False)
    return draws


def _words(seed: int, stream: int, epoch: int, n: int) -> npt.NDArray[np.uint64]:
    """n random 64-bit words that no other (seed, stream, epoch) shares."""
    key = np.array([seed, stream << 32 | epoch], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(n), dtype=np.uint64)
