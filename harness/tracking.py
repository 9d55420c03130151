"""The journals of a study, delivered to MLflow: by a process of its own, `harness.deliverer`, or at once by `sync`.

Training never talks to MLflow: it appends to its journal. `deliver` makes MLflow say what the settled part of each
journal says, with the journal's timestamps; MLflow keeps one row a (run, metric, step, timestamp, value), so whatever is
sent again changes nothing, and a crash at any point costs only time. `delivered.json` in a trial's folder remembers what
was sent where; it saves work, and may be deleted at any time. A lock a trial keeps two deliveries of it apart; those of
different trials, of hundreds of jobs, never wait for each other.

NaN arrives as NaN. MLflow keeps inf and -inf as +-1.7976931348623157e308, the largest float.

MLflow is imported inside functions (it costs two seconds), torch never.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from harness import journal, ui
from harness.config import BadInput, Trial, dotted
from harness.journal import Point, Record
from harness.store import Store, TrialFolder, write_atomically

BATCH = 1000
"""metrics MLflow takes in one request"""

STATUS = {
    "pending": "SCHEDULED", "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "diverged": "FAILED", "exhausted": "FAILED",
    "interrupted": "KILLED", "cancelled": "KILLED",
}  # fmt: skip
"""state of a trial -> status of its MLflow run"""

ATTEMPT_TAGS = (
    "attempt", "world_size", "micro_batch_size", "backend", "zero_stage", "offload_optimizer", "channels_last", "compile",
    "deterministic", "device", "gpu", "cuda", "cudnn", "nccl", "host", "platform", "python", "torch", "deepspeed", "commit", "code",
    "data_sha256", "job_id",
)  # fmt: skip
"""what may differ between attempts: tags, as the newest attempt's start line has them"""

PATIENCE = 30.0
"""seconds that `deliver` waits in all for trials that somebody else is delivering this moment"""

MAKING = 300.0
"""seconds that a process waits for another one that makes the database's tables: ten of CPU, on a busy machine minutes"""

DIFF_LIMIT = 1_000_000
"""bytes of an uncommitted diff that are kept with a run"""


class DeliveryError(RuntimeError):
    """MLflow cannot be reached or refuses; one line, without secrets."""


# ------------------------------------------------------------------------------------------ the tracking store


def tracking_uri(store: Store) -> str:
    """MLFLOW_TRACKING_URI, or the store's own SQLite database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_uri(store)


def is_own(store: Store) -> bool:
    """Whether MLflow's records are in the store itself."""
    return tracking_uri(store) == _own_uri(store)


def _own_uri(store: Store) -> str:
    return f"sqlite:///{store.root / 'mlflow.db'}"


def _scheme(uri: str) -> str:
    return uri.partition("://")[0] if "://" in uri else ""


def is_server(uri: str) -> bool:
    """Whether a tracking URI is of an MLflow server, not of a database."""
    return _scheme(uri) in ("http", "https")


def redacted(text: str) -> str:
    """`text` with user:password in URIs struck out, and the tracking token and password of the environment wherever they stand."""
    text = re.sub(r"://\S*@", "://***@", text)
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets() -> set[str]:
    """What the environment has to log in with, in the forms in which a server may repeat it."""
    found = {os.environ.get("MLFLOW_TRACKING_TOKEN"), os.environ.get("MLFLOW_TRACKING_PASSWORD")}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    found.add(_basic(user, os.environ.get("MLFLOW_TRACKING_PASSWORD")))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    login = uri.partition("://")[2].rpartition("@")[0]
    if login:
        user, _, password = (urllib.parse.unquote(part) for part in login.partition(":"))
        found |= {password, login.partition(":")[2], _basic(user, password)}
    return {secret for secret in found if secret}


def _basic(user: str, password: str | None) -> str | None:
    """As HTTP's header has them."""
    return base64.b64encode(f"{user}:{password}".encode()).decode() if password else None


