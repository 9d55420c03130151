"""The arithmetic of launch.scaling: against what engines were measured to hold, and a journal that a real trial wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import journal
from harness.config import Backend
from harness.schedule import evaluations
from harness.store import Store
from harness.train import train
from launch import scaling
from tests.trials import trial

RESNET50 = 25_557_032


@pytest.mark.parametrize(
    ("backend", "megabytes"),
    [  # harness/README.md, "Bytes a rank at two ranks", measured by `make bench`: weights, gradients, AdamW's moments, fp32 copy
        ({"name": "ddp"}, (102, 102, 204, 0)),
        ({"name": "ddp", "zero_stage": 1}, (102, 102, 102, 0)),
        ({"name": "deepspeed", "zero_stage": 1}, (102, 102, 102, 51)),  # measured 109 with parts that are held twice for a while
        ({"name": "deepspeed", "zero_stage": 3}, (51, 102, 102, 51)),
        ({"name": "fsdp"}, (51, 51, 102, 0)),
    ],
)
def test_bytes_of_a_rank_are_those_measured(backend: dict[str, object], megabytes: tuple[int, ...]) -> None:
    found = scaling.memory(RESNET50, 2, Backend.model_validate(backend), 2)
    parts = [found.weights, found.gradients, found.moments, found.copy]
    assert [part / 1e6 for part in parts] == pytest.approx(megabytes, rel=0.01, abs=0.5)
    assert found.peak >= sum(parts)


def test_one_rank_sends_nothing() -> None:
    for backend in ({"name": "ddp", "zero_stage": 1}, {"name": "fsdp"}, {"name": "deepspeed", "zero_stage": 3}):
        assert scaling.traffic(1000, Backend.model_validate(backend), 1).total == 0
    assert scaling.memory(1000, 2, Backend(name="ddp", zero_stage=1), 1, 4).peak == 16_000


def test_accumulated_gradients_are_whole() -> None:
    """1,000 parameters on ten ranks, in units of a tenth: sharded weights and moments take 400 and 800 bytes."""
    peak = lambda micro, **backend: scaling.memory(1000, 2, Backend.model_validate(backend), 10, micro, 0.1).peak  # noqa: E731
    assert peak(1, name="fsdp") == pytest.approx(1200 + 400 + 3 * 400)
    assert peak(4, name="fsdp") == pytest.approx(1200 + 4000 + 3 * 400)
    assert peak(4, name="ddp") - peak(1, name="ddp") == 4000, "beside the buckets"


def test_buckets_of_deepspeed_end_at_half_a_billion() -> None:
    held = [scaling.memory(n, 2, Backend(name="deepspeed", zero_stage=1), 10**9).passing for n in (10**8, 10**9)]
    assert held == [8e8, 4e9 + 2e9]


def test_bytes_on_the_wire() -> None:
    """A ring all-reduce of 4 kB over four ranks: each sends 3/4 of it twice. Real steps: tests/integration/test_scaling.py."""
    sent = lambda micro=1, **backend: scaling.traffic(1000, Backend.model_validate(backend), 4, micro).total  # noqa: E731
    assert sent(name="ddp") == 6000
    assert sent(name="ddp", micro=8) == 6000, "accumulates before it reduces"
    assert sent(name="deepspeed", zero_stage=1, micro=8) == 9000
    assert sent(name="deepspeed", zero_stage=2, micro=8) == 51_000
    assert sent(name="deepspeed", zero_stage=3, micro=8) == 48_000
    assert sent(name="fsdp", micro=8) == 51_000
    assert sent(name="fsdp", zero_stage=2, micro=8) == 27_000


def test_rank_0_writes_all_weights_and_its_part_of_the_moments() -> None:
    assert scaling.checkpoint_bytes(1000, 2) == 12_000
    assert scaling.written_bytes(1000, 2, Backend(name="ddp"), 8) == 12_000
    assert scaling.written_bytes(1000, 2, Backend(name="fsdp", zero_stage=3), 8) == 5000


def test_what_a_step_can_hide() -> None:
    """At 1 GB/s six seconds under a backward pass need a step of nine, of which six are backward; four micro-batches four of them."""
    assert scaling.Sent(1e9, 6e9, 2e9, 6e9, 1).hiding_seconds(1e9) == pytest.approx(9.0)
    assert scaling.Sent(1e9, 6e9, 2e9, 6e9, 4).hiding_seconds(1e9) == pytest.approx(36.0)
    assert scaling.Sent(6e9, 3e9, 2e9, 3e9, 1).hiding_seconds(1e9) == pytest.approx(18.0), "the forward pass is a third"
    assert scaling.Sent(1e9, 6e9, 2e9, 6e9, 4).exposed_seconds(1e9) == pytest.approx(2.0)


def test_what_deepspeed_leaves_exposed() -> None:
    """All, below its buckets and stage 3's limits; of a network of twice a bucket, what is reduced last and gathered first."""
    at = lambda stage, n: scaling.traffic(n, Backend(name="deepspeed", zero_stage=stage), 2)  # noqa: E731
    assert all(at(stage, 10**7).exposed == at(stage, 10**7).total for stage in range(4))
    large, once = at(3, 10**9), 4e9 / 2
    assert [large.forward, large.backward, large.exposed] == pytest.approx([0.95 * once, (0.5 + 0.5) * once, 0.55 * once])


def test_fewer_pixels_cost_less() -> None:
    """Four epochs of 35 steps at 16 pixels of 32, then half an epoch of 18 steps at 32."""
    rgb = {"channels": 3, "mean": [0.5] * 3, "std": [0.3] * 3, "image_size": 32}
    ramp = {"crop": {}, "resolution": {"start": 16, "epochs": [3, 4], "multiple": 16}}
    plain, grown = (trial(data=rgb, model="resnet18", recipe=r, budget={"epochs": 4.5, "global_batch_size": 100}) for r in ({}, ramp))
    assert scaling.pixel_share(plain) == 1
    assert scaling.pixel_share(grown) == pytest.approx((140 / 4 + 18) / 158)


@pytest.mark.parametrize("every", [None, 0.5])
@pytest.mark.parametrize("optimizer", [{"name": "adam", "lr": 1e-3}, {"name": "sgd", "lr": 0.01}], ids=["adam", "sgd"])
def test_points_are_those_of_a_journal(tmp_path: Path, few: Path, every: float | None, optimizer: dict[str, object]) -> None:
    t = trial(
        data={"name": "few", "train_samples": 800, "holdout_per_class": 10, "val_samples": 200, "path": str(few)}, model="mnist5k_mlp",
        budget={"epochs": 4, "global_batch_size": 100}, schedule={"name": "cosine_restarts", "t_0": 1, "t_mult": 2}, optimizer=optimizer,
        evaluation={"every_epochs": every, "log_every_steps": 3}, checkpoint={"every_epochs": 2},
    )  # fmt: skip
    train(t, store := Store(tmp_path))
    settled = journal.fold(journal.read(store.trial(t.study, t.trial_id).journal)).settled
    on_a_gpu = 2 * len(evaluations(t))  # speed/peak_fraction, memory/peak_bytes
    assert scaling.points(t) == len(settled) + on_a_gpu
