"""One bit an image: whether the first prediction of a finalist is right, over a whole split.

    runs/STUDY/trials/ID/correct/SPLIT.npz      SPLIT: val, or test

It is the answer of the last completed cycle, the one that is reported: the mean of the bits is exactly SPLIT/top1 at `step`. A plain
NumPy archive, without pickle: `bits`, uint8, eight images a byte, the first in the highest bit, in the order of the split's sample
numbers (harness.data.index) whatever the world size; `images`, their number; `step`, the 0-based optimizer step that the evaluation
follows. Trials with one data_sha256 (or test_sha256) in their journals' start lines have their images in one order. No torch here.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from harness.config import BadInput
from harness.data.index import DAMAGE
from harness.store import TrialFolder, write_atomically

BoolArray = npt.NDArray[np.bool_]


def write(folder: TrialFolder, split: str, step: int, right: BoolArray) -> None:
    """Keeps `right`, of a split (val, test), shape (images,), whole or not at all; in place of an earlier cycle's."""
    archive = io.BytesIO()
    np.savez(archive, bits=np.packbits(right), images=np.int64(len(right)), step=np.int64(step))
    write_atomically(folder.correct / f"{split}.npz", archive.getvalue())


def correct(folder: TrialFolder, split: str) -> BoolArray | None:
    """Which images of a split (val, test) the trial's answer has right, shape (images,); None for a trial that kept none.

    Raises BadInput for a file that is damaged or none of ours.
    """
    path = folder.correct / f"{split}.npz"
    try:
        with np.load(path, allow_pickle=False) as archive:
            bits, images = archive["bits"], int(archive["images"])
        if bits.dtype != np.uint8 or bits.shape != (-(-images // 8),):
            raise ValueError("bits")
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        raise BadInput(f"{path}: is damaged, or not of wrbench ({type(error).__name__}); remove it and run the trial again") from None
    return np.unpackbits(bits, count=images).astype(bool)
