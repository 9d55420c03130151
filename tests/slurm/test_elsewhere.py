"""Nodes that SLURM thinks well, on which our ranks fail: a trial is not tried there again while there are others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.study import load
from launch import slurm, status
from tests.slurm.cluster import Cluster
from tests.slurm.study import SGDW, Study, refuse, until

pytestmark = pytest.mark.xdist_group("beside")

ONE: dict[str, Any] = {"tasks_per_node": 1, "gpus_per_node": None, "stall_timeout_seconds": 600}
TINY: dict[str, Any] = {"ranks": 1, "budget": {"epochs": 0.2}}
NO_DRIVER = "RuntimeError: Found no NVIDIA driver on your system."


@pytest.fixture(autouse=True)
def jobs(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, without jobs after a test."""
    yield cluster
    subprocess.run(["scancel", f"--user={os.getuid()}"], check=True, timeout=60)
    until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, check=True, timeout=60).stdout, 60)


def python(folder: Path, when: str, error: str) -> dict[str, str]:
    """Of a cluster file: ranks that fail with this error when a shell's condition holds, and else train."""
    path = folder / "python"
    folder.mkdir(exist_ok=True)
    fails = f'echo "Traceback (most recent call last):" >&2; echo "{error}" >&2; exit 1'
    path.write_text(f'#!/bin/bash\nif {when}; then {fails}; fi\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return {"python": str(path)}


def nodes(study: Study, arm: str = "AdamWR") -> list[str]:
    """Where the trial's lives were, in order."""
    return [life.started["nodes"] for life in study.entry(study.folder(arm)).lives]


def said(study: Study) -> str:
    return "".join(path.read_text() for path in sorted(study.store.study(study.name).glob("submissions/*/*_log.err")))


def test_a_trial_is_not_tried_again_where_its_ranks_failed(tmp_path: Path, mnist5k: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside it one that fails alike wherever it runs, and one of two nodes of which one is bad."""
    there = {"sbatch": {"exclude": "n4"}}
    alone = Study(
        tmp_path / "one", mnist5k, ONE | there | python(tmp_path / "one", "[ $SLURMD_NODENAME = n1 ]", NO_DRIVER), name="one", **TINY
    )
    always = Study(
        tmp_path / "always", mnist5k, ONE | there | python(tmp_path / "always", "true", "KeyError: 'x'"), name="always", **TINY,
        arms={"B": SGDW},
    )  # fmt: skip
    wide = Study(
        tmp_path / "wide", mnist5k, ONE | python(tmp_path / "wide", "[ $SLURMD_NODENAME = n2 ]", "KeyError: 'y'"), name="wide",
        **TINY | {"ranks": 2},
    )  # fmt: skip
    for study in (alone, always, wide):
        study.submit()

    alone.wait("finished", "failed")
    assert nodes(alone)[0] == "n1" and len(nodes(alone)) == 2 and nodes(alone)[1] in ("n2", "n3")
    assert slurm.job(alone.entry(alone.folder()).job_id)["ExcNodeList"] == "n4,n1", "the user's own is kept"
    assert f"not on n1 again, where it failed: node: {NO_DRIVER}" in said(alone)
    (row,) = status.rows(load(alone.file), alone.store)
    assert (row.avoids, row.failures, row.preemptions) == ({"n1": f"node: {NO_DRIVER}"}, 1, 0)
    status.show(load(alone.file), alone.store, watch=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"n1: the ranks of 1 trial(s) failed there, which are not run there again; node: {NO_DRIVER}" in shown

    always.wait("failed")
    first, second = nodes(always, "B")
    assert first != second and not always.entry(always.folder("B")).lives[0].started["life"]
    (row,) = status.rows(load(always.file), always.store)
    expected = f"error: KeyError: 'x' (2 times without a new checkpoint, on {' and '.join(sorted((first, second)))})"
    assert row.last_error == expected, "no third node"

    wide.wait("finished", "failed")
    assert ["n2" in slurm.run("scontrol", "show", "hostnames", one).split() for one in nodes(wide)] == [True, False]
    assert list(wide.entry(wide.folder()).avoids) == ["n2"], "its neighbour is not to blame"


def test_where_there_is_no_other_node_or_none_may_be_excluded_it_is_tried_there_again(
    tmp_path: Path, mnist5k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for ever. One that fails on all nodes in turn ends when there is no further one."""
    only = {"max_retries": 1, "sbatch": {"exclude": "n[2-4]"}}
    bound = Study(
        tmp_path / "bound",
        mnist5k,
        ONE | only | python(tmp_path / "bound", "true", "KeyError: $(mktemp -u XXXXXXXX)"),
        name="bound",
        **TINY,
    )
    bound.submit()
    pair = {"max_retries": 2, "sbatch": {"exclude": "n[3-4]"}}
    toured = Study(
        tmp_path / "two", mnist5k, ONE | pair | python(tmp_path / "two", "true", "KeyError: $(mktemp -u XXXXXXXX)"), name="two", **TINY
    )
    toured.submit()

    refuse(tmp_path / "bin", "scontrol", "update", "slurm_update error: Access/permission denied")
    refuse(tmp_path / "bin", "sbatch", "--test-only", "sbatch: error: Access/permission denied")  # such a user has nodes all the same
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    once = f"mkdir {tmp_path / 'failed'} 2> /dev/null"
    forbidden = Study(tmp_path / "no", mnist5k, ONE | {"max_retries": 1} | python(tmp_path / "no", once, NO_DRIVER), name="no", **TINY)
    forbidden.submit()

    bound.wait("finished", "failed")
    assert nodes(bound) == ["n1", "n1"]
    assert "again on n1, since SLURM has no other place: allocation failure: Requested node configuration is not available" in said(bound)
    toured.wait("failed")
    assert nodes(toured) in (["n1", "n2", "n2"], ["n2", "n1", "n1"])
    forbidden.wait("finished", "failed")
    assert len(nodes(forbidden)) == 2
    expected = f"may come to {nodes(forbidden)[0]} again, where it failed: slurm_update error: Access/permission denied"
    assert expected in said(forbidden)
    assert not forbidden.entry(forbidden.folder()).avoids
    until(lambda: not bound.in_queue() and not forbidden.in_queue(), 60)
