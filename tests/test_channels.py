"""prune_channels: whole channels leave the model; what is left computes what the full model would without them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxrpg
from fxrpg import FxrpgError
from fxrpg.assemble import plan_of, weight_of
from fxrpg.networks import resnet18

EVERYTHING = [fxrpg.Rule("*", "generate")]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def kept(model):
    """Path -> (how many outputs are left, how many inputs); 0 where all are."""
    return {path: tuple(map(len, sides)) for path, sides in plan_of(model).channels.items()}


def masked(full, pruned):
    """`full` with weights as they are, but nothing that reads a channel which `pruned` has lost."""
    dense = fxrpg.materialize(full)
    with torch.no_grad():
        for path, (_outputs, inputs) in plan_of(pruned).channels.items():
            if inputs:
                weight = dense.get_submodule(path).weight
                lost = [i for i in range(weight.shape[1]) if i not in inputs]
                weight[:, lost] = 0
    return dense


def settled(model):
    """Batch norms with statistics and parameters that tell channels apart."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def transformed(model, **arguments):
    arguments = {"dof": 0.5, "plan": EVERYTHING} | arguments
    return fxrpg.transform(settled(model), **arguments).eval()


def cut(weight, sides):
    for axis, index in enumerate(sides):
        if index:
            weight = weight.index_select(axis, torch.tensor(index))
    return weight


def assert_slices(pruned, full):
    """Every parameter and buffer is a slice of that of the full model."""
    models = [fxrpg.materialize(model) for model in (pruned, full)]
    for path, (outputs, inputs) in plan_of(pruned).channels.items():
        small, large = (model.get_submodule(path) for model in models)
        assert torch.equal(small.weight, cut(large.weight, (outputs, inputs))), path
        for name in ("bias", "running_mean", "running_var"):
            if getattr(large, name, None) is not None:
                assert torch.equal(getattr(small, name), cut(getattr(large, name), (outputs,))), (path, name)


# The ResNet-18 of the paper


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return transformed(resnet18(10), dof=100_000, plan=())


@pytest.fixture(scope="module")
def pruned_resnet(resnet):
    return fxrpg.prune_channels(resnet, 0.3)


def test_resnet18_loses_the_inner_channels_of_its_blocks(resnet, pruned_resnet):
    """30% of what a block keeps to itself; where a branch is added, channels stay."""
    expected = {}
    for i, stage in enumerate(("layer1", "layer2", "layer3", "layer4")):
        left = (64 << i) - int(0.3 * (64 << i))
        for j in range(2):
            expected |= {
                f"{stage}.{j}.conv1": (left, 0),
                f"{stage}.{j}.bn1": (left, 0),
                f"{stage}.{j}.conv2": (0, left),
            }
    assert kept(pruned_resnet) == expected
    assert_slices(pruned_resnet, resnet)
    for path, (outputs, _) in plan_of(pruned_resnet).channels.items():
        if path.endswith("conv1"):
            norms = weight_of(resnet, f"{path}.weight").abs().sum((1, 2, 3))
            lost = [i for i in range(len(norms)) if i not in outputs]
            assert norms[lost].max() <= norms[list(outputs)].min()
    block = pruned_resnet.layer1[0]
    assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (45, 45, 45)
    assert torch.equal(pruned_resnet.fxrpg_ring, resnet.fxrpg_ring)


def test_resnet18_computes_as_without_those_channels(resnet, pruned_resnet):
    x = normal(2, 3, 32, 32)
    torch.testing.assert_close(pruned_resnet(x), masked(resnet, pruned_resnet)(x), rtol=1e-4, atol=1e-4)


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def test_resnet18_does_fewer_operations(resnet, pruned_resnet):
    """arXiv:2107.07110, Appendix A, Table 7: 30% fewer."""
    x = normal(1, 3, 32, 32)
    ratio = flops(pruned_resnet, x) / flops(resnet, x)
    assert 0.70 < ratio < 0.75
    assert flops(fxrpg.materialize(pruned_resnet), x) == flops(pruned_resnet, x)
    assert fxrpg.ledger(pruned_resnet).generated / fxrpg.ledger(resnet).generated == pytest.approx(0.7, abs=0.01)


