"""transform, materialize, fit, ledger, explain: what they promise, and the error for each way to misuse them."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrpg
from fxrpg import FxrpgError
from fxrpg.assemble import plan_of
from fxrpg.generators.ring import Ring
from fxrpg.networks import resnet18

EVERYTHING = [fxrpg.Rule("*", "generate")]
ENDS = [fxrpg.Rule("stem.*", "dense"), fxrpg.Rule("head.*", "dense")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.mid = nn.Conv2d(4, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.fc(self.norm(self.mid(self.stem(x))).relu().mean((2, 3))).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
GENERATED = 6 * 4 * 9 + 5 * 6


def test_argument_is_untouched(net):
    before, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    small = fxrpg.transform(net, dof=50)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [type(m) for m in net.modules()] == classes


def test_names_types_and_modes(net):
    small = fxrpg.transform(net.eval(), dof=50)
    kept = {name for name, _ in net.named_parameters()} - {"mid.weight", "fc.weight"}
    assert {name for name, _ in small.named_parameters()} == kept | {"fxrpg_ring"}
    assert set(small.state_dict()) == (set(net.state_dict()) - {"mid.weight", "fc.weight"}) | {
        "fxrpg_ring", "fxrpg_scale", "fxrpg_digest",
    }  # fmt: skip
    assert isinstance(small, Net)
    assert isinstance(small.mid, nn.Conv2d)
    assert not small.training
    assert "GeneratedConv2d(4, 6" in repr(small)


@pytest.mark.parametrize(
    ("dof", "size"),
    [(1, 1), (50, 50), (GENERATED, GENERATED), (np.int64(7), 7), (100.0, 100), (1.0, 224), (0.5, 128), (1e-9, 32)],
)
def test_dof(net, dof, size):
    small = fxrpg.transform(net, dof=dof)
    assert small.fxrpg_ring.numel() == size == fxrpg.ledger(small).dof


@pytest.mark.parametrize(
    "dof", [0, -3, -0.5, 0.0, 1.5, 2.25, GENERATED + 1, float("nan"), float("inf"), True, "10", None]
)
def test_bad_dof(net, dof):
    with pytest.raises(fxrpg.FxrpgError, match=r"^dof: must be an int in \[1, 246\].*found"):
        fxrpg.transform(net, dof=dof)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed: must be an int in \[0, 2\^64\), found -1"),
        ({"seed": 1 << 64}, "seed: must be"),
        ({"seed": "7"}, "seed: must be"),
        ({"seed": 1.5}, "seed: must be"),
        ({"method": "rings"}, r"method: must be one of \['pemn', 'pranc', 'ring'\]"),
        (
            {"plan": [fxrpg.Rule("nothing.*", "generate")]},
            "plan rule nothing.*: must match a parameter's name, found none",
        ),
        ({"plan": [fxrpg.Rule("norm.*", "generate")]}, r"plan rule norm.* must match a weight that can be generated"),
        (
            {"plan": [fxrpg.Rule("*", "dense")]},
            r"plan: at least one weight must be generated, found none of 9 parameters",
        ),
        ({"plan": ["*"]}, r"plan: must hold fxrpg.Rule objects"),
        (
            {"plan": [*EVERYTHING, fxrpg.Rule("fc.*", "dense")]},
            r"plan rule fc.\* -> dense: must decide about a parameter",
        ),
    ],
)
def test_bad_arguments(net, arguments, message):
    with pytest.raises(fxrpg.FxrpgError, match=message):
        fxrpg.transform(net, **{"dof": 10, **arguments})


def test_bad_rules():
    with pytest.raises(
        fxrpg.FxrpgError, match=r"the action must be one of \('generate', 'dense', 'pemn', 'pranc', 'ring'\)"
    ):
        fxrpg.Rule("*", "drop")
    with pytest.raises(fxrpg.FxrpgError, match="must be a string, a module or a function"):
        fxrpg.Rule(3, "dense")
    with pytest.raises(fxrpg.FxrpgError, match="needs a regular expression"):
        fxrpg.Rule("re:(", "dense")


def test_bad_models(net):
    with pytest.raises(fxrpg.FxrpgError, match="must be a torch.nn.Module"):
        fxrpg.transform(lambda x: x, dof=1)
    with pytest.raises(fxrpg.FxrpgError, match="Transform first, then compile"):
        fxrpg.transform(torch.compile(net), dof=10)
    with pytest.raises(fxrpg.FxrpgError, match=r"weight: .* when the model runs, found torch.fx"):
        fx.symbolic_trace(fxrpg.transform(nn.Linear(2, 3), dof=2, plan=EVERYTHING))
    small = fxrpg.transform(net, dof=10)
    with pytest.raises(fxrpg.FxrpgError, match="given to torch.compile"):
        fxrpg.ledger(torch.compile(small))
    with pytest.raises(fxrpg.FxrpgError, match="found no module"):
        fxrpg.ledger("model.safetensors")
    for again in (small, nn.Sequential(small), nn.Sequential(small.fc)):
        with pytest.raises(fxrpg.FxrpgError, match="must not be transformed yet"):
            fxrpg.transform(again, dof=10)
    with pytest.raises(fxrpg.FxrpgError, match=r"1: parameters must be initialised.*LazyLinear"):
        fxrpg.transform(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4), nn.Linear(4, 2)), dof=2)
    with pytest.raises(fxrpg.FxrpgError, match="must be a transformed model"):
        fxrpg.ledger(net)
    for verb in (fxrpg.explain, fxrpg.materialize, lambda m: fxrpg.save(m, "x"), lambda m: fxrpg.fit(m, m)):
        with pytest.raises(fxrpg.FxrpgError, match="must be a transformed model"):
            verb(net)
    mixed = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3).double(), nn.Linear(3, 2))
    with pytest.raises(fxrpg.FxrpgError, match="must share type and device"):
        fxrpg.transform(mixed, dof=2, plan=EVERYTHING)


def test_quantised_modules():
    class Fake(nn.Module):
        __module__ = "torch.ao.nn.quantized.modules.linear"

    with pytest.raises(fxrpg.FxrpgError, match="the quantised Fake"):
        fxrpg.transform(nn.Sequential(nn.Linear(2, 2), Fake()), dof=1, plan=EVERYTHING)


def test_plan_rules(net):
    net.fc.weight.requires_grad_(False)
    rules = [fxrpg.Rule("re:st.m\\.weight", "dense"), fxrpg.Rule(lambda name, p: p.dim() == 4, "generate"), *EVERYTHING]
    small = fxrpg.transform(net, dof=10, plan=rules)
    plan = plan_of(small)
    assert list(plan.views) == ["mid.weight", "head.weight"]
    assert plan.dense["stem.weight"] == "rule re:st.m\\.weight -> dense"
    assert plan.dense["fc.weight"] == "frozen"
    assert not small.fc.weight.requires_grad
    assert "mid.weight: ring (6, 4, 3, 3)" in str(plan)


def test_default_plan_counts_layers_in_module_order():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4))
    assert list(plan_of(fxrpg.transform(model, dof=3)).views) == ["2.weight"]
    everything = plan_of(fxrpg.transform(model, dof=3, plan=EVERYTHING))
    assert {"0.weight", "3.weight_ih_l0", "3.weight_hh_l0"} < set(everything.views)
    with pytest.raises(fxrpg.FxrpgError, match="first and the last"):
        fxrpg.transform(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), dof=1)


@pytest.mark.parametrize("root", ["Sequential", "ModuleList", "Linear", "GraphModule", "nested"])
def test_roots(root):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)]
    x = torch.randn(2, 3)
    if root == "ModuleList":
        small = fxrpg.transform(nn.ModuleList(layers), dof=5, plan=EVERYTHING)
        forward = lambda m: m[2](m[1](m[0](x)))  # noqa: E731
    else:
        model = {
            "Sequential": lambda: nn.Sequential(*layers),
            "Linear": lambda: layers[0],
            "GraphModule": lambda: fx.symbolic_trace(nn.Sequential(*layers)),
            "nested": lambda: nn.Sequential(nn.Sequential(*layers), nn.Identity()),
        }[root]()
        small = fxrpg.transform(model, dof=5, plan=EVERYTHING)
        forward = lambda m: m(x)  # noqa: E731
    expected = forward(small)
    forward(small).sum().backward()
    state = small.state_dict()
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(buffer, weights_only=False)):
        assert torch.equal(forward(again), expected)
        assert again.load_state_dict(state, strict=True)
        with torch.no_grad():
            again.fxrpg_ring.mul_(2)
        assert torch.equal(forward(small), expected)
        assert not torch.equal(forward(again), expected)
    dense = fxrpg.materialize(small)
    torch.testing.assert_close(forward(dense), expected, rtol=1e-5, atol=1e-5)


def test_materialize_gives_the_original_names(net):
    small = fxrpg.transform(net, dof=50)
    dense = fxrpg.materialize(small)
    assert list(dense.state_dict()) == list(net.state_dict())
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert type(dense.mid) is nn.Conv2d
    for mode in (True, False):
        torch.testing.assert_close(dense.train(mode)(X), small.train(mode)(X), rtol=1e-5, atol=1e-5)
    assert isinstance(small.mid.weight, torch.Tensor), "the argument still generates"
    net.load_state_dict(dense.state_dict(), strict=True)
    assert fxrpg.transform(dense, dof=9)


def test_state_dict_between_seeds_and_plans(net):
    small = fxrpg.transform(net, dof=50, seed=1)
    other_init = fxrpg.transform(Net(), dof=50, seed=1)
    other_init.load_state_dict(small.state_dict())
    assert torch.equal(other_init(X), small(X)), "scales come with the state"
    for wrong in (
        {"dof": 50, "seed": 2},
        {"dof": 50, "seed": 1, "method": Ring(block=8)},
        {"dof": 50, "seed": 1, "plan": [fxrpg.Rule("stem.weight", "generate")]},
        {"dof": 51, "seed": 1},
        {"dof": 50, "seed": 1, "scope": "layer"},
        {"dof": 50, "seed": 1, "method": Ring(bits=8)},
        {"dof": 50, "seed": 1, "method": "pranc"},
        {"dof": 50, "seed": 1, "method": "pemn"},
    ):
        target = fxrpg.transform(Net(), **wrong)
        before = copy.deepcopy(target.state_dict())
        for module in (target, nn.Sequential(target)):
            prefix = "0." if isinstance(module, nn.Sequential) else ""
            state = {prefix + key: value for key, value in small.state_dict().items()}
            with pytest.raises(fxrpg.FxrpgError, match="must belong to this model's seed and plan"):
                module.load_state_dict(state, strict=False)
        torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def unscaled(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.fxrpg_ring.detach()
    return {name: v.generator.materialize(state, v, state.dtype) for name, v in plan_of(model).views.items()}


def test_same_seed_same_bits_everywhere(net, tmp_path):
    """Across threads, processes, evaluation orders, ways, compute types and a round trip through a file."""
    small = fxrpg.transform(net, dof=50, seed=9)
    reference = unscaled(small)
    torch.set_num_threads(2)
    again = fxrpg.transform(net, dof=50, seed=9)
    assert torch.equal(again.fxrpg_ring, small.fxrpg_ring)
    assert torch.equal(again.fxrpg_scale, small.fxrpg_scale)
    graph = fxrpg.transform(fx.symbolic_trace(net), dof=50, seed=9)
    fxrpg.save(small, tmp_path / "m.safetensors")
    loaded = fxrpg.load(Net(), tmp_path / "m.safetensors")
    for other in (again, graph, loaded):
        for name, weight in reversed(list(unscaled(other).items())):
            assert torch.equal(weight, reference[name])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for name, weight in unscaled(copy.deepcopy(small).to(dtype)).items():
            assert torch.equal(weight, reference[name].to(dtype))
    code = """
