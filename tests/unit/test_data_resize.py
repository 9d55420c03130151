"""Resized pixels against PIL, random crops against torchvision's own, the central cut against torchvision's rounding."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image

from harness.data import order
from harness.data.resize import centre, resize, shorter_side
from harness.vision import torchvision

PHOTO = np.array(load_sample_image("china.jpg"))


def empty(height, width, channels=3, channels_last=True):
    out = torch.empty(1, channels, height, width, dtype=torch.uint8)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(427, 640), (300, 200), (224, 224), (100, 130), (31, 57)])
def test_within_a_level_of_pil(size, channels):
    pixels = np.ascontiguousarray(PHOTO[: size[0], : size[1], :channels])
    expected = np.asarray(Image.fromarray(pixels.squeeze()).resize((224, 224), Image.Resampling.BILINEAR), dtype=int)
    for channels_last in (True, False):
        out = empty(224, 224, channels, channels_last)
        resize(pixels, out)
        difference = np.abs(out[0].permute(1, 2, 0).numpy().astype(int) - expected.reshape(224, 224, channels))
        assert difference.mean() < 0.25 and difference.max() <= 1


def test_straight_into_one_place_of_a_batch_also_from_a_part_of_an_image():
    batch = torch.zeros(3, 64, 64, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    part = PHOTO[10:200, 20:333]
    assert not part.flags.c_contiguous
    resize(part, batch[1:2])
    expected = torch.nn.functional.interpolate(torch.tensor(part).permute(2, 0, 1)[None], (64, 64), mode="bilinear", antialias=True)
    assert torch.equal(batch[1:2], expected) and not batch[0].any() and not batch[2].any()
    resize(PHOTO[:64, :64], batch[:1])
    assert (batch[0].permute(1, 2, 0).numpy() == PHOTO[:64, :64]).all(), "of that size already: untouched"


def test_the_central_cut_is_torchvisions():
    torchvision()
    from torchvision.transforms import v2

    both = v2.Compose([v2.Resize(72), v2.CenterCrop(64)])
    for height, width in [(72, 72), (375, 500), (500, 375), (64, 100), (301, 77), (80, 81), (427, 640)]:
        pixels = (
            np.ascontiguousarray(PHOTO[:height, :width])
            if height <= 427
            else np.ascontiguousarray(PHOTO.transpose(1, 0, 2)[:height, :width])
        )
        expected = both(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        height, width = pixels.shape[:2]
        whole = empty(*shorter_side(height, width, 72))
        resize(pixels, whole)
        left, top, w, h = centre(*whole.shape[2:], 64)
        assert torch.equal(whole[0, :, top : top + h, left : left + w], expected)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 90), (100, 1000)])
def test_random_boxes_are_distributed_as_torchvisions(height, width):
    """Two samples of 4,000 boxes; a Kolmogorov-Smirnov test of each side, place and area. Fixed seeds: no chance in it."""
    torchvision()
    from torchvision.transforms import RandomResizedCrop

    scale, ratio, image = (0.08, 1.0), (3 / 4, 4 / 3), torch.empty(1, height, width)
    ours = np.array([order.crop(words, height, width, scale, ratio) for words in order.crop_words(5, 2, np.arange(4000))], dtype=float)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)], dtype=float)[
            :, [1, 0, 3, 2]
        ]
    for a, b in zip((*ours.T, ours[:, 2] * ours[:, 3]), (*theirs.T, theirs[:, 2] * theirs[:, 3]), strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.001
    assert abs(np.corrcoef(ours[:-1].T, ours[1:].T)[:4, 4:]).max() < 0.06, "neighbours share nothing"
