"""Every decoder gives the same pixels, of the whole image and of any box; damage is an error and never a crash."""

import io
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_image

from harness.data import decode
from harness.data.decode import Box, Scratch
from launch import doctor, snapshot

PHOTO = load_sample_image("flower.jpg")
EXTENSION = pytest.mark.skipif(
    "libjpeg" not in decode.JPEG, reason="the extension is not built: no compiler or no headers of libjpeg-turbo"
)


@pytest.fixture(params=list(decode.JPEG))
def decoder(request, monkeypatch):
    monkeypatch.setattr(decode, "decoder", request.param)
    return request.param


def pillow(image, image_format="JPEG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def a_photo(rng, least=1, most=200):
    """A part of a photograph, of any size, odd ones included."""
    height, width = rng.integers(least, most, 2)
    top, left = rng.integers(0, PHOTO.shape[0] - height), rng.integers(0, PHOTO.shape[1] - width)
    return np.ascontiguousarray(PHOTO[top : top + height, left : left + width])


def a_box(rng, height, width):
    w, h = int(rng.integers(1, width + 1)), int(rng.integers(1, height + 1))
    return Box(int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h)


def encodings():
    for progressive in (False, True):
        for restart in ({}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}):
            options = {"progressive": progressive, "quality": 85, **restart}
            for name, subsampling in (("444", 0), ("422", 1), ("420", 2)):
                yield (
                    f"{name} progressive={progressive} {restart}",
                    lambda image, s=subsampling, o=options: pillow(image, subsampling=s, **o),
                )
            yield f"grey progressive={progressive} {restart}", lambda image, o=options: pillow(image[..., 1], **o)
            yield f"RGB progressive={progressive} {restart}", lambda image, o=options: pillow(image, keep_rgb=True, **o)
    for quality in (1, 30, 99, 100):  # few and short codes, and values of all sizes
        for optimize in (False, True):  # codes as usual, and the image's own, of up to 16 bits
            options = {"quality": quality, "optimize": optimize}
            yield f"{options}", lambda image, o=options: pillow(image, subsampling=2, **o)
    for name in ("440", "411"):
        yield name, lambda image, name=name: simplejpeg.encode_jpeg(image, 85, colorsubsampling=name)


@pytest.mark.parametrize(("name", "encode"), list(encodings()))
def test_a_box_is_bit_equal_to_the_same_part_of_the_whole(decoder, name, encode):
    """The control is simplejpeg's whole image."""
    rng, scratch = np.random.default_rng(1), Scratch()
    for _ in range(12):
        content = encode(a_photo(rng))
        for channels in (1, 3):
            full = simplejpeg.decode_jpeg(content, colorspace="GRAY" if channels == 1 else "RGB")
            height, width = full.shape[:2]
            assert (decode.decode(content, channels) == full.reshape(height, width, channels).transpose(2, 0, 1)).all()
            for box in [a_box(rng, height, width) for _ in range(4)]:
                sizes = []
                pixels = decode.crop(content, channels, lambda *size, box=box, sizes=sizes: sizes.append(size) or box, scratch)
                assert sizes == [(height, width)]
                assert (pixels == full.reshape(height, width, channels)[box.top :, box.left :][: box.height, : box.width]).all(), (
                    name,
                    box,
                )


def adobe(image, transform):
    """Four colours as Adobe writes them, inverted: as they are (transform 0), or the first three as YCbCr (2)."""
    c, m, y, k = image.convert("CMYK").split()
    if transform == 2:
        c, m, y = (band.point(lambda v: 255 - v) for band in Image.merge("RGB", (c, m, y)).convert("YCbCr").split())
    content = bytearray(pillow(Image.merge("CMYK", (c, m, y, k)), quality=95))  # PIL inverts all four, and writes the marker
    content[content.index(b"Adobe") + 11] = transform
    return bytes(content)


