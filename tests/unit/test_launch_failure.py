from __future__ import annotations

import pytest

from launch import failure, rank
from launch.failure import kind
from launch.rank import place


@pytest.mark.parametrize(
    ("error", "exit_status", "word", "expected"),
    [
        ("harness.config.BadInput: data/x: no such folder", 1, None, "configuration"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", 1, None, "out of memory"),
        ("MemoryError", 1, None, "out of memory"),
        (None, 137, "OUT_OF_MEMORY", "out of memory"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", 1, None, "node"),
        ("RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution", 1, None, "node"),
        ("RuntimeError: No CUDA GPUs are available", 1, None, "node"),
        ("RuntimeError: Unexpected error from cudaGetDeviceCount(). ... Error 802: system not yet initialized", 1, None, "node"),
        ("RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment", 1, None, "node"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", 1, None, "node"),
        (None, 1, "NODE_FAIL", "node"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE, ...)", 134, None, "communication"),
        ("RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", 1, None, "node"),
        ("RuntimeError: Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the system", 1, None, "node"),
        ("torch.AcceleratorError: CUDA error: unspecified launch failure", 1, None, "node"),
        ("torch.distributed.DistNetworkError: The server socket has failed to listen ... EADDRINUSE", 1, None, "port"),
        ("RuntimeError: [../gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.1]:1234", 1, None, "communication"),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp", 1, None, "communication"),
        ("harness.data.index.CorruptSample: train-000001.tar: sample 12: does not decode", 1, None, "data"),
        ("AssertionError: shapes differ", 1, None, "assertion"),
        ("RuntimeError: CUDA error: device-side assert triggered", 1, None, "assertion"),
        ("OSError: [Errno 28] No space left on device", 1, None, "disk"),
        ("ZeroDivisionError: division by zero", 1, None, "error"),
        ("RuntimeError: fully_shard needs a mesh", 1, None, "error"),
        (None, 137, None, "killed"),
        (None, 139, None, "killed"),
    ],
)
def test_kinds(error: str | None, exit_status: int, word: str | None, expected: str) -> None:
    assert kind(error, exit_status, word) == expected


@pytest.mark.parametrize(
    ("shown", "local_rank"),
    [
        (None, "3"),  # on the CPU
        ("0,1,2,3", "3"),  # every task sees all of the node's
        ("3", "0"),  # each sees its own alone
        ("GPU-8f1a,GPU-11c2", "1"),
    ],
)
def test_local_rank_is_the_number_of_the_gpu_among_those_seen(shown: str | None, local_rank: str) -> None:
    environment = {"SLURM_PROCID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_LOCALID": "3"} | (
        {"CUDA_VISIBLE_DEVICES": shown} if shown else {}
    )
    assert place(environment) == {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "4"}


def test_gloo_is_told_an_interface_where_a_hosts_name_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc/hosts of Debian and Ubuntu: 127.0.1.1."""
    many = {"SLURM_NNODES": "2", "MASTER_ADDR": "127.0.1.1", "WRBENCH_LAST_ADDR": "10.0.0.8"}  # as the first node sees them
    leads = {"10.0.0.7": "eth0", "10.0.0.8": "eth0"}
    monkeypatch.setattr(rank, "interface_to", leads.get)
    monkeypatch.setattr(rank.socket, "gethostbyname", lambda name: "127.0.1.1")
    assert rank.reachable(many) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert rank.reachable(many | {"MASTER_ADDR": "10.0.0.7", "WRBENCH_LAST_ADDR": "127.0.1.1"}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert rank.reachable(many | {"WRBENCH_LAST_ADDR": "127.0.1.1"}) == {}, "all on one machine"
    assert rank.reachable(many | {"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    assert rank.reachable(many | {"SLURM_NNODES": "1"}) == {}
    monkeypatch.setattr(rank.socket, "gethostbyname", lambda name: "10.0.0.7")
    assert rank.reachable(many) == {}, "others reach it there"


def test_an_interface_is_one_by_which_others_are_reached() -> None:
    assert rank.interface_to("127.0.1.1") is None


def test_errors_are_alike_but_for_their_numbers() -> None:
    oom = "OutOfMemoryError: Tried to allocate {} GiB. Process {} has 70.1 GiB in use"
    assert failure.alike(oom.format(2, 4711), oom.format(2, 815))
    assert not failure.alike("KeyError: 'x'", "KeyError: 'y'")
