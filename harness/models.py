"""name -> nn.Module. A model takes uint8 images (N, C, H, W) and returns logits (N, num_classes) in its weights' dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import Data, Workload
from harness.draws import StochasticDepth
from harness.networks import shake_shake, wide_resnet
from harness.norm import BatchNorm, Norm
from harness.vision import torchvision

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}
"""{precision: dtype of weights and optimizer state}"""


class Normalised(nn.Module):
    """The network behind its input normalisation: batches travel as uint8 and become floats on the device.

    `autocast` runs training in bfloat16 over weights that stay as they are. It stands here and not in a backend, so that
    it means the same in all of them; DeepSpeed's own also reduces the gradients of convolutions and linear layers in
    bfloat16. Evaluation is always in full precision: what is reported is a property of the weights, not of the
    rounding, and its share of the time is small.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], autocast: bool = False) -> None:
        super().__init__()
        self.net = net
        self.autocast = autocast
        shape = (1, len(mean), 1, 1)
        self.register_buffer("scale", (1 / (255 * torch.tensor(std, dtype=torch.float64))).reshape(shape).float(), persistent=False)
        self.register_buffer("shift", (-torch.tensor(mean) / torch.tensor(std)).reshape(shape), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast and self.training):
            out: Tensor = self.net(images.to(self.scale.dtype) * self.scale + self.shift)
        return out.to(self.scale.dtype)


def _mnist5k_cnn(data: Data, norm: Norm, activation: type[nn.Module], pool: type[nn.Module]) -> nn.Module:
    """Three 3x3 convolutions for 28x28 digits, 68k parameters.

    No bias before a norm: it has no effect on the function, but its gradient is rounding alone, which Adam scales up to
    full steps: 6e-2 relative in the weights after 30 steps.
    """

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), activation()]

    last = -(-data.image_size // 8)
    return nn.Sequential(
        *block(data.channels, 24, 1),
        pool(2, ceil_mode=True),
        *block(24, 48, 2),
        *block(48, 96, 2),
        nn.Flatten(),
        nn.Linear(96 * last * last, data.num_classes),
    )


def _mnist5k_mlp(data: Data) -> nn.Module:
    """One hidden layer, 204k parameters at 28x28, a twentieth of the work: for studies of many hundred trials on a laptop."""
    pixels = data.channels * data.image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, data.num_classes))


def _smooth(data: Data, norm: Norm) -> nn.Module:
    """The same with batch norm and without kinks: the reference model of the equivalence table.

    A ReLU whose input lies within rounding of 0, or a tie in a maximum, turns a difference of 1e-7 into one of 1e-4 within
    a step: a wrong update could hide behind it.
    """
    return _mnist5k_cnn(data, norm, nn.SiLU, nn.AvgPool2d)


Builder = Callable[[Data, Norm], nn.Module]


def _torchvision(name: str, **options: Any) -> Builder:
    def build(data: Data, norm: Norm) -> nn.Module:
        model: nn.Module = torchvision().models.get_model(name, weights=None, num_classes=data.num_classes, norm_layer=norm, **options)
        return model

    return build


def _convnext_tiny(data: Data, _: Norm) -> nn.Module:
    """torchvision's, with stochastic depth that draws as harness.draws does. Its norms are layer norms."""
    model: nn.Module = torchvision().models.convnext_tiny(weights=None, num_classes=data.num_classes)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, torchvision().ops.StochasticDepth):
                setattr(module, child, StochasticDepth(float(layer.p)))
    return model


def _vit_s16(data: Data, _: Norm) -> nn.Module:
    """ViT-S/16 (arXiv 2012.12877, table 1) with a class token and learnt positions; images of a multiple of 16 pixels."""
    model: nn.Module = torchvision().models.VisionTransformer(
        image_size=data.image_size,
        patch_size=16,
        num_layers=12,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
        num_classes=data.num_classes,
    )
    return model


BUILDERS: dict[str, Builder] = {
    "mnist5k_cnn": lambda data, _: _mnist5k_cnn(data, partial(nn.GroupNorm, 4), nn.ReLU, nn.MaxPool2d),
    "mnist5k_mlp": lambda data, _: _mnist5k_mlp(data),
    "mnist5k_cnn_bn": _smooth,
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnet50_zero_init": _torchvision("resnet50", zero_init_residual=True),
    "regnet_y_1_6gf": _torchvision("regnet_y_1_6gf"),
    "convnext_tiny": _convnext_tiny,
    "vit_s16": _vit_s16,
    "wrn_28_10": lambda data, norm: wide_resnet(data.channels, data.num_classes, norm),
    "shake_26_2x64d": lambda data, norm: shake_shake(data.channels, data.num_classes, norm, 64),
    "shake_26_2x96d": lambda data, norm: shake_shake(data.channels, data.num_classes, norm, 96),
}
"""from the data's shapes and the batch norm of a recipe, which a model is free not to use"""


def build(workload: Workload, seed: int) -> Normalised:
    """The model with initial weights that are a function of `seed` alone.

    Built on the CPU in fp32 whatever the device and precision, so that all of them start from the same weights.
    """
    recipe, data = workload.recipe, workload.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = BUILDERS[workload.model.name](data, partial(BatchNorm, norm_batch_size=recipe.norm_batch_size))
    return Normalised(net, data.mean, data.std, autocast=recipe.precision == "bf16").to(DTYPES[recipe.precision])
