"""launch.scaling against real steps: bytes on the wire of two ranks, and the most that a rank holds."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as td
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from harness import config, engine
from harness.backends import ddp, zero
from harness.config import Trial
from harness.dist import Ranks
from launch import scaling
from tests.benchmarks.shard_rank import LINEAR, batch, replaced_model
from tests.benchmarks.sharding import make
from tests.equivalence import groups
from tests.equivalence.problem import Backend
from tests.integration import ranks  # noqa: F401 - its list of preloaded modules must not come after this one's

groups.preload()

WIDTH, DEPTH = LINEAR["linear1"] = 256, 30  # 2M parameters, biases aside above DeepSpeed's persistence threshold
UNIT = WIDTH**2 / (DEPTH * WIDTH**2 + 192 * WIDTH)
"""share of a layer, which is a unit of FSDP's, a bucket of nobody's"""
CASES = [(Backend(name, stage), m) for name, can in config.SUPPORTED.items() for stage in can.stages for m in (1, 4)]
IDS = [f"{backend} {m}" for backend, m in CASES]
LIMITS = {"BUCKET": 4, "LIVE": 2, "PREFETCH": 8}
"""of DeepSpeed 3, as parts of the network instead of by the hundred million"""


def accumulating(backend: Backend, micro_batches: int, world: int) -> Trial:
    t = make("linear1", backend, "AdamW", batch=4 * world)
    return t.model_copy(update={"backend": t.backend.model_copy(update={"micro_batch_size": 4 // micro_batches})})


def built(t: Trial, place: Ranks) -> tuple[engine.Engine, int]:
    """And its number of parameters."""
    with replaced_model("linear1"):
        worker = engine.build(t, place)
    return worker, sum(getattr(p, "ds_numel", p.numel()) for p in worker._model.parameters())


# ------------------------------------------------------------------------------------------------- the wire


class Wire(TorchDispatchMode):
    """Bytes that collectives carry, an all-reduce's twice, by what hides them: see launch.scaling.Sent.

    What the forward pass sends before its first product hides under nothing; DeepSpeed's last reductions come after autograd's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"forward": 0, "backward": 0, "exposed": 0}
        self.forward = self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            backward = torch._C._current_autograd_node() is not None
            phase = "backward" if backward else "forward" if self.forward and self.computes else "exposed"
            self.sent[phase] += max(map(_bytes, args)) * (1 + func.__name__.startswith("allreduce_"))
        self.computes |= func.__name__.startswith(("addmm", "mm"))
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


@dataclass(frozen=True)
class Counted:
    """The third step of a trial: (parameters, Wire.sent)."""

    name: str
    trial: Trial
    limited: bool = False

    world = 2
    needs = ()
    cost = 1
    group = ("wire",)

    def execute(self, place: Ranks, root: Path) -> tuple[int, dict[str, int]]:
        with limits() if self.limited else mock.patch.dict({}):
            worker, parameters = built(self.trial, place)
        wire, forward = Wire(), worker._forward

        def watched(images: Tensor, last: bool) -> Tensor:
            wire.forward, wire.computes = True, False
            logits = forward(images, last)
            wire.forward = False
            return logits

        worker._forward = watched  # type: ignore[method-assign]
        for _ in range(2):  # DeepSpeed 3 gathers ahead from the third step on
            worker.train_step(*batch(self.trial, place), lr=1e-6, weight_decay=1e-6, step=0)
        with wire:
            worker.train_step(*batch(self.trial, place), lr=1e-6, weight_decay=1e-6, step=0)
        return parameters, wire.sent


