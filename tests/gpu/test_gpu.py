"""What only a GPU can show. `make gpu-check` runs these; nothing else does."""

from __future__ import annotations

import pytest
import torch

from harness import checkpoint, engine, models, numerics, speed
from harness.data import loader, order
from harness.dist import Ranks, joined
from harness.speed import Clock
from tests.trials import trial


@pytest.mark.parametrize("model", ["resnet50", "vit_s16", "convnext_tiny"])
def test_two_runs_have_the_same_bits(model: str) -> None:
    """Each network's step, in bf16, with mixup: nothing in it is refused, and ten steps give the same weights twice."""
    t = trial(
        data={"image_size": 64, "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3}, model=model,
        recipe={"precision": "bf16", "mixup": 0.2}, backend={"deterministic": True, "channels_last": True},
    )  # fmt: skip
    images = torch.randint(0, 256, (100, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = set()
    for _ in range(2):
        with joined(45) as ranks, numerics.switched(t.backend):
            worker = engine.build(t, ranks)
            for step in range(10):
                mix = order.mixing(t.seed, step, t.workload.recipe.mixup, t.workload.recipe.cutmix, 64)
                worker.train_step(images, torch.arange(100) % 10, lr=1e-3, weight_decay=0.1, step=step, mix=mix)
            found.add(checkpoint.weights_sha256(worker.evaluation_model().state_dict()))
    assert len(found) == 1


@pytest.mark.parametrize("model", ["resnet50", "vit_s16", "convnext_tiny"])
def test_a_step_does_not_wait_for_the_device(model: str) -> None:
    """With clipping, smoothing, mixup and random layers; torch raises at whatever makes the host wait."""
    t = trial(
        data={"image_size": 64, "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3}, model=model,
        recipe={"precision": "bf16", "mixup": 0.2, "label_smoothing": 0.1, "clip_norm": 1.0}, backend={"channels_last": True},
    )  # fmt: skip
    with joined(45) as ranks, numerics.switched(t.backend):
        worker = engine.build(t, ranks)
        images = torch.randint(0, 256, (100, 3, 64, 64), dtype=torch.uint8, device=ranks.device)
        labels = torch.arange(100, device=ranks.device) % 10
        try:
            for step in range(6):
                torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")  # before, kernels are chosen and state is made
                mix = order.mixing(t.seed, step, t.workload.recipe.mixup, t.workload.recipe.cutmix, 64)
                worker.train_step(images, labels, lr=1e-3, weight_decay=0.1, step=step, mix=mix)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_as_long_as_the_device_takes_and_the_host_does_not_wait() -> None:
    """Steps of many products that the host only enqueues: events know how long they took, the host's clock does not."""
    device = torch.device("cuda", torch.cuda.current_device())
    t = trial(model="mnist5k_mlp")
    model, a = models.build(t.workload, 0).to(device).eval(), torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    clock = Clock(t, Ranks(0, 0, 1, device), 0.0, 0.0)
    for _ in range(20):
        for _ in range(10):
            a @ a
        clock.step_done(28)
    enqueued = clock.seconds()
    torch.cuda.synchronize()
    took = clock.seconds()
    rate = clock.logged()["speed/images_per_second"]
    with clock.stopped():
        said = clock.evaluated(model)
    assert enqueued < took / 2
    assert said["speed/step_p50_seconds"] == pytest.approx(took / 20, rel=0.2)
    assert rate == pytest.approx(20 * 100 / took, rel=0.05)
    assert said["memory/peak_bytes"] >= 2 * a.nbytes
    found = speed.peak(torch.cuda.get_device_name(device))
    assert said.get("speed/peak_fraction") == (found and said["speed/tflop_per_second"] * 1e12 / found)


def test_the_wait_for_the_device_is_none_for_data() -> None:
    """Batches that are all ready, and a device that is busy: the host waits, but for no batch. The batches arrive as they were."""
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    clock = Clock(trial(), Ranks(0, 0, 1, device), 0.0, 0.0)
    numbers = [(torch.full((64, 3, 32, 32), n, dtype=torch.uint8).pin_memory(), torch.full((64,), n).pin_memory()) for n in range(30)]
    sums = []
    for images, labels in loader.on_device((batch for batch in numbers), device, clock.waiting):
        for _ in range(50):
            a @ a
        sums.append(images.sum() + labels.sum())
    torch.cuda.synchronize()
    assert [int(found) for found in sums] == [n * 64 * (3 * 32 * 32 + 1) for n in range(30)]
    assert clock.waited < 0.05 * clock.seconds()
