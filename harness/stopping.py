"""Being told to stop: signals raise a flag, and nothing more. Without torch, so that a process can listen before it is imported."""

from __future__ import annotations

import ctypes
import signal
import threading
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Raised by SIGTERM, SIGUSR2, SIGINT and a site's own signals; the loop asks for it and all ranks act on it together.

    While it is entered they are blocked, so that one stays pending until the loop asks: saving is collective and must not run
    inside a signal handler. Threads and processes that are started meanwhile inherit that. SLURM signals all processes of a
    step, and compilers that die of it would fail their rank. USR2 and not USR1, which NCCL catches.
    """

    SIGNALS = ("TERM", "USR2", "INT")

    def __init__(self, *more: str) -> None:
        """`more`: names of further signals, e.g. "USR1". ValueError for one that is not known."""
        names = (name.removeprefix("SIG") for name in (*self.SIGNALS, *more))
        try:
            self._numbers = {signal.Signals[f"SIG{name}"] for name in names}
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is not a signal") from None
        self._heard: str | None = None
        self._listens = False

    @property
    def signal(self) -> str | None:
        """Name of one that came; None while none has."""
        if self._listens:
            for number in signal.sigpending() & self._numbers:
                self._note(number)
        return self._heard

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere handlers cannot be set
            self._listens = True
            # Also handled, in place of submitit's, which act on rank 0 alone: a thread that was there before does not block
            # them, and Python unblocks two in the thread that starts its resource tracker.
            self._handlers = [(number, signal.signal(number, self._note)) for number in self._numbers]
            self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        return self

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        self._heard = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # what is pending goes to the handlers
            for number, handler in self._handlers:
                signal.signal(number, handler)
            self._listens = False


def end_with_parent() -> None:
    """From now on the kernel kills this process when its parent, or the thread of it that started this one, is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
