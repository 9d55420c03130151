"""Images/s of the loader beside what people use, on the same shards of photographs, with the same crops, on this machine.

Every contender gives uint8 batches of 224x224 crops of every training sample: the same crops, but for timm and DALI, which
draw their own of the same distribution. Rounds are interleaved and the median of the ratios of a round is judged. The others
get the best of 1, 2 and 4 worker processes (DALI: threads), which live on between epochs. timm and DALI, which no part of
wrbench needs, lie in a folder of their own (peers.txt; `make bench-data` fills it).

    python -m tests.benchmarks.bench_data [--samples N] [--rounds N]
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader

from harness.data import bench, decode, fixture, loader, order, shards
from harness.vision import torchvision
from tests import report, tars

SIZE, BATCH, SHARD = 224, 64, 100
FOLDER = Path("build/bench-data")
CORES = len(os.sched_getaffinity(0))
LIMITS = {
    "libjpeg / webdataset + PIL + DataLoader": 2.5,
    "libjpeg / ImageFolder + PIL + DataLoader": 2.5,
    "libjpeg / timm WebDataset reader": 2.5,
    "libjpeg / DALI on the CPU": 1.3,
    "libjpeg / raw simplejpeg decode": 0.9,
}
"""the ratio must be above it"""
EXPECTED = {
    "simplejpeg / webdataset + PIL + DataLoader": 2.0,
    "simplejpeg / ImageFolder + PIL + DataLoader": 2.0,
    "simplejpeg / timm WebDataset reader": 2.0,
    "simplejpeg / DALI on the CPU": 1.05,
    "simplejpeg / raw simplejpeg decode": 0.65,
}
"""printed and not judged: what decodes where the extension is not built"""
PEERS = Path("build/peers")


@dataclass(frozen=True)
class Contender:
    name: str
    epoch: Callable[[], int]
    """one pass over the training samples; how many it gave"""

    def rate(self) -> float:
        start = time.perf_counter()
        return self.epoch() / (time.perf_counter() - start)


def build(samples: int) -> Path:
    """Shards, and the same training images as class folders."""
    folder = FOLDER / str(samples)
    if (folder / "index.npz").exists():
        return folder
    members: dict[str, list[tars.Sample]] = {"train": [], "val": []}
    for split, key, label, content in fixture.samples(samples * 5 // 4):
        members[split].append((key, {"jpg": content, "cls": str(label).encode()}))
        if split == "train":
            path = folder / "folders" / str(label) / f"{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for split, found in members.items():
        for start in range(0, len(found), SHARD):
            tars.write(folder / f"{split}-{start // SHARD:06d}.tar", found[start : start + SHARD])
    shards.index_shards(folder)
    return folder


class Crops:
    """The crops of epoch 0 by key, for contenders that come across the samples in their own order."""

    def __init__(self, folder: Path) -> None:
        data, index = bench.described(folder, SIZE)
        self.place = {index.key[number].decode(): position for position, number in enumerate(index.train(data))}
        self.words = order.crop_words(0, 0, np.arange(len(self.place)))

    def __call__(self, key: str, image: Image.Image) -> torch.Tensor:
        position = self.place[key]
        left, top, width, height = order.crop(
            self.words[position], image.height, image.width, bench.RECIPE.crop.scale, bench.RECIPE.crop.ratio
        )
        box = (left, top, left + width, top + height)
        resized = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        if order.augmentation(0, 0, len(self.place), 0).flip[position]:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def ours(folder: Path, decoder: str) -> Contender:
    data, index = bench.described(folder, SIZE)
    dataset = loader.DataSet(index, data, crops=True, threads=CORES)

    def epoch() -> int:
        decode.decoder = decoder
        return sum(len(images) for images, _ in dataset.train.read(bench.requests(len(dataset.train), BATCH, epochs=1)))

    return Contender(decoder, epoch)


def raw(folder: Path) -> Contender:
    """Every byte read before; whole images decoded by as many threads, and nothing else."""
    data, index = bench.described(folder, SIZE)
    reader = loader.Reader(index, data)
    contents = [reader.content(int(number)) for number in index.train(data)]

    def epoch() -> int:
        with ThreadPoolExecutor(CORES) as threads:
            return sum(1 for _ in threads.map(simplejpeg.decode_jpeg, contents))

    return Contender("raw simplejpeg decode", epoch)


class _Webdataset:
    """One sample of the webdataset library, decoded; at module level, so that workers can be started with it."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __call__(self, sample: dict[str, bytes]) -> tuple[torch.Tensor, int]:
        return self.crops(sample["__key__"], Image.open(io.BytesIO(sample["jpg"]))), int(sample["cls"])


def webdataset(folder: Path, workers: int) -> Contender:
    import webdataset as wds

    urls = sorted(map(str, folder.glob("train-*.tar")))
    samples = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(200).map(_Webdataset(Crops(folder)))
    batches = DataLoader(samples, BATCH, num_workers=workers, persistent_workers=True, prefetch_factor=4)
    return Contender(f"webdataset + PIL + DataLoader ({workers})", lambda: sum(len(images) for images, _ in batches))


