"""What a study would run and about how long it would take; nothing is started or written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console

from harness import journal, schedule
from harness.config import BadInput, Cluster, Slurm, Trial
from harness.data.index import Index
from harness.store import Store
from harness.study import LoadedStudy, Planned, planned, warnings
from launch.local import places, visible_gpus
from launch.standing import standings
from launch.submit import any_trial, world_size
from launch.terminal import duration, table

NOT_MEASURED = "not measured yet"


def measured_seconds_per_step(trial: Trial, ranks: int, store: Store) -> float | None:
    """Median over the store's finished trials of the same model, data, batch and world size; None when there is none."""
    found = []
    for study in store.root.glob("*/trials"):
        for folder in store.trials(study.parent.name):
            state = folder.state()
            if state.state != "finished" or state.seconds_per_step is None:
                continue
            start = journal.fold(journal.glance(folder.journal)).starts[-1]
            try:
                other = folder.read_config()
            except BadInput:
                continue
            if start.get("world_size") == ranks and _cost(other) == _cost(trial):
                found.append(state.seconds_per_step)
    return statistics.median(found) if found else None


def _cost(trial: Trial) -> tuple[Any, ...]:
    """What the time of a step hangs on, as far as a config says."""
    data = trial.workload.data
    return trial.workload.model, data.name, data.image_size, trial.budget.global_batch_size, trial.workload.recipe.precision


def cycle_end_epochs(trial: Trial) -> list[float]:
    """Epochs at which the cycles inside the budget end, as configured; their steps are these, rounded to whole ones."""
    s = trial.schedule
    if s.name != "cosine_restarts":
        return [trial.budget.epochs]
    lengths = (s.t_0 * s.t_mult**i for i in range(len(schedule.cycle_ends(trial))))
    return [round(epoch, 9) for epoch in accumulate(lengths)]


def schedule_rows(trial: Trial) -> Iterator[dict[str, Any]]:
    """eta, lr and lambda of every optimizer step. weight_decay is in paper units."""
    per_epoch = schedule.steps_per_epoch(trial)
    for step in range(schedule.total_steps(trial)):
        eta, cycle, lam = schedule.schedule(trial, step)
        yield {
            "step": step,
            "epoch": step / per_epoch,
            "cycle": cycle,
            "eta": eta,
            "lr": eta * trial.optimizer.lr,
            "weight_decay": lam,
        }


def as_json(loaded: LoadedStudy, store: Store, cluster: Cluster, with_schedule: bool) -> dict[str, Any]:
    """The mapping of `plan --json`; a pending finalist has neither id nor cycle ends yet."""
    plan = planned(loaded, standings(store, loaded.name).results())
    per_step = measured_seconds_per_step(any_trial(loaded), world_size(loaded, cluster), store)
    steps = schedule.total_steps(any_trial(loaded))
    trials = []
    for p in plan:
        trials.append(
            {
                "trial_id": p.trial and p.trial.trial_id,
                "arm": p.arm,
                "seed": p.seed,
                "phase": p.phase,
                "steps": (list(schedule_rows(p.trial)) if p.trial else None) if with_schedule else steps,
                "cycle_end_epochs": p.trial and cycle_end_epochs(p.trial),
                "cycle_end_steps": p.trial and schedule.cycle_ends(p.trial),
                "estimate_seconds": per_step and steps * per_step,
            }
        )
    return {"study": loaded.name, "arms": list(loaded.study.arms), "trials": trials, "warnings": plan_warnings(loaded)}


def plan_warnings(loaded: LoadedStudy) -> list[str]:
    """What is legal and probably not meant, and shards that a submission would miss."""
    found = warnings(loaded)
    data = loaded.workload.data
    try:
        Index.load(data.path).check(data)
    except BadInput as error:
        found += str(error).splitlines()
    return found


def show(out: Console, loaded: LoadedStudy, store: Store, cluster: Cluster, with_schedule: bool) -> None:
    """Prints the table of trials, the cost and the warnings."""
    plan = planned(loaded, standings(store, loaded.name).results())
    ranks = world_size(loaded, cluster)
    steps = schedule.total_steps(any_trial(loaded))
    cells = [(p.trial.trial_id if p.trial else "pending", p.arm, p.phase, str(p.seed), str(steps), _point(loaded, p.trial)) for p in plan]
    out.print(table(("trial", "arm", "phase", "seed", "steps", "point"), cells))
    for line in dict.fromkeys(_cycles(p.trial) for p in plan if p.trial):
        out.print(line, soft_wrap=True)
    per_step = measured_seconds_per_step(any_trial(loaded), ranks, store)
    at_once = _at_once(cluster, ranks, len(plan))
    cost = duration(math.ceil(len(plan) / at_once) * steps * per_step) + " of training" if per_step else NOT_MEASURED
    out.print(
        f"{loaded.name}: {len(plan)} trials of {steps} steps, {ranks} rank(s) each, {at_once} at a time; estimated cost: {cost}",
        soft_wrap=True,
    )
    if with_schedule:
        _show_schedules(out, plan)


def _at_once(cluster: Cluster, ranks: int, trials: int) -> int:
    """Trials that run at a time; under SLURM as many as an array may, as if the cluster were free."""
    if isinstance(cluster, Slurm):
        return min(trials, cluster.array_parallelism or trials)
    return len(places(cluster.max_parallel, ranks, visible_gpus()))


def _cycles(trial: Trial) -> str:
    epochs, steps = ", ".join(f"{e:g}" for e in cycle_end_epochs(trial)), ", ".join(map(str, schedule.cycle_ends(trial)))
    return f"{trial.arm}: cycles end at epochs {epochs} (steps {steps})"


def _point(loaded: LoadedStudy, trial: Trial | None) -> str:
    """The values that the search chose, the optimizer's first."""
    if trial is None:
        return "decided by the search"
    blocks = ("optimizer", "decay", "schedule")
    keys = sorted(loaded.study.arms[trial.arm].space, key=lambda key: (blocks.index(key.partition(".")[0]), key))
    values = ((key, getattr(getattr(trial, key.partition(".")[0]), key.partition(".")[2])) for key in keys)
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values)


def _show_schedules(out: Console, plan: Sequence[Planned]) -> None:
    """The first trial of each arm, at the epochs and at the first and last step of each cycle; --json has every step."""
    first: dict[str, Trial] = {}
    for p in plan:
        if p.trial is not None:
            first.setdefault(p.arm, p.trial)
    for arm, trial in first.items():
        per_epoch, spans = schedule.steps_per_epoch(trial), schedule.cycles(trial)
        marks = {step for span in spans for step in (span[0], span[1] - 1)}
        shown = [row for row in schedule_rows(trial) if row["step"] in marks or row["step"] % per_epoch == 0]
        out.print(f"\n{arm}, trial {trial.trial_id}:")
        out.print(table(list(shown[0]), [[str(v) if isinstance(v, int) else f"{v:.6g}" for v in row.values()] for row in shown]))
