"""Small WebDataset tars for tests, written with the standard library: what other people's shards look like."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, CLASSES, TRAIN, HOLDOUT, VAL, BATCH = 8, 4, 128, 20, 25, 24
DATA = {
    "name": "small", "num_classes": CLASSES, "image_size": SIZE, "channels": 1, "train_samples": TRAIN, "holdout_per_class": HOLDOUT // CLASSES,
    "val_samples": VAL, "mean": [0.5], "std": [0.3],
}  # fmt: skip
"""of a workload over the shards of `small`, but its path"""

Sample = tuple[str, dict[str, bytes]]


def png(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def write(path: Path, samples: Iterable[Sample], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def digits(prefix: str, count: int, seed: int) -> list[Sample]:
    """`count` distinct random grey images, classes in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)
    return [(f"{prefix}{i:03d}", {"png": png(image), "cls": str(i % CLASSES).encode()}) for i, image in enumerate(images)]


def small(folder: Path) -> Path:
    """128 train samples in two shards and 25 val samples in one; no index."""
    train = digits("t", TRAIN, 1)
    write(folder / "train-000000.tar", train[:64])
    write(folder / "train-000001.tar", train[64:])
    write(folder / "val-000000.tar", digits("v", VAL, 2))
    return folder


def few(mnist5k: Path, out: Path) -> Path:
    """800 training and 200 validation digits of the 5,000, indexed, for tests that run many trials."""
    from harness.data import shards

    out.mkdir(parents=True)
    for split, samples in (("train", 800), ("val", 200)):
        with (
            tarfile.open(out / f"{split}-000000.tar", "w") as target,
            tarfile.open(next(iter(sorted(mnist5k.glob(f"{split}-*.tar"))))) as source,
        ):
            for info in source.getmembers()[: 3 * samples]:
                target.addfile(info, source.extractfile(info))
    shards.index_shards(out)
    return out


def member(shard: Path, name: str) -> tuple[int, bytes]:
    """(offset, content) of a member."""
    with tarfile.open(shard) as tar:
        info = tar.getmember(name)
        content = tar.extractfile(info)
        assert content is not None
        return info.offset_data, content.read()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def replace(shard: Path, key: str, **members: bytes) -> None:
    """Rewrites a shard with other members in one sample."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for info in tar:
            content = tar.extractfile(info)
            assert content is not None
            name, extension = info.name.split(".", 1)
            found.setdefault(name, {})[extension] = content.read()
    found[key] |= members
    write(shard, found.items())
