"""Every SLURM command that wrbench runs but sbatch (launch/sbatch.py): squeue, sacct, scontrol, scancel.

Works without slurmdbd: what runs or waits comes from squeue, and sacct only adds to it. Nothing here knows a study.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60.0
"""that a command may take; SLURM's own clients give up on a controller that is down after about as long"""


class SlurmError(RuntimeError):
    """A command failed: SLURM's own message, on one line."""

    @property
    def unanswered(self) -> bool:
        """SLURM was not there to be asked, rather than that it refused."""
        return re.search(r"unable to contact|connect failure|timed out|no answer|communication|zero bytes", str(self), re.I) is not None


def run(*command: str, seconds: float = SECONDS) -> str:
    """What a command prints. Raises SlurmError with what it says otherwise."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: not found; run wrbench where SLURM's commands are, or with --cluster local") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {seconds:.0f} s") from None
    if done.returncode:
        raise SlurmError(one_line(done.stderr or done.stdout) or f"{command[0]}: ended with {done.returncode}")
    return done.stdout


def one_line(text: str) -> str:
    """SLURM's lines as one: `sbatch: error: ` goes before the first only."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(line if i == 0 else re.sub(r"^\w+: (error: )?", "", line) for i, line in enumerate(lines))


# -------------------------------------------------------------------------------------------------- the queue


@dataclass(frozen=True)
class Task:
    """A job, or one task of an array, that waits or runs."""

    job_id: str
    """123_4; 123 for a job that is no array"""
    state: str
    """SLURM's: PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """why it waits, as SLURM says"""
    nodes: str
    comment: str
    user: str

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def suspended(self) -> bool:
        """Hears no signal but KILL."""
        return self.state == "SUSPENDED"

    @property
    def held(self) -> bool:
        """Waits for somebody to run `scontrol release`."""
        return self.waits and "held" in self.reason.lower()

    @property
    def held_by_mishap(self) -> bool:
        """SLURM held it after a failed launch, or it was requeued into a hold: nobody has asked for that hold by itself."""
        return self.held and "requeued" in self.reason.lower()


_FIELDS = "%i|%T|%r|%N|%k|%u"


def queue(name: str) -> list[Task]:
    """The tasks of all jobs of that name that wait or run, whoever's they are. Raises SlurmError."""
    found = []
    for line in run("squeue", "--noheader", "--array", f"--name={name}", f"--format={_FIELDS}").splitlines():
        job_id, state, reason, nodes, comment, user = line.strip().split("|")
        found.append(Task(job_id, state, reason.strip("()"), nodes, comment, user))
    return found


def job(job_id: str) -> dict[str, str]:
    """What the controller says of one job or task, as scontrol's KEY=VALUE. Raises SlurmError."""
    line = run("scontrol", "--oneliner", "show", "job", job_id, seconds=20).splitlines()[0]
    return dict(field.split("=", 1) for field in line.split() if "=" in field)


def requeue(job_id: str, hold: bool) -> None:
    run("scontrol", "requeuehold" if hold else "requeue", job_id, seconds=20)


def exclude(job_id: str, nodes: str) -> None:
    """A job that waits is not begun on these nodes either, for as long as it is in the queue. Raises SlurmError."""
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={_excluded(job(job_id), nodes)}", seconds=20)


def check_place(job_id: str, script: Path, nodes: str) -> None:
    """Raises SlurmError unless nodes that are up, beside these and what the array task excludes already, could run its script."""
    task = job(job_id)
    excluded = _excluded(task, nodes)
    try:
        run("sbatch", "--test-only", f"--array={task['ArrayTaskId']}", f"--exclude={excluded}", str(script), seconds=20)
    except SlurmError as error:
        if "allocation failure" in str(error):
            raise
        # Where nothing can be tried, as by a user who has as many jobs as allowed: the nodes of the partition are counted instead.
        printed = run("sinfo", "--noheader", "--Node", f"--partition={task['Partition']}", "--format=%N %T", seconds=20)
        up = {node for node, state in map(str.split, printed.splitlines()) if not re.search(r"down|drain|fail|maint|unk|\*", state)}
        left = up - set(hosts(excluded))
        if len(left) < int(task["NumNodes"].split("-")[0]):
            raise SlurmError(f"partition {task['Partition']} has {len(left)} other node(s) up") from None


