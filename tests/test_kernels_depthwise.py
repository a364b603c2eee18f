"""Depthwise convolutions with a generated weight: any stride, padding, dilation, kernel and layout, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import GENERATORS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, TARGETS, check_convolution, close, compiled, images, weight_of

from fxrpg.dispatch import Tile
from fxrpg.generators.ring import Ring

pytestmark = pytest.mark.kernels
ONE = [1, 1]


def check(weight, dense, x, stride, padding, dilation, tile, transposed=False):
    from fxrpg.kernels.fused import depthwise

    channels, step = x.shape[1], 16 if transposed and x.shape[1] % 16 == 0 else 1
    geometry = depthwise.Geometry(stride, padding, dilation, transposed, [0, 0], channels)
    check_convolution(depthwise, weight, dense, x, geometry, tile, step)


@settings(max_examples=8)
@given(
    generator=st.sampled_from([Ring(), Ring(block=1), Ring(block=8, layout="shuffle"), GENERATORS["pemn"][0]]),
    channels=st.sampled_from([1, 5, 16, 18]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    transposed=st.booleans(),
    last=st.booleans(),
    size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    splits=st.sampled_from([1, 2]),
)
def test_convolutions_of_any_shape(
    generator, channels, kernel, stride, dilation, padding, transposed, last, size, splits
):
    image = [d * (k - 1) + n for k, d, n in zip(kernel, dilation, size, strict=True)]
    numbers = list(zip(image, kernel, stride, padding, dilation, strict=True))
    # an output without elements is an error of torch's own
    assume(not transposed or all((n - 1) * s - 2 * p + d * (k - 1) + 1 > 0 for n, k, s, p, d in numbers))
    x, tile = images(2, channels, *image, last=last), Tile(n=16, m=16, k=4, splits=splits)
    weight, dense = weight_of(generator, (channels, 1, *kernel), transposed=transposed)
    check(weight, dense, x, stride, padding, dilation, tile, transposed)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_a_layer_of_a_mobile_net(last):
    """Larger than a tile on every side; all taps of the state's gradient at once."""
    x, tile = images(2, 33, 5, 6, last=last), Tile(n=32, m=16, k=16, splits=2)
    check(*weight_of(Ring(), (33, 1, 3, 3)), x, [2, 2], ONE, ONE, tile)


def test_kernels_wider_than_what_is_generated_at_a_time():
    x, tile = images(2, 3, 1, 21, last=True), Tile(n=16, m=16, k=16)
    check(*weight_of(Ring(), (3, 1, 1, 19)), x, ONE, [0, 9], ONE, tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_summed_in_float32(dtype):
    from fxrpg.kernels.fused.conv import Geometry
    from fxrpg.kernels.fused.depthwise import convolve

    (weight, _), x = weight_of(Ring(), (6, 1, 3, 3), dtype=dtype), images(2, 6, 5, 5, last=True, dtype=dtype)
    values = weight.view.generator.materialize(weight.state, weight.view, dtype).double() * 0.75
    y = torch.full_like(x, float("nan"))
    convolve(y, x, weight, Geometry(ONE, ONE, ONE, False, [0, 0], 6), Tile(n=16, m=32, k=16), backward=False)
    torch.testing.assert_close(y, F.conv2d(x.double(), values, None, 1, 1, 1, 6).to(dtype))


def test_the_epilogue_is_applied_to_every_channel():
    from fxrpg.kernels.fused.conv import Geometry
    from fxrpg.kernels.fused.depthwise import convolve
    from fxrpg.kernels.fused.epilogue import Epilogue

    (weight, dense), x = weight_of(Ring(), (7, 1, 3, 3)), images(2, 7, 4, 5, last=True)
    bias, factor, shift = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = torch.full_like(x, float("nan"))
    geometry, tile = Geometry(ONE, ONE, ONE, False, [0, 0], 7), Tile(n=16, m=16, k=16)
    convolve(y, x, weight, geometry, tile, backward=False, epilogue=Epilogue(bias, factor, shift, "relu"))
    expected = F.conv2d(x, dense, bias, 1, 1, 1, 7)
    close(y, F.relu(expected * factor.view(-1, 1, 1) + shift.view(-1, 1, 1)))


def launches() -> None:
    """Of every kernel, with tiles of a GPU."""
    from fxrpg.kernels.fused import depthwise
    from fxrpg.kernels.fused.conv import Geometry

    tile, shape, where = Tile(n=64, m=32, k=16), (2, 64, 8, 8), {"dtype": torch.bfloat16}
    for last, transposed in ((True, False), (False, False), (True, True)):
        weight, _ = weight_of(Ring(), (64, 1, 3, 3), transposed=transposed, **where)
        x, y = images(*shape, last=last, **where), images(*shape, last=last, **where)
        geometry = Geometry(ONE, ONE, ONE, transposed, [0, 0], 64)
        depthwise.convolve(y, x, weight, geometry, tile, backward=False)
        form = weight.form(64 if transposed else 1, x.dtype).into(torch.zeros(weight.state.shape))
        depthwise.state_grad(form, weight, y, x, geometry, Tile(n=32, m=16, k=16))


def test_kernels_compile_for_every_target_and_do_not_spill():
    found = compiled("test_kernels_depthwise")
    assert len(found) == 6 * len(TARGETS)
    assert not any(row.spills for row in found), found
