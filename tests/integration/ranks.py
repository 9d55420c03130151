"""Starts the ranks of one trial as real processes, so that tests can kill them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from harness import journal
from harness.config import Trial
from harness.store import Store, TrialFolder

os.environ.setdefault("DS_ACCELERATOR", "cpu")
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch._dynamo", "harness.train", "deepspeed"])  # imported once: a rank starts in a tenth of a second


SUPERSEDED = 4


def _rank(env: dict[str, str], root: str, folder: str, log: str, takes_over: bool) -> None:
    """A rank, in a process of its own. Exits 0 when the trial is finished, 3 when it was stopped, SUPERSEDED, 1 when it raised."""
    import torch

    from harness.checkpoint import Superseded
    from harness.train import train

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        state = train(TrialFolder(Path(folder)).read_config(), Store(Path(root)), takes_over=takes_over)["state"]
    except Superseded as newer:
        print(newer)
        sys.exit(SUPERSEDED)
    sys.exit(0 if state == "finished" else 3)


class Ranks:
    """The processes of one attempt."""

    def __init__(self, trial: Trial, store: Store, world_size: int, takes_over: bool = False, daemon: bool = True) -> None:
        """daemon: ends with this process, and may have no processes of its own."""
        self.folder: TrialFolder = store.trial(trial.study, trial.trial_id)
        self.folder.write_config(trial)
        self._attempts_before = len(self._record().starts)
        unique = uuid.uuid4().hex
        self.logs = [self.folder.logs / f"{unique}-{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            env = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "WRBENCH_RENDEZVOUS": f"file://{self.folder.logs}/{unique}", "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            arguments = (env, str(store.root), str(self.folder.path), str(log), takes_over)
            process = _server.Process(target=_rank, args=arguments, daemon=daemon)
            process.start()
            self.processes.append(process)

    def _record(self) -> journal.Record:
        return journal.fold(journal.read(self.folder.journal))

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Returns once the journal says that this attempt has done `step` steps."""
        deadline = time.monotonic() + seconds
        while len((record := self._record()).starts) == self._attempts_before or record.steps_done < step:
            if any(p.exitcode is not None for p in self.processes) or time.monotonic() > deadline:
                raise AssertionError(f"the trial ended before step {step}: {self.errors()}")
            time.sleep(0.002)

    def signal_all(self, number: signal.Signals) -> None:
        for rank in range(len(self.processes)):
            self.signal(rank, number)

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def errors(self) -> str:
        return "\n".join(log.read_text()[-2000:] for log in self.logs)

    def wait(self, seconds: float = 180) -> list[int]:
        """Exit codes, as wait() gives them; a process still there after `seconds` fails the test."""
        deadline = time.monotonic() + seconds
        for p in self.processes:
            p.join(max(0.1, deadline - time.monotonic()))
        late = [p for p in self.processes if p.exitcode is None]
        for p in late:
            p.kill()
        assert not late, f"{len(late)} rank(s) did not end within {seconds} s: {self.errors()}"
        return [int(p.exitcode or 0) for p in self.processes]


def finish(trial: Trial, store: Store, world_size: int) -> dict[str, Any]:
    """Runs the trial to its end; its result.json."""
    ranks = Ranks(trial, store, world_size)
    codes = ranks.wait()
    assert codes == [0] * world_size, ranks.errors()
    result: dict[str, Any] = json.loads(ranks.folder.result.read_text())
    return result


def history(folder: TrialFolder) -> dict[tuple[str, int], float]:
    """{(metric, step): value} of what is final, without the clock's readings; every one must be there once."""
    settled = journal.fold(journal.read(folder.journal)).settled
    found = {(p.metric, p.step): p.value for p in settled if not p.metric.startswith(("time/", "data/", "speed/", "memory/"))}
    assert len({(p.metric, p.step) for p in settled}) == len(settled)
    return found
