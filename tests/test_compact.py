"""quantize, prune, freeze: few bits, few numbers, packed for inference."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.fx as fx
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch_settings import deterministic

import fxrpg
from fxrpg.assemble import plan_of, weight_of
from fxrpg.checkpoint import read
from fxrpg.packing import (
    codes_of,
    pack_bits,
    pack_quantised,
    packed_size,
    read_quantised,
    spread,
    steps_of,
    unpack_bits,
)
from fxrpg.weights import scale_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])
MIXED = [fxrpg.Rule("head.*", "pranc", dof=5), fxrpg.Rule("fc.weight", fxrpg.Pemn(), dof=7)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.mid = nn.Conv2d(8, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.fc(self.norm(self.mid(self.stem(x))).relu().mean((2, 3))).relu())


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def ring(dof=101, **arguments):
    return fxrpg.transform(net(), dof=dof, **arguments)


def train(model, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2), count=4):
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def bits_of(tensor):
    """The tensor's bytes: -0.0 is not 0.0."""
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same_weights(found, expected):
    for name in plan_of(expected).views:
        assert torch.equal(bits_of(weight_of(found, name)), bits_of(weight_of(expected, name))), name


# Packing


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.data())
def test_bits_are_packed_eight_to_a_byte(mask, data):
    packed = pack_bits(torch.tensor(mask))
    assert len(packed) == -(-len(mask) // 8)
    first = data.draw(st.integers(0, len(mask)))
    count = data.draw(st.integers(0, len(mask) - first))
    assert unpack_bits(packed, first, count).tolist() == mask[first : first + count]


VALUES = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40)


@given(VALUES, st.sampled_from([4, 8]), st.integers(0, 45), st.data())
def test_quantised_values_are_within_half_a_step(values, bits, block, data):
    values = torch.tensor(values)
    packed = pack_quantised(values, bits, block)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_size(len(values), bits, block)
    cells = torch.tensor(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1)))
    found = read_quantised(packed, cells, len(values), bits, block)
    steps = steps_of(values, bits, block)
    each = spread(steps, block, len(values)).expand(len(values))
    assert torch.equal(found, (codes_of(values, steps, block) * each)[cells])
    tiny = torch.finfo(torch.float32).tiny  # below it steps lose digits
    assert bool(((found - values[cells]).abs() <= each[cells] * 0.500001 + tiny).all())
    assert codes_of(values, steps, block).abs().max() <= 2 ** (bits - 1) - 1


# quantize and freeze


RINGS = [
    fxrpg.Ring(),
    fxrpg.Ring(block=1),
    fxrpg.Ring(block=8, layout="shuffle"),
    fxrpg.Ring(block=1, layout="hash"),
    fxrpg.Ring(block=1, layout="block_diagonal"),
    fxrpg.Ring(block=16, reflect=False),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dof", [1, 2, 101, 128, 400])
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 0), (8, 7), (4, 16), (4, 1), (8, 1000)])
def test_frozen_is_quantised_bit_for_bit(bits, block, dof, training):
    quantised = fxrpg.quantize(ring(dof), bits, block=block).train(training)
    frozen = fxrpg.freeze(quantised)
    assert frozen.training == training
    assert frozen.fxrpg_ring.dtype == torch.uint8
    assert len(frozen.fxrpg_ring) == packed_size(dof, bits, block)
    assert_same_weights(frozen, quantised)
    assert torch.equal(frozen(X), quantised(X))


@pytest.mark.parametrize("method", RINGS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_layout_freezes(method, bits):
    quantised = fxrpg.quantize(ring(method=method), bits, block=10)
    frozen = fxrpg.freeze(quantised)
    assert_same_weights(frozen, quantised)
    assert not any("ring" in name for name, _ in frozen.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_frozen_models_of_other_types(dtype):
    """What is rounded is the ring in float32, in any type, as files keep it; weights round to theirs."""
    x = X.to(dtype)
    quantised = fxrpg.quantize(ring().to(dtype)).eval()
    frozen = fxrpg.freeze(quantised)
    assert_same_weights(frozen, quantised)
    assert frozen(x).dtype == dtype
    assert torch.equal(frozen(x), quantised(x))
    cast = fxrpg.freeze(fxrpg.quantize(ring())).eval().to(dtype)
    assert cast.fxrpg_ring.dtype == torch.uint8
    assert cast(x).dtype == dtype
    assert weight_of(cast, "mid.weight").dtype == dtype
    widened = weight_of(fxrpg.freeze(fxrpg.quantize(ring())), "mid.weight").to(dtype)
    torch.testing.assert_close(weight_of(cast, "mid.weight"), widened)


@pytest.mark.parametrize("method", RINGS, ids=str)
@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 0), (8, 8), (4, 8)])
def test_every_weight_is_within_half_a_step_of_its_cell(bits, block, method):
    plain = ring(method=method)
    quantised = fxrpg.quantize(plain, bits, block=block)
    steps = spread(steps_of(plain.fxrpg_ring, bits, block), block, 101).expand(101)
    for name, view in plan_of(plain).views.items():
        starts = view.generator.block_cells(view, 101, torch.device("cpu"))
        cells = (starts[:, None] + torch.arange(method.block)).flatten()[: view.count] % 101
        half = scale_of(plain.fxrpg_scale, view) * steps[cells] / 2
        error = view.to_logical(weight_of(quantised, name) - weight_of(plain, name)).abs()
        assert bool((error <= half * 1.0001).all())
        assert bool((error > half / 2).any())


