"""Batches: the exact samples in the exact order, whatever the number of ranks; every fault named, none silent."""

import gc
import threading
import time
import zlib

import numpy as np
import pytest
import torch

from harness import config, schedule
from harness.config import BadInput, Data, Recipe
from harness.data import loader, order, shards
from harness.data.decode import decode
from harness.data.index import CorruptSample, Index, checked
from tests import tars
from tests.trials import trial as resolved

MODES = pytest.mark.parametrize("mode", ["decoded", "read as needed"])


@pytest.fixture(autouse=True)
def _decode_or_not(request, monkeypatch):
    """`mode`: the same small data as one that fits in memory, and as one that does not."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("mode") == "read as needed":
        monkeypatch.setattr(loader, "DECODED_BYTES", 0)


@pytest.fixture
def folder(tmp_path):
    folder = tars.small(tmp_path / "small")
    shards.index_shards(folder)
    return folder


def data(folder, **over):
    return Data.model_validate(tars.DATA | {"path": folder} | over)


def a_trial(folder, seed=0, recipe=None, **over):
    budget = {"epochs": 7, "global_batch_size": tars.BATCH}
    return resolved(data=tars.DATA | {"path": str(folder)} | over, recipe=recipe or {}, budget=budget, seed=seed)


def steps(dataset, trial, rank=0, world_size=1, start=0, stop=9):
    return list(loader.train_batches(dataset, trial, rank, world_size, start, stop))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for i, j in zip(a, b, strict=True) for x, y in zip(i, j, strict=True))


def one_line(call, *args):
    with pytest.raises(BadInput) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- batches


@MODES
@pytest.mark.parametrize("border", [0, 7])
def test_batches_against_a_slow_reading_of_the_tars(folder, mode, border):
    """Every pixel of two epochs, with shifts and flips, by per-sample loops over the members themselves."""
    trial = a_trial(folder, seed=3, recipe={"translate": 2, "flip": True} | ({"border": [border]} if border else {}))
    dataset = loader.open_data(trial.workload.data)
    index, per_epoch, n = dataset.index, schedule.steps_per_epoch(trial), trial.workload.data.trained_samples
    trained = index.train(trial.workload.data)
    for step, (images, labels) in enumerate(steps(dataset, trial, stop=2 * per_epoch)):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
        assert images.shape == (tars.BATCH, 1, tars.SIZE, tars.SIZE) and labels.shape == (tars.BATCH,)
        draws = order.augmentation(3, step // per_epoch, n, 2)
        for place, position in enumerate(order.batch_positions(3, step, per_epoch, tars.BATCH, n)):
            number = trained[position]
            key = index.key[number].decode()
            shard = folder / f"train-{number // 64:06d}.tar"
            pixels = decode(tars.member(shard, f"{key}.png")[1], 1)[0]
            if draws.flip[position]:
                pixels = pixels[:, ::-1]
            expected = np.full_like(pixels, border)
            for y in range(tars.SIZE):
                for x in range(tars.SIZE):
                    from_y, from_x = y - draws.dy[position], x - draws.dx[position]
                    if 0 <= from_y < tars.SIZE and 0 <= from_x < tars.SIZE:
                        expected[y, x] = pixels[from_y, from_x]
            assert (images[place, 0].numpy() == expected).all()
            assert labels[place] == int(tars.member(shard, f"{key}.cls")[1])


@MODES
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_the_same_global_batches_at_any_world_size(folder, mode, world_size):
    trial = a_trial(folder, seed=1, recipe={"translate": 1, "flip": True})
    dataset = loader.open_data(trial.workload.data)
    ranks = [steps(dataset, trial, rank, world_size) for rank in range(world_size)]
    together = [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in zip(*ranks, strict=True)]
    assert same(together, steps(dataset, trial))


@MODES
def test_resume_at_any_step_is_the_tail_of_an_undisturbed_run(folder, mode):
    trial = a_trial(folder, seed=2, recipe={"translate": 2})
    whole = steps(loader.open_data(trial.workload.data), trial)
    dataset = loader.open_data(trial.workload.data)
    for start in range(10):
        assert same(steps(dataset, trial, start=start), whole[start:])


def test_an_epoch_has_each_trained_sample_at_most_once_and_none_of_the_holdout(folder):
    trial = a_trial(folder)
    dataset = loader.open_data(trial.workload.data)
    trained, per_epoch = trial.workload.data.trained_samples, schedule.steps_per_epoch(trial)
    known = {image.numpy().tobytes() for images, _ in loader.eval_batches(dataset.train, 0, 1, 50) for image in images}
    held_out = {image.numpy().tobytes() for images, _ in loader.eval_batches(dataset.holdout, 0, 1, 50) for image in images}
    assert len(known) == trained == 108 and len(held_out) == tars.HOLDOUT and not known & held_out
    for epoch in range(3):
        batches = steps(dataset, trial, start=epoch * per_epoch, stop=(epoch + 1) * per_epoch)
        seen = [image.numpy().tobytes() for images, _ in batches for image in images]
        assert len(set(seen)) == len(seen) == per_epoch * tars.BATCH >= trained - tars.BATCH
        assert set(seen) <= known


def test_order_and_augmentation_are_of_the_seed_and_of_no_arm(folder):
    sgd = {"optimizer": {"name": "sgd", "lr": 0.1}, "decay": {"name": "none"}, "schedule": {"name": "constant"}, "arm": "other"}
    trial = a_trial(folder, seed=4, recipe={"translate": 1})
    other = type(trial).model_validate(trial.model_dump() | sgd)
    dataset = loader.open_data(trial.workload.data)
    assert same(steps(dataset, trial), steps(dataset, other))
    assert not same(steps(dataset, trial), steps(dataset, a_trial(folder, seed=5, recipe={"translate": 1})))


def test_real_digits_in_the_demo_batch(mnist5k):
    trial = resolved(data={"path": str(mnist5k)}, recipe={"translate": 2})
    dataset = loader.open_data(trial.workload.data)
    assert (len(dataset.train), len(dataset.holdout), len(dataset.val)) == (3500, 500, 1000)
    labels = torch.cat([labels for _, labels in steps(dataset, trial, stop=35)])
    assert labels.bincount().tolist() == torch.from_numpy(dataset.index.label[dataset.train.numbers]).bincount().tolist()


# ------------------------------------------------------------------------------------------------ evaluation


@MODES
@pytest.mark.parametrize("batch_size", [1, 4, 500])
def test_evaluation_counts_every_sample_exactly_once(folder, mode, batch_size):
    dataset = loader.open_data(data(folder))
    for view in (dataset.val, dataset.holdout):
        for world_size in (1, 2, 3, 4, 5, 6, 7, 8, 40):
            ranks = [list(loader.eval_batches(view, rank, world_size, batch_size)) for rank in range(world_size)]
            images = torch.cat([images for rank in ranks for images, _ in rank])
            labels = torch.cat([labels for rank in ranks for _, labels in rank])
            expected = [decode(_content(dataset.index, number), 1) for number in view.numbers]
            assert (images.numpy() == np.stack(expected)).all()
            assert labels.tolist() == dataset.index.label[view.numbers].tolist()
            assert max(len(labels) for rank in ranks for _, labels in rank) <= batch_size


@MODES
def test_a_further_test_set_is_the_val_shards_of_another_folder(folder, tmp_path, mode):
    tars.write(tmp_path / "v2/val-000000.tar", tars.digits("w", 10, 3))
    shards.index_shards(tmp_path / "v2")
    test = config.TestSet(name="v2", path=tmp_path / "v2", samples=10)
    dataset = loader.open_data(data(folder), test=test)
    assert (len(dataset.val), len(dataset.test), dataset.val.is_decoded, dataset.test.is_decoded) == (25, 10, *2 * [mode == "decoded"])
    index = Index.load(test.path)
    assert dataset.sha256() == {"data_sha256": dataset.index.sha256, "test_sha256": index.sha256}
    ((images, labels),) = loader.eval_batches(dataset.test, 0, 1, 100)
    assert (images.numpy() == np.stack([decode(_content(index, number), 1) for number in range(10)])).all()
    assert labels.tolist() == [i % tars.CLASSES for i in range(10)]
    assert loader.open_data(data(folder)).test is None


def test_a_test_set_that_is_not_as_described_is_refused(folder, tmp_path):
    tars.write(
        tmp_path / "v2/val-000000.tar", [*tars.digits("w", 10, 3), ("odd", {"png": tars.digits("o", 1, 4)[0][1]["png"], "cls": b"7"})]
    )
    shards.index_shards(tmp_path / "v2")
    test = config.TestSet(name="v2", path=tmp_path / "v2", samples=10)
    said = one_line(checked, data(folder), test.model_copy(update={"path": tmp_path / "nowhere"}))
    assert said.startswith(f"{tmp_path / 'nowhere'}: no such folder") and said.endswith("or set evaluation.test.path")
    with pytest.raises(BadInput) as error:
        checked(data(folder), test)
    many, label = str(error.value).splitlines()
    assert many == f"evaluation.test.samples: 10, but {tmp_path / 'v2'} holds 11 val samples; write 11, or another path"
    assert "sample odd: label 7 is outside 0..3" in label
    (tmp_path / "v2/val-000000.tar").write_bytes(b"")
    with pytest.raises(BadInput, match=r"val-000000\.tar: truncated"):
        checked(data(folder), test)


def _content(index, number):
    shard = index.folder / index.shards[index.shard[number]].name
    return shard.read_bytes()[index.offset[number] : index.offset[number] + index.size[number]]


@MODES
def test_train_eval_is_a_fixed_clean_part_of_what_is_trained_on(folder, mode):
    dataset = loader.open_data(data(folder))
    index, rank = dataset.index, dataset.index.holdout_rank
    part = dataset.train_eval(30)
    ranks = sorted(rank[dataset.train.numbers].tolist())
    assert sorted(rank[part.numbers].tolist()) == ranks[:30] and ranks[0] == tars.HOLDOUT // tars.CLASSES
    ((images, labels),) = loader.eval_batches(part, 0, 1, 100)
    assert (images.numpy() == np.stack([decode(_content(index, number), 1) for number in part.numbers])).all()
    assert labels.tolist() == index.label[part.numbers].tolist()
    assert len(dataset.train_eval(10_000)) == len(dataset.train)


def test_without_a_holdout_every_sample_is_trained_on(folder):
    dataset = loader.open_data(data(folder, holdout_per_class=0))
    assert (len(dataset.train), len(dataset.holdout)) == (128, 0)
    assert list(loader.eval_batches(dataset.holdout, 0, 1, 10)) == []


# ------------------------------------------------------------------------------------------- colours, formats


@MODES
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_and_png_grey_and_colour(tmp_path, mode, channels):
    smooth = np.stack(np.broadcast_arrays(np.arange(0, 128, 16)[:, None], np.arange(0, 256, 32)[None, :], 90), axis=2).astype(np.uint8)
    grey = smooth[..., 1]
    samples = [("a", tars.png(smooth)), ("b", tars.png(grey)), ("c", tars.png(smooth, "JPEG")), ("d", tars.png(grey, "JPEG"))]
    for split in ("train", "val"):
        members = [(split + key, {"jpg": image, "cls": str(i % 2).encode()}) for i, (key, image) in enumerate(samples)]
        tars.write(tmp_path / f"{split}-0.tar", members)
    shards.index_shards(tmp_path)
    stats = {"mean": [0.5] * channels, "std": [0.3] * channels}
    over = {"num_classes": 2, "train_samples": 4, "holdout_per_class": 0, "val_samples": 4, "channels": channels, **stats}
    ((images, _),) = loader.eval_batches(loader.open_data(data(tmp_path, **over)).val, 0, 1, 4)
    luma = (smooth @ np.array([0.299, 0.587, 0.114])).round()
    for image, source in zip(images.numpy().astype(int), (smooth, grey, smooth, grey), strict=True):
        if channels == 3:
            expected = source.transpose(2, 0, 1) if source.ndim == 3 else np.stack([source] * 3)
        else:
            expected = (luma if source.ndim == 3 else source)[None]
        assert image.shape == expected.shape
        assert np.abs(image - expected).mean() < 6  # JPEG's chroma subsampling


# ---------------------------------------------------------------------------------------------------- faults


def damage(folder, key):
    """One bit of an image, in the middle."""
    shard = next(s for s in sorted(folder.glob("*.tar")) if f"{key}.png".encode() in s.read_bytes())
    offset, content = tars.member(shard, f"{key}.png")
    tars.overwrite(shard, offset + len(content) // 2, bytes([content[len(content) // 2] ^ 1]))
    return shard.name


def trained_keys(folder):
    index = Index.load(folder)
    return [index.key[n].decode() for n in index.train(data(folder))]


def read_everything(dataset, trial):
    for view in (dataset.train, dataset.holdout, dataset.val):
        list(loader.eval_batches(view, 0, 1, 100))
    return steps(dataset, trial)


@MODES
def test_a_flipped_bit_is_raised_with_shard_and_key(folder, mode):
    key = trained_keys(folder)[40]
    shard = damage(folder, key)
    trial = a_trial(folder)
    with pytest.raises(CorruptSample, match=f"{shard}: sample {key}: its bytes are not the indexed ones"):
        read_everything(loader.open_data(trial.workload.data), trial)


@MODES
def test_a_substitute_takes_its_place_and_is_counted(folder, mode):
    undamaged = a_trial(folder, seed=6)
    before = steps(loader.open_data(undamaged.workload.data), undamaged)
    keys = trained_keys(folder)
    damage(folder, keys[-1])
    trial = a_trial(folder, seed=6, on_corrupt="substitute")
    dataset = loader.open_data(trial.workload.data)
    after = steps(dataset, trial)
    list(loader.eval_batches(dataset.train, 0, 1, 100))
    (found,) = dataset.substituted
    assert (found.number, found.substitute) == (dataset.train.numbers[-1], dataset.train.numbers[0])
    assert f"sample {keys[-1]}: " in found.reason
    stand_in = decode(_content(dataset.index, found.substitute), 1)
    changed = 0
    for (images, labels), (were, labels_were) in zip(after, before, strict=True):
        for i in range(len(images)):
            if not torch.equal(images[i], were[i]):
                changed += 1
                assert (images[i].numpy() == stand_in).all() and labels[i] == dataset.index.label[found.substitute]
            else:
                assert labels[i] == labels_were[i]
    per_epoch, last = schedule.steps_per_epoch(trial), len(dataset.train) - 1
    assert changed == sum(last in order.batch_positions(6, step, per_epoch, tars.BATCH, last + 1) for step in range(9)) > 0
    again = loader.open_data(trial.workload.data)
    assert same(steps(again, trial), after) and again.substituted == dataset.substituted


@MODES
def test_a_label_outside_the_classes(folder, mode):
    key = trained_keys(folder)[5]
    shard = next(s for s in sorted(folder.glob("train*.tar")) if f"{key}.png".encode() in s.read_bytes())
    tars.replace(shard, key, cls=b"17")
    shards.index_shards(folder)
    assert f"{shard.name}: sample {key}: label 17 is outside 0..3" in one_line(loader.open_data, data(folder))
    trial = a_trial(folder, on_corrupt="substitute")
    dataset = loader.open_data(trial.workload.data)
    read_everything(dataset, trial)
    assert [f"sample {key}: label 17" in s.reason for s in dataset.substituted] == [True]


@MODES
@pytest.mark.parametrize("over", [{}, {"on_corrupt": "substitute"}])
def test_nothing_is_substituted_in_holdout_and_val(folder, mode, over):
    index = Index.load(folder)
    trial = a_trial(folder, **over)
    held_out = index.key[index.holdout(trial.workload.data)[3]].decode()
    for key in ("v007", held_out):
        tars.small(folder)
        damage(folder, key)
        with pytest.raises(CorruptSample, match=f"sample {key}: "):
            read_everything(loader.open_data(trial.workload.data), trial)


@MODES
def test_too_many_corrupt_samples(folder, mode):
    for key in trained_keys(folder)[10:12]:  # 2 of 108
        damage(folder, key)
    trial = a_trial(folder, on_corrupt="substitute")
    with pytest.raises(CorruptSample, match="2 of 108 training samples are corrupt: over the limit of 1%"):
        read_everything(loader.open_data(trial.workload.data), trial)


@MODES
def test_what_does_not_decode_or_has_another_size(folder, mode):
    for image, said in ((b"GIF89a", "does not decode: unknown image format"), (tars.png(np.zeros((8, 9), np.uint8)), "is 8x9, workload")):
        tars.replace(folder / "val-000000.tar", "v003", png=image)
        shards.index_shards(folder)
        trial = a_trial(folder)
        with pytest.raises(CorruptSample, match=f"val-000000.tar: sample v003: {said}"):
            read_everything(loader.open_data(trial.workload.data), trial)


def test_every_single_byte_of_an_image_matters(folder):
    """No flipped byte of an image passes: crc32 finds each one."""
    index = Index.load(folder)
    content = _content(index, 3)
    for place in range(len(content)):
        assert zlib.crc32(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]) != index.crc32[3]


def test_bad_data_are_refused_at_start(folder, tmp_path):
    assert "no such folder" in one_line(loader.open_data, data(tmp_path / "absent"))
    shard = folder / "train-000000.tar"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2])
    assert "train-000000.tar: truncated" in one_line(loader.open_data, data(folder))
    shard.write_bytes(raw)
    assert "workload.data.val_samples" in one_line(loader.open_data, data(folder, val_samples=7))
    (folder / "index.npz").unlink()
    assert "wrbench shards index" in one_line(loader.open_data, data(folder))


# --------------------------------------------------------------------------------------------------- threads


def threads():
    return {t.name for t in threading.enumerate() if t is not threading.main_thread()}


@pytest.mark.parametrize("mode", ["read as needed"])
def test_threads_end_with_their_iterator(folder, mode):
    before = threads()
    trial = a_trial(folder)
    dataset = loader.open_data(trial.workload.data)
    for taken in range(4):
        batches = loader.train_batches(dataset, trial, 0, 1, 0, 30)
        for _ in range(taken):
            next(batches)
        batches.close()
        assert threads() == before
    batches = loader.train_batches(dataset, trial, 0, 1, 0, 30)
    next(batches)
    assert len(threads()) > len(before)
    del batches
    gc.collect()
    assert threads() == before
    list(loader.eval_batches(dataset.val, 0, 1, 4))
    assert threads() == before


@pytest.mark.parametrize("mode", ["read as needed"])
def test_what_runs_ahead_is_bounded_and_raises_in_the_consumer(folder, mode):
    rest = set(order.permutation(0, 0, 108)[4 * tars.BATCH :].tolist())  # of the first epoch: not met before the second
    step, position = next((s, p) for s in (6, 7) for p in order.batch_positions(0, s, 4, tars.BATCH, 108).tolist() if p in rest)
    damage(folder, trained_keys(folder)[position])
    trial = a_trial(folder)
    dataset = loader.open_data(trial.workload.data, threads=2)
    read, load = [], dataset.train._load
    dataset.train._load = lambda number, out, choose: read.append(number) or load(number, out, choose)
    batches = loader.train_batches(dataset, trial, 0, 1, 0, 28)
    next(batches)
    deadline = time.monotonic() + 30
    while len(read) < (1 + loader.AHEAD) * tars.BATCH and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(read) == (1 + loader.AHEAD) * tars.BATCH
    for _ in range(1, step):
        next(batches)
    with pytest.raises(CorruptSample, match="crc32"):
        next(batches)


def test_label_noise_is_a_function_of_the_sample_and_spares_what_is_reported(mnist5k):
    t = resolved(data={"path": str(mnist5k)})
    clean, noisy, again = (loader.open_data(t.workload.data, Recipe(label_noise=share)) for share in (0.0, 0.2, 0.2))

    def labels(view):
        return view.gather(np.arange(len(view)))[1].numpy()

    before, after = labels(clean.train), labels(noisy.train)
    share = float((before != after).mean())
    assert abs(share - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(before))  # four standard errors of the draw
    assert len(set(after[before == 3])) == 10  # any other class
    assert (after == labels(again.train)).all()
    few = np.arange(0, len(before), 7)
    assert (labels(noisy.train.part(few, noisy.shape)) == after[few]).all()
    for split in ("holdout", "val"):
        assert (labels(getattr(clean, split)) == labels(getattr(noisy, split))).all()
