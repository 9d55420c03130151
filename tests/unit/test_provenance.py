"""The code that runs is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import harness


def test_the_code_is_named_by_the_snapshot_it_runs_from_and_else_by_its_checkout(tmp_path: Path) -> None:
    """A store may lie in a checkout of something else, whose commit is not that of the code."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    def named() -> object:
        program = "import json; from harness.provenance import code; print(json.dumps(code()))"
        command = [sys.executable, "-P", "-c", program]
        out = subprocess.run(command, env={"PYTHONPATH": str(code)}, check=True, capture_output=True, text=True, timeout=120)
        return json.loads(out.stdout)

    code = tmp_path / "runs/s/code/0123456789ab"
    shutil.copytree(Path(harness.__path__[0]), code / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "something else")
    assert named() == {"commit": git("rev-parse", "HEAD"), "code": None}
    (code / "snapshot.json").write_text(json.dumps({"code": "0123456789ab", "commit": "abc-dirty", "time": "2026-01-01"}))
    assert named() == {"commit": "abc-dirty", "code": "0123456789ab"}
