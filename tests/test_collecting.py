"""The gradient of a shared ring is one sum for a whole backward: right in every order in which autograd may run."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxrpg
from fxrpg import native
from fxrpg.collecting import joined
from fxrpg.lowering import lowering_mode

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs C code for the CPU: a C compiler on the PATH")


def model(dof: int = 2_000, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Linear(24, 24) for _ in range(layers)))
    return fxrpg.transform(dense, dof=dof, plan=[fxrpg.Rule("*", "generate")])


def expected(small: nn.Module, run) -> torch.Tensor:
    """The ring's gradient by the reference."""
    small.zero_grad()
    with lowering_mode("materialized"):
        run(small)
    found = small.fxrpg_ring.grad.clone()
    small.zero_grad()
    return found


def backward(small: nn.Module) -> None:
    small(torch.ones(3, 24)).square().sum().backward()


@pytest.mark.parametrize("dof", [37, 320, 576, 2_000])
def test_gradient_is_the_reference_s(dof):
    small = model(dof)
    reference = expected(small, backward)
    backward(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


def test_no_ring_sized_gradient_for_each_layer():
    dense = nn.Sequential(*(nn.Linear(128, 128) for _ in range(12)))
    small = fxrpg.transform(dense, dof=100_000, plan=[fxrpg.Rule("*", "generate")])
    loss = small(torch.ones(3, 128)).sum()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    size = small.fxrpg_ring.nbytes
    events = profile.profiler.kineto_results.events()
    assert sum(event.nbytes() >= size for event in events if event.name() == "[memory]") == 1


def test_several_backwards_of_one_graph():
    small = model()
    reference = expected(small, backward)
    loss = small(torch.ones(3, 24)).square().sum()
    for times in (1, 2, 3):
        loss.backward(retain_graph=times < 3)
        torch.testing.assert_close(small.fxrpg_ring.grad, times * reference)


def test_graphs_that_live_together():
    small = model()
    reference = expected(small, backward)
    losses = [small(torch.ones(3, 24)).square().sum() for _ in range(3)]
    for loss in reversed(losses):
        loss.backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, 3 * reference)


def test_grad_of_some_inputs():
    small, x = model(), torch.ones(3, 24, requires_grad=True)
    reference = expected(small, backward)
    loss = small(x).square().sum()
    (dx,) = torch.autograd.grad(loss, [x], retain_graph=True)
    ring, dx_again = torch.autograd.grad(loss, [small.fxrpg_ring, x], retain_graph=True)
    torch.testing.assert_close(ring, reference)
    assert torch.equal(dx, dx_again)
    loss.backward(inputs=[small[1].bias], retain_graph=True)
    assert small.fxrpg_ring.grad is None
    loss.backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


def test_a_backward_that_fails_leaves_nothing_behind():
    small = model()
    reference = expected(small, backward)
    x = torch.ones(3, 24, requires_grad=True)

    def fail(grad):
        raise RuntimeError("on the way")

    hidden = small[0](x)
    handle = hidden.register_hook(fail)
    loss = small[1:](hidden).square().sum()
    with pytest.raises(RuntimeError, match="on the way"):
        loss.backward(retain_graph=True)
    handle.remove()
    small.zero_grad()
    loss.backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    small = model()
    reference = expected(small, backward)
    x = torch.ones(3, 24, requires_grad=True)
    for layers in (small[:2], small[2:]):
        x = checkpoint(layers, x, use_reentrant=reentrant)
    x.square().sum().backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


