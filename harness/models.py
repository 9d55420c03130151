"""name -> nn.Module. A model takes uint8 images (N, C, H, W) and returns logits (N, num_classes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.config import Data, Model
from harness.vision import torchvision


class Normalised(nn.Module):
    """The network behind its input normalisation: batches travel as uint8 and become floats on the device."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        shape = (1, len(mean), 1, 1)
        self.register_buffer("scale", (1 / (255 * torch.tensor(std, dtype=torch.float64))).reshape(shape).float(), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).reshape(shape), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images.to(self.scale.dtype) * self.scale + self.shift)
        return out


def _mnist5k_cnn(data: Data) -> nn.Module:
    """Three 3x3 convolutions for 28x28 digits, 68k parameters.

    Group norm, and no bias before a norm: such a bias has no effect on the function but amplifies rounding to 1e-2
    relative under Adam, and batch norm would tie the result to the number of ranks.
    """

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs), nn.ReLU()]

    last = -(-data.image_size // 8)
    return nn.Sequential(
        *block(data.channels, 24, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        *block(24, 48, 2),
        *block(48, 96, 2),
        nn.Flatten(),
        nn.Linear(96 * last * last, data.num_classes),
    )


def _torchvision(name: str) -> Callable[[Data], nn.Module]:
    def build(data: Data) -> nn.Module:
        model: nn.Module = torchvision().models.get_model(name, weights=None, num_classes=data.num_classes)
        return model

    return build


BUILDERS: dict[str, Callable[[Data], nn.Module]] = {
    "mnist5k_cnn": _mnist5k_cnn,
    "mnist5k_cnn_bn": _mnist5k_cnn,
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
}


def build(model: Model, data: Data, seed: int, dtype: torch.dtype = torch.float32) -> Normalised:
    """The model with initial weights that are a function of `seed` alone.

    Built on the CPU in fp32 whatever the device and precision, so that all of them start from the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = BUILDERS[model.name](data)
    return Normalised(net, data.mean, data.std).to(dtype)
