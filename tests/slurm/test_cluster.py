"""The cluster of tests/slurm/cluster.py does what SLURM does where the launcher relies on it, and leaves nothing behind."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.xdist_group("beside")


def run(*command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def succeed(*command: str) -> str:
    done = run(*command)
    assert done.returncode == 0, done
    return done.stdout


def sbatch(folder: Path, body: str, *options: str) -> str:
    """Submits a script; returns the job's id."""
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}\n")
    return succeed("sbatch", "--parsable", f"--output={folder}/%A_%a.out", *options, str(script)).strip()


def until(condition: Callable[[], object], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s; squeue: {run('squeue').stdout}"
        time.sleep(0.1)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def jobs(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, without jobs before and after a test."""
    yield cluster
    succeed("scancel", "--user", str(os.getuid()))
    until(lambda: not succeed("squeue", "-h"))


def test_ranks_see_their_gpus(cluster: Cluster) -> None:
    code = "echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    printed = succeed("srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "bash", "-c", code)
    assert sorted(printed.splitlines()) == ["0 0 n1 0,1", "1 1 n1 0,1", "2 0 n2 0,1", "3 1 n2 0,1"]


def test_preempted_array_task_hears_usr2_and_starts_again(jobs: Cluster, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    rank = f"""say() {{ echo "$SLURM_ARRAY_TASK_ID $SLURM_PROCID ${{SLURM_RESTART_COUNT:-0}} $1" >> {heard}; }}
trap 'say USR2; exit 0' USR2; say start; while :; do sleep 0.1; done"""
    (tmp_path / "rank.sh").write_text(rank)
    array = sbatch(
        tmp_path,
        f"srun bash {tmp_path}/rank.sh; scontrol requeue ${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID; sleep 60",
        *("--array=0-1", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue", "--signal=USR2@5"),
    )
    until(lambda: len(lines(heard)) == 8)
    ranks = jobs.ranks(f"{array}_0")
    assert [rank.rank for rank in ranks] == [0, 1, 2, 3]
    assert len({rank.node for rank in ranks}) == 2
    assert not {rank.pid for rank in ranks} & {rank.pid for rank in jobs.ranks(f"{array}_1")}
    assert all(b"rank.sh" in Path(f"/proc/{rank.pid}/cmdline").read_bytes() for rank in ranks)

    nodes = ",".join(sorted({rank.node for rank in ranks}))
    urgent = tmp_path / "urgent"
    urgent.mkdir()
    sbatch(urgent, f"touch {urgent}/ran", "-p", "high", "-N2", f"--nodelist={nodes}", "--gpus-per-node=2")
    until(lambda: sum(line.startswith("0 ") and line.endswith(" 1 start") for line in lines(heard)) == 4)
    assert (urgent / "ran").exists()
    assert sorted(line for line in lines(heard) if "USR2" in line) == [f"0 {i} 0 USR2" for i in range(4)]  # its neighbour heard nothing


def test_node_death_and_accounting(jobs: Cluster, tmp_path: Path) -> None:
    job = sbatch(tmp_path, "srun sleep 300", "-N2", "--ntasks-per-node=1")
    until(lambda: len(jobs.ranks(job)) == 2)
    first, second = jobs.ranks(job)
    jobs.kill_slurmd(second.node)
    assert jobs.ranks(job) == [first, second]  # its steps live on
    jobs.kill_node(second.node)
    assert not jobs.processes(job, second.node)
    assert jobs.processes(job, first.node)
    jobs.start_node(second.node)
    succeed("scancel", job)
    until(lambda: "CANCELLED" in succeed("sacct", "-n", "-X", "-o", "state", "-j", job))
    until(lambda: set(succeed("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})


def test_accounts(cluster: Cluster) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    succeed("sacctmgr", "-i", "add", "account", "paper")
    succeed("sacctmgr", "-i", "add", "user", user, "account=paper", "maxjobs=3")
    assert f"{user}|3" in succeed("sacctmgr", "-n", "-P", "list", "associations", "account=paper", "format=user,maxjobs").splitlines()


def test_without_accounting_and_without_the_users_signal(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(tmp_path / "c", accounting=False, nodes=1, preempt_send_user_signal=False)
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    try:
        cluster.start()
        job = sbatch(tmp_path, "sleep 60")
        assert succeed("squeue", "-h", "-o", "%A").split() == [job]
        assert run("sacct").returncode != 0

        heard = tmp_path / "heard"
        rank = tmp_path / "rank.sh"
        rank.write_text(
            f"trap 'echo USR2 >> {heard}' USR2; trap 'echo TERM >> {heard}; exit' TERM; echo start >> {heard}; while :; do sleep 0.1; done"
        )
        sbatch(tmp_path, f"srun bash {rank}", "--gpus=2", "--signal=USR2@5")
        until(lambda: lines(heard) == ["start"])
        sbatch(tmp_path, "true", "-p", "high", "--gpus=2")
        until(lambda: len(lines(heard)) > 1)
        assert lines(heard) == ["start", "TERM"]

        cluster.stop_controller()  # with accounting this takes up to 11 s: slurmctld waits for its connection to slurmdbd
        assert "is DOWN" in run("scontrol", "ping").stdout
        cluster.start_controller()
        assert job in succeed("squeue", "-h", "-o", "%A").split()

        cluster.start()  # over the running one
        assert not succeed("squeue", "-h")
        assert not cluster.processes(job)
    finally:
        cluster.stop()


def leftovers(folder: Path) -> list[str]:
    """Processes that name the folder, sockets in it."""
    found = [name for folder_name, _, names in os.walk(folder) for name in names if Path(folder_name, name).is_socket()]
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
            except OSError:
                continue
            if os.fsencode(folder) in text or any(name.startswith(str(folder)) for name in opened):
                found.append(f"{process.name}: {text[:200]!r}")
    return found


START = """
import os, sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]), nodes=2)
cluster.start()
print("ready", flush=True)
sys.stdin.read()
if sys.argv[2] == "stop":
    cluster.stop()
elif sys.argv[2] == "raise":
    raise ValueError
"""


@pytest.mark.parametrize("end", ["stop", "raise", "SIGKILL"])
def test_nothing_is_left(installed: None, tmp_path: Path, end: str) -> None:
    """However the process that started it ends: no daemon, no job, no child of one in its own session or without its environment, no socket."""
    folder = tmp_path / "c"
    with subprocess.Popen(
        [sys.executable, "-c", START, str(folder), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout and owner.stdin
        assert owner.stdout.readline() == "ready\n"
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/bash\nsrun bash -c 'setsid sleep 300 & env -i /bin/bash -c \"sleep 300; true\" {folder} & wait'\n")
        submit = ["sbatch", "-N2", "--ntasks-per-node=1", f"--output={tmp_path}/out", str(script)]
        subprocess.run(submit, env=environment, check=True, timeout=30)
        cluster = Cluster(folder, nodes=2)
        until(lambda: len(cluster.ranks(1)) == 2)
        assert leftovers(folder)
        if end.startswith("SIG"):
            owner.send_signal(signal.Signals[end])
        owner.stdin.close()
        owner.wait(timeout=30)
    until(lambda: not leftovers(folder))
    until(lambda: {path.name for path in folder.iterdir()} == {"log", "slurm.conf"})  # the watcher's last act, after the processes' end
