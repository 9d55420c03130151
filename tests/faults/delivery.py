"""MLflow: a server that is away or dies, and many writers to one SQLite store."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness import deliverer, schedule, tracking
from harness.config import Trial
from harness.store import Store
from tests.faults.lab import Lab, Tally, fault, tally
from tests.mlflow_server import Answer, Relay, Server, empty_database
from tests.report import Row, row, spread
from tests.trials import trial

STUDY = "delivered"


@contextmanager
def _tracked_at(uri: str) -> Iterator[None]:
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI")
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _idle(server: Server) -> None:
    """It stands for another machine, and must not take this one's cores from the training."""
    assert server.process is not None
    deliverer._schedule(server.process.pid, os.SCHED_IDLE, 19)


# ------------------------------------------------------------------------------------------- a server that is away


class Away:
    """The store of the trials that are delivered to one server, and what that server suffers during each."""

    name: str

    def __init__(self, root: Path, database: Path, rng: random.Random) -> None:
        self.store = Store(root / "runs")
        self.server_root = root / "server"
        self.server_root.mkdir(parents=True)
        self.server = Server(self.server_root, database)
        self.rng = rng
        self.suffered: list[str] = []

    @property
    def url(self) -> str:
        return self.server.url

    def disturb(self, t: Trial, training: Future[Any]) -> None:
        """Returns when there is no more to do to the server."""
        raise NotImplementedError

    def run(self, t: Trial, train: Callable[[Trial, Store], Any]) -> tuple[Any, float]:
        """(what `train` says, seconds that the end waited for the delivery)"""
        with _tracked_at(self.url), ThreadPoolExecutor(1) as thread, deliverer.start_delivery(self.store, STUDY) as delivery:
            training = thread.submit(train, t, self.store)
            self.disturb(t, training)
            steps = training.result()
            began = time.monotonic()
            delivery.stop()
            return steps, time.monotonic() - began

    def bring_back(self) -> None:
        self.server.start()

    def sync(self) -> Tally:
        """What the server has after `wrbench sync`, which is called again if the server dies meanwhile."""
        with _tracked_at(self.url):
            for _ in range(3):
                self.bring_back()
                with suppress(tracking.DeliveryError):
                    sent, left = tracking.sync(self.store, STUDY)
                    if not sent.failed and not left:
                        break
        self.server.kill()
        return tally(self.store, STUDY, self.server.database)


class NotThere(Away):
    """Down when the trial starts; comes up; dies in the middle of a batch of metrics, and stays away."""

    name = "down at start, killed in a batch, down for good"

    def __init__(self, root: Path, database: Path, rng: random.Random) -> None:
        super().__init__(root, database, rng)
        self.armed = False
        self.relay = Relay(self.server.url, self.kill_in_a_batch)

    @property
    def url(self) -> str:
        return self.relay.url

    def kill_in_a_batch(self, request: BaseHTTPRequestHandler) -> Answer | None:
        if self.armed and request.path.endswith("log-batch") and int(request.headers["Content-Length"]) > 5000:
            self.armed = False
            delay = self.rng.uniform(0, 0.05)
            self.suffered.append(f"{1e3 * delay:.0f} ms after a batch of {int(request.headers['Content-Length']) / 1e3:.0f} kB")
            threading.Thread(target=self.kill, args=(delay,)).start()
        return None

    def kill(self, delay: float) -> None:
        time.sleep(delay)
        self.server.kill()
        self.relay.close()

    def disturb(self, t: Trial, training: Future[Any]) -> None:
        self.armed = True
        self.server.start(wait=False)
        _idle(self.server)
        self.bring_back()
        while self.armed and not training.done():
            time.sleep(0.05)
        if self.armed:  # too short a trial, or too slow a server
            self.kill(0)

    def bring_back(self) -> None:
        super().bring_back()
        self.relay.open()


class Restarted(Away):
    """Killed in the middle of the trial; comes back."""

    name = "down in the middle"

    def disturb(self, t: Trial, training: Future[Any]) -> None:
        if self.server.process is None:
            self.server.start()
            _idle(self.server)
        folder, total = self.store.trial(t.study, t.trial_id), schedule.total_steps(t)
        while folder.state().step < total / 3 and not training.done():
            time.sleep(0.1)
        self.suffered.append(f"at step {folder.state().step} of {total}")
        self.server.kill()
        self.server.start(wait=False)
        _idle(self.server)