import sys, torch
torch.set_num_threads(3)
sys.path.insert(0, sys.argv[1])
from test_api import Net, fxrpg, unscaled
torch.manual_seed(0)
torch.save(unscaled(fxrpg.transform(Net(), dof=50, seed=9)), sys.argv[2])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "w.pt")], env=environment, check=True
    )
    torch.testing.assert_close(torch.load(tmp_path / "w.pt"), reference, rtol=0, atol=0)
    different = unscaled(fxrpg.transform(net, dof=50, seed=10))
    assert not torch.equal(different["mid.weight"], reference["mid.weight"])


def test_casts_leave_the_scales_alone(net):
    small = fxrpg.transform(net, dof=50)
    scales = small.fxrpg_scale.clone()
    out = small(X)
    for cast in (
        lambda m: m.half().float(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.type(torch.float32),
    ):
        other = cast(copy.deepcopy(small))
        assert torch.equal(other.fxrpg_scale.float(), scales)
        torch.testing.assert_close(other(X.to(other.fxrpg_ring.dtype)).float(), out, rtol=0.1, atol=0.1)


def test_weights_start_with_their_own_deviation(net):
    with torch.no_grad():
        net.mid.weight.mul_(7)
        net.fc.weight.zero_()
    weights = fxrpg.materialize(fxrpg.transform(net, dof=216, method=Ring(block=1))).state_dict()
    torch.testing.assert_close(weights["mid.weight"].std(), net.mid.weight.std(), rtol=0.1, atol=0)
    torch.testing.assert_close(weights["fc.weight"].std(), torch.tensor(1 / (3 * 6) ** 0.5), rtol=0.3, atol=0)


@settings(max_examples=25)
@given(
    dof=st.integers(1, GENERATED), block=st.sampled_from([1, 8, 32]), layout=st.sampled_from(["arc", "shuffle", "hash"])
)
def test_fit_is_least_squares(dof, block, layout):
    """Against NumPy's solver on the explicit matrix."""
    torch.manual_seed(1)
    net = Net().double()
    small = fxrpg.transform(net, dof=dof, method=Ring(block=block, layout=layout))
    fitted = fxrpg.fit(small, net)
    plan = plan_of(small)
    columns = []
    for cell in range(dof):
        unit = torch.zeros(dof, dtype=torch.float64)
        unit[cell] = 1
        columns.append(
            torch.cat(
                [torch.ops.fxrpg.generate(unit, small.fxrpg_scale, v.text).flatten() for v in plan.views.values()]
            )
        )
    matrix = torch.stack(columns, 1).numpy()
    target = torch.cat([net.get_parameter(name).detach().flatten() for name in plan.views]).numpy()
    best = matrix @ np.linalg.lstsq(matrix, target, rcond=None)[0]
    residual = ((best - target) ** 2).sum() / (target**2).sum()
    assert fitted.residual == pytest.approx(residual, rel=1e-9, abs=1e-12)


def test_fit_reports_and_copies(net):
    small = fxrpg.transform(Net(), dof=60)
    before = copy.deepcopy(small.state_dict())
    fitted = fxrpg.fit(small, net)
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)
    assert 0 < fitted.residual < 1
    assert fitted.residuals.keys() == plan_of(small).views.keys()
    assert "relative squared residual" in str(fitted)
    assert torch.equal(fitted.model.stem.weight, net.stem.weight)
    exact = fxrpg.fit(small, fxrpg.materialize(small))
    assert exact.residual < 1e-12
    torch.testing.assert_close(exact.model(X), small(X))


