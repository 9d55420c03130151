"""The whole schema: what a workload, a study, a trial and a cluster file may say.

Frozen pydantic models, unknown keys refused, units and constraints at the field. Nothing here imports torch:
every mistake must be found on the login node, in milliseconds, with the dotted key, the value, the constraint
and a value that would work.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import shlex
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from harness import schedule

SCHEMA_VERSION = 1
"""Part of every trial id. Raise it only when the same resolved config comes to mean another result."""

ModelName = Literal[
    "mnist5k_cnn", "mnist5k_mlp", "mnist5k_cnn_bn", "resnet18", "resnet50", "resnet50_zero_init", "regnet_y_1_6gf",
    "convnext_tiny", "vit_s16", "wrn_28_10", "shake_26_2x64d", "shake_26_2x96d",
]  # fmt: skip
WITHOUT_BATCH_NORM = ("mnist5k_cnn", "mnist5k_mlp", "convnext_tiny", "vit_s16")
LEAST_SIZE = {"convnext_tiny": 32}
"""models that take no smaller images, pixels; all others take 8"""
OF_ONE_SIZE = ("mnist5k_cnn", "mnist5k_mlp", "mnist5k_cnn_bn", "vit_s16")
"""models with weights for each place of an image: they take images of image_size and no others"""
OF_COLOUR = ("resnet18", "resnet50", "resnet50_zero_init", "regnet_y_1_6gf", "convnext_tiny", "vit_s16")
"""models that take three channels, as torchvision builds them"""


M = TypeVar("M", bound=BaseModel)


class BadInput(ValueError):
    """What a user wrote cannot be done. One line a mistake; the command line prints it and exits 2."""


LONGEST = 100
"""characters of a value in a message"""
_repr = reprlib.Repr()  # stops early: an alias bomb written out would fill the memory
_repr.maxlevel, _repr.maxstring, _repr.maxlong, _repr.maxother = 4, LONGEST, LONGEST, LONGEST
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 20


def shown(value: Any) -> str:
    """A value as a message has it: no longer than LONGEST."""
    return _cut(_repr.repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(gt=0, le=1)]
Epochs = Annotated[Number, Field(le=100_000)]  # far beyond, the number of steps overflows
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=80, examples=["AdamWR"])]


def _no_file_of_a_store(value: str) -> str:
    if value.lower().startswith("mlflow.db"):  # and what SQLite puts beside it; some file systems know no capitals
        raise ValueError("is a file of every store, where a study has its folder")
    return value


StudyName = Annotated[Name, AfterValidator(_no_file_of_a_store)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# ------------------------------------------------------------------------------------------------ workload


class Data(Frozen):
    """One data set as WebDataset shards; the counts stand here so that plans need no data."""

    name: Name = Field(description="identity of the data set; part of the trial id", examples=["mnist5k"])
    path: Path = Field(description="folder of the shards and their index", examples=["data/mnist5k"])
    num_classes: Whole = Field(ge=2, examples=[10])
    image_size: Whole = Field(ge=8, description="height and width fed to the model, pixels", examples=[28])
    resize: Whole | None = Field(
        None,
        ge=8,
        description="shorter side, pixels, that images are resized to before the central image_size x image_size is cut out; "
        "null: they have that size already",
        examples=[256],
    )
    eval_image_size: Whole | None = Field(
        None,
        ge=8,
        description="height and width, pixels, of what is cut out where images are evaluated, train_eval included; null: image_size",
        examples=[256],
    )
    channels: Literal[1, 3] = Field(3, examples=[3])
    train_samples: Whole = Field(ge=1, description="samples in the train shards, holdout included", examples=[4000])
    holdout_per_class: Whole = Field(
        50, ge=0, description="training images of each class that are kept out of training, for every decision; 0: none", examples=[50]
    )
    train_on: Literal["train", "train+holdout"] = Field(
        "train", description="train+holdout: nothing is kept out of training, so there is no holdout to decide on"
    )
    val_samples: Whole = Field(ge=1, description="samples of the reported split; nothing is decided on it", examples=[1000])
    mean: tuple[Number, ...] = Field(description="per channel, of pixels scaled to 0-1", examples=[[0.131]])
    std: tuple[Annotated[Number, Field(gt=0)], ...] = Field(description="per channel, as mean", examples=[[0.308]])
    on_corrupt: Literal["raise", "substitute"] = Field(
        "raise", description="a sample that fails crc, decoding or label range: stop, or a counted, reported substitute"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.holdout_samples >= self.train_samples:
            raise ValueError(
                f"holdout_per_class {self.holdout_per_class} of {self.num_classes} classes must be fewer than train_samples "
                f"{self.train_samples}; e.g. {self.train_samples // self.num_classes // 10}"
            )
        if self.eval_image_size == self.image_size:
            raise ValueError(f"eval_image_size: {self.eval_image_size} is image_size; leave it out")
        if self.eval_image_size is not None and self.resize is None:
            raise ValueError(
                f"eval_image_size: {self.eval_image_size} needs resize, the shorter side of the images that it is cut out of; "
                f"e.g. resize: {max(self.eval_image_size, self.image_size) * 8 // 7}"
            )
        for key, size in (("image_size", self.image_size), ("eval_image_size", self.evaluated_size)):
            if self.resize is not None and self.resize < size:
                raise ValueError(f"resize: {self.resize} must be at least {key}, {size}; e.g. {size * 8 // 7}")
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"{key} must have {self.channels} value(s), one a channel")
        return self

    @property
    def evaluated_size(self) -> int:
        """Height and width, pixels, of every image that is evaluated."""
        return self.eval_image_size or self.image_size

    @property
    def holdout_samples(self) -> int:
        """Of train_samples, kept out of training."""
        return 0 if self.train_on == "train+holdout" else self.holdout_per_class * self.num_classes

    @property
    def trained_samples(self) -> int:
        """B of the paper: samples trained on (the holdout is not)."""
        return self.train_samples - self.holdout_samples


class Model(Frozen):
    name: ModelName = Field(examples=["mnist5k_cnn"])


class Crop(Frozen):
    """A random part of each training image, resized to image_size: torchvision's RandomResizedCrop, drawn anew every epoch."""

    scale: tuple[Share, Share] = Field(
        (0.08, 1.0), description="its area, uniform between these shares of the image's", examples=[[0.08, 1]]
    )
    ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="its width / height, log-uniform between", examples=[[0.75, 1.3333333333333333]]
    )

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must not descend")
        return value


class RandAugment(Frozen):
    """Operations drawn for each training image, after crop and flip, by torchvision's transforms.v2 (arXiv 1909.13719)."""

    name: Literal["randaugment"]
    num_ops: Whole = Field(2, ge=1, le=14, description="one after the other", examples=[2])
    magnitude: Whole = Field(9, ge=0, le=30, description="of each, of 30; published ones are often of 10", examples=[9])


class TrivialAugment(Frozen):
    """One operation of a random magnitude for each training image, by torchvision's TrivialAugmentWide (arXiv 2103.10158)."""

    name: Literal["trivialaugment"]


class Shuffle(Frozen):
    """Shuffled blocks of neighbouring samples, mixed some at a time: reads stay close together, for network file systems."""

    block: Whole = Field(ge=1, description="neighbouring samples that stay together", examples=[1024])
    blocks: Whole = Field(ge=1, description="blocks whose samples are mixed: what a node's file cache should hold", examples=[16])


