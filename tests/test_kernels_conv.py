"""Convolutions with a generated weight: any stride, padding, dilation, groups and layout, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import GENERATORS, generated
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_linear import close, poisoned

from fxrpg.dispatch import Tile
from fxrpg.generators.ring import Ring
from fxrpg.lowering import accumulate_gradient, generate_weight, lowering_mode
from fxrpg.view import View

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weight_of(generator, shape, transposed, size=96):
    from fxrpg.kernels.fused.weight import Weight

    axes = tuple(range(2, len(shape)))
    order = (1, *axes, 0) if transposed else (0, *axes, 1)
    text = generated(generator, shape, order, size, torch.float32)
    view, state, scale = View.parse(text.view), text.state.detach().to(DEVICE), text.scale.to(DEVICE)
    return Weight.of(view, state, scale), generate_weight(state, scale, text.view)


def check(weight, dense, x, geometry, tile):
    """Forward and both gradients of one convolution, on outputs that start as NaN."""
    from fxrpg.kernels.fused.conv import Geometry, convolve, state_grad

    geometry = Geometry(*geometry)
    stride, padding, dilation, transposed, output_padding, groups = geometry
    x, dense = x.requires_grad_(), dense.requires_grad_()
    if transposed:
        y = F.conv_transpose2d(x, dense, None, stride, padding, output_padding, groups, dilation)
    else:
        y = F.conv2d(x, dense, None, stride, padding, dilation, groups)
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, dense), grad)
    x = x.detach()
    out, back = torch.full_like(y, float("nan")), torch.full_like(x, float("nan"))
    convolve(out, x, weight, geometry, tile, backward=False)
    close(out, y.detach())
    convolve(back, grad, weight, geometry, tile, backward=True)
    close(back, dx)
    found = torch.zeros(weight.state.shape, device=DEVICE)
    state_grad(weight.form(1, torch.float32).into(found), weight, grad, x, geometry, tile)
    close(found, accumulate_gradient(dw, weight.state, weight.scale, weight.view.text))


@settings(max_examples=15)
@given(
    generator=st.sampled_from([Ring(), Ring(block=1), Ring(block=8, layout="shuffle"), GENERATORS["pemn"][0]]),
    groups=st.integers(1, 3),
    channels=st.tuples(st.sampled_from([1, 3, 8, 32]), st.sampled_from([1, 5, 16])),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    transposed=st.booleans(),
    last=st.booleans(),
    splits=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_convolutions_of_any_shape(
    generator, groups, channels, kernel, stride, dilation, padding, transposed, last, splits, data
):
    inputs, outputs = channels
    image = [d * (k - 1) + data.draw(st.integers(1, 4)) for k, d in zip(kernel, dilation, strict=True)]
    numbers = list(zip(image, kernel, stride, padding, dilation, strict=True))
    if transposed and any((n - 1) * s - 2 * p + d * (k - 1) + 1 < 1 for n, k, s, p, d in numbers):
        return  # an output without elements is an error of torch's own
    extra = [data.draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for _, _, s, _, d in numbers]
    shape = (inputs * groups, outputs, *kernel) if transposed else (outputs * groups, inputs, *kernel)
    weight, dense = weight_of(generator, shape, transposed, data.draw(st.integers(1, 200)))
    x = torch.randn(2, inputs * groups, *image, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    tile = Tile(n=16, m=16, k=data.draw(st.sampled_from([16, 32])), splits=splits)
    check(weight, dense, x, (stride, padding, dilation, transposed, extra, groups), tile)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_a_layer_of_a_resnet(last):
    """Whole blocks, stride 2, larger than a tile on every side."""
    weight, dense = weight_of(Ring(), (40, 32, 3, 3), False, 640)
    x = torch.randn(2, 32, 7, 9, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    check(weight, dense, x, ([2, 2], [1, 1], [1, 1], False, [0, 0], 1), Tile(n=32, m=16, k=32))


def test_strides_go_by_parity_classes_without_zeros():
    """The input's gradient of a 3x3 stride-2 convolution takes 4 + 2 + 2 + 1 taps for its four classes, 9 in all."""
    from fxrpg.kernels.fused.conv import gathered, scattered

    found = scattered(9, taps=3, stride=2, padding=1, dilation=1)
    assert sorted(axis.taps for _, axis in found) == [1, 2]
    assert sum(positions for positions, _ in found) == 9
    assert sum(axis.taps for _, axis in found) == 3
    (whole,) = gathered(9, taps=3, stride=2, padding=1, dilation=1)
    assert whole[1].taps == 3


@given(
    size=st.integers(1, 12), taps=st.integers(1, 4), stride=st.integers(1, 4), padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
)  # fmt: skip
def test_classes_are_the_adjoint_of_an_axis(size, taps, stride, padding, dilation):
    """Each (position, tap) pair that a convolution meets is met once by the classes of its adjoint, and no other."""
    from fxrpg.kernels.fused.conv import gathered, scattered

    outputs = max(1, (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1)
    ((_, axis),) = gathered(outputs, taps, stride, padding, dilation)
    met = {(q * axis.mul + axis.base + t * axis.delta, q, t) for q in range(outputs) for t in range(axis.taps)}
    back = set()
    for positions, axis in scattered(size, taps, stride, padding, dilation):
        for q in range(positions):
            for t in range(axis.taps):
                place, read = q * axis.spread + axis.place, q * axis.mul + axis.base + t * axis.delta
                entry = (place, read, axis.first + t * axis.step)
                assert entry not in back
                back.add(entry)
    inside = {entry for entry in met if 0 <= entry[0] < size}
    assert {entry for entry in back if 0 <= entry[1] < outputs} == inside


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_op_returns_the_layout_that_torch_returns(memory, kernel, monkeypatch):
    poisoned(monkeypatch)
    weight, dense = weight_of(Ring(), (8, 32, kernel, kernel), False, 640)
    x = torch.randn(2, 32, 5, 6, device=DEVICE).contiguous(memory_format=memory)
    expected = F.conv2d(x, dense)
    with lowering_mode("fused"):
        out = torch.ops.fxrpg.conv.default(
            x, None, weight.state, weight.scale, weight.view.text, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        )
    close(out, expected)
    assert out.stride() == expected.stride()
