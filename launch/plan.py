"""What a study would run and about how long it would take; nothing is started or written."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Console

from harness import journal, schedule
from harness.config import BadInput, Cluster, Slurm, Trial
from harness.data.index import checked
from harness.data.remote import overflow
from harness.store import Store
from harness.study import LoadedStudy, Planned, axis_values, first_trial, planned, warnings
from launch import power, scaling
from launch.local import places, visible_gpus
from launch.standing import Standings, standings
from launch.submit import world_size
from launch.terminal import duration, table

NOT_MEASURED = "not measured yet"
PAIRING = {"unpaired": False, "paired": True}


def measured_seconds_per_step(trial: Trial, ranks: int, store: Store) -> float | None:
    """Median over the store's finished trials of the same model, data, batch, backend and world size; None when there is none."""
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
    """What the time of a step hangs on, as far as a config says: not the hyperparameters, and not the device."""
    data, recipe = trial.workload.data, trial.workload.recipe
    images = data.name, data.image_size, scaling.pixel_share(trial), trial.budget.global_batch_size, recipe.augment
    arithmetic = trial.workload.model, recipe.precision, recipe.norm_batch_size
    return *images, *arithmetic, trial.backend.model_dump(exclude={"timeout_seconds"})


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
    by_phase = phases(loaded, plan, store, cluster)
    per_step = {row["phase"]: row["seconds_per_step"] for row in by_phase}
    steps = schedule.total_steps(first_trial(loaded))
    trials = []
    for p in plan:
        seconds = per_step[p.phase]
        trials.append(
            {
                "trial_id": p.trial and p.trial.trial_id,
                "arm": p.arm,
                "seed": p.seed,
                "phase": p.phase,
                "steps": (list(schedule_rows(p.trial)) if p.trial else None) if with_schedule else steps,
                "cycle_end_epochs": p.trial and cycle_end_epochs(p.trial),
                "cycle_end_steps": p.trial and schedule.cycle_ends(p.trial),
                "estimate_seconds": seconds and steps * seconds,
            }
        )
    return {
        "study": loaded.name,
        "arms": list(loaded.study.arms),
        "trials": trials,
        "phases": by_phase,
        "scale": scale(loaded, plan, cluster),
        "power": power_rows(loaded),
        "warnings": plan_warnings(loaded, cluster),
    }


def phases(loaded: LoadedStudy, plan: Sequence[Planned], store: Store, cluster: Cluster) -> list[dict[str, Any]]:
    """Of each phase its trials, ranks a trial, and GPU-hours of training: hours x ranks as measured, else by the workload's reference."""
    trial, counts = first_trial(loaded), Counter(p.phase for p in plan)
    ranks = {phase: world_size(loaded, cluster, phase) for phase in counts}
    per_step = {count: measured_seconds_per_step(trial, count, store) for count in set(ranks.values())}
    rows = []
    for phase, trials in counts.items():
        seconds = per_step[ranks[phase]]
        per_trial = referred_gpu_hours(loaded) if seconds is None else schedule.total_steps(trial) * seconds * ranks[phase] / 3600
        hours = None if per_trial is None else trials * per_trial
        measured = {"gpu_hours": hours, "measured": seconds is not None, "seconds_per_step": seconds}
        rows.append({"phase": phase, "trials": trials, "ranks": ranks[phase], **measured})
    return rows


def referred_gpu_hours(loaded: LoadedStudy) -> float | None:
    """GPU-hours of a trial at the speed that its workload's reference states for images of image_size; None without one."""
    reference, trial = loaded.workload.reference, first_trial(loaded)
    if reference is None:
        return None
    images = schedule.total_steps(trial) * trial.budget.global_batch_size
    return images * scaling.pixel_share(trial) / reference.images_per_second / 3600


