"""A study's missing trials as arrays of SLURM tasks: each exactly once, whoever submits, from wherever, however often.

    runs/STUDY/submissions/TOKEN/submission.json  study.yaml  cluster.yaml  JOB_submission.sh  JOB_TASK_0_log.{out,err}

The order makes it safe to die at any point. Everything a task reads is on disk, and the ledger says `queued` under the
submission's token, before sbatch is called; the token is the job's comment. A submitter that finds a token without a job
id asks the queue for it: found, the job is adopted; not found, sbatch was never accepted and the trials are submitted
anew. Should it have been accepted nevertheless, its tasks find a newer token in the ledger and do nothing.
"""

from __future__ import annotations

import getpass
import json
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from harness import tracking
from harness.config import BadInput, Frozen, Name, Shape, Slurm, Trial, Whole, parse
from harness.data.index import checked
from harness.store import ENDED, RETRIED, Store, write_atomically
from harness.study import LoadedStudy, Planned, first_trial, planned
from launch import slurm, snapshot
from launch.ledger import Ledger, Submitter, line
from launch.standing import Standing, Standings, job_name, queue, standings
from launch.status import label

if TYPE_CHECKING:
    from launch.sbatch import ArrayExecutor

PATIENCE = 120.0
"""seconds to wait for another submitter, who needs a few"""
TO_RESUME = 3.0
"""seconds; nodes refuse signals to a job until a moment after the controller says that it has resumed"""
AFTER_US = 1800.0
"""seconds for which a chain's job tries again"""
AGAIN = 10.0
"""seconds between two tries"""
CHAIN = "-chain"
"""at the end of the name of the job that submits again"""


class Submission(Frozen):
    """submission.json: all that a task of the array is told."""

    token: Name
    store: Path
    study: Name
    code: Path
    cluster: Slurm
    nodes: Whole
    tasks_per_node: Whole
    tasks: tuple[tuple[Name, ...], ...]
    """by array index: the ids of its trials"""
    by: str

    @classmethod
    def read(cls, folder: Path) -> Submission:
        file = folder / "submission.json"
        return parse(cls, json.loads(file.read_text()), str(file))


def check(loaded: LoadedStudy, store: Store, cluster: Slurm) -> None:
    """BadInput, a line a mistake, unless every trial of the study could start now, as far as a login node can know."""
    from launch import sbatch

    check_ranks(loaded, cluster)
    checked(loaded.workload.data, loaded.workload.evaluation.test)
    store.check_writable()
    tracking.check_store(store)
    for phase in loaded.phases:
        sbatch.check(cluster.of_phase(phase))


def check_ranks(loaded: LoadedStudy, cluster: Slurm) -> None:
    """BadInput unless every trial's batch can be split over the ranks it would get."""
    trial = first_trial(loaded)
    for phase in loaded.phases:
        trial.micro_batch_size(shape_of(loaded, cluster, phase).ranks)


def shape_of(loaded: LoadedStudy, cluster: Slurm, phase: str) -> Shape:
    return cluster.of_phase(phase).shape(loaded.study.ranks)


# ------------------------------------------------------------------------------------------- what is missing


class Work:
    """What a submission finds to do; `problems` keep the study from being complete, `notes` do not. A line each."""

    def __init__(
        self, loaded: LoadedStudy, store: Store, cluster: Slurm, phase: str | None, retry: bool, ours: bool = False, chain: bool = False
    ) -> None:
        self.standings: Standings = standings(store, loaded.name, ours)
        results = self.standings.results()
        if retry and phase != "finalists":  # those of a search of which a trial runs again are not decided
            results = {i: result for i, result in results.items() if self.standings.trials[i].state not in RETRIED}
        self.plan: list[Planned] = [p for p in planned(loaded, results) if phase in (None, p.phase)]
        self.missing: list[Trial] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        for trial in (p.trial for p in self.plan if p.trial is not None):
            s = self.standings.trials.get(trial.trial_id)
            if s is None or not (s.live or s.state in ENDED):
                if s is not None and (starts := _fruitless(s)) > cluster.max_retries and not retry:
                    self.problems.append(f"{label(trial)}: {starts} submissions without a new checkpoint; run it again with --retry")
                else:
                    self.missing.append(trial)
            elif s.state in RETRIED:
                if retry:
                    self.missing.append(trial)
                else:
                    self.problems.append(f"{label(trial)}: {s.state} before: {s.record.last_error}; run it again with --retry")
        waiting = dict.fromkeys(p.arm for p in self.plan if p.trial is None)
        then = "" if chain else "; submit again then, or use --chain"
        self.notes += [f"{arm}: its finalists are decided when its search has ended{then}" for arm in waiting]
        ids = {p.trial.trial_id for p in planned(loaded, self.standings.results()) if p.trial is not None}
        self.left = sorted(trial_id for trial_id, s in self.standings.trials.items() if trial_id not in ids and s.live)
        """trials that wait or run and are not in the study file any more"""

    def left_note(self) -> str:
        return f"left the study file, and still queued or running: {', '.join(self.left)}; --prune cancels them"

    def shapes(self, loaded: LoadedStudy, cluster: Slurm) -> list[tuple[Shape, list[Trial]]]:
        """The missing trials by what they ask for, one array each unless that is too long."""
        found: dict[str, tuple[Shape, list[Trial]]] = {}
        for trial in self.missing:
            shape = shape_of(loaded, cluster, trial.phase)
            found.setdefault(repr(shape), (shape, []))[1].append(trial)
        return list(found.values())


