"""Being told to stop: signals raise a flag, and nothing more. Without torch, so that a process can listen before it is imported."""

from __future__ import annotations

import ctypes
import signal
import threading
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Raised by SIGTERM, SIGUSR2, SIGINT and a site's own signals; the loop asks for it and all ranks act on it together.

    Handlers only set a flag: saving is collective and must not run inside a signal handler. They replace submitit's,
    which act on rank 0 alone. USR2 and not USR1, which NCCL catches.
    """

    SIGNALS = ("TERM", "USR2", "INT")

    def __init__(self, *more: str) -> None:
        """`more`: names of further signals, e.g. "USR1". ValueError for one that is not known."""
        names = (name.removeprefix("SIG") for name in (*self.SIGNALS, *more))
        try:
            self._numbers = {signal.Signals[f"SIG{name}"] for name in names}
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is not a signal") from None
        self.signal: str | None = None
        """name of the one that came last; None while none has"""

    def __enter__(self) -> StopRequest:
        self._before = []
        if threading.current_thread() is threading.main_thread():  # elsewhere handlers cannot be set
            self._before = [(number, signal.signal(number, self._note)) for number in self._numbers]
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)


def end_with_parent() -> None:
    """From now on the kernel kills this process when its parent, or the thread of it that started this one, is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
