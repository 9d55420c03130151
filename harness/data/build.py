"""Shards from a source: in parallel, in bounded memory, the same bytes every time.

A shard is a function of the source and the options alone. It is written under another name, put on disk and renamed, then
read back into its part of the index; so a build that is killed at any moment goes on with what is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from harness.config import BadInput
from harness.data import tars
from harness.data.decode import Pixels, Scratch, crop, whole
from harness.data.decode import kind as kind_of
from harness.data.index import NAME, Index, IntArray, Part
from harness.data.parallel import each
from harness.data.shards import Progress, silent
from harness.data.sources import Request, Source, Where, open_source
from harness.store import replacing, sync_names, write_atomically

BUILT = "build.json"
"""what `build` writes beside its shards: by it a later build knows its own output"""
VERSION = 2


@dataclass(frozen=True)
class Options:
    """Of a build; all part of what the shards are."""

    seed: int = 0
    """of the order"""
    shard_samples: int | None = None
    """None: as suits the source"""
    max_side: int | None = None
    """pixels; a larger image is scaled down to it. None: none is"""
    quality: int | None = None
    """of JPEG, 1-100: every image is encoded again. None: only what is scaled down, at 90, and pixels losslessly, as PNG"""

    def check(self) -> None:
        for key, value, least, most in (
            ("--seed", self.seed, 0, 2**31 - 1),
            ("--shard-samples", self.shard_samples, 1, 10**9),
            ("--max-side", self.max_side, 8, 65_535),
            ("--quality", self.quality, 1, 100),
        ):
            if value is not None and not least <= value <= most:
                raise BadInput(f"{key}: {value} must be {least} to {most}")


def build(
    kind: str,
    src: Path | None,
    out: Path,
    options: Options = Options(),
    labels: Path | None = None,
    samples: int | None = None,
    workers: int = 1,
    progress: Progress = silent,
) -> str:
    """Shards and index of a KIND in folder `out`, which is complete or absent; one line that says what was done.

    Progress counts samples. BadInput for an unknown KIND or source, and for an `out` that holds anything but the complete
    output of the same build. After a kill, the same call goes on; ChildProcessError when a worker is killed.
    """
    options.check()
    with _workshop(out) as work:
        (work / "spool").mkdir(exist_ok=True)
        source = open_source(kind, Request(src, work / "spool", labels, samples, workers))
        made = {"kind": kind, "version": VERSION, **asdict(options), "source": _fingerprint(source)}
        if (there := _already_built(out, made)) is not None:
            return f"{out}: complete already, nothing to do: {_summary(there)}"
        # of an unfinished build alone, whose shards must be of one kind: a complete one stays what it is under any Pillow
        encoder = {"pillow": PIL.__version__} if source.shape or options.quality or options.max_side else {}
        _same_as_before(work, made | encoder)
        shards = work / "shards"
        shards.mkdir(exist_ok=True)
        (work / "parts").mkdir(exist_ok=True)

        total = len(source.train) + len(source.val)
        parts: list[Part] = []
        done, new, began = 0, 0, time.perf_counter()
        for part, is_new in each(_shard, _tasks(source, options, work), workers):
            parts.append(part)
            done += part.shard.samples
            new += part.shard.samples if is_new else 0
            progress(done, total)
        rate = new / (time.perf_counter() - began)

        index = Index.make(shards, parts)
        index.write(shards / NAME)
        (shards / BUILT).write_text(json.dumps({**made, "sha256": index.sha256}, indent=1) + "\n")
        _clear(work)  # again: a worker that outlived a killed build may have begun a shard since
        sync_names(shards)
        os.rename(shards, out)  # noqa: PTH104 - takes the place of an empty folder, and of nothing else
        sync_names(out.parent)
    took = f"; {rate:.0f} images/s" if new else ""
    if new >= 1000:  # fewer say nothing but how long processes take to start
        took += f", 1.28 million like these would take {1.28e6 / rate / 3600:.1f} h"
    return f"{out}: built {_summary(index)}{took}"


# --------------------------------------------------------------------------------------------------- a shard


@dataclass(frozen=True)
class _Task:
    """A shard, and all that it is made from."""

    path: Path
    split: str
    part: Path
    """where its part of the index goes; it is there when the shard is whole"""
    samples: list[tuple[Where, str]]
    """each with the path of its file"""
    classes: tuple[str, ...]
    shape: tuple[int, int, int] | None
    options: Options


def _tasks(source: Source, options: Options, work: Path) -> Iterator[_Task]:
    """In the order of the shards' names."""
    for split, listing, size in zip(("train", "val"), (source.train, source.val), source.shard_samples, strict=True):
        order = np.arange(len(listing)) if source.mixed else _order(options.seed, split, len(listing))
        size = options.shard_samples or size
        for number, start in enumerate(range(0, len(listing), size)):
            samples = [(where, source.files[where.file]) for where in listing.rows(order[start : start + size])]
            name = f"{split}-{number:06d}"
            path, part = work / "shards" / f"{name}.tar", work / "parts" / f"{name}.npz"
            yield _Task(path, split, part, samples, source.classes, source.shape, options)


