"""The supervisor of one array task: starts the ranks of its trials by srun, and decides what follows when they end.

    python -m launch.task SUBMISSION_FOLDER        in the batch script, on the first node of the task; no torch

It outlives the ranks: whatever ends them, all at once or one (srun then kills the others), is known from the trial's
journal. Then one of: the next trial; the same again from its last checkpoint; `scontrol requeue` of this one task, after a
preemption, near the time limit, or for other nodes than those where the ranks failed; or the trial is given up, which is
recorded. A signal that asks the ranks to save themselves reaches them and not this process. After a node failure that
SLURM sees it requeues the task itself.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from harness import deliverer, journal, tracking
from harness.config import Trial
from harness.store import ENDED_WELL, RETRIED, Store, TrialFolder, TrialState, close
from launch import failure, slurm
from launch.array import Submission
from launch.ledger import Entry, Ledger
from launch.status import final_error

POLL = 0.5
"""seconds between two looks at the ranks"""
SUSPENDED = 30.0
"""seconds; a look that comes so much later than after POLL means that the whole job was suspended, not that ranks stall"""
SLACK = 75.0
"""seconds that SLURM may send its signal earlier than asked, and some"""
OVER = "TimeLimit"
"""SLURM's reason for ending a job by SIGTERM, which can go back into the queue until SIGKILL follows (KillWait, 30 s by default)"""
STOPPED = ("preempted", "time limit", "stopped")
"""kinds of ends after which the task goes back into the queue"""
NO_FAILURE = (*STOPPED, "terminated", "superseded", "cancelled", "port")
"""kinds of ends that say nothing against the trial"""
ROOM = 1 << 20
"""bytes without which a trial is not begun: it could not even say how it ended"""
TO_MAKE_ROOM = 600.0
"""seconds that a task keeps its nodes while the disk is full; then it is held, and the next submission releases it"""
PORTS = 16
"""kept for each job to meet at: ranks bind one seconds after it was found free, so no other job may choose it"""
TO_DELIVER = 2.0
"""seconds that the end of a task waits for MLflow; `wrbench sync` delivers the rest"""


@dataclass
class End:
    """How the ranks of one life of a trial ended."""

    state: TrialState
    kind: str
    """finished | diverged | cancelled | preempted | time limit | stopped | superseded | terminated | stalled | one of failure.kind"""
    error: str | None = None
    seconds: float = 0.0
    """from srun to its end"""
    nodes: str = ""
    """to blame, perhaps: the next try is elsewhere, if there is elsewhere"""


