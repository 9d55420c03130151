"""A real SLURM cluster of a few nodes on this machine, for tests: a folder and ports of its own, daemons run as the current user.

    cluster = Cluster(folder)
    cluster.start()
    os.environ.update(cluster.environment())  # from here on `sbatch`, `squeue`, `sacct` ... mean this cluster
    cluster.stop()

`python -m tests.slurm.cluster up` and `down` do the same by hand. Needs the programs of Debian's slurm-wlm, slurmdbd, munge and
mariadb-server, on Linux; an installed SLURM's configuration, key, sockets and services are neither used nor touched. Tested with SLURM 22.05.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import random
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PROGRAMS = (
    *("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"),
    *("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct", "sacctmgr"),
)
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])  # not on everyone's PATH
MARK = "# Written by tests/slurm/cluster.py, which deletes all of this folder when it starts here again.\n"
SOCKET_PATH_LIMIT = 107  # bytes of a Unix socket's path: unix(7)
INSTALL = "`make test-slurm` installs what the SLURM tests need (as root on Debian or Ubuntu) and runs them"


def missing() -> list[str]:
    """The programs a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Rank(NamedTuple):
    """A task of a job step: the process that slurmstepd started."""

    rank: int
    node: str
    pid: int
    restart: int  # how often SLURM had requeued the job when this process started


