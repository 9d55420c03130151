"""What kind of failure ended a trial's ranks, from the error they left, how they ended, and SLURM's word."""

from __future__ import annotations

import re

REPEATS = ("configuration",)
"""would only fail again in the same way: never tried again by itself"""
OF_THE_TRIAL = ("out of memory", "data", "assertion", "error")
"""with the same words, but for numbers, on a second node it is the trial that fails and not the node"""

_SIGNS = (
    ("configuration", r"\bBadInput\b|ValidationError"),
    ("out of memory", r"OutOfMemoryError|out of memory|MemoryError|DefaultCPUAllocator: can't allocate|oom.kill|OUT_OF_MEMORY"),
    (
        "node",
        r"NODE_FAIL|Node failure|uncorrectable|Xid|CUDA-capable device|Stale file handle|Input/output error"
        r"|GPU is lost|fallen off the bus|NVIDIA driver|CUDA driver|No CUDA GPUs|CUDA unknown error|cudaGetDeviceCount|NVML"
        r"|CUDA error: (unspecified launch failure|hardware stack error|unknown error)"
        r"|(step|task|tasks) .*launch failed|Unable to (create|launch) .*(step|task)|Communication connection failure|node not available",
    ),
    ("port", r"EADDRINUSE|[Aa]ddress already in use"),
    (
        "communication",
        r"NCCL|gloo|DistBackendError|DistNetworkError|DistStoreError|DistError|Connection (closed|reset|refused)|ProcessGroup",
    ),
    ("data", r"CorruptSample"),
    ("assertion", r"AssertionError|device-side assert"),
    ("disk", r"No space left|Disk quota exceeded"),
)


def alike(one: str | None, other: str | None) -> bool:
    """Whether two errors are the same but for numbers: free memory and process ids differ from node to node."""
    a, b = (re.sub(r"\d+", "", error or "") for error in (one, other))
    return a == b


def kind(error: str | None, exit_status: int | None, slurm_state: str | None = None) -> str:
    """configuration | out of memory | node | port | communication | data | assertion | disk | killed | error.

    error: the line of the failed rank's exception; None if it could leave none. exit_status: srun's, 128 + n for signal n.
    """
    said = " ".join(filter(None, (slurm_state, error)))
    for name, sign in _SIGNS:
        if re.search(sign, said):
            return name
    if error is None and exit_status is not None and exit_status >= 128:
        return "killed"
    return "error"
