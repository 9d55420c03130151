"""A study's report in MLflow: the files of runs/STUDY/report as artifacts of one run, `report`, of the study's experiment.

The run has no trial_id, by which trials are told from other runs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from harness.store import Store
from harness.tracking import PATIENCE, DeliveryError, Experiment, held_alone, one_line, open_experiment

KIND = "report"
"""tag `kind` and name of the run"""

NOTE_LIMIT = 8000
"""characters that MLflow takes in a tag"""


def publish(store: Store, study: str, own: Collection[str] = ()) -> bool:
    """Makes MLflow's report run hold runs/STUDY/report as it is now; whether anything was sent. Raises DeliveryError, one line.

    own: the names that a report may give to its pictures. What MLflow has under these, and the folder no more, goes; other files may be a
    user's. At every report it is the same run, whose description is the beginning of table.md. The digest of the files, a tag, is written
    last: whatever went wrong before is done again by the next call. Nothing is sent before a trial began: MLflow does not know the study.
    """
    if not any(folder.journal.exists() for folder in store.trials(study)):
        return False
    folder = store.study(study) / "report"
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    with held_alone(store.study(study) / "report.lock", time.monotonic() + PATIENCE) as alone:
        if not alone:
            raise DeliveryError("another process has been sending the report for half a minute")
        to = open_experiment(store, study)
        try:
            return _sent(to, study, files, own)
        except Exception as error:  # MLflow's, requests', of a store of artifacts: whatever it is
            raise DeliveryError(f"MLflow: {one_line(error)}") from None


def _sent(to: Experiment, study: str, files: list[Path], own: Collection[str]) -> bool:
    digest = _digest(files)
    run = _run_of(to, study)
    if run.data.tags.get("sha256") == digest:
        return False
    for path in files:
        to.client.log_artifact(run.info.run_id, str(path))
    held = {item.path for item in to.client.list_artifacts(run.info.run_id)}
    for name in (held & set(own)) - {path.name for path in files}:
        to.client._tracking_client._get_artifact_repo(run.info.run_id).delete_artifacts(name)  # MLflow has no public call for it
    note = next((path.read_text(encoding="utf-8") for path in files if path.name == "table.md"), "")
    to.client.set_tag(run.info.run_id, "mlflow.note.content", _beginning(note))
    to.client.set_tag(run.info.run_id, "reported", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
    to.client.set_terminated(run.info.run_id, "FINISHED", end_time=run.info.start_time)
    to.client.set_tag(run.info.run_id, "sha256", digest)
    return True


def _run_of(to: Experiment, study: str) -> Any:
    """The report's run, made unless it is there."""
    found = to.client.search_runs([to.id], f"tags.kind = '{KIND}'", order_by=["attributes.start_time"], max_results=1)
    return found[0] if found else to.client.create_run(to.id, tags={"kind": KIND, "study": study}, run_name=KIND)


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _beginning(text: str) -> str:
    """The paragraphs of a Markdown text that a tag has room for."""
    more = "\n\n(the rest is in table.md)"
    if len(text) <= NOTE_LIMIT:
        return text
    return text[: text.rfind("\n\n", 0, NOTE_LIMIT - len(more))] + more
