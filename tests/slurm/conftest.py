from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import INSTALL, Cluster, missing


@pytest.fixture(scope="session")
def installed() -> None:
    """SLURM's programs are here; else the test is skipped, and fails where that would go unseen."""
    if absent := missing():
        reason = f"not installed: {', '.join(absent)}; {INSTALL}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster a session, which `sbatch`, `squeue` ... mean in every process started from here. Tests leave no jobs there."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("SLURM", "SBATCH", "SRUN", "SACCT")):  # of a job that runs these tests
                patch.delenv(name)
        for name, value in cluster.environment().items():
            patch.setenv(name, value)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
