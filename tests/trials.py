"""Small resolved trials for tests, and what stops them."""

from __future__ import annotations

from typing import Any

from harness.config import OF_COLOUR, Trial, parse
from harness.stopping import StopRequest

DATA = {
    "name": "mnist5k", "path": "data/mnist5k", "num_classes": 10, "image_size": 28, "channels": 1,
    "train_samples": 4000, "holdout_per_class": 50, "val_samples": 1000, "mean": [0.1315], "std": [0.3087],
}  # fmt: skip


def trial(**over: Any) -> Trial:
    """A resolved trial of mnist5k_cnn; `over` replaces top-level blocks, `data` and `recipe` update the workload's,
    `model` names its model, which gets RGB where it needs it."""
    model = over.pop("model", "mnist5k_cnn")
    rgb = {"channels": 3, "mean": [0.1315] * 3, "std": [0.3087] * 3} if model in OF_COLOUR else {}
    document: dict[str, Any] = {
        "workload": {
            "name": "mnist5k_cnn",
            "data": DATA | rgb | over.pop("data", {}),
            "model": {"name": model},
            "recipe": over.pop("recipe", {}),
        },
        "optimizer": {"name": "adam", "lr": 1e-3},
        "decay": {"name": "decoupled", "weight_decay": 0.05, "normalised": True},
        "schedule": {"name": "cosine_restarts", "t_0": 1, "t_mult": 2},
        "budget": {"epochs": 7, "global_batch_size": 100},
    } | over
    return parse(Trial, document, "test")


class Told(StopRequest):
    """To stop, once the loop has asked so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    @property
    def signal(self) -> str | None:
        self._left -= 1
        return "USR2" if self._left < 0 else None
