"""Cropped and resized batches of photographs: against a slow control, whatever the ranks, threads and decoder; damage is found."""

import os
import shutil

import numpy as np
import pytest
import torch

from harness import schedule
from harness.config import BadInput
from harness.data import bench, decode, loader, order
from harness.data.index import CorruptSample, Index
from harness.data.remote import Unreachable
from tests import tars
from tests.photographs import BATCH, GROWING, RECIPE, RESIZE, SIZE, TRAIN, VAL, a_trial, make, opened, same, steps
from tests.trials import trial


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "photographs")


def content(index, number):
    return (index.folder / index.shards[index.shard[number]].name).read_bytes()[index.offset[number] :][: index.size[number]]


def resized(pixels, height, width):
    """(C, height, width), by torch's public function on a plain copy."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].contiguous()
    return torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


@pytest.mark.parametrize("decoder", list(decode.JPEG))
@pytest.mark.parametrize(
    ("recipe", "seen", "evaluated"), [(RECIPE, (SIZE, SIZE), SIZE), (GROWING, (16, 20, 24, 28, SIZE, SIZE), 38)], ids=["fixed", "growing"]
)
def test_batches_against_a_slow_control(photographs, monkeypatch, recipe, seen, evaluated, decoder):
    """Whole images by PIL, cut by slicing, resized one by one: every pixel of some epochs and of the validation set."""
    monkeypatch.setattr(decode, "decoder", "PIL")
    trial = a_trial(photographs, recipe, seed=3, data={} if evaluated == SIZE else {"eval_image_size": evaluated})
    index = Index.load(photographs)
    whole = [decode.decode(content(index, n), 3).transpose(1, 2, 0) for n in range(TRAIN + VAL)]
    monkeypatch.setattr(decode, "decoder", decoder)
    per_epoch = schedule.steps_per_epoch(trial)
    for step, (images, labels) in enumerate(steps(trial, stop=len(seen) * per_epoch, threads=2)):
        epoch = step // per_epoch
        size = seen[epoch]
        assert images.dtype == torch.uint8 and images.shape == (BATCH, 3, size, size)
        flip, words = order.augmentation(3, epoch, TRAIN, 0).flip, order.crop_words(3, epoch, np.arange(TRAIN))
        for image, label, position in zip(images, labels, order.batch_positions(3, step, per_epoch, BATCH, TRAIN).tolist(), strict=True):
            assert label == position
            pixels = whole[position]
            left, top, width, height = order.crop(words[position], *pixels.shape[:2], (0.08, 1.0), (3 / 4, 4 / 3))
            expected = resized(pixels[top : top + height, left : left + width], size, size)
            assert torch.equal(image, expected.flip(-1) if flip[position] else expected)
    dataset, size = opened(trial), evaluated
    for view, sources in ((dataset.val, whole[TRAIN:]), (dataset.train_eval(TRAIN), whole[:TRAIN])):
        for image, pixels in zip(torch.cat([images for images, _ in loader.eval_batches(view, 0, 1, 4)]), sources, strict=True):
            height, width = pixels.shape[:2]
            scaled = (int(RESIZE * height / width), RESIZE) if width <= height else (RESIZE, int(RESIZE * width / height))
            top, left = (round((side - size) / 2) for side in scaled)
            assert torch.equal(image, resized(pixels, *scaled)[:, top : top + size, left : left + size])


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, GROWING | {"translate": 2}, {"crop": {}, "flip": True, "translate": 3, "shuffle": {"block": 8, "blocks": 3}}, {"flip": True}],
)
def test_the_same_global_batches_whatever_the_ranks_and_threads(photographs, monkeypatch, recipe):
    """Two epochs; each sample at most once in each, and at least N - batch of N."""
    monkeypatch.setattr(loader, "DECODED_BYTES", 0)
    trial = a_trial(photographs, recipe)
    reference = steps(trial)
    for epoch in (reference[:2], reference[2:]):
        seen = torch.cat([labels for _, labels in epoch]).tolist()
        assert len(set(seen)) == len(seen) >= TRAIN - BATCH
    for threads in (0, 1, 4):
        dataset = opened(trial, threads)
        for world_size in (1, 2, 3, 4, 8):
            ranks = [list(loader.train_batches(dataset, trial, rank, world_size, 0, 4)) for rank in range(world_size)]
            together = [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in zip(*ranks, strict=True)]
            assert same(together, reference), (world_size, threads)


def test_a_file_that_cannot_be_read_is_no_corrupt_sample(photographs, tmp_path):
    """Another node, or a moment later, may well read it: a substitute would make the batch depend on that."""
    copy = shutil.copytree(photographs, tmp_path / "copy")
    dataset = opened(a_trial(copy, data={"on_corrupt": "substitute"}))
    for shard in copy.glob("train-*.tar"):
        shard.unlink()
    with pytest.raises(Unreachable, match=r"train-[01].tar: sample train\d+: cannot be read: No such file"):
        list(loader.train_batches(dataset, a_trial(copy), 0, 1, 0, 1))
    assert not dataset.substituted


def test_ranks_of_an_unbound_node_share_its_cores(monkeypatch):
    node = os.cpu_count()
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    for local, cores, threads in ((1, node, min(16, node)), (node, node, 1), (2 * node, node, 1), (node, node + 1, min(16, node + 1))):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        monkeypatch.setattr(loader, "cores", lambda cores=cores: cores)  # node + 1: any number that is not the node's
        assert loader.threads_of_a_rank() == threads


def test_a_rank_reads_with_the_cores_that_slurm_gave_it(monkeypatch):
    """Where ranks are not bound, a step of several may use all of its cores, from each of them."""
    monkeypatch.setattr(loader, "cores", lambda: os.cpu_count() + 12)  # those of the step
    for given, threads in ((1, 1), (3, 3), (99, min(16, os.cpu_count() + 12))):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(given))
        assert loader.threads_of_a_rank() == threads


@pytest.mark.parametrize("recipe", [RECIPE, GROWING], ids=["fixed", "growing"])
def test_resume_at_any_step_equals_an_undisturbed_run(photographs, recipe):
    trial = a_trial(photographs, recipe, seed=5)
    whole, dataset = steps(trial, stop=30), opened(trial, threads=2)
    for start in np.random.default_rng(0).choice(30, 20, replace=False).tolist():
        assert same(list(loader.train_batches(dataset, trial, 0, 1, start, min(30, start + 2))), whole[start : start + 2])


@pytest.mark.parametrize("data", [{}, {"eval_image_size": 38}], ids=["as trained", "larger"])
def test_validation_counts_every_sample_once_whatever_the_ranks_and_threads(photographs, monkeypatch, data):
    trial = a_trial(photographs, data=data)
    reference = list(loader.eval_batches(opened(trial).val, 0, 1, 100))
    monkeypatch.setattr(loader, "DECODED_BYTES", 0)
    for threads in (0, 1, 4):
        val = opened(trial, threads).val
        for world_size in (1, 2, 3, 4, 8, 20):
            batches = [batch for rank in range(world_size) for batch in loader.eval_batches(val, rank, world_size, 3)]
            assert torch.cat([labels for _, labels in batches]).tolist() == list(range(VAL))
            assert torch.equal(torch.cat([images for images, _ in batches]), reference[0][0])


def test_decoded_at_start_or_read_as_needed_without_crops(photographs, monkeypatch):
    trial = a_trial(photographs, {"flip": True, "translate": 2})
    decoded = steps(trial)
    assert opened(trial).train.is_decoded and not opened(a_trial(photographs)).train.is_decoded
    monkeypatch.setattr(loader, "DECODED_BYTES", 0)
    assert same(steps(trial), decoded)


def test_the_size_that_is_evaluated_counts_for_what_is_decoded_at_start(photographs, monkeypatch):
    """Training without crops sees the centre of image_size; train_eval, like val, that of eval_image_size."""
    trial = a_trial(photographs, {"flip": True}, data={"eval_image_size": 38})
    for spare, kept in ((0, True), (-1, False)):
        monkeypatch.setattr(loader, "DECODED_BYTES", 3 * (TRAIN * SIZE**2 + VAL * 38**2) + spare)
        dataset = opened(trial)
        assert dataset.train.is_decoded == dataset.val.is_decoded == kept
        assert next(loader.train_batches(dataset, trial, 0, 1, 0, 1))[0].shape[-1] == SIZE
        for view in (dataset.val, dataset.train_eval(5)):
            assert next(loader.eval_batches(view, 0, 1, 5))[0].shape[-1] == 38


def test_images_of_another_size_are_named_where_nothing_is_resized(photographs, mnist5k):
    """Before anything is trained."""
    with pytest.raises(BadInput, match=r"image_size: 32, but .*: sample \S+ is 82x71; to resize images set workload.data.resize, e.g. 36"):
        opened(a_trial(photographs, {}, data={"resize": None}))
    with pytest.raises(BadInput, match=r"image_size: 32, but .*: sample \S+ is 28x28; write 28, or to resize images set"):
        loader.open_data(trial(data={"path": str(mnist5k), "image_size": 32}).workload.data)


def test_a_batch_is_the_readers_own_to_keep(photographs):
    """No later batch is written where an earlier one is still held."""
    trial = a_trial(photographs)
    kept = steps(trial, stop=30, threads=2)
    assert same(kept, [batch for batch in loader.train_batches(opened(trial, 1), trial, 0, 1, 0, 30)])
    assert len({images.data_ptr() for images, _ in kept}) == 30


def damaged(photographs, to, names):
    for file in photographs.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return [to / name for name in names]


def test_no_wrong_byte_is_silent(photographs, tmp_path):
    """200 random ones anywhere in a shard: the sample is named, or the batches are what they were."""
    (shard,) = damaged(photographs, tmp_path, ["train-1.tar"])
    good, rng, found = shard.read_bytes(), np.random.default_rng(1), 0
    trial = a_trial(tmp_path)
    index = Index.load(tmp_path)
    reader, out = loader.Reader(index, trial.workload.data), torch.empty(1, 3, SIZE, SIZE, dtype=torch.uint8)
    numbers = [n for n in range(TRAIN) if index.shards[index.shard[n]].name == shard.name]
    inside = {n: range(index.offset[n], index.offset[n] + index.size[n]) for n in numbers}

    def read(number):
        return reader(number, out, None), out.numpy().tobytes()

    before = {n: read(n) for n in numbers}
    for place in rng.integers(0, len(good), 200).tolist():
        wrong = bytes([good[place] ^ int(rng.integers(1, 256))])
        tars.overwrite(shard, place, wrong)
        index.check(trial.workload.data)
        hit = [n for n in numbers if place in inside[n]]
        near = hit or [min(numbers, key=lambda n: abs(inside[n].start - place))]
        for number in near:
            try:
                assert read(number) == before[number] and not hit
            except CorruptSample as fault:
                assert hit and f"{shard.name}: sample train{number:03d}: its bytes are not the indexed ones" in str(fault)
                found += 1
        tars.overwrite(shard, place, good[place : place + 1])
    assert 100 < found < 200


def test_a_substitute_is_the_same_whatever_the_ranks_threads_and_decoder(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "SUBSTITUTED_SHARE", 0.05)
    damaged(photographs, tmp_path, [])
    index = Index.load(tmp_path)
    for number in (7, 8, 40):
        shard = tmp_path / index.shards[index.shard[number]].name
        tars.overwrite(shard, int(index.offset[number]) + 50, bytes([content(index, number)[50] ^ 9]))
    trial = a_trial(tmp_path, data={"on_corrupt": "substitute"})
    reference, clean = steps(trial), steps(a_trial(photographs))
    for (images, labels), (were, labels_were) in zip(reference, clean, strict=True):
        for i, label in enumerate(labels_were.tolist()):
            assert labels[i] == {7: 9, 8: 9, 40: 41}.get(label, label)
            assert label in (7, 8, 40) or torch.equal(images[i], were[i])
    for name in decode.JPEG:
        monkeypatch.setattr(decode, "decoder", name)
        for world_size, threads in ((1, 4), (2, 0), (4, 1)):
            datasets = [opened(trial, threads) for _ in range(world_size)]
            ranks = [list(loader.train_batches(d, trial, r, world_size, 0, 4)) for r, d in enumerate(datasets)]
            together = [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in zip(*ranks, strict=True)]
            assert same(together, reference)
            found = {s.number: s for d in datasets for s in d.substituted}
            assert set(found) <= {7, 8, 40} and all(f"sample train{n:03d}: " in s.reason for n, s in found.items())
    monkeypatch.setattr(loader, "SUBSTITUTED_SHARE", 0.03)
    with pytest.raises(CorruptSample, match="over the limit of 3%"):
        steps(trial)


def test_the_bench_says_what_is_spent_where_and_what_it_feeds(photographs):
    speed = bench.measure(photographs, SIZE, seconds=0.3, threads=1)
    assert speed.samples == TRAIN and min(speed.reading, speed.decoding, speed.resizing, speed.images_per_second, speed.cpu_seconds) > 0
    whole, staged, threads, needed = speed.lines(gpus=4, gpu_rate=100)
    assert whole.startswith("62 samples of ") and "reading" in staged and "decoding" in staged and "resizing" in staged
    assert threads.startswith("1 thread(s): ") and needed.startswith("4 GPU(s) of 100 images/s take 400 images/s: ")
