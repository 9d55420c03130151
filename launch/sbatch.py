"""sbatch, through submitit: the script of an array, and the call. Imports submitit, which looking at a study need not wait for."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from harness.config import BadInput, Shape, Slurm, did_you_mean
from launch import slurm


class ArrayExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's sbatch script and call for an array whose tasks all run one command, without pickles.

    submitit moves a task's pickle to its name only when sbatch has answered: a submitter that dies in between leaves jobs
    that cannot run. Here everything that a task reads is on disk before. The batch script runs the command itself, which
    starts the ranks by srun: signals then reach the ranks alone, and none of submitit's handlers acts on one rank.
    """

    def script(self, command: str) -> str:
        return str(self._make_submission_file_text(command, "dry-run"))

    def submit_command(self, command: str) -> str:
        """The job id. Raises SlurmError with sbatch's message; a job may be there nevertheless, if its answer was lost."""
        own = slurm.inside() is None  # inside a job (--chain) its variables would be taken for options
        kept = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or (own and key.startswith("SBATCH_"))}
        try:
            # submitit prints what sbatch says.
            with submitit.helpers.clean_env(), redirect_stderr(StringIO()):
                os.environ |= kept
                job = self._submit_command(command)
        except FailedJobError as error:
            said = re.findall(r"^sbatch: (?:error: |fatal: )?(.*)", str(error), re.M)
            raise slurm.SlurmError(f"sbatch: {'; '.join(said) or slurm.one_line(str(error))} ({self._asked()})") from None
        except FailedSubmissionError as error:
            raise slurm.SlurmError(f"sbatch: {slurm.one_line(str(error))}") from None
        for link in self.folder.glob(".submission_file_*"):  # the script has its name by now, JOB_submission.sh
            link.unlink()
        return str(job.job_id)

    def _asked(self) -> str:
        """What sbatch was asked for, of which its messages name little."""
        words = ("partition", "account", "qos", "constraint", "nodes", "ntasks_per_node", "cpus_per_task", "gpus_per_node", "mem", "time")
        return "asked for: " + ", ".join(f"{word} {self.parameters[word]}" for word in words if self.parameters.get(word) is not None)


def executor(
    folder: Path, shape: Shape, name: str, comment: str, setup: Sequence[str], tasks: int | None, dependency: str | None = None
) -> ArrayExecutor:
    """For an array of so many tasks, or with None a single job."""
    c = shape.cluster
    check(c)
    made = ArrayExecutor(folder=folder)
    made.update_parameters(
        job_name=name,
        comment=comment,
        nodes=shape.nodes,
        ntasks_per_node=shape.tasks_per_node,
        cpus_per_task=c.cpus_per_task,
        time=c.time_minutes,
        signal_delay_s=c.signal_lead_seconds,
        use_srun=False,
        setup=[*c.setup, *setup],  # whatever they load, the code is the snapshot's
        additional_parameters={"signal": f"{c.signal}@{c.signal_lead_seconds}", "requeue": True, **c.sbatch},
        **{k: v for k in ("partition", "account", "qos", "constraint") if (v := getattr(c, k)) is not None},
        **({"gpus_per_node": shape.gpus_per_node} if shape.gpus_per_node else {}),
        **({"mem": f"{round(c.mem_gb * 1024)}M"} if c.mem_gb is not None else {}),
        **({"dependency": dependency} if dependency else {}),
    )
    made.parameters["wckey"] = None  # submitit's own
    if tasks is not None:
        made.parameters |= {"map_count": tasks, "array_parallelism": c.array_parallelism or tasks}
    return made


def check(cluster: Slurm) -> None:
    """BadInput where SLURM's commands are not, and for a key of `sbatch` that the sbatch here does not have."""
    if shutil.which("srun") is None:
        raise BadInput("executor: slurm needs SLURM's commands, and there is no srun here; run on a login node, or --cluster local")
    if not cluster.sbatch:
        return
    try:
        printed = slurm.run("sbatch", "--help")
    except slurm.SlurmError as error:  # no configuration, on a machine that is no login node
        raise BadInput(f"sbatch.{', sbatch.'.join(cluster.sbatch)}: cannot be checked, since sbatch does not run here: {error}") from None
    known = sorted(set(re.findall(r"--([a-z][a-z0-9-]*)", printed)))
    for key in cluster.sbatch:
        if key not in known:
            raise BadInput(f"sbatch.{key}: is no option of the sbatch here; {did_you_mean(key, known)}`sbatch --help` lists them")