def test_fit_refuses(net):
    small = fxrpg.transform(net, dof=60)
    before = copy.deepcopy(small.state_dict())
    for spoil, message in (
        (
            lambda m: m.mid.weight.data.__setitem__((0, 0, 0, 0), float("nan")),
            "fit, mid.weight: must be finite, found 1 NaN",
        ),
        (lambda m: m.fc.weight.data.fill_(float("inf")), "fit, fc.weight: must be finite, found 30 NaN or infinite"),
        (lambda m: setattr(m, "mid", nn.Conv2d(4, 6, 1)), r"fit, mid.weight: must have shape \(6, 4, 3, 3\)"),
        (lambda m: delattr(m, "mid"), "fit, mid.weight: the target must have this parameter"),
        (lambda m: setattr(m, "stem", nn.Conv2d(3, 4, 1)), r"fit, stem.weight: the target must have it in shape"),
        (lambda m: m.to("meta"), "must hold values"),
    ):
        target = Net()
        spoil(target)
        with pytest.raises(fxrpg.FxrpgError, match=message):
            fxrpg.fit(small, target)
    torch.testing.assert_close(small.state_dict(), before, rtol=0, atol=0)


def test_ledger_accounts_for_every_number(net):
    net.stem.bias.requires_grad_(False)
    small = fxrpg.transform(net, dof=50, method=Ring(block=64))
    ledger = fxrpg.ledger(small)
    assert ledger.generated == GENERATED
    assert ledger.dense + ledger.generated == sum(p.numel() for p in net.parameters())
    assert ledger.trainable == sum(p.numel() for p in small.parameters() if p.requires_grad)
    assert ledger.frozen == 4
    assert ledger.padding == 256 + 64 - GENERATED
    assert ledger.buffers == sum(b.numel() for b in net.buffers())
    assert ledger.scales == 2
    assert ledger.mask_bits == 0
    stored = sum(t.numel() for n, t in small.state_dict().items() if n not in ("fxrpg_scale", "fxrpg_digest")) + 2
    assert ledger.dof + ledger.dense + ledger.buffers + ledger.scales == stored
    assert f"{ledger.generated:,}" in str(ledger)