class Resolution(Frozen):
    """Training images grow from `start` to image_size, from one epoch to the next: harness.schedule.image_size."""

    start: Whole = Field(ge=8, description="height and width of the first training images, pixels; below image_size", examples=[160])
    epochs: tuple[Annotated[Number, Field(ge=0)], Number] = Field(
        description="they have `start` pixels up to the first of these epochs, image_size from the second on; 0-based", examples=[[65, 76]]
    )
    multiple: Whole = Field(
        32, ge=1, description="of pixels that sizes in between are rounded to; divides start and image_size", examples=[32]
    )

    @field_validator("epochs")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError("must ascend")
        return value


class Recipe(Frozen):
    """What defines the result and is neither optimizer, decay, schedule nor budget."""

    label_smoothing: Number = Field(0.0, ge=0, lt=1, description="in the trained loss only, never in a reported one", examples=[0.1])
    crop: Crop | None = Field(None, description="null: training sees whole images, as evaluation does", examples=[{"scale": [0.08, 1]}])
    resolution: Resolution | None = Field(
        None,
        description="a schedule of the size that crop is resized to; null: image_size in every epoch",
        examples=[{"start": 160, "epochs": [65, 76]}],
    )
    shuffle: Shuffle | None = Field(
        None, description="null: every order of all samples has the same chance", examples=[{"block": 1024, "blocks": 16}]
    )
    label_noise: Number = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training images whose label is another class than theirs, the same in every epoch, seed and arm",
        examples=[0.2],
    )
    translate: Whole = Field(0, ge=0, le=64, description="random shift of each training image, +- pixels; border comes in", examples=[2])
    border: tuple[Annotated[int, Field(ge=0, le=255)], ...] | None = Field(
        None,
        description="what translate fills with, a level a channel; null: black. 255 * mean is 0 to the network, as where images are "
        "normalised before they are shifted",
        examples=[[125, 123, 114]],
    )
    flip: bool = Field(False, description="random horizontal flip of each training image")
    augment: Annotated[RandAugment | TrivialAugment, Field(discriminator="name")] | None = Field(
        None,
        description="null: nothing beyond crop, flip and translate; else training images are read in processes",
        examples=[{"name": "randaugment", "num_ops": 2, "magnitude": 9}],
    )
    mixup: Number = Field(
        0.0, ge=0, le=100, description="alpha of mixup: pairs of images, and their losses, averaged; 0: never", examples=[0.2]
    )
    cutmix: Number = Field(
        0.0, ge=0, le=100, description="alpha of CutMix: a box of each image comes from its partner; 0: never", examples=[1.0]
    )
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="bf16: autocast over fp32 weights; fp64: for checks of the numerics"
    )
    clip_norm: Number | None = Field(
        None, gt=0, description="the global batch's gradient is scaled down to this Euclidean norm; null: never", examples=[1.0]
    )
    norm_batch_size: Whole | None = Field(
        None, ge=2, description="samples that batch norm normalises together; divides the micro-batch; null: the micro-batch", examples=[32]
    )


class Budget(Frozen):
    epochs: Epochs = Field(gt=0, description="passes over the samples trained on", examples=[7])
    global_batch_size: Whole = Field(ge=1, description="samples an optimizer step, over all ranks", examples=[100])


class TestSet(Frozen):
    """A further set of images that only finalists are evaluated on, once: with the answer of their last completed cycle."""

    name: Name = Field(examples=["imagenet-v2"])
    path: Path = Field(
        description="folder of its shards and their index: the val shards are taken, labels are those of the training data",
        examples=["data/imagenet-v2"],
    )
    samples: Whole = Field(ge=1, description="in its val shards", examples=[10_000])


class Evaluation(Frozen):
    """Holdout and validation are evaluated at every cycle end, and also on this schedule."""

    val: bool = Field(
        True,
        description="also the validation split, in a study without finalists; with finalists they alone are evaluated on it, "
        "and nobody sees it for a point of the search",
    )
    test: TestSet | None = Field(None, examples=[{"name": "imagenet-v2", "path": "data/imagenet-v2", "samples": 10_000}])

    every_epochs: Number | None = Field(
        None, ge=0.001, description="also evaluate every so many epochs; null: cycle ends only", examples=[1]
    )
    batch_size: Whole = Field(500, ge=1, description="samples a forward pass on one rank", examples=[500])
    train_eval_samples: Whole = Field(
        500, ge=1, description="size of the fixed clean training subset behind train_eval/loss", examples=[500]
    )
    log_every_steps: Whole = Field(
        10, ge=1, le=100, description="optimizer steps between two train/loss points, where ranks also agree to stop", examples=[10]
    )


class Checkpoint(Frozen):
    every_epochs: Number = Field(1.0, ge=0.001, description="beside cycle ends and the end", examples=[1])
    keep: Whole = Field(2, ge=1, description="newest checkpoints kept, while a trial runs and after it", examples=[2])
    weights: Literal["finalists", "all", "none"] = Field(
        "finalists", description="trials whose weights at every cycle end are kept for good, in weights/step-N.pt", examples=["all"]
    )


class Workload(Frozen):
    name: Name = Field(examples=["mnist5k_cnn"])
    data: Data
    model: Model
    recipe: Recipe = Recipe()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        size, model, ramp = self.data.image_size, self.model.name, self.recipe.resolution
        least = LEAST_SIZE.get(model, 8)
        if model == "vit_s16" and size % 16:
            raise ValueError(f"data.image_size: {size} is no multiple of {model}'s patches of 16 pixels; e.g. {-(-size // 16) * 16}")
        border = self.recipe.border
        if border is not None and not self.recipe.translate:
            raise ValueError("recipe.border: has no effect without translate; set recipe.translate, e.g. 4, or leave border out")
        if border is not None and len(border) != self.data.channels:
            raise ValueError(f"recipe.border: has {len(border)} levels for {self.data.channels} channel(s); give one each")
        if model in OF_COLOUR and self.data.channels == 1:
            raise ValueError(f"data.channels: 1 is too few for {model}; 3, with mean and std of three, reads grey images as RGB")
        for key, value in (("recipe.resolution", ramp), ("data.eval_image_size", self.data.eval_image_size)):
            if value is not None and model in OF_ONE_SIZE:
                raise ValueError(f"{key}: {model} takes images of one size, data.image_size, {size}; leave {key} out")
        sizes = {
            "data.image_size": size,
            "data.eval_image_size": self.data.eval_image_size,
            "recipe.resolution.start": ramp.start if ramp else None,
        }
        for key, value in sizes.items():
            if value is not None and value < least:
                raise ValueError(f"{key}: {value} is too small for {model}; e.g. {least}")
        if ramp is None:
            return self
        if self.recipe.crop is None:
            raise ValueError(
                "recipe.resolution: needs crop, whose parts of images can be resized to any size; e.g. crop: {scale: [0.08, 1]}"
            )
        if ramp.start % ramp.multiple or size % ramp.multiple:
            raise ValueError(
                f"recipe.resolution.multiple: {ramp.multiple} must divide start, {ramp.start}, and data.image_size, {size}; "
                f"e.g. {math.gcd(ramp.start, size)}"
            )
        if ramp.start >= size:
            smaller = size - ramp.multiple
            raise ValueError(
                f"recipe.resolution.start: {ramp.start} must be below data.image_size, {size}, where it ends; "
                + (f"e.g. {smaller}" if smaller >= least else "leave resolution out")
            )
        return self


