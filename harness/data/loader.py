"""Batches of a trial: uint8 images and labels, in the exact order that `order` gives.

A small data set whose training images are not cropped anew is read, checked and decoded once at start, and a batch is then
two gathers. Else a few threads read, decode and resize each sample straight into its place in the batch, some batches ahead
(file, decoder and resize release the GIL). Where a recipe's `augment` runs Python for every image, processes
do it instead (harness.data.workers). Pixels stay uint8 all the way: they are mixed and normalised on the device.
"""

from __future__ import annotations

import math
import os
import resource
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from harness import schedule
from harness.config import Crop, Data, RandAugment, Recipe, TestSet, Trial, TrivialAugment
from harness.data import decode, order, workers
from harness.data.decode import Box, Pixels
from harness.data.index import CorruptSample, Index, IntArray, checked
from harness.data.parallel import cores
from harness.data.remote import Unreachable, reader
from harness.data.resize import centre, resize, shorter_side
from harness.vision import torchvision

Batch = tuple[torch.Tensor, torch.Tensor]
"""images, uint8 (n, channels, height, width), and labels, int64 (n,); in pinned memory where there is CUDA"""
Choose = Callable[[int, int], Box]
"""(height, width) of an image -> the box of it that is seen"""

PLAIN = Recipe()
DECODED_BYTES = 1 << 30
"""a data set of at most so many bytes of pixels is decoded at start and kept"""
SUBSTITUTED_SHARE = 0.01
"""of the samples trained on; beyond it the data are broken, not blemished"""
OPEN_FILES = 1024
"""beside those of shards"""
TOGETHER_BYTES = 1 << 18
"""pixels of small batches that are put together at once: a call of numpy costs more than a digit's copy"""
MISLABELLED = 6
"""first word of the seeds that choose wrong labels, so that they share no stream with another choice"""
AHEAD = 4
"""batches that may be ready before they are asked for"""
PART = 8
"""samples at most that a thread takes at once"""


@dataclass(frozen=True)
class Substitution:
    """A corrupt training sample, and the one that is used in its place."""

    number: int
    substitute: int
    reason: str
    """names shard and key"""


class DataSet:
    """The views of one data set: `train` (what is trained on), `holdout` (what is decided on), `val` (what is reported), and
    `test`, of the index of a further set, where there is one.

    `substituted` lists the corrupt training samples found so far, by number: all of them from the start when the data are
    decoded at start, else those that this process came across.
    """

    def __init__(self, index: Index, data: Data, crops: bool, threads: int, test: Index | None = None, label_noise: float = 0.0) -> None:
        self.index, self._test = index, test
        self.threads = threads
        reader = Reader(index, data)
        trained = index.train(data)
        self.substitutes = Substitutes(reader, trained)
        load: Load = self.substitutes if data.on_corrupt == "substitute" else reader
        self.shape = (data.channels, data.image_size, data.image_size)
        """of one training image in a batch, the largest where a recipe's resolution lets them grow"""
        self._evaluated = (data.channels, data.evaluated_size, data.evaluated_size)
        labelled = Mislabelled(load, data.num_classes, label_noise) if label_noise else load
        self.train = View(trained, labelled, self.shape, threads)
        evaluated = partial(View, shape=self._evaluated, threads=threads)
        self.holdout = evaluated(index.holdout(data), reader)
        self.val = evaluated(index.val(), reader)
        self.test = evaluated(test.val(), Reader(test, data)) if test is not None else None
        views = [view for view in (self.train, self.holdout, self.val, self.test) if view is not None]
        if sum(view.pixel_bytes for view in views) <= DECODED_BYTES:
            for view in views[1:] if crops else views:
                view.decode()

    def sha256(self) -> dict[str, str]:
        """{data_sha256, and where there is a test set test_sha256}: the identities of the samples and of their order."""
        return {"data_sha256": self.index.sha256} | ({"test_sha256": self._test.sha256} if self._test is not None else {})

    @property
    def substituted(self) -> list[Substitution]:
        return sorted(self.substitutes.made.values(), key=lambda s: s.number)

    def train_eval(self, samples: int) -> View:
        """The clean training subset behind train_eval/loss: the first of the trained ones in the holdout order.

        A function of the data alone, not of seed or arm. All of `train` when it has fewer.
        """
        ranks = self.index.holdout_rank[self.train.numbers]
        return self.train.part(np.sort(np.argsort(ranks, kind="stable")[:samples]), self._evaluated)


