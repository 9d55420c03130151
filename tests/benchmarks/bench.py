"""`make bench`: what the harness costs, as ratios measured side by side in one run. Writes build/bench.json.

loop       train() on mnist5k_cnn at the demo's batch, two ranks, journal and MLflow delivery on, against a bare
           PyTorch loop of the same model and batches: five interleaved pairs, after one that is not counted
optimizer  one step of each (optimizer, decay) against torch's fused SGD or AdamW on the same tensors
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from harness import optim, study, tracking
from harness.config import Trial
from harness.schedule import schedule
from harness.store import Store
from tests.trials import trial

PAIRS = 5
REPORT = Path("build/bench.json")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""of glibc, for both loops: it keeps large blocks once larger ones have been freed, which evaluation does and a bare loop
does not; left to itself that alone makes the bare loop a third slower"""


def row(name: str, figure: float, limit: float, note: str) -> dict[str, Any]:
    return {"name": name, "figure": round(figure, 4), "limit": limit, "ok": bool(figure <= limit), "note": note}


def spread(ratios: list[float]) -> str:
    return f"median of {len(ratios)} pairs, from {min(ratios):.3f} to {max(ratios):.3f}"


# ---------------------------------------------------------------------------------------------------- loop


def run_loop(kind: str, t: Trial, store: Store) -> np.ndarray:
    """Seconds of each step, both ranks' intervals together."""
    folder = store.trial(t.study, t.trial_id)
    folder.write_config(t)
    env = (
        os.environ
        | ALLOCATOR
        | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "WRBENCH_RENDEZVOUS": f"file://{folder.logs}/{uuid.uuid4().hex}"}
    )
    command = [sys.executable, "-m", "tests.benchmarks.loop_rank", kind, str(store.root), str(folder.path)]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in (0, 1)]
    return np.concatenate([json.loads(p.communicate(timeout=600)[0].splitlines()[-1])["steps"] for p in ranks])


def loop() -> list[dict[str, Any]]:
    longer = study.load("configs/study/demo.yaml", ["budget.epochs=15"])
    demo = next(p.trial for p in study.planned(longer, {}) if p.trial is not None)
    means: list[float] = []
    tails: list[float] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        store = Store(Path(root))
        tracking.deliver(store, demo.study)  # makes the database, which no step should wait for
        with tracking.start_delivery(store, demo.study):
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


# ----------------------------------------------------------------------------------------------- optimizer

DECAYS = {
    "L2": {"name": "l2", "weight_decay": 0.01},
    "raw": {"name": "decoupled", "weight_decay": 0.001},
    "normalised": {"name": "decoupled", "weight_decay": 0.05, "normalised": True},
}


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    """24M parameters in the shapes of a ResNet-50's larger layers, and norms."""
    shapes = (
        [(512, 512, 3, 3)] * 3 + [(2048, 1024), (1024, 256, 3, 3), (1000, 2048), (2048, 512), (1024, 2048), (2048, 2048)] + [(512,)] * 50
    )
    torch.manual_seed(0)
    return [(str(i), torch.nn.Parameter(torch.randn(s))) for i, s in enumerate(shapes)]


def one_step(built: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    built.step()
    return time.perf_counter() - start


def optimizer(name: str, block: dict[str, Any], decay: str, limit: float) -> dict[str, Any]:
    t = trial(optimizer=block, decay=DECAYS[decay])
    ours_parameters, their_parameters = parameters(), parameters()
    for _, p in ours_parameters + their_parameters:
        p.grad = torch.randn_like(p) * 1e-3
    ours = optim.build(ours_parameters, t.optimizer, t.decay)
    theirs: torch.optim.Optimizer
    if block["name"] == "sgd":
        theirs = torch.optim.SGD([p for _, p in their_parameters], lr=block["lr"], momentum=0.9, weight_decay=0.01, fused=True)
    else:
        theirs = torch.optim.AdamW([p for _, p in their_parameters], lr=block["lr"], weight_decay=0.01, fused=True)
    eta, _, lam = schedule(t, 17)
    optim.write(ours, *optim.hyperparameters(t.optimizer, t.decay, eta, lam))
    ratios, milliseconds = [], []
    for i in range(3 + 4 * PAIRS):
        a, b = one_step(ours), one_step(theirs)
        if i >= 3:
            ratios.append(a / b)
            milliseconds.append(1e3 * a)
    note = f"{spread(ratios)}; {statistics.median(milliseconds):.1f} ms, {sum(p.numel() for _, p in ours_parameters) / 1e6:.0f}M parameters"
    return row(f"step {name} {decay} / torch fused {type(theirs).__name__}", statistics.median(ratios), limit, note)


def optimizers() -> list[dict[str, Any]]:
    sgd, adam = {"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.001}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            optimizer("SGD", sgd, "L2", 1.1),
            optimizer("SGDW", sgd, "raw", 1.4),
            optimizer("SGDW", sgd, "normalised", 1.4),
            optimizer("Adam", adam, "L2", 1.1),
            optimizer("AdamW", adam, "raw", 1.1),
            optimizer("AdamW", adam, "normalised", 1.1),
        ]
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    rows = optimizers() + loop()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(rows, indent=1) + "\n")
    for r in rows:
        print(f"{'ok  ' if r['ok'] else 'FAIL'} {r['name']:<52} {r['figure']:7.3f} <= {r['limit']:<5} {r['note']}")
    worst = max(rows, key=lambda r: r["figure"] / r["limit"])
    passed = all(r["ok"] for r in rows)
    print(
        f"{'PASS' if passed else 'FAIL'} bench: {len(rows)} cells, 0 refused, worst {worst['name']} {worst['figure']:.3f} of {worst['limit']}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