@pytest.mark.parametrize("in_order", [False, True])
def test_gradients_pass_straight_through(in_order):
    plain = fxrpg.transform(net().double(), dof=101)
    for bits, block in ((8, 0), (4, 16)):
        quantised = fxrpg.quantize(plain, bits, block=block)
        for name, view in plan_of(plain).views.items():
            grad = torch.randn(view.shape, dtype=torch.float64)
            arguments = (grad, plain.fxrpg_ring, plain.fxrpg_scale)
            with deterministic(in_order):
                expected = torch.ops.fxrpg.accumulate(*arguments, view.text)
                found = torch.ops.fxrpg.accumulate(*arguments, plan_of(quantised).views[name].text)
            assert torch.equal(found, expected)
        quantised(X.double()).square().sum().backward()
        dense = fxrpg.materialize(quantised)
        dense(X.double()).square().sum().backward()
        summed = sum(
            torch.ops.fxrpg.accumulate(dense.get_parameter(name).grad, plain.fxrpg_ring, plain.fxrpg_scale, view.text)
            for name, view in plan_of(plain).views.items()
        )
        torch.testing.assert_close(quantised.fxrpg_ring.grad, summed)


def test_finetuning_moves_the_ring_in_full_precision():
    quantised = fxrpg.quantize(ring(), 4)
    before = quantised.fxrpg_ring.detach().clone()
    train(quantised)
    assert not torch.equal(quantised.fxrpg_ring, before)
    assert len(quantised.fxrpg_ring.unique()) > 90
    assert len(weight_of(quantised, "mid.weight").abs().unique()) <= 8
    assert plan_of(fxrpg.quantize(quantised, 8)).scopes[0].generator.bits == 8


@pytest.mark.parametrize(
    ("bits", "block", "size"), [(8, 0, 101 + 4), (4, 0, 51 + 4), (8, 32, 101 + 16), (4, 25, 51 + 20)]
)
def test_size_of_the_file(tmp_path, bits, block, size):
    quantised = fxrpg.quantize(ring(), bits, block=block).eval()
    frozen = fxrpg.freeze(quantised)
    assert frozen.fxrpg_ring.nbytes == size
    fxrpg.save(frozen, tmp_path / "m.safetensors")
    assert read(tmp_path / "m.safetensors").tensors["fxrpg_ring"].nbytes == size
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(frozen).bytes_stored
    assert fxrpg.ledger(frozen).dof == 101
    again = fxrpg.load(net(1), tmp_path / "m.safetensors").eval()
    assert_same_weights(again, frozen)
    assert torch.equal(again(X), quantised(X))


def test_copies_and_surroundings_of_a_frozen_model(tmp_path):
    frozen = fxrpg.freeze(fxrpg.quantize(ring(), 4)).eval()
    expected = frozen(X)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(again(X), expected)
    other = fxrpg.freeze(fxrpg.quantize(fxrpg.transform(net(1), dof=101), 4)).eval()
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other(X), expected)
    dense = fxrpg.materialize(frozen)
    assert torch.equal(dense.mid.weight, weight_of(frozen, "mid.weight"))
    assert dense.state_dict().keys() == net().state_dict().keys()
    assert {row.status for row in fxrpg.explain(frozen).rows} == {"generated", "dense"}
    frozen(X.requires_grad_()).sum().backward()  # inputs still get gradients, the state none
    assert X.grad.abs().sum() > 0
    X.requires_grad_(False).grad = None