def threads_of_a_rank() -> int:
    """As many as it has cores, at most 16: what SLURM gave it, else all that it is bound to, else its part of the node's."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if cores() == os.cpu_count() else 1
    given = int(os.environ.get("SLURM_CPUS_PER_TASK", cores()))  # without task/affinity every rank of a step may use all of its cores
    return max(1, min(16, cores() // ranks, given))


def _may_be_open(shards: int) -> int:
    """How many files of shards may be open at once: all, if the limit on open files can be raised that far."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = shards + OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, shards + OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return min(shards, max(128, allowed - OPEN_FILES)) or 1


def open_data(data: Data, recipe: Recipe = PLAIN, threads: int | None = None, test: TestSet | None = None) -> DataSet:
    """Index and shards of `data`, and of a further `test` set, checked; decoded too when they fit in memory.

    recipe: where training sees other parts of its images every epoch, or other colours, these are not decoded at start; its
    label_noise is also behind train_eval/loss. threads: that read, 0 for the caller's own, default threads_of_a_rank();
    batches do not depend on it.

    Raises BadInput, a line a mistake: no index, missing or truncated shards, other counts or classes than `data` says.
    Raises CorruptSample, naming shard and key: a sample whose crc32 is wrong, that does not decode, whose size is not
    image_size where nothing is resized, or whose label is outside the classes. With on_corrupt: substitute another sample
    takes its place *in training*, up to 1 % of the samples trained on. In holdout, val and test nothing is ever substituted:
    every reported sample is counted exactly once.
    """
    index, further = checked(data, test)
    crops = recipe.crop is not None or recipe.augment is not None
    return DataSet(index, data, crops, threads_of_a_rank() if threads is None else threads, further, recipe.label_noise)


# ------------------------------------------------------------------------------------------- reading samples


Load = Callable[[int, torch.Tensor, Choose | None], int]
"""(number, out (1, channels, size, size) uint8, box or None: as in evaluation) -> label; the image is then in `out`, of its size"""


@dataclass(frozen=True)
class Mislabelled:
    """Reads as `load` does, but a share of the samples has another class than theirs: a function of the sample's number alone."""

    load: Load
    num_classes: int
    share: float

    def __call__(self, number: int, out: torch.Tensor, choose: Choose | None = None) -> int:
        label = self.load(number, out, choose)
        rng = np.random.default_rng([MISLABELLED, number])
        return (label + int(rng.integers(1, self.num_classes))) % self.num_classes if rng.random() < self.share else label