@dataclass
class Cluster:
    """Nodes n1, n2, ...; partitions `low` (the default; preempted by requeue) and `high`."""

    folder: Path
    nodes: int = 4
    cpus: int = 8  # a node, whatever the machine has
    gpus: int = 2  # a node; fake: CUDA_VISIBLE_DEVICES is set, nothing is behind it
    accounting: bool = True  # False: neither slurmdbd nor MariaDB; sacct fails
    enforce: bool = False  # True: an unknown account, or more nodes than a partition has, is refused at once
    preempt_send_user_signal: bool = True  # False: a preempted job gets SIGCONT and SIGTERM only
    grace_seconds: int = 30  # from the first signal of a preemption to SIGKILL
    kill_wait: int = 15  # from SIGTERM to SIGKILL at the time limit and in scancel
    slurmd_timeout: int = 10  # a node silent for so long is down
    cred_expire: int = 5  # a requeued job waits as long as a credential lives, by default two minutes
    max_array_size: int = 1001
    message_timeout: int = 10
    _last_output: str = field(default="", repr=False)
    _watcher: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        longest = self.folder / "spool" / self.names[-1] / f"{self.names[-1]}_1234567.4294967291"
        if len(os.fsencode(longest)) > SOCKET_PATH_LIMIT:
            raise ValueError(
                f"folder={str(self.folder)!r}: SLURM's sockets below it would exceed {SOCKET_PATH_LIMIT} bytes; use a shorter path"
            )

    @property
    def names(self) -> list[str]:
        return [f"n{i + 1}" for i in range(self.nodes)]

    @property
    def configuration(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """What a SLURM command needs in its environment to mean this cluster."""
        return {"SLURM_CONF": str(self.configuration)}

    # Life

    def start(self, timeout: float = 60, outlive: bool = False) -> None:
        """From nothing: jobs, accounts and leftovers of an earlier life in this folder are removed. Returns when all nodes are idle.

        The cluster ends with the calling process, however that dies, unless it is to `outlive` it.
        """
        if absent := missing():
            raise RuntimeError(f"not installed: {', '.join(absent)}; {INSTALL}")
        self.stop()
        if self.folder.exists() and any(self.folder.iterdir()) and not self._is_ours():
            raise ValueError(f"folder={str(self.folder)!r} holds something else than a cluster; use a new or empty one")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700, parents=True)
        self._write_configuration()
        deadline = time.monotonic() + timeout
        try:
            if not outlive:
                self._watch()
            self._start_munged()
            if self.accounting:
                self._start_accounting(deadline)
            self.start_controller(wait=False)
            for name in self.names:
                self.start_node(name)
            self._until(lambda: set(self._output("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, "idle nodes", deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends every process of the cluster and of its jobs. Logs and slurm.conf stay, all else goes: nothing needs an orderly end."""
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher = None
        if not self._is_ours():
            return
        self._end(self._all)
        for path in self.folder.iterdir():
            if path.name == "log" or path == self.configuration:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def is_running(self) -> bool:
        # Without munged a command tries for ten seconds.
        return self._is_ours() and bool(self._daemons("munged")) and bool(self._output("sinfo", "-h", "-N", "-o", "%T"))

    # Faults

    def stop_controller(self, signum: int = signal.SIGTERM) -> None:
        """Ends slurmctld, which saves its state first; with SIGKILL the last seconds' changes may be lost."""
        self._end(lambda: [process.pid for process in self._daemons("slurmctld")], signum)

    def start_controller(self, wait: bool = True) -> None:
        """Starts slurmctld from its saved state."""
        self._run("slurmctld")
        if wait:
            self._until(lambda: "is UP" in self._output("scontrol", "ping"), "slurmctld", time.monotonic() + 30)

    def kill_node(self, name: str) -> None:
        """Ends slurmd and every process of jobs on that node with SIGKILL.

        Unlike those of a machine without power, its connections are closed, so peers notice at once.
        """
        self._end(lambda: self._all(name))

    def kill_slurmd(self, name: str) -> None:
        """Ends slurmd alone with SIGKILL: SLURM will think the node dead while its steps live on."""
        self._end(lambda: [process.pid for process in self._daemons(name) if process.command == "slurmd"])

    def start_node(self, name: str) -> None:
        """Starts slurmd; the node is idle again when it has registered, in a second or two."""
        self._run("slurmd", "-N", name)

    def ranks(self, job: str | int, node: str | None = None) -> list[Rank]:
        """The tasks of a job's steps (not the batch script), by rank; job is an id, or ARRAY_INDEX."""
        processes = _processes()
        commands = {process.pid: process.command for process in processes}
        ranks = []
        for process in processes:
            if commands.get(process.parent) == "slurmstepd" and self._of_job(process, job, node):
                environment = process.environment
                if "SLURM_STEP_ID" in environment:
                    restart = int(environment.get("SLURM_RESTART_COUNT", 0))
                    ranks.append(Rank(int(environment["SLURM_PROCID"]), environment["SLURMD_NODENAME"], process.pid, restart))
        return sorted(ranks)

    def processes(self, job: str | int, node: str | None = None) -> list[int]:
        """Every process of a job: batch script, srun, ranks and their children, orphans too."""
        return [process.pid for process in _processes() if self._of_job(process, job, node)]

    # Start

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._run(
            "munged",
            "--force",  # our folder is not open to everyone, which munged finds unusual
            f"--key-file={key}",
            f"--socket={self.folder / 'munge.socket'}",
            f"--pid-file={self.folder / 'munged.pid'}",
            f"--seed-file={self.folder / 'munged.seed'}",
            f"--log-file={self.folder / 'log' / 'munged.log'}",
        )

    def _start_accounting(self, deadline: float) -> None:
        database = self.folder / "db"
        database.mkdir()
        # System tables are made by the server itself as it starts in an empty folder: mariadb-install-db takes three times as long.
        # slurmdbd needs those of stored procedures, without which limits are wrong and users have no account, in silence.
        share = Path(_program("mariadbd")).resolve().parent.parent / "share"
        tables = next(share.glob("m*/mysql_system_tables.sql")).read_text(encoding="utf-8")  # share/mysql, later share/mariadb
        first = self.folder / "db.sql"
        first.write_text(f"CREATE DATABASE mysql;\nUSE mysql;\n{tables}", encoding="utf-8")
        with (self.folder / "log" / "mariadbd.log").open("ab") as log:
            self._run(
                "setsid",
                "--fork",
                _program("mariadbd"),
                "--no-defaults",
                f"--user={_user()}",  # MariaDB refuses root without
                f"--datadir={database}",
                f"--init-file={first}",
                f"--socket={self._database_socket}",
                f"--pid-file={self.folder / 'mariadbd.pid'}",
                "--skip-networking",
                "--skip-grant-tables",  # who may open the socket may do everything: in a folder of mode 0700 the current user alone
                "--innodb-buffer-pool-size=16M",
                "--innodb-log-file-size=4M",
                "--innodb-flush-log-at-trx-commit=0",  # nothing here outlives a crash
                "--innodb-flush-method=nosync",
                "--innodb-doublewrite=OFF",
                "--performance-schema=OFF",
                output=log.fileno(),
            )
        self._until(self._database_socket.is_socket, "MariaDB", deadline)
        self._run("slurmdbd")
        self._until(lambda: self._call("sacctmgr", "-n", "list", "cluster").returncode == 0, "slurmdbd", deadline)
        self._run("sacctmgr", "-i", "add", "cluster", "wrbench")  # before slurmctld registers itself there
        if _user() != "root":  # who has an account there from the start
            self._run("sacctmgr", "-i", "add", "account", "wrbench")
            self._run("sacctmgr", "-i", "add", "user", _user(), "account=wrbench")

    @property
    def _database_socket(self) -> Path:
        return self.folder / "db.socket"

    def _watch(self) -> None:
        """A process that waits for the end of this one and then stops the cluster."""
        with (self.folder / "log" / "watch.log").open("ab") as log:
            self._watcher = subprocess.Popen(
                [sys.executable, __file__, "watch", "--folder", str(self.folder), "--owner", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is not for it
            )

    def _write_configuration(self) -> None:
        folder, log, host, user = self.folder, self.folder / "log", socket.gethostname().split(".")[0], _user()
        log.mkdir()
        (folder / "state").mkdir()
        for name in self.names:
            (folder / "spool" / name).mkdir(parents=True)
        for i in range(self.gpus):
            (folder / f"gpu{i}").symlink_to("/dev/null")  # must be a device, and its name end in the index
        controller_port, accounting_port, *node_ports = _free_ports(2 + self.nodes)
        lines = [
            "ClusterName=wrbench",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={controller_port}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"AuthInfo=socket={folder / 'munge.socket'},cred_expire={self.cred_expire}",
            f"StateSaveLocation={folder / 'state'}",
            f"SlurmdSpoolDir={folder / 'spool' / '%n'}",
            f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={folder / '%n.pid'}",
            f"SlurmctldLogFile={log / 'slurmctld.log'}",
            f"SlurmdLogFile={log / '%n.log'}",
            "MailProg=/bin/true",
            # Nothing that needs root, cgroups or more than this machine has
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "JobAcctGatherType=jobacct_gather/none",
            "SlurmdParameters=config_overrides",
            # Scheduling within a second
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "PriorityType=priority/basic",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "JobRequeue=1",
            "ReturnToService=2",
            f"MaxArraySize={self.max_array_size}",
            f"SlurmdTimeout={self.slurmd_timeout}",
            f"KillWait={self.kill_wait}",
            f"MessageTimeout={self.message_timeout}",
            "InactiveLimit=0",
            "OverTimeLimit=0",
            "GresTypes=gpu",
            f"NodeName=DEFAULT CPUs={self.cpus} RealMemory=1000000 Gres=gpu:{self.gpus}",
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
                for name, port in zip(self.names, node_ports, strict=True)
            ),
            f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace_seconds}",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
        ]
        if self.preempt_send_user_signal:
            lines += ["SlurmctldParameters=preempt_send_user_signal"]
        if self.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={accounting_port}",
                f"AccountingStoragePass={folder / 'munge.socket'}",  # AuthInfo does not hold for slurmdbd's clients
                "AccountingStorageTRES=gres/gpu",
                *(["AccountingStorageEnforce=associations", "EnforcePartLimits=ALL"] if self.enforce else []),
            ]
        self.configuration.write_text(MARK + "\n".join(lines) + "\n")
        # Nothing uses cgroups, yet slurmd loads a plugin for them: that of version 2, where it finds those, wants root and systemd.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{self.gpus - 1}]\n")
        secret = folder / "slurmdbd.conf"
        secret.touch(mode=0o600)  # slurmdbd insists
        secret.write_text(
            "\n".join(
                [
                    f"AuthInfo=socket={folder / 'munge.socket'}",
                    "DbdHost=localhost",
                    f"DbdPort={accounting_port}",
                    f"SlurmUser={user}",
                    "StorageType=accounting_storage/mysql",
                    "StorageHost=localhost",  # a socket, see MYSQL_UNIX_PORT
                    f"StorageUser={user}",
                    "StorageLoc=slurm",
                    f"LogFile={log / 'slurmdbd.log'}",
                    f"PidFile={folder / 'slurmdbd.pid'}",
                ]
            )
            + "\n"
        )

    def _call(self, program: str, *arguments: str, output: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        environment |= self.environment() | {"MYSQL_UNIX_PORT": str(self._database_socket)}  # slurmdbd.conf has no key for a socket
        done = subprocess.run(
            [_program(program), *arguments],
            env=environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        self._last_output = done.stdout
        return done

    def _run(self, program: str, *arguments: str, output: int = subprocess.PIPE) -> None:
        """Runs a command to its end, a daemon until it is in the background."""
        done = self._call(program, *arguments, output=output)
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: exit status {done.returncode}: {done.stdout}\n{self._logs()}")

    def _output(self, program: str, *arguments: str) -> str:
        """What it prints; nothing if it fails."""
        done = self._call(program, *arguments)
        return "" if done.returncode else done.stdout

    def _until(self, condition: Callable[[], bool], what: str, deadline: float) -> None:
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited in vain for {what}; the last command printed: {self._last_output}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self, lines: int = 15) -> str:
        tails = {path.stem: path.read_text(errors="replace").splitlines()[-lines:] for path in sorted((self.folder / "log").iterdir())}
        return "\n".join(f"{name}: {line}" for name, tail in tails.items() for line in tail)

    # Processes

    def _is_ours(self) -> bool:
        try:
            with self.configuration.open() as file:
                return file.readline() == MARK
        except FileNotFoundError:
            return False

    def _daemons(self, name: str | None = None) -> list[Process]:
        """Those that write log/NAME.log, or any log. A node's are its slurmd and its slurmstepds.

        Nothing else tells whose a slurmstepd is: it overwrites its command line and environment, and its parent is not slurmd.
        """
        log = self.folder / "log"
        return [
            process
            for process in _processes()
            if any(path.parent == log and name in (None, path.stem) for path in process.written()) and process.pid != os.getpid()
        ]

    def _of_job(self, process: Process, job: str | int | None = None, node: str | None = None) -> bool:
        environment = process.environment
        ids = {environment.get("SLURM_JOB_ID"), f"{environment.get('SLURM_ARRAY_JOB_ID')}_{environment.get('SLURM_ARRAY_TASK_ID')}"}
        return (
            environment.get("SLURM_CONF") == str(self.configuration)  # slurmd sees to it
            and "SLURM_JOB_ID" in environment
            and (job is None or str(job) in ids)
            and node in (None, environment.get("SLURMD_NODENAME"))
        )

    def _all(self, node: str | None = None) -> list[int]:
        """Daemons, jobs and their children, of one node or the whole cluster; daemons first, so that they report no deaths."""
        daemons = [process.pid for process in self._daemons(node)]
        processes = _processes()
        found = dict.fromkeys([*daemons, *(process.pid for process in processes if self._of_job(process, node=node))])
        children: dict[int, list[int]] = {}
        for process in processes:
            children.setdefault(process.parent, []).append(process.pid)
        pending = list(found)
        while pending:  # a child may have a clean environment
            new = [pid for pid in children.get(pending.pop(), []) if pid not in found]
            found.update(dict.fromkeys(new))
            pending += new
        parents = {process.pid: process.parent for process in processes}
        pid = os.getpid()  # `down` may be called inside a job
        while pid:
            found.pop(pid, None)
            pid = parents.get(pid, 0)
        return list(found)

    def _end(self, find: Callable[[], list[int]], signum: int = signal.SIGKILL) -> None:
        """Signals what `find` finds, until it finds nothing."""
        signalled: set[int] = set()
        deadline = time.monotonic() + 20
        while pids := find():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {pids} do not end")
            for pid in pids:
                if pid not in signalled:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signum)
            signalled.update(pids)
            time.sleep(0.02)


class Process(NamedTuple):
    pid: int
    parent: int
    command: str

    @property
    def environment(self) -> dict[str, str]:
        """As it was when the program started; empty if it is another user's, or gone."""
        try:
            data = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError:
            return {}
        return dict(os.fsdecode(item).split("=", 1) for item in data.split(b"\0") if b"=" in item)

    def written(self) -> list[Path]:
        """The files it holds open for writing."""
        paths = []
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if link.lstat().st_mode & stat.S_IWUSR:
                        paths.append(link.readlink())
        return paths


def _processes() -> list[Process]:
    processes = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                text = (folder / "stat").read_text(errors="replace")
                command, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 1 :].split()
                processes.append(Process(int(folder.name), int(rest[1]), command))
    return processes


