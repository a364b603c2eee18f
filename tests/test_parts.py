"""Parts of weights: what slices, transposes and reshapes leave of a generated weight is generated without the rest."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from births import births
from conformance import GENERATORS, generated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrpg
from fxrpg.lowering import Generated
from fxrpg.parts import part_of
from fxrpg.view import View
from fxrpg.weights import accumulate_gradient, generate_weight, plain_weight

ALL = [generator for examples in GENERATORS.values() for generator in examples]
ORDERS = {1: [(0,)], 2: [(0, 1), (1, 0)], 3: [(0, 1, 2), (0, 2, 1), (1, 2, 0)], 4: [(0, 2, 3, 1), (1, 2, 3, 0)]}


def part(weight: Generated, alias: torch.Tensor) -> Generated | None:
    """The part that an alias of the whole weight shows, as a rule gets it."""
    found = part_of(View.parse(weight.view), tuple(alias.shape), alias.stride(), alias.storage_offset())
    return found and Generated.of(weight.state, weight.scale, found.text)


@st.composite
def aliases(draw):
    """(generator, shape, order, steps): a weight, and what is done to it."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    order = draw(st.sampled_from(ORDERS[len(shape)]))
    steps = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 20)), max_size=3))
    return draw(st.sampled_from(ALL)), shape, order, steps


def changed(w: torch.Tensor, steps) -> torch.Tensor:
    for kind, a, b in steps:
        if not w.dim():
            return w
        axis, other = a % w.dim(), b % w.dim()
        if kind == 0:
            w = w.select(axis, b % w.shape[axis])
        elif kind == 1:
            start = b % w.shape[axis]
            w = w.narrow(axis, start, 1 + a % (w.shape[axis] - start))
        elif kind == 2:
            w = w.transpose(axis, other)
        elif kind == 3 and w.is_contiguous():
            w = w.view(-1)
        elif kind == 4:
            w = w.unsqueeze(axis)
    return w


@settings(max_examples=300, deadline=None)
@given(aliases())
def test_a_part_has_the_bits_of_the_whole(case):
    generator, shape, order, steps = case
    weight = generated(generator, shape, order, min(37, prod(shape)), torch.float32)
    whole = generate_weight(weight.state.detach(), weight.scale, weight.view).contiguous()
    alias = changed(whole, steps)
    if (found := part(weight, alias)) is None:
        return
    assert torch.equal(generate_weight(found.state.detach(), found.scale, found.view), alias)


@pytest.mark.parametrize("generator", ALL, ids=repr)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_a_part_is_that_of_the_whole(generator, deterministic):
    weight = generated(generator, (6, 4, 8), (0, 1, 2), 37, torch.float64)
    for take in (lambda w: w[2], lambda w: w[1:5], lambda w: w[3].t(), lambda w: w.view(24, 8)[5:9]):
        state = weight.state.detach().requires_grad_()
        alias = take(plain_weight(state, weight.scale, weight.view))
        grad = torch.linspace(-1, 1, alias.numel(), dtype=torch.float64).view(alias.shape)
        (expected,) = torch.autograd.grad(alias, state, grad)
        found = part(weight, take(generate_weight(weight.state.detach(), weight.scale, weight.view)))
        torch.use_deterministic_algorithms(deterministic)
        try:
            result = accumulate_gradient(grad, weight.state.detach(), weight.scale, found.view)
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("take", "known"),
    [
        (lambda w: w, True),
        (lambda w: w.t(), True),
        (lambda w: w[3], True),
        (lambda w: w[2:5], True),
        (lambda w: w.view(2, 3, 8)[1], True),
        (lambda w: w.view(2, 3, 8).transpose(0, 1), True),
        (lambda w: w[::2], False),
        (lambda w: w[:, :4], False),
        (lambda w: w[:1].expand(6, 8), False),
        (lambda w: w[2:2], False),
        (lambda w: w.as_strided((2, 8), (4, 1)), False),
        (lambda w: w.as_strided((4, 4), (12, 1)), False),
        (lambda w: torch.diagonal(w), False),
    ],
)
def test_what_is_one_run_in_logical_order(take, known):
    weight = generated(fxrpg.Ring(), (6, 8), (0, 1), 37, torch.float32)
    whole = generate_weight(weight.state.detach(), weight.scale, weight.view)
    assert (part(weight, take(whole)) is not None) is known