class Reader:
    """Reads single samples; safe in several threads. Never substitutes. Raises CorruptSample."""

    def __init__(self, index: Index, data: Data) -> None:
        self.index, self._data = index, data
        # a file object is closed when the last user lets go of it
        self._open = lru_cache(maxsize=_may_be_open(len(index.shards)))(lambda shard: reader(index.folder / index.shards[shard].name))
        self._scratch = threading.local()

    def __reduce__(self) -> tuple[type[Reader], tuple[Index, Data]]:
        return Reader, (self.index, self._data)

    def __call__(self, number: int, out: torch.Tensor, choose: Choose | None = None) -> int:
        """The label; the image, resized, in `out`: its box, or without one all of it as evaluation sees it."""
        index, data = self.index, self._data
        label = int(index.label[number])
        if not 0 <= label < data.num_classes:
            raise CorruptSample(index.label_fault(number, data.num_classes))
        pixels = self.pixels(number, self.content(number), choose or decode.whole)
        if choose is not None:
            resize(pixels, out)
        else:
            self._whole(number, pixels, out)
        return label

    def content(self, number: int) -> bytes:
        """The bytes of the image, those that were indexed."""
        index = self.index
        try:
            content = self._open(int(index.shard[number])).read(int(index.offset[number]), int(index.size[number]))
        except Unreachable:  # is no fault of the sample, which nothing may replace
            raise
        except OSError as error:  # nor is this: another node, or a moment later, may well read it
            raise Unreachable(f"{index.where(number)}: cannot be read: {error.strerror or error}") from None
        if zlib.crc32(content) != index.crc32[number]:
            raise CorruptSample(f"{index.where(number)}: its bytes are not the indexed ones (crc32); restore the shard")
        return content

    def pixels(self, number: int, content: bytes, choose: Choose) -> Pixels:
        """(height, width, channels) of the chosen box, until this thread's next call."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = decode.Scratch()
        try:
            return decode.crop(content, self._data.channels, choose, self._scratch.memory)
        except ValueError as error:
            raise CorruptSample(f"{self.index.where(number)}: does not decode: {error}; see: wrbench shards verify") from None

    def _whole(self, number: int, pixels: Pixels, out: torch.Tensor) -> None:
        size, (height, width, channels) = out.shape[-1], pixels.shape
        if self._data.resize is not None:
            height, width = shorter_side(height, width, self._data.resize)
            resized = torch.empty(1, height, width, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
            resize(pixels, resized)
            left, top, _, _ = centre(height, width, size)
            out.copy_(resized[..., top : top + size, left : left + size])
        elif (height, width) == (size, size):
            resize(pixels, out)
        else:
            raise CorruptSample(
                f"{self.index.where(number)}: is {height}x{width}, workload.data.image_size is {size}; to resize images set "
                f"workload.data.resize, e.g. {size * 8 // 7}"
            )


class Substitutes:
    """Reads training samples; the next good one in the order of the index stands in for a corrupt one, in its crop and place."""

    def __init__(self, read: Reader, trained: IntArray) -> None:
        self._read, self._trained = read, trained
        self.made: dict[int, Substitution] = {}

    def __call__(self, number: int, out: torch.Tensor, choose: Choose | None = None) -> int:
        try:
            return self._read(number, out, choose)
        except CorruptSample as fault:
            reason = str(fault)
        place = int(np.searchsorted(self._trained, number))
        for step in range(1, len(self._trained)):
            substitute = int(self._trained[(place + step) % len(self._trained)])
            try:
                label = self._read(substitute, out, choose)
            except CorruptSample:
                continue
            self.note([Substitution(number, substitute, reason)])
            return label
        raise CorruptSample(f"{reason} (and no training sample is left to take its place)")

    def note(self, made: Iterable[Substitution]) -> None:
        """Raises CorruptSample for one too many."""
        for one in made:
            self.made[one.number] = one
            if len(self.made) > SUBSTITUTED_SHARE * len(self._trained):
                raise CorruptSample(
                    f"{one.reason} (with this one {len(self.made)} of {len(self._trained)} training samples are corrupt: "
                    f"over the limit of {SUBSTITUTED_SHARE:.0%} for on_corrupt: substitute)"
                )


class View:
    """Some samples of a data set, at positions 0..len-1."""

    def __init__(self, numbers: IntArray, load: Load, shape: tuple[int, int, int], threads: int) -> None:
        self.numbers = numbers
        """their numbers in the index, ascending"""
        self._load, self._shape, self.threads = load, shape, threads
        self._decoded: tuple[Pixels, IntArray] | None = None

    def __reduce__(self) -> tuple[type[View], tuple[IntArray, Load, tuple[int, int, int], int]]:
        return View, (self.numbers, self._load, self._shape, 0)  # for a worker process, which has no threads and reads anew

    def __len__(self) -> int:
        return len(self.numbers)

    def decode(self) -> None:
        """Read every sample now and keep the pixels."""
        images = np.empty((len(self), *self._shape), dtype=np.uint8)
        labels = np.empty(len(self), dtype=np.int64)

        def block(start: int) -> None:
            part = np.arange(start, min(start + 64, len(self)))
            self.fill(part, torch.from_numpy(images)[part[0] :], torch.from_numpy(labels)[part[0] :], None, [None] * len(part))

        with ThreadPoolExecutor(max(1, self.threads)) as threads:
            list(threads.map(block, range(0, len(self), 64)))
        self._decoded = images, labels

    @property
    def pixel_bytes(self) -> int:
        """Of all its images, decoded."""
        return len(self) * math.prod(self._shape)

    def part(self, positions: IntArray, shape: tuple[int, int, int]) -> View:
        """The samples at `positions`, as images of `shape`."""
        view = View(self.numbers[positions], self._load, shape, self.threads)
        if self._decoded is not None and shape == self._shape:
            images, labels = self._decoded
            view._decoded = images[positions], labels[positions]
        return view

    @property
    def is_decoded(self) -> bool:
        return self._decoded is not None

    def gather(self, positions: IntArray) -> Batch:
        """Copies of decoded images and labels."""
        assert self._decoded is not None
        images, labels = self._decoded
        return torch.from_numpy(images[positions]), torch.from_numpy(labels[positions])

    def read(self, requests: Iterator[Request]) -> Generator[Batch, None, None]:
        """A batch for each request, read by threads that stay up to AHEAD batches ahead. Closing it ends them.

        The batches are channels_last in memory, which is how decoders give pixels and where resizing is fastest.
        """
        pinned = torch.cuda.is_available()
        if not self.threads:
            for request in requests:
                batch = self.empty(request, pinned)
                self.fill(request.positions, *batch, request.augment, request.choices())
                yield batch
            return
        threads = ThreadPoolExecutor(self.threads)
        running: deque[tuple[Batch, list[Future[None]]]] = deque()
        try:
            for request in requests:
                n = len(request.positions)
                images, labels = self.empty(request, pinned)
                step = max(1, min(PART, n // (2 * self.threads)))
                parts = [slice(start, start + step) for start in range(0, n, step)]
                choices = request.choices()
                run = [threads.submit(self.fill, request.positions[p], images[p], labels[p], request.augment, choices[p]) for p in parts]
                running.append(((images, labels), run))
                if len(running) > AHEAD:
                    yield _finished(*running.popleft())
            while running:
                yield _finished(*running.popleft())
        finally:
            threads.shutdown(cancel_futures=True)

    def empty(self, request: Request, pinned: bool) -> Batch:
        """Uninitialised, of the request's size. Both allocators reuse the memory of batches that are gone; pinned memory only once no
        copy reads it."""
        n, (channels, own, _) = len(request.positions), self._shape
        size = request.size or own
        images = torch.empty(n, size, size, channels, dtype=torch.uint8, pin_memory=pinned).permute(0, 3, 1, 2)
        return images, torch.empty(n, dtype=torch.int64, pin_memory=pinned)

    def fill(
        self, positions: IntArray, images: torch.Tensor, labels: torch.Tensor, augment: Augment | None, choices: Sequence[Choose | None]
    ) -> None:
        """The samples at `positions` into the first places of `images` and `labels`; choices: of each, the box, as in `Load`."""
        images, numbers = images[: len(positions)], self.numbers[positions].tolist()
        found = [self._load(*each) for each in zip(numbers, images.split(1), choices, strict=True)]
        labels[: len(found)] = torch.tensor(found)
        if augment is not None:
            augment.move(images, positions)


def _finished(batch: Batch, parts: list[Future[None]]) -> Batch:
    for part in parts:
        part.result()
    return batch


# --------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Augment:
    """What training does to its images on the CPU in one epoch, by position."""

    recipe: Recipe
    seed: int
    epoch: int
    samples: int

    def move(self, images: torch.Tensor, positions: IntArray) -> None:
        """Flip and shift `images` (n, C, H, W), and the recipe's operations on them, in place."""
        recipe = self.recipe
        draws = order.augmentation(self.seed, self.epoch, self.samples, recipe.translate)
        if recipe.flip:
            for image, flip in zip(images.split(1), draws.flip[positions].tolist(), strict=True):
                if flip:
                    image.copy_(image.flip(-1))
        if recipe.translate:
            dx, dy = draws.dx[positions], draws.dy[positions]
            images.copy_(torch.from_numpy(shifted(images.numpy(), dx, dy, recipe.translate, recipe.border)))
        if recipe.augment is not None:
            apply = _operations(recipe.augment)
            for i, position in enumerate(positions.tolist()):
                with torch.random.fork_rng(devices=[]):  # it is torch's own generator of the CPU that they draw from
                    torch.default_generator.manual_seed(order.ops_seed(self.seed, self.epoch, position))
                    images[i] = apply(images[i].contiguous())


