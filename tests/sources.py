"""Small sources in the exact layout of the originals, of real photographs and digits."""

from __future__ import annotations

import io
import pickle
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SYNSETS = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n03255030"}
"""by ILSVRC2012 id: in no order of the synsets, as in the original"""
SORTED = sorted(SYNSETS.values())


@lru_cache(maxsize=1)
def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]


def cut(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A piece of a photograph, another one for every number."""
    image = photographs()[number % 2]
    top, left = number * 37 % (image.shape[0] - height), number * 91 % (image.shape[1] - width)
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def encoded(number: int, image_format: str = "JPEG", mode: str = "RGB", width: int = 64) -> bytes:
    out = io.BytesIO()
    Image.fromarray(cut(number, width)).convert(mode).save(out, image_format)
    return out.getvalue()


def tar(files: dict[str, bytes], tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return out.getvalue()


def ilsvrc2012(folder: Path, per_class: int = 6, val: int = 8) -> dict[str, tuple[int, bytes]]:
    """The three archives; label (of the sorted synsets) and bytes of every image by its name without the ending."""
    folder.mkdir(parents=True)
    images: dict[str, tuple[int, bytes]] = {}
    classes = {}
    for place, synset in enumerate(SYNSETS.values()):
        inner = {f"{synset}_{i * 31}.JPEG": encoded(100 * place + i, "PNG" if i == 2 else "JPEG") for i in range(per_class)}
        images |= {name.removesuffix(".JPEG"): (SORTED.index(synset), content) for name, content in inner.items()}
        classes[f"{synset}.tar"] = tar(inner)
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    truth = [1 + i * 3 % 4 for i in range(val)]
    validation = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": encoded(1000 + i) for i in range(val)}
    images |= {
        name.removesuffix(".JPEG"): (SORTED.index(SYNSETS[number]), content)
        for (name, content), number in zip(validation.items(), truth, strict=True)
    }
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))
    devkit = {
        "readme.txt": b"?",
        "data/meta.mat": meta(),
        "data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)).encode(),
    }
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, content in devkit.items():
            header = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/{name}")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return images


def meta() -> bytes:
    """meta.mat: the leaves first, then inner nodes of WordNet, in the fields of the original."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")
    rows = [(number, synset, "a thing", "what it is", 0, [], 0, 6) for number, synset in SYNSETS.items()]
    rows.append((5, "n00001740", "entity", "all there is", 4, [1, 2, 3, 4], 1, 0))
    synsets = np.zeros((len(rows), 1), dtype=[(field, object) for field in fields])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    out = io.BytesIO()
    savemat(out, {"synsets": synsets})
    return out.getvalue()


def folder(root: Path, flat: bool = False, val: int = 6) -> dict[str, tuple[int, bytes]]:
    """train/CLASS/*, and val/CLASS/* or val/*; label and bytes by key."""
    images = {}
    for place, name in enumerate(("cat", "dog")):
        for i in range(5):
            content = encoded(10 * place + i, "PNG" if i == 0 else "JPEG")
            path = root / "train" / name / ("deep" if i == 4 else "") / f"{i}.{('JPEG', 'jpg', 'jpeg', 'JPG')[i % 4]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            images[path.relative_to(root).with_suffix("").as_posix()] = (place, content)
        (root / "train" / name / ".DS_Store").write_bytes(b"?")
        (root / "train" / name / "readme.txt").write_text("?")
    for i in range(val):
        content = encoded(50 + i)
        path = root / "val" / ("" if flat else ("cat", "dog")[i % 2]) / f"v{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        images[path.relative_to(root).with_suffix("").as_posix()] = (i % 2, content)
    return images


def imagenet(folder: Path, pixels: int, rows: int = 4) -> dict[str, tuple[int, np.ndarray]]:
    """The eleven pickles; label (of the sorted synsets) and pixels (height, width, 3) by key."""
    folder.mkdir(parents=True)
    lines = [f"{synset} {number} a_name" for number, synset in SYNSETS.items()]
    (folder / "map_clsloc.txt").write_text("\n".join(lines) + "\n")
    images = {}
    for place, name in enumerate([*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]):
        cuts = [cut(rows * place + i, pixels, pixels) for i in range(rows)]
        labels = [1 + (place + i) % 4 for i in range(rows)]
        data = np.stack([image.transpose(2, 0, 1).ravel() for image in cuts])
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=3))
        images |= {f"{name}-{i:06d}": (SORTED.index(SYNSETS[labels[i]]), cuts[i]) for i in range(rows)}
    return images


def cifar10(folder: Path, rows: int = 20) -> dict[str, tuple[int, np.ndarray]]:
    """The pickles as Python 2 wrote them: all text is bytes, arrays of protocol 2."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(_python2({"label_names": names, "num_vis": 3072}))
    images = {}
    for place, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        cuts = [cut(rows * place + i, 32, 32) for i in range(rows)]
        labels = [(place + i) % 10 for i in range(rows)]
        data = np.stack([image.transpose(2, 0, 1).ravel() for image in cuts])
        (folder / name).write_bytes(_python2({"batch_label": name, "data": data, "labels": labels}))
        images |= {f"{name}-{i:06d}": (labels[i], cuts[i]) for i in range(rows)}
    return images


def _python2(value: dict[str, object]) -> bytes:
    """Protocol 2 with str for text and bytes for data, by its opcodes."""
    out = io.BytesIO()

    def text(word: bytes) -> bytes:  # BINSTRING
        return b"T" + len(word).to_bytes(4, "little") + word

    def put(item: object) -> bytes:
        if isinstance(item, str):
            return text(item.encode())
        if isinstance(item, int):
            return b"J" + item.to_bytes(4, "little", signed=True)
        if isinstance(item, list):
            return b"](" + b"".join(map(put, item)) + b"e"
        assert isinstance(item, np.ndarray)
        dtype = (
            b"cnumpy\ndtype\n(" + text(b"u1") + put(0) + put(1) + b"tR(" + put(3) + text(b"|") + b"NNN" + put(-1) + put(-1) + put(0) + b"tb"
        )
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + put(0) + b"t" + text(b"b") + b"tR"
        shape = b"(" + b"".join(map(put, item.shape)) + b"t"
        return array + b"(" + put(1) + shape + dtype + b"\x89" + text(item.tobytes()) + b"tb"

    out.write(b"\x80\x02}(" + b"".join(text(key.encode()) + put(item) for key, item in value.items()) + b"u.")
    return out.getvalue()
