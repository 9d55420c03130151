"""Reading MLflow: by queries, from what was kept, through a server and through the client, always the same."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from mlflow.entities import Metric, RunTag, ViewType

from analysis import runs, tracked
from harness import tracking
from tests.mlflow_server import Relay, Server

STUDY = "synthetic"


@pytest.fixture
def store(synthetic_store: Path, tmp_path: Path) -> Path:
    """A copy to change; without what other tests' readings of the original kept."""
    return Path(shutil.copytree(synthetic_store, tmp_path / "runs", ignore=shutil.ignore_patterns("cache")))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file counts as settled after 20 ms, so that a test of many changes need not wait two seconds for each."""
    monkeypatch.setattr(tracked, "QUIET_NS", 20 * 10**6)


def uri(store: Path) -> str:
    return f"sqlite:///{store / 'mlflow.db'}"


def kept(store: Path) -> Path:
    return store / STUDY / "cache" / "points.parquet"


def read(store: Path, address: str = "") -> tuple[dict[str, tracked.Run], pd.DataFrame]:
    return tracked.tracked(STUDY, address or uri(store), kept(store))


def read_anew(store: Path, address: str = "") -> tuple[dict[str, tracked.Run], pd.DataFrame]:
    return tracked.tracked(STUDY, address or uri(store), store / "no such study" / "cache" / "points.parquet")


def assert_same(left: tuple[dict[str, tracked.Run], pd.DataFrame], right: tuple[dict[str, tracked.Run], pd.DataFrame]) -> None:
    assert left[0] == right[0]
    pd.testing.assert_frame_equal(left[1], right[1], check_exact=True)


def sql(store: Path, statement: str, *bound: Any) -> None:
    with closing(sqlite3.connect(store / "mlflow.db")) as db:
        assert db.execute(statement, bound).rowcount > 0
        db.commit()


def is_used(store: Path) -> bool:
    """Whether what is kept is read: it says so when it is changed behind the back of its mark."""
    before = kept(store).read_bytes()
    table = pq.read_table(kept(store))
    changed = table.set_column(3, "value", [np.full(len(table), 12345.0)])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), kept(store), write_page_checksum=True)
    found = bool((read(store)[1].value == 12345.0).all())
    kept(store).write_bytes(before)
    return found


# ------------------------------------------------------------------------------------------------- what is kept


def test_what_is_kept_is_read_again_and_equal(store: Path, brief: None) -> None:
    time.sleep(0.03)
    first = read(store)
    assert kept(store).is_file() and [path.name for path in kept(store).parent.iterdir()] == ["points.parquet"]
    assert is_used(store)
    assert_same(read(store), first)
    assert_same(read_anew(store), first)
    assert first[1].value.isna().sum() == 1 and math.inf in set(first[1].value)


def test_a_file_that_changed_just_now_is_not_kept(store: Path) -> None:
    """Another change may follow before its time stamp moves."""
    os.utime(store / "mlflow.db")
    read(store)
    assert not kept(store).exists()
    time.sleep(tracked.QUIET_NS / 1e9 + 0.1)
    read(store)
    assert is_used(store)


def metric_row(store: Path, rng: np.random.Generator) -> tuple[Any, ...]:
    """rowid and columns of some point."""
    with closing(sqlite3.connect(store / "mlflow.db")) as db:
        found = db.execute("SELECT rowid, key, value, timestamp, run_uuid, step, is_nan FROM metrics").fetchall()
    return tuple(found[rng.integers(len(found))])


def put(store: Path, rowid: int | None, key: str, value: float, timestamp: int, run: str, step: int, is_nan: bool = False) -> None:
    columns = "(rowid, key, value, timestamp, run_uuid, step, is_nan)"
    sql(store, f"INSERT INTO metrics {columns} VALUES (?, ?, ?, ?, ?, ?, ?)", rowid, key, value, timestamp, run, step, is_nan)


def change_a_value(store: Path, rng: np.random.Generator) -> None:
    row = metric_row(store, rng)
    sql(store, "UPDATE metrics SET value = ? WHERE rowid = ?", math.nextafter(row[2], math.inf), row[0])


def make_it_nan(store: Path, rng: np.random.Generator) -> None:
    sql(store, "UPDATE metrics SET is_nan = 1 - is_nan WHERE rowid = ?", metric_row(store, rng)[0])


def delete_a_point(store: Path, rng: np.random.Generator) -> None:
    sql(store, "DELETE FROM metrics WHERE rowid = ?", metric_row(store, rng)[0])


def log_it_again(store: Path, rng: np.random.Generator) -> None:
    """Deleted, and put back with another value: as many rows as before, the same number, the same time."""
    rowid, key, value, *rest = metric_row(store, rng)
    sql(store, "DELETE FROM metrics WHERE rowid = ?", rowid)
    put(store, rowid, key, value + 0.25, *rest)


def swap_two_values(store: Path, rng: np.random.Generator) -> None:
    one, other = metric_row(store, rng), metric_row(store, rng)
    sql(store, "UPDATE metrics SET value = ? WHERE rowid = ?", other[2], one[0])
    sql(store, "UPDATE metrics SET value = ? WHERE rowid = ?", one[2], other[0])


def move_a_point(store: Path, rng: np.random.Generator) -> None:
    sql(store, "UPDATE metrics SET step = step + 100000 WHERE rowid = ?", metric_row(store, rng)[0])


def log_by_client(store: Path, rng: np.random.Generator) -> None:
    """As delivery does: new steps, steps again, NaN and infinities."""
    values = [*rng.random(5), math.nan, math.inf, -math.inf]
    steps = rng.integers(0, 400, len(values)).tolist()
    metrics = [Metric("train/loss", value, int(time.time() * 1000), step) for value, step in zip(values, steps, strict=True)]
    tracking._client(uri(store)).log_batch(active(store, rng), metrics=metrics)


def active(store: Path, rng: np.random.Generator) -> str:
    return str(rng.choice(sorted(run.run_id for run in read_anew(store)[0].values())))


def delete_or_restore_a_run(store: Path, rng: np.random.Generator) -> None:
    client = tracking._client(uri(store))
    (experiment,) = client.search_experiments(filter_string=f"name = '{STUDY}'")
    deleted = client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    if deleted:
        client.restore_run(deleted[0].info.run_id)
    else:
        client.delete_run(active(store, rng))


def another_run_of_a_trial(store: Path, rng: np.random.Generator) -> None:
    """Started later, so the one that counts."""
    client = tracking._client(uri(store))
    trial_id = str(rng.choice(sorted(read_anew(store)[0])))
    (experiment,) = client.search_experiments(filter_string=f"name = '{STUDY}'")
    run = client.create_run(experiment.experiment_id)
    client.log_batch(run.info.run_id, [Metric("val/top1", 0.5, 1, 34)], tags=[RunTag("trial_id", trial_id)])


CHANGES: tuple[Callable[[Path, np.random.Generator], None], ...] = (
    change_a_value, make_it_nan, delete_a_point, log_it_again, swap_two_values, move_a_point,
    log_by_client, delete_or_restore_a_run, another_run_of_a_trial,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen(store: Path, brief: None, change: Callable[[Path, np.random.Generator], None]) -> None:
    time.sleep(0.03)
    before = read(store)
    assert kept(store).is_file()
    change(store, np.random.default_rng(0))
    after = read(store)
    assert before[0] != after[0] or not before[1].equals(after[1])
    assert_same(after, read_anew(store))


def test_what_is_kept_equals_what_a_query_finds_after_any_changes(store: Path, brief: None) -> None:
    rng = np.random.default_rng(6)
    used = 0
    for number in range(40):
        for change in rng.choice(len(CHANGES), rng.integers(1, 3)):
            CHANGES[change](store, rng)
        time.sleep(0.03 * rng.integers(2))  # some are read at once, when nothing may be kept
        for _ in range(2):
            assert_same(read(store), read_anew(store))
        if number % 4 == 0:
            time.sleep(0.03)
            read(store)
            used += is_used(store)
    assert used == 10


def test_a_store_with_a_write_ahead_log_is_read_anew_each_time(store: Path, brief: None) -> None:
    """The file says nothing of what is in the log."""
    with closing(sqlite3.connect(store / "mlflow.db")) as db:
        assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
        time.sleep(0.03)
        read(store)
        assert not kept(store).exists()
        db.execute("UPDATE metrics SET value = 0.125 WHERE key = 'val/top1'")
        db.commit()
        found = read(store)[1]
        assert set(found[found.metric == "val/top1"].value) == {0.125}


def test_another_store_is_not_taken_for_this_one(store: Path, tmp_path: Path, brief: None) -> None:
    time.sleep(0.03)
    read(store)
    other = Path(shutil.copytree(store, tmp_path / "other"))
    sql(other, "UPDATE metrics SET value = 0.125")
    time.sleep(0.03)
    assert set(read(other)[1].value.dropna()) == {0.125}
    assert set(tracked.tracked(STUDY, uri(other), kept(store))[1].value.dropna()) == {0.125}
    assert_same(read(store), read_anew(store))


@pytest.mark.parametrize("damage", ["cut", "bit", "not parquet", "another's", "older", "other schema"])
def test_a_damaged_or_foreign_file_is_not_read(store: Path, brief: None, damage: str) -> None:
    time.sleep(0.03)
    whole = read(store)
    path, text = kept(store), kept(store).read_bytes()
    table = pq.read_table(path)
    if damage == "cut":
        path.write_bytes(text[: len(text) // 2])
    elif damage == "bit":
        flipped = bytearray(text)
        flipped[len(text) // 3] ^= 1
        path.write_bytes(flipped)
    elif damage == "not parquet":
        path.write_text("points")
    else:
        notes = {"another's": b"{}", "older": b'"format": 0', "other schema": b'"schema": "0"'}[damage]
        mine = table.schema.metadata[b"wrbench"]
        mine = mine.replace(b'"format": 1', notes) if damage == "older" else mine.replace(b'"schema": "dc11669786a5"', notes)
        pq.write_table(table.slice(7).replace_schema_metadata({b"wrbench": notes if damage == "another's" else mine}), path)
    assert_same(read(store), whole)
    assert is_used(store)  # it was written anew


def test_a_store_that_cannot_be_written_is_read_without(store: Path, brief: None) -> None:
    time.sleep(0.03)
    kept(store).parent.write_text("in the way")
    assert_same(read(store), read_anew(store))
    assert kept(store).parent.read_text() == "in the way"


def test_nothing_is_kept_beside_a_study_that_is_not_in_the_store(store: Path, brief: None) -> None:
    time.sleep(0.03)
    read_anew(store)
    assert not (store / "no such study").exists()


# ---------------------------------------------------------------------------------------------------- the same


@pytest.fixture(scope="module")
def server(synthetic_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On a store with infinities, NaN, values logged twice, and a run and an experiment that were deleted."""
    root = tmp_path_factory.mktemp("server") / "runs"
    shutil.copytree(synthetic_store, root)
    client = tracking._client(uri(root))
    (experiment,) = client.search_experiments(filter_string=f"name = '{STUDY}'")
    first, second, third = (run.info.run_id for run in client.search_runs([experiment.experiment_id], max_results=3))
    for value, timestamp, step in [
        (1.0, 5, 0),
        (2.0, 7, 0),
        (3.0, 6, 0),
        (math.inf, 1, 1),
        (-math.inf, 1, 2),
        (math.nan, 1, 3),
        (9.0, 1, -2),
    ]:
        client.log_metric(first, "odd", value, timestamp=timestamp, step=step)
    client.log_batch(second, [Metric("long", i / 7, i, i) for i in range(1000)])
    client.delete_run(third)
    gone = client.create_run(client.create_experiment("gone")).info.run_id
    client.log_batch(gone, [Metric("odd", 1.0, 1, 1)], tags=[RunTag("trial_id", "x")])
    client.delete_experiment(client.get_run(gone).info.experiment_id)
    with Server(root) as running:
        running.start()
        yield running


