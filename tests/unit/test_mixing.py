"""Mixup and CutMix: the draws, and the images and losses against slow controls."""

import numpy as np
import pytest
import torch
from scipy import stats

from harness import mixing
from harness.config import BadInput
from harness.data import order
from harness.data.order import Mixing
from tests.trials import trial

SIZE = 32


def draws(mixup, cutmix, steps=2000, seed=1):
    return [order.mixing(seed, step, mixup, cutmix, SIZE) for step in range(steps)]


def test_golden_values():
    """A stored study can be continued, on any machine."""
    assert order.mixing(7, 3, 0.0, 0.0, SIZE) is None
    assert order.mixing(7, 3, 0.2, 0.0, SIZE) == Mixing(pytest.approx(0.027588921016261658, rel=1e-12), None)
    assert order.mixing(7, 3, 0.0, 1.0, SIZE) == Mixing(0.548828125, (0, 0, 21, 22))


def test_shares_are_of_beta():
    for alpha in (0.2, 1.0):
        shares = [mix.share for mix in draws(alpha, 0.0)]
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
        assert all(mix.box is None for mix in draws(alpha, 0.0, 10))


def test_boxes_are_what_the_share_leaves():
    """Inside the image; of the drawn area but for rounding where the border cuts nothing off; the centre is uniform."""
    boxes = [mix.box for mix in draws(0.0, 1.0)]
    for mix in draws(0.0, 1.0):
        left, top, width, height = mix.box
        assert 0 <= left <= left + width <= SIZE
        assert 0 <= top <= top + height <= SIZE
        assert mix.share == pytest.approx(1 - width * height / SIZE**2)
        if min(left, top) > 0 and max(left + width, top + height) < SIZE:
            assert abs(width - height) <= 1
    small = [box for box in boxes if 0 < box[2] <= 4 and 0 < box[3] <= 4]
    centres = [(left + width / 2) / SIZE for left, _, width, _ in small]
    assert len(small) > 20
    assert stats.kstest(centres, "uniform").pvalue > 1e-3


def test_with_both_either_half_of_the_time():
    mixes = draws(0.2, 1.0)
    assert 900 < sum(mix.box is None for mix in mixes) < 1100
    assert len({mix.share for mix in mixes}) > 1000
    assert mixes[:5] != draws(0.2, 1.0, 5, seed=2)


@pytest.mark.parametrize(
    "mix", [Mixing(0.3, None), Mixing(1 - 6 / SIZE**2, (4, 5, 2, 3)), Mixing(1.0, (4, 5, 0, 0)), Mixing(0.0, (0, 0, SIZE, SIZE))]
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_images_and_losses_against_a_slow_control(mix, form):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 3, SIZE, SIZE), dtype=np.uint8), rng.integers(0, 5, 6)
    mixed = mixing.images(torch.from_numpy(images.copy()).contiguous(memory_format=form), mix, torch.float64)
    for i in range(6):
        other = images[i + 1 if i % 2 == 0 else i - 1]
        if mix.box is None:
            assert np.allclose(mixed[i].numpy(), mix.share * images[i].astype(float) + (1 - mix.share) * other.astype(float), atol=1e-10)
            continue
        left, top, width, height = mix.box
        for y in range(SIZE):
            for x in range(SIZE):
                theirs = left <= x < left + width and top <= y < top + height
                assert mixed[i, :, y, x].tolist() == (other if theirs else images[i])[:, y, x].tolist()
    logits = torch.from_numpy(rng.normal(size=(6, 5)))
    soft = torch.zeros(6, 5, dtype=torch.float64)
    for i in range(6):
        soft[i, labels[i]] += mix.share
        soft[i, labels[i + 1 if i % 2 == 0 else i - 1]] += 1 - mix.share
    for smoothing in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(logits, soft, label_smoothing=smoothing)
        assert mixing.cross_entropy(logits, torch.from_numpy(labels), mix, smoothing).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_same_however_the_batch_is_split():
    images = torch.randint(0, 256, (12, 1, SIZE, SIZE), dtype=torch.uint8)
    for mix in draws(0.2, 1.0, 6):
        whole = mixing.images(images, mix, torch.float32)
        for size in (2, 4, 6):
            assert torch.equal(torch.cat([mixing.images(part, mix, torch.float32) for part in images.split(size)]), whole)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "advice"),
    [
        (
            100,
            None,
            4,
            "the micro-batch of 25 on each of 4 rank(s) is odd; e.g. budget.global_batch_size 104 and backend.micro_batch_size 2",
        ),
        (100, 5, 1, "the micro-batch of 5 on each of 1 rank(s) is odd; e.g. backend.micro_batch_size 4"),
        (6, 1, 1, "the micro-batch of 1 on each of 1 rank(s) is odd; e.g. backend.micro_batch_size 2"),
    ],
)
def test_pairs_need_even_micro_batches(batch, micro, world, advice):
    t = trial(recipe={"cutmix": 1.0}, budget={"epochs": 1, "global_batch_size": batch}, backend={"micro_batch_size": micro})
    with pytest.raises(BadInput, match="cutmix: mixes pairs") as refused:
        t.micro_batch_size(world)
    assert advice in str(refused.value)
    assert trial(budget={"epochs": 1, "global_batch_size": 100}).micro_batch_size(4) == 25
