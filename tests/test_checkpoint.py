"""Files: what is saved comes back bit for bit; what is damaged, hostile or of another model is one clear error."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from conformance import GENERATORS
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxrpg
from fxrpg import FxrpgError, checkpoint, header, validation
from fxrpg.networks import resnet18

NAN, INFINITY = float("nan"), float("inf")
ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Three layers, of which the default plan generates the middle one, a norm and an int64 buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.middle = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.norm(self.middle(self.first(x)).relu()))


class Tied(nn.Module):
    """Two generated weights that are one, two dense ones that are one, and one buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b, self.last = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.arange(5.0))
        self.register_buffer("also_shift", self.shift)

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x)).relu() + self.shift)) + self.also_shift


DTYPES = [dtype for dtype in header.DTYPES if dtype != torch.bool]


class Buffers(Net):
    """A buffer of every type that a file can hold, of sizes such that their order decides how long the file is."""

    def __init__(self) -> None:
        super().__init__()
        for i, dtype in enumerate(DTYPES):
            self.register_buffer(f"z_{i}", torch.arange(20 + 30 * (i % 5)).to(dtype))
        self.register_buffer("truth", torch.tensor([True, False]))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)


class Odd(Net):
    """Memory that safetensors does not take as it is: strides, shared storage, lazy conjugation, NaN."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(12.0)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[3:7])
        self.register_buffer("turned", whole.view(3, 4).t())
        self.register_buffer("conjugate", torch.tensor([1 + 2j]).conj())
        self.register_buffer("negative", torch.tensor([1 + 2j]).conj().imag)
        self.register_buffer("strange", torch.tensor([float("nan"), float("-inf"), -0.0]))
        self.twin = nn.Parameter(self.first.bias.data)  # another parameter in the same memory


class Names(nn.Module):
    """Names that JSON must escape."""

    def __init__(self) -> None:
        super().__init__()
        names = ["größe", 'quote"', "back\\slash", "tab\t", "\x7f", "模", "😀", "plain"]
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class Extra(Net):
    """State that the module packs into a tensor by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = Counting(8, 8)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return torch.arange(self.calls)

    def set_extra_state(self, state):
        self.calls = len(state)


def frozen() -> nn.Module:
    model = Net()
    model.first.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.last.bias.requires_grad_(False)
    model.codes = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)
    return model


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
            self.rnn = nn.LSTM(5, 4)

        def forward(self, x):
            return self.rnn(self.layers(x))[0]

    return Last()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Net, (4, 5)),
    "tied": (Tied, (4, 5)),
    "buffers": (Buffers, (4, 5)),
    "odd": (Odd, (4, 5)),
    "names": (Names, (4, 4)),
    "frozen": (frozen, (4, 5)),
    "normed": (normed, (4, 5)),
    "recurrent": (recurrent, (4, 5)),
    "extra": (Extra, (4, 5)),
    "graph": (lambda: fx.symbolic_trace(Net()), (4, 5)),
    "graph, tied": (lambda: fx.symbolic_trace(Tied()), (4, 5)),
    "bfloat16": (lambda: Net().bfloat16(), (4, 5)),
    "float16": (lambda: Net().half(), (4, 5)),
    "float64": (lambda: Net().double(), (4, 5)),
    "bfloat16, tied": (lambda: Tied().bfloat16(), (4, 5)),
}


