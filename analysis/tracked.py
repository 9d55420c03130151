"""What MLflow has of a study: its runs, and the last value of each (metric, step).

Three ways, chosen by the tracking URI:

    sqlite:///PATH          read-only queries
    postgresql://...        the same; also postgresql+psycopg2:// and the like
    http(s)://...           MLflow's REST; and MLflow's client for whatever else it knows

Points that were read by queries are kept in runs/STUDY/cache/points.parquet, which may be deleted at any time. What is
kept is used only while the database itself says that it is what a query would find, see `_marks`. Over REST nothing is
kept: a server tells of a run its newest values, which stay the same when an older point is added or taken away, so that
nothing short of reading all of it shows that there is nothing new.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from harness.tracking import is_server, redacted

MLFLOW_INF = 1.797e308
"""MLflow stores an infinity as the largest double; what is at least this was one."""

SCHEMAS = ("dc11669786a5",)
"""versions of MLflow's database schema (alembic_version) that the queries here were tested on: MLflow 3.17"""

QUIET_NS = 2 * 10**9
"""a file that was changed so many nanoseconds ago may be changed again without a new time stamp"""

THREADS = 4
"""requests for points that a tracking server gets at a time"""

PATIENCE = 300
"""seconds that it may take over one; a server that is not there refuses at once"""


class Unreadable(RuntimeError):
    """MLflow's records cannot be read; one line, without secrets."""


@dataclass(frozen=True)
class Run:
    """MLflow's record of one trial, its points aside."""

    run_id: str
    status: str
    """RUNNING | FINISHED | FAILED | KILLED | SCHEDULED"""
    start_time: int
    tags: Mapping[str, str]

    @property
    def state(self) -> str:
        """The trial's state as delivered; without the tag, what MLflow's own status can tell."""
        return self.tags.get("state") or {"FINISHED": "finished", "FAILED": "failed"}.get(self.status, "interrupted")


def tracked(experiment: str, uri: str, cache: Path) -> tuple[dict[str, Run], pd.DataFrame]:
    """(trial id -> run, points) of an experiment.

    points: trial_id, metric (both categorical), step, value; one a (trial_id, metric, step), sorted by these. An infinity
    is one again, NaN is NaN. Of several runs of one trial the one started last is read, the first by id among equals, as
    delivery writes it. Nothing tracked yet is empty, not an error; runs and experiments that were deleted are not there.
    `cache`: a file in the study's folder; without that folder nothing is kept. Raises Unreadable.
    """
    try:
        runs, points = _from_database(experiment, uri, cache) if _is_database(uri) else _from_client(experiment, uri)
    except Unreadable:
        raise
    except ModuleNotFoundError as error:
        raise Unreadable(
            f"MLflow cannot be read: no module {error.name!r} for {redacted(uri)}; e.g. pip install 'psycopg[binary]'"
        ) from error
    except Exception as error:  # SQLAlchemy's, its drivers', MLflow's, requests': none can be told from another here
        said = " ".join(str(getattr(error, "orig", None) or error).split())
        if isinstance(getattr(error, "orig", error), sqlite3.DatabaseError) and uri.startswith("sqlite:///"):
            said = f"{uri.removeprefix('sqlite:///')}: {said}"
            said += "; move it away, and the journals are delivered anew" if "not a database" in said or "malformed" in said else ""
        raise Unreadable(f"MLflow cannot be read: {_without_password(said, uri)[:300]}") from error
    return runs, _by_trial(points, {run.run_id: trial_id for trial_id, run in runs.items()})


def _is_database(uri: str) -> bool:
    return uri.partition("://")[0].partition("+")[0] in ("sqlite", "postgresql")


def _without_password(text: str, uri: str) -> str:
    password = uri.partition("://")[2].rpartition("@")[0].partition(":")[2]
    return redacted(text.replace(password, "***") if password else text)


def _newest(runs: Iterable[Run]) -> dict[str, Run]:
    """trial id -> the run that counts."""
    in_order = sorted(sorted(runs, key=lambda run: run.run_id, reverse=True), key=lambda run: run.start_time)
    return {run.tags["trial_id"]: run for run in in_order if "trial_id" in run.tags}