@lru_cache(maxsize=2)
def _operations(augment: RandAugment | TrivialAugment) -> Callable[[torch.Tensor], torch.Tensor]:
    torchvision()
    from torchvision.transforms import v2

    drawn: torch.nn.Module = (
        v2.RandAugment(augment.num_ops, augment.magnitude) if augment.name == "randaugment" else v2.TrivialAugmentWide()
    )
    return drawn


@dataclass(frozen=True)
class Request:
    """What a batch is made of."""

    positions: IntArray
    augment: Augment | None = None
    size: int | None = None
    """height and width of its images, pixels; None: the view's own"""

    def choices(self) -> list[Choose | None]:
        """Of each position the random box, where the recipe has one; drawn at once, which takes a fifth of the time of one by one."""
        augment, crop = self.augment, self.augment.recipe.crop if self.augment else None
        if augment is None or crop is None:
            return [None] * len(self.positions)
        words = order.crop_words(augment.seed, augment.epoch, self.positions)
        return [partial(_box, own, crop) for own in words]


def _box(words: npt.NDArray[np.uint64], crop: Crop, height: int, width: int) -> Box:
    return Box(*order.crop(words, height, width, crop.scale, crop.ratio))


def works_on_each(recipe: Recipe) -> bool:
    """Python does, on each image: threads would only take turns, so processes read."""
    return recipe.augment is not None


