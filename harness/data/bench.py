"""How fast a set of shards becomes training batches on this machine, and where the time goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness.config import BadInput, Crop, Data, Recipe
from harness.data import decode, loader, order
from harness.data.index import Index
from harness.data.resize import resize

RECIPE = Recipe(crop=Crop(), flip=True)
STAGED = 400
"""samples whose stages are timed one by one"""


@dataclass(frozen=True)
class Speed:
    """Of one epoch or a part of one, of random resized crops; seconds are of the wall clock unless they say CPU."""

    samples: int
    kilobytes: float
    """a sample"""
    reading: float
    """seconds an image on one thread: pread and crc32"""
    decoding: float
    resizing: float
    threads: int
    images_per_second: float
    """by all threads"""
    cpu_seconds: float
    """an image, by all threads"""

    def lines(self, gpus: int, gpu_rate: float) -> Iterator[str]:
        """For people. gpu_rate: images/s that one GPU trains on."""
        staged = self.reading + self.decoding + self.resizing
        shares = (f"{name} {seconds / staged:.0%}" for name, seconds in vars(self).items() if name.endswith("ing"))
        yield f"{self.samples} samples of {self.kilobytes:.0f} kB, {decode.decoder} decodes, random crops, resized"
        yield f"one thread: {1 / staged:.0f} images/s: {', '.join(shares)}"
        yield f"{self.threads} thread(s): {self.images_per_second:.0f} images/s, {1000 * self.cpu_seconds:.2f} ms of CPU an image"
        cores, wanted = len(os.sched_getaffinity(0)), gpus * gpu_rate
        yield (
            f"{gpus} GPU(s) of {gpu_rate:g} images/s take {wanted:g} images/s: {wanted * self.cpu_seconds:.3g} cores like these, "
            f"or {wanted / cores:.0f} images/s a core from the {cores} here, which give {1 / self.cpu_seconds:.0f}"
        )


def measure(path: Path, image_size: int = 224, seconds: float = 10.0, threads: int | None = None) -> Speed:
    """Trains on nothing for about `seconds`. Raises BadInput as the loader does, CorruptSample included."""
    threads = loader.threads_of_a_rank() if threads is None else threads
    data, index = described(path, image_size)
    reader, dataset = loader.Reader(index, data), loader.DataSet(index, data, crops=True, threads=threads)
    out = torch.empty(1, image_size, image_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    positions = order.permutation(0, 0, len(dataset.train))
    augment = loader.Augment(RECIPE, 0, 0, len(dataset.train))
    spent, stop = np.zeros(3), time.perf_counter() + seconds / 2
    done = 0
    staged = loader.Request(positions[:STAGED], augment)
    for number, choose in zip(dataset.train.numbers[staged.positions].tolist(), staged.choices(), strict=True):
        times = [time.perf_counter()]
        content = reader.content(number)
        times.append(time.perf_counter())
        pixels = reader.pixels(number, content, choose or decode.whole)
        times.append(time.perf_counter())
        resize(pixels, out)
        times.append(time.perf_counter())
        spent += np.diff(times)
        done += 1
        if times[-1] > stop:
            break
    batches = dataset.train.read(requests(len(dataset.train), batch_size=64))
    next(batches)  # from here to the end as many are ready ahead
    start, cpu, images = time.perf_counter(), time.process_time(), 0
    for batch, _ in batches:
        images += len(batch)
        if time.perf_counter() - start > seconds / 2:
            break
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = float(index.size[dataset.train.numbers].mean()) / 1000
    reading, decoding, resizing = (spent / done).tolist()
    return Speed(len(dataset.train), size, reading, decoding, resizing, threads or 1, images / wall, cpu / images)


def requests(samples: int, batch_size: int, epochs: int | None = None) -> Iterator[loader.Request]:
    """The batches of `epochs` epochs, or without end; the last of each may be smaller."""
    epoch = 0
    while epoch != epochs:
        positions = order.permutation(0, epoch, samples)
        for start in range(0, samples, batch_size):
            yield loader.Request(positions[start : start + batch_size], loader.Augment(RECIPE, 0, epoch, samples))
        epoch += 1


def described(path: Path, image_size: int) -> tuple[Data, Index]:
    """What a workload would say of the shards at `path`."""
    index = Index.load(path)
    train, val = (sum(s.samples for s in index.shards if s.split == split) for split in ("train", "val"))
    if not train:
        raise BadInput(f"{path}: holds no training samples; give shards of the split that is trained on")
    data = Data(
        name="bench", path=path, num_classes=max(2, int(index.label.max()) + 1), image_size=image_size, resize=image_size * 8 // 7,
        train_samples=train, holdout_per_class=0, val_samples=max(1, val), mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    return data, index