def check_store(store: Store) -> None:
    """BadInput unless the tracking store can be written, as far as that is known without importing MLflow or a network."""
    uri = tracking_uri(store)
    if _scheme(uri) in ("", "file"):
        raise BadInput(
            f"MLFLOW_TRACKING_URI: {uri.rpartition('@')[2]!r} is not a server or a database; e.g. http://127.0.0.1:5000 or sqlite:////abs/mlflow.db"
        )
    if (scheme := _scheme(uri).partition("+")[0]) not in (known := _known_schemes()):
        raise BadInput(
            f"MLFLOW_TRACKING_URI: {redacted(uri)!r} has scheme {scheme!r}, which MLflow does not know; it knows: {', '.join(known)}"
        )
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if is_own(store) and ("?" in uri or urllib.parse.unquote(uri) != uri):
        raise BadInput(f"--store {store.root}: MLflow takes ? and % in a database's path for parts of an address; another --store")
    if not path.exists():
        Store(path.parent).check_writable()
        return
    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=0, isolation_level=None)
        try:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.execute("BEGIN IMMEDIATE")
        finally:
            database.close()
    except sqlite3.Error as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return  # somebody writes to it this moment
        raise BadInput(f"{path}: not a tracking store that can be written ({error}); move it away, or use another --store") from None
    if tables and "alembic_version" not in tables:
        raise BadInput(f"{path}: a database, but not MLflow's; move it away, or use another --store")


def _known_schemes() -> list[str]:
    """MLflow's own, and those of its plugins that are installed."""
    plugins = (plugin.name for plugin in entry_points(group="mlflow.tracking_store"))
    return sorted({"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc", *plugins} - {"file"})


def open_ui(store: Store, port: int) -> None:
    """Prints the addresses of MLflow's UI and of the studies in it; for a store in a database, becomes that UI until it is told to end."""
    uri = tracking_uri(store)
    if is_server(uri):
        print(f"MLflow UI: {redacted(uri)}")
        _print_studies(store, re.sub(r"://\S*@", "://", uri))
        return
    if is_own(store) and not (store.root / "mlflow.db").exists() and not any(store.root.glob("*/trials/*")):
        raise BadInput(f"--store {store.root}: there is no store here that has trials; e.g. --store ./runs")
    check_store(store)
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        raise BadInput(f"--port {port}: {error.strerror}; e.g. --port {port + 1}") from None
    print(f"MLflow UI: http://127.0.0.1:{port}")
    _print_studies(store, f"http://127.0.0.1:{port}")
    # by the environment, since a database's password would show among the arguments
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **_QUIET}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execve(sys.executable, command, environment)  # noqa: S606


def _print_studies(store: Store, server: str) -> None:
    """A line for each study that was delivered to the tracking store in use, as the store's own files tell."""
    delivered_to = f"{redacted(tracking_uri(store))} "
    for study in sorted(path.parent.name for path in store.root.glob("*/trials")):
        cursors = filter(None, map(_last_cursor, store.trials(study)))
        identity = next((cursor["to"] for cursor in cursors if cursor["to"].startswith(delivered_to)), None)
        if identity is not None:
            print(f"  {study}: {ui.address(server, identity.split()[-2])}")
    sys.stdout.flush()


