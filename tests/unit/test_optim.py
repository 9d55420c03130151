"""Every meaningful (optimizer, decay) against the NumPy reference: float64, 200 steps, five restarts, below 1e-12."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness import optim
from harness.schedule import schedule
from tests import reference
from tests.trials import trial

STEPS = 200
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
ADAM = {"name": "adam", "lr": 0.01}
OPTIMIZERS = [SGD, SGD | {"lr_in_buffer": True}, SGD | {"momentum": 0.0}, ADAM, ADAM | {"betas": [0.8, 0.95], "eps": 1e-4}]
DECAYS = [
    {"name": "none"},
    {"name": "l2", "weight_decay": 0.03},
    {"name": "l2", "weight_decay": 0.03, "exempt_1d": True},
    {"name": "decoupled", "weight_decay": 0.01},
    {"name": "decoupled", "weight_decay": 0.2, "units": "torch"},
    {"name": "decoupled", "weight_decay": 0.1, "normalised": True},
    {"name": "decoupled", "weight_decay": 0.1, "normalised": True, "exempt_1d": True},
]


def control(t: Any) -> reference.Sgd | reference.Adam:
    if t.optimizer.name == "sgd":
        return reference.Sgd(t.optimizer.lr, t.optimizer.momentum, t.decay.name, t.optimizer.lr_in_buffer)
    return reference.Adam(t.optimizer.lr, *t.optimizer.betas, t.optimizer.eps, t.decay.name)


def reference_lambda(t: Any, cycle_steps: int) -> float:
    d = t.decay
    if d.name == "none":
        return 0.0
    if d.name == "l2" or not d.normalised:
        return d.weight_decay * (t.optimizer.lr if d.name == "decoupled" and d.units == "torch" else 1)
    return d.weight_decay / np.sqrt(cycle_steps)


@pytest.mark.parametrize(("optimizer", "decay"), list(itertools.product(OPTIMIZERS, DECAYS)))
def test_update_equals_reference(optimizer: dict[str, Any], decay: dict[str, Any]) -> None:
    # 6 steps an epoch: cycles end at steps 6, 18, 42, 90, 186, so the 200 steps cross five restarts
    t = trial(
        optimizer=optimizer, decay=decay, budget={"epochs": 34, "global_batch_size": 583},
        schedule={"name": "cosine_restarts", "t_0": 1, "t_mult": 2, "eta_min": 0.01},
    )  # fmt: skip
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    data, target = torch.randn(64, 7, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    built = optim.build(net.named_parameters(), t.optimizer, t.decay)
    theta = {n: p.detach().numpy().copy() for n, p in net.named_parameters()}
    slow = control(t)
    for step in range(STEPS):
        nn.functional.mse_loss(net(data), target).backward()
        grad = {n: p.grad.numpy().copy() for n, p in net.named_parameters() if p.grad is not None}
        eta, _, lam = schedule(t, step)
        optim.write(built, *optim.hyperparameters(t.optimizer, t.decay, eta, lam))
        built.step()
        built.zero_grad()

        ref_eta, _, cycle_steps = reference.eta_cosine_restarts(step, 6, 1, 2, 0.01)
        one = reference_lambda(t, cycle_steps)
        exempt = getattr(t.decay, "exempt_1d", False)
        slow.step(theta, grad, ref_eta, {n: 0.0 if exempt and theta[n].ndim <= 1 else one for n in theta})
    for name, parameter in net.named_parameters():
        ours = parameter.detach().numpy()
        error = np.linalg.norm(ours - theta[name]) / np.linalg.norm(theta[name])
        assert error < 1e-12, f"{name}: relative error {error:.2e}"


def test_torch_units_times_alpha_are_paper_units() -> None:
    """lambda_paper = alpha * weight_decay_torch: one decay written in both units takes the same steps."""
    paper = trial(optimizer=ADAM, decay={"name": "decoupled", "weight_decay": 0.002}, schedule={"name": "cosine"})
    torch_ = trial(optimizer=ADAM, decay={"name": "decoupled", "weight_decay": 0.2, "units": "torch"}, schedule={"name": "cosine"})
    assert paper.trial_id != torch_.trial_id
    for step in (0, 17, 200):
        assert schedule(paper, step)[2] == pytest.approx(schedule(torch_, step)[2], rel=1e-15)


def test_paper_units_equal_torchs_own_adamw_at_alpha_times_weight_decay() -> None:
    """The trap, from the other side: torch.optim.AdamW(weight_decay=lambda/alpha) is decoupled decay lambda."""
    t = trial(optimizer=ADAM, decay={"name": "decoupled", "weight_decay": 0.002}, schedule={"name": "linear"})
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    theirs.load_state_dict(ours.state_dict())
    a = optim.build(ours.named_parameters(), t.optimizer, t.decay)
    b = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.002 / 0.01)
    x = torch.randn(8, 5, dtype=torch.float64)
    for step in range(50):
        eta, _, lam = schedule(t, step)
        for net, optimizer in ((ours, a), (theirs, b)):
            net(x).square().mean().backward()
            if optimizer is a:
                optim.write(a, *optim.hyperparameters(t.optimizer, t.decay, eta, lam))
            else:
                b.param_groups[0]["lr"] = eta * 0.01
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-13, atol=0)


@pytest.mark.parametrize("optimizer", [SGD, SGD | {"lr_in_buffer": True}, ADAM])
def test_zero_lr_still_decays(optimizer: dict[str, Any]) -> None:
    t = trial(optimizer=optimizer, decay={"name": "decoupled", "weight_decay": 0.1})
    net = nn.Linear(3, 3).double()
    before = net.weight.detach().clone()
    built = optim.build(net.named_parameters(), t.optimizer, t.decay)
    net(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optim.write(built, 0.0, 0.25)
    built.step()
    torch.testing.assert_close(net.weight.detach(), 0.75 * before, rtol=1e-15, atol=0)


def test_param_groups_cover_every_parameter_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for decay in ({"name": "none"}, {"name": "l2", "weight_decay": 1.0, "exempt_1d": True}, {"name": "l2", "weight_decay": 1.0}):
        groups = optim.param_groups(net.named_parameters(), trial(decay=decay).decay)
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in net.parameters())
        for group in groups:
            if group["decays"]:
                assert decay["name"] != "none"
                assert not decay.get("exempt_1d") or all(p.ndim > 1 for p in group["params"])


def test_layer_scales_are_spared_like_other_values_of_channels() -> None:
    net = torch.nn.ParameterDict(
        {name: torch.ones(shape) for name, shape in (("layer_scale", (8, 1, 1)), ("depthwise", (8, 1, 7, 7)), ("token", (1, 1, 8)))}
    )
    decaying, exempt = optim.param_groups(net.named_parameters(), trial(decay={"name": "l2", "weight_decay": 1.0, "exempt_1d": True}).decay)
    assert [tuple(p.shape) for p in exempt["params"]] == [(8, 1, 1)]
    assert len(decaying["params"]) == 2


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_are_updated_whole_whatever_their_memory_order(order: torch.memory_format) -> None:
    t = trial(optimizer=SGD, decay={"name": "decoupled", "weight_decay": 0.1})
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 1100, 3, 3, dtype=torch.float64).to(memory_format=order))
    built = optim.build([("w", parameter)], t.optimizer, t.decay)
    slow, theta = reference.Sgd(0.05, 0.9, "decoupled", False), {"w": parameter.detach().numpy().copy()}
    for eta in (1.0, 0.5, 1.0):
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64).to(memory_format=order)  # as autograd lays it out
        slow.step(theta, {"w": parameter.grad.numpy().copy()}, eta, {"w": 0.1})
        optim.write(built, *optim.hyperparameters(t.optimizer, t.decay, eta, 0.1))
        built.step()
    assert np.abs(parameter.detach().numpy() - theta["w"]).max() < 1e-14


class Kernels:
    """Stands for harness.one_pass, which needs a GPU: its two steps in plain torch."""

    def __init__(self, can: bool = True) -> None:
        self.possible, self.calls = can, 0

    def can(self, columns: list[list[torch.Tensor]]) -> bool:
        return self.possible

    def sgdw(self, columns: list[list[torch.Tensor]], lr: float, momentum: float, weight_decay: float) -> None:
        self.calls += 1
        for theta, gradient, buffer in zip(*columns, strict=True):
            buffer.mul_(momentum).add_(gradient)
            theta.sub_(weight_decay * theta + lr * buffer)

    def adamw(
        self, columns: list[list[torch.Tensor]], steps: list[torch.Tensor], lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        self.calls += 1
        for theta, gradient, first, second, step in zip(*columns, steps, strict=True):
            first.lerp_(gradient, 1 - betas[0])
            second.lerp_(gradient.square(), 1 - betas[1])
            hats = [moment / (1 - beta ** float(step)) for moment, beta in zip((first, second), betas, strict=True)]
            theta.sub_(weight_decay * theta + lr * hats[0] / (hats[1].sqrt() + eps))


@pytest.mark.parametrize(
    "optimizer", [{"name": "sgd", "lr": 0.1}, {"name": "adam", "lr": 0.1}, {"name": "sgd", "lr": 0.1, "momentum": 0.0}]
)
@pytest.mark.parametrize("possible", [True, False], ids=["one-pass", "torch"])
def test_a_step_in_one_pass_is_the_step(monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], possible: bool) -> None:
    """Also where a group, or a parameter, has no gradient, and where the way changes from one step to the next."""
    t = trial(optimizer=optimizer, decay={"name": "decoupled", "weight_decay": 0.1, "exempt_1d": True})
    torch.manual_seed(0)
    start = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    ends = []
    for kernels in (None, Kernels(possible)):
        monkeypatch.setattr(optim, "_kernels", lambda weights, kernels=kernels: kernels if weights else None)
        parameters = [(str(i), nn.Parameter(w.clone())) for i, w in enumerate(start)]
        built = optim.build(parameters, t.optimizer, t.decay)
        for step, without in enumerate(((), (2,), (0, 1), (0, 1, 2), (1,), ())):
            optim.write(built, 0.05 * step, 0.01)  # the first at lr 0
            for i, (_, p) in enumerate(parameters):
                p.grad = None if i in without else torch.full_like(p, 0.3 * (i + 1) * (-1) ** step)
            if kernels is not None and step == 4:
                monkeypatch.setattr(optim, "_kernels", lambda weights: None)
            built.step()
        ends.append([p.detach() for _, p in parameters])
        if kernels is not None:
            assert bool(kernels.calls) == (possible and optimizer.get("momentum", 1) > 0)
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_every_rank_steps_by_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose cache is full would drift from the others by rounding."""
    weights, kernels = [SimpleNamespace(is_cuda=True)], object()
    monkeypatch.setattr(optim, "_one_pass", lambda: kernels)

    def others(that_can: int) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), world_size=3, sums=lambda values: [float(values[0]) + that_can])

    monkeypatch.setattr(optim, "_everywhere", True)
    with pytest.warns(UserWarning, match=r"^steps are torch's, .* on another rank$"):
        optim.agree(others(1), trial().decay)
    assert optim._kernels(weights) is None  # type: ignore[arg-type]
    optim.agree(others(2), trial().decay)
    assert optim._kernels(weights) is kernels  # type: ignore[arg-type]
    monkeypatch.setattr(optim, "_one_pass", lambda: pytest.fail("nothing of this trial needs them"))
    optim.agree(others(2), trial(decay={"name": "l2", "weight_decay": 0.1}).decay)


def test_where_triton_cannot_make_them_steps_are_torchs_and_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    there = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True), import_module=lambda name: SimpleNamespace(probe=probe))
    monkeypatch.setattr(optim, "importlib", there)
    optim._one_pass.cache_clear()
    with pytest.warns(UserWarning, match=r"^steps are torch's, .* since triton cannot make ours: Failed to find C compiler\.$"):
        assert optim._one_pass() is None
    optim._one_pass.cache_clear()
