"""The networks: published sizes, shapes, and what a reduced one does in training."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from harness import config, models, networks
from harness.backends.fsdp import units
from harness.config import BadInput
from harness.dist import Ranks
from harness.draws import ShakeShake, StochasticDepth
from harness.evaluate import evaluate
from harness.norm import BatchNorm
from launch import scaling
from tests.trials import DATA, trial

PUBLISHED = {
    ("resnet50_zero_init", 1000): 25_557_032,  # torchvision's table of weights
    ("resnet18", 1000): 11_689_512,
    ("regnet_y_1_6gf", 1000): 11_202_430,
    ("convnext_tiny", 1000): 28_589_128,
    ("vit_s16", 1000): 22_050_664,  # timm's vit_small_patch16_224
    ("wrn_28_10", 10): 36_479_194,  # arXiv 1605.07146, table 4: 36.5M
    ("shake_26_2x64d", 10): 11_653_978,  # the paper: 11.6M
    ("shake_26_2x96d", 10): 26_192_922,  # arXiv 1705.07485, table 2: 26.2M
}


def build(name: str, classes: int = 10, size: int = 32) -> nn.Module:
    data = config.Data(
        **(DATA | {"channels": 3, "mean": [0.5] * 3, "std": [0.3] * 3, "num_classes": classes, "image_size": size, "holdout_per_class": 0})
    )
    return models.BUILDERS[name](data, BatchNorm)


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_as_many_parameters_as_published(name: str, classes: int) -> None:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # whose depths are computed by tensors
        net = build(name, classes, 224 if classes == 1000 else 32)
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name, classes]


@pytest.mark.parametrize("path", sorted(Path("configs/workload").glob("[ci]*.yaml")), ids=lambda path: path.stem)
def test_a_workload_states_its_parameters(path: Path) -> None:
    workload = config.WorkloadFile.model_validate(yaml.safe_load(path.read_text()))
    with torch.device("cpu" if workload.model.name.startswith("regnet") else "meta"):
        net = models.BUILDERS[workload.model.name](workload.data, BatchNorm)
    assert workload.reference is not None
    assert sum(p.numel() for p in net.parameters()) == workload.reference.parameters


def test_depths() -> None:
    """Layers from end to end: of 26, two in each of 12 blocks, the first and the last; of 28, three shortcuts are counted in."""
    with torch.device("meta"):
        shake, wide = build("shake_26_2x64d"), build("wrn_28_10")
    assert 2 * sum(isinstance(m, ShakeShake) for m in shake.modules()) + 2 == 26
    assert sum(isinstance(m, nn.Conv2d) for m in wide.modules()) == 28


def test_a_shortcut_takes_pixels_and_their_neighbours() -> None:
    """Every second pixel, and every second one of the picture moved by one to the right and down, zeros at the border."""
    short = networks._Shortcut(1, 2, 2, lambda _: nn.Identity())
    nn.init.ones_(short.here.weight)
    nn.init.ones_(short.beside.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = short(x)
    assert out[0, 0].tolist() == [[0, 2], [8, 10]]
    assert out[0, 1].tolist() == [[0, 0], [0, 5]]


@pytest.mark.parametrize(("name", "channels"), [("shake_26_2x64d", (64, 128, 256)), ("wrn_28_10", (160, 320, 640))])
def test_stages_halve_the_picture(name: str, channels: tuple[int, ...]) -> None:
    seen: list[tuple[int, ...]] = []
    with torch.device("meta"):
        net = build(name)
        for block in net.children():
            if type(block).__name__ in ("_ShakeBlock", "_WideBlock"):
                block.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
        net(torch.rand(2, 3, 32, 32))
    assert seen == [(c, size, size) for c, size in zip(channels, (32, 16, 8), strict=True) for _ in range(4)]


def test_a_wide_block_is_its_formula() -> None:
    """The shortcut of a block that changes shape starts behind the first norm and ReLU."""
    block = networks._WideBlock(2, 3, 2, nn.BatchNorm2d).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    active = block.norm1(x).clamp(min=0)
    expected = block.conv2(block.norm2(block.conv1(active)).clamp(min=0)) + block.skip(active)
    torch.testing.assert_close(block(x), expected)
    assert networks._WideBlock(2, 2, 1, nn.BatchNorm2d).skip is None


def test_a_shake_block_is_its_formula() -> None:
    """Two branches of ReLU-conv-norm twice; in evaluation their mean, beside the shortcut."""
    block = networks._ShakeBlock(2, 4, 2, nn.BatchNorm2d).double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def branch(layers: nn.Sequential) -> torch.Tensor:
        _, conv1, norm1, _, conv2, norm2 = layers
        return norm2(conv2(norm1(conv1(x.clamp(min=0))).clamp(min=0)))

    torch.testing.assert_close(block(x), (branch(block.branch1) + branch(block.branch2)) / 2 + block.skip(x))


def test_zero_init_starts_as_the_identity() -> None:
    blocks = [m for m in build("resnet50_zero_init").modules() if type(m).__name__ == "Bottleneck"]
    assert len(blocks) == 16
    assert not any(m.bn3.weight.any() for m in blocks)
    assert all(m.bn3.weight.all() for m in build("resnet50").modules() if type(m).__name__ == "Bottleneck")


def test_convnext_draws_by_the_step() -> None:
    """No layer of torchvision's own is left that draws from a process's generator."""
    net = build("convnext_tiny")
    rates = [m.p for m in net.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.1 * i / 17 for i in range(18)])
    assert not [m for m in net.modules() if type(m).__name__ == "StochasticDepth" and not isinstance(m, StochasticDepth)]


@pytest.mark.parametrize(
    "name", ["mnist5k_cnn", "mnist5k_mlp", "resnet18", "regnet_y_1_6gf", "convnext_tiny", "vit_s16", "wrn_28_10", "shake_26_2x64d"]
)
def test_nothing_is_drawn_behind_our_back(name: str) -> None:
    """Two passes in training give the same, whatever torch's generator holds."""
    if name.startswith("mnist5k"):
        net = models.build(trial(model=name).workload, 0).net
        x = torch.rand(2, 1, 28, 28)
    else:
        size = 8 if name.startswith(("wrn", "shake")) else 32
        net, x = build(name), torch.rand(2, 3, size, size)
    net.train()
    torch.manual_seed(1)
    first = net(x)
    torch.manual_seed(2)
    assert torch.equal(net(x), first)