def transformed(make: Callable[[], nn.Module], dof: Any = 13, **settings: Any) -> nn.Module:
    """A transformed model whose every number differs from what a fresh one would hold."""
    torch.manual_seed(1)
    small = fxrpg.transform(make(), dof=dof, seed=11, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(4 * torch.randn(parameter.shape, generator=generator))
    for name, buffer in small.named_buffers():
        if "running" in name or "shift" in name:
            buffer.add_(0.5)
    return small


class Chain(nn.Sequential):
    """Four layers in a row, of which channels can be pruned, one of them normalised."""

    def __init__(self) -> None:
        first, inner = (nn.Linear(5, 8), nn.ReLU()), (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        super().__init__(*first, *inner, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


METHODS = [
    fxrpg.Rule("0.weight", fxrpg.Pemn(keep=0.3), dof=0.7),
    fxrpg.Rule("2.weight", fxrpg.Ring(block=8, sparse=True), dof=24),
    fxrpg.Rule("5.weight", fxrpg.Ring(bits=4, bits_block=8), dof=21),
    fxrpg.Rule("7.*", fxrpg.Pranc(), dof=6),
    fxrpg.Rule("3.*", fxrpg.Pranc(norms=True, sparse=True), dof=5),
]


def mixed(make: Callable[[], nn.Module] = Chain) -> nn.Module:
    """A method for every layer; each has a state of its own, of some of which every third number is zero."""
    small = transformed(make, None, method=fxrpg.Pemn(threshold="global", prototype="one_layer"), plan=METHODS)
    for name, state in small.named_parameters():
        if name in ("fxrpg_ring_2_weight", "fxrpg_alpha_3"):
            state.detach()[::3] = 0
    return small


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "plain": (Chain, lambda: transformed(Chain)),
    "scopes": (Chain, lambda: transformed(Chain, 0.3, scope="layer")),
    "scopes of masks": (Chain, lambda: transformed(Chain, 0.3, method=fxrpg.Pemn(threshold="global"), scope="layer")),
    "scopes of odd names": (
        Chain,
        lambda: transformed(Chain, scope=lambda name: {"2": "kept", "5": "é.x"}.get(name[0], "")),
    ),
    "methods": (Chain, mixed),
    "graph": (lambda: fx.symbolic_trace(Chain()), lambda: mixed(lambda: fx.symbolic_trace(Chain()))),
    "bfloat16": (lambda: Chain().bfloat16(), lambda: mixed(lambda: Chain().bfloat16())),
    "tied masks": (Tied, lambda: transformed(Tied, method="pemn")),
    "pruned": (Chain, lambda: fxrpg.prune(transformed(Chain), 0.4)),
    "pruned scopes": (
        Chain,
        lambda: fxrpg.prune(transformed(Chain, scope=lambda name: "kept" if name[0] == "2" else "model"), 0.4),
    ),
    "pruned scope beside one called kept": (
        Chain,
        lambda: fxrpg.prune(transformed(Chain, scope=lambda name: "kept" if name[0] == "2" else ""), 0.4),
    ),
    "truncated": (Chain, lambda: fxrpg.truncate(transformed(Chain, method="pranc"), 5)),
    "truncated by index": (Chain, lambda: fxrpg.truncate(transformed(Chain, method="pranc"), 5, order="index")),
    "quantised": (Chain, lambda: fxrpg.quantize(transformed(Chain), 4, block=5)),
    "frozen ring": (Chain, lambda: fxrpg.freeze(fxrpg.quantize(transformed(Chain), 4, block=5))),
    "frozen masks": (Chain, lambda: fxrpg.freeze(transformed(Chain, method="pemn"))),
    "frozen methods": (Chain, lambda: fxrpg.freeze(mixed())),
    "frozen graph": (
        lambda: fx.symbolic_trace(Chain()),
        lambda: fxrpg.freeze(mixed(lambda: fx.symbolic_trace(Chain()))),
    ),
    "frozen float16": (lambda: Chain().half(), lambda: fxrpg.freeze(mixed(lambda: Chain().half()))),
    "frozen, then cast": (Chain, lambda: fxrpg.freeze(mixed()).double()),
    "channels": (Chain, lambda: fxrpg.prune_channels(transformed(Chain), 0.4)),
    "channels twice": (Chain, lambda: fxrpg.prune_channels(fxrpg.prune_channels(mixed(), 0.3), 0.3)),
    "everything": (Chain, lambda: fxrpg.prune_channels(fxrpg.freeze(mixed()), 0.4)),
}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Type, shape and bytes of each tensor: equal for NaN, different for zeros of other sign."""
    plain = {name: t.detach().resolve_conj().resolve_neg().contiguous() for name, t in tensors.items()}
    return {
        n: (
            t.dtype,
            tuple(t.shape),
            t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).tolist(),
        )
        for n, t in plain.items()
    }


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The names of each tensor in the state_dict."""
    names: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values()}


def spread() -> nn.Module:
    """A buffer whose elements are one in memory, which torch itself cannot load into."""
    model = Net()
    model.register_buffer("spread", torch.ones(1).expand(6))
    return model


def snapshot(model: nn.Module) -> Any:
    """Everything about a model that a function could change."""
    modules = {name: (type(module), sorted(module.__dict__)) for name, module in model.named_modules()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    return modules, gradients, ties(model), bits(model.state_dict()), len(model._load_state_dict_pre_hooks)


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the FxrpgError that the call must raise: four parts, short enough to read."""
    with pytest.raises(FxrpgError) as caught:
        call(*args, **kwargs)
    assert len(caught.value.args) == 4
    assert all(isinstance(part, str) and part for part in caught.value.args)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


# What is saved comes back.


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    make, shape = MODELS[request.param]
    small = transformed(make)
    x = torch.randn(shape).to(small.fxrpg_ring.dtype)
    small(x)  # moves the running statistics
    return make, small, x, tmp_path / "m.safetensors"


def test_round_trip(case):
    make, small, x, path = case
    fxrpg.save(small, path)
    fresh = make()
    before = snapshot(fresh)
    loaded = fxrpg.load(fresh, path)
    assert snapshot(fresh) == before
    assert bits(loaded.state_dict()) == bits(small.state_dict())
    assert ties(loaded) == ties(small)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in small.named_parameters()
    }
    again = path.with_name("again.safetensors")
    fxrpg.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    for old, new in zip(small.modules(), loaded.modules(), strict=True):
        new.train(old.training)
    expected, found = small.eval()(x), loaded.eval()(x)
    assert bits({"y": found}) == bits({"y": expected})
    assert fxrpg.ledger(loaded) == fxrpg.ledger(small)
    old, new = small._fxrpg_plan, loaded._fxrpg_plan
    assert new.digest() == old.digest()
    assert (list(new.dense.items()), new.rules) == (list(old.dense.items()), old.rules)
    assert [frozenset(names) for names in new.names.values()] == [frozenset(names) for names in old.names.values()]


def test_the_ledger_knows_the_size_of_the_file(case):
    _, small, _, path = case
    counted = fxrpg.ledger(small).bytes_stored
    fxrpg.save(small, path)
    assert path.stat().st_size == counted


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_of_every_form(form, tmp_path):
    path, (make, transform) = tmp_path / "m.safetensors", FORMS[form]
    small = transform()
    x = torch.randn(4, 5).to(next(small.parameters()).dtype)
    small(x)
    fxrpg.save(small, path)
    assert path.stat().st_size == fxrpg.ledger(small).bytes_stored
    loaded = fxrpg.load(make(), path)
    if "cast" in form:
        assert torch.equal(loaded.fxrpg_digest.double(), small.fxrpg_digest)
        small.fxrpg_digest = loaded.fxrpg_digest  # small integers in any floating type
    assert bits(loaded.state_dict()) == bits(small.state_dict())
    assert ties(loaded) == ties(small)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in small.named_parameters()
    }
    assert list(map(repr, loaded.children())) == list(map(repr, small.children()))
    assert bits({"y": loaded.eval()(x)}) == bits({"y": small.eval()(x)})
    assert loaded._fxrpg_plan.digest() == small._fxrpg_plan.digest()
    assert loaded._fxrpg_plan.scopes == small._fxrpg_plan.scopes
    assert fxrpg.ledger(loaded) == fxrpg.ledger(small)
    assert bits(checkpoint.unpack(path)) == bits(fxrpg.materialize(small).state_dict())
    again = path.with_name("again.safetensors")
    fxrpg.save(loaded.train(), again)
    assert again.read_bytes() == path.read_bytes()
    with torch.device("meta"):
        fresh = make()
    assert bits(fxrpg.load(fresh, path).state_dict()) == bits(small.state_dict())


@pytest.mark.parametrize("dof", [1, 97, 1234, 10_000])
def test_the_size_whatever_the_digits_of_the_offsets(dof, tmp_path):
    class Wide(Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Sequential(nn.Linear(8, 1000), nn.Linear(1000, 8))

    small = transformed(Wide, dof)
    fxrpg.save(small, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(small).bytes_stored


@pytest.mark.parametrize("make", [Net, Tied, frozen, spread])
def test_load_into_a_model_on_the_meta_device(make, tmp_path):
    small = transformed(make)
    fxrpg.save(small, tmp_path / "m.safetensors")
    with torch.device("meta"):
        fresh = make()
    loaded = fxrpg.load(fresh, tmp_path / "m.safetensors")
    assert all(p.is_meta for p in fresh.parameters())
    assert bits(loaded.state_dict()) == bits(small.state_dict())
    assert ties(loaded) == ties(small)


def test_buffers_that_no_file_holds_need_a_real_device(tmp_path):
    fxrpg.save(transformed(Buffers), tmp_path / "m.safetensors")
    with torch.device("meta"):
        fresh = Buffers()
    assert "'hidden' must have values" in refusal(fxrpg.load, fresh, tmp_path / "m.safetensors")


@pytest.mark.parametrize("generator", [g for examples in GENERATORS.values() for g in examples], ids=repr)
def test_every_method_with_its_settings(generator, tmp_path):
    small = transformed(Net, dof=37 if generator.needs_dof else None, method=generator)
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(Net(), tmp_path / "m.safetensors")
    assert [scope.generator for scope in loaded._fxrpg_plan.scopes] == [generator]
    assert bits(fxrpg.materialize(loaded).state_dict()) == bits(fxrpg.materialize(small).state_dict())


def test_a_weight_of_many_dimensions(tmp_path):
    class Many(Net):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.Parameter(torch.randn(*[1] * 11, 2, 3))

    small = transformed(Many, plan=[fxrpg.Rule("many", "generate")])
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(Many(), tmp_path / "m.safetensors")
    assert torch.equal(loaded.many + 0, small.many + 0)


def test_graph_and_module_read_each_other(tmp_path):
    small = transformed(Net)
    fxrpg.save(small, tmp_path / "m.safetensors")
    x = torch.randn(4, 5)
    graph = fxrpg.load(fx.symbolic_trace(Net().eval()), tmp_path / "m.safetensors")
    assert torch.equal(graph.eval()(x), small.eval()(x))
    fxrpg.save(graph, tmp_path / "g.safetensors")
    assert torch.equal(fxrpg.load(Net(), tmp_path / "g.safetensors").eval()(x), small(x))


def test_unpack_is_the_state_dict_of_the_plain_model(case):
    make, small, x, path = case
    fxrpg.save(small, path)
    plain, unpacked = fxrpg.materialize(small), checkpoint.unpack(path)
    assert bits(unpacked) == bits(plain.state_dict())
    fresh = make()
    fresh.load_state_dict(unpacked, strict=True)
    assert bits({"y": fresh.eval()(x)}) == bits({"y": small.eval()(x)})


def held_still(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_frozen_when_saved_or_frozen_in_the_model(tmp_path):
    path, small = tmp_path / "m.safetensors", transformed(Net)
    small.first.requires_grad_(False)
    fxrpg.save(small, path)
    assert held_still(fxrpg.load(Net(), path)) == {"first.weight", "first.bias"}
    fresh = Net()
    fresh.norm.bias.requires_grad_(False)
    assert held_still(fxrpg.load(fresh, path)) == {"first.weight", "first.bias", "norm.bias"}
    fxrpg.save(small.requires_grad_(False), path)
    assert held_still(fxrpg.load(Net(), path)) == held_still(small)
    fxrpg.save(small.requires_grad_(True), path)
    assert held_still(fxrpg.load(Net().requires_grad_(False), path)) == {n for n, _ in small.named_parameters()}


def test_types_come_from_the_file_and_memory_format_from_the_model(tmp_path):
    def convs() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))

    fxrpg.save(transformed(convs).bfloat16(), tmp_path / "m.safetensors")
    loaded = fxrpg.load(convs().to(memory_format=torch.channels_last), tmp_path / "m.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_loaded_model_shares_no_memory_with_the_file_or_the_argument(tmp_path):
    path = tmp_path / "m.safetensors"
    small, fresh = transformed(Net), Net()
    fxrpg.save(small, path)
    loaded = fxrpg.load(fresh, path)
    path.write_bytes(b"\xff" * path.stat().st_size)  # in place: a mapping of the file would change
    assert bits(loaded.state_dict()) == bits(small.state_dict())
    before = snapshot(fresh)
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.zero_()
    assert snapshot(fresh) == before


def test_the_default_device_does_not_matter(tmp_path):
    small = transformed(Net)
    model = Net()
    with torch.device("meta"):
        fxrpg.save(small, tmp_path / "m.safetensors")
        loaded = fxrpg.load(model, tmp_path / "m.safetensors")
    assert bits(loaded.state_dict()) == bits(small.state_dict())


@pytest.mark.parametrize("make", [Net, Tied, Buffers])
def test_a_model_that_was_cast_after_it_was_transformed(make, tmp_path):
    """Buffers that share memory part ways then: the file decides, whatever the fresh model does."""
    small = transformed(make).bfloat16().eval()
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(make(), tmp_path / "m.safetensors").eval()
    found, expected = bits(loaded.state_dict()), bits(small.state_dict())
    own = {"fxrpg_scale", "fxrpg_digest"}  # small integers in any floating type
    assert {n: found[n] for n in found.keys() - own} == {n: expected[n] for n in expected.keys() - own}
    assert all(torch.equal(loaded.state_dict()[n].float(), small.state_dict()[n].float()) for n in own)
    assert ties(loaded) == ties(small)
    x = torch.randn(4, 5).bfloat16()
    assert bits({"y": loaded(x)}) == bits({"y": small(x)})


def test_hooks_of_load_state_dict_run(tmp_path):
    class Derived(Net):
        def __init__(self) -> None:
            super().__init__()
            self.refresh(self, None)
            self.register_load_state_dict_post_hook(self.refresh)

        @staticmethod
        def refresh(module: Any, _: Any) -> None:
            module.total = module.first.weight.detach().sum()

        def load_state_dict(self, state_dict, strict=True):  # as much old code has it
            return super().load_state_dict(state_dict, strict)

    small = transformed(Derived)
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(Derived(), tmp_path / "m.safetensors")
    assert loaded.total == loaded.first.weight.sum() == small.first.weight.sum()


def test_resnet18_is_as_small_as_promised(tmp_path):
    small = fxrpg.transform(resnet18(), dof=2_359_296)
    fxrpg.save(small, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size == fxrpg.ledger(small).bytes_stored < 11.7e6
    loaded = fxrpg.load(resnet18(), tmp_path / "m.safetensors")
    assert torch.equal(loaded.fxrpg_ring, small.fxrpg_ring)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), small.eval()(x))


# The seed.


def test_withheld_seed(tmp_path):
    small = transformed(Net)
    path = tmp_path / "m.safetensors"
    fxrpg.save(small, path, withhold_seed=True)
    assert validation.parse(path, metadata(path))["seed"] == "withheld"
    assert "the seed must be given" in refusal(fxrpg.load, Net(), path)
    assert "must draw" in refusal(fxrpg.load, Net(), path, seed=12)
    for reader in (checkpoint.unpack, checkpoint.verify):
        refusal(reader, path)
        refusal(reader, path, 12)
    loaded = fxrpg.load(Net(), path, seed=11)
    assert bits(loaded.state_dict()) == bits(small.state_dict())
    assert checkpoint.verify(path, 11).digest() == small._fxrpg_plan.digest()


def test_given_seed_must_be_that_of_the_file(tmp_path):
    fxrpg.save(transformed(Net), tmp_path / "m.safetensors")
    fxrpg.load(Net(), tmp_path / "m.safetensors", seed=11)
    assert "the file's seed is 11" in refusal(fxrpg.load, Net(), tmp_path / "m.safetensors", seed=12)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 11 + (1 << 64), 1.5, 11.0, "11", True, [11], float("nan")])
@pytest.mark.parametrize("withheld", [False, True])
def test_seed_out_of_range(seed, withheld, tmp_path):
    fxrpg.save(transformed(Net), tmp_path / "m.safetensors", withhold_seed=withheld)
    assert "seed: must be an int in [0, 2^64)" in refusal(fxrpg.load, Net(), tmp_path / "m.safetensors", seed=seed)


@pytest.mark.parametrize("seed", [0, (1 << 64) - 1])
def test_seeds_at_the_ends(seed, tmp_path):
    small = fxrpg.transform(Net(), dof=9, seed=seed)
    fxrpg.save(small, tmp_path / "m.safetensors")
    assert fxrpg.load(Net(), tmp_path / "m.safetensors")._fxrpg_plan == small._fxrpg_plan


# Writing.


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_what_the_umask_leaves(umask, mode, tmp_path):
    small = transformed(Net)
    before = os.umask(umask)
    try:
        fxrpg.save(small, tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("name", ["save_file", "os.fsync", "os.replace", "os.chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(name, error, monkeypatch, tmp_path):
    path = tmp_path / "m.safetensors"
    fxrpg.save(transformed(Net), path)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, *("save_file", fail)) if name == "save_file" else monkeypatch.setattr(name, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected) as caught:
        fxrpg.save(transformed(Tied), path)
    assert expected is not OSError or str(path) in str(caught.value)
    assert ".part" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys, torch
from torch import nn
import fxrpg
from fxrpg import checkpoint
path = sys.argv[1]
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
fxrpg.save(fxrpg.transform(model, dof=5), path)
before = open(path, "rb").read()
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
def half(tensors, temporary, metadata):
    save_file(tensors, temporary, metadata)
    os.truncate(temporary, os.path.getsize(temporary) // 2)
    die()
save_file = checkpoint.save_file
for holder, name, stub in ((checkpoint, "save_file", half), (os, "chmod", die), (os, "fsync", die), (os, "replace", die)):
    if (child := os.fork()) == 0:
        setattr(holder, name, stub)
        fxrpg.save(fxrpg.transform(model, dof=50), path)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
    assert open(path, "rb").read() == before, name
    fxrpg.load(model, path)
fxrpg.save(fxrpg.transform(model, dof=50), path)
assert fxrpg.load(model, path).fxrpg_ring.numel() == 50
print(len(os.listdir(os.path.dirname(path))))
"""


def test_a_killed_process_leaves_the_old_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "m.safetensors")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5"]  # the file and one hidden part of each killed process
    assert {p.suffix for p in tmp_path.iterdir() if p.name.startswith(".")} == {".part"}


def test_places_that_are_no_files(tmp_path):
    small = transformed(Net)
    assert "a folder or a device" in refusal(fxrpg.save, small, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "a folder or a device" in refusal(fxrpg.save, small, tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(FileNotFoundError, match=r"nowhere/m\.safetensors'$"):
        fxrpg.save(small, tmp_path / "nowhere" / "m.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "m.safetensors"
    link.symlink_to(target)
    fxrpg.save(transformed(Net), link)
    assert link.is_symlink()
    assert [p.name for p in target.parent.iterdir()] == ["m.safetensors"]
    fxrpg.load(Net(), link)


class Talkative(Net):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        raise AssertionError


def sparse() -> nn.Module:
    model = Net()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    return model


def strange_type() -> nn.Module:
    model = Net()
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Talkative, r"_extra_state: must be a plain tensor .*found dict"),
        (sparse, r"save, sparse: must be a plain tensor .*found .*sparse_coo"),
        (strange_type, r"save, wide: must be a plain tensor .*complex128"),
        (on_meta, r"must hold values"),
    ],
)
def test_what_a_file_cannot_hold(make, message, tmp_path):
    small = fxrpg.transform(make(), dof=9)
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FxrpgError, match=message):
        fxrpg.save(small, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("value", [0, -1, 1e9, NAN, INFINITY])
def test_scales_that_were_never_set(value, tmp_path):
    """A model built on the meta device, moved by to_empty and never loaded."""
    small = fxrpg.transform(Net(), dof=9)
    small.fxrpg_scale.fill_(value)
    assert "must be positive, of 16 significant bits" in refusal(fxrpg.save, small, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_state_of_another_length(tmp_path):
    small = fxrpg.transform(Net(), dof=9)
    small.fxrpg_ring = nn.Parameter(torch.zeros(8))
    assert "fxrpg_ring" in refusal(fxrpg.save, small, tmp_path / "m.safetensors")


@pytest.mark.parametrize("wrong", [Net(), "m.safetensors", None, Net])
def test_what_cannot_be_saved_or_loaded_into(wrong, tmp_path):
    path = tmp_path / "m.safetensors"
    refusal(fxrpg.save, wrong, path)
    assert not path.exists()
    fxrpg.save(transformed(Net), path)
    if not isinstance(wrong, nn.Module):
        refusal(fxrpg.load, wrong, path)


def test_load_into_what_is_transformed_or_lazy(tmp_path):
    fxrpg.save(transformed(Net), tmp_path / "m.safetensors")
    assert "must not be transformed yet" in refusal(fxrpg.load, transformed(Net), tmp_path / "m.safetensors")
    for layer in (nn.LazyLinear(8), nn.LazyBatchNorm1d()):
        model = Net()
        model.middle = layer
        assert "lazy" in refusal(fxrpg.load, model, tmp_path / "m.safetensors")


# Files of other models.


def bigger() -> nn.Module:
    return Net(9)


def without_norm() -> nn.Module:
    model = Net()
    model.norm = nn.Identity()
    return model


def other_bias() -> nn.Module:
    model = Net()
    model.middle = nn.Linear(8, 8, bias=False)
    return model


def other_norm() -> nn.Module:
    model = Net()
    model.norm = nn.BatchNorm1d(7)
    return model


def other_type() -> nn.Module:
    model = Net()
    model.norm.running_mean = torch.zeros(8, dtype=torch.int64)
    return model


def whole_numbers() -> nn.Module:
    model = Net()
    model.first.bias = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    return model


def untied(attribute: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Tied()
        getattr(model, attribute).weight = nn.Parameter(torch.randn(5, 5))
        return model

    return make


def tied_to_dense() -> nn.Module:
    model = Tied()
    model.first.weight = model.last.weight = model.a.weight
    return model


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (Net, bigger, r"'middle.weight' must have shape \(8, 8\), found \(9, 9\)"),
        (Net, Tied, "must have the parameter 'middle.weight', found none"),
        (Net, without_norm, "must both hold the dense tensor 'norm.bias', found the model has none"),
        (without_norm, Net, "must both hold the dense tensor 'norm.bias', found the file has none"),
        (other_bias, Net, "must both hold the dense tensor 'middle.bias', found the file has none"),
        (Net, other_norm, r"'norm.bias' must have shape \(8,\), found \(7,\)"),
        (Net, other_type, "'norm.running_mean' must be of a type like torch.float32, found torch.int64"),
        (whole_numbers, Net, "'first.bias' must be of a type like torch.int8, found torch.float32"),
        (Tied, untied("b"), r"one parameter must have just the names \['a.weight', 'b.weight'\], found \['a.weight'\]"),
        (untied("b"), Tied, r"one parameter must have just the names \['a.weight'\], found \['a.weight', 'b.weight'\]"),
        (Tied, untied("last"), "'first.weight' and 'last.weight' must be one parameter .*found two in the model"),
        (untied("last"), Tied, "'first.weight' and 'last.weight' must be one parameter .*found two in the file"),
        (Tied, tied_to_dense, r"just the names \['a.weight', 'b.weight'\], found .*'first.weight', 'last.weight'"),
    ],
)
def test_a_file_of_another_model(saved, given, message, tmp_path):
    fxrpg.save(transformed(saved), tmp_path / "m.safetensors")
    model = given()
    before = snapshot(model)
    with pytest.raises(FxrpgError, match=message):
        fxrpg.load(model, tmp_path / "m.safetensors")
    assert snapshot(model) == before


# Damage.


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small file that has everything: ties, aliases, frozen parameters, a buffer."""
    path = tmp_path_factory.mktemp("packed") / "m.safetensors"
    small = transformed(Tied, plan=[fxrpg.Rule("re:a[.]weight", "generate")])
    small.first.bias.requires_grad_(False)
    fxrpg.save(small, path)
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def everything(contents: header.Contents) -> Any:
    return contents.fields, bits(contents.tensors)


def test_every_truncation(packed, tmp_path):
    whole, path = packed.read_bytes(), tmp_path / "m.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "must be a whole safetensors file" in refusal(checkpoint.read, path), length
    path.write_bytes(whole + b"\0")
    refusal(checkpoint.read, path)
    path.write_bytes(whole)
    checkpoint.read(path)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF])
def test_every_byte_changed(mask, packed, tmp_path):
    whole, path, same = packed.read_bytes(), tmp_path / "m.safetensors", 0
    expected = everything(checkpoint.read(packed))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        try:
            found = checkpoint.read(path)
        except FxrpgError:
            continue
        assert everything(found) == expected, place
        same += 1
    assert same < 10  # at most the spaces that pad the header


def test_what_is_no_packed_file(tmp_path):
    path = tmp_path / "m.safetensors"
    for content in (b"", b"\0" * 7, b"\0" * 100, b"\xff" * 100, pickle.dumps({"a": 1}), b"PK\x03\x04" * 30, b"{}"):
        path.write_bytes(content)
        refusal(fxrpg.load, Net(), path)
    torch.save(Net().state_dict(), path)
    refusal(fxrpg.load, Net(), path)
    save_file(Net().state_dict(), path)
    assert "found a safetensors file without the header 'fxrpg'" in refusal(fxrpg.load, Net(), path)
    save_file(Net().state_dict(), path, {"fxrpg": "1"})
    refusal(fxrpg.load, Net(), path)
    assert "must be a file, found a folder" in refusal(fxrpg.load, Net(), tmp_path)
    os.mkfifo(tmp_path / "pipe")
    refusal(fxrpg.load, Net(), tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        fxrpg.load(Net(), tmp_path / "nowhere")


# Hostile files: the attacker knows the format and computes every digest.


def forged(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    """A file like `source` after `change(header fields, tensors)`, with digests that fit."""
    contents = checkpoint.read(source)
    fields, tensors = copy.deepcopy(contents.fields), dict(contents.tensors)
    change(fields, tensors)
    if "tensors" in fields and fields["tensors"] == contents.fields["tensors"]:
        fields["tensors"] = header.tensors_digest(tensors)
    if "digest" in fields and fields["digest"] == contents.fields["digest"]:
        fields["digest"] = header.header_digest(fields)
    save_file(tensors, target, {"fxrpg": header.canonical(fields)})
    return target


def put(name: str, value: Any) -> Callable[..., None]:
    return lambda fields, tensors: fields.update({name: value})


def scope(**values: Any) -> Callable[..., None]:
    return lambda fields, tensors: fields["scopes"][0].update(values)


def setting(**values: Any) -> Callable[..., None]:
    return lambda fields, tensors: fields["scopes"][0]["settings"].update(values)


def row(**values: Any) -> Callable[..., None]:
    return lambda fields, tensors: fields["table"][0].update(values)


def tensor(name: str, value: torch.Tensor | None) -> Callable[..., None]:
    return lambda fields, tensors: tensors.pop(name) if value is None else tensors.update({name: value})


def both(*changes: Callable[..., None]) -> Callable[..., None]:
    return lambda fields, tensors: [change(fields, tensors) for change in changes]


def another_scope(**values: Any) -> Callable[..., None]:
    """A second row, in a scope of its own that is like the first but for `values`."""

    def change(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        fields["scopes"].append(fields["scopes"][0] | {"name": "c", "state": "fxrpg_ring_c"} | values)
        more_rows(scope=1, offset=0)(fields, tensors)
        tensors.setdefault(fields["scopes"][1]["state"], torch.zeros(13))

    return change


def more_rows(**values: Any) -> Callable[..., None]:
    """A second row, right after the first one but for `values`."""
    return lambda fields, tensors: fields["table"].append(
        {"name": "c", "ties": [], "scope": 0, "tensor": 1, "shape": [4, 8], "order": [0, 1], "offset": 32, "scale": 1.0}
        | {"kept": [], "original": []}
        | values
    )


HOSTILE = {
    "version 0": put("format", 0),
    "version 2": put("format", 2),
    "version true": put("format", True),
    "version 1.0": put("format", 1.0),
    "version huge": put("format", 10**300),
    "more fields": put("more", 1),
    "method unknown": scope(method="magic"),
    "method long": scope(method="x" * 10**6),
    "settings unknown": setting(more=1),
    "settings missing": lambda fields, tensors: fields["scopes"][0]["settings"].pop("block"),
    "settings none": scope(settings={}),
    "settings control": setting(**{"\x1b[2J": 1}),
    "block 32.0": setting(block=32.0),
    "block true": both(setting(block=True), row(offset=0)),
    "block 7": setting(block=7),
    "block huge": setting(block=1 << 60),
    "block list": setting(block=[32]),
    "layout unknown": setting(layout="spiral"),
    "layout dict": setting(layout={}),
    "permute 1": setting(permute=1),
    "reflect yes": setting(reflect="yes"),
    "permute hash": setting(permute=False, layout="hash"),
    "bits 3": setting(bits=3),
    "bits 8.0": setting(bits=8.0),
    "bits true": setting(bits=True),
    "bits_block negative": setting(bits_block=-1),
    "bits_block true": setting(bits_block=True),
    "bits_block none": setting(bits_block=None),
    "sparse 0": setting(sparse=0),
    "sparse without marks": setting(sparse=True),
    "scopes empty": put("scopes", []),
    "scopes dict": put("scopes", {}),
    "scopes null": put("scopes", [None]),
    "scopes of lists": put("scopes", [[]]),
    "scope with more": scope(more=1),
    "scope not whole": lambda fields, tensors: fields["scopes"][0].pop("frozen"),
    "scope without weights": lambda fields, tensors: fields["scopes"].append(fields["scopes"][0]),
    "scope 1": row(scope=1),
    "scope -1": row(scope=-1),
    "scope false": row(scope=False),
    "scope 0.0": row(scope=0.0),
    "scope text": row(scope="0"),
    "scope huge": row(scope=10**300),
    "scope without the first": both(another_scope(), row(scope=1, offset=32)),
    "scope name number": scope(name=1),
    "scope name null": scope(name=None),
    "another scope of the same state": another_scope(state="fxrpg_ring"),
    "another scope of no method": another_scope(method="magic"),
    "another scope without its state": both(another_scope(), tensor("fxrpg_ring_c", None)),
    "another scope of another size": another_scope(size=12),
    "another scope above its weights": both(another_scope(size=33), tensor("fxrpg_ring_c", torch.zeros(33))),
    "another scope in the place of the first": both(another_scope(), more_rows(scope=1, offset=0, tensor=2)),
    "another scope after the first": both(
        another_scope(), lambda fields, tensors: fields["table"][1].update(offset=32)
    ),
    "another scope whose state is a name": both(another_scope(), put("aliases", {"fxrpg_ring_c": "first.weight"})),
    "another scope whose state is the first's marks": both(
        setting(sparse=True), another_scope(state="fxrpg_ring_kept")
    ),
    "state without a name": both(scope(state=""), tensor("", torch.zeros(13))),
    "state of another name": both(scope(state="x"), tensor("x", torch.zeros(13))),
    "state below a module": both(scope(state="fxrpg_ring.x"), tensor("fxrpg_ring.x", torch.zeros(13))),
    "state that is the scales": scope(state="fxrpg_scale"),
    "state that is dense": scope(state="first.bias"),
    "state long": scope(state="fxrpg_ring" + "x" * 10**6),
    "frozen 1": scope(frozen=1),
    "frozen without such a form": both(scope(frozen=True), tensor("fxrpg_ring", torch.zeros(13, dtype=torch.uint8))),
    "frozen but not its state": both(scope(frozen=True), setting(bits=8)),
    "dtype of whole numbers": scope(dtype="I32"),
    "dtype of eight bits": scope(dtype="F8_E4M3"),
    "dtype unknown": scope(dtype="F31"),
    "dtype empty": scope(dtype=""),
    "dtype null": scope(dtype=None),
    "dtype of another state": scope(dtype="F64"),
    "kept without original": row(kept=[[0, 1, 2, 3, 4], []]),
    "original without kept": row(original=[5, 5]),
    "kept without channels": row(kept=[[0, 1, 2, 3, 6], []], original=[7, 5]),
    "channels list": put("channels", []),
    "channels null": put("channels", {"first": None}),
    "channels of one side": put("channels", {"first": [[0]]}),
    "channels of three sides": put("channels", {"first": [[0], [0], [0]]}),
    "channels dict": put("channels", {"first": {"0": [0], "1": [0]}}),
    "channels without lists": put("channels", {"first": [0, 1]}),
    "channels text": put("channels", {"first": ["01", "01"]}),
    "channels falling": put("channels", {"first": [[1, 0], []]}),
    "channels twice": put("channels", {"first": [[0, 0], []]}),
    "channels negative": put("channels", {"first": [[-1, 0], []]}),
    "channels true": put("channels", {"first": [[False, True], []]}),
    "channels 0.0": put("channels", {"first": [[0.0], []]}),
    "channels null index": put("channels", {"first": [[None], []]}),
    "channels huge": put("channels", {"first": [[], [1 << 62]]}),
    "channels of a whole weight": put("channels", {"a": [[0, 1], []]}),
    "seed negative": put("seed", -1),
    "seed 2^64": put("seed", 1 << 64),
    "seed text": put("seed", "11"),
    "seed true": put("seed", True),
    "seed 11.0": put("seed", 11.0),
    "seed none": put("seed", None),
    "size 0": both(scope(size=0), tensor("fxrpg_ring", torch.zeros(0))),
    "size negative": scope(size=-13),
    "size other": scope(size=12),
    "size above weights": both(scope(size=26), tensor("fxrpg_ring", torch.zeros(26))),
    "size huge": scope(size=1 << 62),
    "size true": both(scope(size=True), tensor("fxrpg_ring", torch.zeros(1))),
    "size 13.0": scope(size=13.0),
    "table empty": put("table", []),
    "table of lists": put("table", [[]]),
    "table null": put("table", [None]),
    "table not whole": lambda fields, tensors: fields["table"][0].pop("ties"),
    "row with more": row(more=1),
    "name number": row(name=1),
    "name of the state": row(name="fxrpg_ring"),
    "name of the scales": row(name="fxrpg_scale"),
    "name of a stored tensor": row(name="first.bias"),
    "name of an alias": row(name="last.weight"),
    "name twice": more_rows(name="a.weight"),
    "name in ties of another": more_rows(name="b.weight"),
    "tie to itself": row(ties=["a.weight"]),
    "tie twice": row(ties=["b.weight", "b.weight"]),
    "tie number": row(ties=[1]),
    "tie of a stored tensor": row(ties=["b.weight", "first.bias"]),
    "tensor 1": row(tensor=1),
    "tensor -1": row(tensor=-1),
    "tensor false": row(tensor=False),
    "tensor twice": more_rows(tensor=0),
    "shape empty": row(shape=[], order=[]),
    "shape 0": row(shape=[0, 5]),
    "shape negative": row(shape=[-5, -5]),
    "shape 5.0": row(shape=[5.0, 5]),
    "shape true": row(shape=[True, 25]),
    "shape text": row(shape=["5", 5]),
    "shape nested": row(shape=[[5], 5]),
    "shape of exabytes": row(shape=[1 << 30, 1 << 30]),
    "shape that overflows": row(shape=[1 << 32, 1 << 32]),
    "shape that overflows to 25": row(shape=[(1 << 63) + 25, 1]),
    "shape of a thousand dimensions": row(shape=[5, 5] + [1] * 998, order=list(range(1000))),
    "shape huge number": row(shape=[10**300, 5]),
    "exabytes together": both(row(shape=[1 << 47, 1]), more_rows(shape=[1, (1 << 47) + 1], offset=1 << 47)),
    "order short": row(order=[0]),
    "order long": row(order=[0, 1, 2]),
    "order twice": row(order=[0, 0]),
    "order from 1": row(order=[1, 2]),
    "order negative": row(order=[0, -1]),
    "order 1.0": row(order=[0.0, 1.0]),
    "order true": row(order=[False, True]),
    "order text": row(order=["0", "1"]),
    "order mixed": row(order=[0, "1"]),
    "offset 1": row(offset=1),
    "offset negative": row(offset=-32),
    "offset huge": row(offset=10**300),
    "offset false": row(offset=False),
    "offsets overlap": more_rows(offset=0),
    "offsets with a hole": more_rows(offset=64),
    "scale 0": row(scale=0.0),
    "scale negative": row(scale=-1.0),
    "scale nan": row(scale=NAN),
    "scale infinite": row(scale=INFINITY),
    "scale over float32": row(scale=1e300),
    "scale under float32": row(scale=1e-300),
    "scale of 24 bits": row(scale=1.0 + 2**-23),
    "scale whole": row(scale=1),
    "rules number": put("rules", [1]),
    "dense number": put("dense", {"why": 5}),
    "dense text": put("dense", {"why": "abc"}),
    "dense list of numbers": put("dense", {"why": [5]}),
    "dense twice": put("dense", {"why": ["first.bias"], "also": ["first.bias"]}),
    "dense and generated": put("dense", {"why": ["a.weight"]}),
    "aliases list": put("aliases", []),
    "alias to number": put("aliases", {"last.weight": 1}),
    "alias to nothing": put("aliases", {"last.weight": "x"}),
    "alias to the state": put("aliases", {"last.weight": "fxrpg_ring"}),
    "alias to the frozen state": both(put("aliases", {"x": "fxrpg_ring"}), put("frozen", ["fxrpg_ring"])),
    "alias to a generated weight": put("aliases", {"last.weight": "a.weight"}),
    "alias to itself": put("aliases", {"x": "x"}),
    "alias of a stored tensor": put("aliases", {"first.bias": "first.weight"}),
    "alias of a generated weight": put("aliases", {"b.weight": "first.weight"}),
    "alias of the state": put("aliases", {"fxrpg_ring": "first.weight"}),
    "alias of the digest": put("aliases", {"fxrpg_digest": "first.weight"}),
    "frozen number": put("frozen", [1]),
    "frozen unknown": put("frozen", ["x"]),
    "frozen generated": put("frozen", ["a.weight"]),
    "draws other": put("draws", "0" * 16),
    "draws long": put("draws", "x" * 10**6),
    "tensors other": put("tensors", "0" * 64),
    "digest other": put("digest", "0" * 64),
    "digest empty": put("digest", ""),
    "state missing": tensor("fxrpg_ring", None),
    "state longer": tensor("fxrpg_ring", torch.zeros(14)),
    "state a matrix": tensor("fxrpg_ring", torch.zeros(13, 1)),
    "state whole numbers": tensor("fxrpg_ring", torch.zeros(13, dtype=torch.int64)),
    "state complex": tensor("fxrpg_ring", torch.zeros(13, dtype=torch.complex64)),
    "state of eight bits": tensor("fxrpg_ring", torch.zeros(13).to(torch.float8_e4m3fn)),
    "generated weight stored": tensor("a.weight", torch.zeros(5, 5)),
    "alias stored": tensor("last.weight", torch.zeros(5, 5)),
    "scales stored": tensor("fxrpg_scale", torch.zeros(1, dtype=torch.int32)),
    "marks of what is not pruned": tensor("fxrpg_ring_kept", torch.zeros(2, dtype=torch.uint8)),
    "marks that are no bytes": tensor("fxrpg_ring_kept", torch.zeros(())),
    "digest stored": tensor("fxrpg_digest", torch.zeros(32, dtype=torch.uint8)),
    "dense missing": tensor("first.bias", None),
    **{f"no {name}": lambda fields, tensors, name=name: fields.pop(name) for name in (*validation._FIELDS, "seed")},
    **{f"{name} null": put(name, None) for name in validation._FIELDS},
}


# What only the model tells.
NEEDS_MODEL = {
    "dense missing",
    "marks of what is not pruned",
    "marks that are no bytes",
    "channels of no module",
    "channels of an activation",
    "channels beyond a dense layer",
    "channels beyond a norm",
    "channels into a norm",
    "channels that nothing lost",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_header(attack, packed, tmp_path):
    check_refused(attack, Tied(), forged(packed, tmp_path / "m.safetensors", HOSTILE[attack]))


def check_refused(attack: str, model: nn.Module, path: Path) -> None:
    before = snapshot(model)
    refusal(fxrpg.load, model, path)
    if attack not in NEEDS_MODEL:
        refusal(checkpoint.unpack, path)
    if attack not in NEEDS_MODEL and not attack.startswith("draws"):  # needs the seed
        refusal(checkpoint.read, path)
    assert snapshot(model) == before


@pytest.fixture(scope="module")
def packed_form(tmp_path_factory):
    """The file of a form."""

    @functools.cache
    def make(form: str) -> Path:
        path = tmp_path_factory.mktemp("form") / "m.safetensors"
        fxrpg.save(FORMS[form][1](), path)
        return path

    return make


def the_row(which: str, **values: Any) -> Callable[..., None]:
    return lambda fields, tensors: next(one for one in fields["table"] if one["name"] == which).update(values)


def the_scope(which: str, **values: Any) -> Callable[..., None]:
    return lambda fields, tensors: next(one for one in fields["scopes"] if one["state"] == which).update(values)


def its_settings(which: str, **values: Any) -> Callable[..., None]:
    return lambda fields, tensors: next(one for one in fields["scopes"] if one["state"] == which)["settings"].update(
        values
    )


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    return lambda fields, tensors: tensors.update({name: change(tensors[name])})


def marks(*bytes_: int) -> Callable[..., None]:
    return tensor("fxrpg_ring_kept", torch.tensor(bytes_, dtype=torch.uint8))


# Of "pruned", 8 of 13 numbers are left; of "channels", 5 of 8 channels.
FIVE = [0, 1, 2, 3, 4]
HOSTILE_FORMS = {
    "marks missing": ("pruned", tensor("fxrpg_ring_kept", None)),
    "marks of nothing": ("pruned", marks(0, 0)),
    "marks one too many": ("pruned", marks(0b11111111, 0b1)),
    "marks one too few": ("pruned", marks(0b1111111, 0)),
    "marks beyond the state": ("pruned", marks(0b1111111, 0b100000)),
    "marks short": ("pruned", marks(0b11111111)),
    "marks long": ("pruned", marks(0b11111111, 0, 0)),
    "marks a matrix": ("pruned", edit("fxrpg_ring_kept", lambda t: t[None])),
    "marks of another type": ("pruned", edit("fxrpg_ring_kept", lambda t: t.to(torch.int8))),
    "marks that are numbers": ("pruned", edit("fxrpg_ring_kept", torch.Tensor.float)),
    "marks that are truth": ("pruned", edit("fxrpg_ring_kept", torch.Tensor.bool)),
    "alias to the marks": ("pruned", put("aliases", {"x": "fxrpg_ring_kept"})),
    "alias of the marks": ("pruned", put("aliases", {"fxrpg_ring_kept": "0.bias"})),
    "marks that are a weight": ("pruned", the_row("2.weight", name="fxrpg_ring_kept")),
    "pruned state whole": ("pruned", tensor("fxrpg_ring", torch.zeros(13))),
    "pruned state longer": ("pruned", tensor("fxrpg_ring", torch.zeros(14))),
    "pruned state shorter": ("pruned", edit("fxrpg_ring", lambda t: t[1:])),
    "pruned state empty": ("pruned", edit("fxrpg_ring", lambda t: t[:0])),
    "pruned state a matrix": ("pruned", edit("fxrpg_ring", lambda t: t[None])),
    "pruned state of bytes": ("pruned", edit("fxrpg_ring", lambda t: t.to(torch.uint8))),
    "pruned state missing": ("pruned", tensor("fxrpg_ring", None)),
    "pruned, it says not": ("pruned", setting(sparse=False)),
    "pruned of another size": ("pruned", scope(size=17)),
    "pruned and frozen": ("pruned", scope(frozen=True)),
    "frozen state longer": ("frozen ring", edit("fxrpg_ring", lambda t: torch.cat([t, t]))),
    "frozen state shorter": ("frozen ring", edit("fxrpg_ring", lambda t: t[1:])),
    "frozen state a matrix": ("frozen ring", edit("fxrpg_ring", lambda t: t[None])),
    "frozen state of other bytes": ("frozen ring", edit("fxrpg_ring", lambda t: t.view(torch.int8))),
    "frozen state of numbers": ("frozen ring", edit("fxrpg_ring", torch.Tensor.float)),
    "frozen state missing": ("frozen ring", tensor("fxrpg_ring", None)),
    "frozen, it says not": ("frozen ring", scope(frozen=False)),
    "frozen in no bits": ("frozen ring", setting(bits=None)),
    "frozen in other bits": ("frozen ring", setting(bits=8)),
    "frozen in other blocks": ("frozen ring", setting(bits_block=4)),
    "frozen in huge blocks": ("frozen ring", setting(bits_block=1 << 62)),
    "frozen of another size": ("frozen ring", scope(size=15)),
    "frozen states of several types": ("everything", the_scope("fxrpg_ring_5_weight", dtype="F16")),
    "mask missing": ("frozen masks", tensor("2.weight_mask", None)),
    "mask short": ("frozen masks", edit("2.weight_mask", lambda t: t[1:])),
    "mask of numbers": ("frozen masks", edit("2.weight_mask", torch.Tensor.float)),
    "mask called a score": ("frozen masks", scope(state="_score")),
    "mask not called frozen": ("frozen masks", scope(frozen=False)),
    "mask of all weights": ("frozen masks", setting(threshold="global")),
    "mask of another name": ("frozen masks", scope(state="_mask2")),
    "mask a weight": ("frozen masks", the_row("5.weight", name="2.weight_mask")),
    "mask a tie": ("frozen masks", the_row("5.weight", ties=["2.weight_mask"])),
    "mask an alias": ("frozen masks", put("aliases", {"2.weight_mask": "0.bias"})),
    "score missing": ("methods", tensor("0.weight_score", None)),
    "score of another shape": ("methods", edit("0.weight_score", lambda t: t.t().contiguous())),
    "score of whole numbers": ("methods", edit("0.weight_score", torch.Tensor.int)),
    "keep 0": ("methods", its_settings("_score", keep=0.0)),
    "keep 1": ("methods", its_settings("_score", keep=1.0)),
    "keep nan": ("methods", its_settings("_score", keep=NAN)),
    "keep whole": ("methods", its_settings("_score", keep=1)),
    "prototype unknown": ("methods", its_settings("_score", prototype="x")),
    "prototype size 0": ("methods", the_scope("_score", size=0)),
    "prototype above the largest weight": ("methods", the_scope("_score", size=41)),
    "prototype of another size than follows": ("methods", its_settings("_score", prototype="one_layer")),
    "law unknown": ("methods", its_settings("fxrpg_alpha_7", law="x")),
    "law null": ("methods", its_settings("fxrpg_alpha_7", law=None)),
    "states of one name": ("methods", the_scope("fxrpg_alpha_7", state="fxrpg_alpha_3")),
    "states exchanged": (
        "methods",
        both(the_scope("fxrpg_alpha_7", state="fxrpg_alpha"), the_scope("fxrpg_alpha_3", state="fxrpg_alpha_7")),
    ),
    "scopes exchanged": ("methods", both(the_row("2.weight", scope=2), the_row("5.weight", scope=1))),
    "kept falling": ("channels", the_row("2.weight", kept=[[1, 0, 2, 3, 4], FIVE])),
    "kept twice": ("channels", the_row("2.weight", kept=[[0, 0, 1, 2, 3], FIVE])),
    "kept beyond": ("channels", the_row("2.weight", kept=[[0, 1, 2, 3, 8], FIVE])),
    "kept far beyond": ("channels", the_row("2.weight", kept=[[0, 1, 2, 3, 10**300], FIVE])),
    "kept negative": ("channels", the_row("2.weight", kept=[[-1, 1, 2, 3, 4], FIVE])),
    "kept true": ("channels", the_row("2.weight", kept=[[False, True, 2, 3, 4], FIVE])),
    "kept 0.0": ("channels", the_row("2.weight", kept=[[0.0, 1, 2, 3, 4], FIVE])),
    "kept text": ("channels", the_row("2.weight", kept=["01234", FIVE])),
    "kept null": ("channels", the_row("2.weight", kept=[None, FIVE])),
    "kept dict": ("channels", the_row("2.weight", kept=[{"0": 0}, FIVE])),
    "kept fewer": ("channels", the_row("2.weight", kept=[[0, 1, 2, 3], FIVE])),
    "kept all": ("channels", the_row("2.weight", kept=[[], FIVE])),
    "kept on one axis": ("channels", the_row("2.weight", kept=[FIVE])),
    "kept on three axes": ("channels", the_row("2.weight", kept=[FIVE, FIVE, []])),
    "kept nothing": ("channels", the_row("2.weight", kept=[])),
    "kept other channels than the layer": ("channels", the_row("2.weight", kept=[[0, 1, 2, 3, 5], [0, 1, 2, 3, 6]])),
    "kept whole weight": ("channels", the_row("2.weight", shape=[8, 8], kept=[], original=[])),
    "original none": ("channels", the_row("2.weight", original=[])),
    "original of one axis": ("channels", the_row("2.weight", original=[8])),
    "original of three axes": ("channels", the_row("2.weight", original=[8, 8, 1])),
    "original smaller": ("channels", the_row("2.weight", original=[4, 8])),
    "original larger": ("channels", the_row("2.weight", original=[9, 8])),
    "original 8.0": ("channels", the_row("2.weight", original=[8.0, 8])),
    "original negative": ("channels", the_row("2.weight", original=[-8, -8])),
    "original of exabytes": ("channels", the_row("2.weight", original=[1 << 30, 1 << 30])),
    "shape that was": ("channels", the_row("2.weight", shape=[8, 8])),
    "channels none": ("channels", put("channels", {})),
    "channels of no module": ("plain", put("channels", {"nothing": [[0], []]})),
    "channels of an activation": ("plain", put("channels", {"1": [[0], []]})),
    "channels beyond a dense layer": ("plain", put("channels", {"7": [[0, 3], []]})),
    "channels beyond a norm": ("plain", put("channels", {"3": [[8], []]})),
    "channels into a norm": ("plain", put("channels", {"3": [[], [0]]})),
    "channels that nothing lost": ("plain", put("channels", {"7": [[0, 1], []]})),
}


@pytest.mark.parametrize("attack", HOSTILE_FORMS)
def test_hostile_form(attack, packed_form, tmp_path):
    form, change = HOSTILE_FORMS[attack]
    check_refused(attack, Chain(), forged(packed_form(form), tmp_path / "m.safetensors", change))


def test_the_forger_is_able(packed, tmp_path):
    """Without an attack the forged file is accepted, with another state it gives other weights."""
    path = forged(packed, tmp_path / "m.safetensors", lambda fields, tensors: None)
    assert everything(checkpoint.read(path)) == everything(checkpoint.read(packed))
    path = forged(packed, path, more_rows())
    assert len(checkpoint.verify(path).views) == 2
    path = forged(packed, path, another_scope())
    assert [scope.name for scope in checkpoint.verify(path).scopes] == ["", "c"]
    kept = row(shape=[4, 5], kept=[[0, 1, 3, 4], []], original=[5, 5])
    channels = put("channels", {"a": [[0, 1, 3, 4], []], "b": [[0, 1, 3, 4], []]})
    whole = checkpoint.unpack(packed)["a.weight"]
    assert torch.equal(checkpoint.unpack(forged(packed, path, both(kept, channels)))["a.weight"], whole[[0, 1, 3, 4]])
    loaded = fxrpg.load(Tied(), forged(packed, path, tensor("fxrpg_ring", torch.ones(13))))
    assert loaded.fxrpg_ring.eq(1).all()


@pytest.mark.parametrize("block", [13, 1 << 62, 1 << 70])
def test_blocks_larger_than_the_ring_are_the_ring(block, packed, tmp_path):
    """And take no memory of their own."""
    whole = checkpoint.unpack(forged(packed, tmp_path / "w.safetensors", setting(bits=8)))
    path = forged(packed, tmp_path / "m.safetensors", setting(bits=8, bits_block=block))
    assert bits(checkpoint.unpack(path)) == bits(whole)
    small = fxrpg.load(Tied(), path)
    fxrpg.save(fxrpg.freeze(small), path)
    assert bits(checkpoint.unpack(path)) == bits(whole)
    small.a(torch.ones(1, 5)).sum().backward()
    assert small.fxrpg_ring.grad.isfinite().all()


VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**40,
    -1e9,
    0.5,
    NAN,
    INFINITY,
    "",
    "x",
    "\ud800",
    "\x1b[2J\n",
]
VALUES += [[], {}, [[]], {"": []}, [0, 1], ["a"], "first.bias", [[[[[[[[[[]]]]]]]]]], "y" * 1000]


def places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("form", ["tied", "everything"])
def test_any_value_in_any_place_is_refused_or_read(form, packed, packed_form, tmp_path):
    """No other exception than FxrpgError, whatever stands where."""
    make, source = (Tied, packed) if form == "tied" else (Chain, packed_form(form))
    fields, accepted, path = checkpoint.read(source).fields, 0, tmp_path / "m.safetensors"
    cases = [(*p, value) for p in places(fields) if p for value in VALUES]
    for *place, last, value in cases if form == "tied" else cases[::10]:

        def change(fields, tensors, place=place, last=last, value=value):
            for key in place:
                fields = fields[key]
            fields[last] = value

        forged(source, path, change)
        with contextlib.suppress(FxrpgError):
            contents = checkpoint.read(path)
            accepted += 1
            fxrpg.load(make(), path)
            if contents.plan(path).generated < 10**6:
                checkpoint.unpack(path)
    assert accepted < 300


def with_text(source: Path, target: Path, text: str) -> Path:
    save_file(checkpoint.read(source).tensors, target, {"fxrpg": text})
    return target


@pytest.mark.parametrize("depth", [10, 300, 900, 960, 990, 1000, 2000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting(depth, opening, closing, packed, tmp_path):
    nested = opening * depth + "1" + closing * depth
    fields = checkpoint.read(packed).fields
    for text in (nested, header.canonical(fields | {"rules": "HERE"}).replace('"HERE"', nested)):
        refusal(checkpoint.read, with_text(packed, tmp_path / "m.safetensors", text))
        refusal(checkpoint.read, with_text(packed, tmp_path / "m.safetensors", text[:-1]))


def test_the_header_has_one_form(packed, tmp_path):
    fields = checkpoint.read(packed).fields
    text = header.canonical(fields)
    for other in (
        json.dumps(fields),
        json.dumps(fields, sort_keys=True),
        text + " ",
        text.replace('"format":1', '"format":2,"format":1'),
        text.replace('"format":1', '"format":01'),
        text.replace("a.weight", "\\u0061.weight"),
        text.replace('"size":13', '"size":13' + "0" * 5000),
        "",
        "null",
        "1e400",
        "\x00",
    ):
        assert other != text
        refusal(checkpoint.read, with_text(packed, tmp_path / "m.safetensors", other))


def container(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F8_E4M3FNUZ", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]},
        {"dtype": "F6_E2M3", "shape": [4, 4], "data_offsets": [0, 12]},
        {"dtype": "X", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]},
        {"dtype": "F32", "shape": [1 << 61], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [(1 << 63) + 5, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1 << 40, 1 << 23, 0], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2] + [1] * 70, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
    ids=str,
)
def test_hostile_container(entry, packed, tmp_path):
    """Beside the state lies a tensor that no reader should believe in."""
    fields = checkpoint.read(packed).fields | {"frozen": [], "aliases": {}}
    fields["scopes"][0]["size"] = 1
    fields["digest"] = header.header_digest(fields)
    size = 12 if "F6" in str(entry) else 0 if "0, 0]}" in str(entry) else 8
    entries = {
        "__metadata__": {"fxrpg": header.canonical(fields)},
        "x": entry,
        "fxrpg_ring": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
    }
    path = container(tmp_path / "m.safetensors", entries, b"\0" * (size + 4))
    message = refusal(checkpoint.read, path)
    assert "digest" not in message, "refused before it is read"


def test_weights_that_no_memory_holds(packed, tmp_path):
    """A file may stand for more weights than fit: reading it allocates nothing for them, unpacking says so."""
    path = forged(packed, tmp_path / "m.safetensors", row(shape=[1 << 46, 1]))
    assert checkpoint.verify(path).generated == 1 << 46
    assert "must have shape" in refusal(fxrpg.load, Tied(), path)
    assert "must fit into memory" in refusal(checkpoint.unpack, path)