class Reference(Frozen):
    """What was published for a workload, so that a study's numbers can be held against it."""

    source: str = Field(description="of the recipe and the error: paper and table, or the name of the weights")
    top1_error: Number | None = Field(ge=0, le=100, description="validation error, percent; null: no number is printed", examples=[22.53])
    epochs: Positive | None = Field(None, description="of training behind top1_error; null: those of budget", examples=[112])
    warmup_epochs: Number | None = Field(None, ge=0, description="of the schedule behind it; null: not stated", examples=[5])
    trained_samples: Whole | None = Field(None, ge=1, description="images trained on behind it; null: those of data", examples=[1_281_167])
    parameters: Whole = Field(ge=1, description="of the network, as published", examples=[25_557_032])
    gpu: str = Field(description="that images_per_second is of", examples=["A100"])
    images_per_second: Positive = Field(
        description="a second on one such GPU, at the workload's image_size. Prices a plan until a run is measured; a study of another "
        "image_size scales it by the pixels, unless it states its own",
        examples=[2500],
    )
    departures: tuple[str, ...] = Field(
        (), description="of a study from all this, a line each: found and stored with it, not written by hand"
    )


class WorkloadFile(Workload):
    """configs/workload/NAME.yaml: the workload and the defaults that a study may override."""

    reference: Reference | None = None
    budget: Budget
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()


# --------------------------------------------------------------------------- optimizer x decay x schedule

Lr = Annotated[Number, Field(gt=0, description="alpha, the base learning rate", examples=[0.001])]
Beta = Annotated[Number, Field(ge=0, lt=1, examples=[0.9])]


class Sgd(Frozen):
    name: Literal["sgd"]
    lr: Lr
    momentum: Beta = 0.9
    lr_in_buffer: bool = Field(
        False,
        description="false: buf = momentum*buf + g; theta -= lr*buf (torch, the released code). "
        "true: buf = momentum*buf + lr*g; theta -= buf (as printed in Algorithm 1)",
    )


class Adam(Frozen):
    name: Literal["adam"]
    lr: Lr
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), examples=[[0.9, 0.999]])
    eps: Number = Field(1e-8, gt=0, examples=[1e-8])


class NoDecay(Frozen):
    name: Literal["none"]


class L2(Frozen):
    """g = grad + weight_decay*theta: the decay passes through momentum and preconditioner."""

    name: Literal["l2"]
    weight_decay: Number = Field(ge=0, description="coefficient of theta in the gradient", examples=[0.0005])
    exempt_1d: bool = Field(False, description="true: parameters of one value a channel (norms, biases, layer scales) do not decay")


class Decoupled(Frozen):
    """theta -= eta*lambda*theta, of the weights before the step (PAPER, Algorithms 1 and 2)."""

    name: Literal["decoupled"]
    weight_decay: Number = Field(ge=0, description="normalised: lambda_norm, paper units; raw: lambda in `units`", examples=[0.05])
    normalised: bool = Field(False, description="lambda_i = weight_decay / sqrt(optimizer steps of the full current cycle)")
    units: Literal["paper", "torch"] = Field(
        "paper", description="raw decay only. paper: lambda; torch: lambda / alpha, as torch, timm and DeepSpeed read it"
    )
    exempt_1d: bool = Field(False, description="true: parameters of one value a channel (norms, biases, layer scales) do not decay")

    @model_validator(mode="after")
    def _units_mean_something(self) -> Self:
        if self.normalised and "units" in self.model_fields_set:
            raise ValueError(f"units: {self.units!r} has no meaning for normalised decay, which is always in paper units; leave units out")
        return self


class _Warmed(Frozen):
    warmup_epochs: Epochs = Field(
        0.0, ge=0, description="eta *= min(1, (step+1)/warm-up steps); moves no cycle end, scales decoupled decay too", examples=[0.5]
    )


class Constant(_Warmed):
    name: Literal["constant"]


class Step(_Warmed):
    name: Literal["step"]
    milestones: tuple[Annotated[Epochs, Field(gt=0)], ...] = Field(description="epochs at which eta *= gamma", examples=[[30, 60, 80]])
    gamma: Number = Field(0.1, gt=0, le=1, examples=[0.1])

    @field_validator("milestones")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"must ascend; e.g. {sorted(set(value))}")
        return value


EtaMin = Annotated[Number, Field(ge=0, lt=1, description="floor of eta, a share of the base learning rate", examples=[0.0])]


class Linear(_Warmed):
    name: Literal["linear"]
    eta_min: EtaMin = 0.0


class Cosine(_Warmed):
    name: Literal["cosine"]
    eta_min: EtaMin = 0.0


class CosineRestarts(_Warmed):
    """SGDR: T_0 = t_0 epochs, T_{i+1} = t_mult*T_i, eta from 1 towards eta_min in every cycle."""

    name: Literal["cosine_restarts"]
    t_0: Epochs = Field(gt=0, description="epochs of the first cycle", examples=[1])
    t_mult: Number = Field(1.0, ge=1, le=100_000, examples=[2])
    eta_min: EtaMin = 0.0
    reset_moments: bool = Field(False, description="true: every cycle starts with the optimizer's moments at zero; the paper keeps them")


Optimizer = Annotated[Sgd | Adam, Field(discriminator="name")]
Decay = Annotated[NoDecay | L2 | Decoupled, Field(discriminator="name")]
Schedule = Annotated[Constant | Step | Linear | Cosine | CosineRestarts, Field(discriminator="name")]


# --------------------------------------------------------------------------------------------------- trial


@dataclass(frozen=True)
class Supported:
    """What a backend can do; tests/equivalence holds it to that."""

    stages: tuple[int, ...]
    precisions: tuple[str, ...]
    offload: tuple[int, ...] = ()
    """stages that can keep optimizer state in host memory"""

    compiled: tuple[int, ...] = ()
    """stages that gain from torch.compile"""

    def __str__(self) -> str:
        offload = f"; offload_optimizer with {', '.join(map(str, self.offload))}" if self.offload else ""
        compiled = f"; compile with {', '.join(map(str, self.compiled))}" if self.compiled != self.stages else ""
        return f"zero_stage {', '.join(map(str, self.stages))} ({', '.join(self.precisions)}{offload}{compiled})"


SUPPORTED = {
    "ddp": Supported((0, 1), ("fp32", "bf16", "fp64"), compiled=(0, 1)),
    "deepspeed": Supported((0, 1, 2, 3), ("fp32", "bf16"), offload=(1, 2, 3), compiled=(0, 1, 2)),  # its partitions are fp32
    "fsdp": Supported((2, 3), ("fp32", "bf16", "fp64"), compiled=(2, 3)),
}
_ALL_SUPPORTED = "; ".join(f"{name} {what}" for name, what in SUPPORTED.items())


