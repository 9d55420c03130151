"""Process group up and down, a frozen Ranks, and the few collectives the loop needs.

Every collective is called on every rank; nothing here or above may be collective under `if rank == 0`.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: td.ProcessGroup | None = None
    """gloo, for small host-side agreements that must not wait for a device; None in a single process"""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Elementwise sums over the ranks, in float64."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        td.all_reduce(tensor, group=self.control)
        return [float(v) for v in tensor]

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's JSON-like value, on every rank."""
        if self.control is None:
            return value
        box = [value]
        td.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's JSON-like value, by rank, on every rank."""
        if self.control is None:
            return [value]
        box = [None] * self.world_size
        td.all_gather_object(box, value, group=self.control)
        return box

    def barrier(self) -> None:
        if self.control is not None:
            td.barrier(group=self.control)


_groups: list[td.ProcessGroup | None] = []
"""Groups outlive whoever uses them. DDP's reducer must not hold the last reference: it would wait for gloo's threads
without letting go of the interpreter, which a gloo thread that frees a tensor waits for in turn, and the rank would hang
at its end for ever. References held here are dropped at exit, where the interpreter is let go of."""


_lives = itertools.count()
"""of process groups in this process: torchrun's store outlives them, and the second would read what the first one wrote"""


@atexit.register
def _drain() -> None:
    """Lets gloo's threads free the tensors of their last collectives, wherever a group is still held (DeepSpeed holds one):
    a thread that asks for the interpreter once it is being taken down aborts the process."""
    if _groups:
        _groups.clear()
        time.sleep(0.1)


@contextmanager
def joined(timeout_seconds: int) -> Iterator[Ranks]:
    """The process group of RANK, WORLD_SIZE and LOCAL_RANK (torchrun, srun or launch.job); one process without them.

    Rendezvous at WRBENCH_RENDEZVOUS (an init_method) or MASTER_ADDR and MASTER_PORT. A peer that dies ends a pending
    collective at once where the connection breaks, else after `timeout_seconds`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = _own_device(local_rank)
    if world_size == 1:
        yield Ranks(0, local_rank, 1, device)
        return
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    method = os.environ.get("WRBENCH_RENDEZVOUS", "env://")
    store, _, _ = next(td.rendezvous(method, rank, world_size, timeout=timeout))  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    store = td.PrefixStore(f"life-{next(_lives)}", store)  # type: ignore[attr-defined]
    td.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        control = td.group.WORLD if backend == "gloo" else td.new_group(backend="gloo", timeout=timeout)
        _groups.extend((td.group.WORLD, control))
        yield Ranks(rank, local_rank, world_size, device, control)
    except BaseException:
        if backend == "nccl":  # destroying it would wait for peers that are in a collective, until they have waited long enough
            td.distributed_c10d._abort_process_group()
        raise
    finally:
        if td.is_initialized():
            td.destroy_process_group()


def _own_device(local_rank: int) -> torch.device:
    """The GPU of that number among those this process sees, or the only one that it sees; the CPU where there is none.

    Raises RuntimeError where GPUs are asked for and torch cannot use them: on a node whose driver is broken a trial would
    otherwise train on the CPU without a word.
    """
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda and not seen and asked not in ("", "-1", "NoDevFiles"):
        raise RuntimeError(f"no CUDA-capable device can be used here, and CUDA_VISIBLE_DEVICES is {asked}: its driver, or this container")
    if not seen:
        return torch.device("cpu")
    if local_rank >= seen > 1:
        raise RuntimeError(f"no CUDA-capable device for local rank {local_rank}: this process sees {seen}, numbered from 0")
    device = torch.device("cuda", local_rank % seen)
    torch.cuda.set_device(device)
    return device


def ensure_group(ranks: Ranks, timeout_seconds: int) -> None:
    """torch's default process group also for a single process: sharding libraries need one. Ends with the process."""
    if not td.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        store = td.HashStore()  # type: ignore[attr-defined]
        td.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout_seconds))
        _groups.append(td.group.WORLD)


def peer_lost(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, so that this trial was interrupted and did not fail."""
    text = str(error).lower()
    return isinstance(error, td.DistError) or (
        isinstance(error, RuntimeError) and any(w in text for w in ("gloo", "connection closed by peer", "connection reset", "nccl"))
    )
