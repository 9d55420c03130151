"""A disk that is full for a while, under everything that a run writes: journal, checkpoints, result, MLflow's database."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import checkpoint, deliverer, journal, tracking
from harness.config import Trial
from harness.store import Store, TrialFolder
from tests.faults.kills import PAIRS, Undisturbed, Watched, is_alive, one, only, tallied
from tests.faults.lab import Lab, fault, tally
from tests.mlflow_server import empty_database
from tests.report import Row, row
from tests.slurm.study import steps, until

SIZE = "48m"
"""room for MLflow's database, the journal and a few checkpoints of the small trial"""
ARMS = {
    "AdamW": {"optimizer": {"name": "adam", "lr": 0.003}, "decay": {"name": "decoupled", "weight_decay": 0.1, "normalised": True}},
    "SGDW": {"optimizer": {"name": "sgd", "lr": 0.05}, "decay": {"name": "decoupled", "weight_decay": 0.1, "normalised": True}},
}
BACKENDS: dict[str, dict[str, Any]] = {"ddp": {}, "deepspeed": {"name": "deepspeed", "zero_stage": 1}}


class Disk:
    """A file system of its own where the user may mount one; else a limit on the size of the files that the ranks write."""

    def __init__(self, path: Path, mounted: bool) -> None:
        self.path, self.mounted = path, mounted
        self._limited: list[tuple[int, tuple[int, int]]] = []
        self._filler = path / "filler"
        self._freed = threading.Event()
        self._filling: threading.Thread | None = None

    def fill(self, ranks: Sequence[int], folder: TrialFolder) -> None:
        """From now on nothing more can be written. ranks: process ids."""
        if not self.mounted:
            size = folder.journal.stat().st_size
            for pid in ranks:
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                self._limited.append((pid, resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))))
            return
        full = threading.Event()
        self._filling = threading.Thread(target=self._fill, args=(full,), daemon=True)
        self._filling.start()
        full.wait()

    def _fill(self, full: threading.Event) -> None:
        """Also whatever room a checkpoint leaves that is removed."""
        with open(self._filler, "wb", buffering=0) as file:
            while not self._freed.is_set():
                try:
                    file.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    full.set()
                    self._freed.wait(0.001)

    def free(self) -> None:
        self._freed.set()
        if self._filling is not None:
            self._filling.join()
        self._filler.unlink(missing_ok=True)
        for pid, limit in self._limited:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)


@contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", path], capture_output=True).returncode == 0
    disk = Disk(path, mounted)
    try:
        yield disk
    finally:
        disk.free()
        if mounted:
            subprocess.run(["umount", "--lazy", path], check=True)


def _trial(lab: Lab, arm: str, backend: str) -> Trial:
    """84 steps; a checkpoint every 7."""
    from tests.integration.test_train import small

    schedule = {"name": "cosine_restarts", "t_0": 4, "t_mult": 2}
    return small(
        lab.few, study="disk", arm=arm, **ARMS[arm], backend=BACKENDS[backend], schedule=schedule,
        budget={"epochs": 12, "global_batch_size": 100},
    )  # fmt: skip


@fault("the disk full for a while", slurm=False, beside=True)
def full_disk(lab: Lab) -> Iterator[Row]:
    from tests.integration.ranks import finish, history

    pairs = [(arm, backend) for backend in BACKENDS for arm in ARMS] if lab.thorough else [("AdamW", "ddp")]
    world = 2 if lab.thorough else 1
    database = empty_database(lab.folder)
    for arm, backend in pairs:
        t, calm = _trial(lab, arm, backend), Store(lab.folder / f"calm {backend}")  # a trial has one id whatever the backend
        wanted, undisturbed = finish(t, calm, world)["weights_sha256"], history(calm.trial(t.study, t.trial_id))
        for what, until_the_end in (("for a while", False), ("until the run ends", True)):
            name = f"disk full {what}, {arm} {backend}"
            with small_disk(lab.folder / name) as disk:
                store = Store(disk.path / "runs")
                store.root.mkdir()
                shutil.copy(database, store.root / "mlflow.db")
                with deliverer.start_delivery(store, t.study):
                    note, damaged = _train_while_full(t, store, world, disk, lab.rng.randint(15, 30), until_the_end)
                folder = store.trial(t.study, t.trial_id)
                left = [m.reason for m in tracking.sync(store, t.study)[1]]
                result, found = json.loads(folder.result.read_text()), tally(store, t.study)
                where = "tmpfs" if disk.mounted else "a limit on file sizes: mounting is not allowed here"
                yield row(f"{name}: last checkpoint damaged", damaged, 0, f"{where}; {note}")
                unequal = int(result["weights_sha256"] != wanted)
                yield row(f"{name}: weights unequal to undisturbed", unequal, 0, f"{result['state']} in {result['attempts']} attempt(s)")
                lost = found.wrong + len(undisturbed.items() ^ history(folder).items())
                yield row(f"{name}: points lost or doubled", lost, 0, f"{found}; {'; '.join(left)}", ok=not left and found.settled > 0)


