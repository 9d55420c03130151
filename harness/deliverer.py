"""The delivering process: beside training it delivers every few seconds what `harness.tracking` finds new, at the lowest priority.

python -m harness.deliverer STORE STUDY [TRIAL ...] --parent-pid PID
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from harness.store import Store
from harness.tracking import PATIENCE, deliver, is_server, one_line, redacted, tracking_uri, undelivered

EVERY, AT_MOST = 2.0, 30.0
"""seconds between two passes of a delivering process: when all is well, and when passes are slow or fail"""


class Delivery:
    """A delivering process beside a submission or a job; leaving the context stops it after its final pass."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, logged_before: int) -> None:
        self.process = process
        self._log, self._logged_before = log, logged_before

    def stop(self, timeout: float = 60) -> None:
        """Final pass, then the end; at once if a server does not answer. What is left after `timeout` seconds is for `wrbench sync`."""
        for thread in _threads(self.process.pid):
            _schedule(thread, os.SCHED_OTHER, 0)
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()  # safe at any point, see `deliver`
            self.process.wait()

    def failure(self) -> str:
        """What it logged last; for when MLflow lacks something after the end."""
        logged = self._log.read_bytes()[self._logged_before :].decode(errors="replace").splitlines() if self._log.exists() else []
        said = logged[-1].split(" ", 2)[-1] if logged else "it took too long"
        return said.partition(": the rest is left to")[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_delivery(store: Store, study: str, trials: Collection[str] | None = None) -> Delivery:
    """Starts delivering a study, or only some of its trials; ends by `stop`, or by itself when this process is gone.

    Failures: runs/STUDY/delivery.log, for some trials in the logs of the first of them.
    """
    log = _log_file(store, study, trials)
    log.parent.mkdir(parents=True, exist_ok=True)
    logged_before = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "harness.deliverer", str(store.root), study, *(trials or ()), "--parent-pid", str(os.getpid())]
    # A child inherits the mask: SIGTERM waits until the child asks for it, even one sent before Python is up.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        # its own session: a Ctrl-C in the terminal must not end it before its final pass
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _schedule(process.pid, os.SCHED_IDLE, 19)  # training ranks on the same cores come first
    return Delivery(process, log, logged_before)


def _threads(pid: int) -> list[int]:
    """Of a process; priorities belong to threads."""
    with suppress(OSError):
        return [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
    return [pid]


def _schedule(pid: int, policy: int, nice: int) -> None:
    """Priority of a thread, as far as this user may set it (upwards only root may): CPU, and the disk's with the policy.

    Where Linux groups by session (autogroup), an idle group yields only at the next tick: delivery takes little of busy cores, but a
    thread that waits for the disk, as the commit of a checkpoint does, may wake up some milliseconds late each time.
    """
    with suppress(OSError):
        os.sched_setscheduler(pid, policy, os.sched_param(0))
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))  # a session is a group of its own; nice counts only inside


def _log_file(store: Store, study: str, trials: Collection[str] | None) -> Path:
    return (store.trial(study, min(trials)).logs if trials else store.study(study)) / "delivery.log"


def _log(path: Path, text: str) -> None:
    with suppress(OSError), open(path, "a", encoding="utf-8") as file:  # a full disk must not end the delivery
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def _answers(uri: str, seconds: float) -> bool:
    """Whether a tracking server says anything at all within so many seconds; True for what is no HTTP server."""
    if not is_server(uri):
        return True
    scheme, _, rest = uri.partition("://")
    address = f"{scheme}://{rest.rpartition('@')[2].rstrip('/')}/health"
    try:
        urllib.request.urlopen(address, timeout=seconds).close()  # noqa: S310 - http or https
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)  # it speaks; MLflow may have other certificates
    return True


class _Deliverer:
    """The delivering process."""

    def __init__(self, store: Store, study: str, trials: Collection[str] | None, parent: int | None) -> None:
        self.store, self.study, self.trials, self.parent = store, study, trials, parent
        self.log = _log_file(store, study, trials)
        self.told = threading.Event()
        """to end"""
        self.failures: tuple[str, ...] = ()
        """of the last pass"""
        self.compared = False
        """with MLflow itself; from then on files tell what is new, and the server is spared"""

    def run(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        wait, last = 0.0, False
        while not last:
            last = self.told.wait(wait)
            if self.failures and not last and not _answers(tracking_uri(self.store), 10.0):
                wait = EVERY  # not ever longer: what piles up while nobody looks would hold up the end
                continue
            began = time.monotonic()
            self._pass(last)
            # a tenth of the time; ever less while MLflow fails
            wait = min(max(2 * wait if self.failures else 10 * (time.monotonic() - began), EVERY), AT_MOST)

    def _pass(self, last: bool) -> None:
        failures: tuple[str, ...] = ()
        try:
            if not self.compared or self.failures or undelivered(self.store, self.study, self.trials):
                failures = deliver(self.store, self.study, self.trials, patience=PATIENCE if last else 0.0).failed
                self.compared = True
        except Exception as error:  # a delivering process never dies of what it delivers, or to whom
            failures = (one_line(error),)
        for failure in failures:
            if failure not in self.failures:  # a server may be down for days
                _log(self.log, failure)
        if self.failures and not failures:
            _log(self.log, "delivered")
        self.failures = failures

    def _listen(self) -> None:
        """Waits for SIGTERM, or to be orphaned. A server that does not answer then must not hold up the end, not even of a pass."""
        while not signal.sigtimedwait({signal.SIGTERM}, 1.0) and self.parent in (None, os.getppid()):
            pass
        uri = tracking_uri(self.store)
        if not _answers(uri, 1.0 if self.failures else 5.0):
            _log(self.log, f"MLflow at {redacted(uri)} does not answer: the rest is left to `wrbench sync`")
            os._exit(0)  # safe at any point, see `deliver`
        self.told.set()


def main(arguments: list[str] | None = None) -> int:
    """Delivers every few seconds until told to end (SIGTERM) or orphaned, and then once more."""
    parser = argparse.ArgumentParser(prog="python -m harness.deliverer", description=main.__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("study")
    parser.add_argument("trials", nargs="*")
    parser.add_argument("--parent-pid", type=int)
    options = parser.parse_args(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _Deliverer(Store(options.store), options.study, options.trials or None, options.parent_pid).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
