"""Grid searches over learning rate and weight decay -> maps of error, and how far the two decouple in each."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.compare import errors_by_seed, searched
from analysis.estimate import Decoupling, decoupling_index
from analysis.runs import Records
from harness.config import Decoupled

AXES = {"optimizer.lr", "decay.weight_decay"}


@dataclass(frozen=True)
class Map:
    arm: str
    lr: NDArray[np.float64]
    """ascending"""
    weight_decay: NDArray[np.float64]
    """ascending, in the units that `decay_name` says"""
    decay_name: str
    errors: NDArray[np.float64]
    """(learning rates, decays, seeds), points: inf diverged, NaN lost or not there yet"""
    split: str
    """validation, or holdout where the study has finalists"""
    index: Decoupling
    off_axes: int = 0
    """configurations with a learning rate or a decay of zero, which has no place on a logarithmic axis"""
    in_torch_units: Map | None = None
    """of raw decoupled decay in paper units: the same runs over torch's weight_decay = lambda / alpha, the positive control"""


def maps(records: Records) -> tuple[Map, ...]:
    """A map an arm whose space is a grid over exactly learning rate and weight decay, in the order of the study."""
    study = records.study.study
    if study.sampler.name != "grid":
        return ()
    made = (_map(name, records) for name, arm in study.arms.items() if arm.space.keys() == AXES)
    return tuple(m for m in made if m is not None)


def _map(name: str, records: Records) -> Map | None:
    """None of an arm that trains without decay, or learning rate, throughout."""
    study = records.study.study
    table = records.trials
    rows = table[table.planned & (table.arm == name) & (table.phase == "search")]
    has_place = (rows["optimizer.lr"] > 0) & (rows["decay.weight_decay"] > 0)
    off_axes, rows = rows[~has_place]["config"].nunique(), rows[has_place]
    if rows.empty:
        return None
    metric, split = searched(records.study)
    lr = np.array(sorted(set(rows["optimizer.lr"])), dtype=float)
    decay = np.array(sorted(set(rows["decay.weight_decay"])), dtype=float)
    errors = np.full((len(lr), len(decay), len(study.search.seeds)), np.nan)
    for _, group in rows.groupby("config"):
        x, y = group["optimizer.lr"].iloc[0], group["decay.weight_decay"].iloc[0]
        for seed, error in errors_by_seed(group, metric).items():
            errors[np.searchsorted(lr, x), np.searchsorted(decay, y), study.search.seeds.index(seed)] = error
    trial = next(config for config in records.configs.values() if config.arm == name)
    normalised = isinstance(trial.decay, Decoupled) and trial.decay.normalised
    paper = isinstance(trial.decay, Decoupled) and not normalised and trial.decay.units == "paper"
    decay_name = "λ_norm" if normalised else "λ" if paper else "L2 coefficient" if trial.decay.name == "l2" else "torch weight_decay"
    made = Map(name, lr, decay, decay_name, errors, split, _index(name, lr, decay, errors), off_axes)
    return replace(made, in_torch_units=_in_torch_units(made)) if paper else made


def _index(name: str, lr: NDArray[np.float64], decay: NDArray[np.float64], errors: NDArray[np.float64]) -> Decoupling:
    return decoupling_index(errors, lr, decay, rng=np.random.default_rng(zlib.crc32(name.encode())))


def _in_torch_units(m: Map) -> Map | None:
    """None where the cells do not fall on a common grid there: the axes must have one ratio between neighbours."""
    units = np.array([[float(f"{d / a:.4g}") for d in m.weight_decay] for a in m.lr])
    axis = np.unique(units)
    if len(axis) > len(m.lr) + len(m.weight_decay):
        return None
    errors = np.full((len(m.lr), len(axis), m.errors.shape[2]), np.nan)
    for i in range(len(m.lr)):
        errors[i, np.searchsorted(axis, units[i])] = m.errors[i]
    return Map(m.arm, m.lr, axis, "torch weight_decay", errors, m.split, _index(m.arm, m.lr, axis, errors))