_QUIET = {"MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
_BOUNDED = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def _without_traceback(record: logging.LogRecord) -> bool:
    """MLflow prints that of a database's error, as of one that is locked, and raises it too: whoever catches it says it in a line."""
    return not record.exc_info


def _client(uri: str) -> Any:
    """An MlflowClient that neither chatters nor waits for minutes on a server that is down; the environment may say otherwise."""
    for key, value in (_QUIET | _BOUNDED).items():
        os.environ.setdefault(key, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line each retry
    logging.getLogger("mlflow.store.db.utils").addFilter(_without_traceback)
    from mlflow import MlflowClient

    return MlflowClient(uri)


# ------------------------------------------------------------------------------------------ one delivering pass


@dataclass(frozen=True)
class Delivered:
    """What one pass sent."""

    trials: int
    """trials that had something new"""
    points: int
    """metric points sent"""
    failed: tuple[str, ...] = ()
    """one line a trial that could not be delivered"""


@dataclass(frozen=True)
class Experiment:
    """Where a study is delivered to."""

    client: Any
    id: str
    identity: str
    """names this experiment of this database: a database made anew under the same address has another one"""
    own: bool
    """in the store's own database, which only this store's journals are delivered to"""


def deliver(
    store: Store, study: str, trials: Collection[str] | None = None, tracking_uri: str | None = None, patience: float = PATIENCE
) -> Delivered:
    """One pass: every trial's run says what the settled part of its journal says. trials: only those with these ids.

    May be called at any time, by several processes at once, and again after a crash. A trial that another process is
    delivering is waited for, `patience` seconds in all, and then left to it. Raises DeliveryError when MLflow cannot be
    reached; a trial that alone cannot be delivered is named in `failed` and tried again by the next pass.
    """
    folders = _folders(store, study, trials)
    if not folders:
        return Delivered(0, 0)
    counts: list[int | None] = []
    failed: list[str] = []
    until = time.monotonic() + patience
    experiment = open_experiment(store, study, tracking_uri)
    for folder in folders:
        try:
            with held_alone(folder.path / "delivery.lock", until) as alone:
                if alone:
                    counts.append(_deliver_trial(experiment, folder))
        except Exception as error:
            _cursor_file(folder).unlink(missing_ok=True)  # whatever was wrong, begin with what MLflow itself has
            failed.append(f"{folder.path.name}: {one_line(error)}")
            experiment = open_experiment(store, study, tracking_uri)  # raises when it is MLflow that is gone
    sent = [n for n in counts if n is not None]
    return Delivered(len(sent), sum(sent), tuple(failed))


def _folders(store: Store, study: str, trials: Collection[str] | None = None) -> list[TrialFolder]:
    """Of the trials that have a journal."""
    folders = store.trials(study) if trials is None else [store.trial(study, trial_id) for trial_id in sorted(trials)]
    return [folder for folder in folders if folder.journal.exists()]


@contextmanager
def held_alone(path: Path, until: float) -> Iterator[bool]:
    """Whether this process alone holds the lock: False if another one still does so at the time `until`.

    Also True where there are no locks: two deliveries then send the same points, and `_find_run` deletes the surplus run.
    """
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= until:
                    yield False
                    return
                time.sleep(0.05)
                continue
            except OSError:  # no locks here
                pass
            yield True
            return


def one_line(error: BaseException) -> str:
    """What the error says, without the statement and its values that SQLAlchemy adds."""
    return " ".join(redacted(str(error).partition("\n[SQL: ")[0] or type(error).__name__).split())[:600]


def open_experiment(store: Store, study: str, uri: str | None = None) -> Experiment:
    """The study's experiment, made once, with what MLflow's UI shows of it. Raises DeliveryError."""
    uri = uri or tracking_uri(store)
    # a server knows where its artifacts belong; a bare database does not
    artifacts = None if is_server(uri) else (store.study(study) / "artifacts").as_uri()
    try:
        with _database_made_once(uri):
            client = _client(uri)
            found = client.get_experiment_by_name(study) or _made(client, study, artifacts)
    except Exception as error:  # MLflow's, SQLAlchemy's, requests': whatever it is, nothing can be delivered now
        raise DeliveryError(f"MLflow at {redacted(uri)}: {one_line(error)}") from None
    if found.lifecycle_stage != "active":
        raise DeliveryError(f"MLflow at {redacted(uri)}: experiment {study} is deleted; `mlflow experiments restore` brings it back")
    with suppress(Exception):  # cosmetic: where nobody may change an experiment, runs can still be delivered
        for key, value in ui.experiment_tags(found.creation_time).items():
            if key not in found.tags:  # a description that somebody wrote, a view that somebody changed stay
                client.set_experiment_tag(found.experiment_id, key, value)
    identity = f"{redacted(uri)} {found.experiment_id} {found.creation_time}"
    return Experiment(client, found.experiment_id, identity, own=uri == _own_uri(store))


@contextmanager
def _database_made_once(uri: str) -> Iterator[None]:
    """Of several processes one makes the tables of a new SQLite database: MLflow lets them all try, and all but one fail.

    They are made in a file that then takes the database's name: a process killed in between would leave half of them, which
    nobody could complete ("table secrets already exists").
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    with held_alone(path.with_name(f".{path.name}.lock"), time.monotonic() + MAKING) as alone:
        if not path.exists():
            if not alone:  # what it has made so far is not to be touched
                raise TimeoutError(f"another process has been making the tables for {MAKING:g} s")
            for unfinished in path.parent.glob(f".{path.name}.*/"):
                shutil.rmtree(unfinished, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
                new = Path(folder) / path.name
                _client(f"sqlite:///{new}").search_experiments()
                with suppress(FileExistsError):  # where there are no locks, somebody else's
                    path.hardlink_to(new)
        yield


def _made(client: Any, study: str, artifacts: str | None) -> Any:
    try:
        client.create_experiment(study, artifact_location=artifacts)
    except Exception:
        found = client.get_experiment_by_name(study)  # made this moment by another store's delivery to the same server
        if found is None:
            raise
        return found
    return client.get_experiment_by_name(study)


def _deliver_trial(to: Experiment, folder: TrialFolder) -> int | None:
    """The points sent; None when nothing was new."""
    cursor = _cursor(folder, to)
    running = folder.is_running()  # before the journal is read: see Record.state
    if cursor and cursor["running"] == running and not _event_after(folder.journal, cursor["bytes"]):
        return None
    whole = folder.journal.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    record = journal.fold(journal.lines(whole))
    if record.first_timestamp is None:
        return None
    run_id = cursor["run_id"] if cursor else _run_of(to, folder, record)
    new = record.settled[cursor["points"] if cursor else 0 :]
    _log_metrics(to.client, run_id, new)
    code = record.starts[-1].get("code") if record.starts else None
    _log_diff(to.client, run_id, folder, code, cursor["code"] if cursor else None)
    _log_state(to.client, run_id, record, record.state(running))
    cursor = {
        "to": to.identity, "run_id": run_id, "points": len(record.settled), "bytes": len(whole), "running": running, "code": code,
    }  # fmt: skip
    write_atomically(_cursor_file(folder), json.dumps(cursor) + "\n")
    return len(new)


def _cursor_file(folder: TrialFolder) -> Path:
    return folder.path / "delivered.json"


def _cursor(folder: TrialFolder, to: Experiment) -> dict[str, Any] | None:
    """What was delivered to this experiment."""
    cursor = _last_cursor(folder)
    return cursor if cursor and cursor["to"] == to.identity else None


def _last_cursor(folder: TrialFolder) -> dict[str, Any] | None:
    """What was delivered, and where `to`: run_id, points settled then, bytes of the journal read, running, code of the newest attempt."""
    try:
        cursor: dict[str, Any] = json.loads(_cursor_file(folder).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return cursor if {"to", "run_id", "points", "bytes", "running", "code"} <= cursor.keys() else None


def run_id(folder: TrialFolder) -> str | None:
    """The MLflow run that the trial was last delivered to, from its folder alone; None before the first delivery."""
    cursor = _last_cursor(folder)
    return str(cursor["run_id"]) if cursor else None


def undelivered(store: Store, study: str, trials: Collection[str] | None = None) -> list[str]:
    """The ids of trials of which MLflow lacks something, as far as files tell: no network, no import of MLflow."""
    address = f"{redacted(tracking_uri(store))} "
    return [folder.path.name for folder in _folders(store, study, trials) if _has_more(folder, address)]


def _has_more(folder: TrialFolder, address: str) -> bool:
    cursor = _last_cursor(folder)
    if cursor is None:
        return any(True for _ in journal.read(folder.journal))
    if not cursor["to"].startswith(address):
        return True
    return cursor["running"] != folder.is_running() or _event_after(folder.journal, cursor["bytes"])


def _event_after(path: Path, offset: int) -> bool:
    """Whether the journal holds an event, the only thing that settles points, after its first `offset` bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        return b'"event"' in file.read()


def _find_run(to: Experiment, trial_id: str, record: Record) -> tuple[Any, list[Any]]:
    """(the trial's run or None, runs of this trial that another journal began).

    Two runs of one journal can only come of a file system without locks; the first by run_id counts, and the other is deleted.
    """
    found = to.client.search_runs([to.id], f"tags.trial_id = '{trial_id}'", max_results=1000)
    ours = sorted((run for run in found if run.info.start_time == record.first_timestamp), key=lambda run: run.info.run_id)
    for double in ours[1:]:
        with suppress(Exception):  # deleted this moment by whoever made the other
            to.client.delete_run(double.info.run_id)
    return (ours[0] if ours else None), [run for run in found if run.info.start_time != record.first_timestamp]


def _run_of(to: Experiment, folder: TrialFolder, record: Record) -> str:
    """The id of the trial's run, made unless it is there, complete but for metrics and state."""
    trial = folder.read_config()
    run, foreign = _find_run(to, trial.trial_id, record)
    if foreign and not to.own:
        raise DeliveryError(
            f"run {foreign[0].info.run_id} was delivered from another journal of the same trial: "
            "give the study another name, or delete that run"
        )
    for old in foreign:  # its folder is gone and the trial ran anew; MLflow can bring the old run back
        to.client.delete_run(old.info.run_id)
    if run is None:
        tags = {key: str(getattr(trial, key)) for key in ("study", "arm", "seed", "phase", "trial_id")}
        tags["point"] = ui.point(trial)
        made = to.client.create_run(to.id, start_time=record.first_timestamp, tags=tags, run_name=ui.run_name(trial))
        run = _find_run(to, trial.trial_id, record)[0] or made
    if "state" not in run.data.tags:  # the state comes last: without it somebody may have died here
        from mlflow.entities import Param

        to.client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params(trial).items()])
        _log_text(to.client, run.info.run_id, folder.config.read_text(encoding="utf-8"), "config.yaml")
    return str(run.info.run_id)


