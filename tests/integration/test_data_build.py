"""A build that is killed leaves nothing behind that looks like data, and a later one makes the same bytes."""

import signal
import subprocess
import sys

import pytest

from harness.config import BadInput
from harness.data import shards
from harness.data.index import Index

KILLED = """
import os, signal, sys
from pathlib import Path
from harness.data import shards
shards.build_mnist5k(Path(sys.argv[1]), progress=lambda done, total: done == int(sys.argv[2]) and os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.parametrize("done", [1000, 5000])
def test_killed_while_building(mnist5k, tmp_path, done):
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out), str(done)]).returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(BadInput, match="no such folder"):
        Index.load(out)
    if done == 5000:
        shards.build_mnist5k(out)
        assert [f.name for f in tmp_path.iterdir()] == ["out"]
        assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in mnist5k.iterdir()}