def train_batches(
    dataset: DataSet, trial: Trial, rank: int, world_size: int, start_step: int, stop_step: int
) -> Generator[Batch, None, None]:
    """This rank's part of the global batch of every step in [start_step, stop_step), augmented.

    Part r of R is the r-th of R contiguous parts, so the parts by rank are the global batch, whatever R is. Close it, or let
    go of it, to end what runs ahead. CorruptSample where a sample that was not decoded at start fails.
    """
    view, recipe, batch = dataset.train, trial.workload.recipe, trial.budget.global_batch_size
    per_epoch, size = schedule.steps_per_epoch(trial), batch // world_size
    windowed = order.Windowed(recipe.shuffle.block, recipe.shuffle.blocks) if recipe.shuffle else None
    at_hand = view.is_decoded and recipe.crop is None and recipe.augment is None
    together = max(1, TOGETHER_BYTES // (size * math.prod(dataset.shape))) if at_hand else 1

    def requests() -> Iterator[Request]:
        step = start_step
        while step < stop_step:
            steps = range(step, min(step + together, stop_step, (step // per_epoch + 1) * per_epoch))
            drawn = (order.batch_positions(trial.seed, s, per_epoch, batch, len(view), windowed) for s in steps)
            positions = np.concatenate([order.share(positions, rank, world_size) for positions in drawn])
            augment = Augment(recipe, trial.seed, step // per_epoch, len(view))
            yield Request(positions, augment, schedule.image_size(trial, step))  # steps taken together are of one epoch
            step = steps.stop

    if works_on_each(recipe) and view.threads:
        workers.check_memory(size * math.prod(dataset.shape), view.threads)
        yield from workers.read(view, dataset.substitutes, requests())
        return
    if not at_hand:
        yield from view.read(requests())
        return
    for request in requests():  # inline: a batch costs less than handing it from thread to thread
        images, labels = view.gather(request.positions)
        assert request.augment is not None
        request.augment.move(images, request.positions)
        yield from zip(images.split(size), labels.split(size), strict=True)


def on_device(
    batches: Generator[Batch, None, None], device: torch.device, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Generator[Batch, None, None]:
    """The batches on the device, each copied on a stream of its own while the device still works on what came before.

    On CUDA the host is at most two steps ahead, so that no more than three batches lie there. waiting: entered for as long as a
    batch is not read yet; the wait for the device, which is training, is none of it.
    """

    def read() -> Batch | None:
        with waiting():
            return next(batches, None)

    with closing(batches):
        if device.type != "cuda":
            yield from iter(read, None)
            return
        copies = torch.cuda.Stream(device)
        steps: deque[torch.cuda.Event] = deque()
        for images, labels in iter(read, None):
            if len(steps) == 3:
                steps.popleft().synchronize()
            with torch.cuda.stream(copies):
                copied = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            now = torch.cuda.current_stream(device)
            now.wait_stream(copies)
            for tensor in copied:  # its memory is of the other stream, which may not use it again before this one is done with it
                tensor.record_stream(now)
            yield copied
            steps.append(torch.cuda.Event(blocking=True))  # without, waiting for it keeps a core busy that could read
            steps[-1].record()


def eval_batches(view: View, rank: int, world_size: int, batch_size: int) -> Generator[Batch, None, None]:
    """This rank's samples of a view in batches of at most `batch_size`: over all ranks each sample exactly once.

    Nothing is padded and nothing is collective; ranks may differ in their number of batches, and may have none.
    """
    start, stop = (len(view) * r // world_size for r in (rank, rank + 1))
    parts = (np.arange(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size))
    if view.is_decoded:
        yield from map(view.gather, parts)
    else:
        yield from view.read(Request(positions) for positions in parts)


def shifted(images: Pixels, dx: IntArray, dy: IntArray, most: int, border: Sequence[int] | None = None) -> Pixels:
    """Image i of (n, C, H, W) moved dx[i] pixels right and dy[i] down, |dx|, |dy| <= most; what comes in is `border`, (C,), or 0."""
    n, channels, height, width = images.shape
    framed = np.zeros((n, channels, height + 2 * most, width + 2 * most), dtype=np.uint8)
    if border is not None:
        framed[:] = np.array(border, dtype=np.uint8)[:, None, None]
    framed[:, :, most : most + height, most : most + width] = images
    windows = sliding_window_view(framed, (height, width), axis=(2, 3))
    return windows[np.arange(n), :, most - dy, most - dx]
