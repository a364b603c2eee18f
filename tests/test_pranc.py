"""PRANC: what is generated, from which coefficients, at which cost, and what a model cut to fewer of them is."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.fx as fx
from births import alive, births
from models import resnet18
from paper_models import alexnet_cifar, convnet, lenet, resnet20, resnet56
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch_settings import threads

import fxrpg
from fxrpg import FxrpgError, Pranc
from fxrpg.assemble import plan_of, weight_of
from fxrpg.basis import LAWS
from fxrpg.folding import epilogue_of_norm
from fxrpg.roles import NORMS
from fxrpg.view import View
from fxrpg.weights import scale_of

CPU = torch.device("cpu")
EVERY_LAW = pytest.mark.parametrize("law", LAWS)


class Small(nn.Module):
    """A convolution, a norm and two linear layers, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc2(self.fc1(x).relu())


def small(dtype: torch.dtype = torch.float32, **settings) -> nn.Module:
    torch.manual_seed(0)
    return fxrpg.transform(Small().to(dtype), **{"dof": 30, "method": "pranc", **settings})


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random coefficients in place of those it starts with."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for state in plan_of(model).states:
            alpha = model.get_parameter(state)
            alpha.copy_(torch.randn(alpha.shape, generator=draw, dtype=torch.float64) * alpha.ne(0).any())
    return model


def basis_of(model: nn.Module, name: str) -> Tensor:
    """The scaled basis of one weight, float64 [k, *shape]."""
    view = plan_of(model).views[name]
    law = LAWS[view.generator.law]
    scale = scale_of(model.fxrpg_scale, view).double()
    rows = law.vectors(view, view.size, CPU) / law.deviation * scale
    return torch.stack([view.from_logical(row.clone()) for row in rows])


def on_meta(architecture) -> nn.Module:
    with torch.device("meta"):
        return architecture()


# What is generated.


@pytest.mark.parametrize(
    ("architecture", "generated", "affine"),
    [
        pytest.param(resnet20, 267_696 + 650, 1_376, id="T7"),
        pytest.param(resnet56, 848_304 + 650, 4_064, id="T8"),
        pytest.param(lambda: resnet18(100), 11_218_212, 9_600, id="T9-resnet18"),
        pytest.param(lenet, 62_006, 0, id="T9-lenet"),
        pytest.param(alexnet_cifar, 1_756_426, 0, id="T9-alexnet"),
        pytest.param(convnet, 504_420 - 768, 768, id="T9-convnet"),
    ],
)
def test_everything_but_norms_is_generated(architecture, generated, affine):
    model = fxrpg.transform(on_meta(architecture), dof=10_000, method=Pranc(law="khatri_rao"))
    ledger = fxrpg.ledger(model)
    assert (ledger.generated, ledger.dense, ledger.dof) == (generated, affine, 10_000)
    assert ledger.trainable == 10_000 + affine
    assert ledger.mask_bits == ledger.padding == 0
    norms = {f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, NORMS) for p in ("weight", "bias")}
    assert set(plan_of(model).dense) == norms


def test_t7_norms_too():
    model = fxrpg.transform(on_meta(resnet20), dof=10_000, method=Pranc(norms=True))
    ledger = fxrpg.ledger(model)
    assert (ledger.generated, ledger.dense, ledger.trainable) == (269_722, 0, 10_000)
    assert list(dict(model.named_parameters())) == ["fxrpg_alpha"]
    assert ledger.buffers == 1_376 + 19  # the means and variances that the paper sends along, and counts of batches


