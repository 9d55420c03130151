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


@pytest.fixture(scope="session")
def synthetic_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the study of tests/synthetic.py, delivered to its own MLflow database. Copy it to change it."""
    from tests import synthetic

    return synthetic.write_store(tmp_path_factory.mktemp("synthetic") / "runs").root


@pytest.fixture(scope="session")
def few(mnist5k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 training and 200 validation digits of them, for tests that run many trials."""
    import tarfile

    from harness.data import shards

    out = tmp_path_factory.mktemp("data") / "few"
    out.mkdir()
    for split, samples in (("train", 800), ("val", 200)):
        with (
            tarfile.open(out / f"{split}-000000.tar", "w") as target,
            tarfile.open(next(iter(sorted(mnist5k.glob(f"{split}-*.tar"))))) as source,
        ):
            for member in source.getmembers()[: 3 * samples]:
                target.addfile(member, source.extractfile(member))
    shards.index_shards(out)
    return out
