"""Everything that is wrong with a set of shards, by reading and decoding every byte of it.

Shards are read in processes, each by itself; what is kept of a sample to compare it with all others is some 60 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from harness.config import BadInput
from harness.data.decode import decode, kind
from harness.data.index import NAME, Address, Entry, Index, IntArray, Shard
from harness.data.parallel import each
from harness.data.remote import Cache, anew, size
from harness.data.shards import Progress, locate, pickled_members, silent, sizes, split_of
from harness.data.tars import Sample, digest, plain, samples, sha256

Severity = Literal["fault", "warning"]


@dataclass(frozen=True)
class Finding:
    """A fault makes the data unusable as they are, a warning does not."""

    severity: Severity
    shard: Path | Address
    key: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.shard}: {f'sample {plain(self.key)}: ' if self.key is not None else ''}{self.message}"


@dataclass(frozen=True)
class Verified:
    findings: list[Finding]
    classes: list[str]
    """a line a split: its samples, and how they spread over the classes"""


def verify(path: Path | str, progress: Progress = silent, workers: int = 1) -> Verified:
    """Everything wrong with the shards of a folder, a list (`shards.locate`) or an index file. Progress counts bytes.

    With an index the shards are held against it; without, as far as they go by themselves. Faults: a shard that is
    missing, truncated or changed since it was indexed; a sample that does not decode, has no integer label, another label
    than its .json or the index say, or a label outside the classes (0..k-1, as far as training samples have every one).
    Warnings: duplicate keys and images, files that are not what their names say, pickled members.
    """
    folder, names, index, findings = _what(path)
    total, done = sum(sizes(folder, names)), 0
    reads: list[_Read] = []
    for read in each(_read, _tasks(folder, names, index), workers):
        reads.append(read)
        findings += read.findings
        done += read.bytes
        progress(done, total)
    together = _Together(folder, reads)
    findings += [*together.duplicates(), *together.labels_outside()]
    if pickled := set().union(*(read.pickled for read in reads)):
        findings.append(Finding("warning", folder, None, pickled_members(pickled)))
    return Verified(findings, together.classes())


def _what(path: Path | str) -> tuple[Path | Address, list[str], Index | None, list[Finding]]:
    """(folder, names of the shards that are or should be there, their index, what is wrong with that)."""
    listed: list[str] | None = None
    file = Path(path)
    if file.is_dir():
        file = file / NAME
    elif not (file.is_file() and file.suffix == ".npz"):
        where, listed = locate(path)
        if isinstance(where, Address):
            return where, listed, None, []
        file = where / NAME
    index, findings = None, []
    if file.exists():
        try:
            index = Index.load(file)
        except BadInput as error:
            findings.append(Finding("fault", file, None, str(error).removeprefix(f"{file}: ")))
    folder = index.folder if index is not None else file.parent
    if isinstance(folder, Address) and index is not None:
        return folder, [shard.name for shard in index.shards], index, findings
    if listed is not None:
        return folder, listed, index, findings
    _, found = locate(Path(folder))
    return folder, sorted({*found, *(shard.name for shard in index.shards)} if index is not None else found), index, findings


# --------------------------------------------------------------------------------------------- shard by shard


@dataclass(frozen=True)
class _Task:
    folder: Path | Address
    name: str
    indexed: bool
    """the set has an index, whether or not this shard is in it"""
    shard: Shard | None
    """as it was indexed; None: it was not"""
    rows: dict[str, list[tuple[int, int, int]]]
    """key -> (size, crc32, label) of the samples that the index has of it"""


@dataclass
class _Read:
    """What was found in one shard, and of each whole sample what others are compared with."""

    name: str
    split: str
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    pickled: set[str] = field(default_factory=set)
    keys: npt.NDArray[np.bytes_] = field(default_factory=lambda: np.empty(0, dtype="S1"))
    key_hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    images: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """hashes of their bytes"""
    labels: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def _tasks(folder: Path | Address, names: Sequence[str], index: Index | None) -> Iterator[_Task]:
    numbers = {shard.name: number for number, shard in enumerate(index.shards)} if index is not None else {}
    for name in names:
        shard: Shard | None = None
        rows: dict[str, list[tuple[int, int, int]]] = {}
        if index is not None and name in numbers:
            shard = index.shards[numbers[name]]
            for n in np.flatnonzero(index.shard == numbers[name]).tolist():
                rows.setdefault(index.key[n].decode(), []).append((int(index.size[n]), int(index.crc32[n]), int(index.label[n])))
        yield _Task(folder, name, index is not None, shard, rows)


def _read(task: _Task) -> _Read:
    return _Reading(task).read


class _Reading:
    """One shard, as it is read."""

    def __init__(self, task: _Task) -> None:
        self._task, self._path = task, task.folder / task.name
        self._left = {key: list(rows) for key, rows in task.rows.items()}
        self.read = _Read(task.name, "?")
        try:
            self.read.split = split_of(task.name)
        except BadInput as error:
            self._found("fault", None, str(error).removeprefix(f"{task.name}: "))
        found = size(self._path)
        if found is None:
            self._found("fault", None, f"missing, with the {task.shard.samples if task.shard else 0} samples that the index has of it")
            return
        self.read.bytes = found
        with anew(self._path) as cache:
            self._compare_file(cache)
            whole = self._samples(cache)
        self.read.keys = np.array([key for key, _, _ in whole], dtype=np.bytes_)
        self.read.key_hashes = np.array([digest(key) for key, _, _ in whole], dtype=np.uint64)
        self.read.images = np.array([image for _, image, _ in whole], dtype=np.uint64)
        self.read.labels = np.array([label for _, _, label in whole], dtype=np.int64)

    def _found(self, severity: Severity, key: str | None, message: str) -> None:
        self.read.findings.append(Finding(severity, self._path, key, message))

    def _compare_file(self, cache: Cache | None) -> None:
        was = self._task.shard
        if was is None:
            if self._task.indexed:
                self._found("warning", None, "is not in the index, so never read; index again to use it")
            return
        if self.read.bytes != was.bytes:
            what = "truncated" if self.read.bytes < was.bytes else "changed since it was indexed"
            self._found("fault", None, f"{what}: {self.read.bytes} bytes, {was.bytes} in the index")
        elif sha256(self._path, cache) != was.sha256:
            self._found("fault", None, "changed since it was indexed: another sha256")

    def _samples(self, cache: Cache | None) -> list[tuple[bytes, int, int]]:
        """(key, hash of the image, label) of each sample that has them."""
        whole: list[tuple[bytes, int, int]] = []
        last = "none"
        try:
            for sample in samples(self._path, cache):
                last = plain(sample.key)
                self.read.pickled |= sample.pickled()
                try:
                    entry = sample.entry()
                except ValueError as error:
                    self._found("fault", sample.key, str(error))
                    del self._left.get(sample.key, [])[:1]
                    continue
                image = sample.content[entry.extension]
                self._compare_sample(entry)
                self._decode(entry, image)
                self._compare_json(sample, entry.label)
                whole.append((entry.key.encode(), entry.digest, entry.label))
        except BadInput as error:
            lost = [key for key, rows in self._left.items() if rows]
            what = f"{len(lost)} samples lost: {_few(lost)}" if lost else f"the last whole sample is {last}"
            self._found("fault", None, f"{str(error).removeprefix(f'{self._path}: ')}; {what}")
            return whole
        for key, rows in self._left.items():
            for _ in rows:
                self._found("fault", key, "is in the index, but not in the shard")
        return whole

    def _compare_sample(self, entry: Entry) -> None:
        if not self._task.rows:
            return
        if not self._left.get(entry.key):
            self._found("fault", entry.key, "is not in the index")
            return
        size, crc32, label = self._left[entry.key].pop(0)
        if (entry.size, entry.crc32) != (size, crc32):
            self._found("fault", entry.key, "its image changed since it was indexed: another crc32 or size")
        if entry.label != label:
            self._found("fault", entry.key, f"mislabelled: {entry.label} in .cls, {label} in the index")

    def _decode(self, entry: Entry, image: bytes) -> None:
        try:
            decode(image, 3)
        except ValueError as error:
            self._found("fault", entry.key, f"its image does not decode: {error}")
        else:
            if kind(image) != {"jpg": "jpeg"}.get(entry.extension, entry.extension):
                self._found("warning", entry.key, f"is a {kind(image).upper()} named .{entry.extension}")

    def _compare_json(self, sample: Sample, label: int) -> None:
        try:
            other = sample.about().get("label")
        except ValueError as error:
            self._found("warning", sample.key, str(error))
            return
        if isinstance(other, int) and other != label:
            self._found("fault", sample.key, f"mislabelled: {label} in .cls, {other} in .json")


# ---------------------------------------------------------------------------------------------- all together


class _Together:
    """Samples by number: shard after shard."""

    def __init__(self, folder: Path | Address, reads: Sequence[_Read]) -> None:
        self._folder, self._reads = folder, reads
        self._starts = np.cumsum([0, *(len(read.labels) for read in reads)])
        self._labels = np.concatenate([np.empty(0, np.int64), *(read.labels for read in reads)])
        split = np.repeat([read.split for read in reads], np.diff(self._starts)) if reads else np.empty(0, "U5")
        self._in = {name: split == name for name in ("train", "val")}

    def _where(self, number: int) -> tuple[_Read, str]:
        """The shard of a sample, and its key."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._reads[place], self._reads[place].keys[number - self._starts[place]].decode()

    def _finding(self, severity: Severity, number: int, message: str) -> Finding:
        read, key = self._where(number)
        return Finding(severity, self._folder / read.name, key, message)

    def duplicates(self) -> Iterator[Finding]:
        for what, column in (("key, also in", "key_hashes"), ("image, the same as in", "images")):
            for number, first in _repeated(np.concatenate([np.empty(0, np.uint64), *(getattr(read, column) for read in self._reads)])):
                read, key = self._where(first)
                yield self._finding("warning", number, f"duplicate {what} {read.name} ({read.split}), sample {key}")

    def labels_outside(self) -> Iterator[Finding]:
        """Classes are not written anywhere in shards, so they are taken from the training samples."""
        known = set(np.unique(self._labels[self._in["train"]] if self._in["train"].any() else self._labels).tolist())
        classes = next(k for k in range(len(known) + 1) if k not in known)
        outside = np.flatnonzero((self._labels < 0) | (self._labels >= classes))
        if len(outside) * 100 > len(self._labels):
            labels = _few([str(label) for label in np.unique(self._labels[outside]).tolist()])
            severity: Severity = "fault" if self._in["train"].any() else "warning"  # a few of val need not have every class
            yield Finding(severity, self._folder, None, f"no training sample has label {classes}, though {labels} occur")
            return
        for number in outside.tolist():
            message = f"label {self._labels[number]} is outside the classes 0..{classes - 1} of the training samples"
            yield self._finding("fault", number, message)

    def classes(self) -> list[str]:
        lines = []
        for split, inside in self._in.items():
            labels, counts = np.unique(self._labels[inside], return_counts=True)
            if len(labels):
                fewest, most = counts.argmin(), counts.argmax()
                spread = f"{counts[fewest]} (label {labels[fewest]}) to {counts[most]} (label {labels[most]})"
                if counts[fewest] == counts[most]:
                    spread = f"{counts[most]}"
                lines.append(f"{split}: {counts.sum()} samples in {len(labels)} classes, {spread} a class")
        return lines


def _repeated(hashes: npt.NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """(number, number of the first with the same hash) of every one but the first, ascending."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    new = np.append(True, ordered[1:] != ordered[:-1])[: len(order)]
    firsts = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    pairs = np.stack([order, firsts])[:, ~new]
    yield from zip(*pairs[:, np.argsort(pairs[0])].tolist(), strict=True)


def _few(names: list[str]) -> str:
    return ", ".join(map(plain, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
