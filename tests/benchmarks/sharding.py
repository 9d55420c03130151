"""Sharded optimizers: bytes a rank, time of an update, stall of a checkpoint save. A section of `make bench`.

bytes    of the tensors that an engine holds, at 1 and 2 ranks; at 4 computed, by the formula that the measured ones are
         judged against. Of the rank that holds most
update   all that follows the last backward pass, in turn with torch's fused optimizer on the same parameters, not sharded
stall    how long training stands still for a save, as a share of a step; the files are written while it goes on
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from rich.table import Table

from harness import config, models
from harness.config import Trial
from launch import scaling
from tests.benchmarks.shard_rank import IMAGE_SIZE, LINEAR, Held, Memory, Stall, Stalled, Update, replaced_model
from tests.equivalence import groups
from tests.equivalence.problem import BACKENDS, Backend
from tests.equivalence.rank import Failed
from tests.report import Row, console, failed, refused, row
from tests.trials import trial

SGD, ADAM = {"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.001}
L2, DECOUPLED = ({"name": name, "weight_decay": 0.01, "exempt_1d": True} for name in ("l2", "decoupled"))
OPTIMIZERS = {"SGD-L2": (SGD, L2), "SGDW": (SGD, DECOUPLED), "Adam-L2": (ADAM, L2), "AdamW": (ADAM, DECOUPLED)}
MOMENTS = {"AdamW": 2, "SGDW": 1}
"""numbers that an optimizer keeps of a parameter"""
NETS = ("resnet50", "linear300")
"""26M and 303M parameters; SGDW's moments are weighed for the first at the most ranks, else computed"""
SAVED = (Backend("ddp", 0), Backend("deepspeed", 2), Backend("deepspeed", 3), Backend("fsdp", 3))
COMPUTED_WORLD = 4
TOLERANCE = 0.02
REPETITIONS, SAVES = 9, 5
PERSISTENT = 10_000
"""elements up to which harness.backends.zero keeps a parameter whole at stage 3"""
NEEDED = 50
"""bytes a parameter that both ranks together take at most: DeepSpeed 3, its buckets included"""


def make(net: str, backend: Backend, optimizer: str, batch: int, pixels: int = 32) -> Trial:
    block, decay = OPTIMIZERS[optimizer]
    data = {"channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": pixels, "num_classes": 1000, "holdout_per_class": 0}
    if net in LINEAR:
        data |= {"image_size": IMAGE_SIZE, "num_classes": 10}
    return trial(
        model="mnist5k_cnn" if net in LINEAR else net,
        data={} if net == "mnist5k_cnn" else data,
        optimizer=block,
        decay=decay,
        budget={"epochs": 7, "global_batch_size": batch},
        backend={"name": backend.name, "zero_stage": backend.stage},
    )


def rows(device: str) -> list[Row]:
    """Prints the tables. device: cpu, or cuda with at most as many ranks as it has GPUs."""
    groups.preload()
    worlds = [w for w in (1, 2) if device == "cpu" or w <= torch.cuda.device_count()]
    with tempfile.TemporaryDirectory(prefix="wrbench-sharding-") as folder:
        root = Path(folder)
        return memory(root, device, worlds) + update(root, device, worlds[-1]) + stall(root, device, worlds[-1])


