"""Modules with code of their own for what torch's modules do, and training loops that take models apart."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fxrpg
from fxrpg.optimizers import PATIENCE

EVERYTHING = [fxrpg.Rule("*", "generate")]
X = torch.randn(3, 8)


class WritesItself(nn.Linear):
    """Puts its weight into a state_dict itself, as layers of PyTorch Geometric do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


class Registered(nn.Linear):
    """Wants to hear of its subclasses."""

    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, *, label: str) -> None:
        Registered.known.append(cls)


class Strict(nn.Linear):
    """Takes no attribute that it does not know."""

    def __setattr__(self, name, value):
        if name == "__class__":
            raise AttributeError("no such thing")
        super().__setattr__(name, value)


@pytest.mark.parametrize(("method", "dof"), [("ring", 20), ("pemn", 0.5)])
@pytest.mark.parametrize("cls", [WritesItself, Registered, Strict])
def test_layers_with_code_of_their_own(cls, method, dof, tmp_path):
    model = nn.Sequential(cls(8, 8), nn.ReLU(), cls(8, 4))
    small = fxrpg.transform(model, dof=dof, method=method, plan=EVERYTHING)
    assert Registered.known == []
    assert isinstance(small[0], cls)
    assert not any(name.endswith("weight") for name in small.state_dict())
    expected = small(X)
    fxrpg.save(small, tmp_path / "m.safetensors")
    for again in (
        fxrpg.load(model, tmp_path / "m.safetensors"),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert torch.equal(again(X), expected)
        again.load_state_dict(small.state_dict())
    dense = fxrpg.materialize(small)
    assert type(dense[0]) is cls
    assert set(dense.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(dense(X), expected)


def test_computed_tensors_in_containers():
    """A forward that leaves tensors with a record in a list or a dict."""

    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.heads, self.named = nn.Linear(8, 8), [], {}

        def forward(self, x):
            y = self.layer(x)
            self.heads, self.named = [y, (y,)], {"y": y}
            return y

    model = Leaves()
    model(X)
    small = fxrpg.transform(model, dof=5, plan=EVERYTHING)
    assert torch.equal(copy.deepcopy(fxrpg.materialize(small))(X), fxrpg.materialize(small)(X))


def test_torch_func_twice():
    small = fxrpg.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), dof=20, plan=EVERYTHING)
    first, second = (torch.func.jacrev(small)(X) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.func.hessian(lambda x: small(x).sum())(X).shape == (3, 8, 3, 8)
    torch.testing.assert_close(small(X), fxrpg.materialize(small)(X))


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.all = nn.ModuleList([self.student])

    def forward(self, x):
        return self.all[0](x) if float(x.sum()) < 1e9 else self.student(x)


def test_a_module_under_two_names_has_one_region():
    x = torch.randn(2, 3, 4, 4)
    small = fxrpg.transform(Twice(), dof=3, plan=EVERYTHING, example_inputs=(x,)).eval()
    assert type(pickle.loads(pickle.dumps(small)).student).__mro__[1] is nn.Sequential
    with torch.no_grad():
        torch.testing.assert_close(small(x), fxrpg.materialize(small)(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    small = fxrpg.transform(nn.Linear(8, 4), dof=5, plan=EVERYTHING)
    nested = torch.nested.as_nested_tensor([torch.randn(2, 8), torch.randn(5, 8)], layout=torch.strided)
    for found, x in zip(small(nested).unbind(), nested.unbind(), strict=True):
        torch.testing.assert_close(found, small(x))


def test_parameters_within_a_vmap():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.last = nn.Parameter(torch.randn(5, 8, 4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(torch.vmap(lambda w: x @ w)(self.w))

    small = fxrpg.transform(Ensemble(), dof=4, plan=EVERYTHING, example_inputs=(X,))
    torch.testing.assert_close(small(X), fxrpg.materialize(small)(X))


def test_additions_that_observers_watch_are_no_quantised_layers():
    model = nn.Sequential(nn.Linear(8, 8))
    model.skip = torch.ao.nn.quantized.FloatFunctional()
    assert fxrpg.transform(model, dof=5, plan=EVERYTHING)[0](X).shape == (3, 8)


def saved_weights(small: nn.Module, call) -> list[str]:
    """Names of the generated weights of which autograd keeps the values."""
    full = {name: p.detach().flatten().sort().values for name, p in fxrpg.materialize(small).named_parameters()}
    kept = []

    def pack(tensor):
        for name, weight in full.items():
            if tensor.numel() == len(weight) and torch.equal(tensor.detach().flatten().sort().values, weight):
                kept.append(name)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return [name for name in kept if name in fxrpg.assemble.plan_of(small).views]


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.LSTM(8, 8), lambda: nn.GRUCell(8, 8)])
def test_a_gradient_that_is_differentiated_keeps_no_weight(layer):
    """create_graph=True, as in gradient penalties: the second graph has recipes too, and the right gradients."""
    small = fxrpg.transform(layer().double(), dof=30, plan=EVERYTHING)
    dense, x = fxrpg.materialize(small), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    found = []

    def penalty(model):
        out = model(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append(grad.square().sum())

    assert saved_weights(small, lambda: penalty(small)) == []
    penalty(dense)
    torch.testing.assert_close(found[0], found[1])
    (ours,) = torch.autograd.grad(found[0], small.fxrpg_ring)
    views = fxrpg.assemble.plan_of(small).views
    theirs = torch.autograd.grad(found[1], [dense.get_parameter(name) for name in views])
    scale = small.get_buffer("fxrpg_scale")
    expected = sum(
        fxrpg.weights.accumulate_gradient(g, small.fxrpg_ring.detach(), scale, view.text)
        for g, view in zip(theirs, views.values(), strict=True)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("bi,rij,bj->br", [(3, 8), (4, 8, 8), (3, 8)]), ("bi,ri,oir->bo", [(3, 8), (4, 8), (5, 8, 4)])],
)
def test_einsum_of_three_operands_keeps_no_weight(equation, shapes):
    place = 1 if "rij" in equation else 2

    class Form(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(shapes[place]))

        def forward(self, *others):
            operands = [*others[:place], self.w, *others[place:]]
            return torch.einsum(equation, *operands)

    others = [torch.randn(shape) for i, shape in enumerate(shapes) if i != place]
    small = fxrpg.transform(Form(), dof=20, plan=EVERYTHING, example_inputs=tuple(others))
    others = [x.requires_grad_() for x in others]
    assert saved_weights(small, lambda: small(*others).sum().backward()) == []
    torch.testing.assert_close(small(*others), fxrpg.materialize(small)(*others))
    assert fxrpg.explain(small).rows[0].path == "staged"


def test_one_input_for_a_stack_of_matrices():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 8, 4))

        def forward(self, x):
            return x[None] @ self.w

    small = fxrpg.transform(Stack(), dof=20, plan=EVERYTHING, example_inputs=(X,))
    torch.testing.assert_close(small(X), fxrpg.materialize(small)(X))
    assert fxrpg.explain(small).rows[0].path == "staged"


def steps(optimizers, model) -> None:
    for _ in range(PATIENCE + 1):
        model(X).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def two_layers() -> nn.Module:
    return fxrpg.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), dof=20, plan=EVERYTHING)


