"""`make bench`: what the harness costs, as ratios measured side by side in one run. Writes build/bench.json.

loop       train() on mnist5k_cnn at the demo's batch, two ranks, journal and MLflow delivery on, against a bare
           PyTorch loop of the same model and batches: five interleaved pairs, after one that is not counted
optimizer  one step of each (optimizer, decay) against torch's fused SGD or AdamW on tensors like a ResNet-50's, one thread
estimate   what `study plan` says a trial takes, from a probe of 20 steps, beside what it takes
sharding   bytes a rank, time of an update and stall of a save of every backend and stage (sharding.py)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from harness import deliverer, journal, study, tracking
from harness.config import Trial
from harness.schedule import total_steps
from harness.store import Store
from harness.train import train
from launch import plan
from tests.benchmarks import fused, sharding
from tests.report import Row, publish, row, spread

PAIRS = 5
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""of glibc, for both loops: it keeps large blocks once larger ones have been freed, which evaluation does and a bare loop
does not; left to itself that alone makes the bare loop a third slower"""


# ---------------------------------------------------------------------------------------------------- loop


def run_loop(kind: str, t: Trial, store: Store, world: int = 2) -> np.ndarray:
    """Seconds of each step, all ranks' intervals together."""
    folder = store.trial(t.study, t.trial_id)
    folder.write_config(t)
    env = (
        os.environ
        | ALLOCATOR
        | {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "WRBENCH_RENDEZVOUS": f"file://{folder.logs}/{uuid.uuid4().hex}"}
    )
    command = [sys.executable, "-m", "tests.benchmarks.loop_rank", kind, str(store.root), str(folder.path)]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in range(world)
    ]
    return np.concatenate([json.loads(p.communicate(timeout=600)[0].splitlines()[-1])["steps"] for p in ranks])


def loop() -> list[Row]:
    longer = study.load("configs/study/demo.yaml", ["budget.epochs=15"])
    demo = next(p.trial for p in study.planned(longer, {}) if p.trial is not None)
    means: list[float] = []
    tails: list[float] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        store = Store(Path(root))
        tracking.deliver(store, demo.study)  # makes the database, which no step should wait for
        with deliverer.start_delivery(store, demo.study):
            for pair in track(range(PAIRS + 1), "loop: ours against bare", disable=not sys.stderr.isatty()):
                t = demo.model_copy(update={"seed": pair})
                kinds = ("ours", "bare") if pair % 2 else ("bare", "ours")
                steps = {kind: run_loop(kind, t, store) for kind in kinds}
                if pair:
                    means.append(float(np.median(steps["ours"]) / np.median(steps["bare"])))
                    tails.append(float(np.quantile(steps["ours"], 0.99) / np.quantile(steps["bare"], 0.99)))
                    notes.append(f"{1e3 * np.median(steps['ours']):.2f}/{1e3 * np.median(steps['bare']):.2f}")
    return [
        row("loop, median step", statistics.median(means), 1.03, f"{spread(means)}; ms ours/bare: {', '.join(notes)}"),
        row("loop, p99 step", statistics.median(tails), 1.1, spread(tails)),
    ]


def optimizers() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for case in fused.CASES for row in fused.compare(case, fused.resnet(1), torch.device("cpu"), 8 * PAIRS)]
    finally:
        torch.set_num_threads(threads)


def estimate() -> list[Row]:
    """Of a trial of the other arm and 105 steps, from a probe of 20 steps in another study of the same store."""
    off, notes = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(PAIRS):
            with tempfile.TemporaryDirectory() as root:
                store, seed = Store(Path(root)), [f"search.seeds=[{number}]"]
                probe = study.load(
                    "configs/study/demo.yaml", [*seed, "name=probe", f"budget.epochs={20 / 35}", "evaluation.every_epochs=null"]
                )
                other = study.load("configs/study/demo.yaml", [*seed, "budget.epochs=3"])
                one, judged = (
                    next(p.trial for p in study.planned(s, {}) if p.trial and p.arm == arm)
                    for s, arm in ((probe, "AdamWR"), (other, "SGDWR"))
                )
                train(one, store)
                per_step = plan.measured_seconds_per_step(judged, 1, store)
                assert per_step is not None
                expected = per_step * total_steps(judged)
                train(judged, store)
                settled = journal.fold(journal.read(store.trial(judged.study, judged.trial_id).journal)).settled
                took = max(p.value for p in settled if p.metric == "time/train_seconds")
                off.append(abs(expected / took - 1))
                notes.append(f"{expected:.2f}/{took:.2f}")
    finally:
        torch.set_num_threads(threads)
    return [
        row(
            "study plan's estimate from a probe of 20 steps: off by",
            statistics.median(off),
            0.25,
            f"{spread(off)}; s estimated/measured: {', '.join(notes)}",
        )
    ]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "optimizer": optimizers,
    "loop": loop,
    "estimate": estimate,
    "sharding": lambda: sharding.rows("cuda" if torch.cuda.is_available() else "cpu"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := [section for section in chosen if section not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}; valid: {', '.join(SECTIONS)}")
    rows = {section: SECTIONS[section]() for section in chosen}
    in_tables = [r for r in rows.get("sharding", []) if r.limit is None and not r.refused]
    return publish("bench", [r for found in rows.values() for r in found], in_tables)


if __name__ == "__main__":
    sys.exit(main())
