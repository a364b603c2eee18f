"""The suite that every generator and every layer inherits (tables in conformance.py)."""

from __future__ import annotations

import pytest
import torch
from conformance import GENERATORS, LAYERS, LayerCase, generated, opcheck, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fxrpg.generator import Generator
from fxrpg.staging import DENSE_OPS
from fxrpg.view import View
from fxrpg.weights import accumulate_gradient, generate_weight, plain_weight

ALL = [pytest.param(g, case, id=f"{g!r}-{case}") for g, case in pairs()]
SOME = [pytest.param(GENERATORS["ring"][0], case, id=str(case)) for case in LAYERS]
# By definition, what torch returns for these options of an embedding is not the derivative.
SMOOTH = [
    pytest.param(generator, case, id=f"{generator!r}-{case}")
    for generator in (GENERATORS["ring"][0], *GENERATORS["pranc"])
    for case in LAYERS
    if "padding_idx" not in case.kwargs
]
MASKS = [pytest.param(mask, case, id=f"{mask!r}-{case}") for mask in GENERATORS["pemn"] for case in LAYERS]


def reference(weight, case: LayerCase, inputs: list[Tensor], bias: Tensor | None) -> Tensor:
    """The ordinary op on a weight that autograd follows through plain torch ops on the state."""
    return case.run(inputs, plain_weight(weight.state, weight.scale, weight.view), bias)


def test_tables_are_complete():
    assert set(GENERATORS) == set(Generator.registry)
    assert {case.op for case in LAYERS} == {dense.name for dense in DENSE_OPS.values()}


@pytest.mark.parametrize(("generator", "case"), ALL)
def test_equals_autograd_through_materialize(generator, case):
    weight = generated(generator, case.weight, case.order, 37, torch.float64)
    outs, grads = [], []
    for run in (case.lowered, lambda inputs, w, b: reference(w, case, inputs, b)):
        inputs = [x.requires_grad_(x.is_floating_point()) for x in case.make_inputs(torch.float64)]
        bias = case.make_bias(torch.float64)
        wanted = [x for x in (*inputs, bias, weight.state) if x is not None and x.is_floating_point()]
        out = run(inputs, weight, bias if bias is None else bias.requires_grad_())
        outs.append(out.detach())
        grads.append(
            torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        )
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-10, atol=1e-10)
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("generator", "case"), SMOOTH)
def test_gradcheck(generator, case):
    weight = generated(generator, case.weight, case.order, 11, torch.float64)
    inputs = [x.requires_grad_(x.is_floating_point()) for x in case.make_inputs(torch.float64)]
    bias = case.make_bias(torch.float64)
    tensors = (weight.state, *(x for x in (*inputs, bias) if x is not None and x.is_floating_point()))
    tensors = tuple(t.requires_grad_() for t in tensors)

    def function(state, *rest):
        floats = iter(rest)
        xs = [next(floats) if x.is_floating_point() else x for x in inputs]
        return case.lowered(xs, weight._replace(state=state), rest[-1] if bias is not None else None)

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(("generator", "case"), MASKS)
def test_the_gradient_of_scores_passes_straight_through_the_mask(generator, case):
    """d score = d weight * value * sign(score), for entries that the mask keeps and for those that it drops."""
    weight = generated(generator, case.weight, case.order, 11, torch.float64)
    inputs, bias = case.make_inputs(torch.float64), case.make_bias(torch.float64)
    dense = generate_weight(weight.state.detach(), weight.scale, weight.view).requires_grad_()
    for out in (case.run(inputs, dense, bias), case.lowered(inputs, weight, bias)):
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    view = View.parse(weight.view)
    value = 0.75 * generator.fixed_values(view, dense.device)
    place = slice(None) if generator.local else slice(view.offset, view.offset + view.count)
    score, found = ((view.to_logical(t) if generator.local else t)[place] for t in (weight.state, weight.state.grad))
    torch.testing.assert_close(found, view.to_logical(dense.grad) * value * score.sign(), rtol=1e-12, atol=1e-12)
    kept = generator.mask(weight.state, view)
    assert torch.equal(kept, view.to_logical(dense) != 0)
    assert found[kept].any()
    assert found[~kept].any()
    if not generator.local:
        assert weight.state.grad.count_nonzero() == found.count_nonzero()


@pytest.mark.parametrize(("generator", "case"), SOME)
def test_opcheck(generator, case):
    weight = generated(generator, case.weight, case.order, 37, torch.float32)
    opcheck(case, case.make_inputs(torch.float32), weight, case.make_bias(torch.float32))


@pytest.mark.parametrize("op", ["generate", "accumulate"])
def test_opcheck_of_the_generating_ops(op):
    weight = generated(GENERATORS["ring"][0], (4, 5), (0, 1), 37, torch.float32)
    arguments = (weight.state, weight.scale, weight.view)
    if op == "accumulate":
        arguments = (torch.randn(4, 5, requires_grad=True), weight.state.detach(), *arguments[1:])
    torch.library.opcheck(getattr(torch.ops.fxrpg, op).default, arguments)


