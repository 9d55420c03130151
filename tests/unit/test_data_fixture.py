"""The photographs that stand in for ImageNet have its sizes and its odd files, and are the same every time."""

import io
import statistics

from PIL import Image

from harness.data import decode, fixture


def test_photographs_have_imagenets_sizes():
    found = list(fixture.samples(24))
    images = [Image.open(io.BytesIO(sample.content)) for sample in found]
    assert {image.format for image in images} == {"JPEG"} and {image.size for image in images} <= set(fixture.SHAPES)
    assert 85_000 < statistics.mean(len(sample.content) for sample in found) < 135_000
    assert len({sample.content for sample in found}) == 24 == len({sample.key for sample in found})
    assert sum(sample.split == "val" for sample in found) == 4
    assert list(fixture.samples(3)) == found[:3] != list(fixture.samples(3, seed=1))


def test_odd_files_are_mixed_in_on_demand_and_all_decode():
    plain, mixed = list(fixture.samples(14)), list(fixture.samples(14, odd=True))
    assert [i for i in range(14) if plain[i] != mixed[i]] == [3, 13]
    image = Image.open(io.BytesIO(plain[0].content))
    for name, encode in fixture.ODD.items():
        content = encode(image)
        assert decode.kind(content) == ("png" if "PNG" in name else "jpeg")
        assert decode.decode(content, 3).shape[0] == 3, name
