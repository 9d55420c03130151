"""The report as a run of its study in a real MLflow, which nobody takes for a trial."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from analysis import runs
from analysis.report import PICTURES
from harness import study, tracking
from harness.publish import NOTE_LIMIT, publish
from harness.store import Store
from harness.tracking import DeliveryError
from launch import __main__ as command
from launch import status
from tests import mlflow_server, synthetic
from tests.mlflow_server import Answer, Relay, Server

NAME = "synthetic"
FILES = {"report.html": "<p>one</p>", "table.md": "# one\n\nwords\n", "summary.json": "{}"}


@pytest.fixture
def store(synthetic_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy to change, with a report whose contents do not matter here."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(shutil.copytree(synthetic_store, tmp_path / "runs"))
    with closing(sqlite3.connect(store.root / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ? WHERE name = ?", [(store.study(NAME) / "artifacts").as_uri(), NAME])
    write(store, FILES)
    return store


def write(store: Store, files: dict[str, str]) -> None:
    folder = store.study(NAME) / "report"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def reports(uri: str) -> list[Any]:
    client = tracking._client(uri)
    return list(client.search_runs([client.get_experiment_by_name(NAME).experiment_id], "tags.kind = 'report'"))


def artifacts(uri: str, run: Any, folder: Path) -> dict[str, str]:
    tracking._client(uri).download_artifacts(run.info.run_id, "", str(folder))
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_report_is_one_run_that_follows_it(store: Store, tmp_path: Path) -> None:
    uri = tracking.tracking_uri(store)
    (store.study(NAME) / "report" / ".table.md.x1").write_text("half a file that is being written")
    assert publish(store, NAME)
    (run,) = reports(uri)
    assert (run.info.run_name, run.info.status) == ("report", "FINISHED")
    assert run.data.tags["mlflow.note.content"] == FILES["table.md"]
    (tmp_path / "one").mkdir()
    assert artifacts(uri, run, tmp_path / "one") == FILES

    assert not publish(store, NAME)
    assert reports(uri)[0].data.tags == run.data.tags
    more = {"report.html": "<p>two</p>", "table.md": "# two\n\n" + "a paragraph of some length\n\n" * 1000}
    write(store, more)
    assert publish(store, NAME)
    (again,) = reports(uri)
    assert again.info.run_id == run.info.run_id
    (tmp_path / "two").mkdir()
    assert artifacts(uri, again, tmp_path / "two") == FILES | more
    note = again.data.tags["mlflow.note.content"]
    assert len(note) <= NOTE_LIMIT and note.startswith("# two\n\na paragraph") and note.endswith("length\n\n(the rest is in table.md)")


def test_a_picture_that_the_report_has_no_more_goes_and_a_users_file_stays(store: Store, tmp_path: Path) -> None:
    uri, folder = tracking.tracking_uri(store), store.study(NAME) / "report"
    write(store, {"gap.png": "old", "mine.png": "a user's"})
    assert publish(store, NAME, PICTURES)
    tracking._client(uri).log_text(reports(uri)[0].info.run_id, "a user's", "note.txt")
    (folder / "gap.png").unlink()
    (folder / "mine.png").unlink()
    assert publish(store, NAME, PICTURES)
    (tmp_path / "now").mkdir()
    assert artifacts(uri, reports(uri)[0], tmp_path / "now") == FILES | {"mine.png": "a user's", "note.txt": "a user's"}


def test_a_database_that_takes_no_write_is_told_in_one_line(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    """As one that is locked, but at once: MLflow waits twenty seconds for a lock, and then prints ninety lines."""
    assert publish(store, NAME)
    write(store, {"report.html": "<p>two</p>"})
    with closing(sqlite3.connect(store.root / "mlflow.db")) as database, database:
        database.execute("CREATE TRIGGER refused BEFORE UPDATE ON tags BEGIN INSERT INTO nowhere VALUES (1); END")
    capfd.readouterr()
    with pytest.raises(DeliveryError) as told:
        publish(store, NAME)
    assert str(told.value) == "MLflow: (sqlite3.OperationalError) no such table: main.nowhere"
    assert capfd.readouterr() == ("", "")


def test_nobody_takes_it_for_a_trial(store: Store) -> None:
    tracking.deliver(store, NAME)  # the copy knows of no delivery
    before = runs.trials(NAME, store.root), runs.history(NAME, store.root), runs.check(NAME, store.root)
    loaded = study.load(store.study(NAME) / "study.yaml")
    rows = status.rows(loaded, store)
    assert publish(store, NAME)
    for table, then in zip((runs.trials, runs.history, runs.check), before, strict=True):
        assert table(NAME, store.root).equals(then)
    assert status.rows(loaded, store) == rows
    assert tracking.undelivered(store, NAME) == [] and tracking.missing(store, NAME) == []
    assert tracking.sync(store, NAME) == (tracking.Delivered(0, 0), [])


def test_a_study_that_never_began_stays_unknown_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(tmp_path)
    synthetic.write_study(store, synthetic.STUDY)
    write(store, FILES)
    assert not publish(store, NAME)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_report_says_what_it_lacks_and_of_nothing_there_is_none(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def wrbench(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wrbench", *arguments])
        capfd.readouterr()
        return command.run(command.app), *capfd.readouterr()

    file = str(store.study(NAME) / "study.yaml")
    before = {path: path.read_bytes() for path in (store.study(NAME) / "report").iterdir()}
    for asked in (["report", file], ["sync", file], ["study", "cancel", file]):
        code, out, err = wrbench(*asked, "--store", str(tmp_path / "typo"))
        assert (code, out, err) == (2, "", f"error: --store {tmp_path / 'typo'}: there is no store; e.g. --store ./runs\n")
        code, out, err = wrbench(*asked, "--set", "name=another", "--store", str(store.root))
        assert (code, out) == (2, "") and "there are no trials of another, but of: synthetic" in err and err.count("\n") == 1
    assert not (tmp_path / "typo").exists() and not store.study("another").exists()
    assert {path: path.read_bytes() for path in (store.study(NAME) / "report").iterdir()} == before

    code, _, err = wrbench("report", file, "--set", "budget.epochs=3", "--store", str(store.root))
    assert code == 0 and err.splitlines() == [
        "warning: 17 more trial(s) in the store are not in this plan: the file has changed, or other --set were given",
        "warning: 18 of 18 trial(s) without a result yet",
    ]


def test_a_server_that_takes_no_artifacts_costs_a_line_and_gets_them_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`wrbench report`: the files are there, the status is 0, and the next report sends them."""
    (tmp_path / "server").mkdir()
    (tmp_path / "empty").mkdir()
    store = Store(tmp_path / "runs")
    one_arm = {"arms": {"AdamWR": synthetic.STUDY["arms"]["AdamWR"]}, "search": {"points": 1, "seeds": 1}, "finalists": None}
    (planned,) = study.planned(synthetic.write_study(store, synthetic.STUDY | one_arm), {})
    assert planned.trial is not None
    synthetic.write_trial(store, planned.trial)
    closed = True

    def refuse(request: BaseHTTPRequestHandler) -> Answer | None:
        return (403, {}, b"read only") if closed and request.command == "PUT" and "report.html" in request.path else None

    monkeypatch.setattr(sys, "argv", ["wrbench", "report", str(store.study(NAME) / "study.yaml"), "--store", str(store.root)])
    with Server(tmp_path / "server", mlflow_server.empty_database(tmp_path / "empty")) as server:
        server.start()
        with Relay(server.url, refuse) as relay:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", relay.url)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            capfd.readouterr()  # what the server's making said
            assert command.run(command.app) == 0
            out, err = capfd.readouterr()
            page = store.study(NAME) / "report" / "report.html"
            assert out == f"{page}\n" and page.stat().st_size > 100_000
            assert err.startswith("warning: the report is not in MLflow: ") and len(err.splitlines()) == 1
            closed = False
            assert command.run(command.app) == 0
            assert capfd.readouterr() == (f"{page}\n", "")
            assert not publish(store, NAME)
            (run,) = reports(relay.url)
            assert {item.path for item in tracking._client(relay.url).list_artifacts(run.info.run_id)} >= {"report.html", "table.csv"}
