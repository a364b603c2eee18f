"""Recurrent layers, cells and attention: functions of several weights, against the materialized model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fxrpg

EVERYTHING = [fxrpg.Rule("*", "generate")]


def tensors(out) -> list[torch.Tensor]:
    if isinstance(out, PackedSequence):
        out = out.data
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out or () if part is not None for t in tensors(part)]


def compare(model: nn.Module, *args, dof=0.3, method="ring", tolerance=1e-10) -> nn.Module:
    """Outputs and gradients of the transformed model and of its materialized one, with the same random numbers."""
    small = fxrpg.transform(model.double(), dof=dof, method=method, plan=EVERYTHING)
    dense = fxrpg.materialize(small)
    results = []
    for one in (small, dense):
        inputs = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
        torch.manual_seed(0)
        outs = tensors(one(*inputs))
        sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs).backward()
        results.append((outs, [a.grad for a in inputs if isinstance(a, torch.Tensor)]))
    for found, expected in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.stride() == expected.stride()
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    _compare_states(small, dense, tolerance)
    return small


def _compare_states(small: nn.Module, dense: nn.Module, tolerance: float) -> None:
    plan = fxrpg.assemble.plan_of(small)
    gradients = dict.fromkeys(plan.states, 0)
    full = dict(dense.named_parameters(remove_duplicate=False))
    for name, view in plan.views.items():
        state = small.get_parameter(plan.state_of(name)).detach()
        scale = small.get_buffer("fxrpg_scale")
        gradients[plan.state_of(name)] += fxrpg.weights.accumulate_gradient(full[name].grad, state, scale, view.text)
    for name, expected in gradients.items():
        torch.testing.assert_close(small.get_parameter(name).grad, expected, rtol=tolerance, atol=tolerance)
    for name, p in small.named_parameters():
        if name in full:
            torch.testing.assert_close(p.grad, full[name].grad, rtol=tolerance, atol=tolerance)


LAYERS = {
    "lstm": lambda: nn.LSTM(6, 8),
    "lstm-two": lambda: nn.LSTM(6, 8, 2, dropout=0.3),
    "lstm-both": lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True, dropout=0.2),
    "lstm-projected": lambda: nn.LSTM(6, 8, 2, proj_size=4, bidirectional=True),
    "lstm-no-bias": lambda: nn.LSTM(6, 8, bias=False),
    "gru": lambda: nn.GRU(6, 8, 2, batch_first=True, dropout=0.5),
    "gru-both": lambda: nn.GRU(6, 8, 3, bidirectional=True),
    "tanh": lambda: nn.RNN(6, 8, 2),
    "relu": lambda: nn.RNN(6, 8, 2, nonlinearity="relu", bidirectional=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("method", "dof"), [("ring", 0.3), ("pranc", 12), ("pemn", 0.5)])
def test_layers(name, method, dof):
    torch.manual_seed(0)
    small = compare(LAYERS[name](), torch.randn(3, 5, 6, dtype=torch.float64), dof=dof, method=method)
    assert fxrpg.explain(small).fraction("staged") == 1
    small.eval()
    x = torch.randn(4, 6, dtype=torch.float64)  # one sequence, no batch
    torch.testing.assert_close(tensors(small(x)), tensors(fxrpg.materialize(small)(x)))


@pytest.mark.parametrize("name", ["lstm-both", "gru-both", "relu"])
def test_states_given_and_packed_sequences(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = [torch.randn(states, 3, 8, dtype=torch.float64) for _ in range(2)]

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, h, c):
            packed = pack_padded_sequence(x, torch.tensor([5, 2, 4]), self.layer.batch_first, enforce_sorted=False)
            return self.layer(packed, (h, c) if name.startswith("lstm") else h + c)

    x = torch.randn((3, 5, 6) if layer.batch_first else (5, 3, 6), dtype=torch.float64)
    compare(Packed(), x, *hx)


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 8)
        h = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for step in x.unbind(1):
            h = self.cell(step, h)
        return h


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda i, h: nn.RNNCell(i, h, False, "relu")])
def test_cells(cell):
    torch.manual_seed(0)
    small = compare(Cells(cell(6, 8)), torch.randn(3, 5, 6, dtype=torch.float64))
    assert fxrpg.explain(small).fraction("staged") == 1


class Attention(nn.Module):
    def __init__(self, kind: str, **settings) -> None:
        super().__init__()
        self.kind, self.attention = kind, nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x, y):
        if self.kind == "self":
            return self.attention(x, x, x)
        if self.kind == "encoder-decoder":
            return self.attention(x, y, y, need_weights=False)
        return self.attention(x, y[:, :, :6], y[:, :, :4])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.3}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@pytest.mark.parametrize("kind", ["self", "encoder-decoder", "three widths"])
def test_attention(kind, settings, training):
    torch.manual_seed(0)
    widths = {"kdim": 6, "vdim": 4} if kind == "three widths" else {}
    model = Attention(kind, **settings, **widths).train(training)
    small = compare(model, *(torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2)))
    assert fxrpg.explain(small).fraction("staged") == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer(training):
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).train(training)
    small = compare(model, *(torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2)))
    assert fxrpg.explain(small).fraction("staged") == 1


def test_generated_biases_of_attention():
    """Of PRANC the projections' bias is generated too, and split in three."""
    torch.manual_seed(0)
    model = Attention("encoder-decoder")
    compare(model, *(torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(2)), dof=9, method="pranc")


@pytest.mark.parametrize("name", ["lstm-both", "gru", "tanh"])
def test_nothing_generated_is_saved(name):
    small = fxrpg.transform(LAYERS[name](), dof=0.3, plan=EVERYTHING)
    weights = [
        p.detach() for n, p in fxrpg.materialize(small).named_parameters() if n in fxrpg.assemble.plan_of(small).views
    ]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        small(torch.randn(3, 5, 6))
    assert saved
    for weight in weights:
        assert not any(t.numel() == weight.numel() and torch.equal(t.reshape(-1), weight.reshape(-1)) for t in saved)


def test_gradients_can_be_differentiated_again():
    torch.manual_seed(0)
    small = fxrpg.transform(nn.GRU(3, 4, 2).double(), dof=0.3, plan=EVERYTHING)

    def function(state, x):
        return torch.func.functional_call(small, {"fxrpg_ring": state}, (x,))[0]

    state, x = small.fxrpg_ring.detach().requires_grad_(), torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(function, (state, x), fast_mode=True)


def test_autocast_is_as_for_the_dense_layer():
    small = fxrpg.transform(nn.LSTM(6, 8, 2), dof=0.3, plan=EVERYTHING)
    dense, x = fxrpg.materialize(small), torch.randn(3, 5, 6)
    for one in (small, dense):
        with torch.autocast("cpu", torch.bfloat16):
            out = one(x)[0]
        out.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = small(x)[0], dense(x)[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    assert small.fxrpg_ring.grad.isfinite().all()


def test_dropout_draws_what_torch_draws():
    """The same random numbers, so that a seed gives the same training on both."""
    small = fxrpg.transform(nn.LSTM(6, 8, 3, dropout=0.4), dof=0.3, plan=EVERYTHING)
    dense, x = fxrpg.materialize(small), torch.randn(7, 5, 6)
    states = []
    for one in (small, dense):
        torch.manual_seed(3)
        one(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