class _Folder:
    def __init__(self, folder: Path, crops: Crops) -> None:
        torchvision()
        from torchvision.datasets import ImageFolder

        self.files, self.crops = ImageFolder(str(folder / "folders")).samples, crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[place]
        return self.crops(Path(path).stem, Image.open(path)), label


def image_folder(folder: Path, workers: int) -> Contender:
    files = _Folder(folder, Crops(folder))
    batches = DataLoader(files, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, prefetch_factor=4)
    return Contender(f"ImageFolder + PIL + DataLoader ({workers})", lambda: sum(len(images) for images, _ in batches))


def _trained(folder: Path) -> int:
    data, index = bench.described(folder, SIZE)
    return len(index.train(data))


def timm(folder: Path, workers: int) -> Contender:
    """As its train.py on WebDataset; the batches of its loader, before it makes them floats."""
    torchvision()
    from timm.data import create_dataset, create_loader

    count, shard_count = _trained(folder), len(list(folder.glob("train-*.tar")))
    files = create_dataset(
        "wds/photographs", root=str(folder), split=f"train-{{000000..{shard_count - 1:06d}}}.tar|{count}", is_training=True,
        batch_size=BATCH, sample_shuffle_size=200, sample_initial_size=100,
    )  # fmt: skip
    crop = bench.RECIPE.crop
    batches = create_loader(
        files, (3, SIZE, SIZE), BATCH, is_training=True, use_prefetcher=True, device=torch.device("cpu"), num_workers=workers,
        scale=crop.scale, ratio=crop.ratio, interpolation="bilinear", color_jitter=None, persistent_workers=True,
    ).loader  # fmt: skip
    return Contender(f"timm WebDataset reader ({workers})", lambda: sum(len(images) for images, _ in batches))


def dali(folder: Path, threads: int) -> Contender:
    """Decoding only the crop, as its documentation advises for a CPU; images (n, H, W, C), as decoders give them.

    It prefetches two batches between the rounds, which are its gain.
    """
    from nvidia.dali import fn, pipeline_def, types

    crop, count = bench.RECIPE.crop, _trained(folder)

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    def pipeline():  # type: ignore[no-untyped-def]
        paths = sorted(map(str, folder.glob("train-*.tar")))
        files, _ = fn.readers.webdataset(paths=paths, ext=["jpg", "cls"], random_shuffle=True, initial_fill=200, name="shards")
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=crop.scale, random_aspect_ratio=crop.ratio)
        images = fn.resize(images, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()

    def epoch() -> int:
        given = 0
        while given < count:
            (images,) = built.run()
            given += len(torch.from_numpy(images.as_array()))
        return given

    return Contender(f"DALI on the CPU ({threads})", epoch)


PEER = {"timm WebDataset reader": timm, "DALI on the CPU": dali}


def best(make: Callable[[Path, int], Contender], folder: Path) -> Contender:
    """With the number of workers that is fastest here, by a second epoch each: the first starts them."""
    found = [make(folder, workers) for workers in (1, 2, 4)]
    for contender in found:
        contender.epoch()
    return max(found, key=Contender.rate)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1000, help="to train on")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores are among those tried
    folder = build(options.samples)
    contenders = [ours(folder, name) for name in ("libjpeg", "simplejpeg") if name in decode.JPEG]
    contenders += [best(webdataset, folder), best(image_folder, folder), raw(folder)]
    sys.path.append(str(PEERS))  # last: what is in the environment comes first
    absent: dict[str, str] = {}
    for name, make in PEER.items():
        try:
            contenders.append(best(make, folder))
        except (ImportError, RuntimeError) as error:  # not installed, or not to be used here
            absent[name] = f"not measured: {' '.join(str(error).split())[:300]}"
    for contender in contenders:
        contender.epoch()
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(options.rounds):
        for contender in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
            rates[contender.name].append(contender.rate())
    rows = [report.row(f"{name}, images/s", statistics.median(found), None, f"{CORES} cores") for name, found in rates.items()]
    for own in ("libjpeg", "simplejpeg"):
        for name in rates:
            if name in ("libjpeg", "simplejpeg"):
                continue
            title = f"{own} / {name.split(' (')[0]}"
            if own not in rates:
                rows.append(report.refused(title, "the extension is not built here"))
                continue
            ratios = [a / b for a, b in zip(rates[own], rates[name], strict=True)]
            ratio, limit = statistics.median(ratios), LIMITS.get(title)
            told = report.spread(ratios) + (f"; expected {EXPECTED[title]}" if title in EXPECTED else "")
            rows.append(report.Row(title, ratio, limit, limit is None or ratio > limit, told, exceeds=True))
    rows += [report.refused(name, why) for name, why in absent.items()]
    if not any(row.limit for row in rows):
        rows.append(report.failed("goals", "none was judged: the extension is not built"))
    return report.publish("bench-data", rows)


if __name__ == "__main__":
    sys.exit(main())
