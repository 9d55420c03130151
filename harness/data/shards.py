"""A set of shards: which tars it is, the split of each, and its index.

Shards are standard WebDataset tars (KEY.png|jpg + KEY.cls + KEY.json). A shard's split is in its name (train-000000.tar,
imagenet1k-validation-00.tar, val/0000.tar).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from braceexpand import braceexpand

from harness.config import BadInput
from harness.data import tars
from harness.data.index import NAME, Address, Index, Part, tars_below
from harness.data.parallel import each
from harness.data.remote import SCHEMES, size

Progress = Callable[[int, int], None]
"""called with (done, total)"""


def silent(done: int, total: int) -> None: ...


def locate(path: Path | str) -> tuple[Path | Address, list[str]]:
    """(folder, names of the shards below it, sorted) of a folder or of a list as WebDataset writes it: DIR/{train,val}-{000..146}.tar.

    A list may be of addresses in one folder: https://host/folder/train-{000..146}.tar. BadInput for what is neither, such as
    a command, and when a shard is named twice or a local one is missing.
    """
    text = str(path)
    if (folder := Path(text)).is_dir():
        if not (names := sorted(tars_below(folder))):
            raise BadInput(f"{folder}: holds no *.tar; give the folder of the shards")
        return folder, names
    if (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(?!:)", text)) and scheme[1] in SCHEMES:
        address, names = _remote(text)
        return address, _each_once(text, names)
    if scheme:
        commands = "a shard is data, and commands are never run; " if scheme[1] == "pipe" else ""
        raise BadInput(f"{text}: {commands}give a folder of shards, or a list such as data/train-{{000..146}}.tar")
    try:
        files = [Path(file).absolute() for part in text.split("::") for file in braceexpand(part)]
    except ValueError as error:
        raise BadInput(f"{text}: {error}; e.g. data/train-{{000..146}}.tar") from None
    if missing := [file for file in files if not file.is_file()]:
        what = "no such file" if missing[0].suffix == ".tar" else "no such folder"
        more = f" (and {len(missing) - 1} more of {len(files)})" if len(missing) > 1 else ""
        raise BadInput(f"{missing[0]}: {what}{more}; give the folder of the shards, or a list of them")
    folder = Path(os.path.commonpath([file.parent for file in files]))
    return folder, _each_once(text, [file.relative_to(folder).as_posix() for file in files])


def _each_once(text: str, names: Sequence[str]) -> list[str]:
    """Sorted; BadInput for one that is there twice."""
    names = sorted(names)
    if twice := next((a for a, b in itertools.pairwise(names) if a == b), None):
        raise BadInput(f"{text}: names {twice} twice")
    return names


def _remote(text: str) -> tuple[Address, list[str]]:
    """The folder that addresses have in common, and the names in it."""
    try:
        addresses = [address for part in text.split("::") for address in braceexpand(part)]
    except ValueError as error:
        raise BadInput(f"{text}: {error}; e.g. https://host/folder/train-{{000..146}}.tar") from None
    common = os.path.commonprefix([address.rpartition("/")[0] + "/" for address in addresses])  # noqa: RUF071 - cut at a / below
    folder = common.rpartition("/")[0]
    if folder.endswith(":/") or "://" not in folder:
        raise BadInput(f"{text}: is not in one folder of one host; e.g. https://host/folder/train-{{000..146}}.tar")
    return Address(folder), [address.removeprefix(f"{folder}/") for address in addresses]


def sizes(folder: Path | Address, names: Sequence[str]) -> list[int]:
    """Bytes of each shard, 0 for one that is not there."""
    with ThreadPoolExecutor(16) as threads:
        try:
            return [found or 0 for found in threads.map(lambda name: size(folder / name), names)]
        finally:
            threads.shutdown(cancel_futures=True)


def split_of(name: str) -> str:
    """train or val, by the name of a shard; BadInput where it does not say."""
    found = re.findall(r"(?<![a-z])(train|val)", name.lower())
    if len(set(found)) != 1:
        raise BadInput(f"{name}: a shard's name must say its split, train or val; e.g. train-000000.tar")
    return str(found[0])


def index_shards(
    path: Path | str,
    out: Path | None = None,
    progress: Progress = silent,
    workers: int = 1,
    warn: Callable[[str], None] = lambda line: None,
) -> Index:
    """Write the sidecar index of the tars of a folder or list (`locate`), beside them or in folder `out`. Progress counts bytes.

    An index that was there is replaced; `warn` is told of one with more samples.
    BadInput for the first shard that is truncated, and for the first sample without exactly one image and an integer label.
    """
    folder, names = locate(path)
    for name in names:
        split_of(name)
    if isinstance(folder, Address) and out is None:
        raise BadInput(f"{path}: say where the index goes, with --out DIR")
    total, done = sum(sizes(folder, names)), 0
    parts: list[Part] = []
    pickled: set[str] = set()
    for part, passed_over in each(partial(_scan, folder), names, workers):
        parts.append(part)
        pickled |= passed_over
        done += part.shard.bytes
        progress(done, total)
    if pickled:
        warn(f"{path}: {pickled_members(pickled)}")
    index = Index.make(folder, parts)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    target = Path(folder if out is None else out) / NAME
    with suppress(BadInput):  # none before, or none that can be read
        before = Index.load(target)
        if len(before.key) > len(index.key):
            warn(f"{target}: had {len(before.key)} samples in {len(before.shards)} shards, and has those of {path} alone now")
    index.write(target)
    return index


def pickled_members(extensions: set[str]) -> str:
    return f"pickled members (.{', .'.join(sorted(extensions))}) are ignored: a shard is data, never code"


def _scan(folder: Path | Address, name: str) -> tuple[Part, set[str]]:
    return tars.scan(folder / name, name, split_of(name))
