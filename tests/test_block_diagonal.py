"""Ring(layout="block_diagonal"): one permutation and one row of signs a weight, the same for every filter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxrpg
from fxrpg.assemble import plan_of, weight_of
from fxrpg.view import View

RING = fxrpg.Ring(block=1, layout="block_diagonal")


def view_of(rows, length, size, *, offset=0, seed=0, tensor=0, ring=RING):
    return View(
        generator=ring, seed=seed, tensor=tensor, shape=(rows, length), order=(0, 1), offset=offset,
        total=offset + rows * length, size=size,
    )  # fmt: skip


def read(view):
    """The cell that every entry reads, and its sign: int64 [rows, length] each."""
    numbers = torch.arange(1, view.size + 1, dtype=torch.float64)
    values = view.generator.materialize(numbers, view, torch.float64)
    return values.abs().long() - 1, values.sign().long()


def laps(length, size):
    """Filters until one would start where the first did."""
    return size // math.gcd(length, size)


SIZES = st.integers(1, 40)


@given(rows=SIZES, length=SIZES, size=SIZES, offset=st.integers(0, 100), seed=st.integers(0, 5))
def test_every_filter_reads_the_ring_in_the_same_order(rows, length, size, offset, seed):
    cells, signs = read(view_of(rows, length, size, offset=offset, seed=seed))
    assert bool((signs == signs[0]).all())
    row = torch.arange(rows)
    starts = offset + row * length + row // laps(length, size)
    order = (cells - starts[:, None]) % size
    assert bool((order == order[0]).all())
    # a filter reads `length` cells in a row, each as often as any other run of so many
    assert torch.equal(order[0].sort().values, (torch.arange(length) % size).sort().values)


@given(rows=st.integers(1, 120), length=SIZES, size=SIZES, offset=st.integers(0, 100))
def test_the_first_filters_all_differ(rows, length, size, offset):
    """As many as the ring has cells: however small it is against a filter, no two start in the same cell."""
    cells, _signs = read(view_of(rows, length, size, offset=offset))
    assert len(cells.unique(dim=0)) == min(rows, size)
    for one, other in itertools.pairwise(cells[:size]):
        assert not bool((one == other).any())  # not even in one place


@given(rows=st.integers(1, 120), length=SIZES, size=SIZES, offset=st.integers(0, 100))
def test_a_weight_uses_all_cells_equally(rows, length, size, offset):
    cells, _signs = read(view_of(rows, length, size, offset=offset))
    uses = cells.flatten().bincount(minlength=size)
    assert {*uses.tolist()} <= {rows * length // size, -(-rows * length // size)}


@given(shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5), size=SIZES)
def test_several_weights_use_all_cells_almost_equally(shapes, size):
    """Exactly so where no weight comes round to its first cell; else each that does may add one to the difference."""
    offset, uses, around = 0, torch.zeros(size, dtype=torch.int64), 0
    for tensor, (rows, length) in enumerate(shapes):
        cells, _signs = read(view_of(rows, length, size, offset=offset, tensor=tensor))
        uses += cells.flatten().bincount(minlength=size)
        offset += rows * length
        around += rows > laps(length, size)
    assert int(uses.sum()) == offset
    assert int(uses.max() - uses.min()) <= 1 + 2 * around


@pytest.mark.parametrize(("ring", "sorted_cells", "signed"), [
    (fxrpg.Ring(block=1, layout="block_diagonal", permute=False), True, True),
    (fxrpg.Ring(block=1, layout="block_diagonal", reflect=False), False, False),
])  # fmt: skip
def test_the_papers_ablations(ring, sorted_cells, signed):
    cells, signs = read(view_of(4, 64, 256, ring=ring))
    assert torch.equal(cells.flatten(), torch.arange(256)) == sorted_cells
    assert bool((signs < 0).any()) == signed


def test_weights_have_orders_and_signs_of_their_own():
    reads = [read(view_of(4, 64, 256, tensor=tensor, seed=seed)) for tensor in (0, 1) for seed in (0, 1)]
    for (cells, signs), (other_cells, other_signs) in itertools.combinations(reads, 2):
        assert (cells == other_cells).double().mean() < 0.1
        assert 0.2 < (signs == other_signs).double().mean() < 0.8


@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_blocks_of_elements_are_refused(block):
    with pytest.raises(fxrpg.FxrpgError, match=r"block_diagonal.* needs block=1, found block="):
        fxrpg.Ring(block=block, layout="block_diagonal")


# In models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.groups = nn.Conv2d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.table = nn.Embedding(5, 6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x, index):
        x = self.up(self.groups(self.conv(x)).relu()).mean((2, 3))
        return self.fc(x + self.table(index))


X, INDEX = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 4])
FILTERS = {
    "conv.weight": lambda w: w.flatten(1),
    "groups.weight": lambda w: w.flatten(1),
    "up.weight": lambda w: w.transpose(0, 1).flatten(1),
    "table.weight": lambda w: w,
    "fc.weight": lambda w: w,
}


@pytest.mark.parametrize("dof", [5, 40, 500])
def test_filters_of_every_kind_of_layer(dof):
    """A filter is what feeds one output; transposed convolutions keep theirs along the second axis."""
    torch.manual_seed(0)
    small = fxrpg.transform(Net(), dof=dof, method=RING, plan=[fxrpg.Rule("*")])
    nn.init.ones_(small.fxrpg_ring)
    assert {*FILTERS} == {*plan_of(small).views}
    for name, filters in FILTERS.items():
        signs = filters(weight_of(small, name)).sign()
        assert bool((signs == signs[0]).all()), name
    nn.init.normal_(small.fxrpg_ring)
    for name, filters in FILTERS.items():
        rows = filters(weight_of(small, name))
        assert len(rows.unique(dim=0)) == min(len(rows), dof), name


def test_training_and_files(tmp_path):
    torch.manual_seed(0)
    small = fxrpg.transform(Net(), dof=50, method=RING, plan=[fxrpg.Rule("*")])
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(X, INDEX), torch.tensor([0, 3]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fxrpg.save(small, tmp_path / "m.safetensors")
    again = fxrpg.load(Net(), tmp_path / "m.safetensors")
    assert torch.equal(again(X, INDEX), small(X, INDEX))
    torch.testing.assert_close(fxrpg.materialize(small)(X, INDEX), small(X, INDEX))


# arXiv:2107.07110, Appendix B


FILTER, SEEDS = 27, 1500
"""Length M of a filter (3 x 3 x 3), and how many pairs of layers."""


def cosines(ring, values):
    """Of the same filter, generated for two layers from the same cells, under many seeds: float64 [SEEDS]."""
    found = []
    for seed in range(SEEDS):
        pair = [
            ring.materialize(values, view_of(1, FILTER, FILTER, seed=seed, tensor=t, ring=ring), torch.float64)
            for t in (0, 1)
        ]
        found.append((pair[0] * pair[1]).sum() / values.square().sum())
    return torch.stack(found)


def deviations_off(sample, expected):
    """How many standard errors the mean of `sample` lies off `expected`."""
    return float(abs(sample.mean() - expected) / (sample.std() / math.sqrt(len(sample))))


VALUES = {
    "normal": lambda draw: torch.randn(FILTER, generator=draw, dtype=torch.float64),
    "positive": lambda draw: 1 + torch.rand(FILTER, generator=draw, dtype=torch.float64),
    "mostly one number": lambda draw: torch.cat([torch.tensor([3.0]), torch.rand(FILTER - 1, generator=draw)]).double(),
}


@pytest.mark.parametrize("values", VALUES)
def test_the_same_filter_of_two_layers_is_orthogonal_on_average(values):
    """Proposition 1: E <f_i, f_j> = 0. Proposition 2: E cos^2 = 1 / M. Within four standard errors, for any filter."""
    found = cosines(RING, VALUES[values](torch.Generator().manual_seed(0)))
    assert deviations_off(found, 0) < 4
    assert deviations_off(found.square(), 1 / FILTER) < 4
    # the interval is narrow enough to mean something: a tenth of what it is about, or a little more
    assert found.std() / math.sqrt(SEEDS) < 0.1 / math.sqrt(FILTER)
    assert found.square().std() / math.sqrt(SEEDS) < 0.15 / FILTER


def test_without_signs_filters_stay_alike():
    ring = fxrpg.Ring(block=1, layout="block_diagonal", reflect=False)
    values = VALUES["positive"](torch.Generator().manual_seed(0))
    found = cosines(ring, values)
    assert deviations_off(found, float(values.sum() ** 2 / FILTER / values.square().sum())) < 4
    assert found.mean() > 0.9


def test_without_a_permutation_filters_are_less_orthogonal():
    """Signs alone give E cos^2 = sum f^4 / (sum f^2)^2, which only a filter of equal magnitudes has at 1 / M."""
    ring = fxrpg.Ring(block=1, layout="block_diagonal", permute=False)
    values = VALUES["normal"](torch.Generator().manual_seed(0))
    found = cosines(ring, values)
    assert deviations_off(found, 0) < 4
    assert deviations_off(found.square(), float(values.pow(4).sum() / values.square().sum() ** 2)) < 4
    assert deviations_off(found.square(), 1 / FILTER) > 8
