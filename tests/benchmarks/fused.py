"""One step of each optimizer against torch's fused kernel on equal tensors, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from harness import optim
from harness.schedule import schedule
from tests.equivalence.problem import distance
from tests.report import Row, row, spread
from tests.trials import trial

SGD, ADAM = {"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.001}
L2 = {"name": "l2", "weight_decay": 0.01}
RAW = {"name": "decoupled", "weight_decay": 0.001}
NORMALISED = {"name": "decoupled", "weight_decay": 0.05, "normalised": True}
CASES = {
    "SGD L2": (SGD, L2, 1.1),
    "SGDW raw": (SGD, RAW, 1.4),
    "SGDW normalised": (SGD, NORMALISED, 1.4),
    "Adam L2": (ADAM, L2, 1.1),
    "AdamW raw": (ADAM, RAW, 1.1),
    "AdamW normalised": (ADAM, NORMALISED, 1.1),
}
"""optimizer, decay, the most that a step may cost on a CPU of torch's fused SGD or AdamW; on a GPU GPU_LIMIT"""
GPU_LIMIT, REACHED = 1.1, 0.8
MOVED = {"sgd": 20, "adam": 28}
"""bytes of fp32 a parameter that a step cannot do without: weight, gradient and moments read, weight and moments written"""
BYTES = 40
"""of memory a parameter for one comparison: two of everything, and gradients on their way"""
WARM_UP = 3

Shape = tuple[int, ...]


def resnet(width: float) -> list[Shape]:
    """Every parameter of a ResNet-50 with its channels times `width`: 25.6M at 1, 295M at 3.5."""

    def norm(channels: int) -> list[Shape]:
        return [(channels,)] * 2

    def layers() -> Iterator[list[Shape]]:
        channels = int(64 * width)
        yield [(channels, 3, 7, 7), *norm(channels)]
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner = int(64 * width) * 2**stage
            for block in range(blocks):
                yield [
                    (inner, channels, 1, 1),
                    *norm(inner),
                    (inner, inner, 3, 3),
                    *norm(inner),
                    (4 * inner, inner, 1, 1),
                    *norm(4 * inner),
                ]
                if block == 0:
                    yield [(4 * inner, channels, 1, 1), *norm(4 * inner)]
                channels = 4 * inner
        yield [(1000, channels), (1000,)]

    return [shape for layer in layers() for shape in layer]


class Took(NamedTuple):
    """Milliseconds of one step."""

    device: float
    """on a GPU: from its first kernel's turn to the end of its last, launched ahead of time"""
    host: float
    """until step() returned"""


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a GPU's copy of 2 GiB: the median of 20."""
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    took = []
    for _ in range(WARM_UP + 20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize(device)
        took.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(took[WARM_UP:])


def compare(
    case: str, shapes: Sequence[Shape], device: torch.device, repetitions: int, copied: float | None = None, limited: bool = True
) -> Iterator[Row]:
    """The median ratio of `repetitions` pairs of steps, fp32. On a GPU also the share that ours reaches of what `copied`, a copy's bytes a
    second, allows. not limited: printed only."""
    block, decay, limit = CASES[case]
    t = trial(optimizer=block, decay=decay)
    torch.manual_seed(0)
    ours_parameters, their_parameters = (
        [(str(i), torch.nn.Parameter(torch.randn(shape, device=device))) for i, shape in enumerate(shapes)] for _ in range(2)
    )
    for _, p in ours_parameters + their_parameters:
        p.grad = torch.randn_like(p) * 1e-3
    ours = optim.build(ours_parameters, t.optimizer, t.decay)
    plain = [p for _, p in their_parameters]
    theirs: torch.optim.Optimizer
    if block["name"] == "sgd":
        theirs = torch.optim.SGD(plain, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    else:
        theirs = torch.optim.AdamW(plain, lr=0.001, weight_decay=0.01, fused=True)
    eta, _, lam = schedule(t, 17)
    optim.write(ours, *optim.hyperparameters(t.optimizer, t.decay, eta, lam))
    pairs = [(one_step(ours, device), one_step(theirs, device)) for _ in range(WARM_UP + repetitions)][WARM_UP:]
    ratios = [a.device / b.device for a, b in pairs]
    elements = sum(p.numel() for p in plain)
    told = {"ours": [a for a, _ in pairs], "torch's": [b for _, b in pairs]}
    note = "; ".join(f"{who} {_told(steps, MOVED[block['name']] * elements, device)}" for who, steps in told.items())
    note += f"; {spread(ratios)}"
    size = f"{elements / 1e6:.0f}M parameters"
    limit = limit if copied is None else GPU_LIMIT
    yield row(f"step {case} / torch fused {type(theirs).__name__}, {size}", statistics.median(ratios), limit if limited else None, note)
    if copied is not None and decay["name"] == "decoupled":
        reached = MOVED[block["name"]] * elements / (statistics.median(a.device for a, _ in pairs) / 1e3) / copied
        name = f"step {case}: bytes it must move / a copy's in that time, {size}"
        yield Row(name, reached, REACHED, reached >= REACHED, f"a copy moves {copied / 1e9:.0f} GB/s", exceeds=True)


def exact(case: str, device: torch.device) -> Row:
    """Ten steps of fp32 tensors of all sizes and orders in memory against the same steps in float64 on the CPU."""
    block, decay, _ = CASES[case]
    t = trial(optimizer=block, decay=decay)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((7,), (0,), (5000,), (16, 8, 3, 3), (64, 32, 1, 1))]
    weights[3:] = [w.to(memory_format=torch.channels_last) for w in weights[3:]]
    sides = []
    for where, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        parameters = [(str(i), torch.nn.Parameter(w.to(where, dtype, copy=True))) for i, w in enumerate(weights)]
        optimizer = optim.build(parameters, t.optimizer, t.decay)
        torch.manual_seed(1)
        for step in range(10):
            eta, _, lam = schedule(t, step)
            optim.write(optimizer, *optim.hyperparameters(t.optimizer, t.decay, eta, lam))
            for _, p in parameters:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            optimizer.step()
        sides.append({name: p.detach().cpu().double().numpy() for name, p in parameters})
    ours, control = sides
    return row(f"step {case} / the same in float64", distance(ours, control), 1e-6, "ten steps, contiguous and channels last")


def _told(steps: Sequence[Took], moved: int, device: torch.device) -> str:
    took, host = (statistics.median(t) for t in zip(*steps, strict=True))
    return f"{took:.3g} ms, {moved / took / 1e6:.0f} GB/s" + (f", host {host:.2g} ms" if device.type == "cuda" else "")


def one_step(optimizer: torch.optim.Optimizer, device: torch.device) -> Took:
    if device.type != "cuda":
        start = time.perf_counter()
        optimizer.step()
        took = 1e3 * (time.perf_counter() - start)
        return Took(took, took)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)  # the host is ahead of the GPU, as it is in training: no kernel waits for its launch
    begin.record()
    start = time.perf_counter()
    optimizer.step()
    host = 1e3 * (time.perf_counter() - start)
    end.record()
    torch.cuda.synchronize(device)
    return Took(begin.elapsed_time(end), host)


AHEAD = 20_000_000
"""cycles of the GPU, about 10 ms"""