# --------------------------------------------------------------------------------------------------- points
#
# A table of points has run_id and metric (dictionaries of text), step and value. The points of a run stand together and are
# sorted by metric and step, so that a run can be taken out and put in without looking at the others.

POINTS = pa.schema(
    [
        ("run_id", pa.dictionary(pa.int32(), pa.string())),
        ("metric", pa.dictionary(pa.int32(), pa.string())),
        ("step", pa.int64()),
        ("value", pa.float64()),
    ]
)

Logged = tuple[str, int, float]
"""metric, step, value (None or NaN: not a number)"""


def _table(logged: Iterable[tuple[str, Sequence[Logged]]]) -> pa.Table:
    """Points of (run id, its rows in the order they were logged): the last value of each (metric, step)."""
    code: dict[str, int] = {}
    runs: list[str] = []
    counts: list[int] = []
    columns: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for run_id, rows in logged:
        if not rows:
            continue
        names, steps, values = zip(*rows, strict=True)
        present = sorted(set(names))
        rank = {name: place for place, name in enumerate(present)}
        metric = np.fromiter(map(rank.__getitem__, names), np.int32, len(names))
        step = np.array(steps, np.int64)
        order = np.lexsort((step, metric))  # stable: among equals the last logged stays last
        metric, step = metric[order], step[order]
        last = np.append((metric[1:] != metric[:-1]) | (step[1:] != step[:-1]), True)
        codes = np.array([code.setdefault(name, len(code)) for name in present], np.int32)
        kept = (codes[metric[last]], step[last], np.array(values, float)[order[last]])
        for column, values_of_run in zip(columns, kept, strict=True):
            column.append(values_of_run)
        runs.append(run_id)
        counts.append(len(kept[0]))
    if not runs:
        return POINTS.empty_table()
    metric, step, value = (np.concatenate(column) for column in columns)
    value[value >= MLFLOW_INF], value[value <= -MLFLOW_INF] = np.inf, -np.inf
    run = np.repeat(np.arange(len(runs), dtype=np.int32), counts)
    return pa.table(
        [
            pa.DictionaryArray.from_arrays(run, pa.array(runs, pa.string())),
            pa.DictionaryArray.from_arrays(metric, pa.array(list(code), pa.string())),
            pa.array(step),
            pa.array(value),
        ],
        POINTS,
    )


def _by_trial(points: pa.Table, trials: Mapping[str, str]) -> pd.DataFrame:
    """The frame of `tracked`, of the points of runs that are in `trials`: run id -> trial id."""
    points = points.unify_dictionaries().combine_chunks()
    run, run_ids = _codes(points["run_id"])
    metric, names = _codes(points["metric"])
    # what is kept may name runs and metrics of which no point is left
    trial, trial_ids = _ranked(run, [trials.get(run_id) for run_id in run_ids])
    # runs stand together, and within one all is in order: to put runs in the order of trials is all that is left to do
    order = np.argsort(trial, kind="stable")[np.count_nonzero(trial < 0) :]
    name, metrics = _ranked(metric[order], names)
    return pd.DataFrame(
        {
            "trial_id": pd.Categorical.from_codes(trial[order], pd.Index(trial_ids, dtype="str")),
            "metric": pd.Categorical.from_codes(name, pd.Index(metrics, dtype="str")),
            "step": points["step"].to_numpy()[order],
            "value": points["value"].to_numpy()[order],
        }
    )


