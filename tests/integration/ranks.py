"""Starts the ranks of one trial as real processes, so that tests can kill them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from harness.config import Trial
from harness.store import Store, TrialFolder

PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from harness.store import Store, TrialFolder
from harness.train import train
folder = TrialFolder(Path(sys.argv[2]))
result = train(folder.read_config(), Store(Path(sys.argv[1])))
print(json.dumps(result))
sys.exit(0 if result["state"] == "finished" else 3)
"""


class Ranks:
    """The processes of one attempt."""

    def __init__(self, trial: Trial, store: Store, world_size: int) -> None:
        self.folder: TrialFolder = store.trial(trial.study, trial.trial_id)
        self.folder.write_config(trial)
        rendezvous = f"file://{self.folder.logs}/rendezvous-{uuid.uuid4().hex}"
        self.processes = []
        for rank in range(world_size):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "WRBENCH_RENDEZVOUS": rendezvous, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, str(store.root), str(self.folder.path)],
                    env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Returns once the journal says that this attempt has done `step` steps."""
        deadline = time.monotonic() + seconds
        while self.folder.state().step < step:
            if any(p.poll() is not None for p in self.processes) or time.monotonic() > deadline:
                raise AssertionError(f"the trial ended before step {step}: {self.errors()}")
            time.sleep(0.002)

    def errors(self) -> str:
        for p in self.processes:
            p.kill()
        return "\n".join(p.communicate()[1][-2000:] for p in self.processes)

    def wait(self, seconds: float = 180) -> list[int]:
        """Exit codes; a process still there after `seconds` fails the test."""
        deadline = time.monotonic() + seconds
        codes = []
        for p in self.processes:
            try:
                codes.append(p.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a rank did not end within {seconds} s: {self.errors()}") from None
        return codes


def finish(trial: Trial, store: Store, world_size: int) -> dict[str, Any]:
    """Runs the trial to its end; its result.json."""
    ranks = Ranks(trial, store, world_size)
    codes = ranks.wait()
    assert codes == [0] * world_size, ranks.errors()
    result: dict[str, Any] = json.loads(ranks.folder.result.read_text())
    return result


def history(folder: TrialFolder) -> dict[tuple[str, int], float]:
    """{(metric, step): value} of what is final, without the clock's readings; every one must be there once."""
    from harness import journal

    settled = journal.fold(journal.read(folder.journal)).settled
    found = {(p.metric, p.step): p.value for p in settled if not p.metric.startswith(("time/", "data/"))}
    assert len({(p.metric, p.step) for p in settled}) == len(settled)
    return found


def fresh(tmp_path: Path, name: str) -> Store:
    return Store(tmp_path / name)
