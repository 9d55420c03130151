"""The sample order and the augmentation draws are pure functions of (seed, epoch, n)."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from harness.data import order


def digest(array):
    return hashlib.sha256(np.asarray(array, dtype="<i8").tobytes()).hexdigest()[:16]


GOLDEN_SMALL = [3, 8, 5, 9, 6, 0, 7, 1, 4, 2]
GOLDEN_ORDER = "eb3862876cb9999e"
GOLDEN_AUGMENTATION = "0ebc046afe9d645a"
GOLDEN_CROP = (216, 100, 199, 181)
GOLDEN_FAR_CROP = (122, 50, 189, 185)


def test_golden_values():
    """The same in every process, on every machine, with every version of NumPy: a stored study can be continued."""
    assert order.permutation(0, 0, 10).tolist() == GOLDEN_SMALL
    assert digest(order.permutation(7, 3, 3500)) == GOLDEN_ORDER
    draws = order.augmentation(7, 3, 3500, 2)
    assert digest(np.stack([draws.dx, draws.dy, draws.flip])) == GOLDEN_AUGMENTATION


def test_an_epoch_is_a_permutation_and_its_batches_are_its_prefix():
    n, batch, per_epoch = 107, 10, 10
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = np.concatenate([order.batch_positions(5, s, per_epoch, batch, n) for s in steps])
        assert seen.tolist() == order.permutation(5, epoch, n)[:100].tolist()
        assert len(set(seen.tolist())) == 100
    assert sorted(order.permutation(5, 0, n).tolist()) == list(range(n))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(order.permutation(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_is_equally_likely():
    """Chi-square of the place of each sample, 2000 epochs: 81 degrees of freedom, far below the 1e-6 quantile."""
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[np.arange(10), order.permutation(1, epoch, 10)] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 160


def test_a_windowed_order_keeps_blocks_together():
    """Every position once; at any time from few blocks only; blocks and what they are mixed with differ between epochs."""
    n, windowed = 1003, order.Windowed(block=10, blocks=4)
    orders = [order.permutation(3, epoch, n, windowed) for epoch in range(20)]
    for places in orders:
        assert sorted(places.tolist()) == list(range(n))
        blocks = places // 10
        assert all(len(set(blocks[i : i + 40].tolist())) <= 12 for i in range(0, n, 7)), "of three windows at most"
        assert not (np.diff(places) == 1).mean() > 0.1, "mixed inside"
    assert len({tuple(o.tolist()) for o in orders}) == 20
    assert np.corrcoef(orders[0], orders[1])[0, 1] < 0.2
    together = np.mean([len(set((o[:37] // 10).tolist()) & set((orders[0][:37] // 10).tolist())) for o in orders[1:]])
    assert together < 1.5, "other blocks are mixed in another epoch"
    seen = np.concatenate([order.batch_positions(3, s, 100, 10, n, windowed) for s in range(100, 200)])
    assert seen.tolist() == orders[1][:1000].tolist()
    assert (order.permutation(3, 5, n, order.Windowed(n, 1)) == order.permutation(3, 5, n)).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_parts_by_rank_are_the_global_batch(world_size):
    positions = order.batch_positions(3, 17, 4, 24, 100)
    parts = [order.share(positions, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == positions.tolist()
    assert {len(p) for p in parts} == {24 // world_size}


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        order.batch_positions(0, 0, 11, 10, 107)
    with pytest.raises(ValueError, match="no equal parts"):
        order.share(np.arange(10), 0, 3)


def test_augmentation_is_uniform_within_its_bounds_and_independent_of_the_order():
    n, translate = 50_000, 2
    draws = order.augmentation(11, 0, n, translate)
    for shift in (draws.dx, draws.dy):
        values, counts = np.unique(shift, return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert np.abs(counts / n - 0.2).max() < 0.01
    assert abs(draws.flip.mean() - 0.5) < 0.01
    place = np.argsort(order.permutation(11, 0, n))
    columns = np.stack([draws.dx, draws.dy, draws.flip, place]).astype(float)
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.02


def test_augmentation_of_a_sample_does_not_depend_on_how_many_there_are():
    few, many = order.augmentation(2, 1, 100, 3), order.augmentation(2, 1, 1000, 3)
    assert all((a == b[:100]).all() for a, b in zip(few, many, strict=True))
    assert not (few.dx == order.augmentation(2, 2, 100, 3).dx).all()
    assert not (few.dx == order.augmentation(3, 1, 100, 3).dx).all()
    assert not order.augmentation(2, 1, 100, 0).dx.any()


SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def box(seed, epoch, position, height, width, scale=SCALE, ratio=RATIO):
    return order.crop(order.crop_words(seed, epoch, np.array([position]))[0], height, width, scale, ratio)


@pytest.mark.parametrize("seed", range(20))
def test_words_of_crops_are_numpys(seed):
    """Philox by numpy's own generator, one for each position; positions and epochs up to the largest, in any order."""
    rng = np.random.default_rng(seed)
    epoch, positions = int(rng.integers(2**32)), rng.integers(0, 2**62, size=30) >> rng.integers(0, 62, size=30)
    words = order.crop_words(seed, epoch, positions)
    for position, drawn in zip(positions.tolist(), words, strict=True):
        key = np.array([seed, order.CROP << 32 | epoch], dtype=np.uint64)
        numpys = np.random.Philox(key=key, counter=np.array([0, position, 0, 0], dtype=np.uint64))
        assert (drawn == numpys.random_raw(4 * order.TRIES).reshape(order.TRIES, 4)).all()


def test_a_crop_is_of_seed_epoch_and_position_alone():
    """Golden values, as those of the order; a million epochs and a billion positions on, without a draw in between."""
    assert box(7, 3, 12, 375, 500) == GOLDEN_CROP
    assert box(7, 10**6, 10**9, 375, 500) == GOLDEN_FAR_CROP
    boxes = {box(s, e, p, 375, 500) for s in range(4) for e in range(4) for p in range(4)}
    assert len(boxes) == 64


@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (1, 500), (500, 1), (90, 60), (17, 400)])
@pytest.mark.parametrize("ratio", [RATIO, (0.01, 0.02), (5.0, 5.0)])
def test_a_crop_lies_in_its_image(height, width, ratio):
    for words in order.crop_words(1, 0, np.arange(300)):
        left, top, w, h = order.crop(words, height, width, SCALE, ratio)
        assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


def test_an_image_that_no_box_fits_is_cropped_at_its_centre():
    assert box(0, 0, 0, 100, 1000, (1.0, 1.0)) == (433, 0, 133, 100)
    assert box(0, 0, 0, 1000, 100, (1.0, 1.0)) == (0, 433, 100, 133)


def test_cached_arrays_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        order.batch_positions(0, 0, 1, 10, 10)[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        order.augmentation(0, 0, 10, 1).dx[0] = 1


def test_the_torch_free_half_is_free_of_torch():
    code = "import sys, harness.data.index, harness.data.order, harness.data.build, harness.data.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
