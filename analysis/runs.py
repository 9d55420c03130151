"""Records -> two tidy tables: a row a trial, a row a (trial, step).

MLflow is what is read; the journals in the store are what it is checked against (`check`). A trial that the study plans
but that never started, was killed, failed or diverged is a row with its state, never an absence.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from harness import journal, schedule
from harness.config import BadInput, Trial
from harness.store import ENDED, Store, TrialFolder
from harness.study import LoadedStudy, load, planned

MLFLOW_INF = 1.797e308
"""MLflow stores an infinity as the largest double; what is at least this was one."""

LOGGED_BY_STEP = ("train/", "schedule/", "time/", "data/")
"""Metrics with a value every few steps; all others stand at evaluations only."""

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


class Unreadable(RuntimeError):
    """MLflow's records cannot be read; one line, without secrets."""


def trials(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None) -> pd.DataFrame:
    """A row a trial: those the study plans, in its order, then those in the store that it no longer plans.

    `study` is the name of a study in the store (as it was submitted, STORE/NAME/study.yaml), a study file or a loaded
    study. `tracking_uri` is MLFLOW_TRACKING_URI unless given, else STORE/mlflow.db.

    Columns: BASE, then the resolved parameters under their dotted keys (optimizer.lr), MLflow's tags as tag.NAME, and the
    metrics under their names at the last cycle the trial completed, NaN where there is none. `config` is the same for all
    seeds of one configuration; `step` counts the steps MLflow knows of; `trial_id` is missing for a finalist that the
    search has not decided yet. Raises BadInput for a study that is not there, Unreadable when MLflow cannot be read.
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


# --------------------------------------------------------------------------------------------------- MLflow


@dataclass(frozen=True)
class Run:
    """MLflow's record of one trial, its points aside."""

    run_id: str
    status: str
    """RUNNING | FINISHED | FAILED | KILLED | SCHEDULED"""
    start_time: int
    tags: Mapping[str, str]

    @property
    def state(self) -> str:
        """The trial's state as delivered; without the tag, what MLflow's own status can tell."""
        return self.tags.get("state") or {"FINISHED": "finished", "FAILED": "failed"}.get(self.status, "interrupted")


def _tracked(experiment: str, uri: str) -> tuple[dict[str, Run], pd.DataFrame]:
    """(trial id -> run, points) of an experiment; points: trial_id, metric, step, value, one a (trial_id, metric, step).

    Of several runs of one trial the one started last is read, the first by id among equals, as delivery writes it.
    Nothing tracked yet is empty, not an error.
    """
    embedded = uri.startswith("sqlite:///")
    try:
        runs, points = _from_sqlite(experiment, Path(uri.removeprefix("sqlite:///"))) if embedded else _from_server(experiment, uri)
    except Exception as error:  # sqlite3's, pandas', MLflow's, SQLAlchemy's, requests': none can be told from another here
        raise Unreadable("MLflow cannot be read: " + re.sub(r"://[^/\s]*@", "://***@", " ".join(str(error).split()))[:300]) from error
    runs.sort(key=lambda run: run.run_id, reverse=True)
    runs.sort(key=lambda run: run.start_time)
    by_trial = {run.tags["trial_id"]: run for run in runs if "trial_id" in run.tags}
    points["trial_id"] = points.pop("run_id").map({run.run_id: trial_id for trial_id, run in by_trial.items()}).astype("str")
    points = points.dropna(subset="trial_id").drop_duplicates(["trial_id", "metric", "step"], keep="last")
    value = points.value.astype(float)
    value = value.mask(value >= MLFLOW_INF, float("inf")).mask(value <= -MLFLOW_INF, float("-inf"))
    return by_trial, points.assign(value=value)[["trial_id", "metric", "step", "value"]]


