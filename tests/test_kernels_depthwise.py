"""Depthwise convolutions with a generated weight: any stride, padding, dilation, kernel and layout, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import in_process_without_interpreter
from conformance import GENERATORS, generated
from hypothesis import given, settings
from hypothesis import strategies as st

from fxrpg.dispatch import Tile
from fxrpg.generators.ring import Ring
from fxrpg.lowering import accumulate_gradient, generate_weight
from fxrpg.view import View

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE = [1, 1]


def weight_of(generator, channels, kernel, transposed=False, dtype=torch.float32):
    from fxrpg.kernels.fused.weight import Weight

    order = (1, 2, 3, 0) if transposed else (0, 2, 3, 1)
    weight = generated(generator, (channels, 1, *kernel), order, 96, dtype)
    state, scale = weight.state.detach().to(DEVICE), weight.scale.to(DEVICE)
    return Weight.of(View.parse(weight.view), state, scale)


def dense(weight):
    return generate_weight(weight.state, weight.scale, weight.view.text)


def images(channels, height, width, last, seed=0, dtype=torch.float32):
    x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def close(found, expected, tolerance=2e-5):
    size = expected.abs().max().item() or 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def check(weight, x, stride, padding, dilation, tile, transposed=False):
    """Forward and both gradients of one convolution, on outputs that start as NaN."""
    from fxrpg.kernels.fused.conv import Geometry
    from fxrpg.kernels.fused.depthwise import convolve, state_grad

    channels, step = x.shape[1], 16 if transposed and x.shape[1] % 16 == 0 else 1
    geometry = Geometry(stride, padding, dilation, transposed, [0, 0], channels)
    x, whole = x.requires_grad_(), dense(weight).requires_grad_()
    if transposed:
        y = F.conv_transpose2d(x, whole, None, stride, padding, 0, channels, dilation)
    else:
        y = F.conv2d(x, whole, None, stride, padding, dilation, channels)
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, whole), grad)
    x, y = x.detach(), y.detach()
    out, back = torch.full_like(y, float("nan")), torch.full_like(x, float("nan"))
    convolve(out, x, weight, geometry, tile, backward=False)
    close(out, y)
    convolve(back, grad, weight, geometry, tile, backward=True)
    close(back, dx)
    found = torch.zeros(weight.state.shape, device=DEVICE)
    state_grad(weight.form(step, torch.float32).into(found), weight, grad, x, geometry, tile)
    close(found, accumulate_gradient(dw, weight.state, weight.scale, weight.view.text))


@settings(max_examples=12)
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
    if transposed and any((n - 1) * s - 2 * p + d * (k - 1) + 1 < 1 for n, k, s, p, d in numbers):
        return  # an output without elements is an error of torch's own
    x = images(channels, *image, last)
    tile = Tile(n=16, m=16, k=4, splits=splits)
    check(weight_of(generator, channels, kernel, transposed), x, stride, padding, dilation, tile, transposed)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_a_layer_of_a_mobile_net(last):
    """Larger than a tile on every side; all taps of the state's gradient at once."""
    check(weight_of(Ring(), 33, (3, 3)), images(33, 5, 6, last), [2, 2], ONE, ONE, Tile(n=32, m=16, k=16, splits=2))


def test_kernels_wider_than_what_is_generated_at_a_time():
    check(weight_of(Ring(), 3, (1, 19)), images(3, 1, 21, True), ONE, [0, 9], ONE, Tile(n=16, m=16, k=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_summed_in_float32(dtype):
    from fxrpg.kernels.fused.conv import Geometry
    from fxrpg.kernels.fused.depthwise import convolve

    weight, x = weight_of(Ring(), 6, (3, 3), dtype=dtype), images(6, 5, 5, True, dtype=dtype)
    values = weight.view.generator.materialize(weight.state, weight.view, dtype).double() * 0.75
    y = torch.full_like(x, float("nan"))
    convolve(y, x, weight, Geometry(ONE, ONE, ONE, False, [0, 0], 6), Tile(n=16, m=32, k=16), backward=False)
    torch.testing.assert_close(y, F.conv2d(x.double(), values, None, 1, 1, 1, 6).to(dtype))


def test_the_epilogue_is_applied_to_every_channel():
    from fxrpg.kernels.fused.conv import Geometry
    from fxrpg.kernels.fused.depthwise import convolve
    from fxrpg.kernels.fused.epilogue import Epilogue

    weight, x = weight_of(Ring(), 7, (3, 3)), images(7, 4, 5, True)
    bias, factor, shift = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = torch.full_like(x, float("nan"))
    geometry, tile = Geometry(ONE, ONE, ONE, False, [0, 0], 7), Tile(n=16, m=16, k=16)
    convolve(y, x, weight, geometry, tile, backward=False, epilogue=Epilogue(bias, factor, shift, "relu"))
    expected = F.conv2d(x, dense(weight), bias, 1, 1, 1, 7)
    close(y, F.relu(expected * factor.view(-1, 1, 1) + shift.view(-1, 1, 1)))


def compile_all() -> None:
    """Print what the kernels come to for every target."""
    from bench.machine_code import code_of, compiled
    from fxrpg.kernels.fused import depthwise
    from fxrpg.kernels.fused.conv import Geometry
    from fxrpg.kernels.fused.launch import recorded

    tile = Tile(n=64, m=32, k=16)
    with recorded() as launches:
        for last, transposed in ((True, False), (False, False), (True, True)):
            weight = weight_of(Ring(), 64, (3, 3), transposed, torch.bfloat16)
            x, y = images(64, 8, 8, last, dtype=torch.bfloat16), images(64, 8, 8, last, dtype=torch.bfloat16)
            geometry = Geometry(ONE, ONE, ONE, transposed, [0, 0], 64)
            depthwise.convolve(y, x, weight, geometry, tile, backward=False)
            form = weight.form(64 if transposed else 1, x.dtype).into(torch.zeros(weight.state.shape))
            depthwise.state_grad(form, weight, y, x, geometry, Tile(n=32, m=16, k=16))
    for launch in launches:
        for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
            kernel = compiled(launch, target)
            print(launch.kernel.__name__, target, code_of(kernel).spills if target == "sm_90" else 0)


def test_kernels_compile_for_every_target_and_do_not_spill():
    lines = in_process_without_interpreter("test_kernels_depthwise", "compile_all").splitlines()
    assert len(lines) == 6 * 4
    assert all(line.endswith(" 0") for line in lines), lines
