"""Image bytes -> pixels, the whole image or one box of it, by the fastest decoder that is here.

    libjpeg     this package's own extension: decodes the box alone
    simplejpeg  decodes the whole image, and the box is cut out
    PIL         the same, slower; notices truncation but no other damage; also reads what the others do not, see `crop`

All give the same pixels. libjpeg and simplejpeg take a warning of libjpeg for an error: what follows one is invented.
libjpeg sees only what it decodes: damage below the box is not found. A sample's crc32 is, and `shards verify` decodes it all.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

try:
    from harness.data import _jpeg  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # not built here, or built for another machine
    _jpeg = None
try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]
Channels = Literal[1, 3]

MOST_PIXELS = 2 * (1 << 30) // 12
"""of an image; what a header claims beyond it is damage, or meant to fill the memory (PIL draws the same line)"""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Scratch:
    """Memory that grows to the largest image and is used again: fresh pages for each would cost more than a small box."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def pixels(self, height: int, width: int, channels: int) -> Pixels:
        """Uninitialised, (height, width, channels); takes the place of what was given out before."""
        size = height * width * channels
        if len(self._memory) < size:
            self._memory = np.empty(size, dtype=np.uint8)
        return self._memory[:size].reshape(height, width, channels)


def decode(content: bytes, channels: Channels) -> Pixels:
    """Grey (1) or RGB (3) pixels, shape (channels, height, width); ValueError with the reason when it cannot be done."""
    return np.ascontiguousarray(crop(content, channels, whole, Scratch()).transpose(2, 0, 1))


def whole(height: int, width: int) -> Box:
    return Box(0, 0, width, height)


def crop(content: bytes, channels: Channels, choose: Callable[[int, int], Box], scratch: Scratch) -> Pixels:
    """Grey (1) or RGB (3) pixels, shape (height, width, channels), of the box that `choose` gives for (height, width).

    They may lie in `scratch`. By the bytes and not by the name: ImageNet has a PNG that is named .JPEG. Four-colour JPEG is
    read as PIL reads it (inverted, as Adobe writes it), 16-bit grey by its high byte, and transparency is ignored, whatever
    the decoder. ValueError with the reason when it cannot be done.
    """
    try:
        match kind(content):
            case "jpeg":
                height, width, components = JPEG[decoder].header(content)
                box = choose(*_possible(height, width))
                read = JPEG[decoder].crop if components in (1, 3) else _pil_crop
                return read(content, channels, (height, width), box, scratch)
            case "png":
                with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                    left, top, width, height = choose(*_possible(image.height, image.width))
                    return _png(image, channels)[top : top + height, left : left + width]
            case unknown:
                raise ValueError(f"{unknown} image format")
    except UnidentifiedImageError:  # its message is an address in memory
        raise ValueError(f"damaged {kind(content).upper()} header") from None
    except Exception as error:  # decoders fail in any way on damaged bytes, struct.error and SyntaxError included
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def size(content: bytes) -> tuple[int, int]:
    """(height, width) of an image, by its header; ValueError where it has none."""
    if kind(content) == "jpeg":
        height, width, _ = JPEG[decoder].header(content)
        return height, width
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            return image.height, image.width
    except Exception as error:  # as in `crop`
        raise ValueError(str(error)) from None


def kind(content: bytes) -> Literal["jpeg", "png", "unknown"]:
    """By the first bytes, not by the name: ImageNet has a PNG that is named .JPEG."""
    if content.startswith(b"\xff\xd8"):
        return "jpeg"
    return "png" if content.startswith(b"\x89PNG\r\n\x1a\n") else "unknown"


def _possible(height: int, width: int) -> tuple[int, int]:
    if height * width > MOST_PIXELS:
        raise ValueError(f"{height}x{width} pixels are more than {MOST_PIXELS}")
    return height, width


def _png(image: Image.Image, channels: Channels) -> Pixels:
    """(height, width, channels)"""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], channels, axis=2)
    return np.array(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


# ------------------------------------------------------------------------------------------------------- JPEG


class Decoder(NamedTuple):
    header: Callable[[bytes], tuple[int, int, int]]
    """content -> (height, width, components)"""
    crop: Callable[[bytes, Channels, tuple[int, int], Box, Scratch], Pixels]
    """content, channels, (height, width) of the image, box, scratch -> (height, width, channels) of the box"""


def _libjpeg_crop(content: bytes, channels: Channels, size: tuple[int, int], box: Box, scratch: Scratch) -> Pixels:
    pixels = scratch.pixels(box.height, box.width, channels)
    _jpeg.decode(content, pixels, channels, box)
    return pixels


def _simplejpeg_header(content: bytes) -> tuple[int, int, int]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    return height, width, {"Gray": 1, "CMYK": 4, "YCCK": 4}.get(colours, 3)


def _simplejpeg_crop(content: bytes, channels: Channels, size: tuple[int, int], box: Box, scratch: Scratch) -> Pixels:
    colours = "GRAY" if channels == 1 else "RGB"
    pixels = simplejpeg.decode_jpeg(content, colours, buffer=scratch.pixels(*size, channels))
    return _cut(pixels.reshape(*size, channels), box)


def _pil_header(content: bytes) -> tuple[int, int, int]:
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return image.height, image.width, len(image.getbands())


def _pil_crop(content: bytes, channels: Channels, size: tuple[int, int], box: Box, scratch: Scratch) -> Pixels:
    mode = "L" if channels == 1 else "RGB"
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        image.draft(mode, None)  # grey as the decoder has it, not from rounded colours
        return _cut(np.array(image.convert(mode)).reshape(*size, channels), box)


def _cut(pixels: Pixels, box: Box) -> Pixels:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


JPEG: dict[str, Decoder] = {}
"""the decoders that are here, best first"""
if _jpeg is not None:
    JPEG["libjpeg"] = Decoder(_jpeg.header, _libjpeg_crop)
if simplejpeg is not None:
    JPEG["simplejpeg"] = Decoder(_simplejpeg_header, _simplejpeg_crop)
JPEG["PIL"] = Decoder(_pil_header, _pil_crop)
decoder = next(iter(JPEG))
"""in use"""
