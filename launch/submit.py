"""A study's missing trials, each run once to its end: submitit jobs on this machine, or this very process.

The submitter holds runs/STUDY/submit.lock, gives a trial to a job when a place is free, and looks at the trial's own
record to know how it ended. Killed, it leaves its jobs running; the next one finds them by ledger and lock.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from harness import deliverer, schedule, tracking
from harness.config import BadInput, Cluster, Local, Slurm, Trial
from harness.data.index import checked
from harness.store import ENDED, ENDED_WELL, RETRIED, Store, TrialFolder, TrialState, write_atomically
from harness.study import LoadedStudy, Planned, first_trial, planned
from launch import snapshot
from launch.job import Job
from launch.ledger import Ledger, Submitter, is_alive
from launch.local import SECONDS_TO_SAVE, Running, Stop, deaf_to_the_terminal, places, saved, visible_gpus, wind_down
from launch.progress import Snapshot, View, view
from launch.standing import standings
from launch.status import label, last_error, rows

# ------------------------------------------------------------------------------- before anything is written


def world_size(loaded: LoadedStudy, cluster: Cluster, phase: str = "search") -> int:
    """Processes a trial of that phase: one in the debug executor, else as the study says, else as the cluster file says."""
    cluster = cluster.of_phase(phase)
    if isinstance(cluster, Slurm):
        return cluster.shape(loaded.study.ranks).ranks
    return 1 if cluster.executor == "debug" else loaded.study.ranks or cluster.ranks


def check(loaded: LoadedStudy, store: Store, cluster: Local) -> None:
    """BadInput, a line a mistake, unless every trial of the study could start now."""
    if waiting := [trial_id for trial_id, s in standings(store, loaded.name).trials.items() if s.live and s.entry.token]:
        raise BadInput(f"{loaded.name}: {len(waiting)} of its trials are queued or running in SLURM; wait, or: wrbench study cancel")
    first_trial(loaded).micro_batch_size(ranks := world_size(loaded, cluster))
    checked(loaded.workload.data, loaded.workload.evaluation.test)
    if ranks > 1 and not {"?", "#"}.isdisjoint(str(store.root)):
        raise BadInput(
            f"--store {store.root}: ranks meet at a file in it, which torch does not find below a name with ? or #; another --store"
        )
    store.check_writable()
    tracking.check_store(store)


# ---------------------------------------------------------------------------------------------- submission


class Submission:
    """One submitter's work. Its `problems` are what keeps the study from being complete, a line each."""

    def __init__(
        self, loaded: LoadedStudy, store: Store, cluster: Local, view: View, stop: Stop, *, phase: str | None, retry: bool
    ) -> None:
        self.loaded, self.store, self.cluster, self.view, self.stop = loaded, store, cluster, view, stop
        self.phase, self.retry = phase, retry
        self.ledger = Ledger(store.study(loaded.name))
        self.ranks = world_size(loaded, cluster)
        gpus = visible_gpus()
        self.places = places(cluster.max_parallel, self.ranks, gpus)
        if gpus and not self.places[0]:
            view.say(f"{self.ranks} ranks a trial and {len(gpus)} GPU(s): training on the CPU; for the GPUs --set ranks={len(gpus)}")
        self.free = list(range(len(self.places)))
        self.steps_a_trial = schedule.total_steps(first_trial(loaded))
        self.queue: deque[Trial] = deque()
        self.running: dict[str, Running] = {}
        self.plan: list[Planned] = []
        self.states: dict[str, TrialState] = {}
        self.problems: list[str] = []
        self.submitted = 0

    def run(self) -> None:
        """Returns when every trial has ended or, after a signal, when the running ones have saved themselves."""
        write_atomically(self.ledger.path.parent / "study.yaml", self.loaded.text())
        self.code = snapshot.take(self.ledger.path.parent)
        self._enqueue({})
        self._enqueue(self._results())
        began, before, next_look = time.monotonic(), sum(self._steps()), 0.0
        while (self.queue or self.running) and not self.stop.asked:
            while self.queue and self.free and not self.stop.asked:
                self._start(self.queue.popleft(), self.free.pop(0))
            if any([self._reap(r) for r in list(self.running.values()) if r.done()]):
                self._enqueue(self._results())
                next_look = 0.0
            if (now := time.monotonic()) >= next_look:
                for trial_id, running in self.running.items():
                    self.states[trial_id] = running.folder.state()
                    if self.states[trial_id].state not in ENDED_WELL and running.has_lost_a_rank(self.ranks):
                        running.signal(signal.SIGKILL)
                self.view.update(self._snapshot(began, before))
                next_look = now + max(0.5, 10 * (time.monotonic() - now))  # long journals are read less often
            time.sleep(0.1)
        if self.stop.asked:
            self._stop()
        else:
            undecided = dict.fromkeys(p.arm for p in self.plan if p.trial is None)
            self.problems += [f"{arm}: no finalists yet: its search has not ended, or too little of it has a result" for arm in undecided]
        self.view.update(self._snapshot(began, before))

    def _results(self) -> dict[str, float | None]:
        """Of the trials that have ended and are not to run again."""
        busy = self.running.keys() | {t.trial_id for t in self.queue}
        return {k: v for k, v in self.store.results(self.loaded.name).items() if k not in busy}

    def _enqueue(self, results: Mapping[str, float | None]) -> None:
        """Takes up every trial of the plan not seen before; finalists appear when the search of their arm has ended."""
        self.plan = [p for p in planned(self.loaded, results) if self.phase in (None, p.phase)]
        lines = self.ledger.newest()
        for trial in (p.trial for p in self.plan if p.trial is not None):
            if trial.trial_id in self.states:
                continue
            folder = self.store.trial(self.loaded.name, trial.trial_id)
            state = self.states[trial.trial_id] = folder.state()
            line = lines.get(trial.trial_id)
            if line is not None and not is_alive(line, folder.logs):
                line = None
            if line is not None or state.state == "running":
                self._adopt(trial, folder, line)
            elif state.state in RETRIED and not self.retry:
                self.problems.append(f"{label(trial)}: {state.state} before: {state.last_error}; run it again with --retry")
            elif state.state not in ENDED_WELL:
                folder.write_config(trial)
                self.ledger.append("queued", trial, folder.newest_attempt() + 1, code=self.code.name)
                self.queue.append(trial)

    def _adopt(self, trial: Trial, folder: TrialFolder, line: Mapping[str, Any] | None) -> None:
        job = {"job_id": line["job_id"], "place": line["place"]} if line else None
        attempt = line["attempt"] if line else folder.newest_attempt()
        place = job["place"] if job and job["place"] in self.free else next(iter(self.free), None)
        if place is not None:
            self.free.remove(place)
        self.running[trial.trial_id] = Running(trial, folder, place, attempt, job)
        self.view.say(f"{label(trial)} is running already: waiting for it")

    def _start(self, trial: Trial, place: int) -> None:
        folder = self.store.trial(self.loaded.name, trial.trial_id)
        attempt = folder.newest_attempt() + 1
        job = Job(self.store.root, self.loaded.name, trial.trial_id, self.cluster.threads_per_rank, uuid.uuid4().hex)
        running = self.running[trial.trial_id] = Running(trial, folder, place, attempt)
        self.submitted += 1
        debug = self.cluster.executor == "debug"
        if not debug:
            running.process = self._submit(job, folder, self.places[place])
        running.job = {"job_id": f"debug-{os.getpid()}" if debug else running.process.job_id, "place": place}
        self.ledger.append("submitted", trial, attempt, **running.job)
        if debug and _in_this_process(job) == "interrupted":
            self.stop.asked += 1

    def _submit(self, job: Job, folder: TrialFolder, gpus: Sequence[int]) -> Any:
        import submitit

        executor = submitit.LocalExecutor(folder=folder.logs)
        executor.update_parameters(
            timeout_min=self.cluster.timeout_minutes, tasks_per_node=self.ranks, gpus_per_node=len(gpus), visible_gpus=tuple(gpus)
        )
        with deaf_to_the_terminal(), submitit.helpers.environment_variables(**snapshot.environment(self.code)):
            return executor.submit(job)

    def _reap(self, running: Running) -> bool:
        """Takes note of a job that is over; False when its trial runs on under somebody else's hands."""
        if running.folder.is_running():
            running.process = running.job = None
            return False
        trial = running.trial
        del self.running[trial.trial_id]
        if running.place is not None:
            self.free.append(running.place)
        state = self.states[trial.trial_id] = running.folder.state()
        fields = {**(running.job or {}), "state": state.state}
        self.ledger.append("ended", trial, running.attempt, **fields)
        for leftover in running.folder.logs.glob("*.rendezvous"):
            leftover.unlink(missing_ok=True)
        if state.state in ENDED_WELL:
            holdout = state.answer.get("anytime/holdout_top1")
            self.view.say(f"{label(trial)}: {state.state}" + (f", holdout/top1 {holdout:.3f}" if holdout is not None else ""))
        elif not self.stop.asked:
            reason = last_error(running.folder, state) or "told to stop, and saved itself; submit again to go on"
            self.problems.append(f"{label(trial)}: {state.state if state.state == 'failed' else 'interrupted'}: {reason}")
            self.view.say(self.problems[-1])
        return True

    def _stop(self) -> None:
        running = list(self.running.values())
        if running:
            self.view.say(f"stopping: {len(running)} running trial(s) save themselves; Ctrl-C again kills them")
        wind_down(running, self.stop)
        for one in running:
            if one.job is None and one.folder.is_running():
                self.view.say(f"{label(one.trial)}: runs on, since it was not started from here")
            else:
                self._reap(one)
                self.view.say(saved(one))
        self.queue.clear()

    # ------------------------------------------------------------------------------------------- what is seen

    def _steps(self, in_full: Collection[str] = ENDED) -> Iterator[int]:
        """Of each trial; in full if it has ended in one of these states."""
        for p in self.plan:
            if p.trial is not None:
                state = self.states[p.trial.trial_id]
                over = state.state in in_full and p.trial.trial_id not in {t.trial_id for t in self.queue}
                yield schedule.total_steps(p.trial) if over else state.step

    def _snapshot(self, began: float, before: int) -> Snapshot:
        steps, total = sum(self._steps()), self.steps_a_trial * len(self.plan)
        rate = (steps - before) / max(1e-9, time.monotonic() - began)
        states = {p.trial.trial_id: (p.arm, self.states[p.trial.trial_id]) for p in self.plan if p.trial is not None}
        finished = [(arm, s.answer.get("anytime/holdout_top1")) for arm, s in states.values() if s.state == "finished"]
        best = max(((value, arm) for arm, value in finished if value is not None), default=None)
        over = {trial_id for trial_id, (_, s) in states.items() if s.state in ENDED_WELL}
        running = len(self.running.keys() - over)  # a job is still there a moment after its trial has ended
        return Snapshot(
            steps=sum(self._steps(ENDED_WELL)),
            total_steps=total,
            finished=len(over),
            running=running,
            waiting=len(self.plan) - len(over) - running - len(self.problems),
            failed=len(self.problems),
            best=best,
            seconds_left=(total - steps) / rate if steps > before else None,
        )