def test_a_graph_is_quantised_and_frozen():
    graph = fxrpg.transform(fx.symbolic_trace(net()), dof=101)
    quantised = fxrpg.quantize(graph, 4).eval()
    frozen = fxrpg.freeze(quantised)
    assert torch.equal(frozen(X), quantised(X))
    assert not torch.equal(graph.eval()(X), quantised(X))
    assert torch.equal(copy.deepcopy(frozen)(X), quantised(X))
    torch.testing.assert_close(fxrpg.materialize(frozen)(X), quantised(X))


@pytest.mark.parametrize("trace", [lambda model: model, fx.symbolic_trace], ids=["module", "graph"])
def test_masks_and_rings_freeze_together(tmp_path, trace):
    mixed = train(fxrpg.transform(trace(net()), dof=101, plan=MIXED)).eval()
    quantised = fxrpg.quantize(mixed, 4)
    assert [scope.generator for scope in plan_of(quantised).scopes if scope.state != "fxrpg_ring"] == [
        scope.generator for scope in plan_of(mixed).scopes if scope.state != "fxrpg_ring"
    ]
    frozen = fxrpg.freeze(quantised)
    assert torch.equal(frozen(X), quantised(X))
    assert {name for name, _ in frozen.named_buffers()} >= {"fxrpg_ring", "fc.weight_mask"}
    assert "fc.weight_score" not in dict(frozen.named_parameters())
    assert frozen.fc.weight_mask.nbytes == 6
    assert frozen.fxrpg_alpha.requires_grad
    fxrpg.save(frozen, tmp_path / "m.safetensors")
    again = fxrpg.load(trace(net(1)), tmp_path / "m.safetensors").eval()
    assert torch.equal(again(X), frozen(X))
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(frozen).bytes_stored
    only_mask = fxrpg.freeze(mixed)  # a ring in full precision stays as it is
    assert only_mask.fxrpg_ring.requires_grad
    assert torch.equal(only_mask(X), mixed(X))


@pytest.mark.parametrize("threshold", ["layer", "global"])
def test_masks_freeze(threshold):
    masked = train(fxrpg.transform(net(), dof=9, method=fxrpg.Pemn(threshold=threshold))).eval()
    frozen = fxrpg.freeze(masked)
    assert torch.equal(frozen(X), masked(X))
    assert_same_weights(frozen, masked)
    assert all(p.requires_grad for p in frozen.parameters())
    assert fxrpg.ledger(frozen).mask_bits == fxrpg.ledger(masked).mask_bits
    assert fxrpg.ledger(frozen).bytes_stored < fxrpg.ledger(masked).bytes_stored


def test_a_state_dict_belongs_to_one_form():
    quantised = fxrpg.quantize(ring())
    frozen = fxrpg.freeze(quantised)
    for model, state in ((frozen, quantised), (quantised, frozen), (quantised, ring()), (ring(), quantised)):
        with pytest.raises(fxrpg.FxrpgError, match="must belong to this model's seed and plan"):
            model.load_state_dict(state.state_dict())


def test_layers_that_surgery_took_out():
    """Their scores are gone with them, which the plan does not know."""
    masked = fxrpg.transform(net(), dof=9, method="pemn")
    masked.head = nn.Identity()
    frozen = fxrpg.freeze(masked.eval())
    assert torch.equal(frozen(X), masked(X))
    small = fxrpg.transform(net(), dof=100, scope="layer")
    small.fc = nn.Identity()
    assert fxrpg.freeze(fxrpg.quantize(fxrpg.prune(small, 0.5))).fxrpg_ring_mid.dtype == torch.uint8


def test_frozen_requires_grad_is_kept():
    small = ring()
    small.fxrpg_ring.requires_grad_(False)
    assert not fxrpg.quantize(small).fxrpg_ring.requires_grad
    assert not fxrpg.prune(small, 0.5).fxrpg_ring.requires_grad


def test_the_argument_is_untouched():
    small = ring()
    before = copy.deepcopy(small.state_dict())
    for other in (fxrpg.quantize(small), fxrpg.prune(small, 0.5), fxrpg.freeze(fxrpg.quantize(small))):
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)


