"""Bits of images: written whole, read without torch or pickle, refused when they are not ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.config import BadInput
from harness.correct import correct, write
from harness.store import TrialFolder


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 1000])
def test_what_is_read_is_what_was_written(tmp_path: Path, images: int) -> None:
    folder, right = TrialFolder(tmp_path), np.random.default_rng(images).random(images) < 0.7
    assert correct(folder, "val") is None
    write(folder, "val", 3, ~right)
    write(folder, "val", 9, right)
    found = correct(folder, "val")
    assert found is not None and found.dtype == bool and found.shape == (images,) and (found == right).all()
    assert correct(folder, "test") is None
    with np.load(folder.correct / "val.npz", allow_pickle=False) as archive:
        assert (int(archive["step"]), int(archive["images"]), archive["bits"].nbytes) == (9, images, -(-images // 8))
    assert [path.name for path in folder.correct.iterdir()] == ["val.npz"]


def test_the_first_image_is_the_highest_bit(tmp_path: Path) -> None:
    write(TrialFolder(tmp_path), "val", 0, np.array([True, False, False, True]))
    with np.load(tmp_path / "correct/val.npz") as archive:
        assert archive["bits"].tolist() == [0b10010000]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path)
    write(folder, "val", 9, np.ones(99, dtype=bool))
    path = folder.correct / "val.npz"
    whole = path.read_bytes()
    np.savez(without := tmp_path / "without.npz", images=99)
    np.savez(short := tmp_path / "short.npz", images=99, bits=np.zeros(3, dtype=np.uint8))
    np.savez(pickled := tmp_path / "pickled.npz", images=99, bits=np.array([{}], dtype=object))
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1  # one bit, of the directory's first member
    for content in (b"", b"PK", encrypted, whole[: len(whole) // 2], *(p.read_bytes() for p in (without, short, pickled))):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"correct/val\.npz: is damaged, or not of wrbench \(\w+\); remove it") as error:
            correct(folder, "val")
        assert "\n" not in str(error.value)


def test_readers_need_no_torch() -> None:
    code = "import harness.correct, sys; sys.exit(bool({'torch', 'mlflow', 'deepspeed', 'pandas'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
