"""How a fault is registered, what it is given, and how faults are run."""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
import shutil
import sqlite3
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tests.faults
from harness import journal
from harness.store import Store
from tests.report import Row, failed, line, refused

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster


@dataclass
class Lab:
    """What a fault works with."""

    folder: Path
    """empty, for this fault alone, removed afterwards"""
    data: Path
    """shards of the 5,000 digits"""
    few: Path
    """shards of 800 training and 200 validation digits of them"""
    thorough: bool
    """False: at the smallest size that still shows the fault, with speed printed and not judged"""
    rng: random.Random
    _cluster: Cluster | None = field(default=None, repr=False)

    @property
    def cluster(self) -> Cluster:
        """The SLURM cluster that runs, and that SLURM's commands mean; for faults with slurm=True."""
        assert self._cluster is not None, "this fault is registered with slurm=False"
        return self._cluster

    @contextmanager
    def another_cluster(self, **options: Any) -> Iterator[Cluster]:
        """A cluster of its own, which SLURM's commands mean meanwhile; `options` as of tests.slurm.cluster.Cluster."""
        from tests.slurm.cluster import Cluster

        # sockets have short paths
        with tempfile.TemporaryDirectory(prefix="wrbench-") as folder:
            other = Cluster(Path(folder) / "c", **options)
            other.start()
            before = {key: os.environ.get(key) for key in other.environment()}
            os.environ.update(other.environment())
            try:
                yield other
            finally:
                other.stop()
                for key, value in before.items():
                    if value is None:
                        os.environ.pop(key, None)
                    else:
                        os.environ[key] = value


# ---------------------------------------------------------------------------------------------------- register


@dataclass(frozen=True)
class Fault:
    name: str
    slurm: bool
    """needs a SLURM cluster"""
    rows: Callable[[Lab], Iterator[Row]]
    beside: bool = False
    """`make faults` runs it beside the others, on a cluster of its own: it mostly waits for SLURM's clock, or judges no seconds"""
    urgent: bool = False
    """judges seconds that a busy machine would stretch: before the others with a cluster"""


FAULTS: dict[str, Fault] = {}


def fault(
    name: str, *, slurm: bool, beside: bool = False, urgent: bool = False
) -> Callable[[Callable[[Lab], Iterator[Row]]], Callable[[Lab], Iterator[Row]]]:
    """Registers a fault under its line in the table of what `make faults` shows, in a few words."""

    def register(rows: Callable[[Lab], Iterator[Row]]) -> Callable[[Lab], Iterator[Row]]:
        assert name not in FAULTS, name
        FAULTS[name] = Fault(name, slurm, rows, beside, urgent)
        return rows

    return register


def load() -> dict[str, Fault]:
    """Every fault of every module of this package: the urgent ones first, and last those beside that use all cores, without a cluster."""
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if module.name != "__main__":
            importlib.import_module(f"tests.faults.{module.name}")
    return dict(sorted(FAULTS.items(), key=lambda item: (not item[1].urgent, item[1].beside and not item[1].slurm)))


# --------------------------------------------------------------------------------------------------------- run


