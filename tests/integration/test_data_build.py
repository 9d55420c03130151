"""A build that is killed leaves nothing behind that looks like data, and goes on to the same bytes."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from harness.config import BadInput
from harness.data.build import Options, build
from harness.data.index import Index
from tests import sources

KILLS = 10
BUILD = """
import sys
from pathlib import Path
from harness.data.build import Options, build
src, out, workers = sys.argv[1:]
print(build("ilsvrc2012", Path(src), Path(out), Options(shard_samples=12, max_side=60), workers=int(workers)))
"""


def command(src, out, workers):
    return [sys.executable, "-c", BUILD, str(src), str(out), str(workers)]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_and_resumed(tmp_path, workers):
    """kill -9 of the parent alone, ten times at random moments: the workers end by themselves, and the result is the same."""
    seed = int(time.time())
    rng = random.Random(seed)
    src, out = tmp_path / "src", tmp_path / "out"
    sources.ilsvrc2012(src, per_class=60, val=20)
    build("ilsvrc2012", src, tmp_path / "undisturbed", Options(shard_samples=12, max_side=60))

    began = time.perf_counter()
    assert subprocess.run(command(src, out, workers), stdout=subprocess.DEVNULL).returncode == 0
    took = time.perf_counter() - began
    shutil.rmtree(out)
    kept = []
    for enough in sorted(rng.sample(range(21), KILLS)):  # whole shards, of 22: a moment after so many the kill comes
        running = subprocess.Popen(command(src, out, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and len(list(tmp_path.glob(".out.building/parts/*.npz"))) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        running.kill()
        running.wait()
        kept.append(len(list(tmp_path.glob(".out.building/parts/*.npz"))))
        if out.exists():  # too late
            shutil.rmtree(out)
            continue
        with pytest.raises(BadInput, match="no such folder"):
            Index.load(out)
    said = subprocess.run(command(src, out, workers), capture_output=True, text=True, check=True).stdout
    assert len(set(kept)) > 3, kept
    print(f"seed {seed}, {workers} worker(s), undisturbed {took:.1f} s; whole shards at each kill: {kept}; then {said}")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "undisturbed").iterdir()}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "src", "undisturbed"]


@pytest.mark.parametrize("last", ["index.npz", "build.json"])
def test_killed_at_the_very_end(tmp_path, last):
    """All shards are whole, the folder does not have its name yet."""
    src, out = tmp_path / "src", tmp_path / "out"
    sources.ilsvrc2012(src)
    build("ilsvrc2012", src, tmp_path / "undisturbed", Options(shard_samples=5))
    killed = f"""
import os, signal
from pathlib import Path
from harness.data import build
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
build.{"Index.write" if last == "index.npz" else "sync_names"} = kill
build.build("ilsvrc2012", Path({str(src)!r}), Path({str(out)!r}), build.Options(shard_samples=5))
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL
    assert not out.exists()
    build("ilsvrc2012", src, out, Options(shard_samples=5))
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "undisturbed").iterdir()}
    assert not (tmp_path / ".out.building").exists()