def _in_this_process(job: Job) -> str:
    """The debug executor: a plain call, so that a debugger or profiler sees all of it; never opens one itself."""
    try:
        return job.train()
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return "failed"


# --------------------------------------------------------------------------------------------- what is asked for


def submit(loaded: LoadedStudy, store: Store, cluster: Local, *, phase: str | None, retry: bool, again: str, sync: str) -> int:
    """Runs what is missing, in the foreground; the exit status.

    `again` is the command that goes on after an interruption, `sync` the one that delivers what MLflow lacks at the end.
    """
    check(loaded, store, cluster)
    with ExitStack() as delivering:
        with Submitter(store.study(loaded.name)).lock() as ours:
            if not ours:
                print(_standing(loaded, store, 0))
                holder = Submitter(store.study(loaded.name)).holder()
                print("another submission runs them" + (f": process {holder[1]} on {holder[0]}" if holder else ""))
                return 0
            delivery = delivering.enter_context(deliverer.start_delivery(store, loaded.name))
            with Stop() as stop, view(plain=cluster.executor == "debug") as seen:
                work = Submission(loaded, store, cluster, seen, stop, phase=phase, retry=retry)
                work.run()
            print(_standing(loaded, store, work.submitted))
        for problem in work.problems:
            print(f"error: {problem}", file=sys.stderr)
        if stop.asked:
            print(f"interrupted; to go on: {again}")
        print("delivering the rest to MLflow", flush=True)
    if any(not store.trial(loaded.name, trial_id).is_running() for trial_id in tracking.undelivered(store, loaded.name)):
        print(f"warning: not delivered to MLflow: {delivery.failure()}; results are kept, to deliver them: {sync}", file=sys.stderr)
    if stop.asked:
        return 130
    return 1 if work.problems else 0


