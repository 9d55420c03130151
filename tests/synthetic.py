"""A study that nobody trained: journals with plausible curves, delivered to a real MLflow store. For tests of the analysis."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness import schedule, study, tracking
from harness.config import Trial
from harness.journal import Journal
from harness.store import Store, result_of, write_result

STUDY: dict[str, Any] = {
    "name": "synthetic",
    "workload": "mnist5k_cnn",
    "arms": {
        "AdamWR": {
            "optimizer": {"name": "adam"},
            "decay": {"name": "decoupled", "normalised": True},
            "schedule": {"name": "cosine_restarts", "t_0": 1, "t_mult": 2},
            "space": {"optimizer.lr": {"log_uniform": [0.001, 0.01]}, "decay.weight_decay": {"log_uniform": [0.0125, 0.4]}},
        },
        "SGDWR": {
            "optimizer": {"name": "sgd", "momentum": 0.9},
            "decay": {"name": "decoupled", "normalised": True},
            "schedule": {"name": "cosine_restarts", "t_0": 1, "t_mult": 2},
            "space": {"optimizer.lr": {"log_uniform": [0.01, 0.1]}, "decay.weight_decay": {"log_uniform": [0.0125, 0.4]}},
        },
    },
    "search": {"points": 4, "seeds": 1},
    "finalists": {"top": 1, "seeds": 5},
}

FINAL_ERROR = {"AdamWR": 0.046, "SGDWR": 0.052}
"""a fraction, at the end of the budget, of the first configuration of each arm"""


def write_study(store: Store, document: Mapping[str, Any]) -> study.LoadedStudy:
    """The study, stored as a submission stores it."""
    folder = store.study(document["name"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(dict(document), sort_keys=False))
    loaded = study.load(folder / "study.yaml")
    (folder / "study.yaml").write_text(loaded.text())
    return loaded


def error(trial: Trial, step: int, final: float) -> float:
    """A fraction, after `step` steps: falls with the budget, dips where the learning rate does."""
    eta, _, _ = schedule.schedule(trial, step - 1)
    progress = step / schedule.total_steps(trial)
    return final + 0.22 * math.exp(-6 * progress) + 0.035 * eta * (1 - 0.5 * progress)


def write_trial(
    store: Store,
    trial: Trial,
    state: str = "finished",
    final: float = 0.05,
    until: float = 1.0,
    start: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """One attempt of `trial`: its journal up to the share `until` of the budget, and its `state` (interrupted: no end line).

    `start` adds to the start line; metrics whose name begins with one of `without` are not logged.
    """
    folder = store.trial(trial.study, trial.trial_id)
    folder.write_config(trial)
    journal = Journal(folder.journal, trial.trial_id, folder.claim())
    rng = np.random.default_rng([trial.seed, zlib.crc32(f"{trial.arm} {trial.optimizer.lr}".encode())])
    total, per_epoch, ends = schedule.total_steps(trial), schedule.steps_per_epoch(trial), schedule.cycle_ends(trial)
    described = {"total_steps": total, "steps_per_epoch": per_epoch, "world_size": 2, "micro_batch_size": 50, "backend": "ddp"}
    described |= {"zero_stage": 0, "device": "cpu", "host": "here", "commit": "c0ffee1", "data_sha256": "d1"}
    journal.write(0, event="start", resumed_from=0, **described, **(start or {}))
    answer: dict[str, float] = {}
    offsets = {split: final - 0.05 + rng.normal(0, 0.003) for split in ("holdout", "val")}
    last = round(until * total)
    for done in range(1, last + 1):
        metrics: dict[str, float] = {}
        if (done - 1) % trial.evaluation.log_every_steps == 0:
            eta, cycle, lam = schedule.schedule(trial, done - 1)
            metrics |= {"train/loss": 2.3 * error(trial, done, 0.03) + rng.normal(0, 0.01), "schedule/eta": eta, "schedule/cycle": cycle}
            metrics |= {"schedule/weight_decay": lam, "schedule/lr": eta * trial.optimizer.lr, "time/train_seconds": 0.05 * done}
        if done % per_epoch == 0 or done in ends:
            for split, images in (("holdout", 500), ("val", 1000)):
                wrong = round(images * min(0.9, error(trial, done, 0.05) + offsets[split] + rng.normal(0, 0.001)))
                share = wrong / images
                metrics |= {f"{split}/top1": 1 - share, f"{split}/top5": 1 - share / 9, f"{split}/loss": 3 * share}
            if done in ends:
                answer = {f"anytime/{split}_top1": metrics[f"{split}/top1"] for split in ("holdout", "val")}
                metrics |= {"train_eval/loss": 2 * error(trial, done, 0.02), "weights/norm": 20.0}
            metrics |= {"epoch": done / per_epoch, **answer}
            if not trial.evaluation.val:
                metrics = {name: value for name, value in metrics.items() if not name.startswith(("val/", "anytime/val_"))}
        if state == "diverged" and done == last:
            metrics = {"train/loss": math.nan, "val/loss": math.inf}
        kept = {name: value for name, value in metrics.items() if not name.startswith(without)} if without else metrics
        if kept:
            journal.write(done - 1, metrics=kept)
        if done % per_epoch == 0:
            journal.write(done, event="checkpoint")
    if state != "interrupted":
        message = {"failed": "RuntimeError: node_7 lost <power> & 50 % of its disks", "diverged": "train/loss is nan"}.get(state)
        journal.write(last - 1, event="end", state=state, error=message)
        write_result(folder, result_of(trial, state, last, folder.newest_attempt(), {}, error=message))
    journal.close()


def write_store(root: Path) -> Store:
    """STUDY with a failed and a diverged search trial, a finalist that was killed at epoch 4.2 and one that never started."""
    store = Store(root)
    loaded = write_study(store, STUDY)
    search = [p.trial for p in study.planned(loaded, {}) if p.trial is not None]
    for place, trial in enumerate(search):
        final = FINAL_ERROR[trial.arm] + 0.01 * (place % 4)
        if place == 3:
            write_trial(store, trial, "failed", final, until=0.4)
        elif place == 6:
            write_trial(store, trial, "diverged", final, until=0.25)
        else:
            write_trial(store, trial, final=final)
    finalists = [p.trial for p in study.planned(loaded, store.results(loaded.name)) if p.trial and p.phase == "finalists"]
    for place, trial in enumerate(finalists):
        if place == 3:
            write_trial(store, trial, "interrupted", until=0.6)
        elif place != 4:
            write_trial(store, trial, final=FINAL_ERROR[trial.arm])
    tracking.deliver(store, loaded.name)
    return store


GRID = {"optimizer.lr": {"log_uniform": [0.0003, 0.03], "num": 5}, "decay.weight_decay": {"log_uniform": [0.0001, 0.01], "num": 5}}
MAPS: dict[str, Any] = {
    "name": "maps",
    "workload": "mnist5k_cnn",
    "arms": {
        "Adam": {"optimizer": {"name": "adam"}, "decay": {"name": "l2"}, "schedule": {"name": "cosine"}, "space": GRID},
        "AdamW": {"optimizer": {"name": "adam"}, "decay": {"name": "decoupled"}, "schedule": {"name": "cosine"}, "space": GRID},
    },
    "sampler": {"name": "grid"},
    "search": {"seeds": 2},
    "budget": {"epochs": 1},
    "evaluation": {"log_every_steps": 100},
}
"""Adam's basin lies along a diagonal, AdamW's along the axes."""


def write_maps(root: Path) -> Store:
    store = Store(root)
    loaded = write_study(store, MAPS)
    for trial in (p.trial for p in study.planned(loaded, {}) if p.trial is not None):
        x, y = 2 * math.log10(trial.optimizer.lr / 0.003), 2 * math.log10(getattr(trial.decay, "weight_decay", 1.0) / 0.001)
        final = 0.05 + (0.01 * (x + y) ** 2 + 0.002 * (x - y) ** 2 if trial.arm == "Adam" else 0.01 * (x * x + y * y))
        diverges = trial.arm == "Adam" and x + y > 3.9
        write_trial(store, trial, "diverged" if diverges else "finished", final, until=0.5 if diverges else 1.0)
    tracking.deliver(store, loaded.name)
    return store