class Backend(Frozen):
    """How the result is computed, never what it is: not part of the trial id."""

    name: Literal["ddp", "deepspeed", "fsdp"] = Field(
        "ddp", description="torch's DDP, DeepSpeed's ZeRO, or torch's fully_shard", examples=["ddp"]
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="sharded over the ranks: 1 optimizer state, 2 and gradients, 3 and weights. "
        "ddp 0-1, deepspeed 0-3, fsdp 2-3 (left out: 3)",
        examples=[1],
    )
    offload_optimizer: bool = Field(False, description="optimizer state in host memory; deepspeed zero_stage 1-3 only")
    micro_batch_size: Whole | None = Field(
        None, ge=1, description="samples a forward pass on one rank; null: global_batch_size / world size", examples=[50]
    )
    channels_last: bool = Field(False, description="images in NHWC memory order, and with ddp the convolution weights")
    compile: bool = Field(False, description="torch.compile of the model; needs a C++ compiler on a CPU")
    deterministic: bool = Field(
        False, description="the same bits every time on a GPU, at the cost of speed: harness/numerics.py; a CPU's are the same anyway"
    )
    timeout_seconds: Whole = Field(
        600,
        ge=5,
        le=3600,
        description="a collective that waits longer for its peers ends the rank; above what ranks may be apart by: a compilation, a wait "
        "for data, a save. A killed peer is known at once, or its launcher ends the others",
        examples=[600],
    )

    @model_validator(mode="before")
    @classmethod
    def _fsdp_shards_everything(cls, value: Any) -> Any:
        return {"zero_stage": 3} | value if isinstance(value, dict) and value.get("name") == "fsdp" else value

    @model_validator(mode="after")
    def _supported(self) -> Self:
        can = SUPPORTED[self.name]
        if self.zero_stage not in can.stages:
            raise ValueError(f"zero_stage: {self.zero_stage} is not supported by {self.name}; supported: {_ALL_SUPPORTED}")
        if self.offload_optimizer and self.zero_stage not in can.offload:
            raise ValueError(
                f"offload_optimizer: true is not supported by {self.name} zero_stage {self.zero_stage}, whose optimizer state "
                f"stays beside the weights; supported: {_ALL_SUPPORTED}"
            )
        if self.compile and self.zero_stage not in can.compiled:
            raise ValueError(
                f"compile: true is not supported by {self.name} zero_stage {self.zero_stage}, whose hooks break the graph at every "
                f"layer; supported: {_ALL_SUPPORTED}"
            )
        return self


