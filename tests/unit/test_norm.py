"""Batch norm against means and variances taken by hand, and against torch's own layer on each group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness import models
from harness.config import Recipe, Workload
from harness.dist import Ranks
from harness.norm import BatchNorm, discard_statistics, layers, update_running_statistics
from harness.vision import torchvision
from tests.trials import trial

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
LIMIT = {torch.float32: 2e-6, torch.float64: 1e-14}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(samples: int, seed: int = 0, channels: int = 5) -> Tensor:
    """float64 (samples, channels, 6, 4): correlated within an image, another scale and offset in each channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, 6, 4, dtype=torch.float64, generator=generator)
    x += 2 * torch.randn(samples, channels, 1, 1, dtype=torch.float64, generator=generator)
    spread = torch.arange(1, channels + 1, dtype=torch.float64).reshape(1, channels, 1, 1)
    return x * spread - 3 * spread


def layer(norm_batch_size: int | None, dtype: torch.dtype = torch.float64, channels: int = 5) -> BatchNorm:
    """With weights and running statistics that are not the initial ones."""
    made = BatchNorm(channels, norm_batch_size).to(dtype)
    with torch.no_grad():
        for place, tensor in enumerate((made.weight, made.bias, made.running_mean, made.running_var)):
            tensor.copy_(torch.linspace(0.5 + place, 1.5 + place, channels))
    return made


