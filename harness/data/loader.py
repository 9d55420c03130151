"""Batches of a trial: uint8 images and labels, in the exact order that `order` gives.

A data set that fits in memory is read, checked and decoded once at start, and a batch is then two gathers; a larger one
is read and decoded a batch at a time by a few threads (the decoders let go of the interpreter lock), some batches ahead.
Pixels stay uint8 all the way: they are normalised on the device.
"""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from harness import schedule
from harness.config import Data, Trial
from harness.data import order
from harness.data.decode import Pixels, decode
from harness.data.index import CorruptSample, Index, IntArray

Batch = tuple[torch.Tensor, torch.Tensor]
"""images, uint8 (n, channels, height, width), and labels, int64 (n,)"""

DECODED_BYTES = 1 << 30
"""a data set of at most so many bytes of pixels is decoded at start and kept"""
SUBSTITUTED_SHARE = 0.01
"""of the samples trained on; beyond it the data are broken, not blemished"""
THREADS = min(8, len(os.sched_getaffinity(0)))
TOGETHER_BYTES = 1 << 18
"""pixels of small batches that are put together at once: a call of numpy costs more than a digit's copy"""
AHEAD = 4
"""batches that may be ready before they are asked for"""


@dataclass(frozen=True)
class Substitution:
    """A corrupt training sample, and the one that is used in its place."""

    number: int
    substitute: int
    reason: str
    """names shard and key"""


class DataSet:
    """The three views of one data set: `train` (what is trained on), `holdout` (what is decided on), `val` (what is reported).

    `substituted` lists the corrupt training samples found so far, by number: all of them from the start when the data are
    decoded at start, else those that this process came across.
    """

    def __init__(self, index: Index, data: Data) -> None:
        self.index = index
        self._reader = _Reader(index, data)
        trained = index.train(data)
        self._substitutes = _Substitutes(self._reader, trained)
        load = self._substitutes if data.on_corrupt == "substitute" else self._reader
        self.train = View(trained, load)
        self.holdout = View(index.holdout(data), self._reader)
        self.val = View(index.val(), self._reader)
        self.pixels = data.channels * data.image_size**2
        """bytes of one decoded image"""
        if len(index.label) * self.pixels <= DECODED_BYTES:
            for view in (self.train, self.holdout, self.val):
                view.decode((data.channels, data.image_size, data.image_size))

    @property
    def substituted(self) -> list[Substitution]:
        return sorted(self._substitutes.made.values(), key=lambda s: s.number)

    def train_eval(self, samples: int) -> View:
        """The clean training subset behind train_eval/loss: the first of the trained ones in the holdout order.

        A function of the data alone, not of seed or arm. All of `train` when it has fewer.
        """
        ranks = self.index.holdout_rank[self.train.numbers]
        return self.train.part(np.sort(np.argsort(ranks, kind="stable")[:samples]))


def open_data(data: Data) -> DataSet:
    """Index and shards of `data`, checked; decoded too when that fits in memory.

    Raises BadInput, a line a mistake: no index, missing or truncated shards, other counts or classes than `data` says.
    Raises CorruptSample, naming shard and key: a sample whose crc32 is wrong, that does not decode to image_size, or whose
    label is outside the classes. With on_corrupt: substitute another sample takes its place *in training*, up to 1 % of the
    samples trained on. In holdout and val nothing is ever substituted: every reported sample is counted exactly once.
    """
    index = Index.load(data.path)
    index.check(data)
    return DataSet(index, data)


# ------------------------------------------------------------------------------------------- reading samples


