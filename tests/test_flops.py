"""torch.utils.flop_counter counts a transformed model as the dense one that it stands for.

Two exceptions, in which torch's own count of the dense layer is off: of grouped convolutions it counts the gradient of the
weight once for each group too often, and bilinear layers not at all.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.fx as fx
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxrpg
from fxrpg.networks import resnet18
from fxrpg.staging import DENSE_OPS

EVERYTHING = [fxrpg.Rule("*", "generate")]


def counted(function):
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def forward(model, inputs):
    with torch.no_grad():
        return counted(lambda: model(*inputs))


def both(model, inputs):
    return counted(lambda: model(*inputs).sum().backward())


def floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "linear": (lambda: nn.Linear(5, 7), floats(3, 5)),
    "linear, one row": (lambda: nn.Linear(5, 7), floats(5)),
    "linear, many axes": (lambda: nn.Linear(5, 7, bias=False), floats(2, 3, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(5, 6, 3), floats(2, 5, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 6, 3), floats(2, 5, 9, 8)),
    "conv2d, one image": (lambda: nn.Conv2d(5, 6, 3), floats(5, 9, 8)),
    "conv2d, strides": (lambda: nn.Conv2d(5, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)), floats(2, 5, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(5, 6, (3, 5), padding="same"), floats(2, 5, 8, 8)),
    "conv2d, groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), floats(2, 6, 7, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5), floats(2, 5, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2), floats(2, 3, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(5, 6, 3, stride=2), floats(2, 5, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(5, 6, 3, stride=2, output_padding=1), floats(2, 5, 9, 8)),
    "transposed 2d, one image": (lambda: nn.ConvTranspose2d(5, 6, 3, stride=2), floats(5, 9, 8)),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2), floats(2, 6, 7, 7)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 4, 2, stride=2), floats(2, 3, 4, 5, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), torch.tensor([[1, 2], [3, 8]])),
}


GROUPED = ("conv2d, groups", "conv2d, depthwise", "transposed 2d, groups")


@pytest.mark.parametrize("name", CASES)
def test_forward_counts_as_the_dense_layer(name):
    make, x = CASES[name]
    model = make()
    expected = forward(model, [x])
    assert (expected > 0) == (name != "embedding")  # rows are copied
    assert forward(fxrpg.transform(model, dof=3, plan=EVERYTHING), [x]) == expected


@pytest.mark.parametrize("name", [name for name in CASES if name not in GROUPED])
def test_backward_counts_as_the_dense_layer(name):
    make, x = CASES[name]
    model = make()
    small = fxrpg.transform(model, dof=3, plan=EVERYTHING)
    assert both(small, [x]) == both(model, [x])
    if x.is_floating_point():
        needed = x.clone().requires_grad_()
        assert both(small, [needed]) == both(model, [needed]) > both(model, [x])


@pytest.mark.parametrize("name", GROUPED)
def test_each_gradient_of_a_grouped_convolution_counts_as_its_forward(name):
    make, x = CASES[name]
    small = fxrpg.transform(make(), dof=3, plan=EVERYTHING)
    once = forward(small, [x])
    assert both(small, [x]) == 2 * once
    assert both(small, [x.clone().requires_grad_()]) == 3 * once


def test_bilinear_layers_count_their_multiplications():
    """y_k = sum_j (sum_i x1_i W_kij) x2_j for each row: two operations for each weight, and for each column of W_k."""
    small = fxrpg.transform(nn.Bilinear(4, 5, 6), dof=3, plan=EVERYTHING)
    assert forward(small, [floats(3, 4), floats(3, 5)]) == 3 * 2 * 6 * (4 * 5 + 5)
    assert forward(small, [floats(7, 3, 4), floats(7, 3, 5)]) == 7 * 3 * 2 * 6 * (4 * 5 + 5)


@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "transposed 2d"])
def test_only_the_gradients_that_are_taken_count(name):
    make, x = CASES[name]
    model = make()
    small = fxrpg.transform(model, dof=3, plan=EVERYTHING)
    for each in (model, small):
        for parameter in each.parameters():
            parameter.requires_grad_(False)
    x = x.clone().requires_grad_()
    assert both(small, [x]) == both(model, [x])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.recur = nn.LSTM(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.up(self.conv(self.table(tokens).transpose(1, 2)).relu()).transpose(1, 2)
        return self.head(self.attend(x, x, x)[0])


METHODS = {"ring": {"dof": 40}, "pranc": {"method": "pranc", "dof": 5}, "pemn": {"method": "pemn", "dof": 5}}


@pytest.mark.parametrize("count", [forward, both])
@pytest.mark.parametrize("method", METHODS)
def test_whole_models_of_every_method(method, count):
    """Generating costs no floating-point operation of the kind that is counted, not even a basis."""
    tokens = torch.tensor([[1, 2, 3], [4, 5, 10]])
    torch.manual_seed(0)
    model = Net()
    small = fxrpg.transform(model, plan=EVERYTHING, **METHODS[method])
    assert count(small, [tokens]) == count(model, [tokens]) > 0


def test_resnet18():
    """1.8 billion multiplications and additions at 224 x 224, two operations each (arXiv:1512.03385, table 1)."""
    with torch.device("meta"):
        model, x = resnet18(), torch.empty(1, 3, 224, 224)
        small = fxrpg.transform(model, dof=1000)
        assert forward(small, [x]) == forward(model, [x]) == 3_628_146_688
        assert both(small, [x]) == both(model, [x])


def test_graphs_count():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = [floats(2, 3, 8, 8)]
    small = fxrpg.transform(fx.symbolic_trace(model), dof=9, plan=EVERYTHING)
    assert forward(small, x) == forward(model, x)
    assert both(small, x) == both(model, x)


def test_materialized_ops_count():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))
    small = fxrpg.transform(model, dof=3, plan=EVERYTHING)
    with fxrpg.lowering_mode("materialized"):
        assert forward(small, [floats(3, 5)]) == forward(model, [floats(3, 5)])
        assert both(small, [floats(3, 5)]) == both(model, [floats(3, 5)])


def test_every_staged_op_tells_its_operations():
    from torch.utils.flop_counter import flop_registry

    fxrpg.transform(nn.Linear(2, 2), dof=1, plan=EVERYTHING)
    for op in DENSE_OPS:
        assert op.overloadpacket in flop_registry
        assert getattr(torch.ops.fxrpg, f"{op.overloadpacket.__name__}_backward") in flop_registry


def test_importing_does_not_load_the_counter():
    """It imports Triton; the formulas are registered when a first model is transformed."""
    code = (
        "import sys, torch; before = 'torch.utils.flop_counter' in sys.modules; import fxrpg; "
        "assert ('torch.utils.flop_counter' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
