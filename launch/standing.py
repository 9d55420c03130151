"""Where every trial of a study stands: its own record, the ledger, and what the scheduler says of its job.

The record alone cannot tell a trial that failed from one whose job is about to try again, nor an interrupted one from one
that waits in the queue. Submission, status, plans and chains all ask here, so that they agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.store import ENDED, ENDED_WELL, Store, TrialState
from launch import slurm
from launch.ledger import Entry, Ledger, Submitter, is_alive


def job_name(study: str, suffix: str = "") -> str:
    return f"wrbench-{study}{suffix}"


def queue(store: Store, study: str, suffix: str = "") -> list[slurm.Task]:
    """What SLURM has of this store's study, and not of another store's of the same name. Raises SlurmError."""
    return [t for t in slurm.queue(job_name(study, suffix)) if (store.study(study) / "submissions" / t.comment).is_dir()]


@dataclass(frozen=True)
class Standing:
    """One trial."""

    state: str
    """pending | queued | running | interrupted | finished | failed | diverged | exhausted | cancelled"""
    record: TrialState
    entry: Entry
    task: slurm.Task | None = None
    """of SLURM's queue, while it is there"""

    @property
    def live(self) -> bool:
        """Runs, or will without anybody's doing."""
        return self.state in ("queued", "running")


@dataclass(frozen=True)
class Standings:
    """All trials of a study that were ever begun or given to a job."""

    trials: dict[str, Standing]
    tasks: list[slurm.Task] = field(default_factory=list)
    """of the study in SLURM's queue"""
    warning: str | None = None
    """why the queue is not known; states are then the last known ones"""

    def results(self) -> dict[str, float | None]:
        """trial id -> holdout/top1 at the last completed cycle of every trial that has ended (None: without a result)."""
        return {
            trial_id: s.record.answer.get("anytime/holdout_top1") if s.state == "finished" else None
            for trial_id, s in self.trials.items()
            if s.state in ENDED
        }


def standings(store: Store, study: str, ours: bool = False) -> Standings:
    """Reads every trial's record; asks SLURM only about a study that was ever given to it.

    ours: the caller holds the study's lock, so that nobody else is about to start what the ledger calls queued.
    """
    entries = Ledger(store.study(study)).entries()
    tasks: list[slurm.Task] = []
    warning = None
    by_slurm = any(entry.token for entry in entries.values())
    if by_slurm:
        try:
            tasks = queue(store, study)
        except slurm.SlurmError as error:
            warning = str(error)
    arrays = {task.comment: task.job_id.partition("_")[0] for task in tasks}
    by_id = {task.job_id: task for task in tasks}
    submitting = not ours and Submitter(store.study(study)).holder() is not None
    trials = {}
    for trial_id in sorted({folder.path.name for folder in store.trials(study)} | entries.keys()):
        folder = store.trial(study, trial_id)
        record, entry = folder.state(), entries.get(trial_id, Entry())
        if entry.token:
            entry.job_id = entry.job_id or (f"{array}_{entry.index}" if (array := arrays.get(entry.token)) else None)
            task = by_id.get(entry.job_id or "")
            trials[trial_id] = Standing(_of_slurm(record, entry, task, known=warning is None), record, entry, task)
        else:
            queued = _waits_here(record, entry, submitting or is_alive(entry.newest, folder.logs))
            trials[trial_id] = Standing("queued" if queued else record.state, record, entry)
    return Standings(trials, tasks, warning)


def _of_slurm(record: TrialState, entry: Entry, task: slurm.Task | None, known: bool) -> str:
    event = entry.newest["event"]
    if record.state in ENDED_WELL:
        return record.state
    if entry.cancelled and (task is None or task.waits or not entry.lives_on):
        return "cancelled"
    if task is not None:
        began = (entry.lives_on or event == "cancelled") and not task.waits  # also where a node that was cut off wrote last
        over = event == "ended" and entry.newest.get("final")  # its task goes on with another trial
        return record.state if over else "running" if began else "queued"
    if known:
        return "interrupted" if record.state == "running" else record.state
    return {"started": "running", "ended": record.state, "withdrawn": record.state}.get(event, "queued")


def _waits_here(record: TrialState, entry: Entry, alive: bool) -> bool:
    """Whether the attempt that the ledger's newest line speaks of is still to begin, on this machine."""
    line = entry.newest
    return record.state != "running" and line.get("event") in ("queued", "submitted") and record.attempts < line["attempt"] and alive
