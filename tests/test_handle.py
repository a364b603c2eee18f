"""Handles: metadata is free, every consumer gets the right numbers and gradients, writes are refused."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from births import births
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fxrpg
from fxrpg.handle import Handle

EVERYTHING = [fxrpg.Rule("*", "generate")]


def small_linear(shape=(6, 4), dof=10, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return fxrpg.transform(nn.Linear(shape[1], shape[0]), dof=dof, plan=EVERYTHING, **kwargs)


@pytest.fixture
def generations(monkeypatch):
    """Counts how often a weight is generated."""
    with births(monkeypatch) as born:
        yield born


def test_metadata_generates_nothing(generations):
    weight = small_linear().weight
    assert isinstance(weight, Handle)
    assert weight.shape == (6, 4)
    assert weight.size(0) == len(weight) == 6
    assert weight.dim() == weight.ndim == 2
    assert weight.numel() == torch.numel(weight) == 24
    assert weight.dtype == torch.float32
    assert weight.device == torch.device("cpu")
    assert weight.stride() == (4, 1)
    assert weight.is_contiguous()
    assert weight.is_floating_point()
    assert weight.requires_grad
    assert weight.element_size() == 4
    assert weight.layout == torch.strided
    assert not weight.is_cuda
    assert not weight.is_sparse
    assert weight.grad is None
    assert weight.grad_fn is None
    assert "weight" in repr(weight)
    assert weight.t().shape == (4, 6)
    assert weight.T[1:, ::2].shape == (3, 3)
    assert weight.view(2, 3, 4).transpose(0, 2).shape == (4, 3, 2)
    assert [part.shape for part in weight.chunk(3)] == [(2, 4)] * 3
    assert weight.to(torch.float64).dtype == torch.float64
    assert weight.bfloat16().dtype == torch.bfloat16
    assert not weight.detach().requires_grad
    assert isinstance(hash(weight), int)
    assert not generations


CONSUMERS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear-keyword": lambda x, w: F.linear(input=x, weight=w),
    "matmul-t": lambda x, w: x @ w.t(),
    "matmul-T": lambda x, w: torch.matmul(x, w.T),
    "mm-transpose": lambda x, w: x.mm(w.transpose(0, 1)),
    "addmm": lambda x, w: torch.addmm(torch.ones(6, dtype=x.dtype), x, w.permute(1, 0)),
    "addmm-beta": lambda x, w: torch.addmm(torch.ones(6, dtype=x.dtype), x, w.t(), beta=2),
    "rmatmul": lambda x, w: (w @ x.t()).t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "mul": lambda x, w: (x[:, None, :] * w).sum(-1),
    "rows": lambda x, w: torch.cat([x @ row for row in w]).view(-1),
    "index": lambda x, w: x @ w[torch.tensor([0, 3, 3])].t(),
    "slice": lambda x, w: F.linear(x, w[1:5:2]),
    "chunks": lambda x, w: sum(F.linear(x, part) for part in w.chunk(2)),
    "standardised": lambda x, w: F.linear(x, (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)),
    "cast": lambda x, w: F.linear(x, w.to(x.dtype).contiguous()),
    "cast-like": lambda x, w: F.linear(x, w.type_as(x)),
    "reshape-copy": lambda x, w: F.linear(x, w.t().reshape(6, 4)),
    "squeeze": lambda x, w: F.linear(x, w.unsqueeze(0).squeeze(0)),
    "twice": lambda x, w: F.linear(F.linear(x, w), w.t()),
    "cat": lambda x, w: F.linear(x, torch.cat([w, w])),
    "stack": lambda x, w: torch.stack([w, -w]).sum(0) + x.sum() * w,
    "norm": lambda x, w: x.sum() * w.norm(),
    "both": lambda x, w: F.linear(w, w),
    "detached": lambda x, w: F.linear(x, w.detach()) + w.sum(),
    "data": lambda x, w: F.linear(x, w.data) + w.sum(),
    "addition": lambda x, w: w + w,
    "in-condition": lambda x, w: F.linear(x, w) if (w != 0).any() else x,
    "iadd-on-other": lambda x, w: torch.zeros(6, 4, dtype=x.dtype).add_(w),
    "setitem-value": lambda x, w: _assign(torch.zeros(6, 4, dtype=x.dtype), w),
}


def _transposed_without_gradients(x, w):
    with torch.no_grad():
        turned = w.t()
    return x @ turned + w.sum()


def _read_without_gradients(x, w):
    with torch.no_grad():
        _ = w.shape, w.t()
    return F.linear(x, w)


CONSUMERS |= {"no-grad-transpose": _transposed_without_gradients, "no-grad-read": _read_without_gradients}


def _assign(target, value):
    target[:] = value
    return target


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("linear", "staged", ""),
        ("linear-keyword", "staged", ""),
        ("matmul-t", "staged", ""),
        ("matmul-T", "staged", ""),
        ("mm-transpose", "staged", ""),
        ("addmm", "staged", ""),
        ("squeeze", "staged", ""),
        ("cast", "staged", ""),
        ("addmm-beta", "materialized", "beta = 2"),
        ("rmatmul", "staged", ""),
        ("einsum", "staged", ""),
        ("chunks", "staged", ""),
        ("index", "staged", ""),
        ("rows", "staged", ""),
        ("slice", "materialized", "rearranged"),
        ("mul", "materialized", "no lowering"),
        ("reshape-copy", "materialized", "rearranged"),
    ],
)
def test_paths_and_reasons(name, path, reason):
    small = small_linear()
    CONSUMERS[name](torch.randn(3, 4), small.weight)
    row = fxrpg.explain(small).rows[0]
    assert row.path == path
    assert reason in row.reason


def test_strict_refuses_to_materialize():
    small = small_linear(strict=True)
    x = torch.randn(3, 4)
    F.linear(x, small.weight)
    with pytest.raises(fxrpg.FxrpgError, match=r"weight: mul needs a lowering.*strict=False"):
        x[:, None, :] * small.weight


def test_lowering_modes():
    small, x = small_linear(), torch.randn(3, 4)
    staged = small(x)
    with fxrpg.lowering_mode("materialized"):
        torch.testing.assert_close(small(x), staged)
        assert fxrpg.explain(small).fraction("materialized") == 1
    small(x)
    assert fxrpg.explain(small).fraction("staged") == 1
    with pytest.raises(fxrpg.FxrpgError, match="must be one of"), fxrpg.lowering_mode("fast"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(fxrpg.FxrpgError, match="GPU or Triton's interpreter"), fxrpg.lowering_mode("fused"):
            pass


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.add_(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: w.copy_(torch.zeros(6, 4)),
        lambda w: nn.init.kaiming_uniform_(w),
        lambda w: nn.init.zeros_(w),
        lambda w: setattr(w, "data", torch.zeros(6, 4)),
        lambda w: setattr(w, "grad", torch.zeros(6, 4)),
        lambda w: w.requires_grad_(False),
        lambda w: w.register_hook(print),
        lambda w: torch.add(torch.zeros(6, 4), 1, out=w),
        lambda w: torch.embedding_renorm_(w, torch.tensor([0]), 1.0, 2.0),
    ],
)
def test_writes_are_refused(write):
    small = small_linear()
    before = small.fxrpg_ring.detach().clone()
    with torch.no_grad(), pytest.raises(fxrpg.FxrpgError, match="weight: a generated weight is read-only"):
        write(small.weight)
    assert torch.equal(small.fxrpg_ring, before)
    with pytest.raises(fxrpg.FxrpgError, match=r"weight: a generated weight is read-only.*replace"):
        small.weight = nn.Parameter(torch.zeros(6, 4))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model", ["staged", "materialized"])
def test_activation_checkpointing(reentrant, model):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 5)

        def forward(self, x):
            if model == "staged":
                return self.b(self.a(x).relu())
            return torch.einsum("bi,oi->bo", torch.einsum("bi,oi->bo", x, self.a.weight).relu(), self.b.weight)

    torch.manual_seed(0)
    small = fxrpg.transform(Net(), dof=20, plan=EVERYTHING)
    x = torch.randn(4, 5, requires_grad=True)
    small(x).square().sum().backward()
    expected, dx = small.fxrpg_ring.grad.clone(), x.grad.clone()
    small.zero_grad()
    x.grad = None
    checkpoint(small, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(small.fxrpg_ring.grad, expected)
    assert torch.equal(x.grad, dx)


def test_a_step_between_forward_and_backward_is_an_error():
    for consume in (F.linear, lambda x, w: torch.einsum("bi,oi->bo", x, w)):
        small = small_linear()
        x = torch.randn(3, 4, requires_grad=True)
        out = consume(x, small.weight)
        with torch.no_grad():
            small.fxrpg_ring.add_(1)
        with pytest.raises(RuntimeError, match=r"in.?place"):
            out.sum().backward()


def test_below_function_dispatch():
    """Past torch's function dispatch the handle is an ordinary differentiable tensor that generates when it is needed."""
    small, x = small_linear().double(), torch.randn(3, 4, dtype=torch.float64)
    small(x).square().sum().backward()
    expected, weight = small.fxrpg_ring.grad.clone(), small.weight
    small.zero_grad()
    with torch._C.DisableTorchFunctionSubclass():
        F.linear(x, weight, small.bias).square().sum().backward()
    torch.testing.assert_close(small.fxrpg_ring.grad, expected)


