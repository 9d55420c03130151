"""The notebook a researcher opens first runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "analysis" / "notebooks" / "comparison.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_the_notebook_runs(synthetic_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRBENCH_STUDY", "synthetic")
    monkeypatch.setenv("WRBENCH_STORE", str(synthetic_store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = " ".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    said = " ".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert "AdamWR − SGDWR" in text
    assert "On mnist5k_cnn (1,000 validation images), AdamWR" in said
    assert "ImageNet: not measured." in said