MIXED_TYPES = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fxrpg.freeze(net()), "must be a transformed model"),
        (lambda: fxrpg.quantize(net()), "must be a transformed model"),
        (lambda: fxrpg.prune(net(), 0.5), "must be a transformed model"),
        (lambda: fxrpg.freeze(ring()), "freeze: needs a mask or a quantised ring, found ring"),
        (lambda: fxrpg.freeze(ring(method="pranc")), "freeze: needs a mask or a quantised ring, found pranc"),
        (lambda: fxrpg.freeze(fxrpg.freeze(fxrpg.quantize(ring()))), "freeze: .* found a frozen one"),
        (
            lambda: fxrpg.quantize(ring(9, method="pemn")),
            r"quantize: needs a ring, found the method 'pemn'.*fxrpg.freeze",
        ),
        (lambda: fxrpg.quantize(ring(9, method="pranc")), "quantize: needs a ring, found the method 'pranc'"),
        (lambda: fxrpg.quantize(fxrpg.freeze(fxrpg.quantize(ring()))), "quantize: needs a model that is not frozen"),
        (lambda: fxrpg.prune(fxrpg.freeze(fxrpg.quantize(ring())), 0.5), "prune: needs a model that is not frozen"),
        (
            lambda: fxrpg.prune(ring(9, method="pemn"), 0.5),
            "prune: needs a ring or a PRANC basis, found the method 'pemn'",
        ),
        *[
            (lambda bits=bits: fxrpg.quantize(ring(), bits), f"bits.* must be 8.* 4.*, found {bits!r}")
            for bits in (2, 3, 16, 0, 8.0, True, "8", None)
        ],
        *[
            (lambda block=block: fxrpg.quantize(ring(), block=block), f"must be an int of 0 or more, found {block!r}")
            for block in (-1, 2.5, True, "4")
        ],
        *[
            (lambda a=a: fxrpg.prune(ring(), a), r"prune, amount: must be a float in \(0, 1\), found")
            for a in (0, 1, 0.0, 1.0, -0.1, 1.5, True, "0.5", float("nan"))
        ],
        (
            lambda: fxrpg.freeze(fxrpg.transform(MIXED_TYPES, method="pemn", dof=3)),
            "freeze: needs weights of one type where they are frozen, found torch.float32, torch.float64",
        ),
    ],
)
def test_misuse(call, message):
    with pytest.raises(fxrpg.FxrpgError, match=message):
        call()


# prune


def zeros(model, state="fxrpg_ring"):
    return model.get_parameter(state).detach() == 0