def _from_sqlite(experiment: str, path: Path) -> tuple[list[Run], pd.DataFrame]:
    """(runs, points in the order they were logged) by read-only queries on MLflow's tables."""
    if not path.is_file():
        return [], pd.DataFrame(columns=["run_id", "metric", "step", "value"])
    of_study = (
        "JOIN runs r USING (run_uuid) JOIN experiments e USING (experiment_id) "
        "WHERE e.name = ? AND e.lifecycle_stage = 'active' AND r.lifecycle_stage = 'active'"
    )
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as db:
        tags: dict[str, dict[str, str]] = {}
        for run_id, key, value in db.execute(f"SELECT run_uuid, t.key, t.value FROM tags t {of_study}", [experiment]):  # noqa: S608
            tags.setdefault(run_id, {})[key] = value
        found = db.execute(f"SELECT run_uuid, r.status, r.start_time FROM runs s {of_study}", [experiment])  # noqa: S608
        runs = [Run(run_id, status, start, tags.get(run_id, {})) for run_id, status, start in found]
        points = pd.read_sql_query(
            "SELECT run_uuid AS run_id, m.key AS metric, m.step, CASE m.is_nan WHEN 1 THEN NULL ELSE m.value END AS value "  # noqa: S608
            f"FROM metrics m {of_study} ORDER BY m.timestamp, m.rowid",
            db,
            params=[experiment],
        )
    return runs, points


def _from_server(experiment: str, uri: str) -> tuple[list[Run], pd.DataFrame]:
    """As `_from_sqlite`, through MLflow's client: a call a metric of a run. A server that is down is not waited for."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow.tracking import MlflowClient  # takes seconds, and a local store needs none of it

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    runs: list[Run] = []
    rows: list[tuple[str, str, int, float]] = []
    token: str | None = "" if found is not None and found.lifecycle_stage == "active" else None
    while token is not None:
        page = client.search_runs([found.experiment_id], max_results=1000, page_token=token or None)
        for run in page:
            runs.append(Run(run.info.run_id, run.info.status, run.info.start_time, run.data.tags))
            for metric in run.data.metrics:
                logged = sorted(client.get_metric_history(run.info.run_id, metric), key=lambda m: m.timestamp)
                rows += [(run.info.run_id, metric, m.step, m.value) for m in logged]
        token = page.token or None
    return runs, pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"])


# -------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Records:
    """All that is known of a study, read once."""

    study: LoadedStudy
    store: Store
    runs: Mapping[str, Run]
    """trial id -> its MLflow run"""
    points: pd.DataFrame
    """MLflow's points: trial_id, metric, step, value; one a (trial_id, metric, step)"""
    configs: Mapping[str, Trial]
    """trial id -> resolved config, where one is known"""
    trials: pd.DataFrame

    @cached_property
    def history(self) -> pd.DataFrame:
        # not pivot_table, which would drop what is NaN
        wide = self.points.pivot(index=["trial_id", "step"], columns="metric", values="value")  # noqa: PD010
        wide = wide.rename_axis(columns=None).reset_index()
        per_epoch = {i: schedule.steps_per_epoch(trial) for i, trial in self.configs.items()}
        epoch = (wide.step + 1) / wide.trial_id.map(per_epoch).astype(float)
        logged = wide.pop("epoch") if "epoch" in wide else float("nan")
        wide.insert(2, "epoch", epoch.fillna(logged))
        known = self.trials.loc[self.trials.trial_id.notna(), ["trial_id", "arm", "seed", "phase"]]
        return known.merge(wide, on="trial_id", how="inner")

    def check(self) -> pd.DataFrame:
        points: dict[str, dict[tuple[str, int], float]] = {}
        for trial_id, metric, step, value in self.points.itertuples(index=False):
            points.setdefault(trial_id, {})[metric, step] = value
        rows = []
        for folder in self.store.trials(self.study.name):
            trial_id = folder.path.name
            if (record := journal.fold(journal.read(folder.journal))).starts:
                rows.append({"trial_id": trial_id} | _compared(record, self.runs.get(trial_id), points.get(trial_id, {})))
        seen = {row["trial_id"] for row in rows}
        for trial_id in sorted(self.runs.keys() - seen):
            rows.append({"trial_id": trial_id} | _unjournalled(self.runs[trial_id], points.get(trial_id, {})))
        out = pd.DataFrame(rows, columns=list(CHECKED))
        return out.assign(arm=out.trial_id.map(self.trials.set_index("trial_id").arm.to_dict()))