def by_hand(x: Tensor, group: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output, means (G, C), unbiased variances (G, C)) of a contiguous group after the other, in float64."""
    out, means, variances = torch.empty_like(x, dtype=torch.float64), [], []
    for start in range(0, len(x), group):
        for c in range(x.shape[1]):
            values = x[start : start + group, c].double()
            mean = values.sum() / values.numel()
            squares = (values - mean).square().sum()
            scaled = (values - mean) / (squares / values.numel() + 1e-5).sqrt()
            out[start : start + group, c] = scaled * weight[c].double() + bias[c].double()
            means.append(mean)
            variances.append(squares / (values.numel() - 1))
    return out, torch.stack(means).reshape(-1, x.shape[1]), torch.stack(variances).reshape(-1, x.shape[1])


def close(a: Tensor, b: Tensor, limit: float) -> bool:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm()) < limit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("group", [None, 12, 6, 3, 2])
def test_forward_and_update_equal_what_is_done_by_hand(group: int | None, dtype: torch.dtype, layout: torch.memory_format) -> None:
    ours = layer(group, dtype)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    means, variances = [], []
    for seed in (1, 2):
        x = images(12, seed).to(dtype).contiguous(memory_format=layout)
        out = ours(x)
        expected, m, v = by_hand(x, group or 12, ours.weight, ours.bias)
        assert close(out, expected, LIMIT[dtype])
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
        means.append(m)
        variances.append(v)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items()), "forward only collects"

    update_running_statistics(layers(ours), ALONE)
    assert close(ours.running_mean, 0.9 * before["running_mean"].double() + 0.1 * torch.cat(means).mean(0), LIMIT[dtype])
    assert close(ours.running_var, 0.9 * before["running_var"].double() + 0.1 * torch.cat(variances).mean(0), LIMIT[dtype])
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [None, 4, 2])
def test_gradients_are_those_of_torchs_layer_on_each_group(group: int | None, layout: torch.memory_format) -> None:
    ours, control = layer(group), nn.BatchNorm2d(5).double()
    control.load_state_dict(ours.state_dict())
    x = images(8).contiguous(memory_format=layout)
    towards = images(8, seed=9)
    x_ours, x_control = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(x_ours).backward(towards)
    torch.cat([control(part) for part in x_control.split(group or 8)]).backward(towards)
    for mine, other in ((x_ours, x_control), (ours.weight, control.weight), (ours.bias, control.bias)):
        assert mine.grad is not None and other.grad is not None and close(mine.grad, other.grad, 1e-13)


def test_one_group_a_step_and_evaluation_are_torchs_own_layer() -> None:
    ours, control = layer(None), nn.BatchNorm2d(5).double()
    control.load_state_dict(ours.state_dict())
    for step in range(3):
        assert torch.equal(ours(images(8, step)), control(images(8, step)))
        update_running_statistics(layers(ours), ALONE)
    for name, value in control.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-14)
    ours.load_state_dict(control.state_dict())
    assert torch.equal(ours.eval()(images(7)), control.eval()(images(7)))  # 7: evaluation has no groups
    assert not ours.collected.any(), "evaluation collects nothing"


def test_running_statistics_do_not_depend_on_how_a_batch_is_cut_into_micro_batches() -> None:
    found = []
    for micro in (24, 12, 4):
        ours = layer(4)
        for step in range(3):
            for part in images(24, step).split(micro):
                ours(part)
            update_running_statistics(layers(ours), ALONE)
        found.append(torch.stack((ours.running_mean, ours.running_var)))
    assert close(found[1], found[0], 1e-15) and close(found[2], found[0], 1e-15)


def test_the_variance_is_the_one_training_divides_by_and_not_that_of_the_pooled_batch() -> None:
    ours = layer(4)
    ours.momentum = 1.0
    x = images(256, channels=5)
    ours(x)
    update_running_statistics(layers(ours), ALONE)
    within = torch.stack([part.var((0, 2, 3)) for part in x.split(4)]).mean(0)
    assert close(ours.running_var, within, 1e-14)
    assert float((x.var((0, 2, 3)) / ours.running_var).min()) > 1.1, "the images are correlated within, so that pooling shows"


def test_discarded_statistics_leave_no_trace() -> None:
    ours, control = layer(2), layer(2)
    ours(images(4, seed=5))
    discard_statistics(layers(ours))
    for model in (ours, control):
        model(images(4, seed=6))
        update_running_statistics(layers(model), ALONE)
    assert torch.equal(ours.running_var, control.running_var) and torch.equal(ours.running_mean, control.running_mean)


def test_a_layer_that_no_sample_went_through_keeps_its_statistics() -> None:
    used, unused = layer(2), layer(2, channels=3)
    used(images(4))
    update_running_statistics(layers(nn.ModuleList([unused, used])), ALONE)
    assert torch.equal(unused.running_mean, layer(2, channels=3).running_mean)
    assert torch.equal(unused.running_var, layer(2, channels=3).running_var)
    assert not torch.equal(used.running_mean, layer(2).running_mean)


def test_a_group_that_does_not_divide_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^norm_batch_size: 4 does not divide the 6 samples of a forward pass$"):
        layer(4)(images(6))


def test_the_collection_follows_the_model_to_its_device_in_float64() -> None:
    moved = BatchNorm(5).to("meta", torch.float32)
    assert moved.running_mean.device.type == moved.collected.device.type == "meta"
    assert moved.running_mean.dtype == torch.float32 and moved.collected.dtype == torch.float64


def test_training_forward_without_gradients_collects_too() -> None:
    ours = layer(2)
    with torch.no_grad():
        ours(images(4))
    update_running_statistics(layers(ours), ALONE)
    _, means, _ = by_hand(images(4), 2, ours.weight, ours.bias)
    assert close(ours.running_mean, 0.9 * layer(2).running_mean + 0.1 * means.mean(0), 1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_takes_statistics_in_float32(layout: torch.memory_format) -> None:
    ours = layer(4, torch.float32)
    x = images(8).to(torch.bfloat16).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=layout)
    _, means, variances = by_hand(x, 4, ours.weight, ours.bias)
    update_running_statistics(layers(ours), ALONE)
    assert ours.running_mean.dtype == torch.float32
    assert close(ours.running_mean, 0.9 * layer(4).running_mean + 0.1 * means.mean(0), 1e-6)
    assert close(ours.running_var, 0.9 * layer(4).running_var + 0.1 * variances.mean(0), 1e-6)


@pytest.mark.parametrize("group", [None, 4])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_it_is_one_graph_that_collects_the_same(group: int | None) -> None:
    torch._dynamo.reset()
    ours, control = layer(group), layer(group)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for step in range(3):
        found = []
        for model, forward in ((ours, compiled), (control, control)):
            x = images(8, step).requires_grad_()
            out = forward(x)
            out.backward(images(8, seed=9))
            forward(images(8, step + 20).requires_grad_()).backward(images(8, seed=9))
            update_running_statistics(layers(model), ALONE)
            assert x.grad is not None
            found.append((out, x.grad))
        assert all(close(a, b, 1e-13) for a, b in zip(*found, strict=True))
    for name, value in control.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-13), name
    assert ours.weight.grad is not None and control.weight.grad is not None and close(ours.weight.grad, control.weight.grad, 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_under_autocast_it_keeps_type_and_order_in_memory(layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    ours = layer(4, torch.float32)
    x = images(8).to(torch.bfloat16).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = torch.compile(ours, backend="aot_eager", fullgraph=True)(x), ours(x)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=layout)
    assert close(out, expected, 1e-3), "at most a last bit of a few"


def test_a_model_without_batch_norm_takes_part_in_no_collective() -> None:
    second_of_two = Ranks(1, 1, 2, torch.device("cpu"))  # of a process group that does not exist
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    update_running_statistics(layers(net), second_of_two)
    discard_statistics(layers(net))
    with pytest.raises(ValueError, match="process group"):
        update_running_statistics(layers(nn.Sequential(net, layer(2))), second_of_two)


def workload(name: str, **recipe: object) -> Workload:
    rgb = {"channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3} if name.startswith("resnet") else {}
    return trial(model=name, data=rgb).workload.model_copy(update={"recipe": Recipe.model_validate(recipe)})


def test_resnets_are_torchvisions_with_this_layer_throughout() -> None:
    ours = models.build(workload("resnet18", norm_batch_size=4), seed=3).net
    torch.manual_seed(3)
    stock = torchvision().models.resnet18(num_classes=10)
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in stock.modules()) == 20
    assert all(isinstance(m, BatchNorm) and m.norm_batch_size == 4 for m in norms)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in stock.state_dict().items())


def test_the_reference_model_starts_as_mnist5k_cnn_does_and_has_no_bias_before_a_norm() -> None:
    group_norm, batch_norm = (models.build(workload(name), seed=3).net for name in ("mnist5k_cnn", "mnist5k_cnn_bn"))
    weights = batch_norm.state_dict()
    for name, value in group_norm.state_dict().items():
        assert torch.equal(value, weights[name])
    assert sum(isinstance(m, BatchNorm) for m in batch_norm.modules()) == 3
    assert all(m.bias is None for m in batch_norm.modules() if isinstance(m, nn.Conv2d))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in group_norm.modules())


def test_bf16_is_autocast_in_training_and_full_precision_in_evaluation() -> None:
    digits = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    full, mixed = (models.build(workload("mnist5k_cnn_bn", precision=precision), seed=0) for precision in ("fp32", "bf16"))
    seen: list[torch.dtype] = []
    mixed.net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits, expected = mixed(digits), full(digits).detach()
    logits.sum().backward()
    logits = logits.detach()
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32 and {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert 1e-4 < float((logits - expected).norm() / expected.norm()) < 0.05
    assert torch.equal(mixed.eval()(digits), full.eval()(digits)) and seen[-1] == torch.float32


def test_fp64_is_double_throughout() -> None:
    model = models.build(workload("mnist5k_cnn_bn", precision="fp64"), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.zeros(4, 1, 28, 28, dtype=torch.uint8)).dtype == torch.float64
