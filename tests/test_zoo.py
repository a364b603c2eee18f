"""The zoo's runner: it catches what is wrong, a process that dies costs one model, and its files say what was found."""

from __future__ import annotations

import copy
import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxrpg
from fxrpg.lowering import LOWERINGS
from fxrpg.owner import SCALE, link_of

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench.zoo import calls, catalogue, checks, compiled, row, run, schedule, subject, table, watch  # noqa: E402
from bench.zoo.models import specimens  # noqa: E402
from bench.zoo.subject import Subject  # noqa: E402
from bench.zoo.torchvision_cpu import nms  # noqa: E402

# a specimen has the older weight norm
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Net(nn.Module):
    """Two linear layers on one weight, an embedding, a norm with buffers, a bias without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.head(self.norm(self.second(self.first(x).tanh())))}


def build() -> catalogue.Example:
    return Net(), (torch.randn(5, 8),), {}


@pytest.fixture
def net() -> Subject:
    return Subject(build, "ring")


# The catalogue.


def test_all_models_are_there_and_importing_them_imports_no_library():
    code = """
import sys
from bench.zoo.catalogue import models
found = models()
libraries = {"torchvision", "timm", "transformers", "diffusers", "monai", "torch_geometric"}
print(len(found), len({package for package, _ in found.values()}), *libraries & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["66", "10"]


def test_a_third_of_the_models_covers_every_package():
    every = catalogue.models()
    third = catalogue.chosen(every, third=True)
    assert set(third) == set(catalogue.THIRD)
    assert 3 * len(third) == len(every)
    assert {every[name][0] for name in third} == {package for package, _ in every.values()}


def test_boxes_that_overlap_are_dropped():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30], [0, 0, 10, 4]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.3]), 0.5).tolist() == [1, 3, 2]


# Whole runs, in processes of their own.

DEADLY = """
import os, signal, sys
from bench.zoo.models.specimens import cell_loop
def killed(): os.kill(os.getpid(), signal.SIGKILL)
def left(): print("no room", file=sys.stderr); os._exit(3)
def broken(): raise ValueError("no such layer")
MODELS = {name: ("torch", build) for name, build in
          {"killed": killed, "left": left, "broken": broken, "sound": cell_loop}.items()}
"""