def test_explain(net):
    small = fxrpg.transform(net, dof=50)
    table = str(fxrpg.explain(small))
    assert "246 weights generated (100.0% staged)" in table
    small(X)
    rows = {row.name: row for row in fxrpg.explain(small).rows}
    assert rows["mid.weight"].op == "conv2d"
    assert rows["head.weight"].reason == "the default leaves the first and the last layer dense"
    assert len(rows) == 9


@pytest.mark.parametrize("method", ["ring", "pranc", "pemn", fxrpg.Pemn(threshold="global")], ids=str)
def test_surgery_shows(net, method):
    small = fxrpg.transform(net, dof=50, method=method, plan=[fxrpg.Rule("*.bias", "dense"), *ENDS])
    small.fc = nn.Linear(6, 5)
    assert fxrpg.ledger(small).generated == 216
    assert [row.name for row in fxrpg.explain(small).rows if row.status == "generated"] == ["mid.weight"]
    torch.testing.assert_close(fxrpg.materialize(small)(X), small(X))
    if "Pemn" in str(method) or method == "pemn":
        frozen = fxrpg.freeze(small)
        assert torch.equal(frozen(X), small(X))
        assert fxrpg.ledger(frozen).generated == 216
    del small.fc
    assert not hasattr(fxrpg.materialize(small), "fc")