def _ranked(codes: np.ndarray, names: Sequence[str | None]) -> tuple[np.ndarray, list[str]]:
    """(for each code the place of its name in the list, -1 for None; the sorted list of the names that occur)."""
    occurring = np.bincount(codes, minlength=len(names)) > 0
    listed = sorted({name for name, occurs in zip(names, occurring, strict=True) if occurs and name is not None})
    place = {name: number for number, name in enumerate(listed)}
    return np.array([-1 if name is None else place.get(name, -1) for name in names], np.int32)[codes], listed


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Of a column of text: (index into the list, the list)."""
    if column.num_chunks == 0:
        return np.empty(0, np.int32), []
    (chunk,) = column.chunks
    return chunk.indices.to_numpy(), chunk.dictionary.to_pylist()


# ------------------------------------------------------------------------------------------------- a database


def _from_database(experiment: str, uri: str, cache: Path) -> tuple[dict[str, Run], pa.Table]:
    url = sa.make_url(uri)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        return {}, POINTS.empty_table()
    with _connected(url) as database:
        schema = _schema(database, url)
        if schema not in SCHEMAS:
            return _from_client(experiment, uri)
        runs = _newest(_runs(database, experiment))
        wanted = [run.run_id for run in runs.values()]
        before = _marks(database, url, wanted)
        known, points = _kept(cache, schema, before)
        anew = [run_id for run_id in wanted if run_id not in known]
        if anew:
            points = pa.concat_tables([points, _table(_logged(database, anew))])
            # A transaction over all queries would keep writers of SQLite waiting for longer than they wait. So each sees its
            # own moment, and what was read is kept only if the file has not changed all the while.
            after = before if url.get_backend_name() == "postgresql" else _marks(database, url, wanted)
            if before and after == before:
                _keep(cache, schema, before, points)
    return runs, points


@contextmanager
def _connected(url: sa.URL) -> Iterator[sa.Connection]:
    """Reading only; in PostgreSQL all queries see the same moment."""
    options: dict[str, Any] = {"poolclass": sa.NullPool}
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database)).absolute().as_uri()
        engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(f"{path}?mode=ro", uri=True, timeout=60), **options)
    else:
        reading = {"postgresql_readonly": True}
        engine = sa.create_engine(url, isolation_level="REPEATABLE READ", execution_options=reading, **options)
    with engine.connect() as connection:
        yield connection


def _schema(database: sa.Connection, url: sa.URL) -> str:
    """MLflow's schema version, of SCHEMAS or the one of the MLflow that is installed; a warning for that. Raises Unreadable.

    Another version is not left to MLflow's client, which would migrate the database that it is only asked to read.
    """
    found = str(database.execute(sa.text("SELECT version_num FROM alembic_version")).scalar())
    if found in SCHEMAS:
        return found
    import mlflow
    from mlflow.store.db.utils import _get_latest_schema_revision

    address = url.render_as_string(hide_password=True)
    if found != (installed := _get_latest_schema_revision()):
        raise Unreadable(
            f"MLflow cannot be read: {address} has schema {found}, MLflow {mlflow.__version__} here has {installed}; "
            "install the MLflow that wrote it, or run: mlflow db upgrade"
        )
    warnings.warn(
        f"{address}: schema {found} of MLflow {mlflow.__version__} is new to wrbench: read slowly, through MLflow's client", stacklevel=2
    )
    return found


_OF_EXPERIMENT = (
    "FROM runs r JOIN experiments e USING (experiment_id) "
    "WHERE e.name = :name AND e.workspace = :workspace AND e.lifecycle_stage = 'active' AND r.lifecycle_stage = 'active'"
)


def _runs(database: sa.Connection, experiment: str) -> list[Run]:
    bound = {"name": experiment, "workspace": os.environ.get("MLFLOW_WORKSPACE") or "default"}
    tags: dict[str, dict[str, str]] = {}
    of_runs = f"SELECT t.run_uuid, t.key, t.value FROM tags t WHERE t.run_uuid IN (SELECT r.run_uuid {_OF_EXPERIMENT})"  # noqa: S608
    for run_id, key, value in database.execute(sa.text(of_runs), bound):
        tags.setdefault(run_id, {})[key] = value
    found = database.execute(sa.text(f"SELECT r.run_uuid, r.status, r.start_time {_OF_EXPERIMENT}"), bound)
    return [Run(run_id, status, start, tags.get(run_id, {})) for run_id, status, start in found]


def _logged(database: sa.Connection, run_ids: Sequence[str]) -> Iterator[tuple[str, Sequence[Logged]]]:
    """(run id, its rows in the order they were logged).

    Of values logged in the same millisecond SQLite knows which came last, by the number of the row. PostgreSQL does not:
    there the largest does, a NaN counting as 0, as in MLflow's own history.
    """
    last = "rowid" if database.dialect.name == "sqlite" else "value"
    query = sa.text(
        "SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics "  # noqa: S608
        f"WHERE run_uuid = :run_id ORDER BY timestamp, {last}"
    )
    for run_id in run_ids:
        cursor = database.execute(query, {"run_id": run_id}).cursor  # the driver's own: a Row a point costs half as much again
        assert cursor is not None
        yield run_id, cursor.fetchall()


# -------------------------------------------------------------------------------------------------- what is kept


def _marks(database: sa.Connection, url: sa.URL, run_ids: Sequence[str]) -> dict[str, str]:
    """run id -> a mark that stays the same only as long as the points of the run do; empty where there is none.

    MLflow itself only appends, so that the number of a run's rows would do. But people edit databases, and `check` is there
    to find it: a mark must not miss a value that was changed in place, nor a row deleted and logged again, which SQLite
    gives the same number. Whatever tells that apart has to look at every value.

    PostgreSQL does so where the data lie: a 64-bit hash of each row, summed over the run. It hangs on nothing but the rows, so
    that a database that was restored or moved keeps its marks. Before PostgreSQL 14, which lacks the hash, nothing is kept.

    SQLite has no hash of a value, and to look at all rows from here takes as long as to read them. So the mark of every run
    is that of the file: which one, its size, its times. Any write gives it a new time, unless it follows the one before so
    closely that the clock of the file system has not moved: a file that changed within the last QUIET_NS has no mark. The
    number of the last row is there for file servers whose clock is not ours. With a write-ahead log the file says nothing
    of what is in the log: no mark.
    """
    if not run_ids:
        return {}
    if url.get_backend_name() == "postgresql":
        if (database.dialect.server_version_info or (0,)) < (14,):
            return {}
        hashed = "hash_record_extended(ROW(key, timestamp, step, value, is_nan), 0)"
        query = sa.text(f"SELECT run_uuid, count(*), sum({hashed}) FROM metrics WHERE run_uuid = ANY(:run_ids) GROUP BY run_uuid")  # noqa: S608
        found = {run_id: f"{rows} {digest}" for run_id, rows, digest in database.execute(query, {"run_ids": list(run_ids)})}
        return {run_id: found.get(run_id, "0 0") for run_id in run_ids}
    if database.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal":
        return {}
    newest = database.execute(sa.text("SELECT max(rowid) FROM metrics")).scalar()
    path = Path(str(url.database)).absolute()
    stat = path.stat()
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < QUIET_NS:
        return {}
    return dict.fromkeys(run_ids, f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {newest}")


def _kept(cache: Path, schema: str, marks: Mapping[str, str]) -> tuple[set[str], pa.Table]:
    """(runs whose points were kept under the same mark, those points); none if another version wrote the file."""
    try:
        with pq.ParquetFile(cache, page_checksum_verification=True) as file:
            notes = json.loads(file.schema_arrow.metadata[b"wrbench"])
            if (notes["format"], notes["schema"]) == (FORMAT, schema):
                same = {run_id for run_id, mark in notes["marks"].items() if marks.get(run_id) == mark}
                return same, _only(file.read().cast(POINTS), same) if same else POINTS.empty_table()
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged, or somebody else's; pyarrow's errors are among these
        pass
    return set(), POINTS.empty_table()


FORMAT = 1
"""of the file that is kept"""


def _keep(cache: Path, schema: str, marks: Mapping[str, str], points: pa.Table) -> None:
    """Written whole or not at all; a store that cannot be written is read without."""
    if not cache.parent.parent.is_dir():
        return
    unfinished = cache.with_name(f".{cache.name}.{uuid.uuid4().hex}")
    notes = {b"wrbench": json.dumps({"format": FORMAT, "schema": schema, "marks": marks}).encode()}
    with suppress(OSError):
        cache.parent.mkdir(exist_ok=True)
        try:
            pq.write_table(points.replace_schema_metadata(notes), unfinished, compression="zstd", write_page_checksum=True)
            unfinished.replace(cache)
        finally:
            unfinished.unlink(missing_ok=True)


def _only(points: pa.Table, run_ids: set[str]) -> pa.Table:
    """Of the points those of some runs."""
    table = points.unify_dictionaries().combine_chunks()
    run, names = _codes(table["run_id"])
    wanted = np.array([name in run_ids for name in names], bool)
    return table.filter(pa.array(wanted[run])) if not wanted.all() else table


# ------------------------------------------------------------------------------------------------- a server


def _from_client(experiment: str, uri: str) -> tuple[dict[str, Run], pa.Table]:
    """Through MLflow's client. A server that is down is not waited for."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow.tracking import MlflowClient  # takes seconds, and a database needs none of it

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    runs: list[Run] = []
    metrics: dict[str, list[str]] = {}
    token: str | None = "" if found is not None and found.lifecycle_stage == "active" else None
    while token is not None:
        page = client.search_runs([found.experiment_id], max_results=200, page_token=token or None)
        for run in page:
            runs.append(Run(run.info.run_id, run.info.status, run.info.start_time, run.data.tags))
            metrics[run.info.run_id] = sorted(run.data.metrics)
        token = page.token or None
    newest = _newest(runs)
    histories = _histories_of_server if is_server(uri) else _histories
    return newest, _table(histories(client, {run.run_id: metrics[run.run_id] for run in newest.values()}))


