"""Ranks that compile nothing start without torch's compiler; those that do, and whoever else asks for it, have the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.store import Store
from tests.integration.test_backends import ZERO_1, ZERO_3, on
from tests.integration.test_train import ADAMW, SGDW

HEAVY = ("torch._dynamo", "torch._inductor", "mlflow")

RANK = f"""
import sys
from pathlib import Path
from harness.store import Store, TrialFolder
from harness.train import train
train(TrialFolder(Path(sys.argv[2])).read_config(), Store(Path(sys.argv[1])))
print("loaded:", *(name for name in {HEAVY} if name in sys.modules))
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


L2 = {"decay": {"name": "l2", "weight_decay": 1e-4}}
SHARDED = {"name": "ddp", "zero_stage": 1}


@pytest.mark.parametrize(
    ("backend", "arm"),
    [({}, ADAMW | L2), (SHARDED, SGDW), (ZERO_1, SGDW), (ZERO_3, ADAMW)],
    ids=["ddp", "ddp-1", "deepspeed-1", "deepspeed-3"],  # not FSDP, whose sharded tensors ask the compiler for their shapes
)
def test_a_rank_imports_no_compiler(tmp_path: Path, few: Path, backend: dict[str, Any], arm: dict[str, Any]) -> None:
    t, store = on(backend, few, arm), Store(tmp_path)
    folder = store.trial(t.study, t.trial_id)
    folder.write_config(t)
    meeting = {"WORLD_SIZE": "2", "WRBENCH_RENDEZVOUS": f"file://{tmp_path}/meet", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [run(RANK, str(tmp_path), str(folder.path), RANK=str(n), LOCAL_RANK=str(n), **meeting) for n in range(2)]
    said = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert [text.splitlines()[-1].split() for text in said] == [["loaded:"], ["loaded:"]]


GIVES_WAY = """
import sys, torch
from harness import eager
with eager.without_compiler(compiles=False):
    assert "torch._dynamo.utils" not in sys.modules
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)  # both of its calls are kept from being traced
    weight.grad = torch.ones(3)
    optimizer.step()
    assert "sympy" not in sys.modules and weight.tolist() == [0.5] * 3
    {ask}
    assert type(sys.modules["torch._dynamo"]).__name__ == "module" and torch._dynamo is sys.modules["torch._dynamo"]
    import torch._dynamo.utils, torch._dynamo.testing
    assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"] is torch._dynamo.convert_frame.__dict__["sys"].modules["torch._dynamo.utils"]
    assert torch._dynamo.utils.__spec__.loader is not None and "SourceFileLoader" in repr(torch._dynamo.utils.__spec__)
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
assert not any("harness" in type(finder).__module__ for finder in sys.meta_path)
"""


@pytest.mark.parametrize(
    "ask",
    [
        "torch._dynamo.config.cache_size_limit",
        "torch._dynamo.utils.counters",
        "import torch._dynamo.utils",
        "from torch._dynamo.exc import Unsupported; assert torch._dynamo.exc.Unsupported is Unsupported",
        "torch.compile(lambda x: x, backend='eager')(torch.zeros(2))",
        "torch.use_deterministic_algorithms(True)",
    ],
    ids=["an attribute", "a submodule's", "a submodule", "from a submodule", "compile", "inductor"],
)
def test_it_gives_way_to_the_real_one(ask: str) -> None:
    process = run(GIVES_WAY.format(ask=ask))
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said


LEAVES = """
import sys, torch
from harness import eager
with eager.without_compiler(compiles=True):
    assert "torch._dynamo" not in sys.modules
with eager.without_compiler(compiles=False):
    torch._dynamo.disable
assert "torch._dynamo" not in sys.modules and "_dynamo" not in vars(torch)
assert torch.equal(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2)), torch.ones(2))
with eager.without_compiler(compiles=False):
    assert type(torch._dynamo).__name__ == "module"
"""


def test_nothing_of_it_is_left() -> None:
    process = run(LEAVES)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