def _fruitless(standing: Standing) -> int:
    """Submissions in a row that ended with the trial no further than before."""
    tokens = []
    for life in reversed(standing.entry.lives):
        if life.started["step"] != standing.record.committed:
            break
        if life.started["token"] not in tokens:
            tokens.append(life.started["token"])
    return len(tokens)


def packed(trials: Sequence[Trial], a_task: int) -> list[tuple[str, ...]]:
    return [tuple(t.trial_id for t in trials[i : i + a_task]) for i in range(0, len(trials), a_task)]


# ------------------------------------------------------------------------------------------------ submission


def submit(
    loaded: LoadedStudy, store: Store, cluster: Slurm, *, phase: str | None, retry: bool, prune: bool, chain: bool
) -> tuple[int, bool]:
    """Submits what is missing, and returns; the exit status, and whether there is no more to do.

    In a chain's job nobody is there to submit again: it does so itself while SLURM does not answer or has no room for its successor.
    """
    until = time.monotonic() + (AFTER_US if chain and slurm.inside() else 0)
    while True:
        try:
            status, over, again = _submit(loaded, store, cluster, phase=phase, retry=retry, prune=prune, chain=chain)
        except slurm.SlurmError as error:
            if not error.unanswered or time.monotonic() > until:
                raise
            print(f"error: {error}", file=sys.stderr)
            again = True
        if not again or time.monotonic() > until:
            return status, over
        time.sleep(AGAIN)


def _submit(
    loaded: LoadedStudy, store: Store, cluster: Slurm, *, phase: str | None, retry: bool, prune: bool, chain: bool
) -> tuple[int, bool, bool]:
    """As `submit`, once; at the end, whether another try could succeed."""
    check(loaded, store, cluster)
    ledger = Ledger(store.study(loaded.name))
    with Submitter(store.study(loaded.name)).lock(PATIENCE) as ours:
        if not ours:
            holder = Submitter(store.study(loaded.name)).path
            print(f"error: another submission of {loaded.name} is at work (it holds {holder}); wait for it, or stop it", file=sys.stderr)
            return 1, False, True
        work = Work(loaded, store, cluster, phase, retry, ours, chain)
        if work.standings.warning:
            print(f"error: {work.standings.warning}; nothing is submitted, since what is queued is not known", file=sys.stderr)
            return 1, False, True
        adopt(work.standings, store, loaded.name)
        _release(work.standings)
        for trial in (p.trial for p in work.plan if p.trial is not None):  # somebody may have deleted what waits
            s, folder = work.standings.trials.get(trial.trial_id), store.trial(loaded.name, trial.trial_id)
            if s is not None and s.live and not folder.config.is_file():
                folder.write_config(trial)
        if work.left and prune:
            work.notes += stop(store, loaded.name, work.left)
        elif work.left:
            work.notes.append(work.left_note())
        submitted, refused, again = 0, False, False
        arrays = {task.job_id.partition("_")[0] for task in work.standings.tasks}
        if work.missing:
            write_atomically(ledger.path.parent / "study.yaml", loaded.text())
            code = snapshot.take(ledger.path.parent)
            for shape, trials in work.shapes(loaded, cluster):
                try:
                    for trials_of_array in _arrays(trials, shape.cluster, _room(shape.cluster.qos, chain)):
                        arrays.add(_submit_array(loaded, store, shape, trials_of_array, code))
                        submitted += len(trials_of_array)
                except slurm.SlurmError as error:
                    work.problems.append(str(error))
                    refused, again = True, again or error.unanswered
            if submitted < len(work.missing) and not work.problems:
                work.notes.append(
                    f"{len(work.missing) - submitted} trial(s) are beyond what this user may have in the queue; "
                    "submit again when there is room, or use --chain"
                )
        over = not arrays and not work.missing
        if chain and (arrays or (work.missing and not refused)):  # missing, not refused, and nothing queued: there is no room
            try:
                _chain(loaded, store, cluster, sorted(arrays), phase)
            except slurm.SlurmError as error:
                work.problems.append(f"--chain: {error}")
                again = True
    after = standings(store, loaded.name)
    print(standing_line(loaded, after, submitted))
    for note in work.notes:
        print(note)
    for problem in work.problems:
        print(f"error: {problem}", file=sys.stderr)
    return (1 if work.problems else 0), over, again


