"""Records -> two tidy tables: a row a trial, a row a (trial, step).

MLflow is what is read (tracked.py); the journals in the store are what it is checked against (`check`). A trial that the study plans
but that never started, was killed, failed or diverged is a row with its state, never an absence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tracked import Run, tracked
from analysis.tracked import Unreadable as Unreadable
from harness import journal, schedule, tracking
from harness.config import BadInput, Trial, dotted
from harness.store import ENDED, Store, TrialFolder
from harness.study import LoadedStudy, load, planned

LOGGED_BY_STEP = ("train/", "schedule/", "time/", "data/", "speed/images_per_second")
"""Metrics with a value every few steps; all others stand at evaluations only."""

UNDELIVERED = "undelivered"
"""of a trial that has finished, and whose last points MLflow lacks"""

BASE = ("trial_id", "arm", "phase", "seed", "state", "planned", "config", "run_id", "attempts", "step", "total_steps", "last_error")
"""The first columns of the table of trials."""

CHECKED = (
    "trial_id",
    "arm",
    "run_id",
    "in_journal",
    "lacking",
    "differing",
    "extra",
    "state_in_journal",
    "state_in_mlflow",
    "agrees",
    "says",
)
"""The columns of `check`."""

StudyName = str | Path | LoadedStudy


def trials(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None) -> pd.DataFrame:
    """A row a trial: those the study plans, in its order, then those in the store that it no longer plans.

    `study` is the name of a study in the store (as it was submitted, STORE/NAME/study.yaml), a study file or a loaded
    study. `tracking_uri` is MLFLOW_TRACKING_URI unless given, else STORE/mlflow.db.

    Columns: BASE, then the resolved parameters under their dotted keys (optimizer.lr), MLflow's tags as tag.NAME, and the
    metrics under their names at the last cycle the trial completed, NaN where there is none. `config` is the same for all
    seeds of one configuration; `step` counts the steps MLflow knows of; `trial_id` is missing for a finalist that the
    search has not decided yet. A trial that has finished is `undelivered` until MLflow has all of its points: what it has is an
    earlier answer. Raises BadInput for a study that is not there, Unreadable when MLflow cannot be read.
    """
    return read(study, store, tracking_uri).trials


def history(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None) -> pd.DataFrame:
    """A row a (trial, step) with a value: trial_id, arm, seed, phase, step, epoch, then a column a metric.

    `step` is the 0-based optimizer step that a value follows, `epoch` = (step + 1) / steps_per_epoch. NaN where a metric
    has no value at a step or its value is NaN. Arguments and errors as for `trials`.
    """
    return read(study, store, tracking_uri).history


def check(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None) -> pd.DataFrame:
    """A row a trial that left a journal or a run: how MLflow compares with the journal's final points.

    Columns: trial_id, arm, run_id, in_journal (final points), lacking (of those, not in MLflow), differing (other value),
    extra (in MLflow only), state_in_journal, state_in_mlflow, agrees, and says: one line, empty where all agrees. Points
    after the last checkpoint of a trial that goes on are not final and not missed. Arguments and errors as for `trials`.
    """
    return read(study, store, tracking_uri).check()


# -------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Records:
    """All that is known of a study, read once."""

    study: LoadedStudy
    store: Store
    runs: Mapping[str, Run]
    """trial id -> its MLflow run"""
    points: pd.DataFrame
    """MLflow's points, as `tracked` has them: trial_id, metric, step, value; one a (trial_id, metric, step), in this order"""
    configs: Mapping[str, Trial]
    """trial id -> resolved config, where one is known"""
    trials: pd.DataFrame

    @cached_property
    def history(self) -> pd.DataFrame:
        # what DataFrame.pivot does, in a fraction of its time and memory: ten million points are no rare study
        points = self.points
        place, steps = pd.factorize(points.step.to_numpy(), sort=True)  # negative and huge steps too, should somebody log them
        row, keys = pd.factorize(points.trial_id.cat.codes.to_numpy(np.int64) * len(steps) + place, sort=True)
        values = np.full((len(keys), len(points.metric.cat.categories)), np.nan)
        values[row, points.metric.cat.codes] = points.value
        trial_ids, trial = points.trial_id.cat.categories, keys // max(1, len(steps))
        step = steps[keys % max(1, len(steps))]
        per_epoch = [schedule.steps_per_epoch(self.configs[i]) if i in self.configs else np.nan for i in trial_ids]
        wide = pd.DataFrame(values, columns=list(points.metric.cat.categories))
        epoch = pd.Series((step + 1) / np.array(per_epoch, float)[trial]).fillna(wide.pop("epoch") if "epoch" in wide else np.nan)
        wide.insert(0, "trial_id", trial_ids.take(trial))
        wide.insert(1, "step", step)
        wide.insert(2, "epoch", epoch)
        known = self.trials.loc[self.trials.trial_id.notna(), ["trial_id", "arm", "seed", "phase"]]
        return known.merge(wide, on="trial_id", how="inner")

    def check(self) -> pd.DataFrame:
        rows = []
        for folder in self.store.trials(self.study.name):
            trial_id = folder.path.name
            if (record := journal.fold(journal.read(folder.journal))).starts:
                rows.append({"trial_id": trial_id} | _compared(record, self.runs.get(trial_id), self._points_of(trial_id)))
        seen = {row["trial_id"] for row in rows}
        for trial_id in sorted(self.runs.keys() - seen):
            rows.append({"trial_id": trial_id} | _unjournalled(self.runs[trial_id], self._points_of(trial_id)))
        out = pd.DataFrame(rows, columns=list(CHECKED))
        return out.assign(arm=out.trial_id.map(self.trials.set_index("trial_id").arm.to_dict()))

    def _points_of(self, trial_id: str) -> dict[tuple[str, int], float]:
        """(metric, step) -> value"""
        code = self.points.trial_id.cat.categories.get_indexer(pd.Index([trial_id]))  # -1 if it has none
        first, last = np.searchsorted(self.points.trial_id.cat.codes, [code[0], code[0] + 1])
        mine = self.points.iloc[first:last]
        return dict(zip(zip(mine.metric, mine.step, strict=True), mine.value, strict=True))


