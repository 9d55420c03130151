"""eta, cycle and lambda at, before and after each boundary, against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from harness import schedule as s
from harness.config import BadInput, Trial
from tests import reference
from tests.trials import trial

SPE = 35  # floor(3500 / 100)


def restarts(**over: Any) -> dict[str, Any]:
    return {"name": "cosine_restarts"} | over


@pytest.mark.parametrize(
    ("t_0", "t_mult", "epochs", "ends"),
    [
        (1, 1, 4, [1, 2, 3, 4]),
        (1, 2, 15, [1, 3, 7, 15]),
        (2, 2, 14, [2, 6, 14]),
        (1, 3, 13, [1, 4, 13]),
        (0.5, 2, 7.5, [0.5, 1.5, 3.5, 7.5]),
        (1.3, 1.5, 10, [1.3, 3.25, 6.175]),
    ],
)
def test_cycle_ends_and_values_at_every_boundary(t_0: float, t_mult: float, epochs: float, ends: list[float]) -> None:
    norm, eta_min = 0.1, 0.05
    t = trial(
        schedule=restarts(t_0=t_0, t_mult=t_mult, eta_min=eta_min), budget={"epochs": epochs, "global_batch_size": 100},
        decay={"name": "decoupled", "weight_decay": norm, "normalised": True},
    )  # fmt: skip
    steps = [round(e * SPE) for e in ends]
    assert s.cycle_ends(t) == steps
    start = 0
    for cycle, end in enumerate(steps):
        n = end - start
        first, last = s.schedule(t, start), s.schedule(t, end - 1)
        assert first == (1.0, cycle, norm / math.sqrt(n))
        assert last[1:] == (cycle, norm / math.sqrt(n))
        assert last[0] == pytest.approx(eta_min + (1 - eta_min) * 0.5 * (1 + math.cos(math.pi * (n - 1) / n)), rel=1e-14)
        middle = start + n // 2
        assert s.schedule(t, middle)[0] == pytest.approx(eta_min + (1 - eta_min) * 0.5 * (1 + math.cos(math.pi * (n // 2) / n)), rel=1e-14)
        if end < s.total_steps(t):
            assert s.schedule(t, end)[:2] == (1.0, cycle + 1)
        start = end


@pytest.mark.parametrize("t_0", [1, 0.7, 2.25])
@pytest.mark.parametrize("t_mult", [1, 2, 3, 1.4])
def test_every_step_equals_the_reference(t_0: float, t_mult: float) -> None:
    t = trial(schedule=restarts(t_0=t_0, t_mult=t_mult), budget={"epochs": 11, "global_batch_size": 100})
    for step in range(s.total_steps(t)):
        eta, cycle, full = reference.eta_cosine_restarts(step, SPE, t_0, t_mult, 0.0)
        ours = s.schedule(t, step)
        assert ours[1] == cycle
        assert ours[0] == pytest.approx(eta, abs=1e-15)
        assert ours[2] == pytest.approx(0.05 / math.sqrt(full), rel=1e-15)


def test_lambda_drops_by_the_root_of_t_mult_and_total_decay_is_as_derived() -> None:
    """Cycles 6, 12, 24, 48: sum(eta*lambda) is 1.87 times that of one 90-epoch cosine (PAPER.md, derived)."""
    budget = {"epochs": 90, "global_batch_size": 100}
    restarted = trial(schedule=restarts(t_0=6, t_mult=2), budget=budget)
    single = trial(schedule={"name": "cosine"}, budget=budget)
    lambdas = [s.schedule(restarted, start)[2] for start, _ in s.cycles(restarted)]
    assert [a / b for a, b in itertools.pairwise(lambdas)] == pytest.approx([math.sqrt(2)] * 3)
    total = [sum(eta * lam for eta, _, lam in (s.schedule(t, i) for i in range(90 * SPE))) for t in (restarted, single)]
    assert total[0] / total[1] == pytest.approx(1.87, abs=0.01)


def test_a_cut_cycle_keeps_the_lambda_of_its_full_length_and_is_warned_of() -> None:
    t = trial(schedule=restarts(t_0=1, t_mult=2), budget={"epochs": 5, "global_batch_size": 100})
    assert s.cycle_ends(t) == [35, 105]
    assert s.schedule(t, 5 * SPE - 1)[1:] == (2, 0.05 / math.sqrt(140))
    assert s.warnings(t) == ["budget.epochs: 5 cuts cycle 3 of trial, which ends at epoch 7; budgets that end a cycle: 3 or 7"]
    assert s.warnings(trial()) == []


def test_without_restarts_the_budget_is_the_one_cycle() -> None:
    for name in ("constant", "linear", "cosine"):
        t = trial(schedule={"name": name})
        assert s.cycle_ends(t) == [245]
        assert s.schedule(t, 0) == (1.0, 0, 0.05 / math.sqrt(245))
    assert s.schedule(trial(schedule={"name": "linear", "eta_min": 0.2}), 49)[0] == pytest.approx(0.2 + 0.8 * 0.8)
    step = trial(schedule={"name": "step", "milestones": [2, 4], "gamma": 0.1})
    assert [s.schedule(step, i)[0] for i in (69, 70, 139, 140)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_warm_up_scales_eta_only_and_moves_no_cycle_end() -> None:
    plain, warm = (trial(schedule=restarts(t_0=1, t_mult=2, warmup_epochs=w)) for w in (0, 0.2))
    assert s.cycles(plain) == s.cycles(warm)
    for step in range(245):
        eta, cycle, lam = s.schedule(plain, step)
        assert s.schedule(warm, step) == (eta * min(1.0, (step + 1) / 7), cycle, lam)


def test_steps_per_epoch_is_floored_and_training_excludes_the_holdout() -> None:
    t = trial(data={"holdout_per_class": 45}, budget={"epochs": 2.5, "global_batch_size": 100})
    assert (s.steps_per_epoch(t), s.total_steps(t)) == (35, 88)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (restarts(t_0=0.001), "schedule.t_0: 0.001 epochs is less than one optimizer step; e.g. 0.02857"),
        (restarts(t_0=1, warmup_epochs=1.5), "schedule.warmup_epochs: 1.5 must not exceed the first cycle, 1 epochs; e.g. 0.1"),
        (restarts(t_0=1, t_mult=0.5), "schedule.t_mult: 0.5 must be greater than or equal to 1; e.g. 2"),
        ({"name": "step", "milestones": [4, 2]}, "schedule.milestones: [4, 2] must ascend; e.g. [2.0, 4.0]"),
        ({"name": "cosin"}, "schedule.name: 'cosin' is not known; did you mean 'cosine'?"),
    ],
)
def test_mistakes_are_named(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match="test: ") as error:
        trial(schedule=schedule)
    assert message in str(error.value)


RGB = {"channels": 3, "mean": [0.5] * 3, "std": [0.3] * 3}


def growing(size: int, budget: float, **resolution: Any) -> Trial:
    return trial(
        data=RGB | {"image_size": size}, model="resnet18", recipe={"crop": {}, "resolution": resolution},
        budget={"epochs": budget, "global_batch_size": 100}, schedule={"name": "cosine"},
    )  # fmt: skip


def sizes(t: Trial) -> list[int]:
    """By epoch; the same for all steps of one."""
    per_epoch = s.steps_per_epoch(t)
    steps = [s.image_size(t, step) for step in range(s.total_steps(t))]
    epochs = [steps[start : start + per_epoch] for start in range(0, len(steps), per_epoch)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


@pytest.mark.parametrize(
    ("budget", "ramp", "expected"),
    [  # libffcv/ffcv-imagenet, rn50_configs: what its get_resolution gives for epochs 0, 1, ...
        (88, [65, 76], [160] * 71 + [192] * 17),
        (16, [11, 13], [160] * 12 + [192] * 4),
        (4, [0, 3], [160, 160, 192, 192]),
    ],
)
def test_image_sizes_are_those_of_ffcv(budget: int, ramp: list[int], expected: list[int]) -> None:
    assert sizes(growing(192, budget, start=160, epochs=ramp)) == expected


@pytest.mark.parametrize("multiple", [1, 4, 8, 32])
@pytest.mark.parametrize(("start", "size"), [(32, 64), (128, 224), (96, 416)])
@pytest.mark.parametrize("ramp", [(0, 1), (0, 12), (2.5, 7.25), (3, 30)])
def test_image_sizes_ascend_within_their_bounds(multiple: int, start: int, size: int, ramp: tuple[float, float]) -> None:
    """Exact at both ends, a multiple everywhere, and within half of one of the straight line."""
    found = sizes(growing(size, 12.3, start=start, epochs=ramp, multiple=multiple))
    assert len(found) == 13 and found == sorted(found)
    for epoch, pixels in enumerate(found):
        line = float(np.interp(epoch, ramp, (start, size)))
        assert start <= pixels <= size and pixels % multiple == 0 and abs(pixels - line) <= multiple / 2
        if not ramp[0] < epoch < ramp[1]:
            assert pixels == line
    assert {s.image_size(trial(), step) for step in range(245)} == {28}, "without a resolution"


def test_a_budget_that_ends_before_images_have_grown_is_warned_of() -> None:
    assert s.warnings(growing(192, 12, start=160, epochs=[2, 11])) == []
    assert s.warnings(growing(192, 12, start=160, epochs=[2, 76])) == [
        "workload.recipe.resolution.epochs: the budget of 12 epochs ends at 160 pixels, before images have grown to 192"
    ]


def test_a_step_outside_the_budget_is_refused() -> None:
    for step in (-1, 245):
        with pytest.raises(ValueError, match=r"must be in \[0, 245\)"):
            s.schedule(trial(), step)
