"""MLflow's records in a real PostgreSQL: read by queries, and kept by run."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from mlflow.entities import Metric

from analysis import runs, tracked
from harness import tracking
from harness.store import Store
from tests.postgres import PASSWORD, Postgres, programs

STUDY = "synthetic"


@pytest.fixture(scope="module")
def server(synthetic_store: Path) -> Iterator[Postgres]:
    """With the study of tests/synthetic.py, delivered."""
    if (folder := programs()) is None:
        assert os.environ.get("CI") != "true", "PostgreSQL is not installed; e.g. apt-get install postgresql"
        pytest.skip("PostgreSQL is not installed; e.g. apt-get install postgresql")
    with Postgres(folder) as running:
        tracking.deliver(Store(synthetic_store), STUDY, tracking_uri=running.url)
        yield running


@pytest.fixture
def store(synthetic_store: Path, tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    shutil.copytree(synthetic_store, root, ignore=shutil.ignore_patterns("mlflow.db"))
    return root


def read(server: Postgres, store: Path) -> tuple[dict[str, tracked.Run], pd.DataFrame]:
    return tracked.tracked(STUDY, server.url, store / STUDY / "cache" / "points.parquet")


def read_anew(server: Postgres) -> tuple[dict[str, tracked.Run], pd.DataFrame]:
    return tracked.tracked(STUDY, server.url, Path("no such folder") / "cache" / "points.parquet")


def sql(server: Postgres, statement: str, **bound: Any) -> Any:
    engine = sa.create_engine(server.url, poolclass=sa.NullPool)
    with engine.begin() as database:
        found = database.execute(sa.text(statement), bound)
        return found.fetchall() if found.returns_rows else found.rowcount


def assert_same(left: tuple[dict[str, tracked.Run], pd.DataFrame], right: tuple[dict[str, tracked.Run], pd.DataFrame]) -> None:
    assert left[0] == right[0]
    pd.testing.assert_frame_equal(left[1], right[1], check_exact=True)


def test_the_tables_are_those_of_sqlite(server: Postgres, store: Path, synthetic_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    mine = runs.read(STUDY, store)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    expected = runs.read(STUDY, synthetic_store)
    pd.testing.assert_frame_equal(mine.history, expected.history, check_exact=True)
    pd.testing.assert_frame_equal(mine.trials.drop(columns="run_id"), expected.trials.drop(columns="run_id"), check_exact=True)
    assert mine.check().agrees.all()
    assert math.inf in set(mine.points.value) and mine.points.value.isna().any()


def test_only_runs_with_something_new_are_read_again(server: Postgres, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = read(server, store)
    asked: list[str] = []
    logged = tracked._logged
    monkeypatch.setattr(tracked, "_logged", lambda database, run_ids: (asked.extend(run_ids), logged(database, run_ids))[1])
    read(server, store)
    assert asked == []
    run = found[min(found)].run_id
    tracking._client(server.url).log_batch(run, [Metric("train/loss", 0.5, 2 * 10**12, 10**6)])
    assert_same(read(server, store), read_anew(server))
    assert asked[:1] == [run] and len(asked) == 1 + len(found)  # the other ones for read_anew


def any_row(server: Postgres, rng: np.random.Generator) -> dict[str, Any]:
    """Of a run that is not deleted; no value that another one of its step supersedes."""
    columns = "m.key, m.value, m.timestamp, m.run_uuid, m.step, m.is_nan"
    active = "FROM metrics m JOIN runs r USING (run_uuid) WHERE r.lifecycle_stage = 'active' AND m.key <> 'odd' AND NOT m.is_nan"
    found = sql(server, f"SELECT {columns} {active} AND m.value < 1e9 ORDER BY m.run_uuid, m.key, m.step")
    return dict(found[rng.integers(len(found))]._mapping)


THIS = "run_uuid = :run_uuid AND key = :key AND step = :step AND timestamp = :timestamp AND value = :value AND is_nan = :is_nan"


def change_a_value(server: Postgres, rng: np.random.Generator) -> None:
    row = any_row(server, rng)
    assert sql(server, f"UPDATE metrics SET value = :other WHERE {THIS}", **row, other=math.nextafter(row["value"], math.inf)) == 1


def make_it_nan(server: Postgres, rng: np.random.Generator) -> None:
    assert sql(server, f"UPDATE metrics SET is_nan = NOT is_nan WHERE {THIS}", **any_row(server, rng)) == 1


def move_a_point(server: Postgres, rng: np.random.Generator) -> None:
    assert sql(server, f"UPDATE metrics SET step = step + 100000 WHERE {THIS}", **any_row(server, rng)) == 1


def delete_a_point(server: Postgres, rng: np.random.Generator) -> None:
    assert sql(server, f"DELETE FROM metrics WHERE {THIS}", **any_row(server, rng)) == 1


def log_by_client(server: Postgres, rng: np.random.Generator) -> None:
    run = str(rng.choice(sorted(run.run_id for run in read_anew(server)[0].values())))
    values = [*rng.random(3), math.nan, math.inf, -math.inf]
    now = int(1000 * time.time())
    tracking._client(server.url).log_batch(run, [Metric("odd", value, now + n, int(rng.integers(9))) for n, value in enumerate(values)])


def delete_or_restore_a_run(server: Postgres, rng: np.random.Generator) -> None:
    if not sql(server, "UPDATE runs SET lifecycle_stage = 'active' WHERE lifecycle_stage = 'deleted'"):
        assert sql(server, "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = :run", run=any_row(server, rng)["run_uuid"]) == 1


def forget_a_metric(server: Postgres, rng: np.random.Generator) -> None:
    assert sql(server, "DELETE FROM metrics WHERE key = 'odd'")


def empty_a_run(server: Postgres, rng: np.random.Generator) -> None:
    assert sql(server, "DELETE FROM metrics WHERE run_uuid = :run", run=any_row(server, rng)["run_uuid"])


CHANGES: tuple[Callable[[Postgres, np.random.Generator], None], ...] = (
    change_a_value, make_it_nan, move_a_point, delete_a_point, log_by_client, delete_or_restore_a_run, forget_a_metric, empty_a_run,
)  # fmt: skip


def test_what_is_kept_equals_what_a_query_finds_after_any_changes(server: Postgres, store: Path) -> None:
    rng = np.random.default_rng(6)
    for number in range(24):
        before = read(server, store)
        CHANGES[number % len(CHANGES)](server, rng)
        after = read(server, store)
        assert before[0] != after[0] or not before[1].equals(after[1])
        assert_same(after, read_anew(server))


def test_it_is_only_read(server: Postgres) -> None:
    with tracked._connected(sa.make_url(server.url)) as database, pytest.raises(sa.exc.InternalError, match="read-only transaction"):
        database.execute(sa.text("DELETE FROM metrics"))


def test_a_wrong_password_is_one_line_without_it(server: Postgres, store: Path) -> None:
    address = server.url.replace(PASSWORD, "wr0ng")
    with pytest.raises(runs.Unreadable, match="password authentication failed") as error:
        tracked.tracked(STUDY, address, store / "x" / "y")
    assert "wr0ng" not in str(error.value) and "\n" not in str(error.value)
