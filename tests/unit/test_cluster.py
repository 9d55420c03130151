"""Cluster files: what a site may say, what it may not, and what a trial then asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import CONFIGS, BadInput, Local, Slurm, parse, read_cluster


def slurm(**over: Any) -> Slurm:
    return parse(Slurm, {"executor": "slurm", "time_minutes": 60} | over, "cluster.yaml")


@pytest.mark.parametrize(
    ("given", "ranks", "shape"),
    [
        ({"gpus_per_node": 8}, None, (1, 8, 8)),
        ({"gpus_per_node": 8, "nodes": 4}, None, (4, 8, 8)),
        ({"gpus_per_node": 8}, 2, (1, 2, 2)),  # a study that says its ranks takes as much of a node as it needs
        ({"gpus_per_node": 8}, 12, (2, 6, 6)),
        ({"gpus_per_node": 8, "nodes": 4}, 16, (2, 8, 8)),
        ({}, None, (1, 1, None)),
        ({}, 4, (1, 4, None)),
        ({"tasks_per_node": 2}, 4, (2, 2, None)),
    ],
)
def test_nodes_and_tasks_of_a_trial(given: dict[str, Any], ranks: int | None, shape: tuple[int, int, int | None]) -> None:
    found = slurm(**given).shape(ranks)
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node) == shape
    assert ranks is None or found.ranks == ranks


def test_ranks_that_leave_a_node_half_empty_are_refused() -> None:
    with pytest.raises(BadInput, match=r"ranks: 13 do not fill nodes of 8 tasks evenly; e\.g\. 8 or 16"):
        slurm(gpus_per_node=8).shape(13)


@pytest.mark.parametrize(
    ("over", "line"),
    [
        ({"sbatch": {"array": "1-9"}}, "sbatch.array: is given by wrbench itself; use array_parallelism"),
        ({"sbatch": {"exclude": "n1\nrm -rf"}}, "sbatch.exclude: 'n1\\nrm -rf' must be a line of text"),
        ({"sbatch": {"Exclude": 1}}, "sbatch.Exclude: is no long option of sbatch"),
        ({"setup": ["a\nb"]}, "setup.0: 'a\\nb' must be one line of text"),
        ({"partition": "a b"}, "partition: 'a b' must be one word"),
        ({"signal": "KILL"}, "signal: 'KILL' must be 'USR2'"),
        ({"signal_lead_seconds": 4000}, "signal_lead_seconds: 4000 must be below time_minutes, 3600 s; e.g. 1800"),
        ({"overrides": {"finalists": {"node": 2}}}, "overrides.finalists.node: unknown key"),
        ({"overrides": {"finalists": {"nodes": 0}}}, "overrides.finalists.nodes: 0 must be greater than or equal to 1"),
        ({"mem_gb": 0.0004}, "mem_gb: 0.0004 must be greater than or equal to 0.001; e.g. 64"),  # --mem=0M is all of a node's
        ({"overrides": {"chain": {"time_minutes": 1}}}, "overrides.chain.signal_lead_seconds: 60 must be below time_minutes, 60 s"),
        ({"mem_gb": 1e99}, "mem_gb: 1e+99 must be less than or equal to 100000; e.g. 64"),
        ({"gpu": 8}, "gpu: unknown key"),
    ],
)
def test_what_cannot_be(over: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput) as refused:
        slurm(**over)
    assert f"cluster.yaml: {line}" in str(refused.value)


def test_a_phase_may_ask_for_something_else() -> None:
    cluster = slurm(gpus_per_node=8, overrides={"finalists": {"nodes": 2, "time_minutes": 120}})
    assert cluster.of_phase("search").shape(None).nodes == 1
    finalists = cluster.of_phase("finalists")
    assert (finalists.shape(None).ranks, finalists.time_minutes, finalists.gpus_per_node) == (16, 120, 8)


def test_the_job_of_a_chain_asks_for_little_but_what_its_overrides_say() -> None:
    cluster = slurm(gpus_per_node=8, nodes=4, cpus_per_task=8, mem_gb=64, account="vision", overrides={"chain": {"time_minutes": 2}})
    chain = cluster.of_phase("chain")
    assert (chain.nodes, chain.tasks_per_node, chain.gpus_per_node, chain.cpus_per_task, chain.mem_gb) == (1, 1, None, 1, None)
    assert (chain.time_minutes, chain.signal_lead_seconds, chain.account) == (2, 60, "vision")
    assert slurm(overrides={"chain": {"mem_gb": 2}}).of_phase("chain").mem_gb == 2
    assert slurm().of_phase("chain").time_minutes == 60


def test_files_are_read_by_their_executor(tmp_path: Path) -> None:
    assert isinstance(read_cluster("local"), Local)
    for path in sorted((CONFIGS / "cluster").glob("slurm*.yaml")):
        cluster = read_cluster(path.stem)
        assert isinstance(cluster, Slurm)
        assert cluster.partition is cluster.account is cluster.qos is None, "no name of any site"
    odd = tmp_path / "odd.yaml"
    odd.write_text("executor: pbs\n")
    with pytest.raises(BadInput, match=r"executor: 'pbs' is not known; valid: debug, local, slurm"):
        read_cluster(str(odd))
