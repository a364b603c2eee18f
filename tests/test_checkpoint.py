"""Files: what is saved comes back bit for bit; what is damaged, hostile or of another model is one clear error."""

from __future__ import annotations

import contextlib
import copy
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
from models import resnet18
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxrpg
from fxrpg import FxrpgError, checkpoint, header

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


def transformed(make: Callable[[], nn.Module], dof: int = 13, **settings: Any) -> nn.Module:
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
    small = transformed(Net, dof=37, method=generator)
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(Net(), tmp_path / "m.safetensors")
    assert loaded._fxrpg_plan.generator == generator
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
    assert header.parse(path, metadata(path))["seed"] == "withheld"
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


def setting(**values: Any) -> Callable[..., None]:
    return lambda fields, tensors: fields["settings"].update(values)


def row(**values: Any) -> Callable[..., None]:
    return lambda fields, tensors: fields["table"][0].update(values)


def tensor(name: str, value: torch.Tensor | None) -> Callable[..., None]:
    return lambda fields, tensors: tensors.pop(name) if value is None else tensors.update({name: value})


def both(*changes: Callable[..., None]) -> Callable[..., None]:
    return lambda fields, tensors: [change(fields, tensors) for change in changes]


def more_rows(**values: Any) -> Callable[..., None]:
    """A second row, right after the first one but for `values`."""
    return lambda fields, tensors: fields["table"].append(
        {"name": "c", "ties": [], "tensor": 1, "shape": [4, 8], "order": [0, 1], "offset": 32, "scale": 1.0} | values
    )


HOSTILE = {
    "version 0": put("format", 0),
    "version 2": put("format", 2),
    "version true": put("format", True),
    "version 1.0": put("format", 1.0),
    "version huge": put("format", 10**300),
    "more fields": put("more", 1),
    "method unknown": put("method", "magic"),
    "method long": put("method", "x" * 10**6),
    "settings unknown": setting(more=1),
    "settings missing": lambda fields, tensors: fields["settings"].pop("block"),
    "settings none": put("settings", {}),
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
    "seed negative": put("seed", -1),
    "seed 2^64": put("seed", 1 << 64),
    "seed text": put("seed", "11"),
    "seed true": put("seed", True),
    "seed 11.0": put("seed", 11.0),
    "seed none": put("seed", None),
    "size 0": both(put("size", 0), tensor("fxrpg_ring", torch.zeros(0))),
    "size negative": put("size", -13),
    "size other": put("size", 12),
    "size above weights": both(put("size", 26), tensor("fxrpg_ring", torch.zeros(26))),
    "size huge": put("size", 1 << 62),
    "size true": both(put("size", True), tensor("fxrpg_ring", torch.zeros(1))),
    "size 13.0": put("size", 13.0),
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
    "digest stored": tensor("fxrpg_digest", torch.zeros(32, dtype=torch.uint8)),
    "dense missing": tensor("first.bias", None),
    **{f"no {name}": lambda fields, tensors, name=name: fields.pop(name) for name in (*header._FIELDS, "seed")},
    **{f"{name} null": put(name, None) for name in header._FIELDS},
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_header(attack, packed, tmp_path):
    path = forged(packed, tmp_path / "m.safetensors", HOSTILE[attack])
    model = Tied()
    before = snapshot(model)
    refusal(fxrpg.load, model, path)
    if attack != "dense missing":  # needs the model
        refusal(checkpoint.unpack, path)
    if not attack.startswith("draws"):  # needs the seed
        refusal(checkpoint.read, path)
    assert snapshot(model) == before


def test_the_forger_is_able(packed, tmp_path):
    """Without an attack the forged file is accepted, with another state it gives other weights."""
    path = forged(packed, tmp_path / "m.safetensors", lambda fields, tensors: None)
    assert everything(checkpoint.read(path)) == everything(checkpoint.read(packed))
    path = forged(packed, path, more_rows())
    assert len(checkpoint.verify(path).views) == 2
    loaded = fxrpg.load(Tied(), forged(packed, path, tensor("fxrpg_ring", torch.ones(13))))
    assert loaded.fxrpg_ring.eq(1).all()


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


def test_any_value_in_any_place_is_refused_or_read(packed, tmp_path):
    """No other exception than FxrpgError, whatever stands where."""
    fields, accepted, path = checkpoint.read(packed).fields, 0, tmp_path / "m.safetensors"
    for *place, last in (p for p in places(fields) if p):
        for value in VALUES:

            def change(fields, tensors, place=place, last=last, value=value):
                for key in place:
                    fields = fields[key]
                fields[last] = value

            forged(packed, path, change)
            with contextlib.suppress(FxrpgError):
                contents = checkpoint.read(path)
                accepted += 1
                fxrpg.load(Tied(), path)
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
    fields = checkpoint.read(packed).fields | {"frozen": [], "aliases": {}, "size": 1}
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
