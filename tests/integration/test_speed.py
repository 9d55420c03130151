"""What a trial says of its speed: true of a clock that is known, there at every point, and no part of its result."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import checkpoint, journal, models, speed
from harness.config import WorkloadFile, find, parse, read_yaml
from harness.data import loader
from harness.dist import Ranks as Place
from harness.schedule import evaluations
from harness.speed import Clock
from harness.store import Store
from harness.train import train
from tests.integration.ranks import finish
from tests.integration.test_backends import FSDP, ZERO_2, ZERO_3, on
from tests.integration.test_train import ADAMW, SGDW, small
from tests.trials import Told, trial

EVALUATED = {"speed/step_p50_seconds", "speed/step_p99_seconds", "speed/tflop_per_second"}
"""on a CPU"""

HERE = Place(0, 0, 1, torch.device("cpu"))


class Time:
    """Stands in for the clock of harness.speed: passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Time:
    told = Time()
    monkeypatch.setattr(speed, "time", told)
    return told


class Queue:
    """Stands in for torch.cuda: a device that works off what it is given, by the clock `at`."""

    def __init__(self, at: Time) -> None:
        self.done, self._at = 0.0, at

    def enqueue(self, seconds: float) -> None:
        self.done = max(self.done, self._at.now) + seconds

    def Event(self, blocking: bool) -> SimpleNamespace:
        assert blocking, "waiting must not keep a core busy"
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.done)
        event.synchronize = lambda: self._at.sleep(max(0.0, event.at - self._at.now))
        return event

    Stream = current_stream = staticmethod(lambda *_: SimpleNamespace(wait_stream=lambda other: None))
    stream = staticmethod(nullcontext)