def test_the_last_value_of_a_metric_at_a_step_is_the_one_logged_last(server: Server) -> None:
    points = read_anew(server.root)[1]
    odd = points[points.metric == "odd"].set_index("step").value
    assert odd.to_dict() == pytest.approx({-2: 9.0, 0: 2.0, 1: math.inf, 2: -math.inf, 3: math.nan}, nan_ok=True)
    assert list(odd.index) == [-2, 0, 1, 2, 3]


def test_of_values_of_one_millisecond_the_one_logged_last_counts(store: Path) -> None:
    run = next(iter(read_anew(store)[0].values())).run_id
    client = tracking._client(uri(store))
    for value in (0.3, 0.9, 0.1):
        client.log_metric(run, "tied", value, timestamp=1, step=0)
    points = read_anew(store)[1]
    assert points[points.metric == "tied"].value.to_list() == [0.1]


def test_points_are_sorted_and_of_one_type(server: Server) -> None:
    _, points = read_anew(server.root)
    assert not points.duplicated(["trial_id", "metric", "step"]).any()
    text = points.astype({"trial_id": "str", "metric": "str"})
    pd.testing.assert_frame_equal(text, text.sort_values(["trial_id", "metric", "step"], ignore_index=True))
    assert points.dtypes.astype(str).to_dict() == {"trial_id": "category", "metric": "category", "step": "int64", "value": "float64"}


