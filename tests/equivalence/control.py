"""The control: one process, stock torch layers, the NumPy optimizers of tests/reference.py. Slow and obvious.

Of harness it takes the initial weights and nothing else. Every norm batch goes through the network alone, so that a stock
nn.BatchNorm2d normalises it; gradients are summed in fp32, micro-batch by micro-batch; moments are float64; weights are
rounded to fp32 after each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    Arrays,
    Course,
    Digits,
    State,
)

MEAN, STD = 0.1315, 0.3087
"""of the digits' pixels; tests/trials.py says the same to the harness"""
PREFIX = "net."
"""of the names of a harness model, which holds the network behind its input normalisation"""
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
    return nn.Sequential(
        *block(1, 24, 1), nn.AvgPool2d(2), *block(24, 48, 2), *block(48, 96, 2), nn.Flatten(), nn.Linear(96 * last * last, 10)
    )


def pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """(x/255 - mean) / std, as one multiplication and one addition."""
    return torch.from_numpy(images).to(device).float() * (1 / (255 * STD)) + (-MEAN / STD)


def clipped(gradient: Arrays) -> tuple[Arrays, bool]:
    """torch's formula: scaled by min(1, limit / (norm + 1e-6)), the norm that of all parameters together. In float64."""
    wide = {name: g.astype(np.float64) for name, g in gradient.items()}
    norm = float(np.sqrt(sum(np.square(g).sum() for g in wide.values())))
    return {name: g * min(1.0, CLIP_NORM / (norm + 1e-6)) for name, g in wide.items()}, norm > CLIP_NORM


def mean(parts: Sequence[Arrays]) -> Arrays:
    """Of arrays with one name, in their dtype, summed in the order given; the number of parts is a power of two."""
    return {name: sum((part[name] for part in parts[1:]), parts[0][name]) / len(parts) for name in parts[0]}


def run(
    arm: str, course: Course, digits: Digits, initial: Mapping[str, Tensor], precision: str, *,
    marks: Sequence[int], reverse: bool = False, record: Path | None = None, device: str = "cpu",
) -> Outcome:  # fmt: skip
    """Trains `course.steps` steps; the states after `marks` steps.

    initial: weights and buffers of the harness model. reverse: micro-batches are summed from the last to the first.
    record: an .npy of (step, micro-batch, the elements of all gradients by sorted name) that is written on the way.
    """
    where = torch.device(device)
    network = net().to(where)
    network.load_state_dict({name.removeprefix(PREFIX): value for name, value in initial.items()})
    running = _running(network)
    theta = {name: p.detach().cpu().numpy().astype(np.float64) for name, p in network.named_parameters()}
    optimizer, decay = ARMS[arm]
    update = _optimizer(optimizer, decay["name"])
    micro_batches = range(0, GLOBAL_BATCH, MICRO_BATCH)
    tape = None
    if record is not None:
        shape = (course.steps, len(micro_batches), sum(t.size for t in theta.values()))
        tape = np.lib.format.open_memmap(record, "w+", np.float32, shape)
    states: dict[int, State] = {}
    times_clipped = 0

    for step in range(course.steps):
        images, labels = digits.batch(course, step)
        gradients: list[Arrays] = []
        statistics: list[Arrays] = []
        for first in micro_batches:
            groups = [slice(start, start + NORM_BATCH) for start in range(first, first + MICRO_BATCH, NORM_BATCH)]
            slopes = []
            for group in groups:
                slopes.append(_gradient(network, images[group], labels[group], precision, where))
                statistics.append(_running(network))
            gradients.append(mean(slopes))
        if tape is not None:
            tape[step] = [np.concatenate([g.ravel() for _, g in sorted(gradient.items())]) for gradient in gradients]
        now = mean(statistics)
        running = {name: ((1 - MOMENTUM) * before + MOMENTUM * now[name]).astype(np.float32) for name, before in running.items()}

        gradient, over = clipped(mean(gradients[::-1] if reverse else gradients))
        times_clipped += over
        eta, _, cycle_steps = reference.eta_cosine_restarts(step, course.cycle, 1, 2, 0.0)
        lam = decay["weight_decay"] / (math.sqrt(cycle_steps) if decay.get("normalised") else 1.0)
        update.step(theta, gradient, eta, {name: 0.0 if t.ndim <= 1 else lam for name, t in theta.items()})
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(torch.from_numpy(theta[name]))
                theta[name] = p.cpu().numpy().astype(np.float64)
        if step + 1 in marks:
            states[step + 1] = State(_named(theta), _named(running), _moments(update))

    network.load_state_dict({name: torch.from_numpy(value) for name, value in running.items()}, strict=False)
    return Outcome(states, evaluate(network, digits, where), times_clipped)


def _gradient(network: nn.Module, images: np.ndarray, labels: np.ndarray, precision: str, device: torch.device) -> Arrays:
    """Of the mean loss of one norm batch, by name; leaves its statistics in the norms."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = network.train()(pixels(images, device))
    loss = F.cross_entropy(logits.float(), torch.from_numpy(labels).to(device))
    named = dict(network.named_parameters())
    return {name: g.cpu().numpy() for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)}


def _running(network: nn.Module) -> Arrays:
    return {name: b.double().cpu().numpy() for name, b in network.named_buffers() if "running" in name}


@torch.no_grad()
def evaluate(network: nn.Module, digits: Digits, device: torch.device, raw: bool = False) -> Evaluation:
    """Mean cross-entropy and predictions, in one pass. raw: the network takes uint8 images, as harness models do."""
    images, labels = digits.evaluated()
    logits = network.eval()(torch.from_numpy(images).to(device) if raw else pixels(images, device)).double().cpu()
    assert len(logits) == EVALUATED
    return Evaluation(float(F.cross_entropy(logits, torch.from_numpy(labels))), logits.argmax(1).numpy())


def _optimizer(block: Mapping[str, Any], decay: str) -> reference.Sgd | reference.Adam:
    if block["name"] == "sgd":
        return reference.Sgd(block["lr"], block["momentum"], decay, inside=False)
    return reference.Adam(block["lr"], 0.9, 0.999, 1e-8, decay)


def _named(arrays: Arrays) -> Arrays:
    """A copy under the names of the harness model."""
    return {PREFIX + name: value.copy() for name, value in arrays.items()}


def _moments(update: reference.Sgd | reference.Adam) -> Arrays:
    kept = {"momentum_buffer": update.m} if isinstance(update, reference.Sgd) else {"exp_avg": update.m, "exp_avg_sq": update.v}
    return {f"{PREFIX}{name}/{key}": value.ravel().copy() for key, values in kept.items() for name, value in values.items()}