class Trial(Frozen):
    """One resolved config. Its id hashes what defines its result and nothing else."""

    study: StudyName = "adhoc"
    arm: Name = "trial"
    phase: Literal["search", "finalists"] = "search"
    workload: Workload
    optimizer: Optimizer
    decay: Decay
    schedule: Schedule
    budget: Budget
    backend: Backend = Backend()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    seed: Whole = Field(0, ge=0, lt=2**31, examples=[0])

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        samples, batch = self.workload.data.trained_samples, self.budget.global_batch_size
        if batch > samples:
            raise ValueError(
                f"budget.global_batch_size: {batch} must be at most the {samples} samples trained on; e.g. {min(100, samples)}"
            )
        recipe, model = self.workload.recipe, self.workload.model.name
        if recipe.precision not in SUPPORTED[self.backend.name].precisions:
            raise ValueError(
                f"workload.recipe.precision: {recipe.precision} is not supported by {self.backend.name}; supported: {_ALL_SUPPORTED}"
            )
        if recipe.norm_batch_size is not None and model in WITHOUT_BATCH_NORM:
            raise ValueError(
                f"workload.recipe.norm_batch_size: {recipe.norm_batch_size} has no meaning for {model}, "
                "which has no batch norm; leave it out"
            )
        if recipe.norm_batch_size is not None and batch % recipe.norm_batch_size:
            raise ValueError(
                f"workload.recipe.norm_batch_size: {recipe.norm_batch_size} must divide budget.global_batch_size, {batch}; "
                f"e.g. {_divisor(batch, recipe.norm_batch_size)}"
            )
        if schedule.total_steps(self) < 1:
            raise ValueError(
                f"budget.epochs: {self.budget.epochs:g} is less than one optimizer step; e.g. {1 / schedule.steps_per_epoch(self):.4g}"
            )
        schedule.check(self)
        return self

    @property
    def trial_id(self) -> str:
        """12 hex digits of a SHA-256 over the canonical JSON of `identity()`."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def configuration(self) -> str:
        """The same for every seed of a configuration: its trial id at seed 0."""
        return self.model_copy(update={"seed": 0}).trial_id

    def identity(self) -> dict[str, Any]:
        """What defines the result: defaults omitted, so that a new field with a default changes no id.

        Never the arm's name, the backend, paths or logging; those are recorded per attempt.
        """
        blocks: dict[str, BaseModel] = {
            "data": self.workload.data,
            "model": self.workload.model,
            "recipe": self.workload.recipe,
            "optimizer": self.optimizer,
            "decay": self.decay,
            "schedule": self.schedule,
            "budget": self.budget,
        }
        dumped = {key: block.model_dump(mode="json", exclude_defaults=True) for key, block in blocks.items()}
        dumped["data"].pop("path")
        return {"schema": SCHEMA_VERSION, **dumped, "seed": self.seed}

    def micro_batch_size(self, world_size: int) -> int:
        """Samples a forward pass on one rank.

        Raises BadInput when the global batch cannot be split evenly over `world_size` ranks, micro-batches and norm batches.
        """
        batch, micro = self.budget.global_batch_size, self.backend.micro_batch_size
        if batch % world_size:
            near = sorted({max(1, batch // world_size), -(-batch // world_size)})
            below = _divisor(batch, world_size)
            above = next(n for n in range(world_size, batch + world_size + 1) if batch % n == 0 or n > batch)
            worlds = sorted({below, above} if above <= batch else {below})
            raise BadInput(
                f"budget.global_batch_size: {batch} is not divisible by {world_size} ranks; "
                f"e.g. {' or '.join(map(str, worlds))} rank(s), or a batch of {' or '.join(str(n * world_size) for n in near)}"
            )
        share = batch // world_size
        if micro is not None and share % micro:
            raise BadInput(
                f"backend.micro_batch_size: {micro} does not divide the {share} samples of each of {world_size} rank(s) "
                f"(budget.global_batch_size {batch}); e.g. {_divisor(share, micro)}"
            )
        micro, together = micro or share, self.workload.recipe.norm_batch_size
        if together is not None and micro % together:
            fits = [n for n in range(together, share + 1, together) if share % n == 0]
            raise BadInput(
                f"workload.recipe.norm_batch_size: {together} does not divide the micro-batch of {micro} on each of {world_size} rank(s); "
                + (f"e.g. backend.micro_batch_size {min(fits, key=lambda n: abs(n - micro))}" if fits else "fewer ranks are needed")
            )
        if micro % 2 and (mixed := next((key for key in ("mixup", "cutmix") if getattr(self.workload.recipe, key)), None)):
            pairs = math.lcm(2, together or 1)
            fits = [n for n in range(pairs, share + 1, pairs) if share % n == 0]
            advice = (
                f"backend.micro_batch_size {min(fits, key=lambda n: abs(n - micro))}"
                if fits
                else f"budget.global_batch_size {-(-share // pairs) * pairs * world_size} and backend.micro_batch_size {pairs}"
            )
            raise BadInput(
                f"workload.recipe.{mixed}: mixes pairs, and the micro-batch of {micro} on each of {world_size} rank(s) is "
                f"odd; e.g. {advice}"
            )
        return micro


def _divisor(of: int, near: int) -> int:
    """The largest divisor of `of` that is at most `near`."""
    return max(d for d in range(1, min(near, of) + 1) if of % d == 0)


# --------------------------------------------------------------------------------------------------- study


class LogUniform(Frozen):
    log_uniform: tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]] = Field(examples=[[0.0001, 0.01]])
    num: Whole | None = Field(None, ge=2, description="points along this axis; for sampler grid only", examples=[5])

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _must_ascend("log_uniform", self.log_uniform)
        return self

    def at(self, u: float) -> float:
        low, high = map(math.log, self.log_uniform)
        return float(f"{math.exp(low + u * (high - low)):.6g}")


class Uniform(Frozen):
    uniform: tuple[Number, Number] = Field(examples=[[0.85, 0.95]])
    num: Whole | None = Field(None, ge=2, description="points along this axis; for sampler grid only", examples=[5])

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _must_ascend("uniform", self.uniform)
        return self

    def at(self, u: float) -> float:
        low, high = self.uniform
        return float(f"{low + u * (high - low):.6g}")


class Choice(Frozen):
    choice: tuple[Any, ...] = Field(min_length=1, examples=[[0.9, 0.95]])

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        first: dict[Any, int] = {}
        for i, value in enumerate(self.choice):
            if first.setdefault(comparable(value), i) != i:
                raise ValueError(f"choice: {shown(value)} is there twice; leave one out")
        return self

    def at(self, u: float) -> Any:
        return self.choice[min(int(u * len(self.choice)), len(self.choice) - 1)]


def comparable(value: Any) -> Any:
    """Hashable, and equal for numbers that a trial takes as the same, alone or in a list: 0.1 and the text 1e-1."""

    def one(value: Any) -> Any:
        return float(value) if _is_number(value) else shown(value)

    return tuple(map(one, value)) if isinstance(value, list | tuple) else one(value)


def _must_ascend(key: str, pair: tuple[float, float]) -> None:
    low, high = pair
    if not low < high:
        raise ValueError(f"{key}: low {low:g} must be below high {high:g}; e.g. [{min(pair):g}, {max(abs(low), abs(high)) * 10:g}]")


def _kind_of_dimension(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return next((k for k in ("log_uniform", "uniform", "choice") if k in keys), None)


Dimension = Annotated[
    Annotated[LogUniform, Tag("log_uniform")] | Annotated[Uniform, Tag("uniform")] | Annotated[Choice, Tag("choice")],
    Discriminator(
        _kind_of_dimension,
        custom_error_type="dimension",
        custom_error_message="must be {log_uniform: [low, high]}, {uniform: [low, high]} or {choice: [...]}",
    ),
]


Axes = dict[Annotated[str, Field(pattern=r"^(optimizer|decay|schedule)\.[a-z_0-9]+$", examples=["optimizer.lr"])], Dimension]
"""dotted key of an arm -> the values it may take"""

DERIVED = {"optimizer.one_minus_beta1": ("optimizer.momentum", "optimizer.betas.0"), "optimizer.effective_lr": ("optimizer.lr",)}
"""axis that is no field of an optimizer -> the fields it sets, whichever the optimizer has: harness.study.fields"""

Box = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$", max_length=40, examples=["narrow"])]


class Arm(Frozen):
    """A named point (or, with `space` or `boxes`, a box or several) in optimizer x decay x schedule.

    The three blocks are checked as part of each resolved trial, because the space may supply their missing values.
    """

    optimizer: dict[str, Any] = Field(examples=[{"name": "adam", "lr": 0.001}])
    decay: dict[str, Any] = Field({"name": "none"}, examples=[{"name": "none"}])
    schedule: dict[str, Any] = Field(examples=[{"name": "cosine"}])
    space: Axes = Field(
        {},
        description="dotted key of this arm -> the values it may take; beside fields, optimizer.one_minus_beta1 (sgd: momentum = 1 - it; "
        "adam: beta1 = 1 - it, beta2 as in betas: [null, 0.99], left out 0.999) and optimizer.effective_lr (see gradient_scale)",
    )
    boxes: dict[Box, Axes] = Field(
        {},
        description="in place of space: name -> a space; each becomes an arm ARM.BOX of its own. All have the same axes",
        examples=[{"narrow": {"optimizer.lr": {"log_uniform": [0.001, 0.01]}}, "broad": {"optimizer.lr": {"log_uniform": [0.0001, 0.1]}}}],
    )
    gradient_scale: Number | None = Field(
        None,
        gt=0,
        description="s of the axis optimizer.effective_lr, of adam: lr = effective_lr * (eps + s). A typical root of a second moment: "
        "steps keep their size while eps moves over decades",
        examples=[0.001],
    )
    _box: str | None = PrivateAttr(None)
    """the one of `boxes` that this arm was made of; None for an arm as it is written"""

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if self.boxes and self.space:
            raise ValueError(f"space: stands beside boxes {', '.join(self.boxes)}; write its axes into each of them")
        first = next(iter(self.boxes), "")
        for name, axes in self.boxes.items():
            if not axes:
                raise ValueError(f"boxes.{name}: has no axes; e.g. optimizer.lr: {{log_uniform: [0.001, 0.01]}}")
            if odd := sorted(axes.keys() ^ self.boxes[first].keys()):
                has, lacks = (name, first) if odd[0] in axes else (first, name)
                raise ValueError(f"boxes.{lacks}: lacks {odd[0]}, an axis of {has}: boxes have the same axes; else write two arms")
        self._check("space", self.space)
        for name, axes in self.boxes.items():
            self._check(f"boxes.{name}", axes)
        derived = [key for axes in (self.space, *self.boxes.values()) for key in axes]
        if self.gradient_scale is not None and "optimizer.effective_lr" not in derived:
            raise ValueError(
                f"gradient_scale: {self.gradient_scale:g} has no meaning without the axis optimizer.effective_lr; add that, or leave it out"
            )
        return self

    def _check(self, where: str, axes: Mapping[str, Any]) -> None:
        """ValueError for a value that is said twice, and for an axis that this arm's optimizer does not have."""
        for key, axis in axes.items():
            block, _, field = key.partition(".")
            if field in getattr(self, block):
                raise ValueError(f"{key}: {shown(getattr(self, block)[field])} is fixed and also an axis of {where}; remove one of them")
            for said in DERIVED.get(key, ()):
                name = said.split(".")[1]
                fixed = self.optimizer.get(name)
                if f"optimizer.{name}" in axes:
                    raise ValueError(f"{where}.{key}: sets optimizer.{name}, which is an axis too; remove one of them")
                if fixed is not None and not (name == "betas" and isinstance(fixed, list | tuple) and fixed[:1] in ([None], (None,))):
                    advice = "; write [null, beta2]" if name == "betas" else "; remove one of them"
                    raise ValueError(f"optimizer.{name}: {shown(fixed)} is fixed and also set by the axis {key}{advice}")
            if key in DERIVED:
                most = 1.0 if key == "optimizer.one_minus_beta1" else math.inf
                values = axis.choice if isinstance(axis, Choice) else (axis.at(0.0), axis.at(1.0))
                if out := [value for value in values if not _is_number(value) or not 0 < float(value) <= most]:
                    limit = f" and at most {most:g}" if math.isfinite(most) else ""
                    raise ValueError(f"{where}.{key}: {shown(out[0])} must be a number above 0{limit}; e.g. {{log_uniform: [0.01, 0.3]}}")
        if "optimizer.effective_lr" in axes:
            if self.optimizer.get("name") != "adam":
                given = self.optimizer.get("name")
                raise ValueError(f"{where}.optimizer.effective_lr: is of adam, which has eps, not of {shown(given)}; use optimizer.lr")
            if self.gradient_scale is None:
                raise ValueError("gradient_scale: missing; the axis optimizer.effective_lr needs it; e.g. 0.001")

    def split(self, name: str) -> dict[str, Arm]:
        """The arms that this one, called `name`, stands for: itself, or one a box."""
        out = {}
        for box, axes in self.boxes.items():
            arm = out[f"{name}.{box}"] = self.model_copy(update={"space": axes, "boxes": {}})
            arm._box = box
        return out or {name: self}

    def written(self, name: str, key: str) -> str:
        """Where the study file says `key` of this arm, called `name`: a dotted key."""
        if self._box is None:
            return f"arms.{name}.{f'space.{key}' if key in self.space else key}"
        return f"arms.{name.removesuffix(f'.{self._box}')}.{f'boxes.{self._box}.{key}' if key in self.space else key}"