@pytest.mark.parametrize("name", models.BUILDERS)
def test_which_networks_take_grey_images(name: str) -> None:
    data = trial().workload.data.model_copy(update={"image_size": 32})
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        net = models.BUILDERS[name](data, BatchNorm)
    grey = torch.zeros(2, 1, 32, 32, device="meta")
    if name in config.OF_COLOUR:
        with pytest.raises(RuntimeError, match="channel"):
            net.to("meta").eval()(grey)
    else:
        assert net.to("meta").eval()(grey).shape == (2, 10)


@pytest.mark.parametrize("name", models.BUILDERS)
def test_which_networks_take_images_of_any_size(name: str) -> None:
    """Those that a schedule of resolutions, or evaluation at another size, is refused for cannot; all others can."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        net = build(name)
    net.to("meta").eval()
    assert net(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)
    if name in config.OF_ONE_SIZE:
        with pytest.raises((RuntimeError, AssertionError)):
            net(torch.zeros(2, 3, 48, 48, device="meta"))
    else:
        for size in (48, config.LEAST_SIZE.get(name, 8)):
            assert net(torch.zeros(2, 3, size, size, device="meta")).shape == (2, 10)


def test_patches_must_fit() -> None:
    with pytest.raises(BadInput, match=r"test: workload.data.image_size: 28 is no multiple of vit_s16's patches of 16 pixels; e.g. 32"):
        trial(model="vit_s16")


def test_evaluation_goes_past_compilation() -> None:
    """Batches of any size would each be compiled anew."""

    def refuses(*_: object) -> None:
        raise AssertionError("compiled")

    model = models.build(trial(model="mnist5k_mlp").workload, 0).eval()
    model.compile(backend=refuses)
    batch = torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    assert len(evaluate(model, [batch], 3, Ranks(0, 0, 1, torch.device("cpu"))).correct) == 3


LARGEST = {"mnist5k_cnn": 0.62, "mnist5k_cnn_bn": 0.62, "mnist5k_mlp": 0.99, "resnet18": 0.41}
"""share of the parameters in the largest unit of FSDP's, one layer or block; of all other networks at most scaling.UNIT"""


@pytest.mark.parametrize("name", models.BUILDERS)
def test_fsdp_gathers_a_network_block_by_block(name: str) -> None:
    """Every parameter lies in one unit, or directly in a part that is none, as a transformer's positions do: those are the root's."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        net = build(name, 1000, 224) if not name.startswith("mnist") else models.BUILDERS[name](config.Data(**DATA), BatchNorm)
    found = list(units(net))
    within = Counter(p for unit in found for p in unit.parameters())
    whole, sizes = sum(p.numel() for p in net.parameters()), [sum(p.numel() for p in unit.parameters()) for unit in found]
    assert set(within.values()) == {1}
    assert min(sizes) > 0
    assert sum(sizes) >= 0.99 * whole
    assert max(sizes) <= LARGEST.get(name, scaling.UNIT) * whole
    assert len(found) <= 30, "a gather each"
