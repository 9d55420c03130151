"""Image bytes -> pixels."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]


def decode(content: bytes, channels: Literal[1, 3]) -> Pixels:
    """Grey (1) or RGB (3) pixels, shape (channels, height, width); ValueError with the reason when it cannot be done."""
    try:
        match kind(content):
            case "jpeg":
                pixels = simplejpeg.decode_jpeg(content, colorspace="GRAY" if channels == 1 else "RGB")
            case "png":
                with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
            case unknown:
                raise ValueError(f"{unknown} image format")
    except UnidentifiedImageError:  # its message is an address in memory
        raise ValueError("damaged PNG header") from None
    except Exception as error:  # decoders fail in any way on damaged bytes, struct.error and SyntaxError included
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1))


def kind(content: bytes) -> Literal["jpeg", "png", "unknown"]:
    """By the first bytes, not by the name: ImageNet has a PNG that is named .JPEG."""
    if content.startswith(b"\xff\xd8"):
        return "jpeg"
    return "png" if content.startswith(b"\x89PNG\r\n\x1a\n") else "unknown"