@pytest.mark.parametrize(("generator", "case"), SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_compute(generator, case, dtype):
    """A float32 state under 16-bit inputs: the weight is the float32 one, rounded once."""
    weight = generated(generator, case.weight, case.order, 37, torch.float32)
    inputs, bias = case.make_inputs(dtype), case.make_bias(dtype)
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    expected = case.run(
        wide, generate_weight(weight.state, weight.scale, weight.view), bias if bias is None else bias.float()
    )
    out = case.lowered(inputs, weight, bias)
    tolerance = 0.05 if dtype is torch.bfloat16 else 0.01
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    out.sum().backward()
    assert weight.state.grad.dtype == torch.float32


@pytest.mark.parametrize(("generator", "case"), SOME)
def test_inputs_of_any_strides(generator, case):
    weight = generated(generator, case.weight, case.order, 37, torch.float64)
    inputs = case.make_inputs(torch.float64)
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    bias = case.make_bias(torch.float64)
    torch.testing.assert_close(
        case.lowered(strided, weight, bias), case.lowered(inputs, weight, bias), rtol=1e-12, atol=1e-12
    )


@settings(max_examples=60)
@given(data=st.data())
def test_convolutions_of_any_shape(data):
    """Shapes, strides, groups, dilation, ring sizes, blocks and layouts, all drawn at once."""
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 3))
    transposed = data.draw(st.booleans())
    outer, inner = groups * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [data.draw(st.integers(0, 1)) for _ in range(dims)]
    spatial = [d * (k - 1) + data.draw(st.integers(1, 4)) for k, d in zip(kernel, dilation, strict=True)]
    generator = data.draw(st.sampled_from(GENERATORS["ring"]))
    function = getattr(torch.nn.functional, f"conv{'_transpose' if transposed else ''}{dims}d")
    channels = outer if transposed else inner * groups
    axes = tuple(range(2, 2 + dims))
    case = LayerCase(
        "conv",
        function,
        ((2, channels, *spatial),),
        (outer, inner, *kernel),
        (1, *axes, 0) if transposed else (0, *axes, 1),
        None,
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )
    if transposed and any(  # an output without elements is an error of torch's own
        (n - 1) * s - 2 * p + d * (k - 1) + 1 < 1
        for n, s, p, d, k in zip(spatial, stride, padding, dilation, kernel, strict=True)
    ):
        return
    weight = generated(generator, case.weight, case.order, data.draw(st.integers(1, 80)), torch.float64)
    x = case.make_inputs(torch.float64)[0].requires_grad_()
    out, expected = case.lowered([x], weight, None), reference(weight, case, [x], None)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(
        torch.autograd.grad(out.square().sum(), (x, weight.state)),
        torch.autograd.grad(expected.square().sum(), (x, weight.state)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in LAYERS])
def test_needs_only_what_is_asked_for(case):
    """A frozen state gets no gradient, and inputs without gradients cost no second generation."""
    weight = generated(GENERATORS["ring"][0], case.weight, case.order, 37, torch.float64)
    inputs, bias = case.make_inputs(torch.float64), case.make_bias(torch.float64)
    case.lowered(inputs, weight, bias).sum().backward()
    assert weight.state.grad is not None
    frozen = weight._replace(state=weight.state.detach())
    assert not case.lowered(inputs, frozen, bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unscaled_values_are_the_state_cast(dtype):
    for generator in GENERATORS["ring"]:
        weight = generated(generator, (5, 7), (0, 1), 24, torch.float64)
        view = View.parse(weight.view)
        exact = view.generator.materialize(weight.state, view, torch.float64)
        assert torch.equal(view.generator.materialize(weight.state, view, dtype), exact.to(dtype))


def test_state_gradient_is_accumulated_in_float32():
    weight = generated(GENERATORS["ring"][1], (64, 64), (0, 1), 1, torch.bfloat16)
    grad = torch.full((64, 64), 2.0**-7, dtype=torch.bfloat16)
    wide = accumulate_gradient(grad.double(), weight.state.double(), weight.scale, weight.view)
    assert torch.equal(accumulate_gradient(grad, weight.state.detach(), weight.scale, weight.view), wide.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_generates_the_same_weight(dtype):
    """Every bit of it, in every type of state: the scale is not rounded to a type of 16 bits on either path."""
    for generator in (example for examples in GENERATORS.values() for example in examples):
        weight = generated(generator, (5, 7), (0, 1), 24, dtype)
        arguments = (weight.state.detach(), weight.scale, weight.view)
        assert torch.equal(plain_weight(*arguments), generate_weight(*arguments))


@pytest.mark.filterwarnings("ignore:.*batching rule for aten..bilinear")  # torch's own has none
@pytest.mark.parametrize("generator", [examples[0] for examples in GENERATORS.values()], ids=repr)
@pytest.mark.parametrize(
    "case", [case for case in LAYERS if case.op != "grouped"], ids=str
)  # torch cannot batch that one
def test_vmap_over_the_inputs(generator, case):
    """torch.func.vmap runs the op on all of a batch, with a batching rule of its own: no fallback that warns."""
    weight = generated(generator, case.weight, case.order, 37, torch.float64)
    weight, bias = weight._replace(state=weight.state.detach()), case.make_bias(torch.float64)
    batches = [
        torch.stack([case.make_inputs(torch.float64, seed)[i] for seed in range(3)]) for i in range(len(case.inputs))
    ]
    found = torch.func.vmap(lambda *inputs: case.lowered(list(inputs), weight, bias))(*batches)
    expected = torch.stack([case.lowered([x[i] for x in batches], weight, bias) for i in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
