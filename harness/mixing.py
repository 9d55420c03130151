"""Mixup (arXiv 1710.09412, section 2) and CutMix (arXiv 1905.04899, section 3.1) of a batch, on its device.

The images 2i and 2i + 1 of a global batch are each other's partners. Their order is random already, so any fixed pairing
is a random one, and this one is the same whatever ranks and micro-batches the batch is split over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.data.order import Mixing


def images(own: Tensor, mixing: Mixing, dtype: torch.dtype) -> Tensor:
    """The mixed ones of uint8 images (n, C, H, W), n even: mixup's in `dtype`, still from 0 to 255, CutMix's uint8."""
    other = _partners(own)
    if mixing.box is None:
        return torch.lerp(other.to(dtype), own.to(dtype), mixing.share)
    left, top, width, height = mixing.box
    mixed = own.clone()
    place = (..., slice(top, top + height), slice(left, left + width))
    mixed[place] = other[place]
    return mixed


def cross_entropy(logits: Tensor, labels: Tensor, mixing: Mixing | None, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch, 0-d; of mixed images that of both labels, each weighed by its share of the image."""
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if mixing is None:
        return loss
    return mixing.share * loss + (1 - mixing.share) * F.cross_entropy(logits, _partners(labels), label_smoothing=smoothing)


def _partners(of: Tensor) -> Tensor:
    pairs: Tensor = of.unflatten(0, (-1, 2))
    return pairs.flip(1).flatten(0, 1)