@pytest.fixture(scope="module")
def deadly(tmp_path_factory):
    """The rows of a run of models of which all but one end badly, its exit code, and what it printed."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "models.py").write_text(DEADLY)
    command = [sys.executable, str(ROOT / "bench" / "zoo" / "run.py"), "--models", str(folder / "models.py")]
    command += ["--out", str(folder / "out.csv"), "--jobs", "2", "--method", "ring", "pemn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with (folder / "out.csv").open(newline="") as file:
        return list(csv.DictReader(file)), done


def test_a_process_that_dies_costs_its_own_model(deadly):
    rows, done = deadly
    assert done.returncode == 1
    assert [(found["model"], found["method"]) for found in rows] == [
        (name, method) for name in ("killed", "left", "broken", "sound") for method in ("ring", "pemn")
    ]
    failed = {found["model"]: found["failed"] for found in rows}
    assert failed["killed"] == "killed by SIGKILL (build)"
    assert failed["left"] == "ended with code 3: no room (build)"
    assert failed["broken"] == "ended with code 1: ValueError: no such layer (build)"
    assert failed["sound"] == ""
    assert "killed ring: killed by SIGKILL (build)" in done.stderr
    assert "4/4" in done.stderr, "a bar shows how far it is"


def test_the_file_and_the_tables_of_a_run(deadly):
    rows, done = deadly
    assert tuple(rows[0]) == table.COLUMNS
    sound = rows[-2]
    assert (sound["package"], sound["ok"], sound["fraction"]) == ("torch", "yes", "1")
    assert int(sound["eligible"]) == int(sound["generated"]) == 48 * (8 + 16) + 64
    assert float(sound["staged"]) + float(sound["materialized"]) == pytest.approx(1, abs=1e-3)
    assert float(sound["difference"]) < 1e-5
    assert rows[0]["eligible"] == rows[0]["dof"] == ""
    assert "1 of 4" in done.stdout
    assert "sound" in done.stdout


def test_only_and_method(tmp_path, capsys):
    out = tmp_path / "deep" / "zoo.csv"
    assert run.main(["--only", "nn.Cell*", "--method", "pranc", "--out", str(out), "--jobs", "1"]) == 0
    with out.open(newline="") as file:
        assert [(found["model"], found["method"]) for found in csv.DictReader(file)] == [("nn.CellLoop", "pranc")]
    assert f"wrote {out}" in capsys.readouterr().out


def test_a_process_that_hangs_is_ended(tmp_path):
    task = row.Task(model="nn.CellLoop", methods=("ring",), out="")
    ((name, (found,)),) = schedule.rows([task], jobs=1, timeout=0.05)
    assert (name, found["ok"], found["failed"]) == ("nn.CellLoop", False, "took over 0.05 s (start)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nothing"], "--only: must match a model, found 'nothing'. Pass a glob such as one of 'tv.*'"),
        (["--models", "nowhere.py"], "--models: must be a Python file, found nowhere.py"),
        (["--models", str(ROOT / "bench" / "zoo" / "table.py")], "--models: must have a dict MODELS"),
    ],
)
def test_mistakes(options, message, capsys):
    assert run.main(options) == 2
    assert message in capsys.readouterr().err


def test_packages_that_are_missing_are_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr(run, "_installed", lambda package: package == "torch")
    assert run.main(["--only", "[tm][vo]*"]) == 2
    assert "zoo: the models' packages must be installed, found no monai, torchvision." in capsys.readouterr().err


def test_totals():
    rows = [
        {"method": "ring", "model": "a", "ok": True, "eligible": 100, "generated": 100, "fraction": 1.0, "staged": 0.5},
        {"method": "ring", "model": "b", "ok": False, "eligible": 300, "generated": 150, "fraction": 0.5, "fused": 1.0},
        {"method": "pemn", "model": "a", "ok": False, "failed": "killed"},
    ]
    ring, pemn = table.totals(rows).splitlines()[2:]
    assert ring.split() == ["ring", "1", "of", "2", "75%", "50%", "(b)", "50%"]
    assert pemn.split() == ["pemn", "0", "of", "1"]
    assert [line.split()[2] for line in table.table(rows).splitlines()[2:]] == ["ok", "WRONG", "WRONG"]


def test_shares_are_cut_not_rounded():
    assert table._percent(0.99999) == "99.9%"


# The checks: all hold of a small model, and each fails when it should.


@pytest.mark.parametrize("method", subject.METHODS)
@pytest.mark.parametrize("make", [build, *specimens.BUILDS.values()])
def test_what_is_right_passes(make, method):
    assert row.checked(Subject(make, method), lambda name: None) == []


def replaced(monkeypatch, change):
    """Have linear layers on generated weights run `change(the rule's call, *arguments)`."""

    def instead(rule):
        return dataclasses.replace(rule, call=lambda x, weight, bias=None: change(rule.call, x, weight, bias))

    monkeypatch.setitem(LOWERINGS, functional.linear, tuple(map(instead, LOWERINGS[functional.linear])))


def test_a_lowering_that_computes_something_else(monkeypatch, net):
    replaced(monkeypatch, lambda call, *args: 1.001 * call(*args))
    for check in (checks.eval_outputs, checks.train_outputs):
        assert re.fullmatch(r"y differs by \d.\de-03 of its largest, in float64 \d.\de-03", check(net))


def test_a_lowering_that_loses_the_states_gradient(monkeypatch, net):
    replaced(monkeypatch, lambda call, x, w, b: call(x, w._replace(state=w.state.detach()), b))
    assert checks.train_outputs(net) is None
    assert "fxrpg_ring differs" in checks.state_gradients(net)


def test_a_lowering_that_loses_other_gradients(monkeypatch, net):
    replaced(monkeypatch, lambda call, x, w, b: call(x.detach(), w, None if b is None else b.detach()))
    assert checks.train_outputs(net) is None
    assert checks.dense_gradients(net)
    assert checks.input_gradients(net)


def test_a_lowering_that_keeps_the_weight(monkeypatch, net):
    full = lambda w: torch.ops.fxrpg.generate.default(w.state, w.scale, w.view)  # noqa: E731
    replaced(monkeypatch, lambda call, x, w, b: functional.linear(x, full(w), b))
    assert checks.train_outputs(net) is checks.state_gradients(net) is None
    assert checks.nothing_saved(net).startswith("2 weights kept, ")


def test_a_slice_of_a_weight_that_is_kept(monkeypatch, net):
    part = lambda w: torch.ops.fxrpg.generate.default(w.state, w.scale, w.view)[:4].clone()  # noqa: E731

    def both(call, x, w, b):
        return call(x, w, b) + 0 * functional.linear(x, part(w)).sum() if w.shape == (8, 8) else call(x, w, b)

    replaced(monkeypatch, both)
    assert checks.nothing_saved(net) == "1 weights kept, first.weight: (8, 4) of its (8, 8)"


def test_what_a_model_makes_of_a_weight_is_told():
    class Standardised(nn.Linear):
        def forward(self, x):
            return functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    found = Subject(lambda: (Standardised(8, 8), (torch.randn(2, 8),), {}), "ring")
    assert checks.nothing_saved(found) is None
    assert found.notes == ["computed from 1 weights and kept for backward by the model's own code"]


def test_rounding_that_a_model_amplifies_is_told_from_an_error(monkeypatch):
    """The difference is there in float32 only: in one case it comes from rounding, in the other it does not."""

    class Steep(nn.Linear):
        def forward(self, x):
            return (1e6 * super().forward(x)).sin()

    def rounded(call, x, w, b):
        return call(x, w, b) * (1 + 2e-7 * (x.dtype == torch.float32))

    found = Subject(lambda: (Steep(8, 8), (torch.randn(2, 8),), {}), "ring")
    replaced(monkeypatch, rounded)
    assert checks.eval_outputs(found) is None
    assert "by rounding: equal in float64" in found.notes[0]
    replaced(monkeypatch, lambda call, x, w, b: call(x, w, b) * (1 + 2e-7))
    found = Subject(lambda: (Steep(8, 8), (torch.randn(2, 8),), {}), "ring")
    assert "in float64" in checks.eval_outputs(found)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda model, args: model.head.weight.data.add_(1), "state head.weight"),
        (lambda model, args: setattr(model.head.bias, "grad", None), "gradient of head.bias"),
        (lambda model, args: model.norm.eval(), "mode of norm"),
        (lambda model, args: args[0][0].add_(1), "argument 0.0"),
        (lambda model, args: torch.rand(1), "random numbers"),
    ],
)
def test_a_transform_that_touches_what_it_is_given(damage, where, monkeypatch):
    polite = subject.transformed

    def rude(model, method, arguments):
        small = polite(model, method, arguments)
        damage(model, arguments)
        return small

    monkeypatch.setattr(subject, "transformed", rude)
    assert where in checks.untouched(Subject(build, "ring"))


def test_ties_that_are_lost(net):
    name, state, text, shape = link_of(net.small.second).weights["weight"]
    link_of(net.small.second).weights["weight"] = name, state, text.replace('"seed":1', '"seed":2'), shape
    assert checks.tied(net) == "transformed: first.weight tied otherwise"


def test_ties_that_are_lost_when_materialized(net):
    net.dense.second.weight = nn.Parameter(net.dense.second.weight.detach().clone())
    assert checks.tied(net) == "materialized: first.weight tied otherwise"


def test_buffers_that_differ():
    net = Subject(build, "ring", torch.float64)  # which nothing is excused by
    assert net.dense
    net.small.norm.register_forward_hook(lambda module, args, out: module.running_mean.add_(1))
    assert "norm.running_mean differs" in checks.buffers(net)


def copied(monkeypatch, net, twin):
    """Have `twin` returned as the transformed model's copy."""
    deepcopy = lambda value, *memo: twin if value is net.small else copy.deepcopy(value, *memo)  # noqa: E731
    monkeypatch.setattr(checks, "copy", SimpleNamespace(deepcopy=deepcopy))