def _order(seed: int, split: str, n: int) -> IntArray:
    key = np.array([seed, {"train": 1, "val": 2}[split]], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")  # raw words are the same in every NumPy


def _shard(task: _Task) -> tuple[Part, bool]:
    """(its part of the index, whether it was made now); writes both, unless they are whole."""
    if task.part.exists() and task.path.exists():
        part = Part.load(task.part)
        if task.path.stat().st_size == part.shard.bytes:
            return part, False
    from webdataset.writer import TarWriter

    with replacing(task.path) as file, TarWriter(file, encoder=False, user="", group="", mtime=0) as tar:
        for where, path in task.samples:
            tar.write({"__key__": where.key, **dict(_members(where, path, task))})
    part, _ = tars.scan(task.path, task.path.name, task.split)  # what is indexed is what stands there
    part.write(task.part)
    return part, True


def _members(where: Where, path: str, task: _Task) -> Iterator[tuple[str, bytes]]:
    """Extension and content of the members of one sample."""
    with open(path, "rb") as file:
        raw = os.pread(file.fileno(), where.size, where.offset)
    if len(raw) != where.size:
        raise BadInput(f"{path}: sample {where.key}: ends {where.size - len(raw)} bytes early; the file changed, build again")
    try:
        extension, image = _pixels(raw, task.shape, task.options) if task.shape else _encoded(raw, task.options)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of Pillow, for a broken PNG
        raise BadInput(f"{path}: sample {where.key}: {error}; repair or remove it") from None
    about: dict[str, Any] = {"key": where.key, "label": where.label}
    if task.classes:
        about["class"] = task.classes[where.label]
    if task.shape:
        about["row"] = where.offset // where.size
    yield "cls", str(where.label).encode()
    yield "json", json.dumps(about).encode()
    yield extension, image


def _pixels(raw: bytes, shape: tuple[int, int, int], options: Options) -> tuple[str, bytes]:
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(shape)
    image = _image(planes.transpose(1, 2, 0))
    if options.quality is None and not _too_large(image, options):
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        return "png", encoded.getvalue()
    return "jpg", _jpeg(image, options)


def _encoded(content: bytes, options: Options) -> tuple[str, bytes]:
    kind = kind_of(content)
    if kind == "unknown":
        raise ValueError(f"is neither JPEG nor PNG (begins with {content[:8]!r})")
    if options.quality is not None or options.max_side is not None:
        try:
            image = Image.open(io.BytesIO(content), formats=(kind.upper(),))  # the header alone
        except UnidentifiedImageError:  # its message is an address in memory
            raise ValueError(f"damaged {kind.upper()} header") from None
        if options.quality is not None or _too_large(image, options):
            # by the strict decoder: Pillow fills in what is damaged, and encoded again it would look whole
            pixels = crop(content, 1 if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else 3, whole, Scratch())
            return "jpg", _jpeg(_image(pixels), options)
    return {"jpeg": "jpg", "png": "png"}[kind], content


def _image(pixels: Pixels) -> Image.Image:
    """Of (height, width, 1 or 3)."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _too_large(image: Image.Image, options: Options) -> bool:
    return options.max_side is not None and max(image.size) > options.max_side


def _jpeg(image: Image.Image, options: Options) -> bytes:
    if options.max_side is not None and max(image.size) > options.max_side:
        scale = options.max_side / max(image.size)
        width, height = (max(1, math.floor(side * scale + 0.5)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=options.quality or 90)
    return encoded.getvalue()


# ------------------------------------------------------------------------------------------ complete or absent


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A folder beside `out` to work in, kept when the build fails and gone when it is done."""
    if out.name in ("", ".."):
        raise BadInput(f"--out: {out} is a folder that is there under no name of its own; give a new one, e.g. {out / 'shards'}")
    work = out.with_name(f".{out.name}.building")
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{out}: another process is building it; wait for that one") from None
        try:
            yield work
        except BadInput:
            if not (work / "shards").exists():  # nothing was begun
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)
    finally:
        os.close(handle)


def _same_as_before(work: Path, made: dict[str, Any]) -> None:
    """BadInput when `work` holds what is left of another build; what was half-written is cleared."""
    plan = work / BUILT
    try:
        was = json.loads(plan.read_text())
    except (OSError, ValueError):  # it is there before the first shard is
        was = None
        write_atomically(plan, json.dumps(made))
    if was is not None and was != made:
        odd = next(key for key in made if was.get(key) != made[key])
        raise BadInput(f"{work}: is the beginning of another build ({odd} {was.get(odd)}, asked for {made[odd]}); remove it to start anew")
    _clear(work)


def _clear(work: Path) -> None:
    """What is half-written; a worker of a build that was killed, in its last moments, may just have given it its name."""
    for left in (*work.glob("shards/.*"), *work.glob("parts/.*")):
        left.unlink(missing_ok=True)


def _fingerprint(source: Source) -> str:
    """Of what the listing says, to tell another source from the same one."""
    digest = hashlib.sha256(repr((source.classes, source.shape, source.mixed)).encode())
    for listing in (source.train, source.val):
        digest.update(b"\n".join(listing.key.tolist()))
        for column in (listing.label, listing.size):
            digest.update(column.astype("<i8").tobytes())
    digest.update(source.content.encode())
    return digest.hexdigest()[:16]


def _already_built(out: Path, made: dict[str, Any]) -> Index | None:
    """The index of a complete `out` of the same build; None when `out` is absent or empty; else BadInput."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        was = json.loads((out / BUILT).read_text())
        sha256 = was.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError):
        raise BadInput(f"{out}: holds something that wrbench shards build did not make; give a new or empty folder") from None
    if was != made:
        odd = next((key for key in made if was.get(key) != made[key]), "kind")
        raise BadInput(f"{out}: holds another build ({odd} {was.get(odd)}, asked for {made[odd]}); give a new folder, or remove this one")
    index = Index.load(out)
    if (faults := index.changed_files()) or index.sha256 != sha256:
        reason = faults[0] if faults else f"{out}: its samples are not the ones built"
        raise BadInput(f"{reason}; or remove {out} and build again")
    return index


def _summary(index: Index) -> str:
    train = int((index.holdout_rank >= 0).sum())
    return f"{train} train and {len(index.val())} val samples in {len(index.shards)} shards"
