"""`wrbench bench train`: three loops side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import bench, engine
from harness.data import loader
from harness.dist import Ranks
from tests.integration.test_train import ADAMW, small
from tests.trials import trial


def test_the_three_take_turns_on_what_they_say(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On shards every step has a batch of its own, in the trial's order and again from the first; at hand all have the same."""
    t = small(few, **ADAMW, backend={"micro_batch_size": 50})
    seen: list[bytes] = []
    plain = engine.Engine.train_step

    def step(self: engine.Engine, images, labels, **options):  # type: ignore[no-untyped-def]
        seen.append(images.numpy().tobytes())
        return plain(self, images, labels, **options)

    monkeypatch.setattr(engine.Engine, "train_step", step)
    told: list[tuple[int, int]] = []
    measured = bench.measure(t, steps=9, rounds=2, progress=lambda done, total: told.append((done, total)))
    batches = [images.numpy().tobytes() for images, _ in loader.train_batches(loader.open_data(t.workload.data), t, 0, 1, 0, 21)]
    at_hand = [content for content in seen if content == batches[0]]
    assert len(seen) == 2 * 3 * 9
    assert len(at_hand) == 27 + 2, "and twice among those of the shards: the first, and the first again after 21"
    read = [content for content in seen if content != batches[0]]
    assert read == batches[1:21] + batches[1:6]
    assert sorted(told) == [(n, 9) for n in range(1, 10)]
    for kind in bench.KINDS:
        assert len(measured.images_per_second[kind]) == 2
        assert len(measured.step_seconds[kind]) == 18
        assert all(0 < a <= b for a, b in zip(measured.host_seconds[kind], measured.step_seconds[kind], strict=True)), "no wait for a batch"
        assert 100 / max(measured.step_seconds[kind]) <= min(measured.images_per_second[kind])
    assert 0 < measured.wait_fraction < 1
    assert sum(measured.host_seconds[bench.KINDS[0]]) < (1 - measured.wait_fraction) * sum(measured.step_seconds[bench.KINDS[0]])
    assert measured.read_per_second > 0
    assert measured.peak_bytes is None


@pytest.mark.parametrize("ready", [4, 32])
def test_what_was_read_ahead_is_not_counted(monkeypatch: pytest.MonkeyPatch, ready: int) -> None:
    """`ready` batches at once and then one every half second: 100 images of each are 200 a second."""
    now = 0.0

    def read() -> Iterator[loader.Batch]:
        nonlocal now
        for number in range(60):
            now += 0.5 * (number >= ready)
            yield torch.zeros(0), torch.zeros(0)

    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: now))
    assert bench._reading(read(), ready, 20, trial(), Ranks(0, 0, 1, torch.device("cpu"))) == 200


def test_of_a_device_the_host_s_part_is_told() -> None:
    one = {kind: [0.01] for kind in bench.KINDS}
    found = bench.Measured(one, one, {kind: [0.0025] for kind in bench.KINDS}, 12345.6, 0.25, 1e12, "NVIDIA H100", 2 * 10**9)
    lines = list(found.lines())
    assert "step p50 10.00 ms, 2.50 ms of it the host's, p99 10.00 ms" in lines[0]
    assert "waiting for data: 25.0% of the loop on shards, read at 12,346 images/s while nothing trains; " in lines[-1]


def test_what_is_printed(few: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "launch", "bench", "train", "demo", "--steps", "3", "--rounds", "1",
        "--set", f"workload.data.path={few}", "--set", "workload.data.train_samples=800", "--set", "workload.data.val_samples=200",
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout.splitlines()
    assert out[0] == "mnist5k_cnn, AdamWR: mnist5k_cnn, batch 100, ddp"
    assert [line.partition("  ")[0] for line in out[1:4]] == list(bench.KINDS)
    assert "time of our step / of the bare one" in out[4]
    assert "the host's" not in out[1]
    assert "images/s while nothing trains" in out[5]
    assert "its peak is not known here" in out[5]
