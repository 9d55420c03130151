"""`make bench-read`: how long a study takes to become tables, beside a loop over MLflow's client. Writes build/read-runs.json.

The study has --runs trials of --points points each, ten metrics, with NaN, infinities and steps logged twice among them. It
is written straight into a database that MLflow made; what is read of a seeded sample of its runs is compared, value by
value, with what MLflow's client says. Read means: from nothing to the tables of trials and of steps (`runs.read` and its
history). A second, smaller study in the same database is read through a real MLflow server.

    python -m tests.benchmarks.read_runs [--runs N] [--points M]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.entities import Metric

from analysis import runs, tracked
from harness import schedule, study, tracking
from harness.config import Trial
from harness.store import Store
from tests import synthetic
from tests.mlflow_server import Server, empty_database
from tests.report import Row, line, publish, row

METRICS = (
    "train/loss", "schedule/lr", "schedule/eta", "schedule/weight_decay", "schedule/cycle", "time/train_seconds", "data/wait_fraction",
    "holdout/top1", "anytime/holdout_top1", "anytime/val_top1",
)  # fmt: skip
SAMPLE = 20
"""runs that the client reads, and that are compared"""
OVER_SERVER = 200
"""runs of the smaller study"""
FULL = 10_000 * 1_000
"""points from which on the goals are judged: what is fixed counts for too much in less"""


# ------------------------------------------------------------------------------------------------- the database


def planned(store: Store, name: str, count: int, points: int) -> list[Trial]:
    """The trials of a study of two arms and five seeds a configuration, which is stored as a submission stores it."""
    epochs = max(7, math.ceil(points / len(METRICS) / 35))
    document = synthetic.STUDY | {"name": name, "budget": {"epochs": epochs}, "search": {"points": math.ceil(count / 10), "seeds": 5}}
    loaded = synthetic.write_study(store, {key: value for key, value in document.items() if key != "finalists"})
    return [p.trial for p in study.planned(loaded, {}) if p.trial is not None][:count]


def logged(number: int, trial: Trial, points: int, rng: np.random.Generator) -> Iterator[tuple[str, float, int, int, bool]]:
    """key, value, timestamp, step, is_nan of one run, as MLflow stores them, in the order of delivery."""
    each, last = points // len(METRICS), schedule.total_steps(trial) - 1
    steps = np.unique(np.linspace(0, last, each).astype(int)).tolist() if each <= last else list(range(each))
    begin = 1_700_000_000_000 + 10_000_000 * number
    for place, step in enumerate(steps):
        for key, value in zip(METRICS, rng.random(len(METRICS)).tolist(), strict=True):
            yield key, value, begin + 1000 * place, step, False
    if number % 50 == 1:  # diverged
        yield "train/loss", 0.0, begin + 1000 * len(steps), steps[-1] + 1, True
        yield "holdout/loss", sys.float_info.max, begin + 1000 * len(steps), steps[-1] + 1, False
    if number % 50 == 2:  # the last steps again, after a requeue
        for step in steps[-len(steps) // 10 :]:
            yield "train/loss", float(rng.random()), begin + 1000 * len(steps), step, False


def fill(database: Path, trials: dict[str, list[Trial]], points: int) -> None:
    """An experiment a study, a run a trial."""
    client = tracking._client(f"sqlite:///{database}")
    ids = {name: client.create_experiment(name) for name in trials}
    rng = np.random.default_rng(0)
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -2000000")
        indexes = db.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'metrics' AND sql IS NOT NULL"
        ).fetchall()
        for name, _ in indexes:
            db.execute(f"DROP INDEX {name}")
        for name, of_study in trials.items():
            for number, trial in enumerate(of_study):
                _insert(db, ids[name], number, trial, list(logged(number, trial, points, rng)), rng.bytes(16).hex())
        for _, made in indexes:
            db.execute(made)
        db.commit()


def _insert(db: sqlite3.Connection, experiment: str, number: int, trial: Trial, rows: list[tuple[Any, ...]], run_id: str) -> None:
    begin = rows[0][2]
    values = (run_id, trial.trial_id, "UNKNOWN", "", "", "somebody", "FINISHED", begin, rows[-1][2], "", "active", "artifacts", experiment)
    columns = "run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time, end_time, source_version"
    places = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO runs ({columns}, lifecycle_stage, artifact_uri, experiment_id) VALUES ({places})", values)
    tags = {"trial_id": trial.trial_id, "arm": trial.arm, "seed": trial.seed, "phase": trial.phase, "attempt": 1, "state": "finished"}
    tags |= {"study": trial.study, "world_size": 8, "backend": "ddp", "commit": "c0ffee1", "host": f"node{number % 64}"}
    db.executemany("INSERT INTO tags (run_uuid, key, value) VALUES (?, ?, ?)", [(run_id, key, str(value)) for key, value in tags.items()])
    columns = "key, value, timestamp, step, is_nan, run_uuid"
    db.executemany(f"INSERT INTO metrics ({columns}) VALUES (?, ?, ?, ?, ?, ?)", [(*found, run_id) for found in rows])
    newest = {found[0]: found for found in sorted(rows, key=lambda found: (found[3], found[2]))}
    db.executemany(f"INSERT INTO latest_metrics ({columns}) VALUES (?, ?, ?, ?, ?, ?)", [(*found, run_id) for found in newest.values()])


# ------------------------------------------------------------------------------------------------------ reading


def by_client(client: Any, run_id: str) -> dict[tuple[str, int], float]:
    """(metric, step) -> last value, by the loop that everybody writes first."""
    out = {}
    for metric in client.get_run(run_id).data.metrics:
        for point in client.get_metric_history(run_id, metric):
            out[metric, point.step] = math.copysign(math.inf, point.value) if abs(point.value) >= 1.797e308 else point.value
    return out


def differing(points: pd.DataFrame, trial_id: str, expected: dict[tuple[str, int], float]) -> int:
    """Points of a trial that only one of the two has, or that have another value."""
    mine = points[points.trial_id == trial_id]
    found = dict(zip(zip(mine.metric, mine.step, strict=True), mine.value, strict=True))
    same = sum(key in found and (found[key] == value or (found[key] != found[key] and value != value)) for key, value in expected.items())
    return len(found.keys() | expected.keys()) - same


def timed(what: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = what()
    return time.perf_counter() - began, result


def measured(store: Store, count: int, points: int) -> list[Row]:
    judged = count * points >= FULL

    def tables() -> runs.Records:
        records = runs.read("reading", store.root)
        assert len(records.history)
        return records

    settled = tracked.QUIET_NS / 1e9 + 0.5
    time.sleep(settled)
    cpu = time.process_time()
    cold, records = timed(tables)
    cpu = time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = f"{count:,} runs of {points:,} points: {len(records.points):,} values, {len(records.history):,} rows of history"
    rng = np.random.default_rng(1)
    sample = [str(i) for i in rng.choice(sorted(records.runs), min(SAMPLE, count), replace=False)]
    client = tracking._client(f"sqlite:///{store.root / 'mlflow.db'}")
    by_client(client, records.runs[sample[0]].run_id)  # its imports, and a connection
    loop, said = timed(lambda: {i: by_client(client, records.runs[i].run_id) for i in sample})
    loop *= count / len(sample)
    wrong = sum(differing(records.points, i, of_run) for i, of_run in said.items())

    before, again_points = records.points, 0
    del records
    again, records = timed(tables)
    wrong += not records.points.equals(before)
    for i in sample[:10]:
        more = [Metric("train/loss", float(rng.random()), 2_000_000_000_000 + n, 10**6 + n) for n in range(10)]
        client.log_batch(records.runs[i].run_id, metrics=more)
        again_points += len(more)
    del records
    time.sleep(settled)
    after, records = timed(tables)
    wrong += sum(differing(records.points, i, by_client(client, records.runs[i].run_id)) for i in sample[:10])
    wrong += len(records.points) - len(before) - again_points

    checked = f"{sum(map(len, said.values())):,} values of {len(sample)} runs, and {again_points} that were logged later"
    ratio = loop / cold
    kept_size = (store.root / "reading" / "cache" / "points.parquet").stat().st_size / 1e6
    return [
        row("read, s", cold, 60 if judged else None, f"{cpu:.0f} s of CPU; {size}; the file of the database lies in memory"),
        Row("loop over the client / read", ratio, 20 if judged else None, not judged or ratio > 20, f"{loop:.0f} s, from {len(sample)} runs", exceeds=True),
        row("memory, GB", memory, 4 if judged else None, "the most that the process had by then"),
        row("read again, s", again, None, f"nothing new: from {kept_size:.0f} MB that were kept"),
        row("read after 10 runs got new points, s", after, None, "SQLite does not tell which: all are read again"),
        row("values that differ from the client's", wrong, 0, checked),
    ]  # fmt: skip


def over_server(store: Store, count: int) -> list[Row]:
    """The smaller study through a server, and the loop over the client through the same one."""
    with Server(store.root) as server:
        server.start()
        nothing = store.root / "nothing" / "cache" / "points.parquet"
        client = tracking._client(server.url)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "300"  # for the loop: it is to be measured, not to fail, on a busy machine
        seconds, (found, points) = timed(lambda: tracked.tracked("smaller", server.url, nothing))
        sample = sorted(found)[:SAMPLE]
        loop, said = timed(lambda: {i: by_client(client, found[i].run_id) for i in sample})
    wrong = sum(differing(points, i, of_run) for i, of_run in said.items())
    scale = len(found) / len(sample)
    return [
        row("over a server: read, s", seconds * count / len(found), None, f"{seconds:.1f} s for {len(found)} runs, times {count / len(found):g}"),
        row("over a server: loop over the client / read", scale * loop / seconds, None, f"{loop:.1f} s for {len(sample)} runs"),
        row("over a server: values that differ from the client's", wrong, 0, f"{sum(map(len, said.values())):,} values"),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.read_runs")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=1_000, help="a run; at least 10")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as root:
        store = Store(Path(root))
        smaller = min(OVER_SERVER, options.runs)
        trials = {name: planned(store, name, n, options.points) for name, n in (("reading", options.runs), ("smaller", smaller))}
        # in a process of its own, whose memory is not counted
        made = multiprocessing.get_context("spawn").Process(target=fill, args=(empty_database(store.root), trials, options.points))
        made.start()
        made.join()
        if made.exitcode:
            return 1
        rows = measured(store, options.runs, options.points)
        for found in rows:
            print(line(found), flush=True)
        rows += over_server(store, options.runs)
    return publish("read-runs", rows, rows[:-3])


if __name__ == "__main__":
    sys.exit(main())