def _program(name: str) -> str:
    program = shutil.which(name, path=PATH)
    if program is None:
        raise RuntimeError(f"not installed: {name}")
    return program


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(number: int) -> list[int]:
    """Below the range from which the kernel takes ports for outgoing connections: they must stay free while a daemon is down."""
    ports: list[int] = []
    for port in random.sample(range(20000, 32000), 12000):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("", port))
            ports.append(port)
        if len(ports) == number:
            return ports
    raise RuntimeError("no free ports between 20000 and 32000")


def _watch(cluster: Cluster, owner: int) -> None:
    """Stops the cluster when the process `owner`, this one's parent, has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(owner)
        if os.getppid() == owner:  # else it ended before, and the id may be another's by now
            select.select([descriptor], [], [])
    cluster.stop()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm.cluster", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=["up", "down", "watch"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / f"wrbench-slurm-{os.getuid()}")
    parser.add_argument("--owner", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cluster = Cluster(options.folder)
    if options.command == "down":
        cluster.stop()
    elif options.command == "watch":
        _watch(cluster, options.owner)
    else:
        try:
            if not cluster.is_running():
                cluster.start(outlive=True)
        except (RuntimeError, TimeoutError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(f"export SLURM_CONF={cluster.configuration}")


if __name__ == "__main__":
    main()