def test_a_copy_that_shares(net, monkeypatch):
    copied(monkeypatch, net, net.small)
    assert checks.deep_copies(net) == "a change of the copy changes the model's y"


def test_a_copy_that_reads_the_models_state(net, monkeypatch):
    twin = copy.deepcopy(net.small)
    for module in twin.modules():
        if link := link_of(module):
            link.root = net.small
    copied(monkeypatch, net, twin)
    assert checks.deep_copies(net) == "the copy reads the state of the model"


def test_files_that_lose_something(net, monkeypatch):
    load = fxrpg.load

    def lossy(*args):
        loaded = load(*args)
        loaded.head.bias.data.mul_(2)
        return loaded

    monkeypatch.setattr(fxrpg, "load", lossy)
    assert checks.files(net) == "other bits in head.bias"


def test_pickles_that_lose_something(net, monkeypatch):
    monkeypatch.setattr(checks, "pickle", SimpleNamespace(dumps=lambda model: model, loads=lambda model: net.dense))
    assert "on one side only" in checks.pickles(net)


def test_frozen_weights_that_are_generated(net, monkeypatch):
    def thawed(model, method, arguments):
        return subject.transformed(model.requires_grad_(True), method, arguments)

    monkeypatch.setattr(checks, "transformed", thawed)
    assert checks.frozen(net) == "head.weight was generated"