def test_the_order_of_a_convolution_counts():
    """In (out, kernel..., in) a filter is one run, a column of a 3 x 3 kernel is not; of 1 x 1 kernels all axes run on."""
    weight = generated(fxrpg.Ring(), (6, 4, 3, 3), (0, 2, 3, 1), 37, torch.float32)
    whole = generate_weight(weight.state.detach(), weight.scale, weight.view)
    assert part(weight, whole[2:4]) is not None
    assert part(weight, whole.flatten(1)) is None
    assert part(weight, whole[:, 0]) is None
    weight = generated(fxrpg.Ring(), (6, 4, 1, 1), (0, 2, 3, 1), 37, torch.float32)
    assert part(weight, generate_weight(weight.state.detach(), weight.scale, weight.view).flatten(1)) is not None


def test_a_text_stands_for_a_part():
    view = View.parse(generated(fxrpg.Ring(), (6, 8), (0, 1), 37, torch.float32).view).part(16, (2, 8), (0, 1))
    assert View.parse(view.text) == view
    assert view.whole.shape == (6, 8)


class Experts(nn.Module):
    """Eight matrices in one parameter, one used for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 16, 32) / 6)

    def forward(self, x):
        return sum(F.linear(x, self.w[torch.tensor(i)]) for i in (1, 6))


def transformed(**arguments):
    return fxrpg.transform(
        Experts(), plan=[fxrpg.Rule("w", "generate")], example_inputs=(torch.randn(2, 32),), **arguments
    )


def test_experts_generate_only_what_is_used(monkeypatch):
    """Whatever the number of experts, what is drawn for one is one expert's."""
    small = transformed(dof=512)
    with births(monkeypatch) as born:
        small(torch.randn(2, 32)).sum().backward()
    assert [birth.view.count for birth in born] == [16 * 32, 16 * 32]  # x needs no gradient: none in backward
    assert fxrpg.explain(small).rows[0].path == "staged"


@pytest.mark.parametrize(
    "generator", [fxrpg.Pemn(per_layer=True), fxrpg.Ring(), fxrpg.Pranc(law="khatri_rao")], ids=repr
)
def test_a_stack_of_matrices_has_the_fan_in_of_one(generator):
    dof = {"ring": 0.5, "pemn": 0.5, "pranc": 8}[generator.method]
    small = transformed(dof=dof, method=generator)
    view = fxrpg.assemble.plan_of(small).views["w"]
    assert (view.stack, view.fan_in) == (1, 32)
    deviation = fxrpg.materialize(small).w.std().item()
    expected = (2 / 32) ** 0.5 * 0.5**0.5 if generator.method == "pemn" else 1 / 6  # half of the masked ones are zero
    assert deviation == pytest.approx(expected, rel=0.1)


def test_a_stack_survives_its_file(tmp_path):
    small = transformed(dof=512)
    fxrpg.save(small, tmp_path / "m.safetensors")
    again = fxrpg.load(Experts(), tmp_path / "m.safetensors")
    x = torch.randn(2, 32)
    assert torch.equal(again(x), small(x))
    assert fxrpg.assemble.plan_of(again).views == fxrpg.assemble.plan_of(small).views


@pytest.mark.parametrize("method", [fxrpg.Ring(), fxrpg.Pranc(), fxrpg.Pranc(law="khatri_rao"), fxrpg.Pemn()], ids=repr)
def test_parts_of_a_pruned_weight(method):
    """Their elements are counted without the channels that are gone."""
    dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    small = fxrpg.transform(dense, dof=100, method=method, plan=[fxrpg.Rule("*.weight", "generate")])
    pruned = fxrpg.prune_channels(small, 0.5)
    weight, x = pruned[2].weight, torch.ones(1, pruned[2].in_features)
    whole = torch.nn.functional.linear(x, weight)
    for part in (slice(2, 4), slice(0, 3), slice(4, None)):
        torch.testing.assert_close(torch.nn.functional.linear(x, weight[part]), whole[:, part])
