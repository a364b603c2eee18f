"""One gradient of a shared state for a whole backward: what each weight adds goes straight into it.

A weight reads a small part of a ring, but a gradient has the ring's full size: made for each weight, then summed by
autograd, that is work by weights times cells. So ops of one graph read the state through one node, put what they find into
its sum, and return nothing themselves; the node runs when all of them have, and hands the sum on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fxrpg import native

_joined: Any = WeakTensorKeyDictionary()
"""State -> a weak reference to the tensor that graphs read in its place, while one of them lives."""


class Collector:
    """The sums of the backwards that are under way, by autograd's number for each."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._lock = threading.Lock()  # backward may run in several threads, for several graphs

    def add(self, put: Callable[[Tensor | None], Tensor]) -> None:
        """Put a part into the sum of the backward under way: `put` takes the sum, None at first, and returns it."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            self._sums[task] = put(self._sums.get(task))

    def take(self) -> Tensor | None:
        """The sum of the backward under way, which is over."""
        with self._lock:
            return self._sums.pop(torch._C._current_graph_task_id(), None)


class _Join(torch.autograd.Function):
    """The node between a state and the ops that read it."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, collector: Collector) -> Tensor:
        ctx.collector = collector
        ctx.set_materialize_grads(False)  # ops that have put their part return none
        return state.detach()  # of the same version: a change in place is noticed, and is no change of a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        found = ctx.collector.take()
        if found is None or grad is None:
            return grad if found is None else found, None
        return grad + found, None


def joined(state: Tensor) -> tuple[Tensor, Collector | None]:
    """`state` as an op's graph had better read it, and where the op's backward puts its part of the gradient.

    The state itself, and None, wherever code watches or rewrites what autograd records.
    """
    if not (state.requires_grad and state.is_leaf) or torch.compiler.is_compiling() or not native.wanted(state):
        return state, None
    known = _joined.get(state)
    found = known() if known is not None else None
    if found is None or _where(found) != _where(state):
        collector = Collector()
        found = _Join.apply(state, collector)
        found.fxrpg_collector = collector
        _joined[state] = TensorWeakRef(found)
    return found, found.fxrpg_collector


def _where(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape
