"""`make gpu-check` on the CPU: real runs, in processes that can import neither mlflow nor submitit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import report
from tests.benchmarks import gpu_check, gpu_train

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
    assert "ok      every backend, fp32, 3 rows " in done.stdout
    assert not any("ddp 0, AdamW normalised" in line and "worst" not in line for line in done.stdout.splitlines()), "a line for all rows"
    assert sum(name.startswith("step ") for name in found) == 12
    assert found["deterministic: stopped and resumed / undisturbed"]["figure"] == 0


def test_a_part_of_the_table_is_as_good_as_its_worst_row() -> None:
    rows = [report.row("ddp 0, SGDW", 1e-7, 1e-6), report.row("ddp 1, SGDW", 2e-6, 1e-6), report.refused("deepspeed 1, SGDW", "no"),
            report.row("ddp 0 bf16 end to end, SGDW", 1e-3, None), report.row("mistake: none, SGDW", 1.0, None)]  # fmt: skip
    found = {row.name: row for row in gpu_check.parts(rows)}
    assert list(found) == ["mistakes that must show, 1 rows", "bf16, end to end, not limited, 1 rows", "every backend, fp32, 3 rows"]
    worst = found["every backend, fp32, 3 rows"]
    assert (worst.ok, worst.figure, worst.note) == (False, 2e-6, "worst: ddp 1, SGDW; 1 refused")


@pytest.mark.parametrize("world", [1, 8, 12, 1024])
def test_there_is_a_batch_for_every_rank(world: int) -> None:
    samples = gpu_train.samples("cuda", world)
    assert samples - samples // 5 >= 256 * world


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