@contextmanager
def limits() -> Iterator[None]:
    """DeepSpeed's limits as parts of the network."""
    plain = zero.DeepSpeedEngine._config

    def limited(self: zero.DeepSpeedEngine) -> dict[str, Any]:
        block, elements = plain(self), sum(p.numel() for p in self._named.values())
        bucket, live, prefetch = (elements // part for part in LIMITS.values())
        block["zero_optimization"] |= {
            "reduce_bucket_size": bucket, "stage3_max_live_parameters": live, "stage3_max_reuse_distance": live,
            "stage3_prefetch_bucket_size": prefetch,
        }  # fmt: skip
        return block

    with mock.patch.object(zero.DeepSpeedEngine, "_config", limited):
        yield


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = [Counted(name, accumulating(*case, world=2)) for name, case in zip(IDS, CASES, strict=True)]
    runs.append(Counted("limited", accumulating(Backend("deepspeed", 3), 1, world=2), limited=True))
    return groups.execute(runs, tmp_path_factory.mktemp("wire"), "cpu", 2, lambda run: None)


@pytest.mark.parametrize(("backend", "micro_batches"), CASES, ids=IDS)
def test_bytes_on_the_wire_of_a_real_step(counted: dict[str, Any], backend: Backend, micro_batches: int) -> None:
    """Limits: 2 % of all, for norms of gradients and kept biases; of a part, one unit of FSDP's at either end of every pass."""
    parameters, sent = counted[f"{backend} {micro_batches}"]
    expected = scaling.traffic(parameters, config.Backend(name=backend.name, zero_stage=backend.stage), 2, micro_batches)
    once = 4 * parameters / 2
    found = {what: count / 2 for what, count in sent.items()}  # a half of a payload leaves a rank of two
    assert sum(found.values()) == pytest.approx(expected.total, rel=0.02), (found, expected)
    ends = (2 * UNIT + 0.02) * once * micro_batches
    for what, count in found.items():
        assert count == pytest.approx(getattr(expected, what), abs=ends), what


def test_a_network_beyond_the_limits_of_deepspeed_3(counted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of it is reduced at once, a half kept: bounds, since what is gathered early is kept too and buckets are not full."""
    parameters, sent = counted["limited"]
    for name, part in LIMITS.items():
        monkeypatch.setattr(scaling, name, parameters // part)
    expected = scaling.traffic(parameters, config.Backend(name="deepspeed", zero_stage=3), 2)
    assert 0.85 * expected.total <= sum(sent.values()) / 2 <= expected.total


# --------------------------------------------------------------------------------------------------- memory

PEAK_WORLD = 4


def _done(_, bucket):  # type: ignore[no-untyped-def]  # torch wants its own types here, or none
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class Local(DistributedDataParallel):
    """With a reduction that torch's fake group can do: none."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, _done)  # type: ignore[arg-type]


def peaks() -> None:
    """Prints, for every case, its parameters and the most bytes that torch held since before the engine was built.

    One rank of PEAK_WORLD whose peers do not exist: gloo's threads would let go of tensors at times of their own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", WORLD_SIZE=str(PEAK_WORLD))
    td.init_process_group("fake", store=FakeStore(), rank=0, world_size=PEAK_WORLD)
    place, found = Ranks(0, 0, PEAK_WORLD, torch.device("cpu")), []
    for backend, micro_batches in CASES:
        t = accumulating(backend, micro_batches, PEAK_WORLD)
        gc.collect()
        with (
            mock.patch.object(ddp, "DistributedDataParallel", Local),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
        ):
            worker, parameters = built(t, place)
            for step in range(3):
                with record_function(f"step {step}"):
                    worker.train_step(*batch(t, place), lr=1e-6, weight_decay=1e-6, step=step)
        del worker
        held = most = 0
        events = list(seen.profiler.kineto_results.events())
        (began,) = (e.start_ns() for e in events if e.name() == "step 1")
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held if event.start_ns() > began else 0)
        found.append((parameters, most))
    print(json.dumps(found))


@pytest.fixture(scope="module")
def peak() -> dict[str, Any]:
    program = "from tests.integration.test_scaling import peaks; peaks()"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    return dict(zip(IDS, json.loads(out.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("backend", "micro_batches"), CASES, ids=IDS)
def test_the_most_that_a_rank_holds(peak: dict[str, Any], backend: Backend, micro_batches: int) -> None:
    """Limit 4 %: activations and inputs of four samples, a layer's gradient on its way, kept biases."""
    parameters, most = peak[f"{backend} {micro_batches}"]
    block = config.Backend(name=backend.name, zero_stage=backend.stage)
    expected = scaling.memory(parameters, 2, block, PEAK_WORLD, micro_batches, UNIT)
    assert most == pytest.approx(expected.peak, rel=0.04), (most / parameters / 4, expected.peak / parameters / 4)