def test_resnet18_trains_on_and_comes_back_from_a_file(pruned_resnet, tmp_path):
    model, x = copy.deepcopy(pruned_resnet).train(), normal(2, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert not torch.equal(model.fxrpg_ring, pruned_resnet.fxrpg_ring)
    model.eval()
    fxrpg.save(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(model).bytes_stored
    with torch.device("meta"):
        fresh = resnet18(10)
    again = fxrpg.load(fresh, tmp_path / "m.safetensors").eval()
    assert fresh.layer1[0].conv1.out_channels == 64
    assert torch.isfinite(model(x)).all()
    assert torch.equal(again(x), model(x))
    assert str(again) == str(model)


# Every kind of layer


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(32, 10), nn.Linear(10, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.dropout(F.adaptive_avg_pool2d(F.gelu(self.conv2(x)), 2), 0.5, self.training)
        return self.fc2(torch.sigmoid(self.fc1(torch.flatten(x, 1))).relu())


class Branches(nn.Module):
    """One layer's outputs read by two others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3)
        self.left, self.right = nn.Conv1d(8, 4, 1), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.left(x) + self.right(x)


def separable(before, after):
    return (
        nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False),
        nn.BatchNorm2d(before), nn.ReLU6(), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU6(),
    )  # fmt: skip


IMAGE, ROW, ROWS = (2, 3, 10, 10), (5, 4), (2, 3, 4)
MODELS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.PReLU(), nn.Dropout(), nn.Linear(6, 3)
        ),
        ROW,
        {"0": (4, 0), "1": (4, 0), "3": (3, 4), "6": (0, 3)},
    ),
    "conv flatten linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 3)),
        IMAGE,
        {"0": (3, 0), "1": (3, 0), "4": (0, 48)},
    ),
    "pooled": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3)
        ),
        IMAGE,
        {"0": (3, 0), "3": (3, 0), "4": (0, 3)},
    ),
    "tokens flattened": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)),
        ROWS,
        {"0": (4, 0), "3": (0, 12)},
    ),
    "separable": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), *separable(8, 10), *separable(10, 12), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(12, 3)),
        IMAGE,
        {"0": (4, 0), "1": (4, 0), "2": (4, 0), "4": (5, 4), "5": (5, 0), "7": (5, 0), "8": (5, 0), "10": (6, 5),
         "11": (6, 0), "15": (0, 6)},
    ),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Residual(), Residual(), nn.Conv2d(4, 4, 1)),
        IMAGE,
        {f"{i}.{name}": sides for i in (1, 2) for name, sides in
         {"conv1": (2, 0), "bn1": (2, 0), "conv2": (0, 2)}.items()},
    ),
    "functional": (Functional, IMAGE, {"conv1": (3, 0), "conv2": (4, 3), "fc1": (5, 16), "fc2": (0, 5)}),
    "branches": (Branches, (2, 3, 9), {"first": (4, 0), "left": (0, 4), "right": (0, 4)}),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.InstanceNorm3d(4, affine=True), nn.Upsample(scale_factor=2),
                              nn.Conv3d(4, 2, 2)),
        (2, 2, 4, 4, 4),
        {"0": (2, 0), "1": (2, 0), "3": (0, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_computes_as_without_the_rest(name):
    make, shape, expected = MODELS[name]
    torch.manual_seed(1)
    full = transformed(make().double())
    pruned = fxrpg.prune_channels(full, 0.5)
    assert kept(pruned) == expected
    assert_slices(pruned, full)
    x = normal(*shape, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), masked(full, pruned)(x), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(pruned(x), full(x))


METHODS = {
    "ring": {},
    "element-wise ring": {"method": fxrpg.Ring(block=1, layout="shuffle")},
    "block-diagonal ring": {"method": fxrpg.Ring(block=1, layout="block_diagonal")},
    "quantised ring": {"method": fxrpg.Ring(bits=8)},
    "pranc": {"method": "pranc", "dof": 20},
    "pranc with norms": {"method": fxrpg.Pranc(norms=True), "dof": 20},
    "pranc of rank one": {"method": fxrpg.Pranc(law="khatri_rao"), "dof": 20},
    "pemn": {"method": "pemn"},
    "pemn with one threshold": {"method": fxrpg.Pemn(threshold="global", permuted=True)},
    "one-layer pemn": {"method": fxrpg.Pemn(prototype="one_layer"), "dof": None},
    "three methods": {
        "plan": [fxrpg.Rule("0.*", "pranc", dof=9), fxrpg.Rule("4.*", "pemn", dof=9), *EVERYTHING], "dof": 0.5,
    },
    "default plan": {"plan": ()},
}  # fmt: skip


def middle():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, tmp_path):
    torch.manual_seed(1)
    full = transformed(middle().double(), **METHODS[name])
    pruned = fxrpg.prune_channels(full, 0.5)
    assert kept(pruned) == {
        "0": (3, 0), "1": (3, 0), "3": (3, 0), "4": (4, 3), "5": (4, 0), "9": (3, 16), "11": (0, 3),
    }  # fmt: skip
    assert_slices(pruned, full)
    x = normal(*IMAGE, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), masked(full, pruned)(x), rtol=1e-10, atol=1e-12)

    pruned(x).square().sum().backward()
    dense = fxrpg.materialize(pruned)
    dense(x).square().sum().backward()
    sums = {}
    for weight, view in plan_of(pruned).views.items():
        state = plan_of(pruned).state_of(weight)
        arguments = dense.get_parameter(weight).grad, pruned.get_parameter(state), pruned.fxrpg_scale, view.text
        sums[state] = sums.get(state, 0) + torch.ops.fxrpg.accumulate(*arguments)
    for state, expected in sums.items():
        torch.testing.assert_close(pruned.get_parameter(state).grad, expected)

    torch.optim.SGD(pruned.parameters(), lr=1e-2).step()
    fxrpg.save(pruned, tmp_path / "m.safetensors")
    again = fxrpg.load(middle(), tmp_path / "m.safetensors").eval()
    other = fxrpg.prune_channels(full, 0.5)
    other.load_state_dict(pruned.state_dict())
    for copied in (again, other, copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(copied(x), pruned(x))
        assert plan_of(copied).digest() == plan_of(pruned).digest()
    with pytest.raises(fxrpg.FxrpgError, match="must belong to this model's seed and plan"):
        full.load_state_dict(pruned.state_dict())


def test_pruning_twice():
    torch.manual_seed(1)
    full = transformed(middle().double())
    once = fxrpg.prune_channels(full, 0.3)
    twice = fxrpg.prune_channels(once, 0.4)
    assert kept(once)["4"] == (6, 5)
    assert kept(twice)["4"] == (4, 3)
    for path, sides in plan_of(twice).channels.items():
        for now, before in zip(sides, plan_of(once).channels[path], strict=True):
            assert set(now) <= set(before)
    assert_slices(twice, full)
    x = normal(*IMAGE, dtype=torch.float64)
    torch.testing.assert_close(twice(x), masked(full, twice)(x), rtol=1e-10, atol=1e-12)


def test_one_channel_stays_and_none_may_go():
    torch.manual_seed(1)
    full = transformed(middle())
    assert kept(fxrpg.prune_channels(full, 0.999))["4"] == (1, 1)
    little = fxrpg.prune_channels(full, 0.01)
    assert torch.equal(little(normal(*IMAGE)), full(normal(*IMAGE)))


def test_equal_norms_keep_the_first_channels():
    model = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    nn.init.ones_(model[0].weight)
    pruned = fxrpg.prune_channels(fxrpg.transform(model, dof=5), 0.5)
    assert plan_of(pruned).channels["0"] == ((0, 1, 2), ())


def test_with_every_other_way_to_make_it_smaller(tmp_path):
    torch.manual_seed(1)
    full, x = transformed(middle()), normal(*IMAGE)
    quantised = fxrpg.quantize(fxrpg.prune(fxrpg.prune_channels(full, 0.5), 0.3), 8)
    frozen = fxrpg.freeze(quantised)
    assert torch.equal(frozen(x), quantised(x))
    fxrpg.save(frozen, tmp_path / "m.safetensors")
    assert torch.equal(fxrpg.load(middle(), tmp_path / "m.safetensors").eval()(x), frozen(x))
    later = fxrpg.prune_channels(fxrpg.freeze(fxrpg.quantize(full, 8)), 0.5)
    assert fxrpg.ledger(later).generated == fxrpg.ledger(frozen).generated
    assert fxrpg.ledger(frozen).dof <= fxrpg.ledger(full).dof


def test_what_the_tables_say():
    torch.manual_seed(1)
    full = transformed(middle())
    pruned = fxrpg.prune_channels(full, 0.5)
    rows = {row.name: row.shape for row in fxrpg.explain(pruned).rows}
    assert rows["4.weight"] == (4, 3, 3, 3)
    assert rows["4.bias"] == (4,)
    ledger = fxrpg.ledger(pruned)
    assert ledger.generated == sum(
        p.numel() for n, p in fxrpg.materialize(pruned).named_parameters() if n in plan_of(pruned).views
    )
    assert ledger.dof == fxrpg.ledger(full).dof
    assert fxrpg.ledger(full).generated == fxrpg.ledger(transformed(middle())).generated
    assert full[4].out_channels == 8  # the argument is untouched
    with pytest.raises(fxrpg.FxrpgError, match="fit: must be a model .* with all its channels"):
        fxrpg.fit(pruned, middle())


# What is left alone


class Twice(nn.Module):
    """A layer called twice, two tied layers, and a layer whose weight is also used directly."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        if kind == "tied":
            self.b.weight = self.a.weight
        if kind == "module":
            self.b = self.a

    def forward(self, x):
        if self.kind == "called":
            return self.b(self.a(self.a(x)))
        if self.kind == "direct":
            return F.linear(self.b(self.a(x)), self.a.bias[None].expand(4, 4))
        return self.b(self.a(x))


class Odd(nn.Module):
    """Something that is not known to treat channels one by one stands between two layers."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first, self.second = first or nn.Conv2d(3, 8, 3), second or nn.Conv2d(8, 4, 3)
        self.between = between if isinstance(between, nn.Module) else None
        self.function = None if self.between else between

    def forward(self, x):
        return self.second((self.between or self.function)(self.first(x)))


def normed(layer, norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(layer)


ALONE = {
    "called twice": lambda: Twice("called"),
    "tied": lambda: Twice("tied"),
    "one module with two names": lambda: Twice("module"),
    "used directly": lambda: Twice("direct"),
    "group norm": lambda: Odd(nn.GroupNorm(2, 8)),
    "softmax": lambda: Odd(lambda x: x.softmax(1)),
    "cat": lambda: Odd(lambda x: torch.cat([x, x], 1), second=nn.Conv2d(16, 4, 3)),
    "shuffle": lambda: Odd(nn.ChannelShuffle(2)),
    "permute": lambda: Odd(lambda x: x.permute(0, 2, 3, 1), second=nn.Linear(8, 2)),
    "a linear layer along an image's rows": lambda: Odd(nn.ReLU(), second=nn.Linear(8, 2)),
    "flattened in part": lambda: Odd(nn.Flatten(1, 2), second=nn.Linear(8, 2)),
    "flattened in part by a function": lambda: Odd(lambda x: torch.flatten(x, 1, 2), second=nn.Linear(8, 2)),
    "a norm over pixels": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(512), nn.Linear(512, 2)
    ),
    "pooling along features": lambda: Odd(nn.MaxPool1d(3, 1, 1), nn.Linear(4, 8), nn.Linear(8, 2)),
    "instance norm along features": lambda: Odd(nn.InstanceNorm1d(8), nn.Linear(4, 8), nn.Linear(8, 2)),
    "a convolution over features": lambda: Odd(nn.ReLU(), nn.Linear(4, 8), nn.Conv1d(8, 2, 1)),
    "groups": lambda: Odd(nn.ReLU(), second=nn.Conv2d(8, 4, 3, groups=2)),
    "transposed": lambda: Odd(nn.ReLU(), second=nn.ConvTranspose2d(8, 4, 3)),
    "weight_norm reads": lambda: Odd(nn.ReLU(), second=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 3))),
    "weight_norm writes": lambda: Odd(nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
    "old weight_norm reads": lambda: Odd(nn.ReLU(), second=normed(nn.Conv2d(8, 4, 3), nn.utils.weight_norm)),
    "old weight_norm writes": lambda: Odd(nn.ReLU(), normed(nn.Conv2d(3, 8, 3), nn.utils.weight_norm)),
    "only one layer": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_left_alone(name):
    plan = [fxrpg.Rule(lambda _, p: p.dim() > 1)]
    small = fxrpg.transform(ALONE[name](), dof=4, plan=plan)
    with pytest.raises(fxrpg.FxrpgError, match="prune_channels: needs layers whose outputs only other layers read"):
        fxrpg.prune_channels(small, 0.5)


# Refused


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x) if x.sum() > 0 else x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fxrpg.prune_channels(middle(), 0.5), "must be a transformed model"),
        (
            lambda: fxrpg.prune_channels(transformed(Branching()), 0.5),
            r"prune_channels: needs a model that torch.fx can trace, found TraceError: .*Use fxrpg.prune",
        ),
        (
            lambda: fxrpg.prune_channels(fxrpg.transform(fx.symbolic_trace(middle()), dof=9), 0.5),
            "prune_channels: needs a module with its layers, found a graph module",
        ),
        (lambda: fxrpg.prune_channels(transformed(middle().to("meta")), 0.5), "prune_channels, .*: must hold values"),
        *[
            (lambda a=a: fxrpg.prune_channels(transformed(middle()), a), r"amount: must be a float in \(0, 1\), found")
            for a in (0, 1, 0.0, 1.0, -0.2, 3, True, "0.3", float("nan"), None)
        ],
    ],
)
def test_misuse(call, message):
    with pytest.raises(fxrpg.FxrpgError, match=message):
        call()


def changed(index, module):
    model = middle()
    model[index] = module
    return model


OTHERS = {
    "another layer": lambda: changed(1, nn.GroupNorm(2, 6)),
    "a layer less": lambda: middle()[:9],
    "a narrower dense layer": lambda: changed(0, nn.Conv2d(3, 4, 3)),
    "a narrower norm": lambda: changed(1, nn.BatchNorm2d(2)),
    "a wider generated layer": lambda: changed(4, nn.Conv2d(6, 9, 3)),
    "a narrower last layer": lambda: changed(11, nn.Linear(4, 3)),
    "fewer outputs": lambda: changed(11, nn.Linear(6, 2)),
    "an already narrow model": lambda: fxrpg.materialize(
        fxrpg.prune_channels(transformed(middle(), plan=()), 0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_loading_into_another_architecture(name, tmp_path):
    torch.manual_seed(1)
    fxrpg.save(fxrpg.prune_channels(transformed(middle(), plan=()), 0.5), tmp_path / "m.safetensors")
    with pytest.raises(
        fxrpg.FxrpgError, match=r"m.safetensors: .* must .* Pass a model of the architecture that was saved"
    ):
        fxrpg.load(OTHERS[name](), tmp_path / "m.safetensors")


class Auxiliary(nn.Module):
    """A head that only training reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head, self.aux = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Mixing(nn.Module):
    """Channels that only training mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x.softmax(-1) if self.training else x).relu())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "gone"), [(Auxiliary, {"a"}), (Mixing, {"b"})])
def test_what_one_mode_reads_stays_in_both(make, gone, training):
    model = make().train(training)
    small = fxrpg.transform(model, dof=20, plan=[fxrpg.Rule("*", "generate")])
    pruned = fxrpg.prune_channels(small, 0.5)
    assert {path for path, (out, _) in pruned._fxrpg_plan.channels.items() if out} == gone
    assert all(module.training is training for module in (*small.modules(), *pruned.modules()))
    x = torch.randn(2, 3, 4, 4) if make is Auxiliary else torch.randn(2, 4)
    pruned.train()(x)
    pruned.eval()(x)


def _hook(model):
    model[1].register_forward_hook(lambda module, inputs, out: out.softmax(-1))


def _pre_hook(model):
    model[2].register_forward_pre_hook(lambda module, inputs: inputs)


def _patch(model):
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) * torch.arange(8.0)


@pytest.mark.parametrize("look_on", [_hook, _pre_hook, _patch])
def test_channels_that_a_hook_or_a_patched_forward_sees_stay(look_on):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    look_on(model)
    small = fxrpg.transform(model, dof=20, plan=[fxrpg.Rule("*", "generate")])
    with pytest.raises(FxrpgError, match="needs layers whose outputs only other layers read"):
        fxrpg.prune_channels(small, 0.5)
