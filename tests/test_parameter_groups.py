"""parameter_groups: every trainable parameter once, in the group where its rate and decay belong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxrpg
from fxrpg import FxrpgError, Rule
from fxrpg.networks import resnet18

EVERYTHING = [Rule("*", "generate")]


class Net(nn.Module):
    """Convolutions and linear layers, norms of one and two dimensions, raw parameters, a tied and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
        self.wide = nn.LayerNorm((4, 4))
        self.table = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.tied = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tied.weight = self.body[0].weight
        self.head = nn.Linear(8, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu() * self.gain + self.table
        return self.head(self.tied(self.wide(self.body(x))).mean((2, 3)))


DENSE = {
    "stem.weight",
    "table",
    "gain",
    "head.weight",
}  # `gain` has three dimensions, and nothing tells that it is no weight
PLAIN = {
    "stem.bias", "norm.weight", "norm.bias", "body.0.bias", "body.1.bias", "body.2.bias", "wide.weight", "wide.bias",
}  # fmt: skip


def names(model, groups):
    """The name of each group -> names of its parameters."""
    known = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {known[id(p)] for p in group["params"]} for group in groups}


def by_name(groups):
    return {group["name"]: group for group in groups}


STATES = {"ring": {"fxrpg_ring"}, "pemn": {f"body.{i}.weight_score" for i in range(3)}}


@pytest.mark.parametrize("method", STATES)
@pytest.mark.parametrize("way", ["module", "graph"])
def test_who_is_where(method, way):
    net = Net() if way == "module" else fx.symbolic_trace(Net())
    plan = [Rule("body.*", "generate"), Rule("*", "dense")]
    small = fxrpg.transform(net, dof=0.1, method=method, plan=plan)
    found = names(small, fxrpg.parameter_groups(small, lr=0.1))
    assert found == {method: STATES[method], "dense": DENSE, "norms and biases": PLAIN}


def test_a_basis_holds_biases_too():
    small = fxrpg.transform(Net(), dof=20, method="pranc")
    found = names(small, fxrpg.parameter_groups(small, lr=0.1))
    assert found == {
        "pranc": {"fxrpg_alpha"},
        "dense": {"table", "gain"},
        "norms and biases": {"norm.weight", "norm.bias", "wide.weight", "wide.bias"},
    }


def test_rates_and_decays():
    plan = [Rule("body.0.*", fxrpg.Pranc(), dof=5), Rule("body.1.weight", fxrpg.Pemn(), dof=7)]
    small = fxrpg.transform(Net(), dof=20, plan=plan)
    found = by_name(fxrpg.parameter_groups(small, lr=0.1, weight_decay=0.02))
    assert {name: (group["lr"], group["weight_decay"]) for name, group in found.items()} == {
        "ring": (0.1, 0.02), "pemn": (0.1, 0.02), "pranc": (0.1, 0.0), "dense": (0.1, 0.02), "norms and biases": (0.1, 0.0)
    }  # fmt: skip
    found = by_name(fxrpg.parameter_groups(small, lr=0.1, weight_decay=0.02, state_lr=1.0, state_decay=0.5))
    for name in ("ring", "pemn", "pranc"):
        assert (found[name]["lr"], found[name]["weight_decay"]) == (1.0, 0.5)
    assert found["dense"]["lr"] == 0.1
    assert (
        by_name(fxrpg.parameter_groups(small, lr=0.1, weight_decay=0.02, state_decay=0.0))["ring"]["weight_decay"] == 0
    )


def test_the_rule_of_reuse():
    small = fxrpg.transform(resnet18(10), dof=36_864)
    (ring, *_) = groups = fxrpg.parameter_groups(small, lr=0.4, reuse_power=0.5)
    assert ring["lr"] == pytest.approx(0.4 * math.sqrt(36_864 / 11_157_504))
    assert all(group["lr"] == 0.4 for group in groups[1:])
    assert fxrpg.parameter_groups(small, lr=0.4)[0]["lr"] == 0.4


def test_every_ring_has_its_own_rate_under_the_rule():
    small = fxrpg.transform(Net(), dof={"body.0": 72, "body.1": 72, "body.2": 36}, scope="layer", plan=[
        Rule("body.*", "generate"), Rule("*", "dense")
    ])  # fmt: skip
    groups = [group for group in fxrpg.parameter_groups(small, lr=1.0, reuse_power=1.0) if group["name"] == "ring"]
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 72 / 576), (1, 36 / 576)]
    (together,) = [group for group in fxrpg.parameter_groups(small, lr=1.0) if group["name"] == "ring"]
    assert len(together["params"]) == 3


@pytest.mark.parametrize("method", ["pranc", "pemn"])
def test_the_rule_is_for_rings(method):
    small = fxrpg.transform(Net(), dof=20, method=method)
    assert by_name(fxrpg.parameter_groups(small, lr=1.0, reuse_power=1.0))[method]["lr"] == 1.0


OPTIMIZERS = {
    "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "asgd": torch.optim.ASGD,
    "adagrad": torch.optim.Adagrad, "adafactor": torch.optim.Adafactor,
}  # fmt: skip
BUILDS = {
    "module": lambda: Net(),
    "graph": lambda: fx.symbolic_trace(Net()),
    "bare": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 8), nn.Linear(8, 3)),
}


