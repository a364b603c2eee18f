"""Numbers that the ring (arXiv:2107.07110) must reproduce without training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxrpg
from fxrpg import Ring
from fxrpg.assemble import plan_of
from fxrpg.networks import resnet18, resnet34

CPU = torch.device("cpu")
STEM = 9_408


def resnet50() -> nn.Module:
    """The layers of torchvision's ResNet-50 in their order, without a forward: enough to count."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)]
    width_in = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            shapes = [(width_in, width, 1), (width, width, 3), (width, 4 * width, 1)]
            shapes += [(width_in, 4 * width, 1)] if block == 0 else []
            for before, after, kernel in shapes:
                layers += [nn.Conv2d(before, after, kernel, bias=False), nn.BatchNorm2d(after)]
            width_in = 4 * width
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


@functools.cache
def on_meta(architecture: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return architecture()


def usage(model: nn.Module) -> Tensor:
    """How many weights of a transformed model read each cell of its ring."""
    plan = plan_of(model)
    used = torch.zeros(plan.size, dtype=torch.int64)
    for view in plan.views.values():
        assert view.generator.block == 1
        used += torch.bincount(view.generator.block_cells(view, plan.size, CPU), minlength=plan.size)
    return used


@pytest.mark.parametrize(
    ("architecture", "total", "generated", "tensors", "norms", "classifier"),
    [
        pytest.param(resnet18, 11_689_512, 11_157_504, 19, 9_600, 513_000, id="T1"),
        pytest.param(resnet34, 21_797_672, 21_258_240, 35, 17_024, 513_000, id="T2"),
        pytest.param(resnet50, 25_557_032, 23_454_912 - STEM, 52, 53_120, 2_049_000, id="T2-bottlenecks"),
    ],
)
def test_the_default_plan_takes_the_convolutions_of_the_blocks(
    architecture, total, generated, tensors, norms, classifier
):
    model = on_meta(architecture)
    small = fxrpg.transform(model, dof=1_000)
    assert sum(p.numel() for p in model.parameters()) == total == STEM + generated + norms + classifier
    assert len(plan_of(small).views) == tensors
    assert fxrpg.ledger(small).generated == generated
    assert fxrpg.ledger(small).dense == total - generated


@pytest.mark.parametrize(
    ("architecture", "size", "layout", "trainable", "used"),
    [
        pytest.param(resnet18, 2_359_296, "arc", 2_891_304, {4: 638_976, 5: 1_720_320}, id="T3"),
        pytest.param(resnet34, 11_160_576, "arc", 11_700_008, {1: 1_062_912, 2: 10_097_664}, id="T4"),
        pytest.param(resnet18, 36_864, "arc", 568_872, {302: 12_288, 303: 24_576}, id="T5"),
        pytest.param(resnet18, 36_864, "shuffle", 568_872, {302: 12_288, 303: 24_576}, id="T5-shuffle"),
    ],
)
def test_cells_are_used_evenly(architecture, size, layout, trainable, used):
    small = fxrpg.transform(on_meta(architecture), dof=size, method=Ring(block=1, layout=layout))
    assert fxrpg.ledger(small).trainable == trainable
    values, cells = usage(small).unique(return_counts=True)
    assert dict(zip(values.tolist(), cells.tolist(), strict=True)) == used


def test_t3_weights_per_free_number():
    small = fxrpg.transform(on_meta(resnet18), dof=2_359_296, method=Ring(block=1))
    assert fxrpg.ledger(small).ratio == pytest.approx(4.7291, abs=1e-4)


@pytest.mark.parametrize("method", [Ring(), Ring(block=1)], ids=["blocks", "elements"])
def test_t6_generated_weights_start_with_kaimings_deviation(method):
    torch.manual_seed(0)
    small = fxrpg.transform(resnet18(), dof=2_359_296, method=method)
    for block, planned in [(small.layer1[0], 0.0589), (small.layer4[1], 0.0208)]:
        found = block.conv1.weight.std().item()
        assert found == pytest.approx(math.sqrt(2 / (block.conv1.out_channels * 9)), rel=0.01)
        assert found == pytest.approx(planned, rel=0.01)
