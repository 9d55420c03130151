"""A data set of small photographs, and batches of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from harness.config import Trial
from harness.data import fixture, loader, shards
from tests import tars
from tests.trials import trial as resolved

TRAIN, VAL, BATCH, SIZE, RESIZE = 62, 11, 24, 32, 40
RECIPE: dict[str, Any] = {"crop": {}, "flip": True}
GROWING = RECIPE | {"resolution": {"start": 16, "epochs": [0, 4], "multiple": 4}}
"""sizes by epoch: 16, 20, 24, 28, 32, 32, ..."""
PHOTO = np.array(load_sample_image("china.jpg"))


def make(folder: Path) -> Path:
    """62 and 11 small photographs, JPEG but for some odd files; a sample's label is its number, so that it can be told."""
    rng = np.random.default_rng(0)
    kinds = [fixture.ODD[name] for name in fixture.ODD if name not in ("large JPEG", "tiny JPEG")]
    for split, count in (("train", TRAIN), ("val", VAL)):
        members = []
        for number in range(count):
            height, width = rng.integers(40, 90, 2)
            top, left = rng.integers(0, 300, 2)
            image = Image.fromarray(PHOTO[top : top + height, left : left + width])
            content = kinds[number // 5 % len(kinds)](image) if number % 5 == 0 else fixture._jpeg(image)
            members.append((f"{split}{number:03d}", {"jpg": content, "cls": str(number).encode()}))
        half = count // 2
        tars.write(folder / f"{split}-0.tar", members[:half])
        tars.write(folder / f"{split}-1.tar", members[half:])
    shards.index_shards(folder)
    return folder


def a_trial(folder: Path, recipe: dict[str, Any] | None = None, seed: int = 0, data: dict[str, Any] | None = None, **over: Any) -> Trial:
    about = {"path": str(folder), "num_classes": TRAIN, "image_size": SIZE, "resize": RESIZE, "channels": 3, "train_samples": TRAIN}
    about |= {"holdout_per_class": 0, "val_samples": VAL, "mean": [0.5] * 3, "std": [0.3] * 3, "name": "photographs", **(data or {})}
    budget = {"epochs": 30, "global_batch_size": BATCH}
    return resolved(data=about, model="resnet18", recipe=RECIPE if recipe is None else recipe, seed=seed, **{"budget": budget} | over)


def opened(trial: Trial, threads: int = 0) -> loader.DataSet:
    return loader.open_data(trial.workload.data, trial.workload.recipe, threads=threads)


def steps(trial: Trial, rank: int = 0, world_size: int = 1, start: int = 0, stop: int = 4, threads: int = 0) -> list[loader.Batch]:
    return list(loader.train_batches(opened(trial, threads), trial, rank, world_size, start, stop))


def same(a: list[loader.Batch], b: list[loader.Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for i, j in zip(a, b, strict=True) for x, y in zip(i, j, strict=True))
