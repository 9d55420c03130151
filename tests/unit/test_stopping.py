"""A signal raises the flag, whichever it is and however early it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from harness.stopping import StopRequest


@pytest.mark.parametrize("name", ["TERM", "USR2", "INT", "USR1"])
def test_each_signal_raises_the_flag_and_what_was_before_comes_back(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    before = signal.signal(number, signal.SIG_IGN)  # one that is not listened to must not end the test
    try:
        with StopRequest("SIGUSR1") as stop:
            assert stop.signal is None
            os.kill(os.getpid(), number)
            assert stop.signal == f"SIG{name}"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_site_may_name_a_signal_that_is_there_anyway() -> None:
    with StopRequest("USR2") as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert stop.signal == "SIGUSR2"


def test_an_unknown_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="SIGSUR1 is not a signal"):
        StopRequest("SUR1")


def test_in_another_thread_it_listens_to_nothing_and_does_no_harm() -> None:
    raised = []

    def listen() -> None:
        try:
            with StopRequest() as stop:
                assert stop.signal is None
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert raised == []


def test_a_signal_during_the_import_of_torch_is_remembered() -> None:
    """As a rank starts: it is told to stop while it has nothing to save yet, and must not be killed by that."""
    program = (
        "from harness.stopping import StopRequest\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "with StopRequest('USR1') as stop:\n"
        "    print('listening', flush=True)\n"
        "    import torch\n"
        "    print(stop.signal, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=120)[0] == "SIGUSR1\n"
    assert process.returncode == 0


def test_a_forked_child_sets_its_own_flag_and_nothing_else() -> None:
    """Signals go to every process of a job, data workers included."""
    with StopRequest() as stop:
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(go, b"x")
            while stop.signal is None:
                time.sleep(0.01)
            os._exit(7)
        assert os.read(ready, 1) == b"x"
        for number in (signal.SIGUSR2, signal.SIGTERM):
            os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert stop.signal is None


def test_a_program_started_meanwhile_survives_what_is_meant_for_the_rank() -> None:
    with StopRequest() as stop, subprocess.Popen(["sleep", "60"]) as child:
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            child.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        assert stop.signal is None
        child.kill()


def test_a_signal_that_somebody_unblocked_raises_the_flag_too() -> None:
    """As Python does in the thread that starts its resource tracker."""
    with StopRequest() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
