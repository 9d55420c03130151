"""Batches read by processes, for training images that Python works on one by one: the same ones that threads would give."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from harness.config import BadInput
from harness.data.remote import Unreachable
from harness.stopping import end_with_parent

if TYPE_CHECKING:
    from harness.data.loader import Batch, Request, Substitutes, Substitution, View

AHEAD = 2
"""batches of each process that may be ready before they are asked for"""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Linux keeps it there
TO_THE_RANKS = {getattr(signal, f"SIG{name}") for name in ("TERM", "USR2", "USR1", "INT", "HUP", "URG")}
"""signals that SLURM or a terminal send to a rank and all its children, and that only the rank is to act on"""


class _Batches(Dataset["tuple[Batch, list[Substitution]] | Exception"]):
    """In a worker: request -> batch, and the substitutions made for it; or what the trial is to be stopped by."""

    def __init__(self, view: View, substitutes: Substitutes) -> None:
        self._view, self._substitutes = view, substitutes

    def __getitem__(self, request: Request) -> tuple[Batch, list[Substitution]] | Exception:
        torch.set_num_threads(1)
        known = set(self._substitutes.made)
        images, labels = self._view.empty(request, pinned=False)
        try:
            self._view.fill(request.positions, images, labels, request.augment, request.choices())
        except (BadInput, Unreachable) as fault:  # torch would hand it over with a traceback in its message
            return fault
        return (images, labels), [made for number, made in self._substitutes.made.items() if number not in known]


def read(view: View, substitutes: Substitutes, requests: Iterator[Request]) -> Generator[Batch, None, None]:
    """A batch for each request, as View.read, from view.threads processes with an index each. Closing it ends them.

    Batches come through shared memory, see check_memory. `substitutes`, those that the view loads by or none, get what was
    made. The processes import the main module, as `spawn` does: a script needs its `if __name__ == "__main__"`.
    """
    batches = DataLoader(
        _Batches(view, substitutes), batch_size=None, sampler=requests, num_workers=view.threads, prefetch_factor=AHEAD,
        pin_memory=torch.cuda.is_available(), multiprocessing_context="spawn", worker_init_fn=partial(_end_with, os.getpid()),
        generator=torch.Generator(),  # the trial's own stays as it is
    )  # fmt: skip
    with _deaf():
        running: Any = iter(batches)

    def end() -> None:
        running._shutdown_workers()  # no public way, and an error's traceback would keep them
        for process in running._workers:  # deaf to the SIGTERM by which Python would end them before it waits for them
            process.kill()

    atexit.register(end)
    try:
        for found in running:
            if isinstance(found, Exception):
                raise found
            (images, labels), made = found
            substitutes.note(made)
            yield images, labels
    finally:
        atexit.unregister(end)
        end()


def _end_with(rank: int, worker: int) -> None:
    """In a worker: it ends with the rank, also with one that has ended by now. torch's own watch begins later, and takes whoever adopted
    the worker meanwhile for the rank: it would wait for ever."""
    end_with_parent()
    if os.getppid() != rank:
        os._exit(1)


def check_memory(batch_bytes: int, processes: int, where: Path = SHARED_MEMORY) -> None:
    """BadInput if so many processes' batches do not fit in shared memory: the first that does not is a bus error."""
    if not where.is_dir():
        return
    needed, free = AHEAD * processes * batch_bytes, shutil.disk_usage(where).free
    if needed > free:
        raise BadInput(
            f"{where}: has {free / 1e6:.0f} MB free, and workload.recipe.augment needs {needed / 1e6:.0f} MB there, {AHEAD} batches of "
            f"{batch_bytes / 1e6:.0f} MB for each of {processes} processes of a rank; make it larger (docker run --shm-size), "
            "or give the rank fewer cores"
        )


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started meanwhile never see the signals that are meant for this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_RANKS)
    try:
        resource_tracker.ensure_running()  # starting it, once a process, unblocks two of them
        signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_RANKS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