@pytest.mark.parametrize(("method", "where"), [("ring", ""), ("pranc", ""), ("pemn", "mid")])
def test_names_of_states_that_are_taken(net, method, where):
    name = {"ring": "fxrpg_ring", "pranc": "fxrpg_alpha", "pemn": "weight_score"}[method]
    for value in (3, nn.Parameter(torch.ones(2))):
        model = copy.deepcopy(net)
        setattr(model.get_submodule(where), name, value)
        with pytest.raises(fxrpg.FxrpgError, match=rf"{name}: must be free for the generator's state"):
            fxrpg.transform(model, dof=10, method=method)


def test_on_the_meta_device():
    with torch.device("meta"):
        net = Net()
    small = fxrpg.transform(net, dof=50)
    assert small.fxrpg_ring.is_meta
    assert fxrpg.ledger(small).dof == 50
    assert "staged" in str(fxrpg.explain(small))
    assert small(X.to("meta")).shape == (2, 2)
    real = fxrpg.transform(Net(), dof=50)
    small.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(small(X), real(X))


class Wide(nn.Module):
    """A billion weights in 120 layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2890, 2890, bias=False) for _ in range(122))


def test_a_billion_weights_on_the_meta_device():
    code = """
import resource, sys, time, torch
sys.path.insert(0, sys.argv[1])
from test_api import Wide, fxrpg
with torch.device("meta"):
    model = Wide()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