def standing_line(loaded: LoadedStudy, now: Standings, submitted: int) -> str:
    ids = {p.trial.trial_id for p in planned(loaded, now.results()) if p.trial is not None}
    states = [s.state for trial_id, s in now.trials.items() if trial_id in ids]
    counts = f"submitted {submitted}, running {states.count('running')}, finished {states.count('finished')}"
    return f"{counts}, queued {states.count('queued')}"


def _release(found: Standings) -> None:
    if held := [task.job_id for task in found.tasks if task.held_by_mishap and task.user == getpass.getuser()]:
        slurm.release(held)
        first = f"{', '.join(held[:5])}{', ...' if held[5:] else ''}"
        print(f"released {len(held)} task(s) held after a failed launch or for want of room: {first}")


def _room(qos: str | None, chain: bool) -> int | None:
    """Tasks that this user may add to the queue, one place kept for a chain; None for any number."""
    limit = slurm.max_submitted(qos)
    return None if limit is None else max(0, limit - slurm.submitted() - chain)


def _arrays(trials: list[Trial], cluster: Slurm, room: int | None) -> Iterator[list[Trial]]:
    """The trials of each array: as few arrays as the cluster's MaxArraySize allows, in all no more tasks than there is room for."""
    longest, a_task = slurm.max_array_size(), cluster.trials_per_task
    allowed = len(trials) if room is None else room * a_task
    for first in range(0, min(len(trials), allowed), longest * a_task):
        yield trials[first : min(first + longest * a_task, allowed)]


def _submit_array(loaded: LoadedStudy, store: Store, shape: Shape, trials: list[Trial], code: Path) -> str:
    """One array; its job id. Raises SlurmError with nothing recorded as submitted."""
    folder, token = _folder(loaded, store, shape.cluster)
    tasks = packed(trials, shape.cluster.trials_per_task)
    described = Submission(
        token=token, store=store.root, study=loaded.name, code=code, cluster=shape.cluster,
        nodes=shape.nodes, tasks_per_node=shape.tasks_per_node, tasks=tuple(tasks), by=f"{getpass.getuser()}@{socket.gethostname()}",
    )  # fmt: skip
    write_atomically(folder / "submission.json", described.model_dump_json(exclude_unset=True, indent=1) + "\n")
    from launch import sbatch

    ledger = Ledger(store.study(loaded.name))
    place = {trial_id: index for index, ids in enumerate(tasks) for trial_id in ids}
    attempts = {}
    for trial in trials:
        of_trial = store.trial(loaded.name, trial.trial_id)
        of_trial.write_config(trial)
        attempts[trial.trial_id] = of_trial.newest_attempt() + 1

    def lines(event: str, array: str | None = None) -> list[dict[str, Any]]:
        common = {"token": token, "code": code.name}
        return [
            line(event, t, attempts[t.trial_id], **common, index=place[t.trial_id])
            | ({"job_id": f"{array}_{place[t.trial_id]}"} if array else {})
            for t in trials
        ]

    made = sbatch.executor(folder, shape, job_name(loaded.name), token, _setup(code), len(tasks))
    ledger.extend(lines("queued"))
    array = _call(made, _command("launch.task", str(folder)), job_name(loaded.name), token)
    if isinstance(array, slurm.SlurmError):
        ledger.extend(lines("withdrawn"))
        shutil.rmtree(folder)
        raise array
    ledger.extend(lines("submitted", array))
    return array


def _call(made: ArrayExecutor, command: str, name: str, token: str) -> str | slurm.SlurmError:
    """The job id; or why there is none, after a look at the queue for a job whose answer was lost."""
    try:
        return made.submit_command(command)
    except slurm.SlurmError as error:
        return slurm.wait_for_comment(name, token) or error