@pytest.mark.parametrize("amount", [0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("method", ["ring", "pranc"])
def test_so_many_numbers_are_zero(amount, method):
    small = ring(method=method)
    state = "fxrpg_ring" if method == "ring" else "fxrpg_alpha"
    nn.init.normal_(small.get_parameter(state))
    pruned = fxrpg.prune(small, amount)
    dead = zeros(pruned, state)
    assert int(dead.sum()) == min(round(amount * 101), 100)
    before, after = small.get_parameter(state).detach(), pruned.get_parameter(state).detach()
    assert torch.equal(after[~dead], before[~dead])
    if dead.any():
        assert before[dead].abs().max() <= before[~dead].abs().min()
    assert fxrpg.ledger(pruned).dof == 101 - int(dead.sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("method", ["ring", "pranc"])
def test_pruned_numbers_stay_zero(make, method):
    state = "fxrpg_ring" if method == "ring" else "fxrpg_alpha"
    small = ring(method=method)
    nn.init.normal_(small.get_parameter(state), std=0.1)
    pruned = fxrpg.prune(train(small), 0.4)
    dead, before = zeros(pruned, state), pruned.get_parameter(state).detach().clone()
    train(pruned, make, 10)
    assert torch.equal(zeros(pruned, state), dead)
    assert bool((pruned.get_parameter(state).detach() != before)[~dead].all())
    assert torch.equal(pruned.get_parameter(state).grad == 0, dead)


def test_gradients_of_what_is_left_are_the_plain_ones():
    small = ring()
    pruned = fxrpg.prune(small, 0.5)
    plain = copy.deepcopy(small)
    with torch.no_grad():
        plain.fxrpg_ring.mul_(~zeros(pruned))
    for model in (plain, pruned):
        model(X).square().sum().backward()
    assert torch.equal(pruned.fxrpg_ring.grad, plain.fxrpg_ring.grad * ~zeros(pruned))


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.75])
def test_files_hold_what_is_left(tmp_path, amount):
    pruned = train(fxrpg.prune(ring(), amount)).eval()
    fxrpg.save(pruned, tmp_path / "m.safetensors")
    tensors = read(tmp_path / "m.safetensors").tensors
    assert tensors["fxrpg_ring"].numel() == 101 - round(amount * 101)
    assert tensors["fxrpg_ring_kept"].nbytes == 13
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(pruned).bytes_stored
    assert fxrpg.ledger(pruned).bytes_stored < fxrpg.ledger(ring()).bytes_stored
    again = fxrpg.load(net(1), tmp_path / "m.safetensors").eval()
    assert torch.equal(again.fxrpg_ring, pruned.fxrpg_ring)
    assert torch.equal(again(X), pruned(X))
    train(again)
    assert torch.equal(zeros(again), zeros(pruned))


def test_a_state_of_nothing_but_zeros(tmp_path):
    pruned = fxrpg.prune(ring(), 0.5)
    nn.init.zeros_(pruned.fxrpg_ring)
    again = fxrpg.prune(pruned, 0.9)
    assert bool(zeros(again).all())
    assert fxrpg.ledger(again).dof == 0
    assert str(fxrpg.ledger(again))
    fxrpg.save(again.eval(), tmp_path / "m.safetensors")
    loaded = fxrpg.load(net(1), tmp_path / "m.safetensors").eval()
    assert torch.equal(loaded(X), again(X))
    quantised = fxrpg.quantize(again, 4)
    assert torch.equal(fxrpg.freeze(quantised)(X), again(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pruning_other_types(tmp_path, dtype):
    pruned = fxrpg.prune(ring().to(dtype), 0.5).eval()
    assert int(zeros(pruned).sum()) == 50
    assert pruned.fxrpg_ring.dtype == dtype
    fxrpg.save(pruned, tmp_path / "m.safetensors")
    again = fxrpg.load(net(1), tmp_path / "m.safetensors").eval()
    assert again.fxrpg_ring.dtype == dtype
    assert torch.equal(again(X.to(dtype)), pruned(X.to(dtype)))


def test_pruning_again_counts_from_the_whole():
    once = fxrpg.prune(ring(), 0.3)
    assert torch.equal(fxrpg.prune(once, 0.3).fxrpg_ring, once.fxrpg_ring)
    assert torch.equal(fxrpg.prune(once, 0.1).fxrpg_ring, once.fxrpg_ring)
    twice = fxrpg.prune(once, 0.8)
    assert int(zeros(twice).sum()) == round(0.8 * 101)
    assert bool(zeros(twice)[zeros(once)].all())


def test_each_scope_is_pruned_by_itself():
    small = fxrpg.transform(net(), dof={"mid": 100, "fc": 20}, scope="layer")
    pruned = fxrpg.prune(small, 0.5)
    assert (int(zeros(pruned, "fxrpg_ring_mid").sum()), int(zeros(pruned, "fxrpg_ring_fc").sum())) == (50, 10)


@pytest.mark.parametrize("trace", [lambda model: model, fx.symbolic_trace], ids=["module", "graph"])
def test_prune_then_quantize_then_freeze(tmp_path, trace):
    pruned = train(fxrpg.prune(train(fxrpg.transform(trace(net()), dof=101)), 0.5))
    quantised = train(fxrpg.quantize(pruned, 8, block=32)).eval()
    assert torch.equal(zeros(quantised), zeros(pruned))
    frozen = fxrpg.freeze(quantised)
    fxrpg.save(frozen, tmp_path / "frozen.safetensors")
    fxrpg.save(quantised, tmp_path / "quantised.safetensors")
    for name in ("frozen", "quantised"):
        again = fxrpg.load(trace(net(1)), tmp_path / f"{name}.safetensors").eval()
        assert_same_weights(again, quantised)
        assert torch.equal(again(X), quantised(X))


def test_pruning_on_the_meta_device_knows_no_values():
    small = fxrpg.transform(net().to("meta"), dof=101)
    pruned = fxrpg.prune(small, 0.5)
    assert pruned.fxrpg_ring.is_meta
    trained = fxrpg.prune(ring(), 0.5).eval()
    pruned.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(pruned.eval()(X), trained(X))


def test_pruning_a_mixed_model_leaves_its_masks():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [fxrpg.Rule("0.weight", fxrpg.Ring(), dof=32), fxrpg.Rule("1.*", fxrpg.Pranc(), dof=6)]
    small = fxrpg.transform(model, dof=0.5, method="pemn", plan=rules)
    small.fxrpg_alpha.detach().copy_(torch.linspace(1, 2, 6))
    pruned = fxrpg.prune(small, 0.5)
    assert [int((t == 0).sum()) for t in (pruned.fxrpg_ring, pruned.fxrpg_alpha)] == [16, 3]
    assert torch.equal(pruned.get_parameter("2.weight_score"), small.get_parameter("2.weight_score"))
