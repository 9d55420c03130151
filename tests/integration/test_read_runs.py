"""`make bench-read`, too small to judge: nothing that it reads differs from what the client says, and every row is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_of_bench_read_is_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.read_runs", "--runs", "20", "--points", "50"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("PASS read-runs: 9 cells, 0 refused, worst ")
    rows = {row["name"]: row for row in json.loads((tmp_path / "build" / "read-runs.json").read_text())}
    assert all(row["figure"] == 0 for name, row in rows.items() if "differ" in name)
    assert all(row["figure"] > 0 for name, row in rows.items() if "differ" not in name)
    assert rows["values that differ from the client's"]["note"].startswith("1,002 values of 20 runs")
    assert [path.name for path in tmp_path.iterdir()] == ["build"]
