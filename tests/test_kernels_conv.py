"""Convolutions with a generated weight: any stride, padding, dilation, groups and layout, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import GENERATORS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import check_convolution, close, images, poisoned, weight_of
from torch._subclasses.fake_tensor import FakeTensorMode

from fxrpg.dispatch import Tile
from fxrpg.generators.ring import Ring
from fxrpg.lowering import lowering_mode

pytestmark = pytest.mark.kernels


def check(weight, dense, x, geometry, tile):
    from fxrpg.kernels.fused import conv

    check_convolution(conv, weight, dense, x, conv.Geometry(*geometry), tile)


@settings(max_examples=10)
@given(
    generator=st.sampled_from([Ring(), Ring(block=1), Ring(block=8, layout="shuffle"), GENERATORS["pemn"][0]]),
    groups=st.integers(1, 3),
    channels=st.tuples(st.sampled_from([1, 3, 8, 32]), st.sampled_from([1, 5, 16])),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
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
    # an output without elements is an error of torch's own
    assume(not transposed or all((n - 1) * s - 2 * p + d * (k - 1) + 1 > 0 for n, k, s, p, d in numbers))
    extra = [data.draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for _, _, s, _, d in numbers]
    shape = (inputs * groups, outputs, *kernel) if transposed else (outputs * groups, inputs, *kernel)
    weight, dense = weight_of(generator, shape, size=data.draw(st.integers(1, 200)), transposed=transposed)
    x = images(2, inputs * groups, *image, last=last)
    tile = Tile(n=16, m=16, k=data.draw(st.sampled_from([16, 32])), splits=splits)
    check(weight, dense, x, (stride, padding, dilation, transposed, extra, groups), tile)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_a_layer_of_a_resnet(last):
    """Whole blocks, stride 2, larger than a tile on every side."""
    weight, dense = weight_of(Ring(), (40, 32, 3, 3), size=640)
    geometry = ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
    check(weight, dense, images(2, 32, 7, 9, last=last), geometry, Tile(n=32, m=16, k=32))


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


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_op_returns_the_layout_that_torch_returns(last, kernel):
    weight, dense = weight_of(Ring(), (8, 32, kernel, kernel), size=640)
    x = images(2, 32, 5, 6, last=last)
    expected = F.conv2d(x, dense)
    with lowering_mode("fused"), poisoned():
        out = torch.ops.fxrpg.conv.default(
            x, None, weight.state, weight.scale, weight.view.text, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        )
    close(out, expected)
    assert out.stride() == expected.stride()


IMAGES = {
    "channels_last": lambda c: images(2, c, 5, 6, last=True),
    "contiguous": lambda c: images(2, c, 5, 6, last=False),
    "half of the channels": lambda c: images(2, 2 * c, 5, 6, last=True).chunk(2, 1)[1],
    "every second pixel": lambda c: images(2, c, 10, 12, last=True)[:, :, ::2, ::2],
    "one image, expanded": lambda c: images(1, c, 5, 6, last=True).expand(2, c, 5, 6),
}


@pytest.mark.parametrize("last", [True, False], ids=["grad_channels_last", "grad_contiguous"])
@pytest.mark.parametrize("shape", [(8, 32, 1, 1), (8, 32, 3, 3), (8, 1, 3, 3), (8, 1, 1, 1), (32, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("x", IMAGES)
def test_results_lie_in_memory_as_the_compiler_is_told(x, shape, last):
    """Compiled code relies on the strides of the ops' fake kernels."""
    weight, _ = weight_of(Ring(), shape, size=640)
    x = IMAGES[x](32 if shape[1] == 32 or shape[0] == 32 else 1)
    where = weight.state, weight.scale, weight.view.text
    config = [1, 1], [shape[2] // 2] * 2, [1, 1], False, [0, 0], x.shape[1] // shape[1]
    grad = images(2, shape[0], 5, 6, last=last)
    with lowering_mode("fused"):
        real = torch.ops.fxrpg.conv.default(x, None, *where, *config)
        back, *_ = torch.ops.fxrpg.conv_backward.default(grad, x, *where, *config, [True, False, False])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.ops.fxrpg.conv.default(mode.from_tensor(x), None, *where, *config)
        needed = [True, False, False]
        told, *_ = torch.ops.fxrpg.conv_backward.default(
            mode.from_tensor(grad), mode.from_tensor(x), *where, *config, needed
        )
    for found, expected in ((real, fake), (back, told)):
        sides = [axis for axis, size in enumerate(expected.shape) if size > 1]
        assert [found.stride(axis) for axis in sides] == [expected.stride(axis) for axis in sides]
