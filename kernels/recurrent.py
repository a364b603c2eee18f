"""Recurrent layers and cells: LSTM, GRU, and the plain one with tanh or ReLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxrpg.lowering import decomposes
from fxrpg.several import run_staged

Layer = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""([x, *states], parameters) of one layer -> (output, *states)."""


def _run_layers(
    layer: Layer, op: str, x: Tensor, hx: Sequence[Tensor], params: Sequence[Any], layers: int, dropout: float,
    directions: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Layer after layer, with dropout between them: no more weights are alive than one layer's.

    Args:
        hx: states, [layers * directions, batch, hidden] each.
    """
    each, states = len(params) // layers, []
    for i in range(layers):
        start = [h[i * directions : (i + 1) * directions] for h in hx]
        x, *ends = run_staged(layer, op, [x, *start], params[i * each : (i + 1) * each])
        states.append(ends)
        if dropout and i + 1 < layers:
            x = F.dropout(x, dropout)
    return x, *(torch.cat(parts) for parts in zip(*states, strict=True))


def _recurrence(function: Any) -> Callable[..., tuple[Tensor, ...]]:
    """torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu for generated weights: of padded or of packed sequences."""
    pair = function is torch.lstm

    def run(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        packed = isinstance(rest[2], list | tuple)  # (data, batch_sizes, hx, params, ...), not (input, hx, params, ...)
        sizes, rest = (rest[:1], rest[1:]) if packed else ((), rest)
        hx, params, biases, layers, dropout, train, both = rest[:7]
        turned = not packed and rest[7]  # batch first

        def layer(xs: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[Tensor, ...]:
            out = function(
                xs[0], *sizes, tuple(xs[1:]) if pair else xs[1], list(own), biases, 1, 0.0, train, both,
                *(() if packed else (False,)),
            )  # fmt: skip
            return tuple(out)

        x = input.transpose(0, 1) if turned else input
        states, drop = (tuple(hx) if pair else (hx,)), dropout if train else 0.0
        out, *ends = _run_layers(layer, function.__name__, x, states, params, layers, drop, 2 if both else 1)
        return out.transpose(0, 1) if turned else out, *ends

    return run


for _function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
    decomposes(_function)(_recurrence(_function))


@decomposes(torch.lstm_cell)
def lstm_cell(
    input: Tensor, hx: tuple[Tensor, Tensor], w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> tuple[Tensor, Tensor]:
    gates = F.linear(input, w_ih, b_ih) + F.linear(hx[0], w_hh, b_hh)
    into, forget, cell, out = gates.chunk(4, -1)
    c = forget.sigmoid() * hx[1] + into.sigmoid() * cell.tanh()
    return out.sigmoid() * c.tanh(), c


@decomposes(torch.gru_cell)
def gru_cell(input: Tensor, hx: Tensor, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    reset_x, update_x, new_x = F.linear(input, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return new + (update_x + update_h).sigmoid() * (hx - new)


@decomposes(torch.rnn_tanh_cell)
def rnn_tanh_cell(input: Tensor, hx: Tensor, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).tanh()


@decomposes(torch.rnn_relu_cell)
def rnn_relu_cell(input: Tensor, hx: Tensor, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Tensor:
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).relu()
