"""step -> eta, cycle, lambda, image size: pure functions of a trial and a 0-based optimizer step, the only clock.

Nothing here has state, so a resumed step equals an uninterrupted one. Symbols and sources: SGDR (arXiv 1608.03983)
eq. 5 for eta; Decoupled Weight Decay Regularization (arXiv 1711.05101v3) section 3 and appendix B.1 for lambda.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config import Trial


def steps_per_epoch(trial: Trial) -> int:
    """floor(B / b): the last partial batch of an epoch is dropped."""
    return trial.workload.data.trained_samples // trial.budget.global_batch_size


def total_steps(trial: Trial) -> int:
    return round(trial.budget.epochs * steps_per_epoch(trial))


def cycles(trial: Trial) -> list[tuple[int, int]]:
    """(first step, end) of every cycle that the budget touches; the last may end beyond it.

    A cycle's end is the step count after its last step: round(end_epoch * steps_per_epoch), end_epoch = the sum of
    the T_i so far. Without restarts the whole budget is the one cycle.
    """
    total, s = total_steps(trial), trial.schedule
    if s.name != "cosine_restarts":
        return [(0, total)]
    found: list[tuple[int, int]] = []
    start, end_epoch, length = 0, 0.0, s.t_0
    while start < total:
        end_epoch += length
        end = round(end_epoch * steps_per_epoch(trial))
        found.append((start, end))
        start, length = end, length * s.t_mult
    return found


def cycle_ends(trial: Trial) -> list[int]:
    """Step counts at which a cycle is complete within the budget: where the anytime rule may take its answer."""
    return [end for _, end in cycles(trial) if end <= total_steps(trial)]


def schedule(trial: Trial, step: int) -> tuple[float, int, float]:
    """(eta, cycle, lambda) of a 0-based step in [0, total_steps).

    eta is the multiplier of the base learning rate, in [0, 1]. lambda is in paper units for decoupled decay
    (theta -= eta*lambda*theta), lambda_norm / sqrt(steps in the cycle's full length) when normalised; for l2 it is the
    coefficient in the gradient; 0 without decay.
    """
    total = total_steps(trial)
    if not 0 <= step < total:
        raise ValueError(f"step: {step} must be in [0, {total})")
    cycle, (start, end) = next((i, c) for i, c in enumerate(cycles(trial)) if c[0] <= step < c[1])
    t_cur = (step - start) / (end - start)
    return _eta(trial, step, t_cur), cycle, _lambda(trial, end - start)


def image_size(trial: Trial, step: int) -> int:
    """Height and width, pixels, of the training images of a 0-based step: the same for all steps of an epoch.

    data.image_size, or with a recipe's `resolution` FFCV's ramp (arXiv 2306.12517; get_resolution of libffcv/ffcv-imagenet):
    `start` up to one epoch, image_size from another one on, linear in the 0-based whole epoch between them, rounded to the
    nearest `multiple`, halves to the even one.
    """
    size, ramp = trial.workload.data.image_size, trial.workload.recipe.resolution
    if ramp is None:
        return size
    (first, last), epoch = ramp.epochs, step // steps_per_epoch(trial)
    grown = min(1.0, max(0.0, (epoch - first) / (last - first)))
    return round((ramp.start + grown * (size - ramp.start)) / ramp.multiple) * ramp.multiple


def evaluations(trial: Trial) -> set[int]:
    """Step counts after which holdout and validation are evaluated."""
    return {*cycle_ends(trial), *_every(trial, trial.evaluation.every_epochs), total_steps(trial)}


def checkpoints(trial: Trial) -> set[int]:
    """Step counts after which a checkpoint is saved."""
    return {*cycle_ends(trial), *_every(trial, trial.checkpoint.every_epochs), total_steps(trial)}


def _every(trial: Trial, epochs: float | None) -> set[int]:
    """Step counts at every multiple of `epochs` within the budget."""
    if epochs is None:
        return set()
    count = math.floor(trial.budget.epochs / epochs + 1e-9)
    return {max(1, round(i * epochs * steps_per_epoch(trial))) for i in range(1, count + 1)}


def resets_moments(trial: Trial, step: int) -> bool:
    """Whether the optimizer forgets its moments before this step: at a restart, where the schedule says so."""
    s = trial.schedule
    return s.name == "cosine_restarts" and s.reset_moments and step > 0 and any(start == step for start, _ in cycles(trial))


def _eta(trial: Trial, step: int, t_cur: float) -> float:
    s = trial.schedule
    if s.name == "constant":
        eta = 1.0
    elif s.name == "step":
        eta = s.gamma ** sum(round(m * steps_per_epoch(trial)) <= step for m in s.milestones)
    elif s.name == "linear":
        eta = s.eta_min + (1 - s.eta_min) * (1 - t_cur)
    else:  # cosine, in each cycle
        eta = s.eta_min + 0.5 * (1 - s.eta_min) * (1 + math.cos(math.pi * t_cur))
    warmup = warmup_steps(trial)
    return eta * min(1.0, (step + 1) / warmup) if warmup else eta


def warmup_steps(trial: Trial) -> int:
    return round(trial.schedule.warmup_epochs * steps_per_epoch(trial))


def _lambda(trial: Trial, cycle_steps: int) -> float:
    d = trial.decay
    if d.name == "none":
        return 0.0
    if d.name == "l2":
        return d.weight_decay
    if d.normalised:
        return d.weight_decay / math.sqrt(cycle_steps)
    return d.weight_decay * trial.optimizer.lr if d.units == "torch" else d.weight_decay


def check(trial: Trial) -> None:
    """ValueError when the schedule has an empty cycle or a warm-up longer than its first cycle."""
    s = trial.schedule
    if s.name == "cosine_restarts" and round(s.t_0 * steps_per_epoch(trial)) < 1:  # later cycles are no shorter
        raise ValueError(f"schedule.t_0: {s.t_0:g} epochs is less than one optimizer step; e.g. {1 / steps_per_epoch(trial):.4g}")
    lengths = [end - start for start, end in cycles(trial)]
    if warmup_steps(trial) > lengths[0]:
        raise ValueError(
            f"schedule.warmup_epochs: {s.warmup_epochs:g} must not exceed the first cycle, "
            f"{lengths[0] / steps_per_epoch(trial):g} epochs; e.g. {lengths[0] / steps_per_epoch(trial) / 10:g}"
        )


def warnings(trial: Trial) -> list[str]:
    """What is legal and probably not meant: a budget that cuts a cycle, or ends before images have grown to their size."""
    spans, total, per_epoch = cycles(trial), total_steps(trial), steps_per_epoch(trial)
    start, end = spans[-1]
    lines = []
    if end != total:
        near = [f"{e / per_epoch:g}" for e in (start, end) if e > 0]
        lines.append(
            f"budget.epochs: {trial.budget.epochs:g} cuts cycle {len(spans)} of {trial.arm}, which ends at epoch {end / per_epoch:g}; "
            f"budgets that end a cycle: {' or '.join(near)}"
        )
    grown, size = image_size(trial, total - 1), trial.workload.data.image_size
    if grown != size:
        lines.append(
            f"workload.recipe.resolution.epochs: the budget of {trial.budget.epochs:g} epochs ends at {grown} pixels, before images have "
            f"grown to {size}"
        )
    return lines