def _histories(client: Any, metrics: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[Logged]]]:
    """(run id, rows in the order they were logged), a call a metric of a run. metrics: run id -> its metrics."""
    for run_id, names in metrics.items():
        yield run_id, [row for name in names for row in _history(client, run_id, name)]


def _history(client: Any, run_id: str, metric: str) -> list[Logged]:
    logged = sorted(client.get_metric_history(run_id, metric), key=lambda m: m.timestamp)
    return [(metric, m.step, m.value) for m in logged]


def _histories_of_server(client: Any, metrics: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, list[Logged]]]:
    """As `_histories`, a call a metric of many runs, some at a time."""
    run_ids = sorted(metrics)
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(run_ids), RUNS_A_CALL):
            some = run_ids[first : first + RUNS_A_CALL]
            rows: dict[str, list[Logged]] = {run_id: [] for run_id in some}
            asked = [(name, [i for i in some if name in metrics[i]]) for name in sorted({n for i in some for n in metrics[i]})]
            for found in pool.map(lambda of: _histories_of_metric(client, *of), asked):
                for run_id, row in found:
                    rows[run_id].append(row)
            yield from rows.items()


RUNS_A_CALL, POINTS_A_CALL = 100, 25_000
"""what get-history-bulk takes, and what it gives at most, the rest cut off without a word"""


