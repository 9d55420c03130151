"""The sidecar index of a set of shards: where every sample lies, its label, its checksum, its place in the holdout order.

One file, `index.npz`: a zip of plain NumPy arrays (an entry a sample) and of `manifest.json` (an entry a shard), so that
it loads in a fraction of a second for a million samples, needs no pickle, and `unzip -p index.npz manifest.json` reads it.
A sample's *number* is its place in the index: shards by name, then the order inside the shard. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.config import BadInput, Data, TestSet
from harness.store import replacing

NAME = "index.npz"
FORMAT = "wrbench shard index"
VERSION = 2
COLUMNS = ("shard", "offset", "size", "extension", "label", "crc32", "holdout_rank")

DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""what numpy, zipfile and json raise for a file that is no index, or no longer whole"""

NEVER = 2**31 - 1
"""the place in the holdout order of an image that is not a candidate"""

IntArray = npt.NDArray[np.int64]


class CorruptSample(BadInput):
    """A sample fails its checksum, cannot be decoded, or has a label outside the classes; names shard and key."""


class Address(str):
    """Where remote shards lie, up to their names: https://host/folder."""

    __slots__ = ()

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self}/{name}")


@dataclass(frozen=True)
class Shard:
    name: str
    """path below the folder of the shards, with forward slashes"""
    split: str
    """train | val"""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample, as the index is made from."""

    key: str
    extension: str
    """of the image, lower case: png, jpg, jpeg"""
    offset: int
    """of the image's first byte in the shard"""
    size: int
    """of the image in bytes"""
    label: int
    crc32: int
    """of the image's bytes"""
    digest: int
    """64 bits of the BLAKE2b of the image's bytes: equal where images are, and the order of the holdout"""


