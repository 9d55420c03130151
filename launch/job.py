"""The picklable callable a scheduler runs: one rank of one trial.

It finds its place among the ranks from submitit and everything else from the trial's folder, so that the pickle holds
names only. torch is imported in the running job, never by whoever submits it.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from harness.stopping import end_with_parent
from harness.store import Store


@dataclass(frozen=True)
class Job:
    """One life of one trial."""

    store: Path
    study: str
    trial_id: str
    threads: int
    """CPU threads of each rank"""
    token: str
    """unique: names the file at which the ranks meet, which must not be met by a later job with the same number"""

    @property
    def rendezvous(self) -> Path:
        return Store(self.store).trial(self.study, self.trial_id).logs / f"{self.token}.rendezvous"

    def __call__(self) -> str:
        """Runs this rank to the end of the attempt; the state that the trial is left in."""
        import submitit

        # Until train() listens there is nothing to save: a stop simply ends the rank (submitit would swallow it).
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent()  # submitit's controller: nobody else would end a rank that hangs
        place = submitit.JobEnvironment()
        os.environ.update(
            RANK=str(place.global_rank),
            LOCAL_RANK=str(place.local_rank),
            WORLD_SIZE=str(place.num_tasks),
            LOCAL_WORLD_SIZE=str(place.num_tasks // place.num_nodes),
            WRBENCH_JOB_ID=place.job_id,
            WRBENCH_RENDEZVOUS=f"file://{self.rendezvous.absolute()}",  # as it is: torch takes %20 for three characters of a name
        )
        return self.train()

    def train(self) -> str:
        """Trains as the rank that the environment says, or alone; the state that the trial is left in."""
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # read when torch is imported
        store = Store(self.store)
        trial = store.trial(self.study, self.trial_id).read_config()
        import torch

        from harness.train import train

        torch.set_num_threads(self.threads)
        return str(train(trial, store)["state"])