small = fxrpg.transform(model, dof=0.05)
took = time.perf_counter() - start
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(fxrpg.ledger(small).generated, grown * 1024, took)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    generated, grown, _seconds = done.stdout.split()
    assert int(generated) > 1_000_000_000
    assert int(grown) < 200_000_000


def test_transform_does_not_copy_the_weights_it_drops():
    """Peak memory of transforming a ResNet-18 stays below a copy of its weights."""
    from test_promise import peak_bytes

    model = resnet18()
    assert peak_bytes(lambda: fxrpg.transform(model, dof=10_000)) < 4 * 11_157_504


@pytest.mark.parametrize(
    "dof", [np.True_, np.complex64(3), np.array([3]), torch.tensor([1, 2]), 10**400, "3", [3]], ids=repr
)
def test_a_dof_that_is_no_number_in_range_is_refused(dof):
    with pytest.raises(FxrpgError, match="dof"):
        fxrpg.transform(nn.Linear(4, 4), dof=dof, plan=[fxrpg.Rule("*", "generate")])


@pytest.mark.parametrize(
    ("dof", "size"), [(np.int64(3), 3), (np.float32(0.5), 8), (np.float64(1.0), 16), (3.0, 3)], ids=repr
)
def test_a_dof_may_be_any_real_number(dof, size):
    small = fxrpg.transform(nn.Linear(4, 4), dof=dof, method=fxrpg.Ring(block=1), plan=[fxrpg.Rule("*", "generate")])
    assert small.fxrpg_ring.shape == (size,)


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [(fxrpg.Ring, "permute", "no"), (fxrpg.Ring, "reflect", 0), (fxrpg.Ring, "sparse", 1), (fxrpg.Pranc, "norms", 1),
     (fxrpg.Pranc, "sparse", "no"), (fxrpg.Pemn, "permuted", "no"), (fxrpg.Pemn, "per_layer", None)],
)  # fmt: skip
def test_switches_are_true_or_false(method, setting, value):
    with pytest.raises(FxrpgError, match=rf"{method.__name__}\({setting}=...\): must be True or False"):
        method(**{setting: value})


@pytest.mark.parametrize("plan", [None, 5, "*"])
def test_a_plan_must_hold_rules(plan):
    with pytest.raises(FxrpgError, match="must hold fxrpg.Rule objects"):
        fxrpg.transform(nn.Linear(4, 4), dof=3, plan=plan)


def test_a_law_must_be_known_whatever_its_type():
    with pytest.raises(FxrpgError, match=r"Pranc\(law=...\)"):
        fxrpg.Pranc(law=[])


def test_a_target_must_be_a_module():
    with pytest.raises(FxrpgError, match="target must be a torch.nn.Module"):
        fxrpg.fit(fxrpg.transform(nn.Linear(4, 4), dof=3, plan=[fxrpg.Rule("*", "generate")]), None)