@dataclass(frozen=True, eq=False)
class Part:
    """One shard, and arrays with an entry for each of its samples."""

    shard: Shard
    key: npt.NDArray[np.bytes_]
    extension: npt.NDArray[np.bytes_]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.uint32]
    label: npt.NDArray[np.int32]
    crc32: npt.NDArray[np.uint32]
    digest: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, shard: Shard, entries: Sequence[Entry]) -> Part:
        return cls(
            shard,
            key=np.array([e.key.encode() for e in entries], dtype=np.bytes_),
            extension=np.array([e.extension.encode() for e in entries], dtype=np.bytes_),
            offset=np.array([e.offset for e in entries], dtype=np.int64),
            size=np.array([e.size for e in entries], dtype=np.uint32),
            label=np.array([e.label for e in entries], dtype=np.int32),
            crc32=np.array([e.crc32 for e in entries], dtype=np.uint32),
            digest=np.array([e.digest for e in entries], dtype=np.uint64),
        )

    def write(self, path: Path) -> None:
        """At `path`, whole or not at all."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shard"}
        with replacing(path) as file:
            np.savez(file, manifest=np.array(json.dumps(asdict(self.shard))), **columns)

    @classmethod
    def load(cls, path: Path) -> Part:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        return cls(Shard(**json.loads(str(columns.pop("manifest")))), **columns)


@dataclass(frozen=True, eq=False)
class Index:
    """Arrays have one entry a sample, in the order of the sample numbers."""

    folder: Path | Address
    """the shards lie here"""
    shards: tuple[Shard, ...]
    extensions: tuple[str, ...]
    sha256: str
    """identity of the samples: split, key, label, size and crc32 of each, in order; not of how they are packed in shards"""
    keys: npt.NDArray[np.bytes_] | Path
    """or the index file that has them, see `key`"""
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.uint32]
    extension: npt.NDArray[np.uint8]
    label: npt.NDArray[np.int32]
    crc32: npt.NDArray[np.uint32]
    holdout_rank: npt.NDArray[np.int32]
    """train samples: place among those of the same label, in the order of a hash of the image's bytes; NEVER for an image
    that occurs several times, so that duplicates stay on one side; -1 for val"""

    @cached_property
    def key(self) -> npt.NDArray[np.bytes_]:
        """Read when it is first asked for: only messages and `shards verify` do, and a million keys take a third of the memory.

        BadInput when the index has been written anew meanwhile, or is gone.
        """
        if not isinstance(self.keys, Path):
            return self.keys
        try:
            with np.load(self.keys, allow_pickle=False) as archive:
                if json.loads(archive["manifest.json"])["sha256"] == self.sha256:
                    key: npt.NDArray[np.bytes_] = archive["key"]
                    return key
        except DAMAGE:
            pass
        raise BadInput(f"{self.keys}: has changed since it was opened; start again")

    # ------------------------------------------------------------------------------------------------ views

    def train(self, data: Data) -> IntArray:
        """Numbers of the samples trained on, ascending: all of train but the holdout."""
        return np.flatnonzero((self.holdout_rank >= 0) & ~self._held_out(data))

    def holdout(self, data: Data) -> IntArray:
        """Numbers of the holdout, ascending: of each class the first data.holdout_per_class in the holdout order.

        It depends on the images alone, not on keys or packing, and a larger holdout contains every smaller one.
        """
        return np.flatnonzero(self._held_out(data))

    def _held_out(self, data: Data) -> npt.NDArray[np.bool_]:
        per_class = data.holdout_per_class if data.train_on == "train" else 0
        is_class = (self.label >= 0) & (self.label < data.num_classes)
        return is_class & (self.holdout_rank >= 0) & (self.holdout_rank < per_class)

    def val(self) -> IntArray:
        """Numbers of the reported split, ascending."""
        return np.flatnonzero(self.holdout_rank < 0)

    def where(self, number: int) -> str:
        """`FOLDER/SHARD: sample KEY`, for messages."""
        return f"{self.folder / self.shards[self.shard[number]].name}: sample {self.key[number].decode()}"

    # ----------------------------------------------------------------------------------------------- checks

    def check(self, data: Data) -> None:
        """BadInput unless the shards are the ones that `data` describes; a line a mistake.

        A label outside the classes is left to the reader where data.on_corrupt lets it be substituted: in training.
        """
        lines = self.changed_files()
        trained = self.train(data)
        for key, samples, split in (("train_samples", data.train_samples, "train"), ("val_samples", data.val_samples, "val")):
            held = sum(s.samples for s in self.shards if s.split == split)
            if held != samples:
                lines.append(f"workload.data.{key}: {samples}, but {self.folder} holds {held}; write {held}, or another path")
        if (fault := self._size_fault(data)) is not None and not lines:
            lines.append(fault)
        inside = (self.label >= 0) & (self.label < data.num_classes)
        counts = np.bincount(self.label[inside & (self.holdout_rank >= 0)], minlength=data.num_classes)
        classes = int((counts > 0).sum())
        if classes != data.num_classes:
            lines.append(
                f"workload.data.num_classes: {data.num_classes}, but {self.folder} has training samples of only {classes} of the "
                f"labels 0..{data.num_classes - 1}; give the number of classes of this data"
            )
        elif (short := self._too_few(data, counts)) is not None:
            lines.append(short)
        if data.on_corrupt == "substitute":
            inside[trained] = True
        outside = np.flatnonzero(~inside)
        if len(outside):
            more = f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
            lines.append(f"{self.label_fault(int(outside[0]), data.num_classes)}{more}")
        if lines:
            raise BadInput("\n".join(lines))

    def _size_fault(self, data: Data) -> str | None:
        """A message if nothing is resized and the first image is not of image_size, else None.

        Remote shards are skipped, and so is an image that cannot be read, which is named once it is used.
        """
        if data.resize is not None or not isinstance(self.folder, Path) or not len(self.label):
            return None
        from harness.data import decode

        try:
            with open(self.folder / self.shards[self.shard[0]].name, "rb") as file:
                file.seek(int(self.offset[0]))
                height, width = decode.size(file.read(int(self.size[0])))
        except (OSError, ValueError):
            return None
        if (height, width) == (data.image_size, data.image_size):
            return None
        square = f"write {height}, or " if height == width else ""
        return (
            f"workload.data.image_size: {data.image_size}, but {self.where(0)} is {height}x{width}; {square}to resize images set "
            f"workload.data.resize, e.g. {data.image_size * 8 // 7}"
        )

    def check_test(self, test: TestSet, data: Data) -> None:
        """BadInput unless the val shards here are the further `test` set of `data`; a line a mistake."""
        lines, tested = self.changed_files(), self.val()
        if len(tested) != test.samples:
            holds = f"{self.folder} holds {len(tested)} val samples"
            lines.append(f"evaluation.test.samples: {test.samples}, but {holds}; write {len(tested)}, or another path")
        outside = tested[(self.label[tested] < 0) | (self.label[tested] >= data.num_classes)]
        if len(outside):
            lines.append(self.label_fault(int(outside[0]), data.num_classes))
        if lines:
            raise BadInput("\n".join(lines))

    def _too_few(self, data: Data, counts: IntArray) -> str | None:
        """Says so when a class has too few different images for its holdout, and at least one more to train on."""
        held = np.bincount(self.label[self.holdout(data)], minlength=data.num_classes)
        wanted = data.holdout_samples // data.num_classes
        short = np.flatnonzero((held < wanted) | (held == counts))
        if not len(short):
            return None
        label = int(short[0])
        return (
            f"workload.data.holdout_per_class: {wanted}, but class {label} of {self.folder} has {counts[label]} training images, "
            f"of which {held[label]} can be held out; e.g. {int(min(held.min(), (counts - 1).min()))}"
        )

    def label_fault(self, number: int, num_classes: int) -> str:
        return (
            f"{self.where(number)}: label {self.label[number]} is outside 0..{num_classes - 1} (workload.data.num_classes "
            f"{num_classes}); correct its .cls and run: wrbench shards index {self.folder}"
        )

    def changed_files(self) -> list[str]:
        """A line for every shard that is missing or whose size is not the indexed one. OSError when a server is gone."""
        with ThreadPoolExecutor(16) as threads:  # a network filesystem answers each in its own time
            try:
                return [line for line in threads.map(self._changed, self.shards) if line is not None]
            finally:
                threads.shutdown(cancel_futures=True)

    def _changed(self, shard: Shard) -> str | None:
        path = self.folder / shard.name
        if isinstance(path, Address):
            from harness.data import remote

            found = remote.size(path)
            if found is None:
                return f"{path}: does not exist, but it is in the index; restore it or index again"
            size = found
        else:
            try:
                size = path.stat().st_size
            except OSError as error:
                return f"{path}: {error.strerror or error}, but it is in the index; restore it or index again"
        if size == shard.bytes:
            return None
        what = "truncated" if size < shard.bytes else "changed since it was indexed"
        return f"{path}: {what}: {size} bytes, {shard.bytes} in the index; restore it, or see: wrbench shards verify"

    # ---------------------------------------------------------------------------------------- make and keep

    @classmethod
    def make(cls, folder: Path | Address, parts: Sequence[Part]) -> Index:
        shards = tuple(part.shard for part in parts)
        shard = np.repeat(np.arange(len(parts), dtype=np.int32), [s.samples for s in shards])
        is_val = np.array([s.split == "val" for s in shards], dtype=bool)[shard]
        extensions, extension = np.unique(np.concatenate([part.extension for part in parts]), return_inverse=True)
        key = np.concatenate([part.key for part in parts])
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in ("offset", "size", "label", "crc32")
        }
        digest = hashlib.sha256(f"{FORMAT}\n".encode())
        for column in (is_val, *(columns[name] for name in ("label", "size", "crc32"))):
            digest.update(np.ascontiguousarray(column).astype("<i8").tobytes())
        digest.update(b"\n".join(key.tolist()))
        return cls(
            folder=folder,
            shards=shards,
            extensions=tuple(e.decode() for e in extensions.tolist()),
            sha256=digest.hexdigest(),
            keys=key,
            shard=shard,
            extension=extension.astype(np.uint8),
            holdout_rank=_holdout_rank(columns["label"], np.concatenate([part.digest for part in parts]), is_val),
            **columns,
        )

    def write(self, path: Path) -> None:
        """The whole index at `path`, or what was there before."""
        if isinstance(self.folder, Address):
            folder = str(self.folder)
        else:
            folder = "." if self.folder.resolve() == path.parent.resolve() else str(self.folder.resolve())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "folder": folder,
            "sha256": self.sha256,
            "extensions": self.extensions,
            "shards": [asdict(shard) for shard in self.shards],
        }
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
            for column in ("key", *COLUMNS):
                _add(archive, f"{column}.npy", getattr(self, column))

    @classmethod
    def load(cls, path: Path, key: str = "workload.data.path") -> Index:
        """The index in folder `path`, or the index file itself; BadInput when there is none that this version reads.

        key: where a config says the path, for the message.
        """
        file = path / NAME if path.is_dir() else path
        if not file.is_file():
            raise BadInput(f"{_missing(path)}, or set {key}")
        remedy = f"write it again with: wrbench shards index {file.parent}"
        try:
            with np.load(file, allow_pickle=False) as archive:
                manifest: dict[str, Any] = json.loads(archive["manifest.json"])
                if manifest["format"] != FORMAT:
                    raise KeyError("format")
                if manifest["version"] != VERSION:
                    raise BadInput(f"{file}: is of index version {manifest['version']}, this wrbench reads {VERSION}; {remedy}")
                index = cls(
                    folder=Address(manifest["folder"]) if "://" in manifest["folder"] else file.parent / manifest["folder"],
                    shards=tuple(Shard(**shard) for shard in manifest["shards"]),
                    extensions=tuple(manifest["extensions"]),
                    sha256=manifest["sha256"],
                    keys=file.absolute(),
                    **{column: archive[column] for column in COLUMNS},
                )
                index._refuse_nonsense(archive.zip)
        except BadInput:
            raise
        except DAMAGE as error:
            raise BadInput(f"{file}: is damaged or no index of shards ({type(error).__name__}); {remedy}") from None
        return index

    def _refuse_nonsense(self, archive: zipfile.ZipFile) -> None:
        """ValueError unless manifest and arrays are of the types they should be, and agree; BadZipFile for damaged keys."""
        texts = [self.sha256, *self.extensions, *(text for shard in self.shards for text in (shard.name, shard.sha256))]
        counts = [count for shard in self.shards for count in (shard.samples, shard.bytes)]
        if not (all(type(text) is str for text in texts) and all(type(count) is int and count >= 0 for count in counts)):
            raise ValueError("manifest")
        if not self.shards or any(shard.split not in ("train", "val") for shard in self.shards):
            raise ValueError("shards")
        samples = sum(shard.samples for shard in self.shards)
        with archive.open("key.npy") as member:  # to the end, which its checksum needs, but without keeping it
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if shape != (samples,) or dtype.kind != "S":
                raise ValueError("key")
            while member.read(1 << 20):
                pass
        for column in COLUMNS:
            array = getattr(self, column)
            if array.shape != (samples,) or array.dtype.kind not in "iu":
                raise ValueError(column)
        if not np.array_equal(self.shard, np.repeat(np.arange(len(self.shards)), [shard.samples for shard in self.shards])):
            raise ValueError("shard")
        if samples and (self.extension.min() < 0 or self.extension.max() >= len(self.extensions) or self.offset.min() < 0):
            raise ValueError("extension, offset")


def checked(data: Data, test: TestSet | None) -> tuple[Index, Index | None]:
    """The indices of a data set and of its further test set, if it has one. BadInput for shards that are not as described."""
    index = Index.load(data.path)
    index.check(data)
    if test is None:
        return index, None
    further = Index.load(test.path, "evaluation.test.path")
    further.check_test(test, data)
    return index, further


def _holdout_rank(label: npt.NDArray[np.int32], digest: npt.NDArray[np.uint64], is_val: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    rank = np.full(len(label), -1, dtype=np.int32)
    rank[~is_val] = NEVER
    _, image, occurs = np.unique(digest, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(~is_val & (occurs[image] == 1))
    ordered = candidates[np.lexsort((digest[candidates], label[candidates]))]
    _, starts, counts = np.unique(label[ordered], return_index=True, return_counts=True)
    rank[ordered] = np.arange(len(ordered)) - np.repeat(starts, counts)
    return rank


def _add(archive: zipfile.ZipFile, name: str, content: bytes | npt.NDArray[Any]) -> None:
    """A compressed member with a fixed date: the same index is the same bytes."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(info, "w", force_zip64=True) as member:
        if isinstance(content, bytes):
            member.write(content)
        else:
            np.lib.format.write_array(member, content, version=(1, 0), allow_pickle=False)


def tars_below(folder: Path) -> Iterator[str]:
    """Names of the tars of a folder, also of those in folders that are links to elsewhere, each folder once."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(path, file).relative_to(folder).as_posix() for file in files if file.endswith(".tar"))


def _missing(path: Path) -> str:
    made = "mnist5k" if path.name == "mnist5k" else "KIND SRC"  # the one that comes with wrbench
    if not path.exists():
        return f"{path}: no such folder; build shards there: wrbench shards build {made} --out {path}"
    if not any(tars_below(path)):
        return f"{path}: holds no shards; build them in a new folder: wrbench shards build {made} --out {path / 'new'}"
    return f"{path}: the shards have no index; write one with: wrbench shards index {path}"
