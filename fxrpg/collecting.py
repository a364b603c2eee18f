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
from torch.utils.weak import TensorWeakRef

from fxrpg import native

_joined: dict[int, Any] = {}
"""id of a state -> a weak reference to the tensor that graphs read in its place, while one of them lives. None to the state
itself: a parameter with one cannot be swapped by torch."""


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
        ctx.gathers = collector  # not the name that ops have for it: `asked_for` tells them apart
        ctx.set_materialize_grads(False)  # ops that have put their part return none
        return state.detach()  # of the same version: a change in place is noticed, and is no change of a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        if torch.compiler.is_compiling():
            return grad, None
        found = ctx.gathers.take()
        if found is None or grad is None:
            return grad if found is None else found, None
        return grad + found, None


def joined(state: Tensor) -> tuple[Tensor, Collector | None]:
    """`state` as an op's graph had better read it, and where the op's backward puts its part of the gradient.

    The state itself, and None, wherever code watches or rewrites what autograd records.
    """
    if not (state.requires_grad and state.is_leaf) or torch.compiler.is_compiling() or not native.wanted(state):
        return state, None
    known = _joined.get(id(state))
    found = known() if known is not None else None
    if found is None or not _stands_for(found, state):
        collector = Collector()
        found = _Join.apply(state, collector)
        found.fxrpg_collector = collector
        if len(_joined) >= 64:
            for key in [key for key, ref in list(_joined.items()) if ref() is None]:
                _joined.pop(key, None)
        _joined[id(state)] = TensorWeakRef(found)
    return found, found.fxrpg_collector


def asked_for(ctx: Any) -> bool | None:
    """Whether the backward under way asks for the state's gradient, by the record of an op; None where that cannot be told."""
    if torch.compiler.is_compiling() or ctx.collector is None or torch._C._current_graph_task_id() < 0:
        return None  # compiled autograd sums by itself
    nodes = [node for node, _ in ctx.next_functions if getattr(node, "gathers", None) is ctx.collector]
    return any(torch._C._will_engine_execute_node(node) for node in nodes) if nodes else None


def _stands_for(found: Tensor, state: Tensor) -> bool:
    """Whether `found` is still an alias of `state` that leads its gradient there."""
    (node, _), *_ = found.grad_fn.next_functions  # type: ignore[union-attr]
    return getattr(node, "variable", None) is state and _where(found) == _where(state)


def _where(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
