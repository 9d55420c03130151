"""`make gpu-check` on the CPU: real runs, in processes that can import neither mlflow nor submitit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(arguments: list[str], folder: Path, without: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs in `folder`; in that process and in all that it starts the modules of `without` cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({without}))\n")
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=600)


CHECK = ["-m", "tests.benchmarks.gpu_check"]


def rows(folder: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads((folder / "build/gpu-check.json").read_text())}


def test_all_sections_run_without_mlflow_and_submitit(tmp_path: Path) -> None:
    absent = python(["-c", "import mlflow"], tmp_path, ["mlflow", "submitit"])
    assert "ModuleNotFoundError" in absent.stderr

    done = python([*CHECK, "--device", "cpu"], tmp_path, ["mlflow", "submitit"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("CPU, torch ")
    found = rows(tmp_path)
    assert done.stdout.splitlines()[-1].startswith(f"PASS gpu-check: {len(found)} cells, 0 refused, worst ")
    for cell in ("ddp 0, AdamW normalised", "deepspeed 2, AdamW normalised", "fsdp 3, AdamW normalised"):
        assert 0 < found[cell]["figure"] <= found[cell]["limit"] <= 1e-5, found[cell]
    assert sum(name.startswith("step ") for name in found) == 12
    assert found["deterministic: stopped and resumed / undisturbed"]["figure"] == 0


def test_without_deepspeed_its_rows_are_refused(tmp_path: Path) -> None:
    done = python([*CHECK, "--device", "cpu", "--only", "equivalence", "-k", "^deepspeed 2, AdamW n"], tmp_path, ["deepspeed"])
    assert done.returncode == 0, done.stdout + done.stderr
    row = rows(tmp_path)["deepspeed 2, AdamW normalised"]
    assert row["refused"] and row["note"] == "deepspeed is not installed"
    assert ", 1 refused, " in done.stdout.splitlines()[-1]


def test_without_a_gpu_one_line_says_what_is_needed(tmp_path: Path) -> None:
    done = python(CHECK, tmp_path, [])
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: gpu-check needs a GPU that torch can use; torch ")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    done = python([*CHECK, "--device", "cpu"], tmp_path, ["pydantic", "mlxtend"])
    assert (done.returncode, done.stderr) == (2, f"error: gpu-check needs pydantic, mlxtend, not installed for {sys.executable}\n")