def test_the_wait_for_a_device_is_none_for_data(at: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes 50 ms a step, a host that is done with one after 5 ms, and each batch read in 2 ms."""
    device = Queue(at)
    for name in ("Event", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    clock = Clock(trial(model="mnist5k_mlp"), HERE, 0.0, 0.0)
    tensor = SimpleNamespace(to=lambda *_, **__: tensor, record_stream=lambda stream: None)

    def read() -> Generator[Any, None, None]:
        for _ in range(100):
            at.sleep(0.002)
            yield tensor, tensor

    for _ in loader.on_device(read(), torch.device("cuda"), clock.waiting):
        at.sleep(0.005)
        device.enqueue(0.05)
        assert device.done - at.now <= 0.15, "three batches at most"
    assert at.now > 1000 + 97 * 0.05
    assert clock.waited == pytest.approx(100 * 0.002)


def test_on_a_cpu_the_whole_wait_is_for_data(at: Time) -> None:
    """And who lets go of the batches ends what reads them."""
    clock, ended = Clock(trial(model="mnist5k_mlp"), HERE, 0.0, 0.0), []

    def read() -> Generator[Any, None, None]:
        try:
            for number in range(3):
                at.sleep(0.5)
                yield number, number
        finally:
            ended.append(True)

    batches = loader.on_device(read(), HERE.device, clock.waiting)
    assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
    assert clock.waited == 1.0
    batches.close()
    assert ended


def test_a_known_course_of_time(at: Time) -> None:
    """Steps of 1, 2 and 5 s, of which 0.5 s wait for data; an evaluation of 100 s and a save of 10 s in between are no step's."""
    t = trial(model="mnist5k_mlp")
    model = models.build(t.workload, 0).eval()
    clock = Clock(t, HERE, 40.0, 8.0)  # the attempts before
    with clock.waiting():
        at.sleep(0.5)
    at.sleep(0.5)
    clock.step_done(28)
    at.sleep(2)
    clock.step_done(28)
    assert clock.logged() == {"time/train_seconds": 43.0, "data/wait_fraction": 8.5 / 43, "speed/images_per_second": 200 / 3}
    with clock.stopped():
        at.sleep(100)
        first = clock.evaluated(model)
    flops = 3 * 2 * (784 * 256 + 256 * 10) * 100  # by hand: three products a layer and step, of 100 images
    assert first == {
        "speed/step_p50_seconds": 1.5, "speed/step_p99_seconds": pytest.approx(1.99), "speed/tflop_per_second": flops / 1.5 / 1e12,
    }  # fmt: skip
    with clock.stopped():
        at.sleep(10)
    at.sleep(5)
    clock.step_done(28)
    assert clock.logged()["speed/images_per_second"] == 100 / 5
    with clock.stopped():
        assert clock.evaluated(model) == {
            "speed/step_p50_seconds": 5.0, "speed/step_p99_seconds": 5.0, "speed/tflop_per_second": flops / 5 / 1e12,
        }  # fmt: skip
    assert clock.seconds() == 48.0


def test_operations_are_of_the_images_that_a_step_had(at: Time) -> None:
    """A convolution over four times the pixels is four times the work, but for the border; the last layer's stays."""
    t = trial(model="resnet18", data={"image_size": 64, "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3})
    model = models.build(t.workload, 0).eval()
    found = {}
    for sizes in ((32,), (64,), (32, 64, 64)):
        clock = Clock(t, HERE, 0.0, 0.0)
        for size in sizes:
            at.sleep(1)
            clock.step_done(size)
        with clock.stopped():
            found[sizes] = clock.evaluated(model)["speed/tflop_per_second"]
    assert found[64,] / found[32,] == pytest.approx(4, rel=0.01)
    assert found[32, 64, 64] == pytest.approx((found[32,] + 2 * found[64,]) / 3)


@pytest.mark.parametrize(
    ("workload", "giga"),
    [  # three times twice the multiplications of a forward pass that torchvision's documentation and the papers print
        ("imagenet_resnet50", 6 * 4.09), ("imagenet_convnext_tiny", 6 * 4.46), ("imagenet_regnety_1_6gf", 6 * 1.61),
        ("imagenet_vit_s16", 6 * 4.6), ("cifar10_wrn28_10", 6 * 5.25),
    ],
)  # fmt: skip
def test_operations_are_those_that_are_printed_and_the_model_stays_as_it_is(workload: str, giga: float) -> None:
    described = parse(WorkloadFile, read_yaml(find("workload", workload)), workload)
    model = models.build(described, 0).eval()
    before, drawn = checkpoint.weights_sha256(model.state_dict()), torch.get_rng_state()
    assert speed.flops_an_image(model, described.data.channels, described.data.image_size) == pytest.approx(giga * 1e9, rel=0.02)
    assert checkpoint.weights_sha256(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not model.training and all(p.device.type == "cpu" and p.grad is None for p in model.parameters())


def test_every_point_is_there_also_of_a_trial_that_is_resumed(tmp_path: Path, few: Path) -> None:
    t, store, stop = small(few, **ADAMW, evaluation={"log_every_steps": 2, "batch_size": 100}), Store(tmp_path), Told(0)
    folder = store.trial(t.study, t.trial_id)
    for _ in range(2):  # each stops at its first logged point
        assert train(t, store, stop=stop)["state"] == "interrupted"
    metrics = train(t, store)["metrics"]
    assert EVALUATED | {"speed/images_per_second"} <= metrics.keys()
    assert not {"speed/peak_fraction", "memory/peak_bytes"} & metrics.keys(), "on a CPU"
    points = journal.fold(journal.read(folder.journal)).settled
    values = {(p.metric, p.step): p.value for p in points}
    assert all(value > 0 for (metric, _), value in values.items() if metric.startswith("speed/"))
    for metric in EVALUATED:
        assert sorted(step + 1 for name, step in values if name == metric) == sorted(evaluations(t))
    for end in evaluations(t):
        assert values["speed/step_p50_seconds", end - 1] <= values["speed/step_p99_seconds", end - 1]
    attempts = {p.step: p.attempt for p in points if p.metric == "time/train_seconds"}
    assert sorted(attempts.values()) == [1, 2] + [3] * (len(attempts) - 2)
    for last, step in itertools.pairwise(sorted(attempts)):  # no second between two points is missing, and none counts twice
        images = values["speed/images_per_second", step] * (values["time/train_seconds", step] - values["time/train_seconds", last])
        if attempts[last] == attempts[step]:
            assert images == pytest.approx(100 * (step - last))
        else:  # some pass between a point and the save
            assert images >= 100 * (step - last)


@pytest.mark.parametrize("backend", [{}, ZERO_2, ZERO_3, FSDP], ids=["ddp", "deepspeed-2", "deepspeed-3", "fsdp"])
def test_no_bit_depends_on_it(tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch, backend: dict[str, Any]) -> None:
    """With batch norm, two evaluations a cycle and on every backend, whose models are wrapped or sharded."""
    t = on(backend, few, SGDW, evaluation={"every_epochs": 0.5, "batch_size": 100})
    said = train(t, Store(tmp_path / "said"))
    assert said["metrics"].keys() >= EVALUATED
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "evaluated", lambda self, model: {})
        silent = train(t, Store(tmp_path / "silent"))
    assert not EVALUATED & silent["metrics"].keys()
    assert said["weights_sha256"] == silent["weights_sha256"]


def test_two_ranks_share_the_work(tmp_path: Path, few: Path) -> None:
    """Operations are a rank's, images/s are everybody's."""
    t = small(
        few, **ADAMW, budget={"epochs": 1, "global_batch_size": 100}, schedule={"name": "constant"}, evaluation={"log_every_steps": 7}
    )
    metrics = finish(t, Store(tmp_path), 2)["metrics"]
    a_step = speed.flops_an_image(models.build(t.workload, 0).eval(), 1, 28) * 50
    steps_a_second = metrics["speed/tflop_per_second"] * 1e12 / a_step
    assert steps_a_second == pytest.approx(metrics["speed/images_per_second"] / 100, rel=0.3)


def test_a_compiled_model_is_counted_as_it_was_written() -> None:
    t = trial(model="mnist5k_cnn_bn")
    model = models.build(t.workload, 0).eval()
    plain = speed.flops_an_image(model, 1, 28)
    model.compile()
    assert speed.flops_an_image(model, 1, 28) == plain > 1e6


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("Tesla T4", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peaks_by_name(name: str, tera: float | None) -> None:
    assert speed.peak(name) == (tera and tera * 1e12)