def read(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None) -> Records:
    """What `trials`, `history` and `check` are made of, in one pass. Arguments and errors as for `trials`."""
    home = Store(Path(store))
    loaded = _find(study, home)
    uri = tracking_uri or tracking.tracking_uri(home)
    runs, points = tracked(loaded.name, uri, home.study(loaded.name) / "cache" / "points.parquet")
    folders = {folder.path.name: folder for folder in home.trials(loaded.name)}
    answers = points[points.metric == "anytime/holdout_top1"].drop_duplicates("trial_id", keep="last").set_index("trial_id").value.to_dict()
    standing = {i: _standing(runs.get(i), folders.get(i), answers.get(i)) for i in {**runs, **folders}}

    plan = planned(loaded, {i: s.answer for i, s in standing.items() if s.state in ENDED})
    ids = [p.trial.trial_id if p.trial else None for p in plan]
    configs = {i: p.trial for i, p in zip(ids, plan, strict=True) if i is not None and p.trial is not None}
    left_over = [i for i in standing if i not in configs]
    configs.update({i: config for i in left_over if (config := _config(folders.get(i))) is not None})

    rows = [_identity(i, p.arm, p.phase, p.seed, True) for i, p in zip(ids, plan, strict=True)]
    rows += [_left_over(i, configs.get(i), runs.get(i)) for i in sorted(left_over)]
    final = _at_last_cycle(points, configs)
    steps = _steps(points)
    for row in rows:
        row |= _facts(standing.get(row["trial_id"]), configs.get(row["trial_id"]), runs.get(row["trial_id"]), steps.get(row["trial_id"], 0))
        row |= final.get(row["trial_id"], {})
    return Records(loaded, home, runs, points, configs, _ordered(pd.DataFrame(rows)))


def _find(study: StudyName, store: Store) -> LoadedStudy:
    if isinstance(study, LoadedStudy):
        return study
    stored = store.study(str(study)) / "study.yaml"
    if stored.is_file():
        return load(stored)
    if Path(study).is_file():
        return load(study)
    known = sorted(p.parent.name for p in store.root.glob("*/study.yaml"))
    raise BadInput(f"study: {str(study)!r} is neither in the store {store.root} nor a file; in the store: {', '.join(known) or 'none'}")


def _config(folder: TrialFolder | None) -> Trial | None:
    try:
        return folder.read_config() if folder else None
    except BadInput:  # written by another version: the trial is a row all the same
        return None


@dataclass(frozen=True)
class _Standing:
    state: str
    answer: float | None
    """holdout/top1 at the last completed cycle of a finished trial"""
    last_error: str | None = None
    attempts: int = 0
    delivered: bool = True


def _standing(run: Run | None, folder: TrialFolder | None, answer: float | None) -> _Standing:
    """Where a trial stands: as MLflow has it once it has ended, else as its own journal says, which is ahead of MLflow."""
    attempts = int(run.tags.get("attempt", 0)) if run else 0
    if run and run.state == "finished" and answer is not None:
        return _Standing("finished", answer, None, attempts)
    if folder is None:
        return _Standing(run.state if run else "pending", None, None, attempts)
    own = folder.state()
    found = own.answer.get("anytime/holdout_top1") if own.state == "finished" else None
    delivered = own.state != "finished" or (run is not None and run.state == "finished")  # said last, after all points
    return _Standing(own.state, found, own.last_error, max(attempts, own.attempts), delivered)


def _identity(trial_id: str | None, arm: str | None, phase: str | None, seed: int | None, in_plan: bool) -> dict[str, Any]:
    return {"trial_id": trial_id, "arm": arm, "phase": phase, "seed": seed, "planned": in_plan}


