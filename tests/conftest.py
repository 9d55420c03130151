from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist5k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real 5,000 digits as shards, built once a session."""
    from harness.data.build import build

    out = tmp_path_factory.mktemp("data") / "mnist5k"
    build("mnist5k", None, out)
    return out


@pytest.fixture(scope="session")
def synthetic_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the study of tests/synthetic.py, delivered to its own MLflow database. Copy it to change it."""
    from tests import synthetic

    return synthetic.write_store(tmp_path_factory.mktemp("synthetic") / "runs").root


@pytest.fixture(scope="session")
def synthetic_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the grid study of tests/synthetic.py, delivered likewise."""
    from tests import synthetic

    return synthetic.write_maps(tmp_path_factory.mktemp("maps") / "runs").root


@pytest.fixture(scope="session")
def few(mnist5k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 training and 200 validation digits of them, for tests that run many trials."""
    from tests import tars

    return tars.few(mnist5k, tmp_path_factory.mktemp("data") / "few")