def read(study: StudyName, store: str | Path = "runs", tracking_uri: str | None = None) -> Records:
    """What `trials`, `history` and `check` are made of, in one pass. Arguments and errors as for `trials`."""
    home = Store(Path(store))
    loaded = _find(study, home)
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.root / 'mlflow.db'}"
    runs, points = _tracked(loaded.name, uri)
    folders = {folder.path.name: folder for folder in home.trials(loaded.name)}
    answers = points[points.metric == "anytime/holdout_top1"].sort_values("step").groupby("trial_id").value.last().to_dict()
    standing = {i: _standing(runs.get(i), folders.get(i), answers.get(i)) for i in {**runs, **folders}}

    plan = planned(loaded, {i: s.answer for i, s in standing.items() if s.state in ENDED})
    configs = {p.trial.trial_id: p.trial for p in plan if p.trial is not None}
    left_over = [i for i in standing if i not in configs]
    configs.update({i: config for i in left_over if (config := _config(folders.get(i))) is not None})

    rows = [_identity(p.trial.trial_id if p.trial else None, p.arm, p.phase, p.seed, True) for p in plan]
    rows += [_left_over(i, configs.get(i), runs.get(i)) for i in sorted(left_over)]
    final = _at_last_cycle(points, configs)
    steps = (points.groupby("trial_id").step.max() + 1).to_dict()
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


def _standing(run: Run | None, folder: TrialFolder | None, answer: float | None) -> _Standing:
    """Where a trial stands: as MLflow has it once it has ended, else as its own journal says, which is ahead of MLflow."""
    attempts = int(run.tags.get("attempt", 0)) if run else 0
    if run and run.state == "finished" and answer is not None:
        return _Standing("finished", answer, None, attempts)
    if folder is None:
        return _Standing(run.state if run else "pending", None, None, attempts)
    own = folder.state()
    found = own.answer.get("anytime/holdout_top1") if own.state == "finished" else None
    return _Standing(own.state, found, own.last_error, max(attempts, own.attempts))


def _identity(trial_id: str | None, arm: str | None, phase: str | None, seed: int | None, in_plan: bool) -> dict[str, Any]:
    return {"trial_id": trial_id, "arm": arm, "phase": phase, "seed": seed, "planned": in_plan}


def _left_over(trial_id: str, config: Trial | None, run: Run | None) -> dict[str, Any]:
    if config is not None:
        return _identity(trial_id, config.arm, config.phase, config.seed, False)
    tags = run.tags if run else {}
    seed = tags.get("seed", "")
    return _identity(trial_id, tags.get("arm"), tags.get("phase"), int(seed) if seed.isdigit() else None, False)


def _facts(standing: _Standing | None, config: Trial | None, run: Run | None, steps: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "state": standing.state if standing else "pending",
        "run_id": run.run_id if run else None,
        "attempts": standing.attempts if standing else 0,
        "step": steps,
        "last_error": standing.last_error if standing else None,
    }
    if config is not None:
        parameters = config.model_dump(include={"workload", "optimizer", "decay", "schedule", "budget"})
        facts |= {"config": configuration(config), "total_steps": schedule.total_steps(config), **dict(_dotted(parameters))}
    if run is not None:
        known = {"study", "arm", "seed", "phase", "trial_id", "attempt", "state"}
        facts |= {f"tag.{k}": v for k, v in run.tags.items() if k not in known and not k.startswith("mlflow.")}
    return facts


def configuration(trial: Trial) -> str:
    """The same for every seed of a configuration: its trial id at seed 0."""
    return trial.model_copy(update={"seed": 0}).trial_id


def _dotted(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _dotted(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, str(inner) if isinstance(inner, Path) else inner


def _at_last_cycle(points: pd.DataFrame, configs: Mapping[str, Trial]) -> dict[str, dict[str, float]]:
    """trial id -> metrics at the end of the last cycle that MLflow has all of.

    A metric of evaluations must stand at that very step, so that an older evaluation never passes for the answer; one
    that is logged every few steps counts with its newest value until then.
    """
    reached = (points.groupby("trial_id").step.max() + 1).to_dict()
    last = {}
    for trial_id, config in configs.items():
        ends = [end for end in schedule.cycle_ends(config) if end <= reached.get(trial_id, 0)]
        last[trial_id] = max(ends, default=0) - 1
    end = points.trial_id.map(last)
    by_step = points.metric.str.startswith(LOGGED_BY_STEP)
    chosen = points[(points.step == end) | (by_step & (points.step < end))].sort_values("step", kind="stable")
    chosen = chosen[chosen.metric != "epoch"].drop_duplicates(["trial_id", "metric"], keep="last")
    out: dict[str, dict[str, float]] = {}
    for trial_id, metric, _, value in chosen.itertuples(index=False):
        out.setdefault(trial_id, {})[metric] = value
    return out


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
        _counted(lacking, "not in MLflow") if run is not None else f"{len(final)} points not in MLflow" if final else "",
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
