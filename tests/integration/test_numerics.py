"""torch's switches while a trial runs, and after it; what deterministic means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import bench, engine, journal, numerics
from harness.config import Backend, BadInput
from harness.store import Store
from harness.train import train
from tests.integration.ranks import finish, history
from tests.integration.test_backends import FSDP, ZERO_2, on
from tests.integration.test_train import ADAMW, SGDW, small

Switches = dict[str, bool]


def switches() -> Switches:
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
    }


DETERMINISTIC = {
    "deterministic": True, "warn_only": False, "fill": False,
    "cudnn_deterministic": True, "cudnn_benchmark": False, "cudnn_allow_tf32": False, "matmul_allow_tf32": False,
}  # fmt: skip
FAST = {
    "deterministic": False, "cudnn_deterministic": False, "cudnn_benchmark": True, "cudnn_allow_tf32": False, "matmul_allow_tf32": False,
}  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Switches]:
    """The switches at every step of an engine in this process."""
    found: list[Switches] = []
    plain = engine.Engine.train_step

    def step(self: engine.Engine, *batch: Any, **options: Any) -> engine.Step:
        found.append(switches())
        return plain(self, *batch, **options)

    monkeypatch.setattr(engine.Engine, "train_step", step)
    return found


def test_they_are_those_of_the_trial_and_then_as_before(tmp_path: Path, few: Path, seen: list[Switches]) -> None:
    """One after the other in a process, as the debug executor runs trials; also after one that fails."""
    before = switches()
    for number, deterministic in enumerate((True, False, True)):
        t = small(few, **SGDW, backend={"deterministic": deterministic}, budget={"epochs": 1, "global_batch_size": 100})
        store = Store(tmp_path / str(number))
        assert train(t, store)["state"] == "finished"
        assert len(seen) == 7
        for now in seen:
            assert now | (DETERMINISTIC if deterministic else FAST) == now
        assert switches() == before
        (start,) = journal.fold(journal.read(store.trial(t.study, t.trial_id).journal)).starts
        assert start["deterministic"] is deterministic
        seen.clear()
    with pytest.raises(ValueError, match="in the middle"), numerics.switched(Backend(deterministic=True)):
        assert switches() == DETERMINISTIC
        with numerics.switched(Backend()):
            assert switches() | FAST == switches(), "those of the inner one"
        raise ValueError("in the middle")
    assert switches() == before


def test_fp32_is_fp32_also_in_a_container_of_nvidias() -> None:
    """Their images set it, and torch reads it once."""
    script = (
        "import torch; from harness import numerics; from harness.config import Backend; products = torch.backends.cuda.matmul\n"
        "assert products.allow_tf32\n"
        "with numerics.switched(Backend()): assert not products.allow_tf32\n"
        "assert products.allow_tf32"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, check=True, timeout=120)


def test_what_torch_cannot_switch_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with numerics.switched(Backend()):  # concerns no CPU
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BadInput, match=r"^NVIDIA_TF32_OVERRIDE: 1 "), numerics.switched(Backend()):
        pass
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with numerics.switched(Backend()):
        pass


def test_an_operation_without_a_deterministic_form_is_refused() -> None:
    source, index = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    with numerics.switched(Backend(deterministic=True)), pytest.raises(RuntimeError, match=r"put_.* does not have a deterministic"):
        torch.zeros(4).put_(index, source, accumulate=False)
    torch.zeros(4).put_(index, source, accumulate=False)


def test_it_is_measured_as_it_is_trained(few: Path, seen: list[Switches]) -> None:
    """`wrbench bench train --set backend.deterministic=true` tells what it costs."""
    bench.measure(on({"deterministic": True}, few, ADAMW), steps=1, rounds=1)
    assert seen and all(now == DETERMINISTIC for now in seen)


@pytest.mark.parametrize("backend", [{}, ZERO_2, FSDP], ids=["ddp", "deepspeed-2", "fsdp"])
def test_on_a_cpu_it_changes_no_bit_and_no_backend_needs_what_it_refuses(tmp_path: Path, few: Path, backend: dict[str, Any]) -> None:
    ends = []
    for deterministic in (False, True):
        t = on(backend | {"deterministic": deterministic}, few, ADAMW)
        result = finish(t, store := Store(tmp_path / str(deterministic)), 2)
        ends.append((result["weights_sha256"], history(store.trial(t.study, t.trial_id))))
    assert ends[0] == ends[1]
