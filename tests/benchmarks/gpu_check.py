"""`make gpu-check`: what a machine with a GPU must show. Needs no network, no mlflow, no submitit. Writes build/gpu-check.json.

equivalence  the rows of `make equivalence` at as many ranks as there are GPUs, TF32 off, cudnn deterministic
step         one step of each optimizer against torch's fused one, and against what a copy of memory reaches: 26M and 295M parameters
training     ResNet-50 at 224 pixels on generated shards, all GPUs: `wrbench bench train`, and a resume in the middle
tests        tests/gpu

Without deepspeed its rows are refused. --device cpu does a small part of it, to test the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.report import Row

NEEDED = {
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "pydantic": "pydantic", "yaml": "pyyaml", "rich": "rich",
    "PIL": "pillow", "fsspec": "fsspec", "webdataset": "webdataset", "braceexpand": "braceexpand", "mlxtend": "mlxtend",
    "skimage": "scikit-image", "sklearn": "scikit-learn", "pytest": "pytest",
}  # fmt: skip
"""module -> package; simplejpeg, or this package's own decoder, makes the images come faster"""
SECTIONS = ("equivalence", "step", "training", "tests")
PARTS = {
    "mistakes that must show": "^mistake", "bf16, recorded gradients": "bf16 recorded", "bf16, end to end, not limited": "bf16",
    "moved to other backends, or resumed": "saved|resumed", "evaluated": "evaluated", "the control in another order": "reordered",
}  # fmt: skip
"""of the equivalence table: a regular expression of a row's name, the first that fits"""
SMALL = r"^control reordered, AdamW n|^(ddp 0|deepspeed 2|fsdp 3), AdamW n|^fsdp 3 bf16 end to end, AdamW n"
"""the rows of --device cpu"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu_check")
    parser.add_argument("-k", metavar="PATTERN", help="of equivalence, only rows whose name matches this regular expression")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section; may be given again")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _error(f"gpu-check needs {', '.join(missing)}, not installed for {sys.executable}")
    import torch

    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return _error(f"gpu-check needs a GPU that torch can use; torch {torch.__version__}, {built}, finds none")
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if cuda else "CPU"
    print(f"{device}, torch {torch.__version__}, {'with' if _has_deepspeed() else 'without'} deepspeed", flush=True)

    from tests.report import line, publish

    pattern = arguments.k or ("" if cuda else SMALL)
    sections = {"equivalence": partial(equivalence, pattern=pattern), "step": steps, "training": training, "tests": tests}
    rows: list[Row] = []
    told: list[Row] = []
    for section in arguments.only or SECTIONS:
        began = time.monotonic()
        found = list(sections[section](arguments.device))
        rows += found
        print(f"{section}: {time.monotonic() - began:.0f} s", flush=True)
        if section == "equivalence":  # a line for some thirty cells: the report is a page, build/gpu-check.json has them all
            told = found
            print("\n".join(line(r, width=52) for r in parts(found)), flush=True)
    return publish("gpu-check", rows, shown=told)


def _error(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


def _has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def equivalence(device: str, pattern: str) -> Iterator[Row]:
    from tests.equivalence import cells, groups, problem, report
    from tests.equivalence.rank import EngineRun
    from tests.report import refused

    groups.preload()
    course, worlds = (problem.FULL, report.worlds(device)) if device == "cuda" else (problem.SHORT, (1,))
    chosen = [cell for cell in cells.table(course, worlds, device) if re.search(pattern, cell.name, re.IGNORECASE)]
    possible = [
        cell
        for cell in chosen
        if _has_deepspeed() or not any(isinstance(run, EngineRun) and run.trial.backend.name == "deepspeed" for run in cell.runs)
    ]
    found = {row.name: row for row in report.rows(possible, course, device, progress=True)} if possible else {}
    for cell in chosen:
        yield found.get(cell.name) or refused(cell.name, "deepspeed is not installed")


def parts(rows: Sequence[Row]) -> Iterator[Row]:
    """The worst row of each of PARTS, and of the rest: the backends as they are; with the number of its rows."""
    patterns = PARTS | {"every backend, fp32": ""}
    of = [next(part for part, pattern in patterns.items() if re.search(pattern, row.name)) for row in rows]
    for part in patterns:
        some = [row for row, its in zip(rows, of, strict=True) if its == part]
        if some:
            refused = sum(row.refused for row in some)
            worst = max(some, key=lambda row: (not row.ok, not row.refused, row.badness))
            note = f"worst: {worst.name}" + (f"; {refused} refused" if refused else "")
            yield replace(worst, name=f"{part}, {len(some)} rows", note=note)


def steps(kind: str) -> Iterator[Row]:
    import torch

    from tests.benchmarks import fused
    from tests.report import refused

    device = torch.device(kind)
    if kind == "cpu":
        torch.set_num_threads(1)
    yield from (fused.exact(case, device) for case in fused.CASES)
    copied = fused.copy_bandwidth(device) if kind == "cuda" else None
    for width in (1, 3.5) if kind == "cuda" else (0.25,):
        shapes = fused.resnet(width)
        needed = fused.BYTES * sum(math.prod(shape) for shape in shapes)
        for case in fused.CASES:
            if kind == "cuda" and (free := torch.cuda.mem_get_info()[0]) < needed:
                yield refused(
                    f"step {case}, width {width:g}", f"takes {needed / 1e9:.0f} GB of GPU memory, of which {free / 1e9:.0f} are free"
                )
            else:  # 2M parameters on a CPU say nothing about the kernels
                yield from fused.compare(
                    case, shapes, device, repetitions=25 if kind == "cuda" else 5, copied=copied, limited=kind == "cuda"
                )


def training(device: str) -> Iterator[Row]:
    import torch

    from tests.benchmarks import gpu_train
    from tests.report import Row, failed

    world = torch.cuda.device_count() if device == "cuda" else 1
    with tempfile.TemporaryDirectory(prefix="wrbench-gpu-check-") as name:
        folder = Path(name)
        gpu_train.prepare(folder, device, world)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
        done = subprocess.run([sys.executable, *launcher, "-m", "tests.benchmarks.gpu_train", str(folder), device], check=False)
        found = folder / gpu_train.FOUND
        yield from (Row(**one) for one in (json.loads(found.read_text()) if found.exists() else []))
        if done.returncode:
            yield failed("training", f"exit code {done.returncode}: see above")


def tests(device: str) -> Iterator[Row]:
    from tests.report import row

    if device == "cuda":
        done = subprocess.run([sys.executable, "-m", "pytest", "tests/gpu", "-v"], check=False)
        yield row("tests/gpu", float(done.returncode), 0.0, "exit code of pytest")


if __name__ == "__main__":
    sys.exit(main())