def _histories_of_metric(client: Any, metric: str, run_ids: Sequence[str]) -> list[tuple[str, Logged]]:
    """(run id, row) of one metric of at most RUNS_A_CALL runs, the rows of a run in the order they were logged.

    By the call that MLflow's own pages draw charts with. An answer that is full is whole for all of its runs but the last.
    """
    from mlflow.utils.rest_utils import http_request, verify_rest_response

    endpoint = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
    left, out = sorted(run_ids), list[tuple[str, Logged]]()
    while left:
        asked = {"run_id": left, "metric_key": metric, "max_results": POINTS_A_CALL}
        answer = http_request(client._tracking_client.store.get_host_creds(), endpoint, "GET", params=asked, timeout=PATIENCE)
        if answer.status_code == 404:  # no MLflow server, or one without its pages
            return out + [(run_id, row) for run_id in left for row in _history(client, run_id, metric)]
        found = verify_rest_response(answer, endpoint).json()["metrics"]
        last = found[-1]["run_id"] if len(found) >= POINTS_A_CALL else None
        if last == left[0]:  # more of one run than an answer holds
            out += [(last, row) for row in _history(client, last, metric)]
            left = left[1:]
            continue
        found.sort(key=lambda point: point["timestamp"])
        out += [(p["run_id"], (metric, p["step"], p["value"])) for p in found if p["run_id"] != last]
        left = left[left.index(last) :] if last else []
    return out