def _log_text(client: Any, run_id: str, text: str, name: str) -> None:
    """An artifact. A store of artifacts that does not work must not keep the metrics away: a tag says so."""
    try:
        client.log_text(run_id, text, name)
    except Exception as error:
        client.set_tag(run_id, name.partition(".")[0], f"{name} is not stored: {one_line(error)}")


def _log_diff(client: Any, run_id: str, folder: TrialFolder, code: str | None, before: str | None) -> None:
    """What the code snapshot `code` has that its commit has not; `before`: the snapshot of the attempt delivered last."""
    if code is None or code == before:
        return
    try:
        with open(folder.path.parent.parent / "code" / code / "uncommitted.diff", "rb") as file:
            diff, size = file.read(DIFF_LIMIT), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        diff, size = b"", 0
    text = diff.decode(errors="replace")
    if size > len(diff):
        text += f"\n[cut off: the first {len(diff)} of {size} bytes]\n"
    if text or before is not None:  # an attempt that ran the commit as it is takes an earlier one's diff away
        _log_text(client, run_id, text, "uncommitted.diff")


def params(trial: Trial) -> dict[str, str]:
    """What defines the result, by dotted key; a value that is not text in JSON."""
    hidden: dict[str, Any] = dict.fromkeys(("study", "arm", "phase", "backend", "evaluation", "checkpoint"), True)
    document = trial.model_dump(mode="json", exclude={**hidden, "workload": {"data": {"path"}}})
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in dotted(document)}