def _folder(loaded: LoadedStudy, store: Store, cluster: Slurm) -> tuple[Path, str]:
    """A new submission's folder, with the study and the cluster as they are now, and its token."""
    token = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    folder = store.study(loaded.name) / "submissions" / token
    folder.mkdir(parents=True)
    for name, text in _files(loaded, cluster).items():
        (folder / name).write_text(text)
    return folder, token


def _files(loaded: LoadedStudy, cluster: Slurm) -> dict[str, str]:
    """What a submission's folder keeps of the moment: file name -> text."""
    asked = yaml.safe_dump(cluster.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    return {"study.yaml": loaded.text(), "cluster.yaml": asked}


def _command(module: str, *arguments: str) -> str:
    return shlex.join([sys.executable, "-u", "-m", module, *arguments])


def _setup(code: Path) -> list[str]:
    return ["trap : TERM  # the script outlives a SIGTERM: the ranks save themselves meanwhile", *snapshot.exports(code)]


def adopt(found: Standings, store: Store, study: str) -> None:
    """Writes down the job ids of submissions whose submitter died before it could. For the holder of the lock."""
    known = {one["token"] for one in Ledger(store.study(study)).lines() if one["event"] == "submitted" and "token" in one}
    orphans = [
        line("submitted", store.trial(study, trial_id).read_config(), s.entry.newest["attempt"], token=s.entry.token, index=s.entry.index)
        | {"job_id": s.task.job_id, "code": s.entry.code, "adopted": True}
        for trial_id, s in found.trials.items()
        if s.task is not None and s.entry.token and s.entry.token not in known
    ]
    if orphans:
        Ledger(store.study(study)).extend(orphans)
        print(f"adopted {len(orphans)} trial(s) of a submission that nobody had written down")


# ---------------------------------------------------------------------------------------------------- chains


def _chain(loaded: LoadedStudy, store: Store, cluster: Slurm, arrays: Sequence[str], phase: str | None) -> None:
    """A small job that submits again when the arrays have ended, however they ended; without any, in ten minutes.

    One that waits already stays, or goes if it has another study, cluster or code than now.
    """
    from launch import sbatch

    name = job_name(loaded.name, CHAIN)
    code = snapshot.take(store.study(loaded.name))
    now = _files(loaded, cluster) | {"chain.json": json.dumps({"code": code.name, "phase": phase})}
    earlier = [
        task for task in queue(store, loaded.name, CHAIN) if task.waits and task.job_id != slurm.inside() and task.user == getpass.getuser()
    ]
    if any(_has(store.study(loaded.name) / "submissions" / task.comment, now) for task in earlier):
        return
    folder, token = _folder(loaded, store, cluster)
    arguments = [
        "study",
        "submit",
        str(folder / "study.yaml"),
        "--cluster",
        str(folder / "cluster.yaml"),
        "--store",
        str(store.root),
        "--chain",
    ]
    (folder / "chain.json").write_text(now["chain.json"])
    dependency = "afterany:" + ":".join(arrays) if arrays else None
    slurm.cancel([task.job_id for task in earlier])  # first: there may be room for one only
    made = sbatch.executor(folder, cluster.of_phase("chain").shape(1), name, token, _setup(code), None, dependency)
    if not arrays:
        made.parameters["additional_parameters"] |= {"begin": "now+10minutes"}
    job = _call(made, _command("launch", *arguments, *(["--phase", phase] if phase else [])), name, token)
    if isinstance(job, slurm.SlurmError):
        shutil.rmtree(folder)
        raise job
    when = f"when {', '.join(arrays)} have ended" if arrays else "in ten minutes, when there may be room"
    print(f"job {job} goes on {when}: {folder}")


def _has(folder: Path, files: Mapping[str, str]) -> bool:
    return all((folder / name).exists() and (folder / name).read_text() == text for name, text in files.items())


# ------------------------------------------------------------------------------------------ dry run and cancel


def dry_run(loaded: LoadedStudy, store: Store, cluster: Slurm, phase: str | None, retry: bool) -> Iterator[str]:
    """What `submit` would hand to sbatch, and for which trials."""
    from launch import sbatch

    check_ranks(loaded, cluster)
    work = Work(loaded, store, cluster, phase, retry)
    if work.standings.warning:
        yield f"warning: {work.standings.warning}"
    code = store.study(loaded.name) / "code" / "(snapshot)"
    for shape, trials in work.shapes(loaded, cluster):
        tasks = packed(trials, shape.cluster.trials_per_task)
        folder = store.study(loaded.name) / "submissions" / "(token)"
        made = sbatch.executor(folder, shape, job_name(loaded.name), "(token)", _setup(code), len(tasks))
        yield made.script(_command("launch.task", str(folder)))
        by_id = {trial.trial_id: trial for trial in trials}
        for index, ids in enumerate(tasks):
            for trial_id in ids:
                yield f"{index:>5}  {label(by_id[trial_id])}: {shape.nodes} node(s) x {shape.tasks_per_node} rank(s)"
    yield f"{len(work.missing)} trial(s) to submit"
    yield from work.notes
    if work.left:
        yield work.left_note()
    yield from (f"error: {problem}" for problem in work.problems)


def stop(store: Store, study: str, trial_ids: Sequence[str]) -> list[str]:
    """Takes the trials out of the queue; running ones save themselves first. What was done, a line each."""
    found = standings(store, study)
    if found.warning:
        raise BadInput(found.warning)
    said, lines, running = [], [], {}
    waiting: dict[str, list[str]] = {}
    for trial_id in trial_ids:
        s = found.trials.get(trial_id)
        if s is None or not s.live or s.task is None:
            continue
        trial = store.trial(study, trial_id).read_config()
        lines.append(line("cancelled", trial, s.record.attempts, token=s.entry.token, job_id=s.task.job_id))
        if s.state == "running":
            running[s.task.job_id] = s
        else:
            waiting.setdefault(s.task.job_id, []).append(trial_id)
        said.append(f"{label(trial)}: {'stopping' if s.state == 'running' else 'taken out of the queue'} ({s.task.job_id})")
    try:
        Ledger(store.study(study)).extend(lines)
    except OSError as unwritten:  # a full disk is a reason to cancel
        said.append(f"warning: the ledger could not be written ({unwritten.strerror}): the next submission takes these trials up again")
    # a packed task goes on with its other trials: it asks the ledger before each
    shared = {s.task.job_id for trial_id, s in found.trials.items() if s.task and s.live and trial_id not in trial_ids}
    if alone := [job_id for job_id in waiting if job_id not in shared and job_id not in running]:
        slurm.cancel(alone)
    if running:
        of_signal: dict[str, list[str]] = {}
        for job_id, s in running.items():
            if s.task is not None and s.task.suspended and (refusal := _not_resumed(job_id)):
                what = (
                    "cancel it again once SLURM has resumed it"
                    if job_id in shared
                    else "killed, without what it did since its last checkpoint"
                )
                said.append(f"{job_id}: suspended, and may not be resumed ({refusal}): {what}")
                if job_id not in shared:
                    slurm.cancel([job_id])
                continue
            of_signal.setdefault(Submission.read(_submission(store, study, s)).cluster.signal, []).append(job_id)
        if any(s.task is not None and s.task.suspended for s in running.values()):
            time.sleep(TO_RESUME)
        for name, job_ids in of_signal.items():
            slurm.cancel(job_ids, name)
        _wait_until_gone(job_name(study), [job_id for job_id in running if job_id not in shared])
    return said


def _not_resumed(job_id: str) -> str | None:
    """SLURM's refusal; None where the job runs again, and can save itself."""
    try:
        slurm.resume(job_id)
    except slurm.SlurmError as refusal:
        return str(refusal)
    return None


def _submission(store: Store, study: str, standing: Standing) -> Path:
    return store.study(study) / "submissions" / str(standing.entry.token)


def _wait_until_gone(name: str, job_ids: Sequence[str]) -> None:
    """Returns when the jobs have left the queue; cancels what is still there in the end."""
    until = time.monotonic() + 60
    while left := [t.job_id for t in slurm.queue(name) if t.job_id in job_ids]:
        if time.monotonic() > until:
            slurm.cancel(left)
            return
        time.sleep(1.0)


def cancel(loaded: LoadedStudy, store: Store) -> list[str]:
    """Cancels every trial of the study that SLURM has, and its chain; what was done, a line each."""
    if not is_by_slurm(store, loaded.name):
        return []
    with Submitter(store.study(loaded.name)).lock(PATIENCE):
        chained = [t.job_id for t in queue(store, loaded.name, CHAIN) if t.job_id != slurm.inside() and t.user == getpass.getuser()]
        if chained:
            slurm.cancel(chained)
        found = standings(store, loaded.name)
        stopped = stop(store, loaded.name, [trial_id for trial_id, s in found.trials.items() if s.task is not None])
    return [f"{loaded.name}: chain taken out of the queue ({', '.join(chained)})", *stopped] if chained else stopped


def is_by_slurm(store: Store, study: str) -> bool:
    """Whether any of the study's trials was ever given to SLURM."""
    return any("token" in one for one in Ledger(store.study(study)).lines())
