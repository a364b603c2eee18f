"""The models of the papers have the parameter counts that the papers print, and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fxrpg.networks import CifarBlock, alexnet_cifar, convmixer, convnet, lenet, resnet18, resnet20, resnet56


def on_meta(architecture: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return architecture()


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def weights(model: nn.Module, *kinds: type[nn.Module]) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, kinds)]


def statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of the batch norms."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


@pytest.mark.parametrize(
    ("architecture", "total", "channels", "convolutions", "classifier"),
    [
        pytest.param(resnet20, 269_722, 688, 267_696, 650, id="T7"),
        pytest.param(lambda: resnet20(100), 275_572, 688, 267_696, 6_500, id="T7-100"),
        pytest.param(resnet56, 853_018, 2_032, 848_304, 650, id="T8"),
        pytest.param(lambda: resnet56(100), 858_868, 2_032, 848_304, 6_500, id="T8-100"),
        pytest.param(lambda: resnet18(100), 11_227_812, 4_800, 9_408 + 11_157_504, 51_300, id="T9-resnet18"),
    ],
)
def test_counts_of_resnets(architecture, total, channels, convolutions, classifier):
    model = on_meta(architecture)
    assert count(model.parameters()) == total == convolutions + 2 * channels + classifier
    assert count(weights(model, nn.Conv2d)) == convolutions
    assert count(weights(model, nn.BatchNorm2d)) == channels
    assert count(statistics(model)) == 2 * channels
    assert count(model.fc.parameters()) == classifier


@pytest.mark.parametrize(
    ("architecture", "total"),
    [
        pytest.param(alexnet_cifar, 1_756_426, id="alexnet"),
        pytest.param(lenet, 62_006, id="lenet"),
        pytest.param(convnet, 504_420, id="3-128-convnet"),
        pytest.param(lambda: convnet(depth=4, classes=200, side=64), 857_160, id="4-128-convnet"),
    ],
)
def test_t9_counts_of_small_models(architecture, total):
    assert count(on_meta(architecture).parameters()) == total


@pytest.mark.parametrize(
    ("dim", "depth", "masked", "largest"),
    [(256, 6, 437_248, 65_536), (256, 8, 581_120, 65_536), (512, 6, 1_660_928, 262_144), (512, 8, 2_210_816, 262_144)],
)
def test_t11_masked_weights_of_convmixer(dim, depth, masked, largest):
    model = on_meta(lambda: convmixer(dim, depth))
    layers = weights(model, nn.Conv2d, nn.Linear)
    norms = 2 * dim * (2 * depth + 1)
    assert count(layers) == masked
    assert max(layer.numel() for layer in layers) == largest
    assert count(model.parameters()) == masked + norms


def test_biases_of_convmixer_are_one_per_output():
    with_bias, without = (on_meta(lambda b=b: convmixer(256, 6, bias=b)) for b in (True, False))
    assert count(with_bias.parameters()) - count(without.parameters()) == 256 * (2 * 6 + 1) + 10


@pytest.mark.parametrize(
    ("architecture", "side", "classes"),
    [
        pytest.param(resnet20, 32, 10, id="resnet20"),
        pytest.param(lambda: resnet56(100), 16, 100, id="resnet56"),
        pytest.param(lenet, 32, 10, id="lenet"),
        pytest.param(alexnet_cifar, 32, 10, id="alexnet"),
        pytest.param(convnet, 32, 100, id="3-128-convnet"),
        pytest.param(lambda: convnet(depth=4, classes=200, side=64), 64, 200, id="4-128-convnet"),
        pytest.param(lambda: convmixer(256, 6), 8, 10, id="convmixer"),
    ],
)
def test_models_run_and_trace(architecture, side, classes):
    torch.manual_seed(0)
    model = architecture().eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        out = model(x)
        traced = torch.fx.symbolic_trace(model)(x)
    assert out.shape == (2, classes)
    assert out.isfinite().all()
    assert torch.equal(traced, out)


def test_shortcut_keeps_every_second_pixel_in_the_middle_channels():
    shortcut = CifarBlock(4, 8).shortcut
    x = torch.randn(2, 4, 6, 6)
    out = shortcut(x)
    assert list(shortcut.parameters()) == []
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()
