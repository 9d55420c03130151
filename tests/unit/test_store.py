"""A trial's folder: who may write in it, how its record is closed from outside, what it weighs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness import journal, store
from harness.journal import Journal
from harness.store import ENDED, RETRIED, TrialFolder, close, result_of, write_result
from tests.trials import trial


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    made = TrialFolder(tmp_path / "t")
    made.write_config(trial())
    return made


def attempt(folder: TrialFolder, steps: int, *, saved: int = 0, end: str | None = None) -> int:
    """The record of an attempt that was killed, or ended so."""
    number = folder.claim()
    book = Journal(folder.journal, trial().trial_id, number)
    book.write(0, event="start", resumed_from=0, total_steps=245)
    for step in range(steps):
        book.write(step, metrics={"train/loss": 2.0 - step})
        if step + 1 == saved:
            book.write(saved, event="checkpoint")
    if end:
        book.write(steps - 1, event="end", state=end, error="boom")
    book.close()
    return number


def test_closing_needs_no_torch() -> None:
    code = "import harness.store, harness.stopping, sys; sys.exit(bool({'torch', 'mlflow', 'deepspeed'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --------------------------------------------------------------------------------------------------------- closing


def test_a_trial_that_no_attempt_ever_began_is_closed_and_can_be_run_again(folder: TrialFolder) -> None:
    assert close(folder, "exhausted", "no node came up")
    state = folder.state()
    assert (state.state, state.step, state.attempts, state.last_error) == ("exhausted", 0, 0, "no node came up")
    result = json.loads(folder.result.read_text())
    assert (result["state"], result["attempts"], result["step"], result["total_steps"]) == ("exhausted", 0, 0, 245)
    assert result.keys() == {
        "trial_id", "arm", "seed", "state", "step", "total_steps", "attempts", "weights_sha256", "metrics", "error",
    }  # fmt: skip
    attempt(folder, 2)
    assert folder.state().state == "interrupted"


def test_a_killed_attempt_is_closed_with_what_it_had_reached(folder: TrialFolder) -> None:
    attempt(folder, 5, saved=3)
    assert close(folder, "cancelled", "cancelled by a person", attempt=1)
    state = folder.state()
    assert (state.state, state.step, state.committed, state.stopped) == ("cancelled", 5, 3, False)
    result = json.loads(folder.result.read_text())
    assert (result["state"], result["step"], result["metrics"]) == ("cancelled", 5, {"train/loss": -2.0})
    assert "cancelled" not in ENDED, "the next submission goes on with it"
    assert {"failed", "exhausted"} == set(RETRIED) < set(ENDED)


def test_a_failed_attempt_can_be_given_up_and_a_result_cannot(folder: TrialFolder) -> None:
    attempt(folder, 5, end="failed")
    assert not close(folder, "failed", "srun ended with 1"), "it has said why itself"
    assert folder.state().last_error == "boom"
    assert close(folder, "exhausted", "boom, three times")
    assert (folder.state().state, folder.state().last_error) == ("exhausted", "boom, three times")
    number = attempt(folder, 5, end="finished")
    assert folder.state().state == "interrupted", "the result.json is of the attempt before: this one was killed before it wrote its own"
    write_result(folder, result_of(trial(), "finished", 5, number, {}))
    before = folder.journal.read_bytes()
    assert not any(close(folder, state, "late") for state in ("failed", "exhausted", "cancelled"))
    assert folder.journal.read_bytes() == before
    assert folder.state().state == "finished"


@pytest.mark.parametrize("content", ["[1,2]", "3", "null", "{}", "{"])
def test_a_result_that_is_no_mapping_is_none(folder: TrialFolder, content: str) -> None:
    attempt(folder, 3, end="finished")
    folder.result.write_text(content)
    assert folder.finished_result() is None
    assert folder.state().state == "interrupted"


def test_who_was_cut_off_does_not_close_what_goes_on_elsewhere(folder: TrialFolder) -> None:
    attempt(folder, 5)
    folder.claim()  # on another node
    assert not close(folder, "failed", "srun ended with 1", attempt=1)
    assert folder.state().state == "interrupted"
    assert not folder.result.exists()
    assert close(folder, "failed", "srun ended with 1", attempt=2)
    (end,) = [line for line in journal.read(folder.journal) if line.get("event") == "end"]
    assert end["attempt"] == 2


def test_what_a_superseded_attempt_wrote_in_its_last_moment_is_no_result(folder: TrialFolder) -> None:
    number = attempt(folder, 5, end="finished")
    write_result(folder, store.result_of(trial(), "finished", 5, number, {}))
    assert folder.finished_result() is not None
    folder.claim()
    assert folder.finished_result() is None


# ----------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_on_a_file_system_without_locks_attempts_run_and_nothing_crashes(
    folder: TrialFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What such a file system answers is all that is made up."""

    def refused(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refused)
    with folder.lock():
        assert not folder.is_running()
        with folder.lock():
            assert (folder.claim(), folder.claim()) == (1, 2)
    assert folder.is_superseded(1)
    assert not folder.is_superseded(2)


def test_another_error_of_the_lock_is_not_passed_over(folder: TrialFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with folder.lock():
        pass
    monkeypatch.setattr(fcntl, "fcntl", refused)
    with pytest.raises(OSError, match="Input/output"), folder.lock():
        pass
    with pytest.raises(OSError, match="Input/output"):
        folder.is_running()


# ----------------------------------------------------------------------------------------------------------- bytes


def test_bytes_count_each_file_once_whatever_its_names(folder: TrialFolder) -> None:
    before = folder.bytes()
    assert before == folder.config.stat().st_size
    checkpoint = folder.checkpoints / "step-7-attempt-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.pt").write_bytes(b"x" * 1000)
    folder.weights.mkdir()
    (folder.weights / "step-7.pt").hardlink_to(checkpoint / "model.pt")
    (checkpoint / "optimizer-0.pt").write_bytes(b"x" * 500)
    (folder.path / "nowhere").symlink_to("/nonexistent/file")
    assert folder.bytes() == before + 1500 + len("/nonexistent/file")
    assert TrialFolder(folder.path / "absent").bytes() == 0


def test_bytes_of_a_folder_where_files_come_and_go(folder: TrialFolder) -> None:
    folder.checkpoints.mkdir()
    before, done = folder.bytes(), threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            for number in range(50):
                (folder.checkpoints / f"file-{number}").write_bytes(b"x")
            for number in range(50):
                (folder.checkpoints / f"file-{number}").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        counted = [folder.bytes() for _ in range(1000)]
    finally:
        done.set()
        thread.join()
    assert before == min(counted) or len(set(counted)) > 1
    assert all(before <= count <= before + 50 for count in counted)
