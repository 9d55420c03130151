"""Index and verify: other people's shards, with every fault that a person may meet."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from harness.config import BadInput, Data
from harness.data import shards
from harness.data.index import COLUMNS, NAME, Index
from harness.data.verify import verify
from tests import tars
from tests.benchmarks.index_scale import synthetic


@pytest.fixture
def folder(tmp_path):
    return tars.small(tmp_path / "small")


@pytest.fixture
def indexed(folder):
    shards.index_shards(folder)
    return folder


def data(**over):
    return Data.model_validate(tars.DATA | {"path": "unused"} | over)


def one_line(call, *args):
    with pytest.raises(BadInput) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def faults(folder, severity="fault"):
    return [str(f).replace(f"{folder}/", "") for f in verify(folder).findings if f.severity == severity]


# ---------------------------------------------------------------------------------------------------- index


def test_an_index_of_fewer_samples_than_the_one_it_replaces_is_told(folder):
    told = []
    shards.index_shards(folder, warn=told.append)
    shards.index_shards(folder, warn=told.append)
    assert not told, "the same again"
    part = f"{folder}/{{train-000000,val-000000}}.tar"
    shards.index_shards(part, warn=told.append)
    assert told == [f"{folder}/index.npz: had 153 samples in 3 shards, and has those of {part} alone now"]


def test_index_says_what_the_tars_hold(folder):
    made = shards.index_shards(folder)
    loaded = Index.load(folder)
    assert loaded.sha256 == made.sha256 and loaded.shards == made.shards and loaded.extensions == ("png",)
    assert all((getattr(loaded, c) == getattr(made, c)).all() for c in ("key", *COLUMNS))
    assert [(s.name, s.split, s.samples) for s in loaded.shards] == [
        ("train-000000.tar", "train", 64), ("train-000001.tar", "train", 64), ("val-000000.tar", "val", 25),
    ]  # fmt: skip
    for number in (0, 63, 64, 127, 128, 152):
        shard = loaded.shards[loaded.shard[number]]
        raw = (folder / shard.name).read_bytes()
        offset, content = tars.member(folder / shard.name, f"{loaded.key[number].decode()}.png")
        assert (loaded.offset[number], loaded.size[number]) == (offset, len(content))
        assert loaded.crc32[number] == zlib.crc32(content)
        assert shard.sha256 == hashlib.sha256(raw).hexdigest()
    assert loaded.label.tolist() == [i % 4 for i in range(128)] + [i % 4 for i in range(25)]


def image_of(index, number):
    shard = (index.folder / index.shards[index.shard[number]].name).read_bytes()
    return shard[index.offset[number] : index.offset[number] + index.size[number]]


def test_holdout_is_the_same_share_of_each_class_by_a_hash_of_the_images(indexed):
    """Against the slow and obvious way, for several sizes; a larger holdout contains every smaller one."""
    index = Index.load(indexed)
    by_hash = sorted(range(128), key=lambda n: hashlib.blake2b(image_of(index, n), digest_size=8).digest())
    for per_class in (0, 1, 5, 31):
        expected = sorted(n for label in range(4) for n in [n for n in by_hash if index.label[n] == label][:per_class])
        described = data(holdout_per_class=per_class)
        assert index.holdout(described).tolist() == expected
        assert index.train(described).tolist() == sorted(set(range(128)) - set(expected))
        assert len(expected) == described.holdout_samples and 128 - len(expected) == described.trained_samples
    both = data(train_on="train+holdout")
    assert index.train(both).tolist() == list(range(128)) and not len(index.holdout(both))
    assert both.trained_samples == 128
    assert index.val().tolist() == list(range(128, 153))


def test_holdout_does_not_depend_on_keys_and_packing(indexed, tmp_path):
    index = Index.load(indexed)
    held = {image_of(index, n) for n in index.holdout(data())}
    samples = [(f"other{i}", {"png": image_of(index, i), "cls": str(index.label[i]).encode()}) for i in reversed(range(128))]
    for i in range(3):
        tars.write(tmp_path / "packed" / f"train-{i}.tar", samples[i::3])
    packed = shards.index_shards(tmp_path / "packed")
    assert {image_of(packed, n) for n in packed.holdout(data())} == held


@pytest.mark.parametrize("twin", ["of its class", "of another class", "in val"])
def test_duplicates_are_on_one_side(folder, twin):
    """An image that would be held out, and occurs once more: neither is, and another takes its place."""
    before = shards.index_shards(folder)
    first = int(before.holdout(data())[0])
    label = int(before.label[first])
    trained = [int(n) for n in before.train(data()) if (before.label[n] == label) == (twin == "of its class")]
    number = 130 if twin == "in val" else trained[-1]
    shard = folder / before.shards[before.shard[number]].name
    tars.replace(shard, before.key[number].decode(), png=image_of(before, first))
    after = shards.index_shards(folder)
    held = after.holdout(data()).tolist()
    assert first not in held and number not in held and len(held) == tars.HOLDOUT
    assert np.bincount(after.label[held]).tolist() == [5, 5, 5, 5]
    assert first in after.train(data()) and (number in after.train(data())) == (twin != "in val")


def test_a_class_with_too_few_images(folder):
    index = shards.index_shards(folder)
    index.check(data(holdout_per_class=31))
    said = "workload.data.holdout_per_class: 32, but class 0 of"
    held = Data.model_construct(**(data().model_dump() | {"holdout_per_class": 32}))
    assert said in one_line(index.check, held) and "has 32 training images, of which 32 can be held out; e.g. 31" in one_line(
        index.check, held
    )


def test_identity_is_of_the_samples_and_not_of_the_packing(folder, tmp_path):
    packed = tmp_path / "packed"
    tars.write(packed / "a" / "my-train-0.tar", tars.digits("t", 128, 1), tarfile.GNU_FORMAT)
    tars.write(packed / "b" / "my-validation-0.tar", tars.digits("v", 25, 2), tarfile.PAX_FORMAT)
    same = shards.index_shards(packed)
    assert same.sha256 == shards.index_shards(folder).sha256
    assert [s.name for s in same.shards] == ["a/my-train-0.tar", "b/my-validation-0.tar"]
    tars.replace(folder / "val-000000.tar", "v003", cls=b"1")
    assert shards.index_shards(folder).sha256 != same.sha256


def test_keys_with_folders_dots_long_names_and_capitals(tmp_path):
    import webdataset

    samples = [
        ("n01/" + "x" * 150, {"seg.txt": b"", "JPEG": tars.png(np.zeros((8, 8, 3), np.uint8), "JPEG"), "cls": b"0\n"}),
        ("./n02/b", {"png": tars.png(np.ones((8, 8), np.uint8)), "cls": b" 1", "json": b"{}"}),
    ]
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tars.write(tmp_path / "train-0.tar", samples, tar_format)
        index = shards.index_shards(tmp_path)
        expected = [s["__key__"] for s in webdataset.WebDataset([str(tmp_path / "train-0.tar")], shardshuffle=False)]
        assert [k.decode() for k in index.key] == expected
        assert index.label.tolist() == [0, 1] and index.extensions == ("jpeg", "png")
        assert verify(tmp_path).findings == []


def test_index_elsewhere_finds_its_shards(folder, tmp_path):
    shards.index_shards(folder, tmp_path / "elsewhere")
    assert not (folder / NAME).exists()
    Index.load(tmp_path / "elsewhere").check(data())
    assert verify(tmp_path / "elsewhere").findings == []
    with zipfile.ZipFile(tmp_path / "elsewhere" / NAME) as archive:
        assert json.loads(archive.read("manifest.json"))["folder"] == str(folder)


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
COMMANDS = [f"tar --format={name}" for name in ("v7", "oldgnu", "gnu", "ustar", "posix")]


@pytest.mark.parametrize("written_by", [*FORMATS, *COMMANDS])
def test_tars_of_every_format(tmp_path, written_by):
    """Short, long and very long names, in folders and not in ASCII, against the slow and obvious way: every member by tarfile."""
    keys = ["a", "n01/b-1", "./c/d/e", "f" * 90]
    if written_by not in ("ustar", "tar --format=ustar", "tar --format=v7"):
        keys += ["g" * 99, "h/" * 30 + "i" * 120, "j" * 240, "größe/字"]
    elif "ustar" in written_by:
        keys += ["p" * 90 + "/" + "q" * 80]
    rng, folder = np.random.default_rng(5), tmp_path / "shards"
    samples = [(key, {"JPEG": rng.bytes(int(rng.integers(1, 3000))), "cls": b"%d" % i, "json": b"{}"}) for i, key in enumerate(keys)]
    if written_by in FORMATS:
        tars.write(folder / "train-0.tar", samples, FORMATS[written_by])
    else:
        if shutil.which("tar") is None:
            pytest.skip("no tar command")
        for key, members in samples:
            for extension, content in members.items():
                file = tmp_path / "files" / f"{key}.{extension}"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        folder.mkdir()
        command = [*written_by.split(), "-cf", str(folder / "train-0.tar"), "-C", str(tmp_path / "files"), "--sort=name", "."]
        subprocess.run(command, check=True, env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]})
    index = shards.index_shards(folder)
    with tarfile.open(folder / "train-0.tar") as tar:
        slow = {m.name: (m.offset_data, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()}
    assert len(index.key) == len(keys) and len(slow) == 3 * len(keys)
    raw = (folder / "train-0.tar").read_bytes()
    for n, key in enumerate(index.key.tolist()):
        offset, content = slow[f"{key.decode()}.JPEG"]
        assert (index.offset[n], index.size[n], index.crc32[n]) == (offset, len(content), zlib.crc32(content))
        assert raw[index.offset[n] : index.offset[n] + index.size[n]] == content
        assert index.label[n] == int(slow[f"{key.decode()}.cls"][1])


def test_a_list_of_shards_as_webdataset_writes_it(folder, tmp_path):
    whole = shards.index_shards(folder)
    for pattern in (
        f"{folder}/{{train,val}}-000000.tar::{folder}/train-000001.tar",
        f"{folder}/{{train-{{000000..000001}},val-000000}}.tar",
    ):
        listed = shards.index_shards(pattern, tmp_path)
        assert (listed.sha256, listed.shards, listed.folder) == (whole.sha256, whole.shards, folder)
    part = f"{folder}/train-{{000000..000001}}.tar"
    assert len(shards.index_shards(part, tmp_path).key) == 128
    assert verify(part).findings == []
    (folder / "train-000001.tar").rename(folder / "train-000007.tar")
    assert "train-000001.tar: no such file" in one_line(shards.index_shards, part)
    assert "no such file (and 8 more of 11)" in one_line(shards.index_shards, f"{folder}/train-{{000000..000010}}.tar")
    assert "Unbalanced braces" in one_line(shards.index_shards, f"{folder}/train-{{000000..000001.tar")
    assert "names train-000000.tar twice" in one_line(
        shards.index_shards, f"{folder}/train-000000.tar::{folder}/train-{{000000..000000}}.tar"
    )


@pytest.mark.parametrize("call", [shards.index_shards, verify])
def test_a_command_is_never_run(tmp_path, call):
    for text in (f"pipe:touch {tmp_path}/ran", f"pipe:touch {tmp_path}/ran-{{000..001}}.tar", f"exec://touch {tmp_path}/ran"):
        assert one_line(call, text).startswith(f"{text}: ")
    assert "commands are never run" in one_line(call, "pipe:cat x.tar")
    assert not list(tmp_path.iterdir())


def test_labels_in_json(tmp_path):
    image = tars.png(np.zeros((8, 8), np.uint8))
    about = [{"label": 2}, {"cls": 1, "name": "x"}, {"label": 0}]
    tars.write(tmp_path / "train-0.tar", [(str(i), {"png": image, "json": json.dumps(a).encode()}) for i, a in enumerate(about)])
    assert shards.index_shards(tmp_path).label.tolist() == [2, 1, 0]
    for bad, said in (
        (b'{"label": true}', "no integer label or cls in its .json"),
        (b"[1]", "holds no .cls"),
        (b"{", "its .json is not JSON"),
    ):
        tars.write(tmp_path / "train-0.tar", [("a", {"png": image, "json": bad})])
        assert f"sample a: {said}" in one_line(shards.index_shards, tmp_path).replace("holds no .cls with its label, and ", "")


def test_pickled_members_are_ignored_and_named(tmp_path):
    """Bytes that nobody opens; and no label."""
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    image, lines = tars.png(np.zeros((8, 8), np.uint8)), []
    tars.write(tmp_path / "train-0.tar", [("a", {"png": image, "cls": b"0", "pyd": bomb, "pickle": bomb})])
    shards.index_shards(tmp_path, warn=lines.append)
    assert lines == [f"{tmp_path}: pickled members (.pickle, .pyd) are ignored: a shard is data, never code"]
    assert [f.message for f in verify(tmp_path).findings] == [lines[0].removeprefix(f"{tmp_path}: ")]
    tars.write(tmp_path / "train-0.tar", [("a", {"png": image, "pyd": bomb})])
    assert "holds no .cls with its label; its .pyd is pickled" in one_line(shards.index_shards, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_links_sparse_files_and_names_that_are_no_text(tmp_path):
    image = tars.png(np.zeros((8, 8), np.uint8))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        tars.write(tmp_path / "train-0.tar", [("a", {"png": image, "cls": b"0"})])
        with tarfile.open(tmp_path / "train-0.tar", "a") as tar:
            link = tarfile.TarInfo("b.png")
            link.type, link.linkname = kind, "a.png"
            tar.addfile(link)
        assert "b.png is a link; pack the files themselves" in one_line(shards.index_shards, tmp_path)
    header = tarfile.TarInfo("x")
    header.size = len(image)
    raw = header.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape")
    broken = tarfile.TarInfo.frombuf(raw, "utf-8", "surrogateescape")
    broken.name = "b\udcff.png"
    label = tarfile.TarInfo("b\udcff.cls")
    label.size = 1
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(broken, io.BytesIO(image))
        tar.addfile(label, io.BytesIO(b"0"))
    assert r"sample 'b\udcff': its name is not printable text" in one_line(shards.index_shards, tmp_path)
    assert any(r"'b\udcff'" in f for f in faults(tmp_path))


def test_the_same_index_and_findings_with_several_workers(folder, tmp_path):
    tars.replace(folder / "val-000000.tar", "v001", png=tars.member(folder / "train-000000.tar", "t007.png")[1])
    assert shards.index_shards(folder, tmp_path / "1").sha256 == shards.index_shards(folder, tmp_path / "2", workers=2).sha256
    assert (tmp_path / "1" / NAME).read_bytes() == (tmp_path / "2" / NAME).read_bytes()
    assert verify(folder) == verify(folder, workers=2)


def test_what_cannot_be_indexed_is_named(folder, tmp_path):
    assert "no such folder" in one_line(shards.index_shards, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no *.tar" in one_line(shards.index_shards, tmp_path / "empty")
    for members, said in (
        ({"cls": b"seven"}, "sample t070: label b'seven' in .cls is not an integer"),
        ({"jpg": b"?"}, "sample t070: holds 2 images"),
    ):
        tars.replace(folder / "train-000001.tar", "t070", **members)
        assert said in one_line(shards.index_shards, folder)
        tars.small(folder)
    tars.write(folder / "train-000001.tar", [("t070", {"png": b"?"})])
    assert "sample t070: holds no .cls" in one_line(shards.index_shards, folder)
    (folder / "train-000001.tar").rename(folder / "part-000001.tar")
    assert "must say its split" in one_line(shards.index_shards, folder)
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("blocks", [0, 0.2, 1, 1.5, 2, 3, 40, 4 * 64 - 1, 4 * 64])
def test_a_truncated_tar_is_never_indexed(folder, blocks):
    """Cut inside a header, inside a member, between members, between samples, and just before the end marker."""
    shard = folder / "train-000001.tar"
    assert shard.stat().st_size > 4 * 64 * 512  # a header and a block for each of two members of 64 samples, and the marker
    shard.write_bytes(shard.read_bytes()[: int(blocks * 512)])
    assert "train-000001.tar: truncated or damaged" in one_line(shards.index_shards, folder)
    assert any("train-000001.tar: truncated or damaged" in f for f in faults(folder))


def test_a_damaged_header_does_not_end_the_archive_silently(folder):
    shard = folder / "train-000001.tar"
    offset, _ = tars.member(shard, "t100.png")
    tars.overwrite(shard, offset - 512 + 150, b"garbage")
    assert "no end of archive" in one_line(shards.index_shards, folder)


def test_a_hole_and_a_second_tar_do_not_end_the_archive_silently(folder):
    """A zeroed header in the middle of a tar, and `cat a.tar b.tar`."""
    shard = folder / "train-000001.tar"
    raw = shard.read_bytes()
    offset, _ = tars.member(shard, "t100.png")
    tars.overwrite(shard, offset - 512, bytes(512))
    said = f"the archive ends at byte {offset - 512}, but byte {offset} behind it is not zero"
    assert said in one_line(shards.index_shards, folder)
    assert any(said in f for f in faults(folder))
    shard.write_bytes(raw + (folder / "val-000000.tar").read_bytes())
    assert f"but byte {len(raw)} behind it is not zero" in one_line(shards.index_shards, folder)
    shard.write_bytes(raw + bytes(3 << 20))
    shards.index_shards(folder)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [-512, -1024])
def test_a_member_of_negative_size_is_not_read_for_ever(folder, kind, size):
    shard = folder / "train-000001.tar"
    header = tarfile.TarInfo("t000.txt")
    header.type, header.size = kind, size
    raw = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = (256**12 + size).to_bytes(13)[1:]  # base 256, which tobuf does not write for -512
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    shard.write_bytes(raw + shard.read_bytes())
    assert "train-000001.tar: truncated or damaged: " in one_line(shards.index_shards, folder)
    good = tars.member(folder / "train-000000.tar", "t010.png")[0] - 512
    tars.overwrite(folder / "train-000000.tar", good, raw)
    (found,) = [f for f in faults(folder) if "train-000000" in f]
    assert "truncated or damaged: " in found


def test_what_cannot_be_loaded_as_an_index(indexed, folder, tmp_path):
    file = indexed / NAME
    assert "no such folder; build shards there" in one_line(Index.load, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no shards" in one_line(Index.load, tmp_path / "empty")
    good = file.read_bytes()
    file.unlink()
    assert one_line(Index.load, folder).endswith(f"wrbench shards index {folder}, or set workload.data.path")
    for bad in (b"", b"not a zip", good[: len(good) // 2], good[:200] + b"\0\0\0\0" + good[204:]):
        file.write_bytes(bad)
        assert "is damaged or no index" in one_line(Index.load, folder)
    np.savez(file, x=np.zeros(3))
    assert "is damaged or no index" in one_line(Index.load, folder)
    np.savez(file, x=np.array([{}], dtype=object))
    assert "is damaged or no index" in one_line(Index.load, folder)
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(b'"version": 2', b'"version": 0') if name == "manifest.json" else content)
    assert "index version 0, this wrbench reads 2" in one_line(Index.load, folder)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"folder": 3}, {"sha256": None}, {"shards": []}, {"shards": [{"name": "x"}]}, {"shards": 7}, {"extensions": [1]}, {"extensions": []},
        {"size": np.zeros(152, np.uint32)}, {"key": np.zeros(153)}, {"label": np.zeros((153, 2), np.int32)}, {"crc32": np.zeros(153)},
        {"shard": np.full(153, 7, np.int32)}, {"offset": np.full(153, -1)},
    ],
    ids=lambda nonsense: str(*nonsense),
)  # fmt: skip
def test_an_index_whose_fields_or_arrays_are_not_what_they_should_be(indexed, nonsense):
    file = indexed / NAME
    with np.load(file) as archive:
        columns = {column: archive[column] for column in ("key", *COLUMNS)}
        manifest = json.loads(archive["manifest.json"])
    np.savez(file, **(columns | {k: v for k, v in nonsense.items() if k in columns}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("manifest.json", json.dumps(manifest | {k: v for k, v in nonsense.items() if k in manifest}))
    assert "is damaged or no index" in one_line(Index.load, indexed)


def test_shards_in_folders_that_are_links(folder, tmp_path):
    """As a set is put together of parts that lie elsewhere; a link to a folder above is not followed for ever."""
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "train").symlink_to(folder)
    (folder / "up").symlink_to(linked)
    (folder / "val-000000.tar").rename(linked / "val-000000.tar")
    names = ["train/train-000000.tar", "train/train-000001.tar", "val-000000.tar"]
    assert shards.locate(linked) == (linked, names)
    assert one_line(Index.load, linked).startswith(f"{linked}: the shards have no index")


def test_lists_of_relative_and_absolute_paths_and_what_is_named_twice(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert shards.locate(f"train-000000.tar::{folder}/val-000000.tar") == (folder, ["train-000000.tar", "val-000000.tar"])
    assert "names train-000000.tar twice" in one_line(shards.locate, f"train-000000.tar::{folder}/train-000000.tar")
    assert "names train-1.tar twice" in one_line(shards.locate, "https://host/a/train-{0,1,1}.tar")


@pytest.mark.parametrize("labels", [range(1, 5), [0, 1, 2, 9]])
def test_labels_that_training_refuses_are_a_fault(folder, labels):
    """1-based, or many outside the classes; a few samples of val alone need not have every class."""
    images = [members["png"] for _, members in tars.digits("t", 12, 1)]
    for split in ("train", "val"):
        samples = [(f"{split}{i}", {"png": images[i + 6 * (split == "val")], "cls": str(labels[i % 4]).encode()}) for i in range(6)]
        tars.write(folder / "other" / f"{split}-0.tar", samples)
    assert any("no training sample has label" in f for f in faults(folder / "other"))
    (folder / "other" / "train-0.tar").unlink()
    assert faults(folder / "other") == [] and faults(folder / "other", "warning")


def test_check_holds_the_workload_against_the_shards(indexed):
    index = Index.load(indexed)
    index.check(data())
    assert "workload.data.train_samples: 129" in one_line(index.check, data(train_samples=129))
    assert "workload.data.val_samples: 24" in one_line(index.check, data(val_samples=24))
    assert "workload.data.num_classes: 5" in one_line(index.check, data(num_classes=5))
    assert "train-000000.tar: sample t003: label 3 is outside 0..2" in one_line(index.check, data(num_classes=3))
    with pytest.raises(BadInput) as caught:
        index.check(data(train_samples=129, val_samples=24))
    assert len(str(caught.value).splitlines()) == 2


def test_check_refuses_a_truncated_or_missing_shard(indexed):
    index = Index.load(indexed)
    shard = indexed / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert "train-000001.tar: truncated" in one_line(index.check, data())
    shard.unlink()
    assert "train-000001.tar: No such file" in one_line(index.check, data())


def test_check_leaves_only_training_labels_to_substitution(folder):
    tars.replace(folder / "train-000000.tar", "t005", cls=b"9")
    shards.index_shards(folder)
    assert "train-000000.tar: sample t005: label 9 is outside 0..3" in one_line(Index.load(folder).check, data())
    assert 5 not in Index.load(folder).holdout(data())
    Index.load(folder).check(data(on_corrupt="substitute"))
    tars.replace(folder / "val-000000.tar", "v001", cls=b"-1")
    shards.index_shards(folder)
    assert "sample v001: label -1" in one_line(Index.load(folder).check, data(on_corrupt="substitute"))


# ---------------------------------------------------------------------------------------------------- verify


def test_mnist5k_verifies(mnist5k):
    calls = []
    assert verify(mnist5k, lambda done, total: calls.append((done, total))).findings == []
    assert calls[-1] == (sum(f.stat().st_size for f in mnist5k.glob("*.tar")),) * 2


@pytest.mark.parametrize("with_index", [True, False])
def test_verify_names_each_fault(folder, with_index):
    if with_index:
        shards.index_shards(folder)
    assert verify(folder).findings == []
    offset, content = tars.member(folder / "train-000000.tar", "t010.png")
    tars.overwrite(folder / "train-000000.tar", offset + len(content) // 2, b"\xff\xff\xff\xff")
    tars.replace(folder / "val-000000.tar", "v004", cls=b"zero")
    found = faults(folder)
    assert any(f.startswith("fault: train-000000.tar: sample t010: its image does not decode") for f in found)
    assert any("val-000000.tar: sample v004: label b'zero' in .cls is not an integer" in f for f in found)
    if with_index:
        assert "fault: train-000000.tar: changed since it was indexed: another sha256" in found
        assert "fault: train-000000.tar: sample t010: its image changed since it was indexed: another crc32 or size" in found
        assert any("val-000000.tar" in f and "changed since" in f for f in found)
    assert not any("train-000001" in f for f in found)


def test_verify_finds_every_flipped_byte_with_an_index(indexed):
    """One byte anywhere in a shard: at least one fault, always."""
    shard = indexed / "val-000000.tar"
    raw = shard.read_bytes()
    for place in np.random.default_rng(3).integers(0, len(raw), 15).tolist():
        shard.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        assert faults(indexed), place


def test_verify_of_a_truncated_shard_says_what_is_lost(indexed):
    shard = indexed / "train-000001.tar"
    offset, _ = tars.member(shard, "t120.cls")
    shard.write_bytes(shard.read_bytes()[: offset + 1])
    found = faults(indexed)
    assert any("train-000001.tar: truncated: " in f for f in found)
    assert any("8 samples lost: t120, t121, t122, t123, t124 and 3 more" in f for f in found)


def test_verify_finds_wrong_labels(indexed, folder):
    tars.replace(folder / "train-000000.tar", "t002", cls=b"3", json=b'{"label": 2}')
    found = faults(folder)
    assert "fault: train-000000.tar: sample t002: mislabelled: 3 in .cls, 2 in the index" in found
    assert "fault: train-000000.tar: sample t002: mislabelled: 3 in .cls, 2 in .json" in found
    (folder / NAME).unlink()
    assert faults(folder) == ["fault: train-000000.tar: sample t002: mislabelled: 3 in .cls, 2 in .json"]
    tars.replace(folder / "train-000000.tar", "t002", cls=b"17", json=b"{}")
    assert faults(folder) == ["fault: train-000000.tar: sample t002: label 17 is outside the classes 0..3 of the training samples"]


def test_verify_finds_missing_and_unindexed_shards_and_a_damaged_index(indexed):
    (indexed / "train-000001.tar").rename(indexed / "train-000009.tar")
    assert faults(indexed)[0] == "fault: train-000001.tar: missing, with the 64 samples that the index has of it"
    assert faults(indexed, "warning") == ["warning: train-000009.tar: is not in the index, so never read; index again to use it"]
    (indexed / NAME).write_bytes(b"?")
    assert "index.npz: is damaged" in faults(indexed)[0]


def test_verify_warns_of_duplicates_and_misnamed_files(folder):
    picture = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    tars.replace(folder / "val-000000.tar", "v001", png=tars.member(folder / "train-000000.tar", "t007.png")[1])
    tars.write(folder / "val-000001.tar", [("v002", {"jpg": tars.png(picture), "cls": b"0"})])
    assert faults(folder) == []
    assert faults(folder, "warning") == [
        "warning: val-000001.tar: sample v002: is a PNG named .jpg",
        "warning: val-000001.tar: sample v002: duplicate key, also in val-000000.tar (val), sample v002",
        "warning: val-000000.tar: sample v001: duplicate image, the same as in train-000000.tar (train), sample t007",
    ]


def test_keys_are_read_when_they_are_asked_for_and_never_those_of_another_index(tmp_path):
    folder = tars.small(tmp_path / "shards")
    made = shards.index_shards(folder)
    first, second = Index.load(folder), Index.load(folder)
    assert "key" not in vars(first) and (first.key == made.key).all() and len(first.key) == len(first.label)
    assert made.key[5].decode() in first.where(5)
    (folder / "train-000001.tar").unlink()
    shards.index_shards(folder)
    assert (first.key == made.key).all()
    with pytest.raises(BadInput, match=r"index.npz: has changed since it was opened"):
        second.where(5)
    (folder / "index.npz").unlink()
    with pytest.raises(BadInput, match=r"index.npz: has changed since it was opened"):
        second.where(5)


def test_damaged_keys_are_found_when_an_index_is_opened(tmp_path):
    """Behind what is read of them for their number and type."""
    file = tmp_path / NAME
    synthetic(20_000).write(file)
    assert len(Index.load(file).key) == 21_000
    with zipfile.ZipFile(file) as archive:
        after = min(info.header_offset for info in archive.infolist() if info.header_offset > archive.getinfo("key.npy").header_offset)
    content = bytearray(file.read_bytes())
    content[after - 20] ^= 1
    file.write_bytes(content)
    assert "is damaged or no index" in one_line(Index.load, file)
