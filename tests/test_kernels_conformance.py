"""Every generator x layer x mode on Triton kernels, against the dense op on the materialized weight; and that they ran."""

from __future__ import annotations

import threading

import pytest
import torch
from conformance import GENERATORS, LAYERS, LayerCase, generated, opcheck
from kernel_cases import DEVICE, close
from torch import Tensor

import fxrpg
from fxrpg.dispatch import choices
from fxrpg.generators.ring import Ring
from fxrpg.lowering import Generated, lowering_mode

pytestmark = pytest.mark.kernels

FUSED = {  # kernels that each op launches when fused: forward and the input's gradient, the state's gradient
    "linear": ("linear_kernel", "linear_state_grad_kernel"),
    "conv": ("conv_kernel", "conv_state_grad_kernel"),
    "depthwise": ("depthwise_kernel", "depthwise_state_grad_kernel"),
    "embedding": ("embedding_kernel", "embedding_state_grad_kernel"),
}
INLINED = [g for method in ("ring", "pemn") for g in GENERATORS[method]] + [Ring(block=64), Ring(block=16)]
ONE_OF_EACH = [next(case for case in LAYERS if case.op == op) for op in ("linear", "conv", "embedding")]
ONE_EACH = [GENERATORS[method][0] for method in GENERATORS]


def kind_of(case: LayerCase) -> str | None:
    """The kernels that cover a call; None where it is always staged."""
    if case.op == "conv" and case.kwargs.get("groups", 1) == case.weight[0] and case.weight[1] == 1:
        return "depthwise"
    if case.op in ("bilinear", "contraction", "grouped") or (case.op == "conv" and len(case.weight) == 5):
        return None
    return case.op


def on_device(weight: Generated) -> Generated:
    state = weight.state.detach().to(DEVICE)
    return weight._replace(
        state=state.requires_grad_(state.is_floating_point()), scale=weight.scale.detach().to(DEVICE)
    )


def run(case: LayerCase, weight: Generated, mode: str, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """([output, gradients of the inputs, the bias and the state], choices) of one call in `mode`."""
    inputs = [x.to(DEVICE).requires_grad_(x.is_floating_point()) for x in case.make_inputs(dtype)]
    bias = case.make_bias(dtype)
    bias = None if bias is None else bias.to(DEVICE).requires_grad_()
    wanted = [x for x in (*inputs, bias, weight.state) if x is not None and x.is_floating_point()]
    with lowering_mode(mode), choices() as seen:
        out = case.lowered(inputs, weight, bias)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)], seen


def assert_alike(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        close(one, other, tolerance)


def launched() -> dict[str, int]:
    from fxrpg.kernels.fused.launch import LAUNCHES

    return dict(LAUNCHES)


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("generator", INLINED, ids=repr)
def test_fused_equals_the_dense_op(generator, case):
    weight = on_device(generated(generator, case.weight, case.order, 64, torch.float32))
    expected, _ = run(case, weight, "materialized", torch.float32)
    before = launched()
    found, seen = run(case, weight, "fused", torch.float32)
    ran = {name: count - before.get(name, 0) for name, count in launched().items()}
    assert_alike(found, expected, 2e-5)
    kind = kind_of(case)
    if kind is None:
        assert {choice.path for choice in seen} == {"staged"}
        assert all(choice.reason for choice in seen)
    else:
        assert {choice.path for choice in seen} == {"fused"}
        kernel, gradient = FUSED[kind]
        assert ran.get(kernel, 0) >= (1 if kind == "embedding" else 2)
        assert ran.get(gradient, 0) >= 1
        assert not ran.get("generate_kernel")


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("generator", ONE_EACH, ids=repr)
def test_staged_equals_the_dense_op(generator, case):
    weight = on_device(generated(generator, case.weight, case.order, 64, torch.float32))
    expected, _ = run(case, weight, "materialized", torch.float32)
    found, seen = run(case, weight, "staged", torch.float32)
    assert_alike(found, expected, 2e-5)
    assert {choice.path for choice in seen} == {"staged"}


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_compute_is_summed_in_float32(dtype, case):
    """Operands of 16 bits, sums of 32: outputs within one rounding of the exact product of the same operands."""
    weight = on_device(generated(Ring(block=8), case.weight, case.order, 64, torch.float32))
    found, _ = run(case, weight, "fused", dtype)
    expected, _ = run(case, weight, "materialized", torch.float32)
    assert found[-1].dtype == torch.float32
    assert_alike([t.float() for t in found], [t.float() for t in expected], 0.03 if dtype is torch.bfloat16 else 0.004)


def test_the_mode_of_the_forward_reaches_a_backward_in_another_thread():
    """Autograd's threads for a GPU have none of the caller's context."""
    case = LAYERS[0]
    weight = on_device(generated(Ring(), case.weight, case.order, 64, torch.float32))
    with lowering_mode("fused"):
        out = case.lowered([x.to(DEVICE) for x in case.make_inputs(torch.float32)], weight, None)
    before = launched().get("linear_state_grad_kernel", 0)
    backward = threading.Thread(target=out.sum().backward)
    backward.start()
    backward.join()
    assert launched()["linear_state_grad_kernel"] == before + 1


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_opcheck_of_fused_ops(case):
    weight = on_device(generated(Ring(), case.weight, case.order, 64, torch.float32))
    with lowering_mode("fused"):
        opcheck(case, [x.to(DEVICE) for x in case.make_inputs(torch.float32)], weight, None)


def test_compiled_in_one_graph_the_kernels_run():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 4))
    model = fxrpg.transform(model.to(DEVICE), dof=0.5, plan=[fxrpg.Rule("*", "generate")])
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    expected = model(x)
    before = launched()
    with lowering_mode("fused"):
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        out.sum().backward()
    ran = {name for name, count in launched().items() if count > before.get(name, 0)}
    assert ran == {"conv_kernel", "conv_state_grad_kernel", "linear_kernel", "linear_state_grad_kernel"}
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["fused", "staged", "materialized"])
def test_gradients_of_channels_last_scores_are_channels_last(mode):
    """As the ops' fake kernels say, on which compiled code relies."""
    weight = on_device(generated(GENERATORS["pemn"][0], (8, 32, 3, 3), (0, 2, 3, 1), 64, torch.float32))
    state = weight.state.detach().contiguous(memory_format=torch.channels_last)
    grad, x = torch.ones(2, 8, 3, 3, device=DEVICE), torch.ones(2, 32, 5, 5, device=DEVICE)
    config = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    with lowering_mode(mode):
        *_, found = torch.ops.fxrpg.conv_backward.default(
            grad, x, state, weight.scale, weight.view, *config, [False, False, True]
        )
    assert found.stride() == state.stride()
