"""Shards that lie elsewhere: http(s), s3, gs and hf addresses through fsspec, in blocks that are kept in a local folder.

A block is asked for again when the connection breaks or stalls. The folder is shared by all processes of a node: a block is
whole or absent, and the ones used longest ago make room for new ones. What is indexed or verified is asked for anew.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from harness.config import BadInput
from harness.data.index import Address, Index

SCHEMES = ("http", "https", "s3", "gs", "hf")
BLOCK = 8 << 20
"""bytes asked for at a time: some 70 images of ImageNet"""
ATTEMPTS = 5
STALL_SECONDS = 20.0
"""without a byte, and a request is given up"""
WAIT_SECONDS = 0.5
"""before the second attempt; twice as long before each further one"""
VERSION = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated", "blob_id")
"""what filesystems say of a file that is another once the file has changed"""
UNFINISHED_SECONDS = 3600
"""a temporary file this old is left of a process that is gone"""


class Unreachable(OSError):
    """A part of a shard cannot be had: every attempt failed, or there is no place to keep it. Names the shard and the reason."""


class Missing(BadInput):
    """There is no such shard."""


@dataclass(frozen=True)
class Cache:
    folder: Path
    bytes: int = 64 << 30
    """at most so many are kept, and one block more for each process"""
    own: str = ""
    """prefix of its folders: two caches in one place with different ones share nothing"""


def node_cache() -> Cache:
    """As the environment says: WRBENCH_CACHE, a folder, and WRBENCH_CACHE_GB."""
    folder = os.environ.get("WRBENCH_CACHE") or "~/.cache/wrbench"
    gigabytes = os.environ.get("WRBENCH_CACHE_GB") or "64"
    if not gigabytes.isdecimal():
        raise BadInput(f"WRBENCH_CACHE_GB: {gigabytes!r} must be a whole number of GB; e.g. 64")
    return Cache(Path(folder).expanduser(), int(gigabytes) * 10**9)


def overflow(index: Index) -> list[str]:
    """A warning where a node keeps less than all of the shards: in random order most images then cost a block of their own."""
    whole, cache = sum(shard.bytes for shard in index.shards), node_cache()
    if isinstance(index.folder, Path) or whole <= cache.bytes:
        return []
    return [
        f"{index.folder}: has {whole / 1e9:.3g} GB of shards, and {cache.folder} keeps {cache.bytes / 1e9:.3g} GB: what does not fit is "
        f"fetched anew for every image, {BLOCK >> 20} MB at a time; on the nodes set WRBENCH_CACHE_GB={-(-whole // 10**9)} or more"
    ]


@contextmanager
def anew(path: Path | Address) -> Iterator[Cache | None]:
    """A cache in which nothing is kept of a shard before, nor afterwards: what is read through it is what lies there now."""
    if isinstance(path, Path):
        yield None
        return
    cache = replace(node_cache(), own=f"{secrets.token_hex(8)}-")
    try:
        yield cache
    finally:
        for folder in cache.folder.glob(f"{cache.own}*"):
            shutil.rmtree(folder, ignore_errors=True)


def open_shard(path: Path | Address, cache: Cache | None = None) -> BinaryIO:
    """A shard to read from, wherever it lies; OSError, BadInput."""
    return open(path, "rb") if isinstance(path, Path) else io.BufferedReader(_File(RemoteShard(path, cache or node_cache())), 1 << 20)


class LocalShard:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed when the last user lets go of it

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)


def reader(path: Path | Address) -> LocalShard | RemoteShard:
    """read(offset, size) of a shard, wherever it lies, in any thread; OSError, BadInput."""
    return LocalShard(path) if isinstance(path, Path) else RemoteShard(path, node_cache())


def size(path: Path | Address) -> int | None:
    """Bytes of a shard, wherever it lies; None when there is none."""
    if isinstance(path, Path):
        return path.stat().st_size if path.exists() else None
    try:
        return RemoteShard(path, node_cache()).size
    except Missing:
        return None


class _File(io.RawIOBase):
    def __init__(self, shard: RemoteShard) -> None:
        self._shard, self._place = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._shard.size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        content = self._shard.read(self._place, len(buffer)) if self._place < self._shard.size else b""
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


class RemoteShard:
    """One shard by its address; Missing, BadInput for an unknown scheme, Unreachable."""

    def __init__(self, address: str, cache: Cache) -> None:
        self.address, self._cache = address, cache
        self._filesystem, self._path = _filesystem(address)
        about = self._patiently(lambda: self._filesystem.info(self._path))
        if (size := about.get("size")) is None:
            raise BadInput(f"{address}: its server does not say how long it is, so it cannot be read in parts; copy it here first")
        self.size = int(size)
        # a server that says nothing but the length may hold another file of this length; what is trained on is checked by crc32
        version = " ".join(str(about[key]) for key in VERSION if about.get(key))
        self._folder = cache.folder / (cache.own + hashlib.sha256(f"{address} {self.size} {version}".encode()).hexdigest()[:32])

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of [offset, offset + size), fewer at the end; safe in several threads."""
        stop = min(offset + size, self.size)
        parts = []
        for number in range(offset // BLOCK, -(-stop // BLOCK)):
            start = number * BLOCK
            parts.append(self._part(number, max(0, offset - start), stop - start))
        return b"".join(parts)

    def _part(self, number: int, first: int, stop: int) -> bytes:
        """Bytes [first, stop) of a block, or those of them that it has."""
        file, start, length = self._folder / str(number), number * BLOCK, min(BLOCK, self.size - number * BLOCK)
        try:
            with suppress(FileNotFoundError), open(file, "rb", buffering=0) as kept:
                if os.fstat(kept.fileno()).st_size == length:
                    os.utime(kept.fileno())  # used now
                    return os.pread(kept.fileno(), stop - first, first)
            fetched: bytes = self._patiently(lambda: self._fetch(start, start + length))
            self._keep(file, fetched)
        except Unreachable:
            raise
        except OSError as error:  # is no fault of the shard
            raise Unreachable(
                f"{self.address}: cannot be kept in {self._cache.folder}: {error.strerror or error}; make room, or set WRBENCH_CACHE"
            ) from None
        return fetched[first:stop]

    def _keep(self, file: Path, content: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            temporary.write_bytes(content)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        _make_room(self._cache)

    def _fetch(self, start: int, stop: int) -> bytes:
        content = bytes(self._filesystem.cat_file(self._path, start=start, end=stop))
        if len(content) != stop - start:  # a server that knows no ranges sends the whole file
            raise OSError(f"{len(content)} bytes instead of {stop - start}")
        return content

    def _patiently(self, call: Any) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except PermissionError as error:
                raise BadInput(f"{self.address}: may not be read: {error}") from None
            except Exception as error:  # every filesystem of fsspec has errors of its own
                cause = error.__cause__ or error
                # over http a server that is gone is a FileNotFoundError too, with another cause
                if isinstance(error, FileNotFoundError) and (cause is error or getattr(cause, "status", None) in (404, 410)):
                    raise Missing(f"{self.address}: does not exist") from None
                reason = " ".join(str(cause).split()) or type(cause).__name__
            if attempt < ATTEMPTS - 1:
                time.sleep(WAIT_SECONDS * 2**attempt)
        raise Unreachable(f"{self.address}: cannot be read after {ATTEMPTS} attempts: {reason}")


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    scheme = urlsplit(address).scheme
    if scheme not in SCHEMES:
        raise BadInput(f"{address}: shards are read from {', '.join(SCHEMES)} addresses and from folders")
    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)}
    try:
        filesystem, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise BadInput(f"{address}: {error}") from None
    return filesystem, path


def _make_room(cache: Cache) -> None:
    """Removes the blocks used longest ago until the rest fit, but no block that a process is writing just now."""
    blocks = []
    unfinished = time.time_ns() - UNFINISHED_SECONDS * 10**9
    for file in cache.folder.glob("*/*"):
        with suppress(FileNotFoundError):
            status = file.stat()
            if not file.name.startswith(".") or status.st_mtime_ns < unfinished:
                blocks.append((status.st_mtime_ns, status.st_size, file))
    excess = sum(size for _, size, _ in blocks) - cache.bytes
    for _, size, file in sorted(blocks):
        if excess <= 0:
            return
        file.unlink(missing_ok=True)
        excess -= size