@pytest.mark.parametrize("norms", [False, True])
def test_rules_and_norms(norms):
    model = small(method=Pranc(norms=norms), plan=[fxrpg.Rule("fc1.*", "dense")])
    assert set(plan_of(model).views) == {
        *("conv.weight", "conv.bias", "fc2.weight", "fc2.bias"),
        *(("norm.weight", "norm.bias") if norms else ()),
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_laws_are_checked():
    with pytest.raises(
        FxrpgError, match=r"Pranc\(law=...\): must be one of .*khatri_rao.*, found 'gaussian'. Pass one"
    ):
        Pranc(law="gaussian")


@pytest.mark.parametrize("dof", [0, 1.5, 261, -1, True, None])
def test_sizes_are_checked(dof):
    with pytest.raises(FxrpgError, match=r"dof: must be an int in \[1, 260\]"):
        small(dof=dof)


def test_a_fraction_is_one_of_the_generated_weights():
    assert plan_of(small(dof=0.1)).size == 26
    assert plan_of(small(dof=1e-9)).size == 1
    assert plan_of(small(dof=1.0)).size == 260


# Values: the numbers of the table in the method's facts.


@EVERY_LAW
def test_t10_the_model_starts_as_basis_vector_0(law):
    model = small(torch.float64, method=Pranc(law=law))
    assert model.fxrpg_alpha.tolist() == [1.0] + [0.0] * 29
    for name in plan_of(model).views:
        torch.testing.assert_close(weight_of(model, name), basis_of(model, name)[0], rtol=1e-15, atol=0)


def test_weights_start_with_the_deviation_of_their_layer():
    torch.manual_seed(0)
    model = resnet20()
    dense = dict(model.named_parameters())
    for law in LAWS:
        transformed = fxrpg.transform(model, dof=2, method=Pranc(law=law))
        for name, view in plan_of(transformed).views.items():
            found, wanted = weight_of(transformed, name), dense[name].std(correction=0).item()
            exact = law in ("rademacher", "khatri_rao")
            assert found.square().mean().sqrt().item() == pytest.approx(
                wanted, rel=1e-4 if exact else 3 / view.count**0.5
            )


@EVERY_LAW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_t10_derivatives_are_the_basis(law, dtype):
    """d theta_i / d alpha_j = B_j[i]: the row that autograd finds is, bit for bit, what coefficient j alone generates."""
    shape, size = (3, 2, 2, 2), 40
    view = View(
        generator=Pranc(law=law), seed=5, tensor=2, shape=shape, order=(0, 2, 3, 1), offset=0, total=24, size=size
    )
    scale = torch.tensor([[128.0, 0.0, -15.0]] * 3)  # one
    state = torch.randn(size, dtype=dtype, requires_grad=True)
    weight = torch.ops.fxrpg.generate.default(state, scale, view.text)
    rows = torch.stack([torch.autograd.grad(w, state, retain_graph=True)[0] for w in weight.flatten()], 1)
    columns = [view.generator.materialize(e, view, dtype).flatten() for e in torch.eye(size, dtype=dtype)]
    assert torch.equal(rows, torch.stack(columns))


@EVERY_LAW
def test_weights_are_linear_in_the_coefficients(law):
    model = filled(small(torch.float64, method=Pranc(law=law)))
    for name in plan_of(model).views:
        expected = torch.einsum("k,k...->...", model.fxrpg_alpha.detach(), basis_of(model, name))
        torch.testing.assert_close(weight_of(model, name), expected, rtol=1e-12, atol=1e-12)


@EVERY_LAW
@pytest.mark.parametrize("seed", [0, 41])
def test_t10_seeds_are_uncorrelated(law, seed):
    def weights(seed: int) -> Tensor:
        model = fxrpg.transform(resnet20(), dof=3, method=Pranc(law=law), seed=seed)
        alphas = torch.tensor([1.0, -0.5, 0.25])
        model.fxrpg_alpha.data.copy_(alphas)
        parts = [weight_of(model, name).flatten() for name in plan_of(model).views]
        return torch.cat([part / part.norm() * part.numel() ** 0.5 for part in parts]).double()

    torch.manual_seed(0)
    first, second = weights(seed), weights(seed + 1)
    assert len(first) == 268_346
    limit = 5 if law != "khatri_rao" else 10  # of rank one, layers have far fewer signs to average over
    assert abs(torch.cosine_similarity(first, second, 0).item()) < limit / len(first) ** 0.5


# What it takes.


class CountAlive(TorchDispatchMode):
    """How many generated weights (not biases) are alive when each op starts."""

    def __init__(self, born) -> None:
        super().__init__()
        self.born, self.most = born, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.most = max(self.most, alive(self.born, 2))
        return func(*args, **(kwargs or {}))


WAYS = {
    "module": lambda model, x: model,
    "traced": lambda model, x: fx.symbolic_trace(model),
    "exported": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own, where it copies a graph
@pytest.mark.parametrize("way", WAYS)
def test_weights_and_biases_are_staged(way, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    dense = lenet()
    model = fxrpg.transform(WAYS[way](dense, x), dof=20, method="pranc", strict=True)
    with births(monkeypatch) as born:
        with CountAlive(born) as count:
            out = model(x)
        assert len(born) == 10
        assert alive(born) == 0, "saved for backward"
        assert count.most == 0
        with CountAlive(born) as count:
            out.square().sum().backward()
        assert count.most == 0
        assert alive(born) == 0
    assert fxrpg.explain(model).fraction("staged") == 1
    assert "100.0% staged" in str(fxrpg.explain(model))
    # the same numbers as on a dense copy, gradients through the whole basis
    plain = fxrpg.materialize(model)
    expected = plain(x)
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    gradient = sum(
        torch.einsum("k...,...->k", basis_of(model, name), plain.get_parameter(name).grad.double())
        for name in plan_of(model).views
    )
    torch.testing.assert_close(model.fxrpg_alpha.grad, gradient.float(), rtol=1e-4, atol=1e-4)


def test_saved_tensors_are_no_weights():
    model, sizes = fxrpg.transform(lenet(), dof=20, method="pranc"), []
    x = torch.randn(1, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        model(x).sum().backward()
    shapes = {tuple(view.shape) for view in plan_of(model).views.values()}
    assert not {tuple(shape) for shape in sizes} & shapes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")
@pytest.mark.parametrize(("backend", "norms"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_compiled(backend, norms):
    torch._dynamo.reset()
    model = filled(small(method=Pranc(norms=norms)))
    x, found = images(), []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        found.append((out.detach(), model.fxrpg_alpha.grad.clone()))
    torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_each_layer_can_have_its_own_coefficients():
    model = small(scope="layer")
    assert {name.removeprefix("fxrpg_alpha_") for name in plan_of(model).states} == {"conv", "fc1", "fc2"}
    assert sum(len(model.get_parameter(state)) for state in plan_of(model).states) == 30
    assert plan_of(model).state_of("fc1.bias") == plan_of(model).state_of("fc1.weight")


@EVERY_LAW
@pytest.mark.parametrize("sparse", [False, True])
def test_functional_transforms(law, sparse):
    """torch.func follows the whole basis in plain ops: the same gradients."""
    model = filled(small(torch.float64, scope="layer", method=Pranc(law=law)))
    model = (fxrpg.truncate(model, 17) if sparse else model).eval()
    x = images(torch.float64)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().sum()

    found = torch.func.grad(loss)(parameters)
    model(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)
    directions = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    _, slope = torch.func.jvp(loss, (parameters,), (directions,))
    torch.testing.assert_close(slope, sum(gradient.sum() for gradient in found.values()), rtol=1e-9, atol=1e-9)


def warnings_of(**settings) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxrpg.transform(on_meta(lambda: resnet18(100)), **{"dof": 20_000, "method": "pranc"} | settings)
    return caught


def test_many_draws_warn():
    """ResNet-18 with 20,000 coefficients: 2.2e11 values a pass."""
    (warning,) = warnings_of()
    assert "11,218,212 weights" in str(warning.message)
    assert "draws 2.2e+11 values (more than 1e+11)" in str(warning.message)
    assert "law='khatri_rao'" in str(warning.message)
    assert "scope='layer'" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "settings", [{"dof": 8_000}, {"scope": "layer"}, {"method": Pranc(law="khatri_rao")}, {"method": "ring"}], ids=str
)
def test_fewer_draws_do_not(settings):
    assert not warnings_of(**settings)


STEP = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import fxrpg
from paper_models import resnet20
torch.set_num_threads(1)
torch.manual_seed(0)
model = resnet20()
if {method!r} != "dense":
    model = fxrpg.transform(model, dof=10_000, method=fxrpg.Pranc(law={method!r}))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_megabytes(method: str) -> float:
    """Of one training step in a process of its own (getrusage would count the memory of this one too, its parent)."""
    here = Path(__file__).parent
    code = STEP.format(root=str(here.parent), tests=str(here), method=method)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(out.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc/self/status")
def test_a_step_with_ten_thousand_vectors_needs_little_memory():
    """The basis, 268,346 x 10,000 floats, would take 10.7 GB."""
    dense, pranc = peak_megabytes("dense"), peak_megabytes("rademacher")
    print(f"peak RSS of a step: dense {dense:.0f} MB, PRANC {pranc:.0f} MB")
    assert pranc - dense < 200


# Fitting.


def least_squares(model: nn.Module, target: nn.Module) -> tuple[Tensor, float]:
    """The best coefficients, and the relative squared residual, from the whole basis at once."""
    names = list(plan_of(model).views)
    matrix = torch.cat([basis_of(model, name).flatten(1) for name in names], 1).t()
    wanted = torch.cat([target.get_parameter(name).detach().double().flatten() for name in names])
    found = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    return found, ((matrix @ found - wanted).square().sum() / wanted.square().sum()).item()


@EVERY_LAW
def test_fit_is_least_squares(law):
    torch.manual_seed(1)
    model, target = small(torch.float64, method=Pranc(law=law)), Small().double()
    fitted = fxrpg.fit(model, target)
    alphas, residual = least_squares(model, target)
    assert fitted.residual == pytest.approx(residual, rel=1e-9)
    torch.testing.assert_close(fitted.model.fxrpg_alpha.detach(), alphas, rtol=1e-6, atol=1e-6)
    assert 0.5 < fitted.residual < 1
    assert "little is left of what was trained: train before use" in str(fitted)
    assert torch.equal(fitted.model.norm.weight, target.norm.weight)
    again = fxrpg.fit(model, fxrpg.materialize(fitted.model))
    assert again.residual < 1e-12
    assert "train" not in str(again)


def test_fit_in_scopes_is_least_squares_in_each():
    torch.manual_seed(1)
    model, target = small(torch.float64, scope="layer", dof=60), Small().double()
    fitted = fxrpg.fit(model, target)
    error = energy = 0.0
    for state, names in plan_of(model).states.items():
        matrix = torch.cat([basis_of(model, name).flatten(1) for name in names], 1).t()
        wanted = torch.cat([target.get_parameter(name).detach().flatten() for name in names])
        found = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.model.get_parameter(state).detach(), found, rtol=1e-6, atol=1e-6)
        error += (matrix @ found - wanted).square().sum().item()
        energy += wanted.square().sum().item()
    assert fitted.residual == pytest.approx(error / energy, rel=1e-9)


def test_fit_leaves_pruned_coefficients_at_zero():
    torch.manual_seed(1)
    model, target = fxrpg.truncate(filled(small(torch.float64)), 7), Small().double()
    live = model.fxrpg_alpha != 0
    fitted = fxrpg.fit(model, target)
    assert torch.equal(fitted.model.fxrpg_alpha != 0, live)
    names = list(plan_of(model).views)
    matrix = torch.cat([basis_of(model, name).flatten(1) for name in names], 1).t()[:, live]
    wanted = torch.cat([target.get_parameter(name).detach().flatten() for name in names])
    residual = (matrix @ torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0] - wanted).square().sum()
    assert fitted.residual == pytest.approx((residual / wanted.square().sum()).item(), rel=1e-9)


# Fewer coefficients.


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor], plan) -> None:
    assert plan_of(model) is plan
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("k", [1, 7, 29, 30])
def test_truncated_by_index_is_a_smaller_model(k, law):
    model = filled(small(method=Pranc(law=law)))
    before, plan = bits_of(model), plan_of(model)
    cut = fxrpg.truncate(model, k, order="index")
    assert_unchanged(model, before, plan)
    assert torch.equal(cut.fxrpg_alpha, model.fxrpg_alpha[:k])
    assert fxrpg.ledger(cut).dof == k
    fresh = small(dof=k, method=Pranc(law=law))
    assert plan_of(cut).digest() == plan_of(fresh).digest()
    fresh.load_state_dict(cut.state_dict())
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        zeros.fxrpg_alpha[k:] = 0
    x = images()
    assert torch.equal(cut(x), fresh(x))
    assert torch.equal(cut(x), zeros(x))
    assert cut.fxrpg_alpha.requires_grad


@pytest.mark.parametrize("k", [1, 7, 29, 30])
def test_truncated_by_magnitude_keeps_the_largest(k):
    model = filled(small())
    before, plan = bits_of(model), plan_of(model)
    cut = fxrpg.truncate(model, k)
    assert_unchanged(model, before, plan)
    largest = set(model.fxrpg_alpha.abs().argsort(descending=True)[:k].tolist())
    for i, (found, old) in enumerate(zip(cut.fxrpg_alpha.tolist(), model.fxrpg_alpha.tolist(), strict=True)):
        assert found == (old if i in largest else 0)
    assert fxrpg.ledger(cut).dof == k
    cut(images()).square().sum().backward()
    assert torch.equal(cut.fxrpg_alpha.grad != 0, cut.fxrpg_alpha != 0)
    optimizer = torch.optim.Adam(cut.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert (cut.fxrpg_alpha != 0).sum() == k


def test_of_equal_magnitudes_the_first_stay():
    model = small()
    with torch.no_grad():
        model.fxrpg_alpha.copy_(torch.tensor([1.0, -1.0] * 15))
    assert fxrpg.truncate(model, 5).fxrpg_alpha.tolist() == [1, -1, 1, -1, 1] + [0] * 25


def test_prefixes_approach_the_whole():
    """Sorted coefficients give weights that come nearer with every one more."""
    model = filled(small())
    target = weight_of(model, "fc1.weight")
    errors = [(weight_of(fxrpg.truncate(model, k), "fc1.weight") - target).norm().item() for k in (1, 10, 20, 28, 30)]
    assert errors[-1] == 0
    assert errors[0] > errors[2] > errors[3] > 0


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("order", ["magnitude", "index"])
def test_truncated_models_go_through_files(order, scope, tmp_path):
    model = fxrpg.truncate(filled(small(scope=scope)), 9, order=order)
    fxrpg.save(model, tmp_path / "cut.safetensors")
    again = fxrpg.load(Small(), tmp_path / "cut.safetensors")
    x = images()
    model.eval(), again.eval()
    for state in plan_of(model).states:
        assert torch.equal(again.get_parameter(state), model.get_parameter(state))
    assert torch.equal(again(x), model(x))
    assert plan_of(again).digest() == plan_of(model).digest()
    assert fxrpg.ledger(model).bytes_stored == (tmp_path / "cut.safetensors").stat().st_size
    wide = fxrpg.transform(Small(), dof=200, method="pranc")
    fxrpg.save(filled(wide), tmp_path / "wide.safetensors")
    fxrpg.save(fxrpg.truncate(wide, 9, order=order), tmp_path / "cut.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("wide", "cut")]
    assert sizes[0] - sizes[1] > 4 * 191 - 200  # the header varies


@pytest.mark.parametrize("order", ["magnitude", "index"])
def test_every_scope_keeps_its_share(order):
    model = filled(small(scope="layer", dof={"conv": 20, "fc1": 10, "fc2": 6}))
    cut = fxrpg.truncate(model, 18, order=order)
    states = plan_of(cut).states
    assert [int((cut.get_parameter(state) != 0).sum()) for state in states] == [10, 5, 3]
    for state in states:
        old, new = model.get_parameter(state), cut.get_parameter(state)
        assert len(new) == (len(old) if order == "magnitude" else len(old) // 2)
        if order == "index":
            assert torch.equal(new, old[: len(new)])
    assert fxrpg.ledger(cut).dof == 18
    assert torch.equal(fxrpg.truncate(model, 36)(images()), model(images()))


@pytest.mark.parametrize("way", ["module", "traced"])
def test_graphs_are_truncated_like_modules(way):
    torch.manual_seed(0)
    x = images()
    model = filled(fxrpg.transform(WAYS[way](Small().eval(), x), dof=30, method="pranc"))
    cut = fxrpg.truncate(model, 5, order="index")
    assert isinstance(cut, fx.GraphModule) == (way == "traced")
    expected = fxrpg.truncate(filled(small()), 5, order="index").eval()
    assert torch.equal(cut(x), expected(x))


@pytest.mark.parametrize("k", [0, -1, 31, 2.0, 1.5, True, False, None, "5", math.nan])
@pytest.mark.parametrize("order", ["magnitude", "index"])
def test_k_is_checked(k, order):
    model = filled(small())
    before, plan = bits_of(model), plan_of(model)
    with pytest.raises(
        FxrpgError, match=r"truncate, k: must be an int in \[1, 30\], the coefficients there are, found"
    ):
        fxrpg.truncate(model, k, order=order)
    assert_unchanged(model, before, plan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: small(method="ring"),
            "truncate: needs a PRANC basis, found the method 'ring'. Of a ring, use fxrpg.prune",
        ),
        (lambda: small(method="pemn"), "truncate: needs a PRANC basis, found the method 'pemn'"),
        (Small, "must be a transformed model"),
    ],
)
def test_only_bases_are_truncated(make, message):
    model = make()
    before = bits_of(model)
    with pytest.raises(FxrpgError, match=message):
        fxrpg.truncate(model, 5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("order", ["magnitude", "index"])
def test_only_the_bases_of_a_mixed_model_are_truncated(order):
    model = small(plan=[fxrpg.Rule("fc1.weight", "ring", dof=9)])
    model.fxrpg_alpha.detach().copy_(torch.linspace(-1, 2, len(model.fxrpg_alpha)))
    cut = fxrpg.truncate(model, 5, order=order)
    assert torch.equal(cut.fxrpg_ring, model.fxrpg_ring)
    assert torch.equal(weight_of(cut, "fc1.weight"), weight_of(model, "fc1.weight"))
    assert fxrpg.ledger(cut).dof == 9 + 5


def test_order_is_checked():
    model = small(scope="layer")
    with pytest.raises(FxrpgError, match=r"truncate, order: must be one of \('magnitude', 'index'\), found 'random'"):
        fxrpg.truncate(model, 5, order="random")
    with pytest.raises(FxrpgError, match=r"must be an int in \[3, 30\]"):
        fxrpg.truncate(model, 2)


@EVERY_LAW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_lose_a_billionth_of_the_largest_at_most(law, dtype):
    """In fixed point, of numbers of all magnitudes; float64 far less."""
    view = View(generator=Pranc(law=law), seed=5, tensor=2, shape=(60, 70), order=(0, 1), offset=0, total=1, size=50)
    draw = torch.Generator().manual_seed(0)
    grad = torch.randn(60, 70, generator=draw, dtype=torch.float64) * 10.0 ** torch.randint(
        -12, 3, (60, 70), generator=draw
    )
    grad = grad.to(dtype)
    basis = LAWS[law].vectors(view, 50, CPU) / LAWS[law].deviation
    found = view.generator.accumulate(grad, torch.zeros(50), view)
    expected = basis @ grad.double().flatten()
    lost = basis.abs().sum(1) * grad.abs().max().item() * 2.0 ** (-30 if dtype == torch.float32 else -51)
    rounded = expected.abs() * torch.finfo(dtype).eps
    assert bool(((found - expected).abs() <= lost + rounded).all())


def test_threads_change_no_weight():
    model, found = filled(fxrpg.transform(lenet(), dof=100, method="pranc")), []
    for count in (1, 2):
        with threads(count):
            found.append([weight_of(model, name) for name in plan_of(model).views])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_graph_makes_each_bias_just_before_the_op_that_adds_it():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    graph = fxrpg.transform(torch.fx.symbolic_trace(model), dof=7, method="pranc")
    made = list(graph.graph.find_nodes(op="call_function", target=torch.ops.fxrpg.generate.default))
    assert len(made) == 3
    for node in made:
        adds = node.next if node.next.op != "get_attr" else node.next.next  # the activation's module, drawn into the op
        assert list(node.users) == [adds]
        assert adds.target in (torch.ops.fxrpg.linear.default, epilogue_of_norm)
    x = torch.randn(3, 4)
    assert torch.equal(graph(x), fxrpg.transform(model, dof=7, method="pranc")(x))


def test_a_large_weight_costs_itself_and_a_chunk():
    """In memory that torch allocates, beside the weight: no copy of it in float64, no table of all coefficients."""
    view = View(
        generator=fxrpg.Pranc(), seed=0, tensor=0, shape=(1024, 1024), order=(0, 1), offset=0, total=1 << 20, size=64
    )
    state = torch.randn(64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        weight = view.generator.materialize(state, view, torch.float32)
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert weight.nbytes <= most < weight.nbytes + 8 * 2**20
