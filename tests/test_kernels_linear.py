"""Matrix products with a generated weight: any shape, any tile, every form, against torch on the materialized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conformance import GENERATORS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, close, poisoned, weight_of

from fxrpg.dispatch import Tile
from fxrpg.generators.ring import Ring
from fxrpg.weights import accumulate_gradient

pytestmark = pytest.mark.kernels
GENERATORS_INLINED = [*GENERATORS["ring"], *GENERATORS["pemn"], Ring(block=64)]


@settings(max_examples=30)
@given(
    generator=st.sampled_from(GENERATORS_INLINED),
    rows=st.integers(1, 34),
    columns=st.sampled_from([1, 7, 31, 32, 33, 64]),
    positions=st.integers(1, 18),
    n=st.sampled_from([16, 32]),
    m=st.sampled_from([2, 4, 16]),
    k=st.sampled_from([16, 32, 64]),
    splits=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_products_of_any_shape_and_tile(generator, rows, columns, positions, n, m, k, splits, transposed, data):
    from fxrpg.kernels.fused.epilogue import Epilogue
    from fxrpg.kernels.fused.linear import multiply

    weight, dense = weight_of(generator, (rows, columns), size=data.draw(st.integers(1, 300)))
    x = torch.randn(positions, rows if transposed else columns, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    bias = torch.randn(columns if transposed else rows, device=DEVICE) if data.draw(st.booleans()) else None
    tile = Tile(n=n, m=m, k=k, splits=splits)
    found = multiply(weight, x, tile, transposed, Epilogue(bias=bias))
    close(found, F.linear(x, dense.t() if transposed else dense, bias))


@settings(max_examples=30)
@given(
    generator=st.sampled_from(GENERATORS_INLINED),
    rows=st.integers(1, 40),
    columns=st.sampled_from([1, 31, 32, 64, 96]),
    positions=st.integers(1, 70),
    n=st.sampled_from([16, 32]),
    k=st.sampled_from([32, 64]),
    splits=st.sampled_from([1, 3]),
)
def test_gradients_of_any_shape_and_tile(generator, rows, columns, positions, n, k, splits):
    from fxrpg.kernels.fused.linear import add_state_grad

    weight, _ = weight_of(generator, (rows, columns))
    left, right = torch.randn(positions, rows, device=DEVICE), torch.randn(positions, columns, device=DEVICE)
    found = torch.zeros(weight.state.shape, device=DEVICE)
    form = weight.form(k, torch.float32).into(found)
    add_state_grad(form, weight, left, right, Tile(n=n, m=16, k=k, splits=splits))
    expected = accumulate_gradient(left.t() @ right, weight.state, weight.scale, weight.view.text)
    if not weight.view.generator.sparse:
        close(found, expected)
    else:
        close(found * (weight.state != 0), expected)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid"])
@pytest.mark.parametrize("splits", [1, 2])
def test_epilogues(activation, splits):
    from fxrpg.epilogue import ACTIVATIONS
    from fxrpg.kernels.fused.epilogue import Epilogue
    from fxrpg.kernels.fused.linear import multiply

    weight, dense = weight_of(Ring(), (20, 64))
    x = 3 * torch.randn(7, 64, device=DEVICE)
    bias, factor, shift = (torch.randn(20, device=DEVICE) for _ in range(3))
    found = multiply(weight, x, Tile(n=16, m=16, k=32, splits=splits), False, Epilogue(bias, factor, shift, activation))
    close(found, ACTIVATIONS[activation](F.linear(x, dense, bias) * factor + shift))


@pytest.mark.parametrize("transposed", [False, True])
def test_every_element_is_written_and_nothing_else_is_read(transposed):
    """Outputs and workspaces start as NaN; what lies beyond the operands is NaN too."""
    from fxrpg.kernels.fused.linear import multiply

    weight, dense = weight_of(Ring(), (33, 96))
    terms = 33 if transposed else 96
    memory = torch.full((5 * terms + 512,), float("nan"), device=DEVICE)
    x = memory[256 : 256 + 5 * terms].view(5, terms)
    x.copy_(torch.randn(5, terms))
    for tile in (Tile(n=32, m=16, k=32), Tile(n=16, m=16, k=64, splits=2), Tile(n=16, m=8, k=32)):
        with poisoned():
            found = multiply(weight, x, tile, transposed)
        close(found, F.linear(x, dense.t() if transposed else dense))


def test_products_do_not_depend_on_what_masked_terms_hold():
    """A NaN in a cell that the tile touches but the product does not must not reach the output."""
    from fxrpg.kernels.fused.linear import multiply

    weight, _ = weight_of(Ring(block=1, permute=False, reflect=False), (4, 40), size=4 * 40 * 5)
    first = weight.view.offset
    weight.state.fill_(float("nan"))[first : first + 160] = 1.0
    out = multiply(weight, torch.ones(3, 40, device=DEVICE), Tile(n=16, m=16, k=64))
    torch.testing.assert_close(out, torch.full((3, 4), 30.0, device=DEVICE))


def test_tables_of_addresses_change_nothing():
    from fxrpg.kernels.fused.linear import multiply

    for generator in (Ring(), Ring(block=64), Ring(layout="shuffle"), Ring(reflect=False), Ring(permute=False)):
        weight, _ = weight_of(generator, (24, 64), size=640)
        x = torch.randn(5, 64, device=DEVICE)
        tile = Tile(n=16, m=16, k=32)
        assert weight._replace(tables=True).form(32, x.dtype).spec.table
        assert torch.equal(multiply(weight, x, tile), multiply(weight._replace(tables=True), x, tile))