def _is_number(value: Any) -> bool:
    """YAML reads 1e-3 as text."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


FRESH_SEEDS_FROM = 1000


def _count(seeds: Any, first: int) -> Any:
    """A count of seeds as the seeds themselves."""
    if type(seeds) is not int:
        return seeds
    if not 1 <= seeds <= 10_000:
        raise ValueError("must be a count from 1 to 10000, or a list")
    return tuple(range(first, first + seeds))


class Search(Frozen):
    points: Whole | None = Field(None, ge=1, le=100_000, description="configurations an arm; left out for sampler grid", examples=[8])
    seeds: Annotated[tuple[Whole, ...], BeforeValidator(lambda v: _count(v, 0))] = Field(
        (0,), min_length=1, description="a count (n: 0..n-1) or a list", examples=[1]
    )


class Finalists(Frozen):
    top: Whole = Field(1, ge=1, description="best configurations of each arm by mean holdout/top1", examples=[1])
    seeds: Annotated[
        tuple[Whole, ...],
        BeforeValidator(lambda v: _count(v, FRESH_SEEDS_FROM)),
    ] = Field(min_length=1, description="a count (n: 1000..999+n, fresh ones) or a list", examples=[3])


class Sampler(Frozen):
    name: Literal["sobol", "halton", "grid"] = "sobol"
    seed: Whole = Field(0, ge=0, description="with an arm's name it seeds the arm's points: an arm that is renamed draws others")


class Analysis(Frozen):
    """How arms are compared: declared in the study, before there are results."""

    method: Literal["welch", "paired"] = Field(
        "welch", description="of the difference of two arms over their finalists' seeds; paired: seed by seed"
    )
    margin: Number = Field(0.2, gt=0, description="percentage points of error within which two arms count as equivalent", examples=[0.2])
    comparisons: tuple[tuple[Name, Name], ...] | None = Field(
        None,
        description="pairs [A, B] of arms: A minus B. The name of an arm with boxes stands for each: two such are compared in every "
        "box they share. null: every pair of arms as the file writes them",
        examples=[[["AdamWR", "SGDWR"]]],
    )


def _boxes(name: str, arms: Iterable[str]) -> dict[str | None, str]:
    """box -> the arm `name.box`; None -> the arm of that very name."""
    return {None: name} if name in arms else {arm.removeprefix(f"{name}."): arm for arm in arms if arm.rpartition(".")[0] == name}


def _pairs(a: str, b: str, arms: Iterable[str]) -> list[tuple[str, str]]:
    """The arms that a pair of names compares; none when both have boxes and share none."""
    mine, theirs = _boxes(a, arms), _boxes(b, arms)
    if None in mine or None in theirs:
        return [(one, other) for one in mine.values() for other in theirs.values()]
    return [(mine[box], theirs[box]) for box in mine if box in theirs]


class Study(Frozen):
    """configs/study/NAME.yaml: a workload x named arms x a search space x seeds."""

    name: StudyName = Field(examples=["demo"])
    workload: Annotated[dict[str, Any], BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Field(
        description="name in configs/workload, a path, or {name: ..., KEY: overrides}; with data and model, complete in itself",
        examples=["mnist5k_cnn"],
    )
    arms: dict[Name, Arm] = Field(min_length=1)
    search: Search = Search()
    finalists: Finalists | None = None
    sampler: Sampler = Sampler()
    analysis: Analysis = Field(Analysis(), validate_default=True)
    ranks: Whole | None = Field(None, ge=1, description="processes a trial; null: as the cluster file says", examples=[2])
    budget: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}
    backend: dict[str, Any] = {}

    @field_validator("arms")
    @classmethod
    def _boxes_are_arms(cls, value: dict[str, Arm]) -> dict[str, Arm]:
        out = {made: one for name, arm in value.items() for made, one in arm.split(name).items()}
        if twice := next((f"{name}.{box}" for name, arm in value.items() for box in arm.boxes if f"{name}.{box}" in value), None):
            raise ValueError(f"{twice}: is also a box of {twice.rpartition('.')[0]}; give it another name")
        return out

    @field_validator("analysis")
    @classmethod
    def _comparisons_are_of_arms(cls, value: Analysis, info: ValidationInfo) -> Analysis:
        arms: dict[str, Arm] | None = info.data.get("arms")
        if arms is None:  # a mistake there is reported already
            return value
        for name in itertools.chain.from_iterable(value.comparisons or ()):
            if not _boxes(name, arms):
                raise ValueError(f"comparisons: {shown(name)} is no arm; {_suggest(name, list(arms))}")
        written = dict.fromkeys(name if arm._box is None else name.removesuffix(f".{arm._box}") for name, arm in arms.items())
        out: list[tuple[str, str]] = []
        for a, b in itertools.combinations(written, 2) if value.comparisons is None else value.comparisons:
            found = [] if a == b else _pairs(a, b, arms)
            if not found and value.comparisons is not None:
                why = "is an arm and itself" if a == b else "share no box"
                raise ValueError(f"comparisons: [{a}, {b}] {why}; name two of {', '.join(arms)}")
            out += found
        if twice := next((p for i, p in enumerate(out) if p in out[:i] or p[::-1] in out[:i]), None):
            raise ValueError(f"comparisons: {twice[0]} against {twice[1]} is there twice; leave one out")
        return value.model_copy(update={"comparisons": tuple(out)})

    @model_validator(mode="after")
    def _phases_agree(self) -> Self:
        for name, phase in (("search", self.search), ("finalists", self.finalists)):
            if phase is not None and len(set(phase.seeds)) != len(phase.seeds):
                raise ValueError(f"{name}.seeds: {shown(list(phase.seeds))} must be distinct")
        if self.finalists is not None and self.search.points is not None and self.finalists.top > self.search.points:
            raise ValueError(f"finalists.top: {self.finalists.top} must be at most search.points, {self.search.points}")
        if self.finalists is not None:
            reused = sorted(set(self.finalists.seeds) & set(self.search.seeds))
            if reused:
                count, above = len(self.finalists.seeds), max(self.search.seeds) + 1
                fresh = set(self.search.seeds).isdisjoint(_count(count, FRESH_SEEDS_FROM))
                raise ValueError(
                    f"finalists.seeds: {shown(reused)} are search seeds too, so selection would be reported as result; "
                    f"e.g. {f'a count, seeds: {count}' if fresh else f'others, seeds: {list(range(above, above + min(count, 3)))}'}"
                )
        if self.sampler.name == "grid" and self.search.points is not None:
            raise ValueError("search.points has no meaning for sampler grid, whose axes say num or choice; leave points out")
        return self


# ------------------------------------------------------------------------------------------------- cluster


class Local(Frozen):
    """configs/cluster/NAME.yaml for this machine."""

    executor: Literal["local", "debug"] = Field(
        description="local: submitit processes on this machine; debug: in this process, one rank, accumulating", examples=["local"]
    )
    ranks: Whole = Field(1, ge=1, description="processes a trial", examples=[2])
    threads_per_rank: Whole = Field(1, ge=1, description="CPU threads of torch in each rank; part of bit-equality on CPU", examples=[1])
    max_parallel: Whole = Field(1, ge=1, description="trials at a time", examples=[1])
    timeout_minutes: Whole = Field(1440, ge=1, description="of one job; submitit's own default is two minutes", examples=[1440])

    def of_phase(self, phase: str) -> Local:
        """The same in every phase."""
        return self


def _one_word(value: str) -> str:
    if len(value.split()) != 1 or value.strip() != value:
        raise ValueError("must be one word")
    return value


def _one_line(value: str) -> str:
    if not value.strip() or len(value.splitlines()) != 1:
        raise ValueError("must be one line of text")
    return value


Word = Annotated[str, AfterValidator(_one_word)]
Line = Annotated[str, AfterValidator(_one_line)]

OURS = {
    "array": "array_parallelism", "job-name": "", "comment": "", "output": "", "error": "", "open-mode": "", "requeue": "",
    "no-requeue": "", "wrap": "", "parsable": "", "wait": "", "test-only": "", "dependency": "", "signal": "signal and signal_lead_seconds",
    "nodes": "nodes", "ntasks": "tasks_per_node", "ntasks-per-node": "tasks_per_node", "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_task", "mem": "mem_gb", "time": "time_minutes", "partition": "partition", "account": "account",
    "qos": "qos", "constraint": "constraint", "clusters": "a login node of that cluster",
}  # fmt: skip
"""sbatch's options that wrbench gives itself, and the key of a cluster file that stands for each"""