def test_odd_files_are_read_alike(decoder):
    rgb = np.ascontiguousarray(PHOTO[100:190, 200:321])
    image = Image.fromarray(rgb)
    wide = rgb[..., 0].astype(np.uint16) << 8 | 77
    box = Box(11, 7, 60, 50)
    alpha = image.convert("RGBA")
    alpha.putalpha(99)
    expected = {
        "png": (pillow(rgb, "PNG"), rgb),
        "16-bit grey png": (pillow(wide, "PNG"), np.repeat(rgb[..., :1], 3, axis=2)),
        "palette png": (pillow(image.quantize(64), "PNG"), np.asarray(image.quantize(64).convert("RGB"))),
        "transparent png": (pillow(alpha, "PNG"), rgb),
        "black and white png": (pillow(image.convert("1"), "PNG"), np.asarray(image.convert("1").convert("RGB"))),
        "cmyk": (adobe(image, 0), np.asarray(Image.open(io.BytesIO(adobe(image, 0))).convert("RGB"))),
        "ycck": (adobe(image, 2), np.asarray(Image.open(io.BytesIO(adobe(image, 2))).convert("RGB"))),
    }
    for name, (content, pixels) in expected.items():
        assert (decode.decode(content, 3) == pixels.transpose(2, 0, 1)).all(), name
        part = decode.crop(content, 3, lambda *_: box, Scratch())
        assert (part == pixels[7:57, 11:71]).all(), name
        grey = decode.decode(content, 1)
        assert grey.shape == (1, 90, 121) and abs(grey.mean() - (pixels @ [0.299, 0.587, 0.114]).mean()) < 2, name
    for transform in (0, 2):
        assert np.abs(decode.decode(adobe(image, transform), 3).transpose(1, 2, 0).astype(int) - rgb).mean() < 6, "not inverted"


def test_a_jpeg_is_known_by_its_bytes_and_not_by_its_name():
    assert decode.kind(pillow(PHOTO)) == "jpeg" and decode.kind(pillow(PHOTO, "PNG")) == "png" and decode.kind(b"GIF89a") == "unknown"


def test_what_cannot_be_decoded_is_one_line(decoder):
    content, png = pillow(PHOTO[:64, :64]), pillow(PHOTO[:64, :64], "PNG")
    for bad in (
        b"",
        b"GIF89a",
        content[:2],
        content[:20],
        content[:300],
        content[: len(content) // 2],
        content[:-200],
        png[:20],
        png[:100],
    ):
        with pytest.raises(ValueError) as caught:
            decode.decode(bad, 3)
        assert str(caught.value) and "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(decoder):
    content = bytearray(pillow(PHOTO[:16, :16]))
    size = content.index(b"\xff\xc0") + 5
    content[size : size + 4] = b"\xff\xdc\xff\xdc"
    with pytest.raises(ValueError, match="pixels"):
        decode.decode(bytes(content), 3)


@pytest.mark.skipif(decode.decoder == "PIL", reason="PIL does not tell of libjpeg's warnings")
def test_damage_inside_the_box_is_never_silent():
    """A hole in the entropy-coded data: every decoder but PIL, which does not tell, refuses it."""
    content = bytearray(pillow(PHOTO[:128, :128], quality=90))
    middle = len(content) // 2
    content[middle : middle + 2] = b"\xff\xd9"
    for name in set(decode.JPEG) - {"PIL"}:
        with pytest.raises(ValueError, match=r"(?i)corrupt|premature"):
            decode.JPEG[name].crop(bytes(content), 3, (128, 128), decode.whole(128, 128), Scratch())


@EXTENSION
def test_of_damaged_data_the_extension_decodes_what_libjpeg_decodes():
    """simplejpeg, libjpeg-turbo as it is, is the control: where both give an image it is the same one.

    libjpeg tells of a code that does not exist only where it is slow, and does not notice a few bytes before the end that it has read
    ahead: so now and then only one of them refuses.
    """
    rng, outcomes = np.random.default_rng(11), Counter()
    contents = [pillow(a_photo(rng), quality=int(rng.integers(20, 99)), optimize=bool(i % 2), subsampling=i % 3) for i in range(12)]
    for _ in range(1500):
        content = bytearray(contents[rng.integers(len(contents))])
        data = content.index(b"\xff\xda") + 14
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(data, len(content) - 2)] = rng.integers(255)  # no 255: libjpeg leaves traces of what it tries after two
        found = []
        for name in ("libjpeg", "simplejpeg"):
            height, width, _ = decode.JPEG[name].header(bytes(content))
            try:
                found.append(decode.JPEG[name].crop(bytes(content), 3, (height, width), decode.whole(height, width), Scratch()).copy())
            except ValueError:
                found.append(None)
        ours, control = found
        outcomes[ours is not None, control is not None] += 1
        if ours is not None and control is not None:
            assert (ours == control).all()
    assert outcomes[True, True] > 100 and outcomes[False, False] > 500, outcomes
    assert outcomes[True, False] + outcomes[False, True] < 100, outcomes


