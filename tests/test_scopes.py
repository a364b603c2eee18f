"""Scopes and rules: who shares a state, how large each is, and models that mix methods."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.fx as fx
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxrpg
from fxrpg.assemble import plan_of, weight_of
from fxrpg.networks import resnet18
from fxrpg.scopes import WORDS, shares

EVERYTHING = [fxrpg.Rule("*", "generate")]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    """Two stages of two blocks; `backwards` registers the parts in the opposite order."""

    def __init__(self, backwards=False):
        super().__init__()
        parts = {
            "stem": lambda: nn.Conv2d(3, 8, 3),
            "layer1": lambda: nn.Sequential(Block(8), Block(8)),
            "layer2": lambda: nn.Sequential(Block(8), Block(8)),
            "fc": lambda: nn.Linear(8, 6),
            "head": lambda: nn.Linear(6, 4),
        }
        for name in reversed(parts) if backwards else parts:
            self.add_module(name, parts[name]())

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(self.fc(x.mean((2, 3))).relu())


CONV = 8 * 8 * 9
MIXED = [
    fxrpg.Rule("head.*", "pranc", dof=5),
    fxrpg.Rule("fc.weight", fxrpg.Pemn(), dof=7),
    fxrpg.Rule("stem.*", "dense"),
]
"""Ring body, one masked layer, PRANC head."""


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def scopes_of(model):
    return {scope.name: scope for scope in plan_of(model).scopes}


def steps(model, count=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def assert_same(found, expected):
    found.eval(), expected.eval()
    assert torch.equal(found(X), expected(X))
    for name in plan_of(expected).views:
        assert torch.equal(weight_of(found, name), weight_of(expected, name)), name


# Words


@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):
        return resnet18()


def test_one_ring_for_the_model(resnet):
    small = fxrpg.transform(resnet, dof=2_359_296, scope="model")
    assert [(scope.name, scope.state, scope.size) for scope in plan_of(small).scopes] == [("", "fxrpg_ring", 2_359_296)]


def test_stages_are_the_four_rings_of_the_paper(resnet):
    """arXiv:2107.07110, Fig. 3: four local rings, one for each building block of the ResNet-18."""
    small = fxrpg.transform(resnet, dof=1.0, scope="stage")
    for i, (name, scope) in enumerate(scopes_of(small).items(), 1):
        weights = [view for path, view in plan_of(small).views.items() if path.startswith(f"{name}.")]
        assert scope.state == f"fxrpg_ring_layer{i}"
        assert small.get_parameter(scope.state).numel() == scope.size == sum(view.count for view in weights)
        assert {view.size for view in weights} == {scope.size}
        assert len(weights) == (4 if i == 1 else 5)
    assert len(scopes_of(small)) == 4
    assert fxrpg.ledger(small).dof == 11_157_504
    assert {name for name, _ in small.named_parameters() if name.startswith("fxrpg")} == {
        f"fxrpg_ring_layer{i}" for i in range(1, 5)
    }


def test_blocks_positions_and_layers(resnet):
    blocks = scopes_of(fxrpg.transform(resnet, dof=100_000, scope="block"))
    assert list(blocks) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert blocks["layer1.0"].state == "fxrpg_ring_layer1_0"
    positions = scopes_of(fxrpg.transform(resnet, dof=100_000, scope="position"))
    assert list(positions) == ["BasicBlock.conv1", "BasicBlock.conv2", "BasicBlock.downsample.0"]
    layers = scopes_of(fxrpg.transform(resnet, dof=100_000, scope="layer"))
    assert len(layers) == 19
    assert layers["layer2.0.downsample.0"].state == "fxrpg_ring_layer2_0_downsample_0"
    for scopes in (blocks, positions, layers):
        assert sum(scope.size for scope in scopes.values()) == 100_000


def test_weights_outside_of_blocks_share_a_scope(resnet):
    small = fxrpg.transform(resnet, dof=0.01, scope="block", plan=EVERYTHING)
    outside = [name for name, i in plan_of(small).scope_of.items() if plan_of(small).scopes[i].name == ""]
    assert outside == ["conv1.weight", "fc.weight"]
    assert scopes_of(small)[""].state == "fxrpg_ring"


def test_a_function_names_scopes():
    def kind(name):
        return "body" if name.startswith("layer") else "1"

    small = fxrpg.transform(net(), dof=100, scope=kind, plan=EVERYTHING)
    assert {scope.name: scope.state for scope in plan_of(small).scopes} == {
        "body": "fxrpg_ring_body", "1": "fxrpg_ring_1",
    }  # fmt: skip


@pytest.mark.parametrize("name", [None, 1, ("a",), object()], ids=repr)
def test_a_function_must_return_a_string(name):
    with pytest.raises(fxrpg.FxrpgError, match="must return a scope's name"):
        fxrpg.transform(net(), dof=100, scope=lambda _: name, plan=EVERYTHING)


def test_names_that_sound_alike_get_states_of_their_own():
    small = fxrpg.transform(net(), dof=50, scope=lambda name: "a.b" if "layer1" in name else "a_b")
    assert [scope.state for scope in plan_of(small).scopes] == ["fxrpg_ring_a_b", "fxrpg_ring_a_b_2"]
    assert plan_of(small).scope("layer1.0.conv.weight").state != plan_of(small).scope("layer2.0.conv.weight").state


# Sizes


@given(st.dictionaries(st.integers(), st.integers(1, 10_000), min_size=1, max_size=12), st.data())
def test_shares_are_exact(weights, data):
    whole = data.draw(st.integers(len(weights), sum(weights.values())))
    sizes = shares(whole, weights)
    assert sum(sizes.values()) == whole
    assert sizes.keys() == weights.keys()
    assert all(1 <= sizes[name] <= weights[name] for name in weights)
    by_weight = sorted(weights, key=weights.__getitem__)
    assert all(weights[a] == weights[b] or sizes[a] <= sizes[b] for a, b in itertools.pairwise(by_weight))


@pytest.mark.parametrize("dof", [5, 6, 97, 1000, 4 * CONV + 48])
def test_an_int_is_split_by_share_of_weights(dof):
    small = fxrpg.transform(net(), dof=dof, scope="layer")
    sizes = [scope.size for scope in plan_of(small).scopes]
    assert sum(sizes) == dof == fxrpg.ledger(small).dof
    # the four convolutions are of one size; "fc" comes first. Rings are whole blocks of 32 where they can be, but for the rest
    aligned = dof >= 32 * len(sizes)
    assert max(sizes[1:]) - min(sizes[1:]) <= (32 + dof % 32 if aligned else 1)
    assert sum(size % 32 != 0 for size in sizes) <= (1 if aligned else len(sizes))
    assert [small.get_parameter(scope.state).numel() for scope in plan_of(small).scopes] == sizes


def test_a_fraction_holds_for_each():
    small = fxrpg.transform(net(), dof=0.25, scope="stage", method=fxrpg.Ring(block=1))
    assert {scope.name: scope.size for scope in plan_of(small).scopes} == {
        "": 12, "layer1": CONV // 2, "layer2": CONV // 2,
    }  # fmt: skip


def test_a_dict_gives_each_its_own():
    small = fxrpg.transform(net(), dof={"": 3, "layer1": 0.5, "layer2": 77}, scope="stage")
    assert {scope.name: scope.size for scope in plan_of(small).scopes} == {"": 3, "layer1": CONV, "layer2": 77}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dof": {"layer1": 5, "layer2": 5}, "scope": "stage"}, r"dof: must have a size for each scope of \['', 'layer1'"),
        ({"dof": {"": 1, "layer1": 5, "layer2": 5, "x": 1}, "scope": "stage"}, "each scope .* found .*'x': 1"),
        ({"dof": {"": 1, "layer1": 5, "layer2": 9999}, "scope": "stage"}, r"dof\['layer2'\]: must be an int in \[1, 1152\]"),
        ({"dof": {"": 1, "layer1": 5, "layer2": None}, "scope": "stage"}, r"dof\['layer2'\]: .* found none"),
        ({"dof": {"layer1": 5}}, r"dof: must have a size for each scope of \[''\]"),
        ({"dof": 4, "scope": "layer"}, "dof: must be at least 5, the number of scopes, found 4"),
        ({"dof": 10**6, "scope": "layer"}, r"dof: must be an int in \[1, 2352\]"),
        ({"scope": "layer"}, "dof: must be an int .* found none"),
        ({"dof": 9, "scope": "blocks"}, r"scope: must be one of \('model', 'stage', .* or a function, found 'blocks'"),
        ({"dof": 9, "scope": ["block"]}, "scope: must be one of"),
        ({"dof": 9, "plan": [fxrpg.Rule("*", dof=3)]}, "dof: must have weights that no rule gives a state of their own"),
        ({"dof": 9, "plan": [fxrpg.Rule("fc.*", dof=49)]}, r"plan rule fc.\* -> generate, dof=49, dof: must be .*\[1, 48\]"),
        ({"dof": 9, "plan": [fxrpg.Rule("fc.*", "pranc")]}, r"plan rule fc.\* -> pranc, dof: must be .* found none"),
        ({"dof": 9, "plan": [fxrpg.Rule("fc.*", dof=3, scope="no")]}, "scope: must be one of"),
        ({"dof": 9, "plan": [fxrpg.Rule("fc.*", fxrpg.Pemn(prototype="one_layer"), dof=3)]}, "follows from the weights"),
    ],
)  # fmt: skip
def test_bad_sizes_and_scopes(arguments, message):
    with pytest.raises(fxrpg.FxrpgError, match=message):
        fxrpg.transform(net(), **arguments)


def test_a_dense_rule_has_no_size():
    for arguments in ({"dof": 3}, {"scope": "layer"}):
        with pytest.raises(fxrpg.FxrpgError, match="neither dof nor scope, found (dof=3|scope='layer')"):
            fxrpg.Rule("*", "dense", **arguments)


@pytest.mark.parametrize("scope", ["stage", "block", "position"])
def test_models_without_repeated_blocks(scope):
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    traced = fx.symbolic_trace(net())  # keeps its layers in modules that have lost their classes
    for model in (plain, traced):
        with pytest.raises(fxrpg.FxrpgError, match=f"scope='{scope}': needs a model with repeated blocks, found none"):
            fxrpg.transform(model, dof=20, scope=scope, plan=EVERYTHING)


# Rules


def test_rules_with_states_of_their_own():
    model = net()
    plan = [
        fxrpg.Rule(model.layer1[0], dof=10),
        fxrpg.Rule("re:layer1\\..*", dof=0.5),
        fxrpg.Rule(lambda name, p: p.dim() == 2, scope="layer", dof=6),
    ]
    small = fxrpg.transform(model, dof=100, plan=plan)
    assert {scope.state: scope.size for scope in plan_of(small).scopes} == {
        "fxrpg_ring_lambda_fc": 4, "fxrpg_ring_lambda_head": 2, "fxrpg_ring_Block": 10, "fxrpg_ring_layer1": CONV // 2,
        "fxrpg_ring": 100,
    }  # fmt: skip
    assert plan_of(small).state_of("layer2.1.conv.weight") == "fxrpg_ring"


def test_a_rule_without_a_size_takes_the_models_fraction():
    plan = [fxrpg.Rule("head.weight", "pranc"), fxrpg.Rule("fc.weight", fxrpg.Pemn(prototype="one_layer"))]
    small = fxrpg.transform(net(), dof=0.5, plan=plan)
    assert [scope.size for scope in plan_of(small).scopes] == [48, 12, 2 * CONV]
    assert [scope.state for scope in plan_of(small).scopes] == ["_score", "fxrpg_alpha", "fxrpg_ring"]


@pytest.mark.parametrize("trace", [lambda model: model, fx.symbolic_trace], ids=["module", "graph"])
def test_three_methods_in_one_model(tmp_path, trace):
    small = fxrpg.transform(trace(net()), dof=300, scope=lambda name: name[:6], plan=MIXED)
    states = {"fxrpg_ring_layer1": 172, "fxrpg_ring_layer2": 128, "fxrpg_alpha": 5, "fc.weight_score": 48}
    assert {name: small.get_parameter(name).numel() for name in plan_of(small).states} == states
    start = {name: small.get_parameter(name).detach().clone() for name in states}
    before = nn.functional.cross_entropy(small(X), Y)
    steps(small, 8)
    assert nn.functional.cross_entropy(small(X), Y) < before
    assert all(not torch.equal(small.get_parameter(name), value) for name, value in start.items())

    ledger = fxrpg.ledger(small)
    assert (ledger.dof, ledger.mask_bits, ledger.generated) == (300 + 5 + 7, 48, 4 * CONV + 48 + 24 + 4)
    rows = {row.name: row for row in fxrpg.explain(small).rows}
    assert {name for name, row in rows.items() if row.status == "generated"} == {
        *(f"layer{i}.{j}.conv.weight" for i in (1, 2) for j in (0, 1)), "fc.weight", "head.weight", "head.bias",
    }  # fmt: skip
    assert rows["fc.weight"].path == "staged"
    assert rows["stem.weight"].reason == "rule stem.* -> dense"

    small.eval()
    fxrpg.save(small, tmp_path / "mixed.safetensors")
    assert (tmp_path / "mixed.safetensors").stat().st_size == ledger.bytes_stored
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    again = fxrpg.transform(trace(net(1)), dof=300, scope=lambda name: name[:6], plan=MIXED)
    again.load_state_dict(small.state_dict())
    for other in (
        fxrpg.load(trace(net(1)), tmp_path / "mixed.safetensors"), again, copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)), torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert_same(other, small)
        assert fxrpg.ledger(other) == fxrpg.ledger(small)
    dense = fxrpg.materialize(small)
    assert dense.state_dict().keys() == net().state_dict().keys()
    torch.testing.assert_close(dense(X), small(X), rtol=1e-5, atol=1e-5)


# States and views


def test_rings_of_different_scopes_start_with_different_values():
    small = fxrpg.transform(net(), dof=400, method=fxrpg.Ring(block=1), scope="block")
    rings = [small.get_parameter(scope.state) for scope in plan_of(small).scopes if scope.name]
    for one, other in itertools.combinations(rings, 2):
        assert one.shape == other.shape
        assert not torch.isclose(one, other).any()


def test_views_of_different_scopes_differ():
    small = fxrpg.transform(net(), dof=400, scope="block", method=fxrpg.Ring(block=1))
    with torch.no_grad():  # the same numbers in all rings, so that only the views differ
        for scope in plan_of(small).scopes:
            small.get_parameter(scope.state).copy_(torch.arange(1.0, scope.size + 1))
    weights = [weight_of(small, f"layer{i}.{j}.conv.weight") for i in (1, 2) for j in (0, 1)]
    scaled = [weight / weight.abs().max() for weight in weights]
    for one, other in itertools.combinations(scaled, 2):
        assert torch.isclose(one.abs(), other.abs()).double().mean() < 0.05
        assert 0.4 < (one.sign() == other.sign()).double().mean() < 0.6


@pytest.mark.parametrize("scope", WORDS)
def test_the_order_of_modules_changes_no_weight(scope):
    torch.manual_seed(0)
    forward, backward = Net(), Net(backwards=True)
    backward.load_state_dict(forward.state_dict())
    plan = [fxrpg.Rule("fc.weight", dof=6), fxrpg.Rule("head.weight", "pranc", dof=6), *EVERYTHING]
    one, other = (fxrpg.transform(model, dof=300, scope=scope, plan=plan) for model in (forward, backward))
    assert list(plan_of(one).views) != list(plan_of(other).views)
    assert plan_of(one).views == plan_of(other).views
    assert plan_of(one).scopes == plan_of(other).scopes
    assert plan_of(one).digest() == plan_of(other).digest()
    assert_same(other, one)


@pytest.mark.parametrize("scope", WORDS)
def test_files_of_scoped_models(tmp_path, scope):
    small = steps(fxrpg.transform(net(), dof=300, scope=scope, method="pranc")).eval()
    fxrpg.save(small, tmp_path / "m.safetensors")
    again = fxrpg.load(net(1), tmp_path / "m.safetensors")
    assert plan_of(again).scopes == plan_of(small).scopes
    assert_same(again, small)
    other = fxrpg.transform(net(), dof=300, scope="model" if scope != "model" else "layer", method="pranc")
    with pytest.raises(fxrpg.FxrpgError, match="must belong to this model's seed and plan"):
        other.load_state_dict(small.state_dict())


def test_graphs_have_scopes():
    torch.manual_seed(0)
    plan = [fxrpg.Rule("fc.*", dof=5), *EVERYTHING]
    model = net()
    small = fxrpg.transform(model, dof=200, scope="layer", plan=plan)
    graph = fxrpg.transform(fx.symbolic_trace(model), dof=200, scope="layer", plan=plan)
    assert {scope.state: scope.size for scope in plan_of(graph).scopes} == {
        scope.state: scope.size for scope in plan_of(small).scopes
    }
    torch.testing.assert_close(graph(X), small(X))
    graph(X).sum().backward()
    assert all(graph.get_parameter(scope.state).grad.abs().sum() > 0 for scope in plan_of(graph).scopes)


def test_tied_weights_belong_to_the_scope_of_their_first_name():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.layer2[1].conv.weight = self.layer1[0].conv.weight

    torch.manual_seed(0)
    small = fxrpg.transform(Tied(), dof=300, scope="stage")
    assert plan_of(small).state_of("layer1.0.conv.weight") == "fxrpg_ring_layer1"
    assert "layer2.1.conv.weight" not in plan_of(small).views
    assert plan_of(small).names["layer1.0.conv.weight"] == ("layer1.0.conv.weight", "layer2.1.conv.weight")
    ring = small.fxrpg_ring_layer1
    small.layer2[1].conv.weight.square().sum().backward()
    assert ring.grad.abs().sum() > 0
    assert small.fxrpg_ring_layer2.grad is None


# Stacked sub-networks


class Hourglass(nn.Module):
    """Down, across and up again, with batch norms of its own."""

    def __init__(self, width):
        super().__init__()
        self.down = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.across = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.up = nn.ConvTranspose2d(width, width, 2, 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x):
        skip = x
        for layer, norm in zip((self.down, self.across, self.up), self.norms, strict=True):
            x = norm(layer(x)).relu()
        return skip + x


class Stacked(nn.Module):
    def __init__(self, stacks, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.stacks = nn.ModuleList(Hourglass(width) for _ in range(stacks))
        self.heads = nn.ModuleList(nn.Conv2d(width, 2, 1) for _ in range(stacks))

    def forward(self, x):
        x, maps = self.stem(x), []
        for stack, head in zip(self.stacks, self.heads, strict=True):
            x = stack(x)
            maps.append(head(x))
        return torch.stack(maps)


STACK = 2 * 8 * 8 * 9 + 8 * 8 * 4
HOW = {
    "rule": lambda stacks: {"plan": [fxrpg.Rule("stacks.*", dof=1 / stacks), fxrpg.Rule("*", "dense")]},
    "scope": lambda stacks: {
        "scope": "stage", "dof": STACK, "plan": [fxrpg.Rule("stacks.*"), fxrpg.Rule("*", "dense")],
    },
}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("stacks", [2, 4])
def test_stacked_sub_networks_from_a_ring_the_size_of_one(how, stacks):
    """arXiv:2107.07110, Section 4 and 5.3: hourglasses in a row from one ring as large as one of them."""
    torch.manual_seed(0)
    model = Stacked(stacks)
    small = fxrpg.transform(model, **HOW[how](stacks))
    (scope,) = plan_of(small).scopes
    assert small.get_parameter(scope.state).numel() == scope.size == STACK
    assert fxrpg.ledger(small).ratio == stacks
    assert len({id(norm) for stack in small.stacks for norm in stack.norms}) == 3 * stacks
    out = small(X)
    assert out.shape == (stacks, 4, 2, 8, 8)

    for part in ("down", "across", "up"):
        names = [f"stacks.{i}.{part}.weight" for i in range(stacks)]
        assert {plan_of(small).state_of(name) for name in names} == {scope.state}
        for one, other in itertools.combinations([weight_of(small, name) for name in names], 2):
            assert torch.isclose(one, other).double().mean() < 0.05

    out.square().mean().backward()
    total = small.get_parameter(scope.state).grad
    dense = fxrpg.materialize(small)
    for norm, theirs in zip(small.modules(), dense.modules(), strict=True):
        if isinstance(norm, nn.BatchNorm2d):
            theirs.running_mean, theirs.running_var = norm.running_mean.clone(), norm.running_var.clone()
    dense(X).square().mean().backward()
    summed = sum(
        torch.ops.fxrpg.accumulate(
            dense.get_parameter(name).grad, small.get_parameter(scope.state), small.fxrpg_scale, view.text
        )
        for name, view in plan_of(small).views.items()
    )
    torch.testing.assert_close(total, summed, rtol=1e-4, atol=1e-6)


def test_each_stack_reads_every_cell():
    """The ring is as large as a stack, which is a whole number of blocks: each stack reads each cell once."""
    small = fxrpg.transform(Stacked(4), **HOW["rule"](4))
    (scope,) = plan_of(small).scopes
    ring = small.get_parameter(scope.state)
    nn.init.ones_(ring)
    for stack in small.stacks:
        ring.grad = None
        for layer in (stack.down, stack.across, stack.up):
            (layer.weight / layer.weight.detach()).sum().backward()  # a one for each use of a cell
        torch.testing.assert_close(ring.grad, torch.ones_like(ring))


def test_a_rule_of_the_models_own_method_shares_its_state():
    small = fxrpg.transform(net(), dof=30, method="pranc", plan=[fxrpg.Rule("layer1.*", "pranc")])
    assert [(scope.name, scope.size) for scope in plan_of(small).scopes] == [("", 30)]
    apart = fxrpg.transform(net(), dof=30, method="pranc", plan=[fxrpg.Rule("layer1.*", "pranc", dof=4)])
    assert sorted(scope.size for scope in plan_of(apart).scopes) == [4, 30]