def _left_over(trial_id: str, config: Trial | None, run: Run | None) -> dict[str, Any]:
    if config is not None:
        return _identity(trial_id, config.arm, config.phase, config.seed, False)
    tags = run.tags if run else {}
    seed = tags.get("seed", "")
    return _identity(trial_id, tags.get("arm"), tags.get("phase"), int(seed) if seed.isdigit() else None, False)


def _facts(standing: _Standing | None, config: Trial | None, run: Run | None, steps: int) -> dict[str, Any]:
    state = "pending" if standing is None else standing.state if standing.delivered else UNDELIVERED
    facts: dict[str, Any] = {
        "state": state,
        "run_id": run.run_id if run else None,
        "attempts": standing.attempts if standing else 0,
        "step": steps,
        "last_error": standing.last_error if standing else None,
    }
    if config is not None:
        parameters = config.model_dump(include={"workload", "optimizer", "decay", "schedule", "budget"})
        facts |= {"config": config.configuration, "total_steps": schedule.total_steps(config)}
        facts |= {key: str(value) if isinstance(value, Path) else value for key, value in dotted(parameters)}
    if run is not None:
        known = {"study", "arm", "seed", "phase", "trial_id", "attempt", "state"}
        facts |= {f"tag.{k}": v for k, v in run.tags.items() if k not in known and not k.startswith("mlflow.")}
    return facts


def _at_last_cycle(points: pd.DataFrame, configs: Mapping[str, Trial]) -> dict[str, dict[str, float]]:
    """trial id -> metrics at the end of the last cycle that MLflow has all of.

    A metric of evaluations must stand at that very step, so that an older evaluation never passes for the answer; one
    that is logged every few steps counts with its newest value until then.
    """
    reached = _steps(points)
    last = {
        i: max((end for end in schedule.cycle_ends(config) if end <= reached.get(i, 0)), default=0) - 1 for i, config in configs.items()
    }
    end = np.array([last.get(i, -1) for i in points.trial_id.cat.categories], np.int64)[points.trial_id.cat.codes]
    by_step = np.array([name.startswith(LOGGED_BY_STEP) for name in points.metric.cat.categories], bool)[points.metric.cat.codes]
    chosen = points[((points.step == end) | (by_step & (points.step < end))) & (points.metric != "epoch")]
    chosen = chosen.drop_duplicates(["trial_id", "metric"], keep="last")
    out: dict[str, dict[str, float]] = {}
    for trial_id, metric, _, value in chosen.itertuples(index=False):
        out.setdefault(trial_id, {})[metric] = value
    return out


def _steps(points: pd.DataFrame) -> dict[str, int]:
    """trial id -> steps that MLflow knows of"""
    return {str(trial_id): int(step) + 1 for trial_id, step in points.groupby("trial_id", observed=True).step.max().items()}


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """BASE first, then parameters, tags and metrics, each sorted; the columns the report needs are always there."""
    needed = ["anytime/holdout_top1", "anytime/val_top1"]
    names = {*table.columns, *BASE, *needed} - set(BASE)
    rank = sorted(names, key=lambda name: ("/" in name, name.startswith("tag."), name))
    table = table.reindex(columns=[*BASE, *rank])
    return table.astype({"seed": "Int64", "total_steps": "Int64", **{name: float for name in rank if "/" in name}})


# ---------------------------------------------------------------------------------------------------- check


def _compared(record: journal.Record, run: Run | None, points: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    final = {(p.metric, p.step): float(p.value) for p in record.settled}
    lacking = [key for key in final if key not in points]
    differing = [key for key, value in final.items() if key in points and not _same(value, points[key])]
    extra = [key for key in points if key not in final]
    state = str(record.end["state"]) if record.end else "interrupted"
    ended_otherwise = run is not None and record.end is not None and run.state != state
    says = [
        "no run in MLflow" if run is None else "",
        _counted(lacking, "not in MLflow"),
        _counted(differing, "with another value in MLflow"),
        _counted(extra, "in MLflow and not final in the journal"),
        f"{state} in the journal, {run.state} in MLflow" if ended_otherwise and run is not None else "",
    ]
    return {
        "run_id": run.run_id if run else None,
        "in_journal": len(final),
        "lacking": len(lacking),
        "differing": len(differing),
        "extra": len(extra),
        "state_in_journal": state,
        "state_in_mlflow": run.state if run else None,
        "agrees": not any(says),
        "says": "; ".join(filter(None, says)),
    }


def _unjournalled(run: Run, points: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "in_journal": 0,
        "lacking": 0,
        "differing": 0,
        "extra": len(points),
        "state_in_mlflow": run.state,
        "agrees": False,
        "says": "in MLflow without a journal in this store",
    }


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


def _counted(keys: Iterable[tuple[str, int]], what: str) -> str:
    """'3 points not in MLflow (first: val/top1 at step 34)'."""
    found = sorted(keys, key=lambda key: (key[1], key[0]))
    if not found:
        return ""
    metric, step = found[0]
    return f"{len(found)} point{'s' if len(found) > 1 else ''} {what} (first: {metric} at step {step})"
