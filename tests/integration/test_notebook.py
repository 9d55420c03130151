"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "analysis" / "notebooks").glob("*.ipynb"))


def test_the_three_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["comparison", "decoupling", "tuning_budget"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def run(name: str, study: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, int]:
    """(text, markdown, pictures) that the notebook shows of a study."""
    monkeypatch.setenv("WRBENCH_STUDY", study)
    monkeypatch.setenv("WRBENCH_STORE", str(store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = " ".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    said = " ".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    return text, said, sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_comparison_runs(synthetic_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said, pictures = run("comparison", "synthetic", synthetic_store, monkeypatch)
    assert pictures == 4
    assert "AdamWR − SGDWR" in text
    assert "On mnist5k_cnn (1,000 validation images), AdamWR" in said
    assert "ImageNet: not measured." in said


def test_the_tuning_budget_runs(synthetic_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _, pictures = run("tuning_budget", "synthetic", synthetic_store, monkeypatch)
    assert pictures == 2
    assert "Is what remains only insufficient tuning?" in text


def test_the_maps_run(synthetic_maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _, pictures = run("decoupling", "maps", synthetic_maps, monkeypatch)
    assert pictures == 1
    assert "AdamW, torch weight_decay" in text
