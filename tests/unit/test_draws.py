"""Random layers: their numbers, and each rule of Shake-Shake and of stochastic depth against plain arithmetic."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from harness import draws
from harness.data import order
from harness.draws import ShakeShake, StochasticDepth

CPU = torch.device("cpu")


def given(layer: draws.Drawn, *numbers: list[float]) -> draws.Drawn:
    layer._given = torch.tensor(numbers, dtype=torch.float32)
    return layer.train()


def branches() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind()
    return a.requires_grad_(), b.requires_grad_()


def test_golden_values() -> None:
    """A stored study can be continued, on any machine."""
    assert order.layer_draws(7, 3, 2, 3).tolist() == [
        [0.9567662477493286, 0.3662022352218628, 0.17337924242019653],
        [0.4021722078323364, 0.43930310010910034, 0.22514748573303223],
    ]


def test_numbers_are_uniform_and_of_their_key_alone() -> None:
    numbers = order.layer_draws(1, 5, 24, 128)
    assert numbers.dtype == np.float32
    assert 0 <= numbers.min() < numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers)[np.triu_indices(24, 1)]).max() < 0.4, "layers are independent"
    for other in (order.layer_draws(2, 5, 24, 128), order.layer_draws(1, 6, 24, 128)):
        assert not np.isin(other, numbers).any()


def test_parts_of_a_batch_have_the_numbers_of_the_whole() -> None:
    """Whatever ranks and micro-batches it is split over."""
    model = nn.Sequential(nn.Sequential(StochasticDepth(0.5)), StochasticDepth(0.1))

    def of(first: int, samples: int) -> list[torch.Tensor]:
        draws.assign(draws.layers(model), 3, 11, 12, first, samples, CPU)
        return [layer._given for layer in (model[0][0], model[1])]

    whole = of(0, 12)
    for parts in ([of(0, 6), of(6, 6)], [of(0, 2), of(2, 6), of(8, 4)]):
        for layer in (0, 1):
            assert torch.equal(torch.cat([part[layer] for part in parts], dim=1), whole[layer])
    assert not torch.equal(whole[0], whole[1])


def test_shake_forward_is_a_weighted_sum_image_by_image() -> None:
    a, b = branches()
    out = given(ShakeShake(), [0.0, 0.25, 0.875], [0.5, 0.5, 0.5])(a, b)
    for image, alpha in enumerate((0.0, 0.25, 0.875)):
        torch.testing.assert_close(out[image], alpha * a[image] + (1 - alpha) * b[image], rtol=1e-14, atol=1e-14)


def test_shake_backward_has_weights_of_its_own() -> None:
    a, b = branches()
    out = given(ShakeShake(), [0.1, 0.2, 0.3], [0.5, 0.75, 0.0])(a, b)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    for image, beta in enumerate((0.5, 0.75, 0.0)):
        torch.testing.assert_close(a.grad[image], beta * gradient[image], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(b.grad[image], (1 - beta) * gradient[image], rtol=1e-14, atol=1e-14)


def test_shake_evaluates_with_the_mean_of_both() -> None:
    a, b = branches()
    torch.testing.assert_close(given(ShakeShake(), [0.1] * 3, [0.2] * 3).eval()(a, b), (a + b) / 2, rtol=1e-14, atol=1e-14)


def test_stochastic_depth_leaves_out_and_scales() -> None:
    branch = torch.randn(4, 2, 3)
    out = given(StochasticDepth(0.2), [0.0, 0.19, 0.21, 0.99])(branch)
    assert not out[:2].any()
    torch.testing.assert_close(out[2:], branch[2:] / 0.8)
    assert torch.equal(given(StochasticDepth(0.2), [0.0] * 4).eval()(branch), branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_before_a_step_a_layer_has_one_halves(dtype: torch.dtype) -> None:
    """The throw-away pass that settles DDP's buckets draws nothing."""
    a, b = torch.randn(2, 3, 2, dtype=dtype).unbind()
    assert torch.equal(ShakeShake().train()(a, b), torch.lerp(b, a, 0.5))
