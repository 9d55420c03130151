"""`make bench-data`, too small to judge: every contender that is installed goes through every sample, and every row is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_of_bench_data_is_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_data", "--samples", "70", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "build" / "bench-data.json").read_text())}
    ours = ("libjpeg", "simplejpeg")
    others = ("webdataset + PIL + DataLoader", "ImageFolder + PIL + DataLoader", "raw simplejpeg decode")
    assert {f"{own} / {other}" for own in ours for other in others} <= rows.keys(), done.stdout
    assert all(row["figure"] > 0 for row in rows.values() if not row["refused"] and row["name"] != "goals")
    peers = [row for row in rows.values() if row["name"] in ("timm WebDataset reader", "DALI on the CPU")]
    assert len(peers) == 2 and all(row["refused"] and row["note"].startswith("not measured: No module") for row in peers)
