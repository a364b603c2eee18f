"""What only a GPU can show: equal bits with the CPU, CUDA graphs, compiled models, sums in one order."""

from __future__ import annotations

import pytest
import torch
from conformance import GENERATORS, generated
from models import resnet18
from torch import nn
from torch_settings import deterministic

import fxrpg
from fxrpg.lowering import lowering_mode
from fxrpg.view import View
from fxrpg.weights import generate_weight

pytestmark = pytest.mark.gpu
EVERY = [generator for examples in GENERATORS.values() for generator in examples]
SHAPES = {(48, 64): (0, 1), (32, 16, 3, 3): (0, 2, 3, 1), (7, 5): (0, 1)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("generator", EVERY, ids=repr)
def test_weights_have_the_bits_that_they_have_on_a_cpu(generator, shape):
    """Unscaled values from the kernels, from plain torch on the GPU, and from plain torch on the CPU."""
    weight = generated(generator, shape, SHAPES[shape], 96, torch.float32)
    view, state = View.parse(weight.view), weight.state.detach()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        here = generator.materialize(state, view, dtype)
        assert torch.equal(generator.materialize(state.cuda(), view, dtype).cpu(), here)
        on_cpu = generate_weight(state, weight.scale, weight.view, dtype)
        assert torch.equal(generate_weight(state.cuda(), weight.scale.cuda(), weight.view, dtype).cpu(), on_cpu)


def small_model(dof: float = 0.1, **options) -> nn.Module:
    torch.manual_seed(0)
    return fxrpg.transform(resnet18(10), dof=dof, **options).cuda()


@pytest.mark.parametrize("mode", ["fused", "staged", "auto"])
def test_cuda_graphs_replay_the_forward(mode):
    model = small_model().eval()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad(), lowering_mode(mode):
        expected = model(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        out.zero_()
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_compiled_in_one_graph(mode):
    model = small_model()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with lowering_mode(mode):
        expected = model(x)
        found = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_compiled_to_cuda_graphs_from_the_first_call(mode):
    """Of a seed that nothing has run with: what is made once must not be made in the graphs' memory."""
    model = small_model(seed=len(mode)).eval()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    run = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), lowering_mode(mode):
        found = [run(x).clone() for _ in range(3)]
        expected = model(x)
    for out in found:
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["fused", "staged"])
def test_atomics_and_the_gather_agree(mode):
    grads = []
    for in_order in (False, True):
        model = small_model()
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
        exact = torch.backends.cudnn.flags(allow_tf32=False)
        with deterministic(in_order, warn_only=True), lowering_mode(mode), exact:
            model(x).square().sum().backward()
        grads.append(model.fxrpg_ring.grad.double())
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


def test_deterministic_gradients_repeat_bit_for_bit():
    found = []
    for _ in range(2):
        weight = generated(GENERATORS["ring"][0], (64, 64), (0, 1), 96, torch.float32)
        state = weight.state.detach().cuda().requires_grad_()
        x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).cuda()
        with deterministic(warn_only=True), lowering_mode("fused"):
            torch.ops.fxrpg.linear.default(x, None, state, weight.scale.cuda(), weight.view, False).sum().backward()
        found.append(state.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_resnet_on_every_path_and_type(dtype, channels_last):
    torch.backends.cudnn.allow_tf32 = True  # until the test ends, as it is by default
    model = small_model().eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(8, 3, 96, 96, device="cuda").contiguous(memory_format=layout)
    outs = {}
    for mode in ("materialized", "staged", "fused", "auto"):
        with torch.no_grad(), lowering_mode(mode), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            outs[mode] = model(x).double()
    size = outs["materialized"].abs().max().item()
    tolerance = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for mode in ("staged", "fused", "auto"):
        torch.testing.assert_close(outs[mode], outs["materialized"], rtol=tolerance, atol=tolerance * size)


def test_tf32_products_are_as_near_as_torchs(monkeypatch):
    """Ten bits of each operand: within a few times the error of torch's own TF32 product, and not exact."""
    weight = generated(GENERATORS["ring"][0], (128, 256), (0, 1), 96, torch.float32)
    dense = generate_weight(weight.state.detach(), weight.scale, weight.view).cuda()
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).cuda()
    state, scale = weight.state.detach().cuda(), weight.scale.cuda()
    exact = x.double() @ dense.double().t()
    errors = {}
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        with lowering_mode("fused"):
            out = torch.ops.fxrpg.linear.default(x, None, state, scale, weight.view, False)
        errors[precision] = ((out.double() - exact).norm() / exact.norm()).item()
        errors["torch " + precision] = ((x @ dense.t()).double() - exact).norm().item() / exact.norm().item()
    assert errors["ieee"] < 1e-6
    assert errors["tf32"] < 4 * errors["torch tf32"]
    assert errors["tf32"] > errors["ieee"]


def test_a_model_in_auto_mode_launches_fused_kernels_forward_and_backward():
    from fxrpg.kernels.fused.launch import LAUNCHES

    model = small_model()
    before = dict(LAUNCHES)
    model(torch.randn(2, 3, 32, 32, device="cuda")).sum().backward()
    ran = {name for name, count in LAUNCHES.items() if count > before.get(name, 0)}
    assert {"conv_kernel", "conv_state_grad_kernel"} <= ran
    assert fxrpg.explain(model).fraction("fused") > 0
