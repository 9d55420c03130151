"""Where every trial of a study stands: by its own record, and by the ledger for those that wait their turn."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness import journal, schedule, tracking
from harness.config import BadInput, Trial
from harness.store import ENDED, Store, TrialFolder, TrialState
from harness.study import LoadedStudy, planned
from launch.ledger import Ledger, Submitter, is_alive
from launch.terminal import console, duration, table

COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow", "diverged": "magenta", "pending": "dim"}
ORDER = ("running", "queued", "interrupted", "failed", "diverged", "finished", "pending")


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
    attempts: int
    job_id: str | None
    run_id: str | None
    last_error: str | None
    holdout_top1: float | None
    """at the last completed cycle, a fraction"""
    seconds_left: float | None
    """of training, while it runs"""


def rows(loaded: LoadedStudy, store: Store) -> list[Row]:
    """Every trial of the plan, in its order."""
    lines = Ledger(store.study(loaded.name)).newest()
    submitting = Submitter(store.study(loaded.name)).pid() is not None
    plan = planned(loaded, store.results(loaded.name))
    steps = next(schedule.total_steps(p.trial) for p in plan if p.trial is not None)
    out = []
    for p in plan:
        if p.trial is None:
            out.append(Row(None, p.arm, p.seed, p.phase, "pending", 0, steps, 0, None, None, None, None, None))
            continue
        folder = store.trial(loaded.name, p.trial.trial_id)
        out.append(_row(p.trial, folder, lines.get(p.trial.trial_id, {}), submitting))
    return out


def _row(trial: Trial, folder: TrialFolder, line: dict[str, Any], submitting: bool) -> Row:
    state = folder.state()
    total = schedule.total_steps(trial)
    return Row(
        trial_id=trial.trial_id,
        arm=trial.arm,
        seed=trial.seed,
        phase=trial.phase,
        state="queued" if is_queued(state, line, folder, submitting) else state.state,
        step=state.step,
        total_steps=total,
        attempts=state.attempts,
        job_id=line.get("job_id"),
        run_id=tracking.run_id(folder),
        last_error=last_error(folder, state),
        holdout_top1=state.metrics.get("anytime/holdout_top1"),
        seconds_left=(total - state.step) * state.seconds_per_step if state.seconds_per_step and state.state == "running" else None,
    )


def is_queued(state: TrialState, line: dict[str, Any], folder: TrialFolder, submitting: bool) -> bool:
    """Whether the attempt that the ledger's newest line speaks of is still to begin."""
    if state.state == "running" or line.get("event") not in ("queued", "submitted") or state.attempts >= line["attempt"]:
        return False
    return submitting or is_alive(line, folder.logs)


def last_error(folder: TrialFolder, state: TrialState) -> str | None:
    """The error that ended the newest attempt: by its record, or for one that could write none by its logs."""
    if state.last_error or state.state not in ("interrupted", "pending"):
        return state.last_error
    if journal.fold(journal.read(folder.journal)).stopped:
        return None
    found = [error for path in newest_logs(folder, "err") if (error := _final_error(path))]
    if not found and state.state == "interrupted":
        return "ended without a word, as when it is killed"
    return found[0] if found else None


def newest_logs(folder: TrialFolder, kind: str = "*") -> list[Path]:
    """submitit's files of the newest job, JOB_RANK_log.{out,err}, by rank."""
    paths = sorted(folder.logs.glob(f"*_log.{kind}"), key=lambda p: p.stat().st_mtime)
    job = paths[-1].name.rpartition("_log")[0].rpartition("_")[0] if paths else ""
    return sorted(p for p in paths if p.name.startswith(f"{job}_"))


def _final_error(path: Path) -> str | None:
    """The last line of the last traceback in a log."""
    _, found, trace = path.read_text(encoding="utf-8", errors="replace").rpartition("Traceback (most recent call last):")
    return next((line for line in trace.splitlines() if re.match(r"[A-Za-z_]", line)), None) if found else None


# --------------------------------------------------------------------------------------------------- on screen


def show(loaded: LoadedStudy, store: Store, watch: bool) -> None:
    """Prints the table; with `watch` again and again until every trial has ended."""
    out = console()
    if not watch:
        out.print(_screen(out, loaded, store, rows(loaded, store), room=None))
        return
    with Live(console=out, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            found = rows(loaded, store)
            screen = _screen(out, loaded, store, found, room=max(3, out.height - 8))
            if out.is_terminal:
                live.update(screen, refresh=True)
            else:
                out.print(screen)
            if all(r.state in ENDED for r in found):
                return
            time.sleep(max(1.0 if out.is_terminal else 10.0, 10 * (time.monotonic() - began)))


def _screen(out: Console, loaded: LoadedStudy, store: Store, found: list[Row], room: int | None) -> Group:
    """Table, errors, counts. With `room` for fewer lines than there are trials, those that move come first."""
    counts = Counter(r.state for r in found)
    below = [f"{loaded.name}: " + ", ".join(f"{counts[s]} {s}" for s in ORDER if counts[s])]
    others = {f.path.name for f in store.trials(loaded.name)} - {r.trial_id for r in found}
    if others:
        below.append(f"{len(others)} more trial(s) in the store are not in this plan: the file has changed, or other --set were given")
    if room is not None and len(found) > room:
        found = sorted(found, key=lambda r: ORDER.index(r.state))[:room]
    errors = [
        Text(f"{_short(out, r)} {r.arm} seed {r.seed} {r.state}: {r.last_error}", "red", no_wrap=True, overflow="ellipsis")
        for r in found
        if r.last_error
    ]
    return Group(_table(out, found), *errors, *map(Text, below))


def _short(out: Console, row: Row) -> str:
    return (row.trial_id or "-")[: 8 if out.is_terminal else None]


def _table(out: Console, found: list[Row]) -> Table:
    columns = ("trial", "arm", "phase", "seed", "state", "step", "left", "attempt", "holdout/top1")
    cells = [
        (
            _short(out, r),
            r.arm,
            r.phase,
            str(r.seed),
            Text(r.state, style=COLOURS.get(r.state, "")),
            f"{r.step}/{r.total_steps}",
            duration(r.seconds_left),
            str(r.attempts),
            "-" if r.holdout_top1 is None else f"{r.holdout_top1:.4f}",
        )
        for r in found
    ]
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


def logs(folder: TrialFolder, tail: int = 20) -> Iterator[str]:
    """Lines: the paths of the newest job's logs, each with its last `tail` lines."""
    paths = newest_logs(folder)
    if not paths:
        yield f"{folder.logs}: no logs yet"
    for path in paths:
        yield f"==> {path} <=="
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()[-tail:]
