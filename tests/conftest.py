from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mnist5k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real 5,000 digits as shards, built once a session."""
    from harness.data import shards

    out = tmp_path_factory.mktemp("data") / "mnist5k"
    shards.build_mnist5k(out)
    return out