def scale(loaded: LoadedStudy, plan: Sequence[Planned], cluster: Cluster) -> dict[str, Any]:
    """What launch.scaling says of the arm that takes most: points, and, where the workload states parameters, bytes and images.

    On the ranks of the search, which may be others than the finalists'.
    """
    arms = {p.arm: p.trial for p in plan if p.trial is not None}.values()
    trial, ranks, reference = first_trial(loaded), world_size(loaded, cluster), loaded.workload.reference
    kept = max(scaling.moments(one.optimizer) for one in arms)
    found: dict[str, Any] = {"ranks": ranks, "points_a_trial": max(map(scaling.points, arms))}
    if reference is None:
        return found
    try:
        micro_batches = trial.budget.global_batch_size // ranks // trial.micro_batch_size(ranks)
    except BadInput:  # told by plan_warnings
        return found
    sent = scaling.traffic(reference.parameters, trial.backend, ranks, micro_batches)
    return found | {
        "bytes_a_rank": scaling.memory(reference.parameters, kept, trial.backend, ranks, micro_batches).peak,
        "bytes_sent_a_step": sent.total,
        "bytes_exposed_a_step": sent.exposed,
        "checkpoint_bytes": scaling.checkpoint_bytes(reference.parameters, kept),
        "images_a_second": reference.images_per_second / scaling.pixel_share(trial) * ranks,
    }


def power_rows(loaded: LoadedStudy) -> list[dict[str, Any]]:
    """What the reported seeds of two arms can show, in points of error, for each assumed seed sd; None below two seeds.

    By the intervals that the verdicts go by: those of all the study's comparisons together.
    """
    seeds = len((loaded.study.finalists or loaded.study.search).seeds)
    family = max(1, len(loaded.study.analysis.comparisons or ()))
    return [
        {"seeds": seeds, "pairs": family, "seed_sd": sd}
        | {f"difference_{name}": power.smallest_difference(seeds, sd, paired, family) for name, paired in PAIRING.items()}
        | {f"margin_{name}": power.narrowest_margin(seeds, sd, paired, family) for name, paired in PAIRING.items()}
        for sd in power.SEED_SDS
    ]


def plan_warnings(loaded: LoadedStudy, cluster: Cluster) -> list[str]:
    """What is legal and probably not meant, and what a submission would refuse: ranks that do not fit, shards that are not there."""
    found = warnings(loaded)
    for ranks in dict.fromkeys(world_size(loaded, cluster, phase) for phase in loaded.phases):
        try:
            first_trial(loaded).micro_batch_size(ranks)
        except BadInput as error:
            found += str(error).splitlines()
    try:
        index, _ = checked(loaded.workload.data, loaded.workload.evaluation.test)
        found += overflow(index)
    except BadInput as error:
        found += str(error).splitlines()
    return found


def show(out: Console, loaded: LoadedStudy, store: Store, cluster: Cluster, with_schedule: bool) -> None:
    """Prints the table of trials, the cost and the warnings."""
    now = standings(store, loaded.name)
    plan = planned(loaded, now.results())
    steps = schedule.total_steps(first_trial(loaded))
    pending = Counter((p.arm, p.phase) for p in plan if p.trial is None)
    cells = []
    for p in plan:
        if p.trial is not None:
            cells.append((p.trial.trial_id, p.arm, p.phase, str(p.seed), str(steps), _point(loaded, p.trial)))
        elif count := pending.pop((p.arm, p.phase), 0):  # of all of an arm one row: they differ in nothing but the seed
            cells.append((f"{count} pending", p.arm, p.phase, "-", str(steps), "decided by the search"))
    out.print(table(("trial", "arm", "phase", "seed", "steps", "point"), cells))
    for line in dict.fromkeys(_cycles(p.trial) for p in plan if p.trial):
        out.print(line, soft_wrap=True)
    lines, seconds, guessed = [], 0.0, False
    for row in phases(loaded, plan, store, cluster):
        at_once = _at_once(cluster.of_phase(row["phase"]), row["ranks"], row["trials"])
        seconds += math.ceil(row["trials"] / at_once) * steps * (math.nan if row["seconds_per_step"] is None else row["seconds_per_step"])
        guessed |= row["gpu_hours"] is not None and not row["measured"]
        each = f"{row['trials']} trial(s) of {row['ranks']} rank(s), {at_once} at a time"
        lines.append(f"{row['phase']}: {each}; GPU-hours of training: {_hours(loaded, row)}")
    unknown = f"{NOT_MEASURED}, GPU-hours by the workload's guess" if guessed else NOT_MEASURED
    time = unknown if math.isnan(seconds) else f"{duration(seconds)} of training (start-up and evaluation are not in it)"
    for line in (f"{loaded.name}: {len(plan)} trial(s) of {steps} steps; estimated time: {time}", *lines, *_already(plan, now)):
        out.print(line, soft_wrap=True)
    _show_scale(out, loaded, plan, cluster)
    _show_power(out, loaded)
    if with_schedule:
        _show_schedules(out, plan)