@settings(max_examples=40)
@given(
    build=st.sampled_from(sorted(BUILDS)),
    method=st.sampled_from(["ring", "pranc", "pemn"]),
    scope=st.sampled_from(["model", "layer"]),
    frozen=st.sets(st.integers(0, 15), max_size=6),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    decay=st.sampled_from([0.0, 0.1]),
    power=st.sampled_from([0.0, 0.5]),
)
def test_every_optimizer_takes_every_trainable_parameter_once(build, method, scope, frozen, optimizer, decay, power):
    dof = {"ring": 0.3, "pranc": 0.02, "pemn": 0.3}[method]
    small = fxrpg.transform(BUILDS[build](), dof=dof, method=method, scope=scope)
    for i, parameter in enumerate(small.parameters()):
        parameter.requires_grad_(parameter.requires_grad and i not in frozen)
    trained = [id(p) for p in small.parameters() if p.requires_grad]
    groups = fxrpg.parameter_groups(small, lr=0.1, weight_decay=decay, reuse_power=power)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(trained)
    assert all(group["params"] for group in groups)
    if trained:
        stepping = OPTIMIZERS[optimizer](groups)
        assert [group["name"] for group in stepping.param_groups] == [group["name"] for group in groups]
        torch.optim.lr_scheduler.StepLR(stepping, 1, 0.5)


def test_an_optimizer_of_groups_trains_everything():
    torch.manual_seed(0)
    small = fxrpg.transform(Net(), dof=0.1).eval()  # where batch norm does not undo a bias
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(fxrpg.parameter_groups(small, lr=0.1, weight_decay=0.1))
    small(torch.randn(5, 2, 4, 4)).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, p in small.named_parameters() if p.requires_grad} <= moved
    assert not {"fxrpg_scale", "fxrpg_digest", "head.bias"} & moved


def test_ordinary_models_and_models_within_others():
    net = Net()
    assert names(net, fxrpg.parameter_groups(net, lr=0.1)) == {
        "dense": {*DENSE, "body.0.weight", "body.1.weight", "body.2.weight"}, "norms and biases": PLAIN
    }  # fmt: skip
    pair = nn.ModuleList(
        [fxrpg.transform(Net(), dof=20), fxrpg.transform(Net(), dof=30, method="pranc"), nn.Linear(2, 2)]
    )
    found = names(pair, fxrpg.parameter_groups(pair, lr=0.1))
    assert (found["ring"], found["pranc"]) == ({"0.fxrpg_ring"}, {"1.fxrpg_alpha"})
    assert "2.weight" in found["dense"]


class Squash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(1.0))

    def forward(self, ring):
        return self.width * ring.tanh()


def test_a_parametrized_state_is_its_originals():
    small = fxrpg.transform(Net(), dof=20)
    parametrize.register_parametrization(small, "fxrpg_ring", Squash())
    found = names(small, fxrpg.parameter_groups(small, lr=0.1))
    assert found["ring"] == {"parametrizations.fxrpg_ring.original"}
    assert "parametrizations.fxrpg_ring.0.width" in found["norms and biases"]
    normed = fxrpg.transform(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)), dof=5, plan=[
        Rule("0.*original1", "generate"), Rule("*", "dense")
    ])  # fmt: skip
    assert names(normed, fxrpg.parameter_groups(normed, lr=0.1))["ring"] == {"fxrpg_ring"}


def test_states_that_are_not_trained():
    small = fxrpg.transform(Net(), dof=20)
    small.fxrpg_ring.requires_grad_(False)
    assert "ring" not in by_name(fxrpg.parameter_groups(small, lr=0.1))
    masks = fxrpg.freeze(fxrpg.transform(Net(), dof=0.5, method="pemn"))
    assert set(by_name(fxrpg.parameter_groups(masks, lr=0.1))) == {"dense", "norms and biases"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr: must be a number of 0 or more"),
        ({"lr": "0.1"}, "lr: must be"),
        ({"lr": True}, "lr: must be"),
        ({"lr": None}, "lr: must be"),
        ({"lr": 0.1, "weight_decay": math.nan}, "weight_decay: must be"),
        ({"lr": 0.1, "weight_decay": None}, "weight_decay: must be"),
        ({"lr": 0.1, "state_lr": -1}, "state_lr: must be"),
        ({"lr": 0.1, "state_decay": -1e-9}, "state_decay: must be"),
        ({"lr": 0.1, "reuse_power": math.inf}, "reuse_power: must be"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(FxrpgError, match=message):
        fxrpg.parameter_groups(Net(), **arguments)


def test_parts_are_refused():
    small = fxrpg.transform(Net(), dof=20)
    with pytest.raises(FxrpgError, match=r"body|0.*must come with the state of its weights.*Pass the whole model"):
        fxrpg.parameter_groups(small.body, lr=0.1)
    with pytest.raises(FxrpgError, match="needs a module, found list"):
        fxrpg.parameter_groups(list(small.parameters()), lr=0.1)
