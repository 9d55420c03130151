"""The process group of a process that trains more than once, and its device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import dist
from launch import failure

LIVES = """
import sys
from harness.dist import joined

for life in range(3):
    with joined(20) as ranks:
        assert ranks.sums([1.0, ranks.rank]) == [2.0, 1.0]
        ranks.barrier()
        if life == 1:
            gathered = ranks.gathered(life)  # what a later life would read again, if it read the same keys
if ranks.rank == 0:
    print("three lives", gathered)
"""


def test_a_process_under_torchrun_may_join_again(tmp_path: Path) -> None:
    """Its store outlives the group; `make gpu-check` measures, trains and resumes in the same ranks."""
    script = tmp_path / "lives.py"
    script.write_text(LIVES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "three lives [1, 1]" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("seen", "shown", "local_rank", "device"),
    [
        (0, None, 0, "cpu"),  # a node without GPUs
        (0, "", 0, "cpu"),
        (0, "NoDevFiles", 0, "cpu"),  # what SLURM says where a job asked for none
        (8, "0,1,2,3,4,5,6,7", 7, "cuda:7"),
        (1, "3", 5, "cuda:0"),  # each rank sees its own alone
        (0, "0,1", 1, "is 0,1: its driver, or this container"),
        (7, "0,1,2,3,4,5,6,7", 7, "for local rank 7: this process sees 7"),
    ],
)
def test_a_gpu_that_is_asked_for_is_used_or_missed(
    monkeypatch: pytest.MonkeyPatch, seen: int, shown: str | None, local_rank: int, device: str
) -> None:
    set_to: list[torch.device] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if device.startswith("c"):
        assert str(dist._own_device(local_rank)) == device
        assert [str(d) for d in set_to] == [device][: seen > 0]
        return
    with pytest.raises(RuntimeError, match=device) as raised:
        dist._own_device(local_rank)
    assert failure.kind(f"RuntimeError: {raised.value}", 1) == "node"