def _already(plan: Sequence[Planned], now: Standings) -> Iterator[str]:
    """What the store has of the study, of which the estimates above know nothing."""
    ids = {p.trial.trial_id for p in plan if p.trial is not None}
    states = Counter(s.state for trial_id, s in now.trials.items() if trial_id in ids)
    if others := len(now.trials.keys() - ids):
        states["not in this plan"] = others
    if states:
        yield f"of this study the store has {', '.join(f'{count} {state}' for state, count in states.items())}"


def _show_scale(out: Console, loaded: LoadedStudy, plan: Sequence[Planned], cluster: Cluster) -> None:
    on_paper = scale(loaded, plan, cluster)
    if "bytes_a_rank" not in on_paper:
        return
    keys = ("bytes_a_rank", "bytes_sent_a_step", "bytes_exposed_a_step", "checkpoint_bytes")
    held, sent, exposed, saved = (f"{on_paper[key] / 1e9:.2f} GB" for key in keys)
    where = f"a rank of {on_paper['ranks']} ({first_trial(loaded).backend.name})"
    out.print(
        f"on paper, {where}: {held} at the peak without activations, {sent} sent a step, {exposed} of it while nothing computes; "
        f"a checkpoint: {saved}; "
        f"images to read: {on_paper['images_a_second']:,.0f} a second; metric values a trial: {on_paper['points_a_trial']:,}",
        soft_wrap=True,
    )


def _hours(loaded: LoadedStudy, phase: Mapping[str, Any]) -> str:
    hours, reference = phase["gpu_hours"], loaded.workload.reference
    if hours is None:
        return NOT_MEASURED
    if phase["measured"] or reference is None:
        return f"{hours:.2f}"
    rate = reference.images_per_second / scaling.pixel_share(first_trial(loaded))
    a_trial = f"{hours / phase['trials']:,.1f} each, " if phase["trials"] > 1 else ""
    return f"{hours:,.1f}, {a_trial}of an {reference.gpu} at {rate:,.0f} images/s, as the workload guesses"


def _show_power(out: Console, loaded: LoadedStudy) -> None:
    if len(loaded.study.arms) < 2:
        return  # nothing is compared
    rows = power_rows(loaded)
    seeds, keys = rows[0]["seeds"], [key for key in rows[0] if key.startswith(("difference", "margin"))]
    if seeds < 2:
        out.print("one seed a configuration: no difference can be told from chance; e.g. finalists: {top: 3, seeds: 8}", soft_wrap=True)
        return
    together = f" for all {rows[0]['pairs']} pairs together" if rows[0]["pairs"] > 1 else ""
    out.print(
        f"{seeds} seeds an arm, points of error: the smallest difference found with {power.POWER:.0%} power "
        f"(two-sided {power.LEVEL:.0%}{together}), "
        f"and the margin below which equivalence cannot pass (the study's: {loaded.study.analysis.margin:g})",
        soft_wrap=True,
    )
    cells = [[f"{row['seed_sd']:.2f}", *(f"{row[key]:.2f}" for key in keys)] for row in rows]
    out.print(table(("assumed seed sd", *(key.replace("_", ", ") for key in keys)), cells))


def _at_once(cluster: Cluster, ranks: int, trials: int) -> int:
    """Trials that run at a time; under SLURM as many as an array may, as if the cluster were free."""
    if isinstance(cluster, Slurm):
        return min(trials, cluster.array_parallelism or trials)
    return len(places(cluster.max_parallel, ranks, visible_gpus()))


def _cycles(trial: Trial) -> str:
    epochs, steps = ", ".join(f"{e:g}" for e in cycle_end_epochs(trial)), ", ".join(map(str, schedule.cycle_ends(trial)))
    return f"{trial.arm}: cycles end at epochs {epochs} (steps {steps})"


def _point(loaded: LoadedStudy, trial: Trial) -> str:
    """The values that the search chose, the optimizer's first."""
    values = axis_values(loaded.study.arms[trial.arm], trial)
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())


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
