"""One rank of one trial, as srun starts it: finds its place from SLURM's environment, and trains.

    python -m launch.rank STORE STUDY TRIAL --threads N --signal NAME

Exit status 0 whenever the journal says what happened (finished, diverged, stopped, superseded), so that srun kills the
others only when this rank has failed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from harness.stopping import StopRequest
from harness.store import Store


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torch and DeepSpeed read them, from SLURM's variables of a step.

    LOCAL_RANK is the number of this rank's GPU among those it sees, not its place on the node: a task that is shown only
    its own GPU (--gpus-per-task=1) has number 0.
    """
    local = int(environment["SLURM_LOCALID"])
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown:
        local %= len(shown.split(","))
    world = int(environment["SLURM_NTASKS"])
    on_node = world // int(environment.get("SLURM_NNODES", 1))  # the same on every node
    return {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": str(world), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(on_node)}


def reachable(environment: Mapping[str, str]) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME where gloo would tell the other nodes an address at which they reach themselves.

    It tells them that of this host's name, which Debian's and Ubuntu's /etc/hosts say is 127.0.1.1. So is MASTER_ADDR on the first node.
    """
    if int(environment.get("SLURM_NNODES", 1)) == 1 or "GLOO_SOCKET_IFNAME" in environment:
        return {}
    with suppress(OSError):
        if socket.gethostbyname(socket.gethostname()).startswith("127."):
            peers = filter(None, map(environment.get, ("MASTER_ADDR", "WRBENCH_LAST_ADDR")))
            name = next(filter(None, map(interface_to, peers)), None)
            return {"GLOO_SOCKET_IFNAME": name} if name else {}
    return {}


def interface_to(address: str) -> str | None:
    """The network interface that leads to an IPv4 address or a host; None to this host itself, or where none has its end's address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex() if not own.startswith("127.") else ():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR, linux/sockios.h
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.rank")
    parser.add_argument("store", type=Path)
    parser.add_argument("study")
    parser.add_argument("trial")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--signal", required=True)
    options = parser.parse_args()
    with StopRequest(options.signal) as stop:  # before the seconds that torch takes: what comes meanwhile must not kill
        os.environ |= place(os.environ) | reachable(os.environ) | {"OMP_NUM_THREADS": str(options.threads)}
        store = Store(options.store)
        trial = store.trial(options.study, options.trial).read_config()
        import torch

        from harness.checkpoint import Superseded
        from harness.train import train

        torch.set_num_threads(options.threads)
        try:
            result = train(trial, store, stop=stop, takes_over=True)
        except Superseded as newer:
            print(newer, file=sys.stderr, flush=True)
            os._exit(0)  # at once: to take the interpreter down takes seconds on a busy node
    print(f"{options.trial}: {result['state']} at step {result['step']} of {result['total_steps']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