OF_CHAIN = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "time_minutes": 60, "signal_lead_seconds": 60}
"""what the job of --chain asks for, beside partition, account and the like; on one CPU, and for the partition's memory"""


class Slurm(Frozen):
    """configs/cluster/NAME.yaml for a SLURM cluster. What a site does not ask for is left out of the script."""

    executor: Literal["slurm"]
    nodes: Whole = Field(1, ge=1, description="of a trial, for studies that do not say `ranks`", examples=[2])
    gpus_per_node: Whole | None = Field(None, ge=1, description="of a full node, one task each; null: tasks on the CPU", examples=[8])
    tasks_per_node: Whole | None = Field(None, ge=1, description="of a full node; null: gpus_per_node, or without GPUs one", examples=[8])
    cpus_per_task: Whole = Field(1, ge=1, examples=[8])
    threads_per_rank: Whole = Field(1, ge=1, description="CPU threads of torch in each rank; part of bit-equality on CPU", examples=[1])
    mem_gb: Number | None = Field(None, ge=0.001, le=100_000, description="memory a node; null: the partition's default", examples=[64])
    time_minutes: Whole = Field(ge=1, description="limit of one life of a job; it is requeued and goes on", examples=[720])
    partition: Word | None = Field(None, examples=["gpu"])
    account: Word | None = Field(None, examples=["vision"])
    qos: Word | None = Field(None, examples=["normal"])
    constraint: Word | None = Field(None, examples=["a100"])
    array_parallelism: Whole | None = Field(
        None, ge=1, description="tasks of one submission at a time; null: as many as fit", examples=[16]
    )
    trials_per_task: Whole = Field(1, ge=1, description="small trials that share an array task, one after the other", examples=[4])
    setup: tuple[Line, ...] = Field((), description="shell lines of the batch script, before anything else", examples=[["module load gcc"]])
    srun_args: tuple[Line, ...] = Field((), description="added to srun for the ranks", examples=[["--distribution=block:block"]])
    python: Line | None = Field(
        None,
        description="the ranks' Python, as a command; null: the one that submits. For a container: the one in it",
        examples=["python3"],
    )
    sbatch: dict[str, Any] = Field(
        {}, description="any other long option of sbatch -> its value; true: an option without one", examples=[{"exclude": "n1"}]
    )
    signal: Literal["USR2", "USR1", "TERM", "INT", "HUP", "URG"] = Field(
        "USR2", description="tells the ranks to save themselves before the time limit; NCCL catches USR1", examples=["USR2"]
    )
    signal_lead_seconds: Whole = Field(120, ge=10, le=65535, description="before the limit; SLURM may be a minute early", examples=[120])
    max_timeouts: Whole = Field(20, ge=0, description="lives that may end at the time limit; past it a trial is `exhausted`", examples=[20])
    max_retries: Whole = Field(3, ge=0, description="in a row, without a new checkpoint between, before a trial is given up", examples=[3])
    stall_timeout_seconds: Whole = Field(
        900, ge=5, description="without a line in the journal ranks are killed; above the longest start, evaluation or save", examples=[900]
    )
    overrides: dict[Literal["search", "finalists", "chain"], dict[str, Any]] = Field(
        {}, description="other values for the trials of a phase, or for the job that --chain adds", examples=[{"finalists": {"nodes": 2}}]
    )

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, given in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
                raise ValueError(f"{key}: is no long option of sbatch; e.g. exclude")
            if key in OURS:
                raise ValueError(f"{key}: is given by wrbench itself" + (f"; use {OURS[key]}" if OURS[key] else ""))
            if given is not True and (not isinstance(given, str | int) or given is False or "\n" in str(given)):
                raise ValueError(f"{key}: {shown(given)} must be a line of text, a number or true; e.g. {{exclude: n1}}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            shlex.split(self.python or "")
        except ValueError as error:
            raise ValueError(f"python: {shown(self.python)} is no command of a shell: {error}") from None
        if self.signal_lead_seconds >= 60 * self.time_minutes:
            raise ValueError(
                f"signal_lead_seconds: {self.signal_lead_seconds} must be below time_minutes, {60 * self.time_minutes} s; "
                f"e.g. {max(10, 30 * self.time_minutes)}"
            )
        for phase in self.overrides:
            self.of_phase(phase)
        return self

    def of_phase(self, phase: str) -> Slurm:
        """What holds for the trials of a phase, or for the job of --chain: this, with its overrides. Raises ValueError for one that
        cannot be."""
        own: dict[str, Any] = {**self.overrides}.get(phase, {})  # type: ignore[call-overload]
        if unknown := sorted(set(own) - (set(type(self).model_fields) - {"executor", "overrides"})):
            raise ValueError(f"overrides.{phase}.{unknown[0]}: unknown key")
        trials_only, first = ({"gpus_per_node", "mem_gb"}, OF_CHAIN) if phase == "chain" else (set(), {})
        document = self.model_dump(exclude_unset=True, exclude={"overrides", *trials_only}) | first | own
        try:
            return Slurm.model_validate(document)
        except ValidationError as error:
            raise ValueError("; ".join(f"overrides.{phase}.{line}" for line in _explain(error, Slurm, str))) from None

    def shape(self, ranks: int | None) -> Shape:
        """The nodes and tasks that a trial of `ranks` processes takes. Raises BadInput when they do not fill nodes evenly."""
        full = self.tasks_per_node or self.gpus_per_node or (ranks if ranks is not None and self.nodes == 1 else 1)
        if ranks is None:
            return Shape(self.nodes, full, self.gpus_per_node and full, self)
        nodes = -(-ranks // full)
        if ranks % nodes:
            raise BadInput(f"ranks: {ranks} do not fill nodes of {full} tasks evenly; e.g. {ranks // full * full} or {nodes * full}")
        tasks = ranks // nodes
        return Shape(nodes, tasks, self.gpus_per_node and min(tasks, self.gpus_per_node), self)


@dataclass(frozen=True)
class Shape:
    """What one array asks of the scheduler for each of its tasks."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int | None
    cluster: Slurm

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node


Cluster = Local | Slurm


def read_cluster(name: str) -> Cluster:
    """The cluster file of a name in configs/cluster, or of a path."""
    path = find("cluster", name)
    document = read_yaml(path)
    executor = document.get("executor", "local")
    if executor not in ("local", "debug", "slurm"):
        raise BadInput(f"{path}: executor: {shown(executor)} is not known; valid: debug, local, slurm")
    return parse(Slurm, document, str(path)) if executor == "slurm" else parse(Local, document, str(path))


# ------------------------------------------------------------------------------------ files and their errors


class _UniqueKeys(yaml.SafeLoader):
    """safe_load that refuses a key written twice instead of keeping the last, and what contains itself."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # in the order of the file: a merge changes the nodes it merges

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if key_node.tag == "tag:yaml.org,2002:merge" else self.construct_object(key_node)
            if isinstance(key, list | dict):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {shown(key)} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # a date without such a day, a number of 5,000 digits
        raise yaml.YAMLError(error) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; BadInput when it is absent, unreadable, not YAML or not a mapping."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: must be a mapping of keys to values, is {type(value).__name__}")
    return value


CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def dotted(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find(kind: Literal["workload", "study", "cluster"], name: str) -> Path:
    """The file of a name in configs/KIND, or of a path (anything with a suffix or a slash)."""
    as_path = Path(name)
    if as_path.suffix in (".yaml", ".yml") or "/" in name:
        if as_path.is_file():
            return as_path
        raise BadInput(f"{kind}: {name}: {'is not a regular file' if as_path.exists() else 'no such file'}")
    path = CONFIGS / kind / f"{name}.yaml"
    if path.is_file():
        return Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    known = sorted(p.stem for p in path.parent.glob("*.yaml"))
    raise BadInput(f"{kind}: {shown(name)} is not in configs/{kind}; {_suggest(name, known)}")


def parse(model: type[M], value: dict[str, Any], source: str, rename: Callable[[str], str] = str) -> M:
    """`value` as a `model`; BadInput with a line a mistake. `rename` maps a dotted key to where the user wrote it."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise BadInput("\n".join(f"{source}: {line}" for line in _explain(error, model, rename))) from None


_DOTTED = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*")


def _explain(error: ValidationError, model: type[BaseModel], rename: Callable[[str], str]) -> Iterator[str]:
    for e in error.errors():
        owner, keys, field = _locate(model, tuple(_cut(part) if isinstance(part, str) else part for part in e["loc"]))
        key, message, kind = rename(".".join(keys)), e["msg"], e["type"]
        if kind == "extra_forbidden":
            yield f"{key}: unknown key; {_suggest(keys[-1], sorted(owner.model_fields))}"
        elif kind == "missing":
            yield f"{key}: missing; {_example(field) or 'give a value'}"
        elif kind == "union_tag_invalid":
            tag = e["ctx"]["tag"]
            yield f"{key}.name: {shown(tag)} is not known; {_suggest(tag, e['ctx']['expected_tags'].replace(chr(39), '').split(', '))}"
        elif kind == "union_tag_not_found":
            yield f"{key}.name: missing; {_suggest('', sorted(_tags(field)))}"
        elif kind == "value_error":
            text = message.removeprefix("Value error, ")
            if not keys:
                written, colon, rest = text.partition(":")
                yield rename(written) + colon + rest if _DOTTED.fullmatch(written) else text
            elif isinstance(e["input"], dict | BaseModel):
                yield f"{key}.{text}"
            else:
                yield f"{key}: {shown(e['input'])} {text}; {_example(field)}".removesuffix("; ")
        else:
            constraint = message[0].lower() + message[1:]
            constraint = constraint.removeprefix("input ").replace("should be", "must be").replace("should have", "must have")
            if kind in ("model_type", "dict_type"):
                constraint = "must be a mapping of keys to values"
            yield f"{key}: {shown(e['input'])} {constraint}; {_example(field)}".removesuffix("; ")


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str], FieldInfo | None]:
    """(the model that owns the key, the key's parts without pydantic's union tags, its field if known)."""
    owner: Any = model
    keys: list[str] = []
    field: FieldInfo | None = None
    inside: tuple[Any, ...] = (model,)
    in_mappings = 0
    for part in loc:
        models = [m for m in inside if isinstance(m, type) and issubclass(m, BaseModel)]
        tagged = [m for m in models if part in (_tag(m), m.__name__)] if len(models) > 1 else []
        if tagged:
            inside = (tagged[0],)
            owner = tagged[0]
            continue
        if part == "[key]":
            continue
        keys.append(str(part))
        if in_mappings:
            in_mappings -= 1
        elif models and isinstance(part, str):
            owner = models[0]
            field = owner.model_fields.get(part)
            inside = tuple(_leaves(field.annotation)) if field else ()
            in_mappings = _nested(field.annotation) if field else 0
    return owner, keys, field


def _nested(annotation: Any) -> int:
    """How many mappings, one in the other."""
    return 1 + _nested(get_args(annotation)[1]) if get_origin(annotation) is dict else 0


def _leaves(annotation: Any) -> Iterator[Any]:
    """The classes inside unions, containers and Annotated."""
    if get_origin(annotation) is None:
        yield annotation
        return
    for inner in get_args(annotation):
        if isinstance(inner, type) or get_origin(inner) is not None or isinstance(inner, types.UnionType):
            yield from _leaves(inner)


def _tag(model: type[BaseModel]) -> str:
    """The value of a model's discriminator: its literal `name`, or its first field (a dimension of a space)."""
    name = model.model_fields.get("name")
    return str(get_args(name.annotation)[0]) if name and get_origin(name.annotation) is Literal else next(iter(model.model_fields), "")


def _tags(field: FieldInfo | None) -> list[str]:
    return [_tag(m) for m in _leaves(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)] if field else []


def _example(field: FieldInfo | None) -> str:
    return f"e.g. {field.examples[0]}" if field and field.examples else ""


def _suggest(written: str, known: Sequence[str]) -> str:
    return f"{did_you_mean(written, known)}valid: {', '.join(known)}"


def did_you_mean(written: str, known: Sequence[str]) -> str:
    """A question with a space after it; empty where nothing known is like what is written."""
    close = difflib.get_close_matches(written, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
