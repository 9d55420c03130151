"""Which sample stands where, and how it is cut and shifted: pure functions of the seed and the step.

Nothing here depends on ranks, workers or the arm, so arms with one seed see the same images in the same order, whatever
they run on. Counter-based random numbers (Philox), keyed: any epoch is drawn directly, and a resume replays nothing. Only the
raw 64-bit words are used, which NumPy keeps stable over its versions (NEP 19); its `permutation` is not. (Mixup's shares are
SciPy's quantiles of them, whose last bits may change with its version.) No torch here.

A *position* is a place in the view of the samples trained on, 0..n-1.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

ORDER, AUGMENTATION, CROP, BLOCKS, MIXING, RANDOM_OPS, LAYERS = 1, 2, 3, 4, 5, 6, 7  # streams that share no random word
TRIES = 10
"""for a random box that fits the image"""


class Augmentation(NamedTuple):
    """One draw for each of n samples."""

    dx: IntArray
    """pixels to the right, in [-translate, translate]"""
    dy: IntArray
    """pixels down, in [-translate, translate]"""
    flip: npt.NDArray[np.bool_]
    """left and right exchanged"""


class Mixing(NamedTuple):
    """How the two images of every pair of a batch are mixed."""

    share: float
    """of an image, and of its loss, that stays its own"""
    box: tuple[int, int, int, int] | None
    """(left, top, width, height) that CutMix takes from the partner; None: mixup, the weighted mean of both"""


class Windowed(NamedTuple):
    """Neighbours are read together: blocks of neighbouring positions in random order, the positions of some blocks mixed."""

    block: int
    """positions"""
    blocks: int
    """that are mixed"""


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, n: int, windowed: Windowed | None = None) -> IntArray:
    """The epoch's order of all n positions; read-only, shape (n,). Every order has the same chance, or every windowed one."""
    words = _words(seed, ORDER, epoch, n)
    if windowed is None:
        order = np.argsort(words, kind="stable")
    else:
        place = np.argsort(np.argsort(_words(seed, BLOCKS, epoch, -(-n // windowed.block)), kind="stable"))
        window = place[np.arange(n) // windowed.block] // windowed.blocks
        order = np.lexsort((words, window))
    order.setflags(write=False)
    return order


def batch_positions(
    seed: int, step: int, steps_per_epoch: int, global_batch_size: int, n: int, windowed: Windowed | None = None
) -> IntArray:
    """Positions of the global batch of a 0-based optimizer step, shape (global_batch_size,).

    An epoch is its first steps_per_epoch * global_batch_size <= n places in the permutation, each position at most once.
    """
    if not 0 < steps_per_epoch * global_batch_size <= n:
        raise ValueError(f"{steps_per_epoch} batches of {global_batch_size} do not fit {n} samples")
    epoch, batch = divmod(step, steps_per_epoch)
    return permutation(seed, epoch, n, windowed)[batch * global_batch_size : (batch + 1) * global_batch_size]


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


def crop_words(seed: int, epoch: int, positions: IntArray) -> npt.NDArray[np.uint64]:
    """What `crop` makes the random boxes of these positions of, shape (n, TRIES, 4): those of an epoch's batch at once."""
    counters = np.zeros((len(positions), TRIES, 4), dtype=np.uint64)
    counters[..., 0] = np.arange(1, TRIES + 1)  # numpy's Philox counts before it draws, and so does every stream here
    counters[..., 1] = positions[:, None]
    return _philox(_key(seed, CROP, epoch), counters)


def crop(
    words: npt.NDArray[np.uint64], height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The random box (left, top, width, height) of an image that training sees, in pixels; of a position's `crop_words`.

    Distributed as torchvision's RandomResizedCrop: an area uniform in `scale`, a width / height log-uniform in `ratio`, ten
    tries for a box that fits, and then the largest central one whose shape is within `ratio`.
    """
    for area, shape, x, y in words.tolist():
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area / 2**64)
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * shape / 2**64)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (width - w + 1) * x >> 64, (height - h + 1) * y >> 64, w, h
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def ops_seed(seed: int, epoch: int, position: int) -> int:
    """Seeds the random operations of a recipe's `augment` on a position's image in an epoch; below 2**63."""
    words = np.random.Philox(key=_key(seed, RANDOM_OPS, epoch), counter=np.array([0, position, 0, 0], dtype=np.uint64))
    return int(words.random_raw()) >> 1


def mixing(seed: int, step: int, mixup: float, cutmix: float, size: int) -> Mixing | None:
    """The draw of a 0-based optimizer step for square images of `size` pixels; None without either.

    mixup, cutmix: alpha of Beta(alpha, alpha), of which the share is drawn; 0: never. With both, either half of the time.
    CutMix's box has a uniform centre and may be cut off by the border: `share` is then what is really left.
    """
    if not mixup and not cutmix:
        return None
    from scipy.special import betaincinv  # 0.2 s, which only trials that mix wait for

    words = np.random.Philox(key=_key(seed, MIXING, 0), counter=np.array([0, step, 0, 0], dtype=np.uint64))
    coin, quantile, x, y = words.random_raw(4).tolist()
    cuts = cutmix > 0 and (not mixup or coin >= 2**63)
    alpha = cutmix if cuts else mixup
    share = float(betaincinv(alpha, alpha, quantile / 2**64))
    if not cuts:
        return Mixing(share, None)
    side = size * math.sqrt(1 - share)
    edges = [(size * centre / 2**64 - side / 2, size * centre / 2**64 + side / 2) for centre in (x, y)]
    (left, right), (top, bottom) = ((max(0, round(low)), min(size, round(high))) for low, high in edges)
    return Mixing(1 - (right - left) * (bottom - top) / size**2, (left, top, right - left, bottom - top))


def layer_draws(seed: int, step: int, layers: int, global_batch_size: int) -> npt.NDArray[np.float32]:
    """Uniform numbers in [0, 1), one a layer and sample of the global batch of a 0-based step: shape (layers, global_batch_size).

    Of 24 bits, so that fp32 holds them exactly.
    """
    words = _words(seed, LAYERS, step, layers * global_batch_size) >> np.uint64(40)
    return (words.astype(np.float32) * np.float32(2**-24)).reshape(layers, global_batch_size)


def _words(seed: int, stream: int, epoch: int, n: int) -> npt.NDArray[np.uint64]:
    """n random 64-bit words that no other (seed, stream, epoch) shares."""
    return np.asarray(np.random.Philox(key=_key(seed, stream, epoch)).random_raw(n), dtype=np.uint64)


def _philox(key: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Philox4x64-10 (Salmon et al. 2011, section 3.3) of every counter in `counters` (..., 4). numpy's draws from one counter on, and
    a generator of its own for each takes longer than a hundred of these."""
    a, b, c, d = (counters[..., i] for i in range(4))
    k, m = key
    with np.errstate(over="ignore"):
        for _ in range(10):
            (high_a, low_a), (high_c, low_c) = _product(a, 0xD2E7470EE14C6C93), _product(c, 0xCA5A826395121157)
            a, b, c, d = high_c ^ b ^ k, low_c, high_a ^ d ^ m, low_a
            k, m = k + np.uint64(0x9E3779B97F4A7C15), m + np.uint64(0xBB67AE8584CAA73B)
    return np.stack((a, b, c, d), axis=-1)


def _product(words: npt.NDArray[np.uint64], constant: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """(high, low) 64 bits of the products, from their 32-bit halves."""
    half, low_half = np.uint64(32), np.uint64(0xFFFFFFFF)
    high, low = words >> half, words & low_half
    times_high, times_low = np.uint64(constant >> 32), np.uint64(constant & 0xFFFFFFFF)
    middle = high * times_low + (low * times_low >> half)
    other = low * times_high + (middle & low_half)
    return high * times_high + (middle >> half) + (other >> half), words * np.uint64(constant)


def _key(seed: int, stream: int, epoch: int) -> npt.NDArray[np.uint64]:
    return np.array([seed, stream << 32 | epoch], dtype=np.uint64)