def _execute(runs: Sequence[Any], root: Path, device: str, capacity: int, title: str) -> dict[str, Any]:
    with Progress(console=console(), transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(title, total=len(runs))
        return groups.execute(runs, root, device, capacity, lambda run: progress.advance(task))


def _print(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    out = console()
    out.print(title, style="bold", soft_wrap=True)
    out.print(table, "")


def _why(error: Failed) -> str:
    return str(error).strip().splitlines()[-1][:300]


# ------------------------------------------------------------------------------------------------- memory


class Weighed(NamedTuple):
    """Bytes of the rank that holds most of each; None: not measured."""

    weights: float
    gradients: float
    moments: Mapping[str, float]
    """by optimizer"""
    copy: float
    imbalance: float
    """of the moments: the largest share by the mean share"""
    buckets: float | None = None
    peak: float | None = None


def memory(root: Path, device: str, worlds: Sequence[int]) -> list[Row]:
    return [r for net in NETS for r in _memory(net, root, device, worlds)]


def _memory(net: str, root: Path, device: str, worlds: Sequence[int]) -> list[Row]:
    shapes = _shapes(net)
    elements = sum(math.prod(shape) for shape in shapes)
    large = elements > 1e8
    if large and (short := _short_of(NEEDED * elements, device)):
        console().print(f"MB a rank, {net}: {short}\n", soft_wrap=True)
        return [refused(f"{net} {backend}, {_ranks(world)}: bytes a parameter", short) for world in worlds for backend in BACKENDS]
    runs = {
        (backend, world, name): Memory(f"{net} {backend} {name} {world}", make(net, backend, name, batch=4), world, net)
        for world in worlds
        for backend in BACKENDS
        for name in MOMENTS
        if name == "AdamW" or (world == worlds[-1] and not large)
    }
    found = _execute(list(runs.values()), root, device, 1 if large else worlds[-1], f"bytes a rank, {net}")
    weighed: dict[tuple[Backend, int], Weighed] = {}
    out: list[Row] = []
    for backend, world in ((b, w) for w in worlds for b in BACKENDS):
        held = {name: found[runs[backend, world, name].name] for name in MOMENTS if (backend, world, name) in runs}
        lost = next((h for h in held.values() if isinstance(h, Failed)), None)
        if lost is not None:
            out.append(failed(f"{net} {backend}, {_ranks(world)}: bytes a parameter", _why(lost)))
            continue
        weighed[backend, world] = _weighed(held)
        out += _judged(net, backend, world, elements, weighed[backend, world], computed(backend, shapes, world))
    far = {(backend, COMPUTED_WORLD): computed(backend, shapes, COMPUTED_WORLD) for backend in BACKENDS}
    out += [_bytes(net, backend, world, elements, w, "computed: ") for (backend, world), w in far.items()]
    _print(
        f"MB a rank, {net}: {elements / 1e6:.1f}M parameters, {4 * elements / 1e6:.0f} MB; in brackets: computed",
        ("", "ranks", "weights", "gradients", *(f"moments {name}" for name in MOMENTS), "fp32 copy", "largest/mean", "buckets", "peak"),
        [_line(backend, world, w) for (backend, world), w in {**weighed, **far}.items()],
    )
    return out


def _ranks(world: int) -> str:
    return f"{world} rank{'s' if world > 1 else ''}"


def _shapes(net: str) -> list[torch.Size]:
    with replaced_model(net):
        return [p.shape for p in models.build(make(net, BACKENDS[0], "AdamW", batch=4).workload, 0).parameters()]


def _short_of(needed: int, device: str) -> str:
    """Why there is too little memory for so many bytes; empty if there is enough."""
    if device == "cuda":
        available = torch.cuda.mem_get_info()[0]
    else:
        available = 1024 * int(re.findall(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[0])
    return (
        "" if available > needed else f"not measured: takes {needed / 1e9:.0f} GB of memory, of which {available / 1e9:.0f} are available"
    )


def _weighed(held: Mapping[str, Sequence[Held]]) -> Weighed:
    ranks = next(iter(held.values()))
    moments = {name: max(h.moments for h in by_rank) for name, by_rank in held.items()}
    return Weighed(
        max(h.weights for h in ranks), max(h.gradients for h in ranks), moments, max(h.copy for h in ranks),
        max(h.moments for h in ranks) / statistics.mean(h.moments for h in ranks),
        max(h.buckets for h in ranks), max(h.peak for h in ranks),
    )  # fmt: skip


def computed(backend: Backend, shapes: Sequence[torch.Size], world: int) -> Weighed:
    """launch.scaling's, with what only the shapes tell: whole parameters (ddp 1), kept ones (deepspeed 3), rounded rows (fsdp)."""
    sizes = [math.prod(shape) for shape in shapes]
    part = 4.0 * sum(sizes) / world
    held = scaling.memory(sum(sizes), 1, config.Backend(name=backend.name, zero_stage=backend.stage), world)
    weights, gradients, stepped = held.weights, held.gradients, held.moments
    if backend.name == "ddp" and backend.stage == 1:
        stepped = 4.0 * _largest_share(shapes, world)
    if backend.name == "deepspeed" and backend.stage == 3:
        weights += 4 * sum(size for size in sizes if size <= PERSISTENT)
    if backend.name == "fsdp":
        weights = gradients = stepped = 4.0 * sum(math.prod((-(-shape[0] // world), *shape[1:])) for shape in shapes)
    sharded = backend.stage > 0
    return Weighed(weights, gradients, {name: n * stepped for name, n in MOMENTS.items()}, held.copy, stepped / part if sharded else 1.0)


def _largest_share(shapes: Sequence[torch.Size], world: int) -> int:
    """Elements; ZeroRedundancyOptimizer goes by group and gives each parameter, largest first, to the rank that has least."""
    shares = [0] * world
    for group in ([s for s in shapes if len(s) > 1], [s for s in shapes if len(s) <= 1]):
        for size in sorted((math.prod(shape) for shape in group), reverse=True):
            shares[shares.index(min(shares))] += size
    return max(shares)


def _judged(net: str, backend: Backend, world: int, elements: int, found: Weighed, formula: Weighed) -> list[Row]:
    pairs = {f"moments {name}": (size, formula.moments[name]) for name, size in found.moments.items()}
    if found.copy or formula.copy:
        pairs["fp32 copy"] = (found.copy, formula.copy)
    off = {what: abs(size - expected) / (expected or 4 * elements) for what, (size, expected) in pairs.items()}
    name = f"{net} {backend}, {_ranks(world)}: off the formula"
    note = ", ".join(f"{what} {size / 1e6:.1f} MB, expected {expected / 1e6:.1f}" for what, (size, expected) in pairs.items())
    return [_bytes(net, backend, world, elements, found, ""), row(name, max(off.values()), TOLERANCE, note)]


def _bytes(net: str, backend: Backend, world: int, elements: int, found: Weighed, note: str) -> Row:
    parts = {"weights": found.weights, "gradients": found.gradients}
    parts |= {f"moments {name}": size for name, size in found.moments.items()} | {"fp32 copy": found.copy}
    total = found.weights + found.gradients + found.moments["AdamW"] + found.copy
    note += ", ".join(f"{what} {size / elements:.2f}" for what, size in parts.items())
    return row(f"{net} {backend}, {_ranks(world)}: bytes a parameter with AdamW", total / elements, None, note)


def _line(backend: Backend, world: int, found: Weighed) -> list[str]:
    def shown(size: float | None) -> str:
        text = "-" if size is None else f"{size / 1e6:.1f}"
        return f"({text})" if found.peak is None and size is not None else text

    moments = [shown(found.moments.get(name)) for name in MOMENTS]
    balance = f"{found.imbalance:.3f}"
    sizes = [shown(found.weights), shown(found.gradients), *moments, shown(found.copy), balance, shown(found.buckets), shown(found.peak)]
    return [str(backend), str(world), *sizes]


# ------------------------------------------------------------------------------------------------- update


def update(root: Path, device: str, world: int) -> list[Row]:
    net = "linear25"
    runs = {
        (backend, name): Update(f"update {backend} {name}", make(net, backend, name, batch=4), world, net, REPETITIONS)
        for backend in BACKENDS
        for name in OPTIMIZERS
    }
    found = _execute(list(runs.values()), root, device, world, "time of an update")
    out, lines = [], []
    for backend in BACKENDS:
        line = [str(backend)]
        for name, (block, _) in OPTIMIZERS.items():
            title = f"update {backend} {name}, {_ranks(world)} / torch fused {'SGD' if block is SGD else 'AdamW'}"
            pairs = found[runs[backend, name].name]
            if isinstance(pairs, Failed):
                out.append(failed(title, _why(pairs)))
                line.append("failed")
                continue
            ratio, ours = statistics.median(a / b for a, b in pairs), statistics.median(a for a, _ in pairs)
            out.append(row(title, ratio, None, f"median of {len(pairs)} pairs; {1e3 * ours:.1f} ms"))
            line.append(f"{ratio:.2f} ({1e3 * ours:.1f})")
        lines.append(line)
    _print(f"An update of 25M parameters on {_ranks(world)} / torch's fused one, not sharded (milliseconds)", ("", *OPTIMIZERS), lines)
    return out


# -------------------------------------------------------------------------------------------------- stall


def stall(root: Path, device: str, world: int) -> list[Row]:
    nets = {"mnist5k_cnn": 100, "resnet50": 16}
    runs = {
        (net, backend): Stall(f"stall {net} {backend}", make(net, backend, "AdamW", batch, pixels=64), world, SAVES)
        for net, batch in nets.items()
        for backend in SAVED
    }
    found = _execute(list(runs.values()), root, device, world, "stall of a save")
    out, lines = [], []
    for (net, backend), run in runs.items():
        title = f"stall a save / step, {net} {backend}, {_ranks(world)}"
        by_rank = found[run.name]
        if isinstance(by_rank, Failed):
            out.append(failed(title, _why(by_rank)))
            continue
        slowest = max(by_rank, key=lambda s: (s.snapshot + s.commit) / s.step)
        share = (slowest.snapshot + slowest.commit) / slowest.step
        shown = [f"{1e3 * seconds:.1f}" for seconds in slowest]
        out.append(row(title, share, None, ", ".join(f"{what} {ms} ms" for what, ms in zip(Stalled._fields, shown, strict=True))))
        lines.append([f"{net} {backend}", *shown, f"{100 * share:.0f} %"])
    columns = ("", "step", "snapshot", "commit", "in background", "step meanwhile", "stall / step")
    _print(
        f"Milliseconds of a checkpoint save, {_ranks(world)}; a step is {', '.join(f'{n} samples ({net})' for net, n in nets.items())}",
        columns,
        lines,
    )
    return out