@fault("MLflow's server down at start, in the middle, for good; killed while it takes a batch", slurm=False)
def server_away(lab: Lab) -> Iterator[Row]:
    """One rank trains by train(); in turn without delivery and with each kind of trouble.

    Also without delivery a server starts beside it, which takes a core for some seconds: that it stands on this machine is
    not what is judged.
    """
    from tests.benchmarks.bench import run_loop

    rounds, epochs = (5, 14) if lab.thorough else (1, 4)
    database = empty_database(lab.folder)
    cases = [kind(lab.folder / kind.__name__, database, lab.rng) for kind in (NotThere, Restarted)]
    alone = Store(lab.folder / "alone")

    def train(t: Trial, store: Store) -> np.ndarray:
        return run_loop("ours", t, store, world=1)

    ratios: dict[str, list[float]] = {case.name: [] for case in cases}
    ends: dict[str, list[float]] = {case.name: [] for case in cases}
    try:
        for number in range(rounds):
            t = trial(
                study=STUDY, seed=number, data={"path": str(lab.data)}, budget={"epochs": epochs, "global_batch_size": 100},
                schedule={"name": "cosine"}, evaluation={"log_every_steps": 1},
            )  # fmt: skip
            plain = None
            tails: dict[str, float] = {}
            for case in lab.rng.sample([None, *cases], 1 + len(cases)):
                if case is None:
                    cases[0].server.start(wait=False)
                    _idle(cases[0].server)
                    plain = float(np.quantile(train(t, alone), 0.99))
                    cases[0].server.kill()
                    continue
                steps, seconds = case.run(t, train)
                case.server.kill()  # it must not run beside the others
                tails[case.name] = float(np.quantile(steps, 0.99))
                ends[case.name].append(seconds)
            assert plain is not None
            for name, tail in tails.items():
                ratios[name].append(tail / plain)
        for case in cases:
            found, suffered = case.sync(), "; ".join(case.suffered)
            ratio, end = statistics.median(ratios[case.name]), max(ends[case.name])
            yield row(f"server {case.name}: p99 step / without", ratio, 1.1 if lab.thorough else None, spread(ratios[case.name]))
            yield row(f"server {case.name}: seconds the end waits", end, 2.0 if lab.thorough else None, f"longest of {rounds}")
            whole = found.trials == rounds and found.settled > 0 and suffered != ""
            yield row(f"server {case.name}: wrong after sync", found.wrong, 0, f"{found}; killed {suffered or 'never'}", ok=whole)
    finally:
        for case in cases:
            case.server.kill()


# --------------------------------------------------------------------------------------------- one SQLite store


@fault("12 trials of the local executor write to one SQLite store at once", slurm=False, beside=True)
def one_database(lab: Lab) -> Iterator[Row]:
    """First by the submission's one delivering process; then by one process a trial, as jobs have, which all begin with no database."""
    trials = 12 if lab.thorough else 3
    file, cluster, store = lab.folder / "many.yaml", lab.folder / "cluster.yaml", Store(lab.folder / "runs")
    file.write_text(
        yaml.safe_dump(
            {
                "workload": {"name": "mnist5k_cnn", "data": {"path": str(lab.data)}},
                "arms": {"AdamWR": {"optimizer": {"name": "adam", "lr": 0.002}, "schedule": {"name": "cosine"}}},
                "search": {"seeds": trials},
                "budget": {"epochs": 2},
            }
        )
    )
    cluster.write_text(yaml.safe_dump({"executor": "local", "ranks": 1, "max_parallel": trials}))
    command = [sys.executable, "-m", "launch", "study", "submit", str(file), "--cluster", str(cluster), "--store", str(store.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"study submit: {done.stderr or done.stdout}")
    ids = [folder.path.name for folder in store.trials("many")]
    found = [tally(store, "many")]
    fresh = lab.folder / "fresh.db"
    with _tracked_at(f"sqlite:///{fresh}"):
        deliveries = [deliverer.start_delivery(store, "many", [trial_id]) for trial_id in ids]
        with ThreadPoolExecutor(trials) as all_at_once:
            list(all_at_once.map(lambda delivery: delivery.stop(600), deliveries))  # as many imports of MLflow as trials, on two cores
    found.append(tally(store, "many", fresh))
    logs = [*done.stderr.splitlines(), *(text for log in store.root.rglob("delivery.log") for text in log.read_text().splitlines())]
    ended = [delivery.process.returncode for delivery in deliveries]
    whole = len(ids) == trials and not any(ended) and all(not f.wrong and f.trials == trials for f in found)
    note = f"one process: {found[0]}; {trials} processes: {found[1]}; {'; '.join(logs)[:300]}".rstrip("; ")
    yield row(f"{trials} trials to one SQLite store: errors", len(logs), 0, note, ok=whole)
