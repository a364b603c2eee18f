"""The one function that chooses how an op runs, its tables, and what is told of the choice."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F
from conformance import generated
from hypothesis import given
from hypothesis import strategies as st

import fxrpg
from fxrpg.dispatch import (
    CONFIGS,
    DIRECTIONS,
    Card,
    Choice,
    Problem,
    Tile,
    card_of,
    cards,
    choices,
    choose,
    note,
    tile_of,
)
from fxrpg.fusing import decide
from fxrpg.generators.pemn import Pemn
from fxrpg.generators.pranc import Pranc
from fxrpg.generators.ring import Ring
from fxrpg.lowering import lowering_mode
from fxrpg.staging import DENSE_OPS
from fxrpg.view import View

CARD = Card(name="test", processors=100)


def problem(**changes) -> Problem:
    fields = {
        "op": "conv", "direction": "forward", "outputs": 64, "positions": 3136, "terms": 64, "taps": 9,
        "weights": 36_864, "step": 64, "dtype": torch.bfloat16,
    }  # fmt: skip
    return Problem(**fields | changes)


def test_a_reason_is_staged_with_the_reason():
    assert choose("no kernel for it", "block", CARD) == Choice(path="staged", reason="no kernel for it")
    assert choose("no kernel for it", "block", CARD, mode="fused").path == "staged"


@pytest.mark.parametrize("mode", ["staged", "materialized"])
def test_a_mode_decides(mode):
    assert choose(problem(), "block", CARD, mode=mode) == Choice(path=mode, reason=f"lowering_mode({mode!r})")


def test_a_method_with_kernels_of_its_own_is_staged():
    choice = choose(problem(), "own", CARD, mode="fused")
    assert choice.path == "staged"
    assert "no device functions" in choice.reason


def test_float64_is_staged():
    assert choose(problem(dtype=torch.float64), "block", CARD, mode="fused").path == "staged"


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": 1 << 31},
        {"direction": "state_grad", "taps": 2048, "terms": 4096, "weights": 1 << 33},
        {"op": "depthwise", "direction": "state_grad", "taps": 1 << 17, "terms": 1},
    ],
)
def test_what_32_bits_or_a_grid_do_not_count_is_staged(changes):
    assert choose(problem(**changes), "block", CARD, mode="fused").path == "staged"
    assert choose(problem(**changes | {"positions": 4096, "taps": 9}), "block", CARD, mode="fused").path == "fused"


def test_a_convolution_of_huge_images_is_staged():
    weight = generated(Ring(), (64, 64, 3, 3), (0, 2, 3, 1), 640, torch.float32)
    dense, config = DENSE_OPS[torch.ops.fxrpg.conv.default], ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    for side, large in ((8192, True), (512, False)):
        x = torch.empty(1, 64, side, side, dtype=torch.bfloat16, device="meta")
        found = dense.problem("forward", (x,), View.parse(weight.view), x.dtype, *config)
        assert isinstance(found, str) == large


def test_deterministic_gradients_are_gathered_from_one_layer():
    assert choose(problem(direction="state_grad"), "block", CARD, "fused", deterministic=True).path == "staged"
    assert choose(problem(direction="input_grad"), "block", CARD, "fused", deterministic=True).path == "fused"


def test_blocks_are_fused_until_they_are_made_too_often():
    """R * M below 8M: fused; below 27M: from a table of addresses; else staged."""
    positions = {"fused": 64 * 100, "tables": 64 * 500, "staged": 64 * 1000}
    few, more, many = (choose(problem(positions=p), "block", CARD) for p in positions.values())
    assert (few.path, few.tables) == ("fused", False)
    assert (more.path, more.tables) == ("fused", True)
    assert many.path == "staged"
    assert "made 1000 times" in many.reason


def test_elements_are_fused_only_when_made_about_once():
    assert choose(problem(positions=64), "element", CARD).path == "fused"
    assert choose(problem(positions=64 * 10), "element", CARD).path == "fused"
    assert choose(problem(positions=64 * 20), "element", CARD).path == "staged"


def test_a_layer_made_once_is_always_fused():
    """Decoding reads each weight once: writing it out first can only cost more, however large it is."""
    huge = problem(op="linear", outputs=14_336, positions=1, terms=4_096, taps=1, weights=14_336 * 4_096)
    for cost in ("block", "table", "element"):
        assert choose(huge, cost, CARD).path == "fused"


def test_few_positions_are_multiplied_without_tensor_cores():
    for positions, m in ((1, 1), (2, 2), (3, 4)):
        assert tile_of(problem(op="linear", positions=positions, taps=1), CARD).m == m
    assert tile_of(problem(op="linear", positions=4, taps=1), CARD).m == 16


def test_sums_are_cut_while_processors_idle():
    small = problem(op="linear", positions=16, outputs=64, terms=4096, taps=1, weights=64 * 4096)
    tile = tile_of(small, CARD)
    assert tile.splits > 1
    assert 4096 // tile.k // tile.splits >= 4
    assert tile_of(dataclasses.replace(small, positions=64_000), CARD).splits == 1


@given(
    op=st.sampled_from(["linear", "conv", "depthwise", "embedding"]),
    direction=st.sampled_from(DIRECTIONS),
    outputs=st.integers(1, 5000),
    positions=st.integers(1, 10**6),
    terms=st.integers(1, 5000),
    taps=st.integers(1, 49),
    bits=st.sampled_from([torch.float32, torch.bfloat16]),
    card=st.sampled_from([CARD, *cards()]),
)
def test_tiles_are_powers_of_two_that_fit(op, direction, outputs, positions, terms, taps, bits, card):
    tile = tile_of(
        problem(op=op, direction=direction, outputs=outputs, positions=positions, terms=terms, taps=taps, dtype=bits),
        card,
    )
    for side in (tile.n, tile.m, tile.k, tile.warps, tile.splits):
        assert side >= 1
        assert side & (side - 1) == 0
    assert tile.n * tile.m <= 128 * 256
    summed = positions if direction == "state_grad" else terms * taps
    assert tile.splits <= max(1, summed)


def test_the_first_row_that_fits_gives_the_tile():
    forward = {"op": "conv", "direction": "forward", "bits": 16}
    rows = [
        {**forward, "positions": 4096, "outputs": 128, "tile": {"n": 128, "m": 128, "k": 64}},
        {**forward, "positions": 0, "outputs": 0, "tile": {"n": 64, "m": 32, "k": 32}},
    ]
    card = Card(name="rows", processors=1, tiles=tuple(rows))
    assert tile_of(problem(positions=4096, outputs=128), card).n == 128
    assert tile_of(problem(positions=4095, outputs=128), card).m == 32
    assert tile_of(problem(dtype=torch.float32), card) == tile_of(
        problem(dtype=torch.float32), Card(name="", processors=1)
    )


def test_a_card_with_little_shared_memory_gets_a_shallow_pipeline():
    roomy = tile_of(problem(), CARD)
    tight = tile_of(problem(), dataclasses.replace(CARD, shared=2 * (roomy.n + roomy.m) * roomy.k * 2))
    assert (roomy.stages, tight.stages) == (3, 2)
    assert dataclasses.replace(tight, stages=3) == roomy


def test_shipped_tables_are_read():
    assert {card.name for card in cards()} == {path.stem for path in CONFIGS.glob("*.json")}
    for card in cards():
        data = json.loads((CONFIGS / f"{card.name}.json").read_text())
        assert card.target == data["target"]
        assert card.matches
        for row in card.tiles:
            assert set(row) == {"op", "direction", "bits", "positions", "outputs", "tile"}
            assert row["direction"] in DIRECTIONS
            Tile(**row["tile"])


def test_a_device_without_a_table_is_described():
    assert card_of(torch.device("cpu")).processors == 1


def test_choices_are_told_to_whoever_listens():
    note(Choice(path="staged"))
    with choices() as outer:
        note(Choice(path="fused"))
        with choices() as inner:
            note(Choice(path="staged"))
    assert [c.path for c in outer] == ["fused", "staged"]
    assert [c.path for c in inner] == ["staged"]


def test_without_kernels_everything_is_staged():
    weight = generated(Ring(), (8, 32), (0, 1), 64, torch.float32)
    dense = DENSE_OPS[torch.ops.fxrpg.linear.default]
    choice = decide(dense, "forward", [torch.zeros(4, 32)], weight.state, View.parse(weight.view), (False,))
    assert choice.path == "staged"


def conv2d(layer, x, bias=None, **options):
    return F.conv2d(x, layer.weight, bias, **options)


def linear(layer, x, bias=None):
    return F.linear(x, layer.weight, bias)


IMAGES, ROWS = torch.ones(2, 3, 6, 6), torch.ones(4, 6)
ODD_CALLS = {
    "another number of channels": (conv2d, torch.ones(2, 5, 6, 6), {}),
    "one image dimension": (conv2d, torch.ones(6, 6), {}),
    "a long bias": (conv2d, IMAGES, {"bias": torch.ones(9)}),
    "a bias of another type": (conv2d, IMAGES, {"bias": torch.ones(4).double()}),
    "a negative padding": (conv2d, IMAGES, {"padding": -1}),
    "no dilation": (conv2d, IMAGES, {"dilation": 0}),
    "no stride": (conv2d, IMAGES, {"stride": 0}),
    "groups that do not divide": (conv2d, torch.ones(2, 9, 6, 6), {"groups": 3}),
    "integer images": (conv2d, IMAGES.long(), {}),
    "another number of features": (linear, torch.ones(6, 8), {}),
    "no dimension": (linear, torch.ones(()), {}),
    "integers": (linear, ROWS.long(), {}),
    "complex numbers": (linear, ROWS.cfloat(), {}),
    "sparse rows": (linear, ROWS.to_sparse(), {}),
    "one bias for all": (linear, ROWS, {"bias": torch.ones(1)}),
    "a number as bias": (linear, ROWS, {"bias": torch.tensor(2.0)}),
    "a bias for each row": (linear, ROWS, {"bias": torch.arange(20.0).view(4, 5)}),
    "short indices": (lambda layer, x: F.embedding(x, layer.weight), torch.tensor([1], dtype=torch.int16), {}),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", ODD_CALLS)
def test_what_no_kernel_expects_is_left_to_torch(name):
    """It broadcasts, or raises its own error: a kernel would read what is not there."""
    call, x, options = ODD_CALLS[name]
    layer = torch.nn.Conv2d(3, 4, 3) if call is conv2d else torch.nn.Linear(6, 5)
    small = fxrpg.transform(layer, dof=8, plan=[fxrpg.Rule("*", "generate")])
    try:
        expected = call(fxrpg.materialize(small), x, **options)
    except (RuntimeError, ValueError) as error:
        with lowering_mode("fused"), pytest.raises(type(error), match=re.escape(str(error)[:20])):
            call(small, x, **options)
        return
    with lowering_mode("fused"):
        found = call(small, x, **options)
        found.sum().backward()
    torch.testing.assert_close(found, expected)


def test_what_a_value_costs():
    def cost(generator, shape, order=(0, 1), size=64, step=64):
        return generator.cost(View.parse(generated(generator, shape, order, size, torch.float32).view), step)

    assert cost(Ring(), (8, 64)) == "block"
    assert cost(Ring(), (8, 33)) == "element"
    assert cost(Ring(), (8, 64), size=65) == "element"
    assert cost(Ring(), (8, 64, 3, 3), (0, 2, 3, 1), step=16) == "element"
    assert cost(Ring(block=8), (8, 24), step=8) == "block"
    assert cost(Ring(block=1), (8, 64)) == "element"
    assert cost(Ring(block=1, layout="block_diagonal"), (8, 64)) == "element"
    assert cost(Pemn(), (8, 64)) == "table"
    assert cost(Pemn(permuted=True), (8, 64)) == "element"
    assert cost(Pranc(), (8, 64)) == "own"


def test_explain_tells_that_it_was_staged():
    model = fxrpg.transform(torch.nn.Linear(4, 8), dof=8, plan=[fxrpg.Rule("*", "generate")])
    with lowering_mode("staged"):
        model(torch.zeros(2, 4))
    (row,) = (row for row in fxrpg.explain(model).rows if row.status == "generated")
    assert row.path == "staged"


@pytest.mark.kernels
def test_explain_tells_that_it_was_fused():
    model = fxrpg.transform(torch.nn.Linear(4, 8), dof=8, plan=[fxrpg.Rule("*", "generate")])
    with lowering_mode("fused"):
        model(torch.zeros(2, 4))
    (row,) = (row for row in fxrpg.explain(model).rows if row.status == "generated")
    assert (row.path, row.reason) == ("fused", "lowering_mode('fused')")
    assert fxrpg.explain(model).fraction("fused") == 1.0


@pytest.mark.kernels
def test_explain_leaves_open_what_only_a_call_decides():
    """A layer that has not run, and a graph, whose ops tell nobody which way they went."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())
    for one in (model, torch.fx.symbolic_trace(model)):
        small = fxrpg.transform(one, dof=8, plan=[fxrpg.Rule("0.weight", "generate")])
        (row,) = (row for row in fxrpg.explain(small).rows if row.status == "generated")
        assert (row.path, row.reason) == ("staged", "or fused, as the shapes of a call decide")


def test_explain_of_a_model_without_its_weights():
    model = fxrpg.transform(torch.nn.Sequential(torch.nn.Linear(4, 8)), dof=8, plan=[fxrpg.Rule("*", "generate")])
    model[0] = torch.nn.Identity()
    assert fxrpg.explain(model).fraction("staged") == 0
    assert str(fxrpg.explain(model)).startswith("0 weights generated")