def test_the_server_says_what_the_database_says(server: Server) -> None:
    assert_same(read_anew(server.root, server.url), read_anew(server.root))


def test_answers_that_are_cut_off_lose_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracked, "POINTS_A_CALL", 100)  # less than one run has of `long`, more than it has of others
    monkeypatch.setattr(tracked, "RUNS_A_CALL", 5)
    assert_same(read_anew(server.root, server.url), read_anew(server.root))


def test_a_server_without_the_pages_of_mlflow_is_read_a_metric_of_a_run_at_a_time(server: Server) -> None:
    def before(request: Any) -> Any:
        return (404, {}, b"") if "ajax-api" in request.path else None

    with Relay(server.url, before) as relay:
        assert_same(read_anew(server.root, relay.url), read_anew(server.root))


def test_deleted_experiments_are_not_there(server: Server) -> None:
    for address in (uri(server.root), server.url):
        found, points = tracked.tracked("gone", address, server.root / "x" / "y" / "z")
        assert not found and points.empty


# ------------------------------------------------------------------------------------------------------ schema


def test_a_schema_that_is_only_mlflows_is_read_through_its_client(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_anew(store)
    monkeypatch.setattr(tracked, "SCHEMAS", ())
    with pytest.warns(UserWarning, match=r"mlflow.db: schema dc11669786a5 of MLflow 3\.\d+\.\d+ is new to wrbench: read slowly"):
        assert_same(read(store), expected)
    assert not kept(store).exists()


def test_a_file_that_is_no_database_is_named_with_what_to_do(store: Path) -> None:
    (store / "mlflow.db").write_text("not a database " * 1000)
    with pytest.raises(runs.Unreadable, match=r"^MLflow cannot be read: .*mlflow.db: file is not a database; move it away, .*$"):
        read(store)


def test_a_schema_that_nobody_knows_is_one_clear_line_and_left_alone(store: Path) -> None:
    sql(store, "UPDATE alembic_version SET version_num = '451aebb31d03'")
    before = (store / "mlflow.db").read_bytes()
    with pytest.raises(
        runs.Unreadable, match=r"^MLflow cannot be read: .*mlflow.db has schema 451aebb31d03, MLflow .* has .*; install .*$"
    ):
        read(store)
    assert (store / "mlflow.db").read_bytes() == before


@pytest.mark.parametrize("address", ["postgresql://me:s3cret@127.0.0.1:9/db", "postgresql+psycopg://me:s3c@ret@127.0.0.1:9/db"])
def test_a_database_that_is_down_is_one_clear_line_without_the_password(store: Path, address: str) -> None:
    with pytest.raises(runs.Unreadable, match=r"^MLflow cannot be read: .+$") as error:
        read(store, address)
    assert "s3c" not in str(error.value) and "\n" not in str(error.value)
