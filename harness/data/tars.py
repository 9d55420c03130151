"""One tar of samples: what stands in it, and where.

A sample is what stands side by side under one key: KEY.jpg, KEY.cls, KEY.json. A shard is data, never code: no member is
unpickled, none is extracted to disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from harness.config import BadInput
from harness.data.index import Address, CorruptSample, Entry, Part, Shard
from harness.data.remote import Cache, Unreachable, anew, open_shard, size

IMAGES = ("png", "jpg", "jpeg")
READ = (*IMAGES, "cls", "json")
PICKLED = {"pyd", "pickle", "pkl", "pth", "pt"}
"""extensions that other tools unpickle: passed over, whatever they hold"""
JSON_LABELS = ("label", "cls")
"""keys of a sample's .json that give its label, where there is no .cls"""

_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # as the webdataset library splits a member's name


@dataclass
class Sample:
    """Content is kept of the members in READ, offset (of the first byte in the tar) of all."""

    key: str
    content: dict[str, bytes] = field(default_factory=dict)
    offset: dict[str, int] = field(default_factory=dict)

    def extension(self) -> str:
        """Of its one image; ValueError when there is none, or several."""
        found = [e for e in self.content if e in IMAGES]
        if len(found) != 1:
            raise ValueError(f"holds {len(found)} images ({', '.join(self.offset) or 'nothing'}); one of {', '.join(IMAGES)} is needed")
        return found[0]

    def label(self) -> int:
        """The integer in its .cls as text, else in its .json; ValueError when there is none."""
        label = self._label()
        if not -(2**31) <= label < 2**31:
            raise ValueError(f"label {label} is no number of a class")
        return label

    def _label(self) -> int:
        text = self.content.get("cls")
        if text is None:
            about = self.about()
            for key in JSON_LABELS:
                if isinstance(label := about.get(key), int) and not isinstance(label, bool):
                    return label
            where = f", and no integer {' or '.join(JSON_LABELS)} in its .json" if about else ""
            pickled = "".join(f"; its .{e} is pickled, and a shard is data, never code" for e in sorted(self.pickled()))
            raise ValueError(f"holds no .cls with its label{where}{pickled}")
        try:
            return int(text.decode("ascii"))
        except ValueError:
            raise ValueError(f"label {text[:20]!r} in .cls is not an integer") from None

    def pickled(self) -> set[str]:
        """Extensions of its pickled members."""
        return self.offset.keys() & PICKLED

    def about(self) -> dict[str, object]:
        """Its .json; empty when there is none. ValueError when it is not JSON."""
        try:
            about = json.loads(self.content.get("json", b"{}"))
        except (ValueError, RecursionError):
            raise ValueError("its .json is not JSON") from None
        return about if isinstance(about, dict) else {}

    def entry(self) -> Entry:
        extension = self.extension()
        image = self.content[extension]
        if not self.key.isprintable():  # bytes that are not UTF-8 among them
            raise ValueError("its name is not printable text")
        if len(image) >= 2**32:
            raise ValueError(f"its image of {len(image)} bytes is too large")
        return Entry(self.key, extension, self.offset[extension], len(image), self.label(), zlib.crc32(image), digest(image))


def members(file: BinaryIO) -> Generator[tarfile.TarInfo, None, None]:
    """The headers of an uncompressed tar, in order; tarfile.TarError at the first byte that is not as a tar should be.

    GNU, PAX and old tars, long names among them. The file may be read elsewhere between two members.
    """
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would keep every header of a large archive
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored as a sparse file; pack it again without --sparse")
                if member.size < 0 or tar.offset <= end:  # would be read again and again: CVE-2025-8194
                    raise tarfile.ReadError(f"{member.name} says that it ends before it begins, at byte {end}")
                end = tar.offset
                yield member
    except (ValueError, RecursionError) as error:  # of long names and PAX headers that say nonsense
        raise tarfile.ReadError(f"no header of a member at byte {end}: {error}") from None
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # else a damaged header would be taken for the end
        raise tarfile.ReadError(f"no end of archive at byte {end}")
    place = end + tarfile.BLOCKSIZE
    while block := file.read(1 << 20):  # else a header lost in a hole would be taken for the end, and so would a tar before another
        if rest := block.lstrip(b"\0"):
            raise tarfile.ReadError(f"the archive ends at byte {end}, but byte {place + len(block) - len(rest)} behind it is not zero")
        place += len(block)


def samples(path: Path | Address, cache: Cache | None = None) -> Iterator[Sample]:
    """The samples of a shard in order; BadInput at the first byte that is not as a tar should be."""
    try:
        with open_shard(path, cache) as file, closing(members(file)) as headers:
            sample = None
            for member in headers:
                named = _KEY_AND_EXTENSION.fullmatch(member.name)
                if named is None or member.isdir():
                    continue
                key, extension = named[1], named[2].lower()
                if extension in READ and not member.isreg():
                    raise tarfile.ReadError(f"{member.name} is a link; pack the files themselves: tar --dereference --hard-dereference")
                if sample is None or sample.key != key or extension in sample.offset:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                sample.offset[extension] = member.offset_data
                if extension in READ:
                    file.seek(member.offset_data)
                    sample.content[extension] = file.read(member.size)
            if sample is None:
                raise tarfile.ReadError("holds no samples")
            yield sample  # not before the end of the archive is seen: it might have lost members
    except Unreachable:
        raise
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged: {getattr(error, 'strerror', None) or error}") from None


def scan(path: Path | Address, name: str, split: str) -> tuple[Part, set[str]]:
    """(the index of one shard, extensions of the pickled members that were passed over).

    BadInput when it is damaged, CorruptSample for the first sample without exactly one image and an integer label.
    """
    entries = []
    pickled: set[str] = set()
    with anew(path) as cache:
        for sample in samples(path, cache):
            try:
                entries.append(sample.entry())
            except ValueError as error:
                raise CorruptSample(f"{path}: sample {plain(sample.key)}: {error}") from None
            pickled |= sample.pickled()
        return Part.of(Shard(name, split, len(entries), size(path) or 0, sha256(path, cache)), entries), pickled


def digest(image: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest())


def plain(key: str) -> str:
    """For messages."""
    return key if key.isprintable() else ascii(key)


def sha256(path: Path | Address, cache: Cache | None = None) -> str:
    digest = hashlib.sha256()
    with open_shard(path, cache) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
