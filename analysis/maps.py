"""Grid searches over learning rate and weight decay -> maps of error, and how far the two decouple in each."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
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
    in_torch_units: Map | None = None
    """of raw decoupled decay in paper units: the same runs over torch's weight_decay = lambda / alpha, the positive control"""


def maps(records: Records) -> tuple[Map, ...]:
    """A map an arm whose space is a grid over exactly learning rate and weight decay, above 0, in the order of the study."""
    return tuple(_map(name, rows[_has_place(rows)], records) for name, rows in _grids(records) if _has_place(rows).any())


def off_axes(records: Records) -> dict[str, int]:
    """arm -> configurations of its grid with a learning rate or a decay of 0, which has no place on a logarithmic axis, if any."""
    counts = {name: rows[~_has_place(rows)]["config"].nunique() for name, rows in _grids(records)}
    return {name: count for name, count in counts.items() if count}


def _grids(records: Records) -> Iterator[tuple[str, pd.DataFrame]]:
    """(arm, planned trials of its search) of each arm whose space is such a grid."""
    study, table = records.study.study, records.trials
    for name, arm in study.arms.items():
        if study.sampler.name == "grid" and arm.space.keys() == AXES:
            yield name, table[table.planned & (table.arm == name) & (table.phase == "search")]


def _has_place(rows: pd.DataFrame) -> pd.Series:
    return (rows["optimizer.lr"] > 0) & (rows["decay.weight_decay"] > 0)


def _map(name: str, rows: pd.DataFrame, records: Records) -> Map:
    study = records.study.study
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
    made = Map(name, lr, decay, decay_name, errors, split, _index(name, lr, decay, errors))
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
