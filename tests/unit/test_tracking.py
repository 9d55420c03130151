"""The parts of delivery that need no MLflow: addresses, secrets, a store's condition, params, the trial's lock."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from harness import deliverer, tracking
from harness.config import BadInput
from harness.store import Store, TrialFolder
from tests.trials import trial


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(tmp_path / "runs")


def test_importing_it_imports_neither_mlflow_nor_torch() -> None:
    code = "import harness.tracking, sys; sys.exit(bool({'mlflow', 'torch', 'pandas'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tracking_uri_is_the_store_unless_the_environment_says_otherwise(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri(store) == f"sqlite:///{store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.tracking_uri(store) == "http://127.0.0.1:5000"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("API request to http://ann:s3cret@host:5000/api failed", "API request to http://***@host:5000/api failed"),
        ("postgresql://ann:s3c@ret@host/db", "postgresql://***@host/db"),
        ("https://ann:s3/cret@host/db and http://b:s3cret@h", "https://***@host/db and http://***@h"),
        ("http://host:5000/x", "http://host:5000/x"),
        ("sqlite:////abs/mlflow.db", "sqlite:////abs/mlflow.db"),
    ],
)
def test_secrets_are_struck_out(text: str, safe: str) -> None:
    assert tracking.redacted(text) == safe


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"])
def test_what_the_environment_logs_in_with_is_struck_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "s3cret")
    assert tracking.redacted("no entry for s3cret here") == "no entry for *** here"


def test_a_password_is_struck_out_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:s3c%40ret@host/db")
    for form in ("s3c@ret", "s3c%40ret", base64.b64encode(b"ann:s3c@ret").decode()):
        assert tracking.redacted(f"access denied: {form}.") == "access denied: ***."


# ------------------------------------------------------------------------------------------------ a server's answer


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Accepts connections, as the kernel does for a server that hangs, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def address(of: socket.socket) -> str:
    return f"http://ann:s3cret@127.0.0.1:{of.getsockname()[1]}/"


def test_a_server_that_hangs_or_is_down_does_not_answer(listener: socket.socket) -> None:
    assert not deliverer._answers(address(listener), 0.2)
    listener.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert not deliverer._answers(f"http://127.0.0.1:{port}", 0.2)


def test_a_server_that_refuses_or_speaks_otherwise_answers(listener: socket.socket) -> None:
    def serve(reply: bytes) -> None:
        connection, _ = listener.accept()
        with connection:
            requests.append(connection.recv(10_000))
            connection.sendall(reply)

    requests: list[bytes] = []
    for scheme, reply, seen in (
        ("http", b"HTTP/1.0 401 Unauthorized\r\n\r\n", b"GET /health HTTP/1.1"),
        ("https", b"HTTP/1.0 200 OK\r\n\r\n", b"\x16\x03"),  # not TLS
    ):
        thread = threading.Thread(target=serve, args=(reply,))
        thread.start()
        assert deliverer._answers(address(listener).replace("http", scheme), 20), scheme
        thread.join()
        assert requests[-1].startswith(seen) and b"s3cret" not in requests[-1]


def test_what_is_no_server_is_not_asked() -> None:
    assert deliverer._answers("sqlite:////nowhere/mlflow.db", 0.1)


# ------------------------------------------------------------------------------------------------ check_store


def one_line(error: pytest.ExceptionInfo[BadInput]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_fresh_store_is_fine_and_stays_without_a_database(store: Store) -> None:
    tracking.check_store(store)
    assert not (store.root / "mlflow.db").exists()


def test_a_database_of_mlflow_is_fine_also_while_somebody_writes(store: Store) -> None:
    store.root.mkdir()
    database = sqlite3.connect(store.root / "mlflow.db", isolation_level=None)
    database.execute("CREATE TABLE alembic_version (version_num TEXT)")
    tracking.check_store(store)
    database.execute("BEGIN EXCLUSIVE")
    tracking.check_store(store)
    database.close()


def test_a_file_that_is_no_database_is_bad_input(store: Store) -> None:
    store.root.mkdir()
    (store.root / "mlflow.db").write_text("not a database " * 1000)
    with pytest.raises(BadInput) as error:
        tracking.check_store(store)
    assert "mlflow.db" in one_line(error) and "not a database" in one_line(error)


def test_another_programs_database_is_bad_input_and_untouched(store: Store) -> None:
    store.root.mkdir()
    database = sqlite3.connect(store.root / "mlflow.db")
    database.execute("CREATE TABLE recipes (name TEXT)")
    database.commit()
    before = (store.root / "mlflow.db").read_bytes()
    with pytest.raises(BadInput, match="not MLflow's"):
        tracking.check_store(store)
    assert (store.root / "mlflow.db").read_bytes() == before


def test_a_folder_in_the_databases_place_is_bad_input(store: Store) -> None:
    (store.root / "mlflow.db").mkdir(parents=True)
    with pytest.raises(BadInput) as error:
        tracking.check_store(store)
    assert "mlflow.db" in one_line(error)


def test_a_store_that_cannot_be_made_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput) as error:
        tracking.check_store(Store(tmp_path / "file" / "runs"))
    assert "not writable" in one_line(error)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_a_folder_as_tracking_store_is_bad_input(store: Store, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(BadInput) as error:
        tracking.check_store(store)
    assert "MLFLOW_TRACKING_URI" in one_line(error)


@pytest.mark.parametrize("uri", ["foo://bar", "htp+x://ann:s3cret@here:5000"])
def test_a_scheme_that_mlflow_does_not_know_is_bad_input(store: Store, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(BadInput, match=r"^MLFLOW_TRACKING_URI: .* does not know; it knows: .*http, .*postgresql") as error:
        tracking.check_store(store)
    assert "s3cret" not in one_line(error)
    assert not store.root.exists()


@pytest.mark.parametrize("uri", ["postgresql+psycopg2://ann@nowhere/db", "mysql://nowhere/db", "databricks://profile"])
def test_a_scheme_that_mlflow_knows_is_fine(store: Store, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracking.check_store(store)


@pytest.mark.parametrize("name", ["a?b", "a%20b"])
def test_a_path_that_mlflow_reads_as_an_address_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = Store(tmp_path / name / "runs")
    with pytest.raises(BadInput) as error:
        tracking.check_store(store)
    assert one_line(error).startswith(f"--store {store.root}: MLflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracking.check_store(store)


@pytest.mark.parametrize("name", ["my rüns", "a#b", "100%", "a+b"])
def test_another_path_is_not(tmp_path: Path, name: str) -> None:
    tracking.check_store(Store(tmp_path / name / "runs"))


def test_the_ui_of_a_store_that_is_not_there_makes_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: None)  # would become the server
    with pytest.raises(BadInput, match="there is no store"):
        tracking.open_ui(store, 5000)
    assert not store.root.exists()


def test_a_server_is_not_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracking.check_store(store)


# -------------------------------------------------------------------------------------------------- the rest


def test_params_are_what_defines_the_result() -> None:
    found = tracking.params(trial(backend={"zero_stage": 1}, study="s", arm="AdamWR", seed=7))
    assert found["optimizer.lr"] == "0.001" and found["optimizer.betas"] == "[0.9, 0.999]" and found["optimizer.name"] == "adam"
    assert found["decay.normalised"] == "true" and found["workload.data.name"] == "mnist5k" and found["budget.epochs"] == "7.0"
    assert found["seed"] == "7" and found["workload.recipe.precision"] == "fp32"
    groups = {key.partition(".")[0] for key in found}
    assert groups == {"workload", "optimizer", "decay", "schedule", "budget", "seed"}
    assert "workload.data.path" not in found
    assert found == tracking.params(trial(backend={"zero_stage": 0}, study="other", arm="A", seed=7, data={"path": "/elsewhere"}))


def test_run_id_is_known_from_the_folder_alone(store: Store) -> None:
    folder = store.trial("s", "abc")
    assert tracking.run_id(folder) is None
    folder.path.mkdir(parents=True)
    cursor = {"to": "here", "run_id": "r1", "points": 1, "bytes": 2, "running": False, "code": None}
    (folder.path / "delivered.json").write_text(json.dumps(cursor))
    assert tracking.run_id(folder) == "r1"
    (folder.path / "delivered.json").write_text("{")
    assert tracking.run_id(folder) is None


def test_a_study_without_journals_needs_no_mlflow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking.deliver(store, "s") == tracking.Delivered(0, 0)
    assert tracking.missing(store, "s") == []


def _ask(path: Path, enough: Event) -> None:
    while not enough.is_set():
        TrialFolder(path).is_running()


def test_asking_whether_a_trial_runs_never_keeps_it_from_starting(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "t")
    assert not folder.is_running()
    context = multiprocessing.get_context("fork")
    enough = context.Event()
    askers = [context.Process(target=_ask, args=(folder.path, enough)) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(3000):
            with folder.lock():  # raises when somebody is found to hold it
                pass
    finally:
        enough.set()
        for asker in askers:
            asker.join()
    with folder.lock():
        assert folder.is_running()
        with pytest.raises(BadInput, match="running already"), folder.lock():
            pass
        assert folder.is_running()  # the second, refused, has not let go of it
    assert not folder.is_running()


def test_what_another_process_is_making_of_the_database_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: on a busy machine minutes."""
    monkeypatch.setattr(tracking, "MAKING", 0.2)
    store = Store(tmp_path)
    half = tmp_path / ".mlflow.db.others"
    half.mkdir()
    (half / "mlflow.db").write_text("half of the tables")
    with tracking.held_alone(tmp_path / ".mlflow.db.lock", 0) as alone:
        assert alone
        with pytest.raises(tracking.DeliveryError, match=r"another process has been making the tables for 0\.2 s"):
            tracking.open_experiment(store, "mine", None)
    assert (half / "mlflow.db").read_text() == "half of the tables"
    assert not (tmp_path / "mlflow.db").exists()
