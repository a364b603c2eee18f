"""Raw parameters: what the functions that consume them say about them, on examples; and layers that are none of torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrpg
from fxrpg.assemble import plan_of
from fxrpg.examples import example_roles
from fxrpg.roles import role_of

X = torch.randn(2, 8)


class Raw(nn.Module):
    """One parameter `w`, and a function of it."""

    def __init__(self, shape: tuple[int, ...], use) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x):
        return self.use(x, self.w)


USES = {
    "linear": ((6, 8), lambda x, w: F.linear(x, w), ("linear", (0, 1), 0)),
    "transposed": ((8, 6), lambda x, w: F.linear(x, w.t()), ("linear", (1, 0), 0)),
    "product": ((8, 6), lambda x, w: x @ w, ("linear", (1, 0), 0)),
    "left": ((6, 8), lambda x, w: (w @ x.t()).t(), ("linear", (0, 1), 0)),
    "addmm": ((8, 6), lambda x, w: torch.addmm(x.new_zeros(6), x, w), ("linear", (1, 0), 0)),
    "cast": ((6, 8), lambda x, w: F.linear(x.double(), w.double()), ("linear", (0, 1), 0)),
    "conv": ((4, 1, 3), lambda x, w: F.conv1d(x[:, None], w), ("conv", (0, 2, 1), 0)),
    "conv-transpose": ((1, 4, 3), lambda x, w: F.conv_transpose1d(x[:, None], w), ("conv", (1, 2, 0), 0)),
    "embedding": ((9, 4), lambda x, w: F.embedding(x.long() % 9, w), ("embedding", (0, 1), 0)),
    "expert": ((3, 6, 8), lambda x, w: F.linear(x, w[1]), ("linear", (0, 1, 2), 1)),
    "expert-transposed": ((3, 8, 6), lambda x, w: x @ w[2], ("linear", (0, 2, 1), 1)),
    "unbound": ((3, 6, 8), lambda x, w: sum(F.linear(x, one) for one in w), ("linear", (0, 1, 2), 1)),
    "chosen": ((3, 6, 8), lambda x, w: torch.bmm(w[torch.tensor([0, 2])], x[:, :, None]), ("linear", (0, 1, 2), 1)),
    "bmm": ((2, 8, 6), lambda x, w: torch.bmm(x.expand(2, 2, 8), w), ("linear", (0, 2, 1), 1)),
    "baddbmm": ((2, 8, 6), lambda x, w: torch.baddbmm(x.new_zeros(6), x.expand(2, 2, 8), w), ("linear", (0, 2, 1), 1)),
    "matmul": ((2, 8, 6), lambda x, w: x.expand(2, 2, 8) @ w, ("linear", (0, 2, 1), 1)),
    "einsum": ((3, 6, 8), lambda x, w: torch.einsum("bi,hoi->bho", x, w), ("linear", (0, 1, 2), 1)),
    "einsum-heads": ((8, 3, 2), lambda x, w: torch.einsum("bi,ihd->bhd", x, w), ("linear", (1, 2, 0), 1)),
    "einsum-first": (
        (4, 6, 2),
        lambda x, w: torch.einsum("god,bgd->bgo", w, x.view(2, 4, 2)),
        ("linear", (0, 1, 2), 1),
    ),
    "grouped": (
        (2, 8, 8),
        lambda x, w: torch._grouped_mm(x, w, offs=torch.tensor([1, 2], dtype=torch.int32)),
        ("linear", (0, 2, 1), 1),
    ),
    "attention": (
        (24, 8),
        lambda x, w: F.multi_head_attention_forward(
            x[:, None], x[:, None], x[:, None], 8, 2, w, None, None, None, False, 0.0, torch.eye(8), None
        )[0],
        ("linear", (0, 1), 0),
    ),
    "added": ((2, 8), lambda x, w: x + w, None),
    "multiplied": ((1, 8), lambda x, w: x * w, None),
    "table of biases": ((5, 2), lambda x, w: x[:, :2] + w[torch.tensor([0, 3])], None),
    "einsum-scale": ((2, 8), lambda x, w: torch.einsum("bi,bi->bi", x, w), None),
    "sum of squares": ((4, 4), lambda x, w: x.sum() + w.square().sum(), None),
}


@pytest.mark.parametrize("name", USES)
def test_a_parameter_is_what_its_function_takes_it_for(name):
    shape, use, expected = USES[name]
    role = example_roles(Raw(shape, use), ((X,), {})).get("w")
    assert (role and (role.kind, role.order, role.stack)) == expected


@pytest.mark.parametrize("name", [name for name, (_, _, expected) in USES.items() if expected])
@pytest.mark.parametrize(("method", "dof"), [("ring", 0.5), ("pranc", 5), ("pemn", 0.5)])
def test_it_is_lowered_and_right(name, method, dof):
    shape, use, _ = USES[name]
    model = Raw(shape, use)
    small = fxrpg.transform(
        model, dof=dof, method=method, plan=[fxrpg.Rule("*", "generate")], example_inputs=(X,), seed=5
    )
    dense = fxrpg.materialize(small)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    found, expected = small(x), dense(y)
    torch.testing.assert_close(found, expected)
    if found.requires_grad and name != "embedding":
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert fxrpg.explain(small).rows[0].path == ("materialized" if name == "cast" else "staged")


def test_parameters_wherever_they_live():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.listed = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
            self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(4, 8)), "bias": nn.Parameter(torch.zeros(4))})
            self.position = nn.Parameter(torch.randn(1, 8))

        def forward(self, x):
            for w in self.listed:
                x = F.linear(x, w).relu() + self.position
            return F.linear(x, self.named["a"], self.named["bias"])

    small = fxrpg.transform(Several(), dof=10, plan=[fxrpg.Rule("*", "generate")], example_inputs=(X,))
    assert set(plan_of(small).views) == {"listed.0", "listed.1", "named.a"}
    torch.testing.assert_close(small(X), fxrpg.materialize(small)(X))
    reason = plan_of(small).dense["position"]
    assert "raw parameter" in reason


def test_both_factors_of_a_product():
    """A weight that is itself a combination of learned bases: two parameters meet in one op."""

    class Bases(nn.Module):
        def __init__(self):
            super().__init__()
            self.coefficients, self.bases = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 8, 6))

        def forward(self, x):
            return x @ (self.coefficients @ self.bases.view(2, -1)).view(3, 8, 6)[1]

    small = fxrpg.transform(Bases(), dof=20, plan=[fxrpg.Rule("*", "generate")], example_inputs=(X,))
    assert set(plan_of(small).views) == {"coefficients", "bases"}
    dense = fxrpg.materialize(small)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    small(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    scale = small.get_buffer("fxrpg_scale")
    expected = sum(
        fxrpg.weights.accumulate_gradient(dense.get_parameter(n).grad, small.fxrpg_ring.detach(), scale, view.text)
        for n, view in plan_of(small).views.items()
    )
    torch.testing.assert_close(small.fxrpg_ring.grad, expected)


def test_the_model_is_run_on_a_copy():
    class Counting(Raw):
        def __init__(self):
            super().__init__((6, 8), F.linear)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, x = Counting(), X.clone()
    state = torch.get_rng_state()
    fxrpg.transform(model, dof=5, plan=[fxrpg.Rule("*", "generate")], example_inputs=(x,))
    assert model.calls == 0
    assert model.w.grad is None
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_use_in_train_mode_only():
    class Training(Raw):
        def forward(self, x):
            return F.linear(x, self.w) if self.training else x

    assert set(example_roles(Training((8, 8), None), ((X,), {}))) == {"w"}


def test_without_examples_nothing_is_known():
    with pytest.raises(fxrpg.FxrpgError, match="raw parameter.*example_inputs"):
        fxrpg.transform(Raw((6, 8), F.linear), dof=5)
    assert example_roles(Raw((6, 8), F.linear), None) == {}


def test_examples_that_do_not_fit():
    with pytest.raises(fxrpg.FxrpgError, match="the model must run on them"):
        fxrpg.transform(Raw((6, 8), F.linear), dof=5, example_inputs=(torch.randn(2, 7),))


def test_a_file_remembers_what_examples_said(tmp_path):
    small = fxrpg.transform(Raw((6, 8), F.linear), dof=5, plan=[fxrpg.Rule("w", "generate")], example_inputs=(X,))
    fxrpg.save(small, tmp_path / "m.safetensors")
    assert torch.equal(fxrpg.load(Raw((6, 8), F.linear), tmp_path / "m.safetensors")(X), small(X))


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, ...], **sides) -> None:
        super().__init__()
        self.__dict__.update(sides)
        self.weight = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "sides", "expected"),
    [
        ((6, 8), {"in_features": 8, "out_features": 6}, ("linear", (0, 1))),
        ((6, 8), {"in_channels": 8, "out_channels": 6}, ("linear", (0, 1))),
        ((8, 6), {"nx": 8, "nf": 6}, ("linear", (1, 0))),
        ((9, 4), {"num_embeddings": 9, "embedding_dim": 4}, ("embedding", (0, 1))),
        (
            (6, 2, 3, 3),
            {"in_channels": 8, "out_channels": 6, "kernel_size": (3, 3), "groups": 4},
            ("conv", (0, 2, 3, 1)),
        ),
        ((8, 6), {"in_features": 8, "out_features": 6}, None),
        ((6, 8), {}, None),
        ((6,), {"num_features": 6}, None),
    ],
)
def test_layers_that_tell_their_sides(shape, sides, expected):
    role = role_of(Layer(shape, **sides), "weight", shape)
    assert (role and (role.kind, role.order)) == expected
    assert role_of(Layer(shape, **sides), "gamma", shape) is None