@fault("the disk full under jobs", slurm=True, beside=True)
def full_under_jobs(lab: Lab) -> Iterator[Row]:
    """All that a study writes is on that disk: it is full until the ranks have ended, and while they are to be started again."""
    for backend, arm in PAIRS[:2] if lab.thorough else PAIRS[:1]:
        undisturbed = Undisturbed(lab, backend, arm)
        with small_disk(lab.folder / f"full-{backend}") as disk:
            study = one(replace(lab, folder=disk.path), "full", backend, arm)
            study.submit()
            folder, ranks, step = only(study), Watched(lab.cluster, study).ranks(), lab.rng.randint(15, 30)
            until(lambda folder=folder, step=step: steps(folder) > step, every=0.02)
            disk.fill([rank.pid for rank in ranks], folder)
            before, _ = checkpoint.newest(folder, folder.path.name)
            until(lambda ranks=ranks: not any(is_alive(rank.pid) for rank in ranks))
            time.sleep(10)  # the supervisor cannot write down that it starts them again
            waiting = study.in_queue()
            after, complaints = checkpoint.newest(folder, folder.path.name)
            disk.free()
            study.wait("finished")
            differs, lives = undisturbed.differs(folder), study.entry(folder).lives
            wrong, told = tallied([study])
        name = f"disk full under a job, {arm} {backend}"
        damaged = bool(complaints) or before is None or after is None or after.step < before.step
        yield row(f"{name}: last checkpoint damaged", int(damaged), 0, f"full from step {step}", ok=bool(waiting))
        ended = lives[0].ended or {"kind": "not at all"}  # the second's end need not be written down yet
        note = (
            f"{len(lives)} lives, the first ended as {ended['kind']}, the last began at step {lives[-1].started['step']}; {differs or ''}"
        )
        yield row(f"{name}: ends unlike undisturbed", int(differs is not None), 0, note, ok=len(lives) == 2 and ended["kind"] == "disk")
        yield row(f"{name}: wrong in MLflow", wrong, 0, told)


def _train_while_full(t: Trial, store: Store, world: int, disk: Disk, step: int, until_the_end: bool) -> tuple[str, int]:
    """Trains to the end, with a disk that fills up after so many steps: (what happened, 1 if the last checkpoint is damaged)."""
    from tests.integration.ranks import Ranks, finish

    folder = store.trial(t.study, t.trial_id)
    ranks = Ranks(t, store, world)
    ranks.wait_for_step(step)
    disk.fill([int(p.pid or 0) for p in ranks.processes], folder)
    before, _ = checkpoint.newest(folder, t.trial_id)
    assert before is not None, "a checkpoint every 7 steps"
    if until_the_end:
        codes = ranks.wait()
        assert any(codes), "it has a result, though there was no room for one"
        note = f"full from step {step}; {folder.state().state} at {folder.state().step}"
    else:
        note = f"full from step {step}, until {_failed_save(folder, ranks)} had failed"
    after, complaints = checkpoint.newest(folder, t.trial_id)
    disk.free()
    if until_the_end:
        finish(t, store, world)
        note += f"; resumed from {journal.fold(journal.read(folder.journal)).starts[-1]['resumed_from']}"
    else:
        codes = ranks.wait()
        assert codes == [0] * world, ranks.errors()
    return note, int(bool(complaints) or after is None or after.step < before.step)


def _failed_save(folder: TrialFolder, ranks: Any) -> str:
    """Waits for a checkpoint that is begun and given up; its name. The journal has no room to tell of it."""
    begun: set[str] = set()
    while True:
        names = {path.name for path in folder.checkpoints.iterdir()}
        begun |= {name for name in names if name.startswith(".step-")}
        for name in begun - names:
            if not (folder.checkpoints / name[1:]).exists():
                return name[1:]
        assert all(p.exitcode is None for p in ranks.processes), f"it ended before any save: {ranks.errors()}"
        time.sleep(0.001)