def _excluded(job: Mapping[str, str], nodes: str) -> str:
    """With what the job excludes already, by its user's wish or since an earlier failure: an update replaces the list."""
    before = job.get("ExcNodeList", "(null)")
    return nodes if before == "(null)" else f"{before},{nodes}"


def release(job_ids: Sequence[str]) -> None:
    run("scontrol", "release", *job_ids)


def resume(job_id: str) -> None:
    """A suspended job goes on, where this user may do that. Raises SlurmError."""
    run("scontrol", "resume", job_id)


def cancel(job_ids: Sequence[str], signal: str | None = None) -> None:
    """Ends jobs, or with `signal` sends it to their steps, which is to the ranks and not to the batch script.

    One that ends by itself this moment is no error, though scancel says it is.
    """
    for first in range(0, len(job_ids), 200):
        some = job_ids[first : first + 200]
        try:
            run("scancel", "--quiet", *([f"--signal={signal}"] if signal else []), *some)
        except SlurmError:
            there = dict(line.split("|") for line in run("squeue", "--noheader", "--array", "--format=%i|%T").split())
            if any(there.get(job_id.partition(".")[0], "COMPLETING") != "COMPLETING" for job_id in some):
                raise


def kill_steps(job_id: str) -> None:
    """Ends what srun runs in a job and not the job, as SIGKILL to the job would. Raises SlurmError."""
    found = run("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i", seconds=20).split()
    if steps := [step for step in found if step.rpartition(".")[2].isdigit()]:  # beside JOB.batch and JOB.extern
        cancel(steps, "KILL")


def address(node: str) -> str:
    """Where the ranks meet: the node's own name, or where that does not resolve the address that SLURM reaches it at."""
    with suppress(OSError):
        socket.getaddrinfo(node, None)
        return node
    found = re.search(r"NodeAddr=(\S+)", run("scontrol", "--oneliner", "show", "node", node))
    return found[1] if found else node


def hosts(nodes: str) -> list[str]:
    """Of a list as SLURM writes it: n[1-2,7] -> n1, n2, n7."""
    return run("scontrol", "show", "hostnames", nodes).split()


# --------------------------------------------------------------------------------------------------- limits


def max_array_size() -> int:
    """Tasks of the longest array that the cluster takes. Raises SlurmError."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config"), re.M)
    return int(found[1]) if found else 1001


def max_submitted(qos: str | None) -> int | None:
    """Tasks that this user may have in the queue, by association and quality of service; None without a limit or anybody to ask."""
    asked = [("assoc", f"user={getpass.getuser()}", "format=MaxSubmitJobs")]
    asked += [("qos", qos, "format=MaxSubmitJobsPerUser")] if qos else []
    try:
        printed = [run("sacctmgr", "--noheader", "--parsable2", "show", *what) for what in asked]
    except SlurmError:
        return None
    limits = [int(line) for line in " ".join(printed).split() if line.isdigit() and int(line) > 0]  # 0 is its word for none
    return min(limits) if limits else None


def submitted() -> int:
    """Tasks that this user has in the queue, of any study and beside them. Raises SlurmError."""
    return len(run("squeue", "--noheader", "--array", "--me", "--format=%i").split())


# ------------------------------------------------------------------------------------------------- looking up


def wait_for_comment(name: str, comment: str) -> str | None:
    """The array (or job) with that comment in the queue, looked for again for a while: an accepted job shows at once."""
    until = time.monotonic() + 5
    while True:
        for task in queue(name):
            if task.comment == comment:
                return task.job_id.partition("_")[0]
        if time.monotonic() > until:
            return None
        time.sleep(0.5)


def inside() -> str | None:
    """The id of the job or array task that this process belongs to."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")