def test_an_optimizer_of_a_part_is_told_of_the_state():
    small = two_layers()
    with pytest.warns(
        UserWarning, match=r"fxrpg_ring has a gradient, but no optimizer has stepped it so far.*Pass that"
    ):
        steps([torch.optim.SGD([{"params": layer.parameters()} for layer in small], lr=0.01)], small)


@pytest.mark.parametrize("case", ["whole", "two optimizers", "frozen", "another model"])
def test_what_is_meant_gives_no_warning(case):
    small = two_layers()
    optimizers = [torch.optim.SGD(small.parameters(), lr=0.01)]
    if case == "two optimizers":
        optimizers = [torch.optim.SGD(p, lr=0.01) for p in ([small[0].bias, small[1].bias], [small.fxrpg_ring])]
    elif case == "frozen":
        small.fxrpg_ring.requires_grad_(False)
        optimizers = [torch.optim.SGD(small[0].parameters(), lr=0.01)]
    elif case == "another model":
        other = nn.Linear(8, 4)
        steps([torch.optim.SGD(other.parameters(), lr=0.01)], other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizers, small)


def test_an_optimizer_of_a_generated_weight():
    small = two_layers()
    optimizer = torch.optim.SGD([small[0].weight], lr=0.01)
    small(X).sum().backward()
    with pytest.raises(fxrpg.FxrpgError, match=r"SGD.*the generated weight 0.weight.*model.parameters\(\)"):
        optimizer.step()


def test_an_optimizer_that_steps_less_often_gives_no_warning():
    small = two_layers()
    often, seldom = (torch.optim.SGD(p, lr=0.01) for p in ([small[0].bias, small[1].bias], [small.fxrpg_ring]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2 * PATIENCE):
            small(X).square().sum().backward()
            often.step()
            if i % 3 == 2:
                seldom.step()


def test_threads_that_transform_and_step():
    """The optimizers' hook looks at all models that are alive, while other threads make more."""

    def work(_):
        for _ in range(3):
            small = fxrpg.transform(nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))), dof=9, plan=EVERYTHING)
            optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
            for _ in range(PATIENCE + 1):
                small(torch.ones(1, 4)).sum().backward()
                optimizer.step()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_saved_output_is_not_kept_for_ever(recorded):
    """What torch.tanh saves is its own output: a hook that kept it as it is would close a cycle that nothing collects."""
    small = fxrpg.transform(nn.Linear(64, 64), dof=100, plan=EVERYTHING)
    made = []

    def call():
        out = torch.tanh(small.weight)
        if recorded:
            (grad,) = torch.autograd.grad(out.sum(), small.fxrpg_ring, create_graph=True)
            grad.sum()
        made.append(weakref.ref(out.untyped_storage()))

    for _ in range(3):
        call()
    gc.collect()
    assert [ref() for ref in made] == [None] * 3


def test_recurrent_layers_on_the_meta_device():
    small = fxrpg.transform(nn.LSTM(8, 8).to("meta"), dof=20, plan=EVERYTHING)
    out, _ = small(torch.randn(3, 2, 8, device="meta"))
    assert out.shape == (3, 2, 8)
    out.sum().backward()
    assert small.fxrpg_ring.grad.shape == (20,)


def test_index_select_takes_no_negative_index():
    small = fxrpg.transform(nn.Linear(8, 4), dof=5, plan=EVERYTHING)
    assert torch.equal(small.weight[torch.tensor([-1])], fxrpg.materialize(small).weight[[3]])
    with pytest.raises(IndexError):
        torch.index_select(small.weight, 0, torch.tensor([-1]))


def test_examples_do_not_change_the_first_and_the_last_layer():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 8, 8))
            self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

        def forward(self, x):
            return self.layers(torch.einsum("bi,eoi->beo", x, self.experts).sum(1))

    views = fxrpg.assemble.plan_of(fxrpg.transform(Mixture(), dof=9, example_inputs=(X,))).views
    assert set(views) == {"experts", "layers.1.weight"}
