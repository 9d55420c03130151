"""Where every trial of a study stands: by its own record, and by the ledger for those that wait their turn."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness import journal, schedule, tracking
from harness.config import BadInput, Trial
from harness.store import ENDED, ENDED_WELL, SEARCHED_BLIND, Store, TrialFolder, TrialState
from harness.study import LoadedStudy, planned
from launch import slurm
from launch.ledger import Entry, Ledger, Life
from launch.standing import Standing, Standings, standings
from launch.terminal import console, duration, table

COLOURS = {
    "running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow", "diverged": "magenta", "pending": "dim",
    "exhausted": "red", "cancelled": "yellow",
}  # fmt: skip
ORDER = ("running", "queued", "interrupted", "cancelled", "failed", "exhausted", "diverged", "finished", "pending")


def label(trial: Trial) -> str:
    """How messages name a trial."""
    return f"{trial.arm} seed {trial.seed} {trial.trial_id}"


@dataclass(frozen=True)
class Row:
    """One trial, as `status --json` gives it; trial_id is None for a finalist that the search has not decided."""

    trial_id: str | None
    arm: str
    seed: int
    phase: str
    state: str
    step: int
    total_steps: int
    attempts: int = 0
    job_id: str | None = None
    run_id: str | None = None
    last_error: str | None = None
    holdout_top1: float | None = None
    """at the last completed cycle, a fraction"""
    seconds_left: float | None = None
    """of training, while it runs"""
    expected_finish: str | None = None
    """local time, of a trial that runs"""
    preemptions: int = 0
    """and other returns to the queue that were no failure"""
    failures: int = 0
    """lives that ended in an error and were tried again"""
    gpu_hours: float | None = None
    """hours x ranks that SLURM gave to the trial's jobs"""
    gpu_hours_lost: float | None = None
    """of these, lost to interruptions: work after the last checkpoint, and starting up again"""
    nodes: str | None = None
    """where it runs, or ran last"""
    avoids: dict[str, str] = field(default_factory=dict)
    """nodes where its ranks failed and it is not run again -> why"""
    reason: str | None = None
    """why it waits, in SLURM's words; a held one with the command that releases it"""
    code: str | None = None
    """the snapshot that its job runs: runs/STUDY/code/CODE"""
    logs: tuple[str, ...] = ()
    """paths of the newest life's, by rank"""


def rows(loaded: LoadedStudy, store: Store, now: Standings | None = None) -> list[Row]:
    """Every trial of the plan, in its order."""
    now = now or standings(store, loaded.name)
    plan = planned(loaded, now.results())
    steps = next(schedule.total_steps(p.trial) for p in plan if p.trial is not None)
    out = []
    for p in plan:
        if p.trial is None:
            out.append(Row(None, p.arm, p.seed, p.phase, "pending", 0, steps))
        elif (standing := now.trials.get(p.trial.trial_id)) is None:
            out.append(Row(p.trial.trial_id, p.arm, p.seed, p.phase, "pending", 0, schedule.total_steps(p.trial)))
        else:
            out.append(_row(p.trial, store.trial(loaded.name, p.trial.trial_id), standing))
    return out


def _row(trial: Trial, folder: TrialFolder, s: Standing) -> Row:
    total, entry, task, record = schedule.total_steps(trial), s.entry, s.task, s.record
    left = (total - record.step) * record.seconds_per_step if record.seconds_per_step and s.state == "running" else None
    lives = entry.lives
    lines = list(journal.glance(folder.journal)) if lives else []
    used, lost = hours(lives, lines, time.time() if s.state == "running" else None) if lives else (None, None)
    return Row(
        trial_id=trial.trial_id,
        arm=trial.arm,
        seed=trial.seed,
        phase=trial.phase,
        state=s.state,
        step=record.step,
        total_steps=total,
        attempts=record.attempts,
        job_id=entry.job_id or entry.newest.get("job_id"),
        run_id=tracking.run_id(folder),
        last_error=_unsaved(lines) if s.live else last_error(folder, record),
        holdout_top1=record.answer.get("anytime/holdout_top1"),
        seconds_left=left,
        expected_finish=None if left is None else datetime.fromtimestamp(time.time() + left).isoformat(timespec="minutes"),
        preemptions=_returns(lives),
        failures=sum(life.ended is not None and not _returned(life) and life.ended["state"] not in ENDED_WELL for life in lives),
        gpu_hours=used,
        gpu_hours_lost=lost,
        nodes=lives[-1].started["nodes"] if lives else None,
        avoids=entry.avoids,
        reason=_reason(task) if task is not None and (task.waits or task.suspended) else None,
        code=entry.code,
        logs=tuple(map(str, newest_logs(folder))),
    )


