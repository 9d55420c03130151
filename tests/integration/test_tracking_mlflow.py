"""Delivery to a real MLflow: its SQLite store, its server, and processes that are killed in the middle."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from harness import deliverer, journal, tracking, ui
from harness.config import Trial
from harness.journal import Journal
from harness.store import Store, close
from tests import mlflow_server
from tests.mlflow_server import Answer, Relay, Server
from tests.trials import trial as make_trial

STUDY = "s"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mlflow_server.empty_database(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "the store"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    return Store(root)


class Life:
    """Writes the journal of one trial as training would."""

    def __init__(self, store: Store, **over: Any) -> None:
        self.trial: Trial = make_trial(**{"study": STUDY, "arm": "AdamWR"} | over)
        self.id = self.trial.trial_id
        self.folder = store.trial(self.trial.study, self.id)
        self.folder.write_config(self.trial)

    def start(self, resumed_from: int = 0, **described: Any) -> None:
        self.journal = Journal(self.folder.journal, self.id, self.folder.claim())
        self.journal.write(resumed_from, event="start", resumed_from=resumed_from, total_steps=100, **described)

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self.journal.write(step, metrics={"train/loss": 1 / (step + 1), "schedule/eta": 1 - step / 100})

    def checkpoint(self, steps: int) -> None:
        self.journal.write(steps, event="checkpoint")

    def end(self, step: int, state: str = "finished", error: str | None = None) -> None:
        self.journal.write(step, event="end", state=state, error=error)

    def record(self) -> journal.Record:
        return journal.fold(journal.read(self.folder.journal))


def finished(store: Store, seed: int = 0, steps: int = 20, study: str = STUDY) -> Life:
    life = Life(store, seed=seed, study=study)
    life.start()
    life.train(0, steps)
    life.checkpoint(steps)
    life.end(steps - 1)
    return life


Rows = list[tuple[Any, ...]]


def rows(store: Store, query: str) -> Rows:
    with closing(sqlite3.connect(store.root / "mlflow.db", timeout=30)) as database:
        return database.execute(query).fetchall()


def points(store: Store) -> Rows:
    """Every row there is, so that a doubled one shows."""
    return sorted(
        rows(
            store,
            "SELECT t.value, m.key, m.step, m.value, m.timestamp FROM metrics m JOIN tags t USING (run_uuid) WHERE t.key = 'trial_id'",
        )
    )


def settled(*lives: Life) -> Rows:
    return sorted((life.id, p.metric, p.step, p.value, p.timestamp) for life in lives for p in life.record().settled)


def run(store: Store) -> Any:
    """The only run there is."""
    client = tracking._client(tracking.tracking_uri(store))
    (found,) = client.search_runs([client.get_experiment_by_name(STUDY).experiment_id])
    return found


def eventually(what: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < 300, "never"
        time.sleep(0.02)


# --------------------------------------------------------------------------------------- one trial's record


def test_a_run_says_what_the_journal_settles(store: Store) -> None:
    life = Life(store, seed=3)
    with life.folder.lock():
        life.start(world_size=2, backend="ddp", host="n1", commit="c0ffee1", python="3.11.2", torch="2.13.0", deepspeed="0.19.2", pid=1)
        life.train(0, 10)
        assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 0)
        assert points(store) == [] and run(store).info.status == "RUNNING"
        life.checkpoint(8)
        life.train(10, 20)
        assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 16)
        assert points(store) == settled(life) and len(points(store)) == 16
        life.train(20, 25)  # pending: nothing to send
        assert tracking.deliver(store, STUDY) == tracking.Delivered(0, 0)
        first = run(store)
        life.checkpoint(25)
        life.end(24)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 34)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(0, 0)
    assert points(store) == settled(life) and len(points(store)) == 50

    last, record = run(store), life.record()
    assert last.info.run_id == first.info.run_id == tracking.run_id(life.folder)
    assert last.info.run_name == ui.run_name(life.trial)
    assert (last.info.status, last.info.start_time, last.info.end_time) == ("FINISHED", record.first_timestamp, record.last_timestamp)
    assert last.data.params == tracking.params(life.trial)
    wanted = {"study": STUDY, "arm": "AdamWR", "seed": "3", "phase": "search", "trial_id": life.id, "attempt": "1", "state": "finished"}
    wanted |= {"point": ui.point(life.trial), "world_size": "2", "backend": "ddp", "host": "n1", "commit": "c0ffee1"}
    wanted |= {"python": "3.11.2", "torch": "2.13.0", "deepspeed": "0.19.2"}
    assert {key: value for key, value in last.data.tags.items() if not key.startswith("mlflow.")} == wanted
    artifacts = list((store.study(STUDY) / "artifacts").rglob("config.yaml"))
    assert [path.read_text() for path in artifacts] == [life.folder.config.read_text()]
    assert [r[0] for r in rows(store, "SELECT name FROM experiments WHERE name != 'Default'")] == [STUDY]


def test_what_the_ui_shows_of_a_study_is_set_once_and_left_to_its_readers(store: Store) -> None:
    finished(store)
    tracking.deliver(store, STUDY)
    client = tracking._client(tracking.tracking_uri(store))
    experiment = client.get_experiment_by_name(STUDY)
    wanted = ui.experiment_tags(experiment.creation_time)
    assert experiment.tags.items() >= wanted.items()
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "ours")
    client.delete_experiment_tag(
        experiment.experiment_id, f"mlflow.sharedViewState.{ui.BY_ARM}"
    )  # as of a study begun before there were views
    finished(store, seed=1)
    tracking.deliver(store, STUDY)
    assert client.get_experiment_by_name(STUDY).tags.items() >= (wanted | {"mlflow.note.content": "ours"}).items()


def test_killed_resumed_and_finished_is_one_run_without_duplicates(store: Store) -> None:
    life = Life(store)
    with life.folder.lock():
        life.start()
        life.train(0, 10)
        life.checkpoint(5)
        tracking.deliver(store, STUDY)
    tracking.deliver(store, STUDY)  # nothing new in the journal, but nobody holds the trial any more: killed
    first = run(store)
    assert (first.info.status, first.data.tags["state"]) == ("KILLED", "interrupted")
    with life.folder.lock():
        life.start(resumed_from=5, world_size=1)
        life.train(5, 12)
        tracking.deliver(store, STUDY)
        resumed = run(store)
        assert (resumed.info.status, resumed.data.tags["attempt"], resumed.data.tags["world_size"]) == ("RUNNING", "2", "1")
        life.checkpoint(12)
        tracking.deliver(store, STUDY)
    with life.folder.lock():
        life.start(resumed_from=5)  # the checkpoint at 12 is damaged: settled steps are repeated
        life.train(5, 20)
        life.checkpoint(20)
        life.end(19)
    tracking.deliver(store, STUDY)
    assert points(store) == settled(life)
    assert rows(store, "SELECT key, step, count(*) FROM metrics GROUP BY key, step HAVING count(*) != 1") == []
    assert len(points(store)) == 40
    last = run(store)
    assert (last.info.run_id, last.info.status, last.data.tags["attempt"]) == (first.info.run_id, "FINISHED", "3")


def test_a_line_that_was_half_written_when_it_was_read_is_not_missed(store: Store) -> None:
    life = Life(store)
    life.start()
    life.train(0, 10)
    life.checkpoint(10)
    text = life.folder.journal.read_bytes()
    event = text.rindex(b'"event"') + 3  # in the middle of the very word
    life.folder.journal.write_bytes(text[:event])
    tracking.deliver(store, STUDY)
    assert points(store) == []
    life.folder.journal.write_bytes(text)
    tracking.deliver(store, STUDY)
    assert points(store) == settled(life) and len(points(store)) == 20


@pytest.mark.parametrize("state", ["failed", "diverged"])
def test_failed_and_diverged_are_failed_and_a_retry_doubles_nothing(store: Store, state: str) -> None:
    life = Life(store)
    life.start()
    life.train(0, 10)
    life.checkpoint(5)
    life.end(9, state, "RuntimeError: boom")
    tracking.deliver(store, STUDY)
    assert (run(store).info.status, run(store).data.tags["state"]) == ("FAILED", state) and len(points(store)) == 20
    life.start(resumed_from=5)
    life.train(5, 12)
    life.end(11)
    tracking.deliver(store, STUDY)
    assert points(store) == settled(life) and len(points(store)) == 24
    assert run(store).info.status == "FINISHED"


@pytest.mark.parametrize(("state", "status"), [("failed", "FAILED"), ("exhausted", "FAILED"), ("cancelled", "KILLED")])
def test_a_trial_that_is_given_up_has_a_run_that_says_so_also_before_any_start(store: Store, state: str, status: str) -> None:
    life = Life(store)
    assert close(life.folder, state, "no shards", attempt=0)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 0)
    assert (run(store).info.status, run(store).data.tags["state"]) == (status, state)
    assert tracking.missing(store, STUDY) == [] and tracking.undelivered(store, STUDY) == []
    first = run(store).info.run_id
    life.start()
    life.train(0, 5)
    assert close(life.folder, state, "no node")
    tracking.deliver(store, STUDY)
    assert (run(store).info.run_id, run(store).info.status, run(store).data.tags["attempt"]) == (first, status, "1")
    assert points(store) == settled(life) and len(points(store)) == 10


def artifact(store: Store, name: str) -> str | None:
    found = list((store.study(STUDY) / "artifacts").rglob(name))
    assert len(found) <= 1
    return found[0].read_text() if found else None


def snapshot(store: Store, code: str, diff: str) -> str:
    folder = store.study(STUDY) / "code" / code
    folder.mkdir(parents=True)
    (folder / "uncommitted.diff").write_text(diff)
    return code


def test_the_uncommitted_diff_of_the_code_that_runs_is_an_artifact(store: Store) -> None:
    life = Life(store)
    life.start(code=snapshot(store, "aaa", "+ lr = 1\n"))
    tracking.deliver(store, STUDY)
    assert artifact(store, "uncommitted.diff") == "+ lr = 1\n" and run(store).data.tags["code"] == "aaa"
    life.start(code=snapshot(store, "bbb", "+ lr = 2\n"))
    tracking.deliver(store, STUDY)
    assert artifact(store, "uncommitted.diff") == "+ lr = 2\n" and run(store).data.tags["code"] == "bbb"
    life.start(code=snapshot(store, "ccc", ""))  # as committed: the old diff would be wrong
    tracking.deliver(store, STUDY)
    assert artifact(store, "uncommitted.diff") == "" and run(store).data.tags["code"] == "ccc"
    assert artifact(store, "config.yaml") == life.folder.config.read_text()


def test_committed_code_has_no_diff_and_a_large_one_is_cut_off(store: Store) -> None:
    life = Life(store)
    life.start(code=snapshot(store, "aaa", ""))
    tracking.deliver(store, STUDY)
    assert artifact(store, "uncommitted.diff") is None
    life.start(code="gone")
    tracking.deliver(store, STUDY)
    life.start(code=snapshot(store, "bbb", "+ weights\n" * 200_000))
    tracking.deliver(store, STUDY)
    found = artifact(store, "uncommitted.diff")
    assert found is not None and found.startswith("+ weights\n" * 90_000) and len(found) < 1_000_100
    assert found.splitlines()[-1] == "[cut off: the first 1000000 of 2000000 bytes]"


def test_nan_and_inf(store: Store) -> None:
    life = Life(store)
    life.start()
    life.journal.write(0, metrics={"a": math.nan, "b": math.inf, "c": -math.inf, "d": 5e-324, "e": 0.1 + 0.2})
    life.end(0, "diverged")
    for _ in range(2):
        assert tracking.deliver(store, STUDY).failed == ()
        tracking._cursor_file(life.folder).unlink()
    assert rows(store, "SELECT key, value, is_nan FROM metrics ORDER BY key") == [
        ("a", 0.0, 1), ("b", sys.float_info.max, 0), ("c", -sys.float_info.max, 0), ("d", 5e-324, 0), ("e", 0.1 + 0.2, 0),
    ]  # fmt: skip
    assert math.isnan(run(store).data.metrics["a"])
    assert tracking.missing(store, STUDY) == []


# ------------------------------------------------------------------------------------------ again and again


def test_delivering_again_without_cursors_changes_nothing(store: Store) -> None:
    lives = [finished(store, seed) for seed in range(3)]
    assert tracking.deliver(store, STUDY) == tracking.Delivered(3, 120)
    for life in lives:
        tracking._cursor_file(life.folder).write_text("{ torn")
    before = rows(store, "SELECT * FROM metrics ORDER BY 1, 2, 3")
    assert tracking.deliver(store, STUDY) == tracking.Delivered(3, 120)
    assert rows(store, "SELECT * FROM metrics ORDER BY 1, 2, 3") == before
    assert len(rows(store, "SELECT run_uuid FROM runs")) == 3


def test_undelivered_is_what_the_next_pass_would_send(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.undelivered(store, STUDY) == []
    whole, life = finished(store), Life(store, seed=1)
    assert tracking.undelivered(store, STUDY) == [whole.id]  # the other has no journal
    with life.folder.lock():
        life.start()
        assert sorted(tracking.undelivered(store, STUDY)) == sorted([whole.id, life.id])
        assert tracking.undelivered(store, STUDY, [life.id]) == [life.id]
        tracking.deliver(store, STUDY)
        assert tracking.undelivered(store, STUDY) == []
        life.train(0, 5)  # nothing settled
        assert tracking.undelivered(store, STUDY) == []
        life.checkpoint(5)
        assert tracking.undelivered(store, STUDY) == [life.id]
        tracking.deliver(store, STUDY)
        assert tracking.undelivered(store, STUDY) == []
    assert tracking.undelivered(store, STUDY) == [life.id]  # killed: the run says RUNNING
    tracking.deliver(store, STUDY)
    assert tracking.undelivered(store, STUDY) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert sorted(tracking.undelivered(store, STUDY)) == sorted([whole.id, life.id])


def test_missing_compares_with_mlflow_itself_and_sync_repairs(store: Store) -> None:
    lives = [finished(store, seed) for seed in range(3)]
    assert [(m.trial_id, m.points, m.reason) for m in tracking.missing(store, STUDY)] == sorted((x.id, 40, "no run") for x in lives)
    tracking.deliver(store, STUDY)
    assert tracking.missing(store, STUDY) == []
    one, two, _ = lives
    with closing(sqlite3.connect(store.root / "mlflow.db")) as database:  # restored from an older copy, say
        database.execute("DELETE FROM metrics WHERE step >= 15 AND run_uuid = ?", [tracking.run_id(one.folder)])
        database.execute("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", [tracking.run_id(two.folder)])
        database.commit()
    wrong = {m.trial_id: (m.points, m.reason) for m in tracking.missing(store, STUDY)}
    assert wrong == {one.id: (10, "10 of 40 points"), two.id: (0, "the run says RUNNING, the trial FINISHED")}
    sent, left = tracking.sync(store, STUDY)
    assert left == [] and sent.failed == () and points(store) == settled(*lives)
    assert tracking.sync(store, STUDY) == (tracking.Delivered(0, 0), [])


def test_a_database_made_anew_under_the_same_address_gets_everything(store: Store, empty_database: Path) -> None:
    life = finished(store)
    tracking.deliver(store, STUDY)
    with closing(sqlite3.connect(empty_database)) as empty, closing(sqlite3.connect(store.root / "mlflow.db")) as database:
        empty.backup(database)
    assert points(store) == []
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 40)
    assert points(store) == settled(life)


def test_a_trial_run_anew_after_its_folder_was_deleted_replaces_its_run(store: Store) -> None:
    finished(store, steps=10)
    tracking.deliver(store, STUDY)
    old = run(store)
    shutil.rmtree(store.study(STUDY))
    life = finished(store, steps=5)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 10)
    assert run(store).info.run_id != old.info.run_id and run(store).info.start_time == life.record().first_timestamp
    assert rows(store, "SELECT lifecycle_stage FROM runs ORDER BY start_time") == [("deleted",), ("active",)]


def test_two_stores_never_mix_in_one_database(store: Store, tmp_path: Path) -> None:
    life = finished(store)
    tracking.deliver(store, STUDY)
    colleague = Store(tmp_path / "colleague")
    finished(colleague)
    sent = tracking.deliver(colleague, STUDY, tracking_uri=tracking.tracking_uri(store))
    assert sent.points == 0 and len(sent.failed) == 1 and "another journal" in sent.failed[0]
    assert points(store) == settled(life)


def test_one_bad_trial_keeps_no_other_from_delivery(store: Store) -> None:
    lives = [finished(store, seed) for seed in range(3)]
    bad = min(lives, key=lambda life: life.id)
    whole = bad.folder.config.read_text()
    bad.folder.config.write_text("seed: [")
    sent = tracking.deliver(store, STUDY)
    assert sent.trials == 2 and len(sent.failed) == 1 and sent.failed[0].startswith(f"{bad.id}: ")
    bad.folder.config.write_text(whole)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 40)
    assert points(store) == settled(*lives)


def test_a_database_that_is_none_is_one_line(store: Store) -> None:
    finished(store)
    (store.root / "bad.db").write_text("no database " * 1000)
    with pytest.raises(tracking.DeliveryError) as error:
        tracking.deliver(store, STUDY, tracking_uri=f"sqlite:///{store.root}/bad.db")
    assert "not a database" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ processes

DELIVER = "import sys; from pathlib import Path; from harness.store import Store; from harness import deliverer, tracking; "


def deliver_elsewhere(store: Store) -> subprocess.Popen[bytes]:
    code = DELIVER + "print(tracking.deliver(Store(Path(sys.argv[1])), sys.argv[2]).points)"
    return subprocess.Popen([sys.executable, "-c", code, str(store.root), STUDY], stdout=subprocess.PIPE)


def test_two_deliveries_at_once(store: Store) -> None:
    life = finished(store, steps=5000)
    other = deliver_elsewhere(store)
    eventually(lambda: rows(store, "SELECT count(*) FROM metrics")[0][0] > 0)
    ours = tracking.deliver(store, STUDY)
    assert (ours.points, int(other.communicate()[0])) == (0, 10_000)  # it waited, and found nothing left to do
    assert points(store) == settled(life)
    assert len(rows(store, "SELECT run_uuid FROM runs")) == 1


def test_only_some_trials(store: Store) -> None:
    one, other, third = (finished(store, seed) for seed in range(3))
    assert tracking.deliver(store, STUDY, [one.id, third.id, "no such trial"]) == tracking.Delivered(2, 80)
    assert points(store) == settled(one, third)
    with deliverer.start_delivery(store, STUDY, [other.id]):
        pass
    assert points(store) == settled(one, other, third)


def test_a_trial_that_somebody_else_delivers_holds_no_other_up(store: Store) -> None:
    one, other = (finished(store, seed) for seed in range(2))
    with open(one.folder.path / "delivery.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert tracking.deliver(store, STUDY, [other.id]) == tracking.Delivered(1, 40)
        assert tracking.deliver(store, STUDY, patience=0.2) == tracking.Delivered(0, 0)  # left to them
        assert points(store) == settled(other)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 40)
    assert points(store) == settled(one, other)


def test_many_deliveries_begin_at_once_on_a_store_without_a_database(store: Store) -> None:
    """One a trial, as jobs do, and one of the whole study, as `wrbench sync` does."""
    (store.root / "mlflow.db").unlink()
    lives = [finished(store, seed) for seed in range(3)]
    code = DELIVER + "print(tracking.deliver(Store(Path(sys.argv[1])), sys.argv[2], sys.argv[3:] or None).failed)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(store.root), STUDY, *trials], stdout=subprocess.PIPE, text=True)
        for trials in ([], *([life.id] for life in lives))
    ]
    assert [process.communicate()[0] for process in processes] == ["()\n"] * 4
    assert points(store) == settled(*lives)
    assert len(rows(store, "SELECT run_uuid FROM runs")) == 3
    assert [r[0] for r in rows(store, "SELECT name FROM experiments WHERE name != 'Default'")] == [STUDY]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_all_is_delivered(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    life = finished(store)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 40)
    assert points(store) == settled(life)


def test_of_two_runs_of_one_journal_one_goes(store: Store) -> None:
    """As two deliveries make that begin at the same moment where there are no locks; the other one finds its run gone."""
    life = finished(store)
    client = tracking._client(tracking.tracking_uri(store))
    experiment = client.create_experiment(STUDY, artifact_location=(store.study(STUDY) / "artifacts").as_uri())
    began = life.record().first_timestamp
    made = [client.create_run(experiment, start_time=began, tags={"trial_id": life.id}).info.run_id for _ in range(2)]
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 40)
    assert run(store).info.run_id == min(made)
    cursor = json.loads((life.folder.path / "delivered.json").read_text())
    (life.folder.path / "delivered.json").write_text(json.dumps(cursor | {"run_id": max(made), "points": 0, "bytes": 0}))
    assert len(tracking.deliver(store, STUDY).failed) == 1
    assert tracking.sync(store, STUDY)[1] == []
    assert run(store).info.run_id == min(made) == tracking.run_id(life.folder)
    assert points(store) == settled(life)


def test_killed_in_the_middle_then_again(store: Store) -> None:
    life = finished(store, steps=10_000)
    process = deliver_elsewhere(store)
    eventually(lambda: rows(store, "SELECT count(*) FROM metrics")[0][0] > 0)
    process.kill()
    process.wait()
    assert 0 < len(points(store)) < 20_000  # in the middle indeed
    assert tracking.missing(store, STUDY)[0].points == 20_000 - len(points(store))
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 20_000)
    assert points(store) == settled(life)
    assert rows(store, "SELECT key, step, count(*) FROM metrics GROUP BY key, step HAVING count(*) != 1") == []
    assert run(store).info.status == "FINISHED" and tracking.missing(store, STUDY) == []


def test_the_delivering_process_follows_a_trial_and_makes_a_final_pass(store: Store) -> None:
    life = Life(store)
    with deliverer.start_delivery(store, STUDY) as delivery, life.folder.lock():
        life.start()
        life.train(0, 10)
        life.checkpoint(10)
        pid = delivery.process.pid
        assert os.getsid(pid) == pid  # Ctrl-C in our terminal does not reach it
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19 and os.sched_getscheduler(pid) == os.SCHED_IDLE
        not_starved(pid)
        eventually(lambda: len(points(store)) == 20)
        life.train(10, 20)
        life.end(19)
    assert delivery.process.returncode == 0
    assert points(store) == settled(life) and len(points(store)) == 40
    assert not (store.study(STUDY) / "delivery.log").exists()


def test_told_to_end_before_it_is_up_it_delivers_all_the_same(store: Store) -> None:
    life = finished(store)
    delivery = deliverer.start_delivery(store, STUDY)
    delivery.stop()
    assert delivery.process.returncode == 0 and points(store) == settled(life)
    delivery.stop()  # harmless


def test_orphaned_it_makes_a_final_pass_and_ends(store: Store) -> None:
    life = finished(store)
    code = DELIVER + "p = deliverer.start_delivery(Store(Path(sys.argv[1])), sys.argv[2]).process; print(p.pid, flush=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code, str(store.root), STUDY], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    not_starved(pid)
    parent.kill()
    parent.wait()
    eventually(lambda: not alive(pid))
    assert points(store) == settled(life)


def not_starved(pid: int) -> None:
    """Beside other tests on all cores an idle-class process gets nowhere for minutes."""
    deliverer._schedule(pid, os.SCHED_OTHER, 0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), empty_database) as made:
        yield made


def test_a_server_that_was_down_gets_everything_once_it_is_up(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the password in its address goes nowhere."""
    assert server.process is None, "must be the first test of the server"
    uri = server.url.replace("://", "://ann:s3cret@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    lives = [finished(store, seed, steps=700) for seed in range(2)]
    with pytest.raises(tracking.DeliveryError) as error:
        tracking.sync(store, STUDY)
    assert "s3cret" not in str(error.value) and "\n" not in str(error.value) and f"***@127.0.0.1:{server.port}" in str(error.value)

    server.start()
    assert server.log.read_text().startswith(f"MLflow UI: {server.url}\n")
    sent, left = tracking.sync(store, STUDY)
    assert sent == tracking.Delivered(2, 2800) and left == []
    remote = Store(server.root)
    assert points(remote) == settled(*lives)
    assert tracking.sync(store, STUDY) == (tracking.Delivered(0, 0), [])
    for life in lives:
        tracking._cursor_file(life.folder).unlink()
    assert tracking.sync(store, STUDY) == (tracking.Delivered(2, 2800), [])
    assert points(remote) == settled(*lives)
    written = b"".join(path.read_bytes() for path in store.root.rglob("*") if path.is_file())
    assert b"s3cret" not in written and b"s3cret" not in (server.root / "mlflow.db").read_bytes()
    assert not (store.study(STUDY) / "artifacts").exists()  # a server has a place of its own for them
    address = f"{server.url}/get-artifact?path=config.yaml&run_uuid={tracking.run_id(lives[0].folder)}"
    assert urllib.request.urlopen(address).read() == lives[0].folder.config.read_bytes()


def test_the_addresses_of_studies_are_those_of_the_tracking_store_in_use(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without asking a server, and without the login."""
    server.start()
    finished(store, study="embedded-only")
    tracking.deliver(store, "embedded-only")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://ann:s3cret@"))
    finished(store, study="shown")
    tracking.deliver(store, "shown")
    experiment = tracking._client(server.url).get_experiment_by_name("shown").experiment_id
    tracking.open_ui(store, 1)
    shown = capfd.readouterr().out.splitlines()
    assert shown == [f"MLflow UI: {server.url.replace('://', '://***@')}", f"  shown: {ui.address(server.url, experiment)}"]


def test_nan_and_inf_through_a_server(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    life = Life(store, seed=77)
    life.start()
    life.journal.write(0, metrics={"nan": math.nan, "inf": math.inf, "-inf": -math.inf})
    life.end(0, "diverged")
    assert tracking.sync(store, STUDY)[1] == []
    stored = rows(Store(server.root), "SELECT key, value, is_nan FROM metrics WHERE key IN ('nan', 'inf', '-inf') ORDER BY key")
    assert stored == [("-inf", -sys.float_info.max, 0), ("inf", sys.float_info.max, 0), ("nan", 0.0, 1)]


def test_a_server_that_hangs_holds_nobody_up(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", "://ann:s3cret@"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    life = finished(store, seed=99)
    log = store.study(STUDY) / "delivery.log"
    server.signal(signal.SIGSTOP)
    try:
        with deliverer.start_delivery(store, STUDY) as delivery:
            not_starved(delivery.process.pid)
            eventually(lambda: log.exists() and "timed out" in log.read_text())
        assert delivery.process.returncode == 0
    finally:
        server.signal(signal.SIGCONT)
    assert "MLflow at http://***@127.0.0.1" in log.read_text() and "s3cret" not in log.read_text()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert tracking.sync(store, STUDY) == (tracking.Delivered(1, 40), [])
    assert [row for row in points(Store(server.root)) if row[0] == life.id] == settled(life)


@pytest.mark.parametrize("state", ["down", "hanging"])
def test_a_server_that_does_not_answer_holds_no_end_up(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """However long a request may take: the delivering process is in the middle of one when it is told to end."""
    server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    finished(store, seed=100)
    asked = threading.Event()

    def hang(request: BaseHTTPRequestHandler) -> Answer | None:
        asked.set()
        time.sleep(600)
        return None

    with Relay(server.url, hang) as relay:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url)
        delivery = deliverer.start_delivery(store, STUDY)
        not_starved(delivery.process.pid)
        assert asked.wait(300)
        if state == "hanging":
            delivery.stop()
    delivery.stop()
    assert delivery.process.returncode == 0, "it was killed after a minute"
    assert "does not answer: the rest is left to `wrbench sync`" in (store.study(STUDY) / "delivery.log").read_text()


def test_a_server_that_was_away_is_found_without_waiting_ever_longer(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What piles up while nobody looks would hold up the end."""
    server.start()
    life = finished(store, seed=102)
    asked: list[str] = []

    def away(request: BaseHTTPRequestHandler) -> Answer | None:
        asked.append(request.path)
        if asked.count("/health") < 3:
            raise ConnectionAbortedError
        return None

    with Relay(server.url, away) as relay:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url)
        with deliverer.start_delivery(store, STUDY) as delivery:
            not_starved(delivery.process.pid)
            eventually(lambda: [row for row in points(Store(server.root)) if row[0] == life.id] == settled(life))
    first = asked.index("/health")
    assert asked[first : first + 3] == ["/health"] * 3, "one failed pass, and then only looks"


def test_an_error_is_logged_once_and_when_it_is_over(server: Server, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    life = finished(store, seed=101)
    asked: list[str] = []

    def refuse(request: BaseHTTPRequestHandler) -> Answer | None:
        asked.append(request.path)
        return (403, {}, b"out of order") if len(asked) <= 3 else None

    with Relay(server.url, refuse) as relay:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url)
        ours = deliverer._Deliverer(store, STUDY, [life.id], None)
        for _ in range(5):
            ours._pass(last=False)
    log = (life.folder.logs / "delivery.log").read_text().splitlines()
    assert "out of order" in log[0] and log[1].endswith(" delivered") and len(log) == 2, log
    quiet = len(asked)
    ours._pass(last=False)
    assert len(asked) == quiet, "a server is asked only when there is something to deliver"


LOGINS = {
    "in the address": ({}, "ann:s3cret%2Fpass@"),
    "as password": ({"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "s3cret/pass"}, ""),
    "as token": ({"MLFLOW_TRACKING_TOKEN": "s3cret/pass"}, ""),
}


@pytest.mark.parametrize("login", LOGINS)
def test_what_a_server_repeats_of_a_login_goes_nowhere(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], login: str
) -> None:
    """Not to the delivery's log, an error, a tag, a file of the store or of the server, nor on the screen."""
    server.start()
    variables, user = LOGINS[login]
    for key, value in (variables | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}).items():
        monkeypatch.setenv(key, value)
    life = finished(store, seed=[*LOGINS].index(login), study="secrets")
    refused = "experiments"
    basic = base64.b64encode(b"ann:s3cret/pass").decode()
    seen: list[str] = []

    def repeat(request: BaseHTTPRequestHandler) -> Answer | None:
        if refused not in request.path:
            return None
        seen.append(request.headers["Authorization"])
        told = f"no entry for {request.headers['Authorization']} (s3cret/pass) at http://ann:s3cret/pass@127.0.0.1{request.path}"
        return 403, {"Content-Type": "application/json"}, json.dumps({"error_code": "PERMISSION_DENIED", "message": told}).encode()

    with Relay(server.url, repeat) as relay:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url.replace("://", f"://{user}"))
        with pytest.raises(tracking.DeliveryError, match="no entry for") as error:
            tracking.deliver(store, "secrets")
        assert not holds_secret(str(error.value), basic)
        assert seen[0] in (f"Basic {basic}", "Bearer s3cret/pass"), "the test is about something"
        with deliverer.start_delivery(store, "secrets") as delivery:
            not_starved(delivery.process.pid)
            log = store.study("secrets") / "delivery.log"
            eventually(lambda: log.exists() and "no entry for" in log.read_text())
        refused = "mlflow-artifacts"
        assert tracking.deliver(store, "secrets").failed == ()
        found = tracking._client(server.url).get_run(tracking.run_id(life.folder))
        assert "no entry for" in found.data.tags["config"] and not holds_secret(str(found), basic)
        refused = "log-batch"
        tracking._cursor_file(life.folder).unlink()
        (failure,) = tracking.deliver(store, "secrets").failed
        assert "no entry for" in failure and not holds_secret(failure, basic)
    files = [path for root in (store.root, server.root) for path in root.rglob("*") if path.is_file()]
    assert [path for path in files if holds_secret(path.read_bytes().decode(errors="replace"), basic)] == []
    assert capfd.readouterr() == ("", "")