def test_frozen_weights_that_are_trained(net, monkeypatch):
    def thawed(model, method, arguments):
        return subject.transformed(model, method, arguments).requires_grad_(True)

    monkeypatch.setattr(checks, "transformed", thawed)
    assert checks.frozen(net) == "head.weight is trained"


def test_frozen_weights_that_are_changed(net, monkeypatch):
    def moved(model, method, arguments):
        small = subject.transformed(model, method, arguments)
        small.head.weight.data.add_(1)
        return small

    monkeypatch.setattr(checks, "transformed", moved)
    assert checks.frozen(net) == "head.weight was changed"


def test_a_step_that_moves_what_is_fixed(net):
    scale = net.small.get_buffer(SCALE)
    net.small.fxrpg_ring.register_post_accumulate_grad_hook(lambda p: None)
    step = torch.optim.SGD.step

    def damaging(self, *args):
        scale.add_(1)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", damaging)
        assert checks.steps(net) == f"{SCALE} was changed"


def test_a_step_that_moves_nothing(net, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    assert checks.steps(net) == "fxrpg_ring was not changed"


def test_a_check_that_raises_has_failed(net, monkeypatch):
    monkeypatch.setattr(fxrpg, "save", lambda *args: 1 / 0)
    (failed,) = row.checked(net, lambda name: None)
    assert failed.startswith("files: ZeroDivisionError: division by zero (test_zoo.py:")


# What models return.


@dataclasses.dataclass
class Answer:
    logits: Tensor
    cache: object
    note: str = "x"


def test_every_tensor_in_a_structure_is_compared():
    class Cache:
        def __init__(self, x):
            self.keys, self.again = [x], self

    def answer(x):
        return Answer(torch.ones(2), Cache((torch.zeros(1), {"deep": x})))

    found = calls.leaves(answer(torch.ones(1)))
    assert set(found) == {"logits", "cache.keys.0.0", "cache.keys.0.1.deep", "note"}
    assert calls.compare(found, calls.leaves(answer(torch.full((1,), 1.5)))) == (0.5 / 1.5, "cache.keys.0.1.deep")
    assert calls.compare(found, found).value == 0


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")])),
        ("mean", "sum"),
        (1, True),
        (torch.ones(1), None),
    ],
)
def test_what_is_unlike_differs_by_infinity(found, expected):
    assert calls.compare({"x": found}, {"x": expected}).value == float("inf")
    assert calls.compare({"x": found}, {"x": found}).value == 0
    assert calls.differing_bits({"x": found}, {"x": expected})
    assert not calls.differing_bits({"x": found}, {"x": found})


# Which parameters are consumed as weights.


class Odd(nn.Module):
    """Parameters that reach an op as its weight, and others that do not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("product", "chunked", "cast", "joined", "standard", "table", "position", "gain"):
            setattr(self, name, nn.Parameter(torch.randn(6, 6)))
        self.bias = nn.Parameter(torch.randn(1, 6))
        self.register_buffer("places", torch.tensor([0, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.position) @ self.product.t()
        first, second = self.chunked.chunk(2, 0)
        x = functional.linear(x, torch.cat([first, second.contiguous()]))
        x = functional.linear(x.double(), self.cast.double()).float()
        x = torch.addmm(self.bias, x, torch.cat([self.joined, self.joined])[:6])
        mean, gain = self.standard.mean(1, keepdim=True), self.gain[:, :1].exp()
        return functional.linear(x, (self.standard - mean) * gain) * self.gain + self.table[self.places].sum()


def test_which_parameters_are_consumed_as_weights():
    model = Odd()
    watcher = watch.Consumed(model)
    with watcher:
        model(torch.randn(6, 6))
    assert watcher.names == {"product", "chunked", "cast", "joined", "standard", "table"}


@pytest.mark.parametrize("make", specimens.BUILDS.values())
def test_specimens_consume_all_their_weights(make):
    """Every parameter of two dimensions or more but the gain of a weight norm."""
    model = make()[0]
    expected = {name for name, p in model.named_parameters() if p.dim() >= 2 and p.numel() > 8}
    assert set(row.weights_consumed(make)) == expected


# Compiling and exporting.


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_compiles_and_exports():
    found = Subject(lambda: (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),), {}), "ring")
    assert compiled.compiles(found, "aot_eager") == {"compiles_plain": "yes", "compiles_transformed": "yes"}
    assert compiled.exports(found) == {"exports_plain": "yes", "exports_transformed": "yes"}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_does_not_export_is_named():
    found = Subject(specimens.cell_loop, "ring")
    assert compiled.exports(found)["exports_plain"] == "GuardOnDataDependentSymNode"
