from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from launch.ledger import Ledger, Submitter, is_alive
from tests.trials import trial


def test_the_newest_line_of_each_trial_counts_and_a_torn_one_does_not(tmp_path: Path) -> None:
    ledger, one, two = Ledger(tmp_path), trial(seed=1), trial(seed=2)
    assert ledger.newest() == {}
    ledger.append("queued", one, 1)
    ledger.append("submitted", one, 1, job_id="7", place=0)
    ledger.append("queued", two, 3)
    with open(ledger.path, "a") as file:
        file.write('{"trial_id": "' + one.trial_id)
    newest = ledger.newest()
    assert {key: (line["event"], line["attempt"]) for key, line in newest.items()} == {
        one.trial_id: ("submitted", 1),
        two.trial_id: ("queued", 3),
    }
    assert newest[one.trial_id]["job_id"] == "7" and newest[one.trial_id]["seed"] == 1


def test_a_job_is_alive_while_its_number_belongs_to_its_own_controller(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(sleeper, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_alive({"job_id": str(process.pid)}, tmp_path)
        assert not is_alive({"job_id": str(process.pid)}, tmp_path / "another trial")
        process.kill()
    assert not is_alive({"job_id": str(process.pid)}, tmp_path)
    assert not is_alive({"job_id": "debug-1"}, tmp_path) and not is_alive({}, tmp_path)


def test_one_submitter_a_study_until_its_process_is_gone(tmp_path: Path) -> None:
    submitter = Submitter(tmp_path / "study")
    assert submitter.holder() is None
    with submitter.lock() as first:
        assert first and submitter.holder() == (socket.gethostname(), os.getpid())
        with submitter.lock() as second:
            assert not second
        assert submitter.holder() == (socket.gethostname(), os.getpid())
    assert submitter.holder() is None
    code = f"""
import os, signal
from pathlib import Path
from launch.ledger import Submitter
with Submitter(Path({str(submitter.path.parent)!r})).lock() as ours:
    assert ours
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60)
    assert submitter.holder() is None
    with submitter.lock() as again:
        assert again
