"""Batches read by processes, for training images that Python works on one by one: the same ones that threads would give."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from harness.data.index import CorruptSample
from harness.data.remote import Unreachable

if TYPE_CHECKING:
    from harness.data.loader import Batch, Request, Substitutes, Substitution, View

AHEAD = 2
"""batches of each process that may be ready before they are asked for"""
TO_THE_RANKS = {getattr(signal, f"SIG{name}") for name in ("TERM", "USR2", "USR1", "INT", "HUP", "URG")}
"""signals that SLURM or a terminal send to a rank and all its children, and that only the rank is to act on"""


class _Batches(Dataset["tuple[Batch, list[Substitution]] | Exception"]):
    """In a worker: request -> batch, and the substitutions made for it; or what the trial is to be stopped by."""

    def __init__(self, view: View, substitutes: Substitutes) -> None:
        self._view, self._substitutes = view, substitutes

    def __getitem__(self, request: Request) -> tuple[Batch, list[Substitution]] | Exception:
        torch.set_num_threads(1)
        known = set(self._substitutes.made)
        images, labels = self._view.empty(len(request.positions), pinned=False)
        try:
            self._view.fill(request.positions, images, labels, request.augment)
        except (CorruptSample, Unreachable) as fault:
            return fault
        return (images, labels), [made for number, made in self._substitutes.made.items() if number not in known]


def read(view: View, substitutes: Substitutes, requests: Iterator[Request]) -> Generator[Batch, None, None]:
    """A batch for each request, as View.read, from view.threads processes with an index each. Closing it ends them.

    Batches come through shared memory (/dev/shm). `substitutes`, those that the view loads by or none, get what was made.
    """
    batches = DataLoader(
        _Batches(view, substitutes), batch_size=None, sampler=requests, num_workers=view.threads, prefetch_factor=AHEAD,
        pin_memory=torch.cuda.is_available(), multiprocessing_context="spawn",
        generator=torch.Generator(),  # the trial's own stays as it is
    )  # fmt: skip
    with _deaf():
        running = iter(batches)
    for found in running:
        if isinstance(found, Exception):
            raise found
        (images, labels), made = found
        substitutes.note(made)
        yield images, labels


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started meanwhile never see the signals that are meant for this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_RANKS)
    try:
        resource_tracker.ensure_running()  # its start, of which it is in need once, lets two of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_RANKS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