class _Reader:
    """Reads single samples; safe in several threads. Never substitutes."""

    def __init__(self, index: Index, data: Data) -> None:
        self.index, self._data = index, data
        # a file object is closed when the last user lets go of it; a large set has more shards than a process may open
        self._open = lru_cache(maxsize=128)(lambda shard: open(index.folder / index.shards[shard].name, "rb", buffering=0))  # noqa: SIM115

    def __call__(self, number: int) -> tuple[Pixels, int]:
        """Image (channels, image_size, image_size) and label; CorruptSample."""
        index, data = self.index, self._data
        label = int(index.label[number])
        if not 0 <= label < data.num_classes:
            raise CorruptSample(index.label_fault(number, data.num_classes))
        content = self._content(number)
        if zlib.crc32(content) != index.crc32[number]:
            raise CorruptSample(f"{index.where(number)}: its bytes are not the indexed ones (crc32); restore the shard")
        try:
            image = decode(content, data.channels)
        except ValueError as error:
            raise CorruptSample(f"{index.where(number)}: does not decode: {error}; see: wrbench shards verify") from None
        if image.shape[1:] != (data.image_size, data.image_size):
            height, width = image.shape[1:]
            raise CorruptSample(
                f"{index.where(number)}: is {height}x{width}, workload.data.image_size is {data.image_size}; images are not resized"
            )
        return image, label

    def _content(self, number: int) -> bytes:
        try:
            file = cast(BinaryIO, self._open(int(self.index.shard[number])))
            return os.pread(file.fileno(), int(self.index.size[number]), int(self.index.offset[number]))
        except OSError as error:
            raise CorruptSample(f"{self.index.where(number)}: cannot be read: {error.strerror or error}") from None


class _Substitutes:
    """Reads training samples; the next good one in the order of the index stands in for a corrupt one."""

    def __init__(self, read: _Reader, trained: IntArray) -> None:
        self._read, self._trained = read, trained
        self.made: dict[int, Substitution] = {}

    def __call__(self, number: int) -> tuple[Pixels, int]:
        try:
            return self._read(number)
        except CorruptSample as fault:
            reason = str(fault)
        place = int(np.searchsorted(self._trained, number))
        for step in range(1, len(self._trained)):
            substitute = int(self._trained[(place + step) % len(self._trained)])
            try:
                loaded = self._read(substitute)
            except CorruptSample:
                continue
            self.made[number] = Substitution(number, substitute, reason)
            if len(self.made) > SUBSTITUTED_SHARE * len(self._trained):
                break
            return loaded
        raise CorruptSample(
            f"{reason} (with this one {len(self.made)} of {len(self._trained)} training samples are corrupt: "
            f"over the limit of {SUBSTITUTED_SHARE:.0%} for on_corrupt: substitute)"
        )


class View:
    """Some samples of a data set, at positions 0..len-1."""

    def __init__(self, numbers: IntArray, load: Callable[[int], tuple[Pixels, int]]) -> None:
        self.numbers = numbers
        """their numbers in the index, ascending"""
        self._load = load
        self._decoded: tuple[Pixels, IntArray] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def decode(self, shape: tuple[int, int, int]) -> None:
        """Read every sample now and keep the pixels; images have `shape`."""
        images = np.empty((len(self), *shape), dtype=np.uint8)
        labels = np.empty(len(self), dtype=np.int64)

        def block(start: int) -> None:
            for position in range(start, min(start + 64, len(self))):
                images[position], labels[position] = self._load(int(self.numbers[position]))

        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(block, range(0, len(self), 64)))
        self._decoded = images, labels

    def part(self, positions: IntArray) -> View:
        view = View(self.numbers[positions], self._load)
        if self._decoded is not None:
            images, labels = self._decoded
            view._decoded = images[positions], labels[positions]
        return view

    @property
    def is_decoded(self) -> bool:
        return self._decoded is not None

    def gather(self, positions: IntArray) -> tuple[Pixels, IntArray]:
        """Copies of decoded images (n, C, H, W) and labels (n,)."""
        assert self._decoded is not None
        images, labels = self._decoded
        return images[positions], labels[positions]

    def load(self, positions: IntArray, threads: ThreadPoolExecutor) -> tuple[Pixels, IntArray]:
        """Images (n, C, H, W) and labels (n,), read and decoded now."""
        images, labels = zip(*threads.map(self._load, self.numbers[positions].tolist()), strict=True)
        return np.stack(images), np.array(labels, dtype=np.int64)


# --------------------------------------------------------------------------------------------------- batches


