"""Pixels of one size -> pixels of another, as PIL's antialiased bilinear filter to within a level, several times as fast."""

from __future__ import annotations

import torch

from harness.data.decode import Box, Pixels


def resize(pixels: Pixels, out: torch.Tensor) -> None:
    """`pixels` (height, width, C) resized into `out`, a uint8 tensor (1, C, height', width'); fastest where that is channels_last.

    What torch.nn.functional.interpolate computes; this operator behind it writes where it is told to.
    """
    image, size = torch.from_numpy(pixels.transpose(2, 0, 1)[None]), out.shape[2:]
    if pixels.shape[:2] == size:
        out.copy_(image)
    else:
        torch._C._nn._upsample_bilinear2d_aa(image, size, False, out=out)  # type: ignore[call-arg]


def shorter_side(height: int, width: int, to: int) -> tuple[int, int]:
    """(height, width) with the shorter side `to` and the same shape, as torchvision rounds it."""
    return (int(to * height / width), to) if width <= height else (to, int(to * width / height))


def centre(height: int, width: int, size: int) -> Box:
    """The central size x size of an image at least that large, as torchvision rounds it."""
    return Box(round((width - size) / 2), round((height - size) / 2), size, size)