def perform(
    given: Fault, *, data: Path, few: Path, thorough: bool, seed: int, cluster: Cluster | None = None, scratch: Path | None = None
) -> Iterator[Row]:
    """The rows of one fault, as they come; one that raises ends with a failed row that says why.

    The same seed draws the same for a fault, whichever others run. scratch: where its folder is made.
    """
    folder = Path(tempfile.mkdtemp(prefix="wrbench-fault-", dir=scratch))
    try:
        yield from given.rows(Lab(folder, data, few, thorough, random.Random(f"{seed} {given.name}"), cluster if given.slurm else None))
    except Exception as error:
        traceback.print_exc()
        yield failed(given.name, _line(error))
    finally:
        if given.slurm and cluster is not None:
            put_right(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def lane(names: list[str], *, data: Path, few: Path, thorough: bool, seed: int, began: float) -> list[Row]:
    """These faults, one after the other, each row printed as it comes; `began`: of time.monotonic(), which is the machine's."""
    chosen, rows = [fault for name, fault in load().items() if name in names], list[Row]()
    with a_cluster() if any(f.slurm for f in chosen) else nullcontext((None, None)) as (cluster, absent):
        for given in chosen:
            before = time.monotonic()
            print(f"--- {given.name}", flush=True)
            found = perform(given, data=data, few=few, thorough=thorough, seed=seed, cluster=cluster)
            for row in [refused(given.name, absent)] if given.slurm and absent else found:
                rows.append(row)
                now = time.monotonic()
                print(f"{line(row)}  [{now - before:.0f} s, {(now - began) / 60:.1f} min in all]", flush=True)
                before = now
    return rows


def _line(error: BaseException) -> str:
    """What went wrong, and the line of ours that it came from."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:3000]}{where}"


def put_right(cluster: Cluster, seconds: float = 60) -> None:
    """No job is left, and every node idle: what one fault leaves behind must not be the next one's."""
    deadline = time.monotonic() + seconds
    _slurm(cluster, "scancel", "--full", "--signal=KILL", f"--user={os.getuid()}")
    while time.monotonic() < deadline:
        _slurm(cluster, "scancel", f"--user={os.getuid()}")
        jobs, nodes = _slurm(cluster, "squeue", "--noheader"), _slurm(cluster, "sinfo", "--noheader", "--Node", "--format=%T").split()
        if not jobs and nodes and set(nodes) == {"idle"}:
            return
        time.sleep(0.5)
    print("the cluster does not come to rest: it is started anew", flush=True)
    cluster.stop()
    cluster.start()


def _slurm(cluster: Cluster, *command: str) -> str:
    """What a command prints; something if the controller does not answer, which is no empty queue."""
    try:
        done = subprocess.run(command, env=os.environ | cluster.environment(), capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "no answer"
    return done.stdout if done.returncode == 0 else done.stderr or "failed"


@contextmanager
def a_cluster() -> Iterator[tuple[Cluster | None, str | None]]:
    """(a cluster that SLURM's commands mean, None), or (None, why there is none)."""
    from tests.slurm.cluster import INSTALL, Cluster, missing

    if lacking := missing():
        yield None, f"not installed: {', '.join(lacking)}; {INSTALL}"
        return
    for name in list(os.environ):
        if name.startswith(("SLURM", "SBATCH", "SRUN", "SACCT")):  # of a job that this runs in
            del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="wrbench-") as folder:  # sockets have short paths
        cluster = Cluster(Path(folder) / "c")
        cluster.start()
        os.environ.update(cluster.environment())
        try:
            yield cluster, None
        finally:
            cluster.stop()


def digits(folder: Path) -> tuple[Path, Path]:
    """Makes the shards of the 5,000 digits and of the few: Lab.data and Lab.few."""
    from harness.data.build import build
    from tests.tars import few

    build("mnist5k", None, folder / "mnist5k")
    return folder / "mnist5k", few(folder / "mnist5k", folder / "few")


# -------------------------------------------------------------------------------------------------------- look


@dataclass(frozen=True)
class Tally:
    """What a tracking database holds of a study, against the journals."""

    trials: int
    runs: int
    settled: int
    """points that the journals make final"""
    missing: int
    """of these, not there"""
    doubled: int
    """(run, metric, step) with more than one value"""
    foreign: int
    """points that no journal makes final"""

    @property
    def wrong(self) -> int:
        """0: one run a trial, and each point once."""
        return abs(self.runs - self.trials) + self.missing + self.doubled + self.foreign

    def __str__(self) -> str:
        return (
            f"{self.trials} trials, {self.runs} runs, {self.settled} points, {self.missing} missing, {self.doubled} doubled, "
            f"{self.foreign} in no journal"
        )


def tally(store: Store, study: str, database: Path | None = None) -> Tally:
    """Looks into MLflow's tables, past its interface. database: of a server; default: the store's own."""
    with closing(sqlite3.connect(database or store.root / "mlflow.db", timeout=60)) as connection:
        runs = connection.execute(
            "SELECT r.run_uuid, t.value FROM runs r JOIN experiments e USING (experiment_id) JOIN tags t USING (run_uuid) "
            "WHERE e.name = ? AND r.lifecycle_stage = 'active' AND t.key = 'trial_id'",
            [study],
        ).fetchall()
        there: Counter[tuple[str, str, int, int]] = Counter()
        for run, trial_id in runs:
            points = connection.execute("SELECT key, step, timestamp FROM metrics WHERE run_uuid = ?", [run])
            there.update((trial_id, key, step, timestamp) for key, step, timestamp in points)
    folders = [folder for folder in store.trials(study) if folder.journal.exists()]
    settled = {
        (folder.path.name, p.metric, p.step, p.timestamp) for folder in folders for p in journal.fold(journal.read(folder.journal)).settled
    }
    places = Counter((trial_id, key, step) for trial_id, key, step, _ in there.elements())
    return Tally(
        len(folders), len(runs), len(settled), len(settled - there.keys()), sum(n > 1 for n in places.values()), len(there.keys() - settled)
    )