def train_batches(
    dataset: DataSet, trial: Trial, rank: int, world_size: int, start_step: int, stop_step: int
) -> Generator[Batch, None, None]:
    """This rank's part of the global batch of every step in [start_step, stop_step), augmented.

    Part r of R is the r-th of R contiguous parts, so the parts by rank are the global batch, whatever R is. Close it, or let
    go of it, to end what runs ahead. CorruptSample where a sample that was not decoded at start fails.
    """
    view, recipe, batch = dataset.train, trial.workload.recipe, trial.budget.global_batch_size
    per_epoch, size = schedule.steps_per_epoch(trial), batch // world_size
    together = max(1, TOGETHER_BYTES // (size * dataset.pixels))

    def batches(fetch: Fetch) -> Iterator[Batch]:
        step = start_step
        while step < stop_step:
            steps = range(step, min(step + together, stop_step, (step // per_epoch + 1) * per_epoch))
            drawn = (order.batch_positions(trial.seed, s, per_epoch, batch, len(view)) for s in steps)
            positions = np.concatenate([order.share(positions, rank, world_size) for positions in drawn])
            images, labels = fetch(positions)
            draws = order.augmentation(trial.seed, step // per_epoch, len(view), recipe.translate)
            if recipe.flip:
                images = flipped(images, draws.flip[positions])
            if recipe.translate:
                images = shifted(images, draws.dx[positions], draws.dy[positions], recipe.translate)
            yield from zip(torch.from_numpy(images).split(size), torch.from_numpy(labels).split(size), strict=True)
            step = steps.stop

    return _run(view, batches)


def eval_batches(view: View, rank: int, world_size: int, batch_size: int) -> Generator[Batch, None, None]:
    """This rank's samples of a view in batches of at most `batch_size`: over all ranks each sample exactly once.

    Nothing is padded and nothing is collective; ranks may differ in their number of batches, and may have none.
    """
    start, stop = (len(view) * r // world_size for r in (rank, rank + 1))

    def batches(fetch: Fetch) -> Iterator[Batch]:
        for first in range(start, stop, batch_size):
            images, labels = fetch(np.arange(first, min(first + batch_size, stop)))
            yield torch.from_numpy(images), torch.from_numpy(labels)

    return _run(view, batches)


Fetch = Callable[[IntArray], tuple[Pixels, IntArray]]


def _run(view: View, batches: Callable[[Fetch], Iterator[Batch]]) -> Generator[Batch, None, None]:
    """Inline when the pixels are at hand: a batch costs less than handing it from thread to thread."""
    if view.is_decoded:
        yield from batches(view.gather)
        return
    with ThreadPoolExecutor(THREADS) as threads, closing(_ahead(batches(lambda p: view.load(p, threads)))) as ready:
        yield from ready


def _ahead(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """`batches`, run up to AHEAD items ahead by one thread; an exception there is raised here. Closing it ends the thread."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
    closed = threading.Event()

    def run() -> None:
        last: BaseException | None = None
        try:
            for batch in batches:
                ready.put(batch)
                if closed.is_set():
                    return
        except BaseException as error:
            last = error
        ready.put(last)

    thread = threading.Thread(target=run, name="batches ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while not ready.empty():  # room for the one item that the thread may still have to put
            ready.get_nowait()
        thread.join()


def flipped(images: Pixels, flip: np.ndarray) -> Pixels:
    """`images` (n, C, H, W), those with flip[i] mirrored left to right, in place."""
    images[flip] = images[flip, ..., ::-1]
    return images


def shifted(images: Pixels, dx: IntArray, dy: IntArray, most: int) -> Pixels:
    """Image i of (n, C, H, W) moved dx[i] pixels right and dy[i] down, |dx|, |dy| <= most; what comes in is 0."""
    n, channels, height, width = images.shape
    framed = np.zeros((n, channels, height + 2 * most, width + 2 * most), dtype=np.uint8)
    framed[:, :, most : most + height, most : most + width] = images
    windows = sliding_window_view(framed, (height, width), axis=(2, 3))
    return windows[np.arange(n), :, most - dy, most - dx]
