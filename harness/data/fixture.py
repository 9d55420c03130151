"""Images like ImageNet's, as many as are wanted, from the photographs that scikit-image and scikit-learn ship.

Each is a random part of a photograph, mirrored or not, scaled to one of ImageNet's usual sizes, with a little noise, as a
JPEG of its usual qualities: 500x375 and 110 kB in the mean, so that reading, decoding and resizing cost what ImageNet's do.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

SAMPLES = 1000
CLASSES = 10
SHAPES = ((500, 375), (500, 333), (375, 500), (500, 334), (500, 500), (640, 480))
"""(width, height), pixels, and how often each of them occurs"""
OFTEN = (0.55, 0.12, 0.15, 0.08, 0.05, 0.05)


class Sample(NamedTuple):
    split: str
    """train | val; every fifth is val"""
    key: str
    label: int
    content: bytes
    """JPEG, or what `ODD` says"""


def samples(count: int | None = None, seed: int = 0, odd: bool = False) -> Iterator[Sample]:
    """`count` samples (SAMPLES by default) of CLASSES classes, the same every time. odd: every tenth is one of ODD, in turn."""
    kinds = itertools.cycle(ODD.values())
    for number in range(SAMPLES if count is None else count):
        rng = np.random.default_rng([seed, number])
        image = _photograph(rng)
        content = next(kinds)(image) if odd and number % 10 == 3 else _jpeg(image, int(rng.integers(87, 99)), int(rng.integers(0, 2)) * 2)
        split = "val" if number % 5 == 4 else "train"
        yield Sample(split, f"{split}_{number:08d}", int(rng.integers(CLASSES)), content)


@cache
def _photographs() -> tuple[Image.Image, ...]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    own = [data.astronaut(), data.cat(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    return tuple(Image.fromarray(np.ascontiguousarray(pixels)) for pixels in (*own, *load_sample_images().images))


def _photograph(rng: np.random.Generator) -> Image.Image:
    whole = _photographs()[rng.integers(len(_photographs()))]
    width, height = SHAPES[rng.choice(len(SHAPES), p=OFTEN)]
    part = rng.uniform(0.6, 1) * min(whole.width / width, whole.height / height)
    w, h = int(part * width), int(part * height)
    left, top = int(rng.integers(0, whole.width - w + 1)), int(rng.integers(0, whole.height - h + 1))
    image = whole.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(3, 13)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _jpeg(image: Image.Image, quality: int = 90, subsampling: int = 2, **options: object) -> bytes:
    return _encoded(image, "JPEG", quality=quality, subsampling=subsampling, **options)


def _ycck(image: Image.Image) -> bytes:
    """Four colours inverted, the first three as YCbCr, as Adobe's programs write them."""
    c, m, y, k = image.convert("CMYK").split()
    c, m, y = (band.point([255 - v for v in range(256)]) for band in Image.merge("RGB", (c, m, y)).convert("YCbCr").split())
    content = bytearray(_encoded(Image.merge("CMYK", (c, m, y, k)), "JPEG", quality=95))  # PIL inverts all four
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


ODD: dict[str, Callable[[Image.Image], bytes]] = {
    "grey JPEG": lambda image: _encoded(image.convert("L"), "JPEG", quality=90),
    "CMYK JPEG": lambda image: _encoded(image.convert("CMYK"), "JPEG", quality=90),
    "YCCK JPEG": _ycck,
    "RGB JPEG": lambda image: _encoded(image, "JPEG", quality=90, keep_rgb=True),
    "progressive JPEG": lambda image: _jpeg(image, progressive=True),
    "JPEG with restarts": lambda image: _jpeg(image, 90, 1, restart_marker_blocks=7),
    "tiny JPEG": lambda image: _jpeg(image.resize((29, 17))),
    "large JPEG": lambda image: _jpeg(image.resize((2000, 1500))),
    "PNG": lambda image: _encoded(image.resize((250, 188)), "PNG"),
    "16-bit PNG": lambda image: _encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    "palette PNG": lambda image: _encoded(image.quantize(64), "PNG"),
    "transparent PNG": lambda image: _encoded(image.resize((125, 94)).convert("RGBA"), "PNG"),
}
"""what ImageNet, or another set, holds now and then; all of them are read"""
