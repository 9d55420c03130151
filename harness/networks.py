"""The residual networks of the paper and of ImageNet32's, for images of 32x32 (any multiple of 4 will do)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.draws import ShakeShake
from harness.norm import Norm


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, which a norm after it takes out; zero padded; He's initial weights, by the fan out as in the released codes."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _head(inputs: int, classes: int) -> nn.Sequential:
    linear = nn.Linear(inputs, classes)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


class _WideBlock(nn.Module):
    """BN-ReLU-conv twice, beside the identity, or a 1x1 convolution of the first activation where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), _conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = norm(outputs), _conv(outputs, outputs, 3)
        self.skip = None if inputs == outputs and stride == 1 else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + (x if self.skip is None else self.skip(active))


def wide_resnet(channels: int, classes: int, norm: Norm) -> nn.Sequential:
    """WRN-28-10 (arXiv 1605.07146), without dropout: 36.5M parameters with ten classes."""
    blocks, widths = 4, [16, 160, 320, 640]
    layers: list[nn.Module] = [_conv(channels, 16, 3)]
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        for block in range(blocks):
            layers.append(_WideBlock(outputs if block else inputs, outputs, 2 if stage and not block else 1, norm))
    return nn.Sequential(*layers, norm(widths[-1]), nn.ReLU(), _head(widths[-1], classes))


class _Branch(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__(
            nn.ReLU(), _conv(inputs, outputs, 3, stride), norm(outputs), nn.ReLU(), _conv(outputs, outputs, 3), norm(outputs)
        )  # fmt: skip


class _Shortcut(nn.Module):
    """Where the shape changes: every stride-th pixel and its neighbour to the left above, by a 1x1 convolution each, side by side.

    The second path sees the picture moved by a pixel to the right and down, as in the released code.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.stride = stride
        self.here, self.beside = _conv(inputs, outputs // 2, 1), _conv(inputs, outputs - outputs // 2, 1)
        self.norm = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (1, -1, 1, -1))
        halves = [self.here(x[..., :: self.stride, :: self.stride]), self.beside(shifted[..., :: self.stride, :: self.stride])]
        out: Tensor = self.norm(torch.cat(halves, dim=1))
        return out


class _ShakeBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.branch1, self.branch2 = _Branch(inputs, outputs, stride, norm), _Branch(inputs, outputs, stride, norm)
        self.shake = ShakeShake()
        self.skip = nn.Identity() if inputs == outputs else _Shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.skip(x) + self.shake(self.branch1(x), self.branch2(x))
        return out


def shake_shake(channels: int, classes: int, norm: Norm, width: int) -> nn.Sequential:
    """Shake-Shake-Image 26 2 x `width`d (arXiv 1705.07485), the networks of the paper."""
    blocks, widths = 4, [16, width, 2 * width, 4 * width]
    layers: list[nn.Module] = [_conv(channels, 16, 3), norm(16)]
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        for block in range(blocks):
            layers.append(_ShakeBlock(outputs if block else inputs, outputs, 2 if stage and not block else 1, norm))
    return nn.Sequential(*layers, nn.ReLU(), _head(widths[-1], classes))