def holds_secret(text: str, basic: str) -> bool:
    return any(secret in text for secret in ("s3cret/pass", "s3cret%2Fpass", basic))


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_files_are_the_users_own_umasks(store: Store, umask: int) -> None:
    (store.root / "mlflow.db").unlink()
    store.root.chmod(0o777 & ~umask)
    life = finished(store)
    before = set(store.root.rglob("*"))
    code = DELIVER + "import os; os.umask(int(sys.argv[3])); tracking.deliver(Store(Path(sys.argv[1])), sys.argv[2])"
    code += "; deliverer.start_delivery(Store(Path(sys.argv[1])), sys.argv[2]).stop(); deliverer._log(Path(sys.argv[1]) / 'log', '')"
    subprocess.run([sys.executable, "-c", code, str(store.root), STUDY, str(umask)], check=True)
    made = set(store.root.rglob("*")) - before
    assert {"mlflow.db", "delivered.json", "delivery.lock", "config.yaml", "log"} <= {path.name for path in made}
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in made if path.is_file() and path.stat().st_mode & 0o777 != 0o666 & ~umask
    } == {}
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in made if path.is_dir() and path.stat().st_mode & 0o777 != 0o777 & ~umask
    } == {}
    assert points(store) == settled(life)


def test_the_ui_shows_an_embedded_store_with_its_artifacts(server: Server) -> None:
    server.start()
    own = Store(server.root)
    life = finished(own, study="embedded")
    assert tracking.deliver(own, "embedded") == tracking.Delivered(1, 40)
    run_id = tracking.run_id(life.folder)
    shown = json.loads(urllib.request.urlopen(f"{server.url}/api/2.0/mlflow/runs/get?run_id={run_id}").read())["run"]
    assert shown["info"]["status"] == "FINISHED"
    artifact = urllib.request.urlopen(f"{server.url}/get-artifact?path=config.yaml&run_uuid={run_id}").read()
    assert artifact == life.folder.config.read_bytes()


def test_artifacts_that_cannot_be_stored_keep_no_metrics_away(store: Store) -> None:
    client = tracking._client(tracking.tracking_uri(store))
    client.create_experiment(STUDY, artifact_location="mlflow-artifacts:/1")  # wants a server, and there is none
    life = finished(store)
    assert tracking.deliver(store, STUDY) == tracking.Delivered(1, 40)
    assert points(store) == settled(life)
    assert run(store).data.tags["config"].startswith("config.yaml is not stored: ")


def test_a_port_in_use_is_bad_input(server: Server, store: Store) -> None:
    server.start()
    with pytest.raises(tracking.BadInput, match=f"--port {server.port}"):
        tracking.open_ui(store, server.port)


def test_told_to_end_the_ui_ends(server: Server) -> None:
    """The last test of the server."""
    server.start()
    assert server.process is not None
    server.process.terminate()
    assert server.process.wait() is not None
    eventually(lambda: socket.socket().connect_ex(("127.0.0.1", server.port)) != 0)