def test_lowered_and_materialized_weights_in_one_graph():
    small = model()

    def run(some):
        out = some(torch.ones(3, 24)).square().sum()
        (out + some[0].weight.norm() + some[1].weight.sum() + some.fxrpg_ring.square().sum()).backward()

    reference = expected(small, run)
    run(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


def test_second_derivatives():
    def penalty(some):
        loss = some(torch.ones(3, 24)).square().sum()
        (ring,) = torch.autograd.grad(loss, [some.fxrpg_ring], create_graph=True)
        (loss + ring.square().sum()).backward()

    small = model().double()
    small.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    reference = expected(small, penalty)
    penalty(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


def test_hooks_see_the_whole_gradient_once():
    small, seen = model(), []
    reference = expected(small, backward)
    small.fxrpg_ring.register_hook(lambda grad: seen.append(grad.clone()))
    small.fxrpg_ring.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    backward(small)
    assert len(seen) == 2
    assert all(torch.allclose(grad, reference) for grad in seen)


def test_accumulation_and_steps_between():
    small = model()
    backward(small)
    first = small.fxrpg_ring.grad.clone()
    backward(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, 2 * first)
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    reference = expected(small, backward)
    backward(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)


def test_a_step_before_backward_is_noticed():
    small = model()
    loss = small(torch.ones(3, 24)).square().sum()
    with torch.no_grad():
        small.fxrpg_ring.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_put_in_another_place():
    small = model()
    kept = small(torch.ones(3, 24)).square().sum()  # its graph still reads the old numbers
    small.fxrpg_ring.data = small.fxrpg_ring.data * 2
    reference = expected(small, backward)
    backward(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)
    del kept


def test_a_graph_that_outlives_a_step():
    small = model()
    kept = small(torch.ones(3, 24)).square().sum()
    with torch.no_grad():
        small.fxrpg_ring.mul_(2)
    reference = expected(small, backward)
    backward(small)
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)
    del kept


def test_a_state_that_is_computed():
    small = model()
    names = {"fxrpg_ring": small.fxrpg_ring.detach().clone().requires_grad_()}

    def run(ring):
        return torch.func.functional_call(small, {"fxrpg_ring": ring}, (torch.ones(3, 24),)).square().sum()

    ring = names["fxrpg_ring"]
    half = ring * 0.5
    first = run(half)
    half.mul_(4)  # in place: what was read of it has another gradient than what will be
    (found,) = torch.autograd.grad(run(half), [ring])
    (twice,) = torch.autograd.grad(run(ring * 2), [ring])
    torch.testing.assert_close(found, twice)
    del first


def test_threads_with_graphs_of_their_own():
    small = model()
    reference = expected(small, backward)
    losses = [small(torch.ones(3, 24)).square().sum() for _ in range(8)]
    found: list = [None] * len(losses)

    def work(i):
        (found[i],) = torch.autograd.grad(losses[i], [small.fxrpg_ring])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(losses))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for grad in found:
        torch.testing.assert_close(grad, reference)


def test_nothing_outlives_its_graph():
    small = model()
    backward(small)
    gc.collect()
    before = sum(type(o).__name__ == "Collector" for o in gc.get_objects())
    gc.disable()
    try:
        for _ in range(5):
            backward(small)
        after = sum(type(o).__name__ == "Collector" for o in gc.get_objects())
    finally:
        gc.enable()
    assert after <= before


def test_frozen_and_recorded_states():
    ring = nn.Parameter(torch.randn(64), requires_grad=False)
    assert joined(ring) == (ring, None)
    ring.requires_grad_()
    shared, collector = joined(ring)
    assert collector is not None
    assert joined(ring)[0] is shared
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert joined(ring) == (ring, None)


def test_states_put_beside_one_another_in_memory():
    """The same address, type and shape, and other numbers."""
    small, base = model(), torch.randn(4_000)
    small.fxrpg_ring.data = base[:2_000]
    kept = small(torch.ones(3, 24)).sum()
    small.fxrpg_ring.data = base[::2]
    with torch.no_grad():
        expected = small(torch.ones(3, 24))
    torch.testing.assert_close(small(torch.ones(3, 24)).detach(), expected)
    del kept


def test_backwards_that_do_not_ask_for_the_ring_leave_and_compute_nothing():
    small, x = model(), torch.ones(3, 24, requires_grad=True)
    others = {id(o) for o in gc.get_objects() if type(o).__name__ == "Collector"}
    out = small(x)
    (collector,) = (o for o in gc.get_objects() if type(o).__name__ == "Collector" and id(o) not in others)
    for _ in range(3):
        torch.autograd.grad(out.sum(), x, retain_graph=True)
        out.sum().backward(inputs=[small[0].bias], retain_graph=True)
    assert collector._sums == {}
    assert small.fxrpg_ring.grad is None


@pytest.mark.parametrize("wanted", ["ring", "x"])
def test_batched_gradients(wanted):
    small, x = model(500, layers=2), torch.ones(24, requires_grad=True)
    target = small.fxrpg_ring if wanted == "ring" else x
    out = small(x)
    (found,) = torch.autograd.grad(out, [target], torch.eye(24), is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, [target], row, retain_graph=True)[0] for row in torch.eye(24)]
    torch.testing.assert_close(found, torch.stack(one_by_one))


def test_parameters_that_are_swapped():
    small = model()
    backward(small)
    small.zero_grad()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        small.double()
        small.load_state_dict(small.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    small(torch.ones(3, 24, dtype=torch.float64)).sum().backward()
    assert small.fxrpg_ring.grad.dtype == torch.float64


@pytest.mark.filterwarnings("ignore")  # Dynamo looks at .grad of what is no leaf
def test_compiled_autograd():
    small = model()
    reference = expected(small, backward)
    loss = small(torch.ones(3, 24)).square().sum()
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        loss.backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, reference)