@EXTENSION
def test_the_extension_refuses_what_a_caller_gets_wrong():
    content = pillow(PHOTO[:64, :80])
    pixels = np.empty((64, 80, 3), np.uint8)
    for box in ((0, 0, 81, 64), (1, 0, 80, 64), (0, 1, 80, 64), (-1, 0, 80, 64), (0, 0, 0, 64), (2**31 - 1, 0, 80, 64)):
        with pytest.raises(ValueError, match="box"):
            decode._jpeg.decode(content, np.empty(max(0, box[2] * box[3] * 3), np.uint8), 3, box)
    with pytest.raises(ValueError, match="the buffer has 15360 bytes, the box 15120"):
        decode._jpeg.decode(content, pixels, 3, (0, 0, 80, 63))
    pixels.setflags(write=False)
    with pytest.raises(TypeError, match="read-write"):
        decode._jpeg.decode(content, pixels, 3, (0, 0, 80, 64))


FUZZ = """
import sys
import numpy as np
from harness.data import decode
content, rng, refused = sys.stdin.buffer.read(), np.random.default_rng(0), 0
for name in decode.JPEG:
    decode.decoder = name
    for place in rng.integers(2, len(content), 1500):
        damaged = bytearray(content)
        damaged[place] ^= rng.integers(1, 256)
        if rng.random() < 0.2:
            del damaged[rng.integers(2, len(content)) :]
        choose = lambda h, w: decode.Box(w // 3, h // 3, max(1, w // 2), max(1, h // 2))
        try:
            decode.crop(bytes(damaged), 3, choose, decode.Scratch())
        except ValueError:
            refused += 1
print(refused)
"""


@pytest.mark.parametrize("options", [{"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 2, "subsampling": 1}])
def test_no_damage_crashes_or_prints(options):
    """Single wrong bytes, some with the end cut off as well, in a process that a crash may take."""
    content = pillow(PHOTO[100:148, 200:264], quality=75, **options)
    done = subprocess.run([sys.executable, "-c", FUZZ], input=content, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert int(done.stdout) > 300


def test_without_the_extension_or_with_a_foreign_one_another_decoder_takes_over(tmp_path):
    """A copy of the package, as a snapshot is; the extension absent, then a file that this machine cannot load."""
    package = tmp_path / "harness" / "data"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "decode.py").write_bytes(Path(decode.__file__).read_bytes())
    says = [sys.executable, "-c", "from harness.data import decode; print(decode.__file__, *decode.JPEG)"]

    def found():
        return subprocess.run(says, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}).stdout.split()

    assert found() == [str(package / "decode.py"), "simplejpeg", "PIL"]
    extension = package / f"_jpeg{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension.write_bytes(b"\x7fELF of another machine")
    assert found()[1:] == ["simplejpeg", "PIL"]
    if decode._jpeg is not None:
        extension.write_bytes(Path(decode._jpeg.__file__).read_bytes())
        assert found()[1:] == ["libjpeg", "simplejpeg", "PIL"]
    (tmp_path / "simplejpeg.py").write_text("raise ImportError")
    extension.unlink()
    assert found()[1:] == ["PIL"]


def test_a_snapshot_of_the_code_carries_the_extension(tmp_path):
    """Jobs run from a snapshot, and decode as the checkout does."""
    code = snapshot.take(tmp_path)
    says = "from harness.data import decode; print(decode.__file__, decode.decoder, getattr(decode._jpeg, '__file__', ''))"
    environment = {**os.environ, **snapshot.environment(code)}
    done = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, env=environment, cwd=tmp_path)
    package = code / "harness" / "data"
    extension = [str(package / Path(decode._jpeg.__file__).name)] if decode._jpeg else []
    assert done.stdout.split() == [str(package / "decode.py"), decode.decoder, *extension]


def test_the_doctor_names_the_decoder_in_use(decoder):
    assert f"{decoder} is in use" in doctor._decoding().text