def _returns(lives: Sequence[Life]) -> int:
    """How often the trial's job went back into the queue for no failure, by the supervisor's doing or by SLURM's own."""
    again: int = sum(
        before.started["job_id"] == then.started["job_id"]
        and before.started["life"] != then.started["life"]
        and (before.requeued is None or _returned(before))
        for before, then in pairwise(lives)
    )
    return again + int(bool(lives) and _returned(lives[-1]))


def _returned(life: Life) -> bool:
    """Whether it was requeued for anything but a failure that may be its nodes'."""
    return life.requeued is not None and life.requeued["kind"] not in ("elsewhere", "node")


def _reason(task: slurm.Task) -> str:
    if task.held:
        return f"{task.reason}: held; scontrol release {task.job_id}"
    return "suspended" if task.suspended else task.reason


def _unsaved(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the newest checkpoint could not be written."""
    events = [line for line in lines if line.get("event") in ("checkpoint", "warning")]
    message: str = events[-1].get("message", "") if events else ""
    return message if "could not be written" in message else None


def hours(lives: Sequence[Life], lines: Sequence[Mapping[str, Any]], now: float | None) -> tuple[float, float]:
    """(GPU-hours used, of these lost) by the lives of a trial under SLURM; lines of its journal.

    now: seconds since 1970, if the last life runs.

    Lost is what a life did after its last checkpoint, unless it ended the trial, and the start-up of every life but the first.
    A life whose supervisor was killed with it ended at its last line in the journal; so did the last one where none runs.
    """
    used = lost = 0.0
    claimed_by = {
        life.started["attempt"]: number for number, life in enumerate(lives)
    }  # one that died before it claimed its number left it to the next
    for number, life in enumerate(lives):
        own = [line for line in lines if claimed_by.get(line["attempt"]) == number]
        stamps = [line["timestamp"] / 1000 for line in own]
        began = datetime.fromisoformat(life.started["time"]).timestamp()
        running = now if number == len(lives) - 1 and life.ended is None else None
        end = datetime.fromisoformat(life.ended["time"]).timestamp() if life.ended else running or max([began, *stamps])
        kept = [line["timestamp"] / 1000 for line in own if line.get("event") in ("checkpoint", "end")]
        used += (end - began) * life.started["ranks"]
        if running is None and not (life.ended and life.ended["state"] in ENDED_WELL):
            lost += (end - max([began, *kept])) * life.started["ranks"]
        if number and stamps:
            lost += (min(stamps[0], end) - began) * life.started["ranks"]
    return used / 3600, lost / 3600


def last_error(folder: TrialFolder, state: TrialState) -> str | None:
    """The error that ended the newest attempt: by its record, or for one that could write none by its logs."""
    if state.last_error or state.stopped or state.state not in ("interrupted", "pending"):
        return state.last_error
    found = [error for path in newest_logs(folder, "err") if (error := final_error(path))]
    if not found and state.state == "interrupted":
        return "ended without a word, as when it is killed"
    return found[0] if found else None


def newest_logs(folder: TrialFolder, kind: str = "*") -> list[Path]:
    """submitit's files of the newest job, JOB_RANK_log.{out,err}, by rank."""
    times = {}
    for path in folder.logs.glob(f"*_log.{kind}"):
        with suppress(FileNotFoundError):  # an empty one of srun's goes when its life ends
            times[path] = path.stat().st_mtime
    paths = sorted(times, key=times.__getitem__)
    job = paths[-1].name.rpartition("_log")[0].rpartition("_")[0] if paths else ""
    return sorted(p for p in paths if p.name.startswith(f"{job}_"))


def final_error(path: Path) -> str | None:
    """The last line of the last traceback in a log; torch begins each of its lines with the rank. Without one, what NCCL's watchdog
    said before it aborted the rank."""
    text = re.sub(r"^\[rank\d+\]: ?", "", path.read_text(encoding="utf-8", errors="replace"), flags=re.M)
    _, found, trace = text.rpartition("Traceback (most recent call last):")
    if not found:
        waited = re.search(r"Watchdog caught collective operation timeout: .*", text)
        return waited.group() if waited else None
    return next((line for line in trace.splitlines() if re.match(r"(?!slurmstepd|srun:)[A-Za-z_]", line)), None)


# --------------------------------------------------------------------------------------------------- on screen


def show(loaded: LoadedStudy, store: Store, watch: bool) -> None:
    """Prints the table; with `watch` again and again until every trial has ended."""
    out = console()
    if not watch:
        now = standings(store, loaded.name)
        out.print(_screen(out, loaded, store, rows(loaded, store, now), now, room=None))
        return
    with Live(console=out, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            now = standings(store, loaded.name)
            found = rows(loaded, store, now)
            screen = _screen(out, loaded, store, found, now, room=max(3, out.height - 8))
            if out.is_terminal:
                live.update(screen, refresh=True)
            else:
                out.print(screen)
            if all(r.state in (*ENDED, "cancelled") for r in found):
                return
            time.sleep(max(1.0 if out.is_terminal else 10.0, 10 * (time.monotonic() - began)))


def _screen(out: Console, loaded: LoadedStudy, store: Store, found: list[Row], now: Standings, room: int | None) -> Group:
    """Table, what waits and why, errors, counts. With `room` for fewer lines than trials, those that move come first."""
    counts = Counter(r.state for r in found)
    held = sum(folder.bytes() for folder in store.trials(loaded.name))
    below = [
        f"{loaded.name}: "
        + ", ".join(f"{counts[s]} {s}" for s in ORDER if counts[s])
        + f"; trials in {store.study(loaded.name)}: {_size(held)}"
    ]
    if not store.root.exists():
        below.append(f"there is no store {store.root}; jobs of another --store are not shown")
    if any(r.gpu_hours is not None for r in found):
        used, lost = (sum(h or 0.0 for h in column) for column in zip(*((r.gpu_hours, r.gpu_hours_lost) for r in found), strict=True))
        below.append(f"{used:.2f} GPU-hours used, of these {lost:.2f} lost to restarts; {sum(r.preemptions for r in found)} times requeued")
    if ends := [r.expected_finish for r in found if r.expected_finish]:
        below.append(f"the running ones are expected to end by {max(ends).replace('T', ' ')}")
    below += [f"{r.trial_id} {r.arm} seed {r.seed} waits: {r.reason}" for r in found if r.reason and "held" in r.reason]
    reasons = Counter((r.state, r.reason) for r in found if r.reason and "held" not in r.reason)
    below += [f"{n} {state}: {reason}" for (state, reason), n in reasons.most_common()]
    avoided = [(nodes, why) for r in found for nodes, why in r.avoids.items()]
    for nodes, trials in Counter(nodes for nodes, _ in avoided).items():
        why = next(why for other, why in reversed(avoided) if other == nodes)
        below.append(f"{nodes}: the ranks of {trials} trial(s) failed there, which are not run there again; {why}")
    if now.warning:
        below.append(f"{now.warning}; states are the last known ones")
    below += _beside_the_plan(loaded, store, found, now)
    if room is not None and len(found) > room:
        found = sorted(found, key=lambda r: ORDER.index(r.state))[:room]
    errors = [
        Text(f"{_short(out, r)} {r.arm} seed {r.seed} {r.state}: {r.last_error}", "red", no_wrap=True, overflow="ellipsis")
        for r in found
        if r.last_error
    ]
    return Group(_table(out, found), *errors, *map(Text, below))


def _beside_the_plan(loaded: LoadedStudy, store: Store, found: Sequence[Row], now: Standings) -> list[str]:
    """What the store has otherwise than the file as it stands now, a line each."""
    lines = []
    left = [trial_id for trial_id in now.trials if trial_id not in {r.trial_id for r in found}]
    if left:
        live = sum(now.trials[trial_id].live for trial_id in left)
        moving = f", {live} of them queued or running (submit --prune cancels these)" if live else ""
        lines.append(
            f"{len(left)} more trial(s) in the store are not in this plan{moving}: the file has changed, or other --set were given"
        )
    if loaded.study.finalists is None and loaded.workload.evaluation.val:
        finished = [r.trial_id for r in found if r.trial_id is not None and r.state == "finished"]
        unread = [i for i in finished if "anytime/val_top1" not in now.trials[i].record.answer]
        if blind := sum(store.trial(loaded.name, i).is_blind() for i in unread):
            lines.append(f"{blind} trial(s) {SEARCHED_BLIND}")
    return lines


def shortcomings(loaded: LoadedStudy, store: Store) -> list[str]:
    """What a report of the study lacks, a line each."""
    now = standings(store, loaded.name)
    found = rows(loaded, store, now)
    without = sum(r.state not in ENDED_WELL for r in found)
    lines = [f"{without} of {len(found)} trial(s) without a result yet"] if without else []
    return [*_beside_the_plan(loaded, store, found, now), *lines]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # else three digits would be written 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _short(out: Console, row: Row) -> str:
    return (row.trial_id or "-")[: 8 if out.is_terminal else None]


def _table(out: Console, found: list[Row]) -> Table:
    by_slurm = any(r.gpu_hours is not None or r.reason for r in found)
    columns = ["trial", "arm", "phase", "seed", "state", "step", "left", "attempt", "holdout/top1"]
    if by_slurm:
        columns += ["requeued", "hours", "lost", "job", "nodes"]
    cells = []
    for r in found:
        of_one: list[str | Text] = [
            _short(out, r), r.arm, r.phase, str(r.seed), Text(r.state, style=COLOURS.get(r.state, "")), f"{r.step}/{r.total_steps}",
            duration(r.seconds_left), str(r.attempts), "-" if r.holdout_top1 is None else f"{r.holdout_top1:.4f}",
        ]  # fmt: skip
        if by_slurm:
            hours = ("-" if h is None else f"{h:.2f}" for h in (r.gpu_hours, r.gpu_hours_lost))
            of_one += [str(r.preemptions), *hours, r.job_id or "-", r.nodes or "-"]
        cells.append(of_one)
    return table(columns, cells)


# -------------------------------------------------------------------------------------------------------- logs


def find_trial(loaded: LoadedStudy, store: Store, prefix: str) -> TrialFolder:
    """The folder of the one trial whose id begins with `prefix`; BadInput when there is none or more than one."""
    folders = [f for f in store.trials(loaded.name) if f.path.name.startswith(prefix)]
    if len(folders) != 1:
        known = ", ".join(f.path.name for f in folders or store.trials(loaded.name)) or "none yet"
        what = "is the beginning of several trial ids" if folders else f"is no trial of {loaded.name} in {store.root}"
        raise BadInput(f"TRIAL: {prefix!r} {what}: {known}")
    return folders[0]


def logs(folder: TrialFolder, ledger: Ledger, tail: int = 20) -> Iterator[str]:
    """Lines: the paths of the newest job's logs, each with its last `tail` lines; last those of a SLURM job's batch script."""
    paths = newest_logs(folder)
    entry = ledger.entries().get(folder.path.name, Entry())
    if entry.token and entry.job_id:
        paths += sorted((ledger.path.parent / "submissions" / entry.token).glob(f"{entry.job_id}_*_log.*"))
    if not paths:
        yield f"{folder.logs}: no logs yet"
    for path in paths:
        yield f"==> {path} <=="
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()[-tail:]