def _standing(loaded: LoadedStudy, store: Store, submitted: int) -> str:
    found = rows(loaded, store)
    started = Ledger(store.study(loaded.name)).newest()
    running = sum(r.state == "running" or (r.state == "queued" and started[str(r.trial_id)]["event"] == "submitted") for r in found)
    ended = Counter(r.state for r in found if r.state in ENDED)
    unwell = "".join(f", {state} {ended[state]}" for state in ENDED if state != "finished" and ended[state])
    return f"submitted {submitted}, running {running}, finished {ended['finished']}{unwell}"


def detach(loaded: LoadedStudy, store: Store, cluster: Local, arguments: Sequence[str]) -> str:
    """Starts `wrbench ARGUMENTS` in a session of its own; a line that says where it went."""
    check(loaded, store, cluster)
    folder = store.study(loaded.name) / "submissions"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    return f"submitting in the background as process {process.pid}; log: {log}"


def dry_run(loaded: LoadedStudy, store: Store, phase: str | None, retry: bool) -> list[str]:
    """What `submit` would do, a line each."""
    lines, found = [], rows(loaded, store)
    again = retry and phase != "finalists"
    open_again = {r.arm for r in found if again and r.phase == "search" and r.state in RETRIED}
    for r in found:
        if phase not in (None, r.phase):
            continue
        if r.phase == "finalists" and r.arm in open_again:
            r = replace(r, trial_id=None, state="pending", step=0)
        name = f"{r.arm} seed {r.seed} {r.trial_id or '(decided by the search)'}"
        if r.state in (*ENDED_WELL, "running", "queued") or (r.state in RETRIED and not retry):
            lines.append(f"skip    {name}: {r.state}")
        else:
            lines.append(f"{'later ' if r.trial_id is None else 'submit'}  {name}: {r.state} at step {r.step} of {r.total_steps}")
    return lines


def cancel(loaded: LoadedStudy, store: Store) -> list[str]:
    """Stops the study's submitter and whatever jobs of it are left, after they saved; what was stopped, a line each."""
    folder = store.study(loaded.name)
    submitter = Submitter(folder)
    lines = Ledger(folder).newest()
    running = []
    for trial_folder in store.trials(loaded.name):
        line = lines.get(trial_folder.path.name)
        if line is not None and is_alive(line, trial_folder.logs):
            running.append(Running(trial_folder.read_config(), trial_folder, None, trial_folder.newest_attempt(), line))
    said = []
    if (holder := submitter.holder()) is not None:
        host, pid = holder
        if host != socket.gethostname():
            raise BadInput(f"{loaded.name}: its submitter is process {pid} on {host}; cancel it there")
        with suppress(ProcessLookupError):  # it ended this moment
            os.kill(pid, signal.SIGTERM)
        said.append(f"stopped the submitter, process {pid}")
        patience = time.monotonic() + SECONDS_TO_SAVE + 30
        while submitter.holder() == holder and time.monotonic() < patience:
            time.sleep(0.2)
    wind_down(running)
    return [*said, *map(saved, running)]