def _log_metrics(client: Any, run_id: str, points: list[Point]) -> None:
    from mlflow.entities import Metric

    for first in range(0, len(points), BATCH):
        batch = [Metric(p.metric, float(p.value), p.timestamp, p.step) for p in points[first : first + BATCH]]
        client.log_batch(run_id, metrics=batch)


def _log_state(client: Any, run_id: str, record: Record, state: str) -> None:
    from mlflow.entities import RunTag

    start = record.starts[-1] if record.starts else {}
    tags = {key: str(start[key]) for key in ATTEMPT_TAGS if start.get(key) is not None}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in {**tags, "state": state}.items()])
    if state == "running":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, STATUS[state], end_time=record.last_timestamp)


# ------------------------------------------------------------------------------------------ what is not there


@dataclass(frozen=True)
class Missing:
    """What MLflow does not say yet of a trial."""

    trial_id: str
    points: int
    """settled in the journal, not in MLflow"""
    reason: str


def missing(store: Store, study: str) -> list[Missing]:
    """The trials of which MLflow does not say all that their journals settle, by comparing the two. Raises DeliveryError."""
    folders = _folders(store, study)
    if not folders:
        return []
    to = open_experiment(store, study)
    try:
        return [m for m in (_missing_of(to, folder) for folder in folders) if m is not None]
    except BadInput:
        raise
    except Exception as error:
        raise DeliveryError(f"MLflow: {one_line(error)}") from None


def _missing_of(to: Experiment, folder: TrialFolder) -> Missing | None:
    running = folder.is_running()
    record = journal.fold(journal.read(folder.journal))
    if record.first_timestamp is None:
        return None
    trial_id = folder.path.name
    run, _ = _find_run(to, trial_id, record)
    if run is None:
        return Missing(trial_id, len(record.settled), "no run")
    stored = {
        (metric, m.step, m.timestamp)
        for metric in {p.metric for p in record.settled}
        for m in to.client.get_metric_history(run.info.run_id, metric)
    }
    absent = sum((p.metric, p.step, p.timestamp) not in stored for p in record.settled)
    status, said = STATUS[record.state(running)], run.info.status
    if absent:
        return Missing(trial_id, absent, f"{absent} of {len(record.settled)} points")
    return Missing(trial_id, 0, f"the run says {said}, the trial {status}") if said != status else None


def sync(store: Store, study: str) -> tuple[Delivered, list[Missing]]:
    """Delivers, compares with MLflow itself, delivers anew what is missing nevertheless: (what was sent, what is missing still).

    The second pass is for a database that lost runs or was restored behind the back of delivered.json.
    """
    sent = deliver(store, study)
    left = missing(store, study)
    if not left:
        return sent, []
    for trial in left:
        _cursor_file(store.trial(study, trial.trial_id)).unlink(missing_ok=True)
    again = deliver(store, study)
    return Delivered(max(sent.trials, again.trials), sent.points + again.points, again.failed), missing(store, study)