class Supervisor:
    """One life of one array task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given = Submission.read(folder)
        self.cluster = self.given.cluster
        self.store = Store(self.given.store)
        self.ledger = Ledger(self.store.study(self.given.study))
        self.index = int(os.environ["SLURM_ARRAY_TASK_ID"])
        self.job_id = slurm.inside() or ""
        self.life = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.nodes = os.environ["SLURM_JOB_NODELIST"]
        self.began = time.monotonic()
        self.attempt = 0
        """that the ranks of the newest life claim"""
        self.terminated = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """SLURM ends the job (cancelled, over its limit, preempted without grace). The ranks got the same signal."""
        self.terminated = True

    def run(self) -> int:
        """The exit status: 0 unless a trial was given up. A task that is requeued ends before it returns."""
        given_up = 0
        for trial_id in self.given.tasks[self.index]:
            folder = self.store.trial(self.given.study, trial_id)
            if not folder.config.is_file():
                _say(f"{trial_id}: its folder was deleted while it waited; submit the study again")
                continue
            trial = folder.read_config()
            with ExitStack() as delivering:
                if tracking.is_server(tracking.tracking_uri(self.store)) and not self._over(trial_id, folder):
                    sender = deliverer.start_delivery(self.store, self.given.study, [trial_id])
                    delivering.callback(sender.stop, TO_DELIVER)
                while not self._over(trial_id, folder):
                    if self.attempt and self._is_late():  # the signal comes once, and what begins now would not hear it
                        delivering.close()
                        return self._requeue("time limit", trial, folder)
                    if not self._wait_for_room(folder):
                        if self.terminated:  # SLURM ends the job: it does not go back into the queue
                            return 0
                        delivering.close()
                        return self._requeue("disk", trial, folder, hold=True)
                    end = self._live(trial, folder)
                    if end.kind in ("superseded", "terminated"):
                        return 0
                    if end.kind in STOPPED:
                        exhausted = self._is_exhausted(end.kind, trial, folder)
                        if not exhausted or trial_id != self.given.tasks[self.index][-1]:
                            delivering.close()
                            return self._requeue(end.kind, trial, folder)
                    elif end.kind in (*ENDED_WELL, "cancelled") or self._is_hopeless(end, trial, folder):
                        continue
                    elif end.nodes and self._is_elsewhere(end.nodes, trial):
                        delivering.close()
                        return self._requeue("elsewhere", trial, folder, failed=end)
                    elif end.kind == "node":  # perhaps there are better ones later
                        delivering.close()
                        return self._requeue(end.kind, trial, folder)
            given_up += folder.state().state in RETRIED
        return 1 if given_up else 0

    def _wait_for_room(self, folder: TrialFolder) -> bool:
        """Whether there is some now: no life begins without."""
        until = time.monotonic() + TO_MAKE_ROOM
        while not (has_room := _has_room(folder.path)) and not self.terminated and time.monotonic() < until:
            time.sleep(10 * POLL)
        return has_room

    def _entry(self, trial_id: str) -> Entry:
        return self.ledger.entries().get(trial_id, Entry())

    def _over(self, trial_id: str, folder: TrialFolder) -> bool:
        """Whether there is nothing (more) to do for a trial, or it is another submission's by now."""
        entry = self._entry(trial_id)
        ours = entry.token == self.given.token and not entry.cancelled
        final = entry.newest.get("event") == "ended" and entry.newest.get("final", False)
        return not ours or final or folder.state().state in ENDED_WELL

    def _note_down(self, event: str, trial: Trial, attempt: int, **fields: Any) -> None:
        """In the ledger. On a full disk a beginning waits for room; what is told of an end may be lost: the journal has it."""
        while True:
            try:
                return self.ledger.append(event, trial, attempt, **fields)
            except OSError as full:
                if full.errno not in journal.NO_ROOM:
                    raise
            if event != "started" or self.terminated:
                return None
            time.sleep(10 * POLL)

    # ----------------------------------------------------------------------------------------------- one life

    def _live(self, trial: Trial, folder: TrialFolder) -> End:
        """Runs the ranks once, and says how it ended."""
        self.attempt = attempt = folder.newest_attempt() + 1
        before = folder.state()
        place = {"token": self.given.token, "job_id": self.job_id, "life": self.life}
        ranks = self.given.nodes * self.given.tasks_per_node
        self._note_down("started", trial, attempt, **place, nodes=self.nodes, ranks=ranks, step=before.committed)
        began, started = time.monotonic(), time.time()
        log = folder.logs / f"{self.job_id}.{self.life}.{len(self._entry(trial.trial_id).lives)}"  # one that claims no number has its own
        with open(f"{log}_srun_log.err", "ab") as said:
            process = subprocess.Popen(self._srun(trial, log), env=os.environ | self._meeting(), stdin=subprocess.DEVNULL, stderr=said)
        stalled = self._watch(process, folder)
        end = self._judge(process.poll() or 0, stalled, attempt, folder, log)
        if not Path(said.name).stat().st_size:
            Path(said.name).unlink()
        end.seconds = time.monotonic() - began
        lost = time.time() - max(started, _last_commit(folder, attempt))
        run_id = tracking.run_id(folder)
        self._note_down(
            "ended", trial, attempt, **place, state=end.state.state, kind=end.kind, step=end.state.committed, seconds=round(end.seconds, 1),
            lost_seconds=0.0 if end.state.state in ENDED_WELL else round(lost, 1),
            checkpoint=_newest_checkpoint(folder), run_id=run_id, error=end.error,
        )  # fmt: skip
        return end

    def _srun(self, trial: Trial, log: Path) -> list[str]:
        python = shlex.split(self.cluster.python) if self.cluster.python else [sys.executable]
        rank = ["-u", "-m", "launch.rank", str(self.store.root), self.given.study, trial.trial_id]
        options = ["--threads", str(self.cluster.threads_per_rank), "--signal", self.cluster.signal]
        return [
            "srun", "--kill-on-bad-exit=1", "--unbuffered", "--open-mode=append", f"--cpus-per-task={self.cluster.cpus_per_task}",
            f"--output={log}_%t_log.out", f"--error={log}_%t_log.err", *self.cluster.srun_args, *python, *rank, *options,
        ]  # fmt: skip

    def _meeting(self) -> dict[str, str]:
        """MASTER_ADDR, the first node, and a port that is free there, of those that are this job's and not its neighbours'."""
        first = 10_000 + PORTS * (int(os.environ["SLURM_JOB_ID"]) % (20_000 // PORTS))  # below what Linux gives to outgoing connections
        port = next(p for p in (*random.sample(range(first, first + PORTS), PORTS), *range(first, 30_000 + PORTS)) if _is_free(p))
        hosts = slurm.hosts(self.nodes)
        ends = {"MASTER_ADDR": slurm.address(hosts[0]), "WRBENCH_LAST_ADDR": slurm.address(hosts[-1])}
        return ends | {"MASTER_PORT": str(port), "WRBENCH_JOB_ID": self.job_id}

    def _watch(self, process: subprocess.Popen[bytes], folder: TrialFolder) -> bool:
        """Returns when the ranks have ended, or have saved themselves in a job that SLURM ends.

        True if they had to be killed since nothing moved.
        """
        size, moved, stalled = -1, time.monotonic(), False
        looked = moved
        while process.poll() is None and not (self.terminated and self._have_saved(folder)):  # SIGKILL may come before they have left
            now = folder.journal.stat().st_size if folder.journal.exists() else 0
            slept, looked = time.monotonic() - looked, time.monotonic()
            if now != size or slept > POLL + SUSPENDED:
                size, moved = now, looked
            idle = looked - moved
            if idle > self.cluster.stall_timeout_seconds + 30 and stalled:
                process.kill()
            elif idle > self.cluster.stall_timeout_seconds and not stalled and not self.terminated:
                if _has_room(folder.path):
                    stalled = True
                    self._kill_ranks(process)
                else:  # lines wait in memory, and the ranks train on
                    moved = looked
            time.sleep(POLL)
        return stalled

    def _have_saved(self, folder: TrialFolder) -> bool:
        return any(line["attempt"] == self.attempt and line.get("event") == "stop" for line in journal.glance(folder.journal))

    def _kill_ranks(self, process: subprocess.Popen[bytes]) -> None:
        try:
            slurm.kill_steps(self.job_id)
        except slurm.SlurmError as error:  # the controller is away: srun reaches the nodes itself
            _say(f"{error}; ending srun instead")
            process.terminate()

    # ------------------------------------------------------------------------------------------- what it means

    def _judge(self, exit_status: int, stalled: bool, attempt: int, folder: TrialFolder, log: Path) -> End:
        state, own = folder.state(), [line for line in journal.glance(folder.journal) if line["attempt"] == attempt]
        entry = self._entry(folder.path.name)
        newest = entry.lives[-1].started if entry.lives else {}
        if (newest.get("token"), newest.get("job_id"), newest.get("life")) != (self.given.token, self.job_id, self.life):
            return End(state, "superseded")  # this node was cut off, and the trial goes on elsewhere
        if state.state in ENDED_WELL:
            return End(state, state.state)
        if entry.cancelled:
            return End(state, "cancelled")
        stopping = (signal.SIGTERM, signal.Signals[f"SIG{self.cluster.signal}"])
        full = not _has_room(folder.path)  # neither the ranks nor srun could say then how they ended
        by_signal = not full and exit_status - 128 in stopping and _first_end(log) in (None, *map(signal.strsignal, stopping))
        if any(line.get("event") == "stop" for line in own) or (by_signal and not stalled):
            return End(state, self._why_stopped())
        if self.terminated:
            return End(state, "terminated")
        fruitless = state.committed == newest["step"]
        if stalled:
            silence = f"no line in the journal for {self.cluster.stall_timeout_seconds} s"
            return End(state, "stalled", silence, nodes=self.nodes if fruitless else "")
        if exit_status == 0:
            return End(state, "superseded")
        written = [(line.get("rank"), line["error"]) for line in own if line.get("event") == "end" and line["error"]]
        rank, error = written[0] if written else _logged(log)
        if full and error is None:
            return End(state, "disk", f"no room for the trial's files; srun ended with {exit_status}")
        found = failure.kind(error, exit_status, self._slurms_word() or _launch_failure(log))
        if found == "disk" and not full:  # no disk of ours: the node's own
            found = "node"
        killed = found in ("killed", "communication") and _first_end(log) == signal.strsignal(signal.SIGKILL)  # by somebody
        blamed = found == "node" or (fruitless and not killed and found not in (*failure.REPEATS, *NO_FAILURE, "disk"))
        return End(state, found, error or f"srun ended with {exit_status}", nodes=self._to_blame(found, rank, log) if blamed else "")

    def _to_blame(self, kind: str, rank: int | None, log: Path) -> str:
        """The nodes where the ranks failed: that of the rank whose error is told, else of the first to end; all if no rank could know."""
        said = Path(f"{log}_srun_log.err").read_text(errors="replace")
        if kind == "communication":
            return self.nodes
        if unlaunched := re.search(r"launch.* failed on node ([^\s:]+)", said):
            return unlaunched[1]
        ends = re.findall(r"^srun: error: (\S+): tasks? ([-,\d]+): ", said, re.M)
        first = [node for node, _ in ends]
        return next((node for node, tasks in ends if rank in _numbers(tasks)), first[0] if first else self.nodes)

    def _why_stopped(self) -> str:
        """preempted | time limit | stopped (by a signal from a person), or terminated when SLURM ends the job anyway."""
        state = self._state_of_job()
        requeued = int(state.get("Restarts", self.life)) > self.life
        if state.get("Reason") == OVER:
            return "time limit"
        if state.get("JobState") in ("CANCELLED", "TIMEOUT", "FAILED", "COMPLETING") and not requeued:
            return "terminated"
        if state.get("PreemptTime", "None") not in ("None", "Unknown"):
            return "preempted"
        return "time limit" if self._is_late() else "preempted" if self.terminated else "stopped"

    def _is_late(self) -> bool:
        """Whether the signal before the time limit may have come."""
        return time.monotonic() - self.began > 60 * self.cluster.time_minutes - self.cluster.signal_lead_seconds - SLACK

    def _state_of_job(self) -> dict[str, str]:
        try:
            return slurm.job(self.job_id)
        except slurm.SlurmError as error:
            _say(f"{error}; the job is taken to be running")
            return {}

    def _slurms_word(self) -> str | None:
        """Of the step that just ended: an out-of-memory kill leaves no other trace. None without slurmdbd."""
        try:
            printed = slurm.run("sacct", "--noheader", "--parsable2", "--format=JobID,State", "--jobs", self.job_id, seconds=10)
        except slurm.SlurmError:
            return None
        steps = dict(re.findall(r"^\S+\.(\d+)\|(\S+)", printed, re.M))
        word = steps[max(steps, key=int)] if steps else None
        return word if word in ("OUT_OF_MEMORY", "NODE_FAIL") else None

    def _is_exhausted(self, kind: str, trial: Trial, folder: TrialFolder) -> bool:
        """Whether this was the time limit once too often, which is recorded then."""
        entry, limit = self._entry(trial.trial_id), self.cluster.max_timeouts
        times = sum(life.ended is not None and life.ended["kind"] == "time limit" for life in entry.lives[entry.since :])
        if kind != "time limit" or times <= limit:
            return False
        self._give_up("exhausted", f"the time limit came {times} times; max_timeouts is {limit}", trial, folder)
        return True

    def _is_hopeless(self, end: End, trial: Trial, folder: TrialFolder) -> bool:
        """Whether one more try would fail as well, so that the trial is recorded as failed."""
        entry, failures, nodes = self._entry(trial.trial_id), 0, set[str]()
        for life in reversed(entry.lives[entry.since :]):
            if life.ended is None or life.ended["kind"] in NO_FAILURE:
                continue
            if life.ended["step"] != end.state.committed:
                break
            failures += 1
            if life.ended["kind"] == end.kind and failure.alike(life.ended.get("error"), end.error):
                nodes.add(life.started["nodes"])
        everywhere = end.kind in failure.OF_THE_TRIAL and len(nodes) > 1
        if end.kind in failure.REPEATS or everywhere or failures > self.cluster.max_retries:
            where = f", on {' and '.join(sorted(nodes))}" if len(nodes) > 1 else ""
            tries = f" ({failures} times without a new checkpoint{where})" if failures > 1 else ""
            self._give_up("failed", f"{end.kind}: {end.error}{tries}", trial, folder)
            return True
        _say(f"{trial.trial_id}: {end.kind}: {end.error}; again from step {end.state.committed}")
        return False

    def _give_up(self, state: str, why: str, trial: Trial, folder: TrialFolder) -> None:
        if folder.is_superseded(self.attempt):
            sys.exit(f"{trial.trial_id}: goes on elsewhere, and is not given up here")
        self._wait_for_room(folder)
        close(folder, state, why, self.attempt)
        self._note_down("ended", trial, folder.newest_attempt(), token=self.given.token, job_id=self.job_id, state=state, kind=state,
                           step=folder.state().committed, error=why, final=True)  # fmt: skip
        _say(f"{trial.trial_id}: {state}: {why}")

    # -------------------------------------------------------------------------------------------------- requeue

    def _is_elsewhere(self, nodes: str, trial: Trial) -> bool:
        """Whether SLURM could run this task on other nodes: one that excludes all there are would wait for ever."""
        try:
            (script,) = self.folder.glob("*submission*.sh")
            slurm.check_place(self.job_id, script, nodes)
        except (slurm.SlurmError, ValueError) as error:
            unknown = isinstance(error, slurm.SlurmError) and error.unanswered
            why = "could not be asked for another place" if unknown else "has no other place"
            _say(f"{trial.trial_id}: again on {nodes}, since SLURM {why}: {error}")
            return False
        return True

    def _avoid(self, failed: End, trial: Trial, folder: TrialFolder) -> None:
        """This task, which is in the queue again and cannot begin while this process lives, is not to come back to these nodes."""
        why = f"{failed.kind}: {failed.error}"
        for _ in range(3):  # scontrol itself may be ended by SLURM's SIGTERM to all of the job
            try:
                slurm.exclude(self.job_id, failed.nodes)
            except slurm.SlurmError as error:
                refusal = error
                time.sleep(POLL)
            else:
                where = {"token": self.given.token, "job_id": self.job_id, "nodes": failed.nodes}
                self._note_down("avoids", trial, folder.newest_attempt(), **where, why=why)
                _say(f"{trial.trial_id}: not on {failed.nodes} again, where it failed: {why}")
                return
        _say(f"{trial.trial_id}: may come to {failed.nodes} again, where it failed: {refusal}")

    def _requeue(self, kind: str, trial: Trial, folder: TrialFolder, hold: bool = False, failed: End | None = None) -> int:
        """Puts this one array task back into the queue, however long the controller is away; SLURM then ends this process.

        hold: there it waits until somebody releases it, as the next submission does. failed: it is kept from the nodes of that end.
        """
        attempt = folder.newest_attempt() if failed is None else self.attempt  # which the ranks may not have come to claim
        self._note_down("requeued", trial, attempt, token=self.given.token, job_id=self.job_id, life=self.life, kind=kind)
        wait = 1.0
        while not self.terminated or kind == "time limit":
            try:
                job = slurm.job(self.job_id)
                lives = job["JobState"] in ("RUNNING", "SUSPENDED") or job.get("Reason") == OVER
                if int(job.get("Restarts", self.life)) > self.life or not lives:
                    return 0
                slurm.requeue(self.job_id, hold)
                if failed is not None:
                    self._avoid(failed, trial, folder)
                break
            except slurm.SlurmError as error:
                wait = POLL if self.terminated else wait
                _say(f"{error}; trying again in {wait:.0f} s")
                time.sleep(wait)
                wait = min(2 * wait, 15.0)
        until = time.monotonic() + 60
        while not self.terminated and time.monotonic() < until:  # a job that ends by itself first would not be requeued
            time.sleep(POLL)
        return 0


def _say(text: str) -> None:
    with suppress(OSError):  # the log may lie on the same full disk as all else
        print(text, file=sys.stderr, flush=True)


def _logged(log: Path) -> tuple[int | None, str | None]:
    """The first rank that left an error in its log, and that; one that only lost its peers comes last."""
    paths = sorted(log.parent.glob(f"{log.name}_[0-9]*_log.err"))
    errors = [(int(path.name.split("_")[-2]), error) for path in paths if (error := final_error(path))]
    return min(errors, key=lambda found: failure.kind(found[1], None) == "communication", default=(None, None))


def _numbers(ranks: str) -> set[int]:
    """0-2,5 -> {0, 1, 2, 5}"""
    ends = [[int(end) for end in part.split("-")] for part in ranks.split(",")]
    return {rank for first, *last in ends for rank in range(first, (last or [first])[0] + 1)}


def _launch_failure(log: Path) -> str | None:
    """What srun says when the fault is a node's, and no rank could say anything."""
    said = Path(f"{log}_srun_log.err").read_text(errors="replace")
    return next((line for line in said.splitlines() if failure.kind(line, None) == "node"), None)


def _first_end(log: Path) -> str | None:
    """How the first ranks ended, in srun's words; it then ends the others by SIGTERM, and its own status may be theirs."""
    said = Path(f"{log}_srun_log.err").read_text(errors="replace")
    found = re.search(r"^srun: error: \S+ tasks? [-,\d]+: (.*)$", said, re.M)
    return found[1] if found else None


def _has_room(folder: Path) -> bool:
    """Whether something can be written there; a file's last block takes a line or two also on a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())  # a file system may find out late
    except OSError as full:
        if full.errno not in journal.NO_ROOM:
            raise
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: connections of the life before may linger
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _last_commit(folder: TrialFolder, attempt: int) -> float:
    """Seconds since 1970 of the attempt's last committed checkpoint; 0 if it made none."""
    times = [
        line["timestamp"] for line in journal.glance(folder.journal) if line.get("event") == "checkpoint" and line["attempt"] == attempt
    ]
    return times[-1] / 1000 if times else 0.0


def _newest_checkpoint(folder: TrialFolder) -> str | None:
    return max((p.name for p in folder.checkpoints.glob("step-*")), key=lambda n: [int(part) for part in n.split("-")[1::2]], default=None)


if __name__ == "__main__":
    sys.exit(Supervisor(Path(sys.argv[1])).run())
