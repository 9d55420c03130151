"""The control: one process, stock torch layers, the NumPy optimizers of tests/reference.py. Slow and obvious.

Of harness it takes the initial weights and nothing else. Every norm batch goes through the network alone, so that a stock
nn.BatchNorm2d normalises it; gradients are summed in fp32, micro-batch by micro-batch; moments are float64; weights are
rounded to fp32 after each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import reference
from tests.equivalence.problem import (
    ARMS,
    CLIP_NORM,
    EVALUATED,
    GLOBAL_BATCH,
    MICRO_BATCH,
    NORM_BATCH,
    SIZE,
    Course,
    Digits,
    State,
)
from tests.trials import DATA

MOMENTUM = 0.1
"""weight of the newest batch in the running statistics"""


class Evaluation(NamedTuple):
    loss: float
    predictions: np.ndarray


class Outcome(NamedTuple):
    states: dict[int, State]
    """by steps done"""
    evaluation: Evaluation
    clipped: int
    """steps whose gradient was above the clip norm"""


def net() -> nn.Sequential:
    """The reference model, harness.models' mnist5k_cnn_bn, in stock layers."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        # with momentum 1 the running statistics are those of the last norm batch alone
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs, momentum=1.0), nn.SiLU()]

    last = -(-SIZE // 8)
    return nn.Sequential(*block(1, 24, 1), nn.AvgPool2d(2), *block(24, 48, 2), *block(48, 96, 2), nn.Flatten(), nn.Linear(96 * last * last, 10))


def pixels(images: np.ndarray, device: torch.device) -> Tensor:
    (mean,), (std,) = DATA["mean"], DATA["std"]
    return torch.from_numpy(images).to(device).float() * np.float32(1 / (255 * std)) + np.float32(-mean / std)


def clipped(gradient: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bool]:
    """torch's formula: scaled by min(1, limit / (norm + 1e-6)), the norm that of all parameters together. In float64."""
    wide = {name: g.astype(np.float64) for name, g in gradient.items()}
    norm = np.sqrt(sum(np.square(g).sum() for g in wide.values()))
    return {name: g * min(1.0, CLIP_NORM / (norm + 1e-6)) for name, g in wide.items()}, bool(norm > CLIP_NORM)


def run(
    arm: str, course: Course, digits: Digits, initial: Mapping[str, Tensor], precision: str, *,
    marks: Sequence[int], reverse: bool = False, record: Path | None = None, device: str = "cpu",
) -> Outcome:  # fmt: skip
    """Trains `course.steps` steps; the states after `marks` steps.

    initial: weights and buffers by name. reverse: micro-batches are summed from the last to the first. record: an .npy
    of (step, micro-batch, the elements of all gradients by sorted name) that is written on the way.
    """
    where = torch.device(device)
    network = net().to(where)
    prefix = _prefix(initial, network.state_dict())
    network.load_state_dict({name.removeprefix(prefix): value for name, value in initial.items()})
    parameters = {prefix + name: p for name, p in network.named_parameters()}
    norms = {prefix + name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    running = {f"{name}.{key}": getattr(m, key).double().cpu().numpy() for name, m in norms.items() for key in ("running_mean", "running_var")}
    theta = {name: p.detach().cpu().numpy().astype(np.float64) for name, p in parameters.items()}
    optimizer, decay = ARMS[arm]
    update = _optimizer(optimizer, str(decay["name"]))
    micro_batches = GLOBAL_BATCH // MICRO_BATCH
    elements = sum(t.size for t in theta.values())
    tape = None
    if record is not None:
        tape = np.lib.format.open_memmap(record, "w+", np.float32, (course.steps, micro_batches, elements))
    states: dict[int, State] = {}
    times_clipped = 0

    for step in range(course.steps):
        images, labels = digits.batch(course, step)
        network.train()
        found, statistics = [], []
        for m in range(micro_batches):
            gradient = {name: np.float32(0) for name in parameters}
            for start in range(m * MICRO_BATCH, (m + 1) * MICRO_BATCH, NORM_BATCH):
                group = slice(start, start + NORM_BATCH)
                with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = network(pixels(images[group], where))
                loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[group]).to(where))
                slopes = torch.autograd.grad(loss, list(parameters.values()))
                gradient = {
                    name: gradient[name] + g.cpu().numpy() / np.float32(MICRO_BATCH // NORM_BATCH)
                    for name, g in zip(parameters, slopes, strict=True)
                }
                statistics.append({key: getattr(norms[key.rpartition(".")[0]], key.rpartition(".")[2]).double().cpu().numpy() for key in running})
            found.append(gradient)
        if tape is not None:
            tape[step] = np.stack([np.concatenate([g.ravel() for _, g in sorted(gradient.items())]) for gradient in found])
        running = {
            key: ((1 - MOMENTUM) * before + MOMENTUM * np.mean([s[key] for s in statistics], axis=0)).astype(np.float32).astype(np.float64)
            for key, before in running.items()
        }

        total = {name: np.float32(0) for name in parameters}
        for gradient in reversed(found) if reverse else found:
            total = {name: total[name] + gradient[name] / np.float32(micro_batches) for name in parameters}
        gradient, over = clipped(total)
        times_clipped += over
        eta, _, cycle_steps = reference.eta_cosine_restarts(step, course.cycle, 1, 2, 0.0)
        lam = float(decay["weight_decay"]) / (np.sqrt(cycle_steps) if decay.get("normalised") else 1.0)
        update.step(theta, gradient, eta, {name: 0.0 if t.ndim <= 1 else lam for name, t in theta.items()})
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(torch.from_numpy(theta[name]))
                theta[name] = p.cpu().numpy().astype(np.float64)
        if step + 1 in marks:
            states[step + 1] = State({k: v.copy() for k, v in theta.items()}, dict(running), _moments(update))

    for key, value in running.items():
        name, _, field = key.rpartition(".")
        getattr(norms[name], field).copy_(torch.from_numpy(value))
    return Outcome(states, evaluate(network, digits, where), times_clipped)


@torch.no_grad()
def evaluate(network: nn.Module, digits: Digits, device: torch.device, raw: bool = False) -> Evaluation:
    """Mean cross-entropy and predictions, in one pass. raw: the network takes uint8 images, as harness models do."""
    images, labels = digits.evaluated()
    logits = network.eval()(torch.from_numpy(images).to(device) if raw else pixels(images, device)).double().cpu()
    assert len(logits) == EVALUATED
    return Evaluation(float(F.cross_entropy(logits, torch.from_numpy(labels))), logits.argmax(1).numpy())


def _prefix(names: Iterable[str], suffixes: Iterable[str]) -> str:
    """What stands before every one of our names in the harness model's, e.g. "net."."""
    first = next(iter(suffixes))
    return next(name for name in names if name.endswith(first)).removesuffix(first)


def _optimizer(block: Mapping[str, object], decay: str) -> reference.Sgd | reference.Adam:
    if block["name"] == "sgd":
        return reference.Sgd(float(str(block["lr"])), float(str(block["momentum"])), decay, inside=False)
    return reference.Adam(float(str(block["lr"])), 0.9, 0.999, 1e-8, decay)


def _moments(update: reference.Sgd | reference.Adam) -> dict[str, np.ndarray]:
    kept = {"momentum_buffer": update.m} if isinstance(update, reference.Sgd) else {"exp_avg": update.m, "exp_avg_sq": update.v}
    return {f"{name}/{key}": value.ravel().copy() for key, values in kept.items() for name, value in values.items()}