class Rounded(torch.autograd.Function):
    """A straight-through estimator, as quantisation-aware training writes it."""

    @staticmethod
    def forward(ctx, weight):
        return torch.round(weight * 8) / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


CONSUMERS |= {
    "straight-through": lambda x, w: F.linear(x, Rounded.apply(w)),
    "own-function": lambda x, w: Product.apply(x, w),
    "own-function-rearranged": lambda x, w: Product.apply(x, w.t().reshape(6, 4).to(x.dtype)),
    "matmul-keyword": lambda x, w: torch.matmul(x, other=w.t()),
    "mm-keyword": lambda x, w: torch.mm(x, mat2=w.t()),
    "mm-out": lambda x, w: torch.mm(x.detach(), w.detach().t(), out=torch.empty(3, 6, dtype=x.dtype)) + w.sum(),
    "gram": lambda x, w: w @ w.t() - torch.eye(6, dtype=x.dtype),
    "returned-input": lambda x, w: x @ F.dropout(w, 0.3, training=False).type(x.dtype).cpu().t(),
    "inplace-after": lambda x, w: F.linear(x.unsqueeze(0), w, torch.ones(6, dtype=x.dtype)).relu_(),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_consumers_agree_with_the_dense_model(name):
    consume = CONSUMERS[name]
    small = small_linear().double()
    dense = fxrpg.materialize(small)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    out, expected = consume(x, small.weight), consume(x_dense, dense.weight)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    (expected * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    view = small._fxrpg_plan.views["weight"]
    wanted = torch.ops.fxrpg.accumulate(dense.weight.grad, small.fxrpg_ring.detach(), small.fxrpg_scale, view.text)
    torch.testing.assert_close(small.fxrpg_ring.grad, wanted, rtol=1e-10, atol=1e-10)
    if x_dense.grad is not None:
        torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-10, atol=1e-10)


def test_functional_call_and_grad_transform():
    small, x = small_linear().double(), torch.randn(3, 4, dtype=torch.float64)
    params = {name: p.detach() for name, p in small.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(small, p, (x,)).square().sum())(params)
    small(x).square().sum().backward()
    torch.testing.assert_close(grads["fxrpg_ring"], small.fxrpg_ring.grad)


@pytest.mark.parametrize("name", ["linear", "einsum", "slice"])
def test_forward_mode(name):
    small, x = small_linear().double(), torch.randn(3, 4, dtype=torch.float64)
    ring = small.fxrpg_ring.detach()
    tangent = torch.linspace(-1, 1, len(ring), dtype=torch.float64)

    def out(ring):
        return torch.func.functional_call(Consuming(small, CONSUMERS[name]), {"layer.fxrpg_ring": ring}, (x,))

    _, expected = torch.func.jvp(out, (ring,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(out(torch.autograd.forward_ad.make_dual(ring, tangent))).tangent
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(expected, torch.func.jacrev(out)(ring) @ tangent)


class Consuming(nn.Module):
    def __init__(self, layer, consume):
        super().__init__()
        self.layer, self.consume = layer, consume

    def forward(self, x):
        return self.consume(x, self.layer.weight)


def test_threads_and_exceptions():
    small, x = small_linear(), torch.randn(3, 4)
    expected, found = small(x).detach(), []

    def work():
        for _ in range(20):
            with pytest.raises(RuntimeError, match="shape"):
                F.linear(torch.randn(3, 5), small.weight)
            found.append(torch.equal(small(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


class Zoo(nn.Module):
    """Owners that read their weights in unusual ways."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 6, batch_first=True)
        self.cell = nn.GRUCell(6, 6)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.bilinear = nn.Bilinear(6, 6, 5)
        self.padded = nn.Conv1d(5, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 3, 2, stride=2)
        self.list = nn.ParameterList([nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 3))])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index):
        x = self.table(index)
        x = x + self.attention(x, x, x)[0]
        x = self.encoder(x)
        y = self.gru(self.lstm(x)[0])[0][:, -1]
        y = self.spectral(self.normed(self.cell(y, y)))
        z = self.up(self.padded(self.bilinear(y, y).unsqueeze(-1).repeat(1, 1, 4)), output_size=[9])
        return self.head(x), z.mean(-1) @ self.list[1], x @ self.list[0]


@pytest.mark.parametrize("training", [True, False])
def test_unusual_owners(training):
    torch.manual_seed(0)
    rules = [fxrpg.Rule("list.0", "generate"), fxrpg.Rule("list.1", "generate"), *EVERYTHING]
    small = fxrpg.transform(Zoo(), dof=300, plan=rules).double().train(training)
    dense = fxrpg.materialize(small)
    index = torch.randint(11, (3, 5))
    twice = (small, copy.deepcopy(dense))
    outs = [model(index) for model in twice]
    for found, expected in zip(*outs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for out in outs:
        sum(part.square().sum() for part in out).backward()
    grads = dict(twice[1].named_parameters(remove_duplicate=False))
    wanted = sum(
        torch.ops.fxrpg.accumulate(grads[name].grad, small.fxrpg_ring.detach(), small.fxrpg_scale, view.text)
        for name, view in small._fxrpg_plan.views.items()
    )
    torch.testing.assert_close(small.fxrpg_ring.grad, wanted, rtol=1e-9, atol=1e-9)
    assert small._fxrpg_plan.names["head.weight"] == ("table.weight", "head.weight")
    assert isinstance(small.lstm, nn.LSTM)
    assert {row.path for row in fxrpg.explain(small).rows if row.status == "generated"} == {"staged", "materialized"}


@pytest.mark.parametrize("name", ["linear", "einsum", "slice", "own-function", "twice"])
def test_gradients_of_gradients(name):
    small = small_linear().double()
    dense = fxrpg.materialize(small)
    x = torch.randn(3, 4, dtype=torch.float64)
    penalties = []
    for model in (small, dense):
        z = x.clone().requires_grad_()
        (dz,) = torch.autograd.grad(CONSUMERS[name](z, model.weight).pow(3).sum(), z, create_graph=True)
        dz.square().sum().backward()
        penalties.append(dz.detach())
    torch.testing.assert_close(*penalties)
    view = small._fxrpg_plan.views["weight"]
    wanted = torch.ops.fxrpg.accumulate(dense.weight.grad, small.fxrpg_ring.detach(), small.fxrpg_scale, view.text)
    torch.testing.assert_close(small.fxrpg_ring.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    small = fxrpg.transform(nn.Sequential(nn.Linear(4, 6), nn.Conv1d(3, 5, 2)), dof=20, plan=EVERYTHING)
    dense = fxrpg.materialize(small)
    x = torch.randn(2, 3, 4)
    with torch.autocast("cpu", dtype):
        out, expected = small(x), dense(x)
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert small.fxrpg_ring.grad.dtype == torch.float32
    torch.testing.assert_close(small[0].bias.grad, dense[0].bias.grad, rtol=0.05, atol=0.05)


def test_frozen_state_and_inference_mode():
    small, x = small_linear(), torch.randn(3, 4)
    small.fxrpg_ring.requires_grad_(False)
    assert not small.weight.requires_grad
    assert not F.linear(x, small.weight).requires_grad
    with torch.inference_mode():
        small(x)
        torch.einsum("bi,oi->bo", x, small.weight)


def test_double_backward_through_several_layers():
    """The second derivative of a deep model, whose inner inputs themselves come from the ring."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]
    small = fxrpg.transform(nn.Sequential(*layers), dof=12, plan=EVERYTHING).double()
    x, ring = torch.randn(5, 3, dtype=torch.float64), small.fxrpg_ring

    def loss(ring):
        return torch.func.functional_call(small, {"fxrpg_ring": ring}, (x,)).square().sum()

    (plain,) = torch.autograd.grad(loss(ring), ring)
    (once,) = torch.autograd.grad(loss(ring), ring, create_graph=True)
    torch.testing.assert_close(once, plain)
    vector = torch.linspace(-1, 1, 12, dtype=torch.float64)
    (product,) = torch.autograd.grad(once @ vector, ring)
    hessian = torch.func.hessian(loss)(ring.detach())
    torch.testing.assert_close(product, hessian @ vector)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 2), (2, 3, 5)),
        (nn.Conv1d(3, 4, 2), (3, 5)),
        (nn.Conv2d(3, 4, 2), (3, 5, 5)),
        (nn.ConvTranspose1d(3, 4, 2), (2, 3, 5)),
        (nn.Linear(5, 4), (2, 3, 5)),
        (nn.Linear(5, 4), (5,)),
    ],
)
def test_in_place_ops_may_follow(layer, shape):
    small = fxrpg.transform(nn.Sequential(layer, nn.ReLU(inplace=True)), dof=5, plan=EVERYTHING)
    x = torch.randn(shape)
    torch.testing.assert_close(small(x), fxrpg.materialize(small)(x))
    small(x).sum().backward()


def test_references_kept_elsewhere_are_an_error():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.kept = [self.layer.weight]

        def forward(self, x):
            return F.linear(x, self.kept[0])

    small = fxrpg.transform(Keeps(), dof=3, plan=EVERYTHING)
    with pytest.raises(fxrpg.FxrpgError, match="must be read from the module that owns it"):
        small(torch.randn(2, 4))


def test_old_style_weight_norm():
    """It keeps a computed, differentiable tensor as a plain attribute, which torch's deepcopy refuses."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(layer)
    x = torch.randn(3, 4)
    layer(x)
    small = fxrpg.transform(layer, dof=9, plan=EVERYTHING)
    small(x).sum().backward()
    torch.testing.assert_close(fxrpg.materialize(small)(x), small(x))


def test_symbolic_trace_of_a_transformed_model():
    small = fxrpg.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), dof=5, plan=EVERYTHING)
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(small)(x), small(x))


def test_averages_of_equal_models_keep_scales_and_digest():
    small = small_linear()
    average = torch.optim.swa_utils.AveragedModel(
        small, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    for _ in range(200):
        average.update_parameters(small)
    soup = {name: (value + small.state_dict()[name]) / 2 for name, value in average.module.state_dict().items()}
    small.load_state_dict(soup)
    x = torch.randn(2, 4)
    torch.testing.assert_close(average.module(x), small(x))
