"""Staged ops: generate one layer's weight, run the ordinary op, drop it; in backward generate it again.

A layer's file describes its op on an ordinary weight (DenseOp) and gets `torch.ops.fxrpg.<name>` and `<name>_backward` with
their fake, autograd and autocast registrations.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxrpg import fusing
from fxrpg.collecting import asked_for
from fxrpg.lowering import current_mode, lowering_mode
from fxrpg.onnx_export import refuse_onnx_export
from fxrpg.recipes import generated_again
from fxrpg.recording import autograd_kernel
from fxrpg.view import View
from fxrpg.weights import accumulate_gradient, add_gradient, collects, generate_weight, plain_weight, weight_dtype

LIBRARY = torch.library.Library("fxrpg", "DEF")


def _no_gradient(*args: Any) -> Any:
    raise AssertionError("asked for a gradient that the op does not have")  # an index, or the bias of an embedding


def _no_flops(*args: Any) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class DenseOp:
    """An op on an ordinary weight, with its gradients taken apart: what a staged op runs around a generated weight.

    Args:
        name: of the op in `torch.ops.fxrpg`.
        inputs: names of its differentiable inputs.
        config: schema of its further arguments, "" or "int a, bool b".
        forward: (*inputs, weight, bias, *config) -> output.
        weight_grad: (grad, inputs, shape, *config) -> gradient of the weight.
        input_grads: (grad, inputs, weight, needed, *config) -> one gradient or None for each input.
        bias_grad: (grad, *config) -> gradient of the bias.
        flops: (shapes of the inputs, shape of the weight, shape of the output, *config) -> floating-point operations.
        fused: the module in `kernels/fused` that runs the op with its weight in registers, "" if none does.
        problem: (direction, inputs, view, dtype, *config) -> the op as `dispatch.choose` takes it, or why no kernel covers it.
        channels: (view, *config) -> channels of the output, which the bias has too.
        autocast: "lower" casts inputs to autocast's type as torch does for this op, "state" to the state's type.
    """

    name: str
    inputs: tuple[str, ...]
    config: str
    forward: Callable[..., Tensor]
    weight_grad: Callable[..., Tensor]
    input_grads: Callable[..., list[Tensor | None]] = _no_gradient
    bias_grad: Callable[..., Tensor] = _no_gradient
    flops: Callable[..., int] = _no_flops
    fused: str = ""
    problem: Callable[..., Any] = _no_gradient
    channels: Callable[..., int] = _no_flops
    autocast: str = "lower"


@functools.cache
def register_flops() -> None:
    """Have `torch.utils.flop_counter` count staged ops as the ops that they stand for; generating costs none of its kind.

    Called when a first model is transformed: the module imports Triton, which `import fxrpg` does not.
    """
    counter = importlib.import_module("torch.utils.flop_counter")
    for op, dense in DENSE_OPS.items():
        forward, backward = flop_formulas(dense)
        counter.register_flop_formula(op.overloadpacket, get_raw=True)(forward)
        counter.register_flop_formula(_backward_op(dense).overloadpacket, get_raw=True)(backward)


def flop_formulas(dense: DenseOp) -> tuple[Callable[..., int], Callable[..., int]]:
    n = len(dense.inputs)

    def forward(*args: Any, out_val: Any = None, **_: Any) -> int:
        shapes = [x.shape for x in args[:n]]
        return dense.flops(shapes, View.parse(args[n + 3]).shape, out_val.shape, *args[n + 4 :])

    def backward(grad: Any, *args: Any, out_val: Any = None, **_: Any) -> int:
        shapes, needed = [x.shape for x in args[:n]], args[-1]
        once = dense.flops(shapes, View.parse(args[n + 2]).shape, grad.shape, *args[n + 3 : -1])
        return once * (sum(map(bool, needed[:n])) + bool(needed[n + 1]))

    return forward, backward


def _backward_op(dense: DenseOp) -> Any:
    return getattr(torch.ops.fxrpg, f"{dense.name}_backward").default


DENSE_OPS: dict[Any, DenseOp] = {}
"""Every staged op, and the op on an ordinary weight that it stands for."""


def define_staged_op(dense: DenseOp) -> None:
    """Define `torch.ops.fxrpg.<name>` and `torch.ops.fxrpg.<name>_backward` for an op on an ordinary weight."""
    name, back = dense.name, f"{dense.name}_backward"
    inputs = ", ".join(f"Tensor {x}" for x in dense.inputs)
    config = f", {dense.config}" if dense.config else ""
    weight = "Tensor state, Tensor scale, str view"
    returns = ", ".join(["Tensor"] * (len(dense.inputs) + 2))
    LIBRARY.define(f"{name}({inputs}, Tensor? bias, {weight}{config}) -> Tensor")
    LIBRARY.define(f"{back}(Tensor grad, {inputs}, {weight}{config}, bool[] needed) -> ({returns})")
    staged = _Staged(dense)
    DENSE_OPS[staged.op] = dense
    LIBRARY.impl(name, staged.forward, "CompositeExplicitAutograd")
    LIBRARY.impl(back, staged.backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxrpg::{name}", staged.forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"fxrpg::{back}", staged.backward_fake, lib=LIBRARY)
    LIBRARY.impl(
        name, autograd_kernel(staged.op, staged.save, staged.differentiate, staged.plain, staged.n + 1), "Autograd"
    )
    # under torch.func.vmap: plain torch ops, each of which has a batching rule
    LIBRARY.impl(name, staged.plain, "FuncTorchBatched")
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, staged.autocast, key)


class _Staged:
    """The implementations of one staged op. Arguments are (*inputs, bias, state, scale, view, *config)."""

    def __init__(self, dense: DenseOp) -> None:
        self.dense, self.n = dense, len(dense.inputs)
        self.op = getattr(torch.ops.fxrpg, dense.name).default
        self.op_backward = _backward_op(dense)

    def forward(self, *args: Any) -> Tensor:
        n = self.n
        out = fusing.forward(self.dense, args[:n], args[n], args[n + 1 : n + 4], args[n + 4 :])
        return own_tensor(self._run(args, generate_weight) if out is None else out)

    def forward_fake(self, *args: Any) -> Tensor:
        return own_tensor(self._run(args, empty_weight))

    def plain(self, *args: Any) -> Tensor:
        return self._run(args, plain_weight)

    def _run(self, args: Any, produce: Callable[..., Tensor]) -> Tensor:
        xs, (bias, state, scale, text), config = args[: self.n], args[self.n : self.n + 4], args[self.n + 4 :]
        return self.dense.forward(*xs, produce(state, scale, text, _compute_dtype(xs, state, scale)), bias, *config)

    def backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Gradients of (*inputs, bias, state), an empty tensor for each that is not needed; fused, or staged as they come."""
        n, needed = self.n, list(args[-1])
        xs, where, config = args[:n], args[n : n + 3], args[n + 3 : -1]
        dx = fusing.input_grad(self.dense, grad, xs, where, config) if any(needed[:n]) else None
        found = fusing.state_grad(self.dense, grad, xs, where, config) if needed[n + 1] else None
        left = [need and (dx is None) for need in needed[:n]] + [needed[n], needed[n + 1] and found is None]
        grads = list(self._run_backward(grad, (*args[:-1], left), generate_weight, accumulate_gradient))
        if dx is not None:
            grads[0] = dx
        if found is not None:
            grads[n + 1] = found
        return tuple(grads)

    def backward_fake(self, grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return self._run_backward(grad, args, empty_weight, _empty_state)

    def _run_backward(
        self, grad: Tensor, args: Any, produce: Callable[..., Tensor], accumulate: Callable[..., Tensor]
    ) -> tuple[Tensor, ...]:
        """The gradients, staged. The weight goes before its own."""
        n, dense, needed = self.n, self.dense, args[-1]
        xs, (state, scale, text), config = args[:n], args[n : n + 3], args[n + 3 : -1]
        grads: list[Tensor | None] = [None] * (n + 2)
        if any(needed[:n]):
            weight = produce(state, scale, text, _compute_dtype(xs, state, scale))
            grads[:n] = dense.input_grads(grad, xs, weight, needed[:n], *config)
            del weight
        if needed[n]:
            grads[n] = dense.bias_grad(grad, *config)
        if needed[n + 1]:
            weight_grad = dense.weight_grad(grad, xs, View.parse(text).shape, *config)
            grads[n + 1] = accumulate(weight_grad, state, scale, text)
        return tuple(grad.new_empty(0) if g is None else g for g in grads)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # inputs, state, scale: never a weight, nor a bias, which may be generated too
        ctx.save_for_backward(*inputs[: self.n], *inputs[self.n + 1 : self.n + 3])
        bias = inputs[self.n]
        ctx.bias = None if bias is None else (tuple(bias.shape), bias.dtype, bias.device)
        ctx.text, ctx.config = inputs[self.n + 3], inputs[self.n + 4 :]
        ctx.mode = current_mode()  # backward may run in a thread of autograd's own

    def differentiate(self, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *xs, state, scale = ctx.saved_tensors
        needed = [bool(need) for need in ctx.needs_input_grad[: self.n + 2]]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            bias = None
            if ctx.bias:  # whatever its values were: what is added has no part in any gradient
                shape, dtype, device = ctx.bias
                bias = torch.zeros(shape, dtype=dtype, device=device, requires_grad=needed[-2])
            grads = self._differentiable(grad, (*xs, bias, state, scale, ctx.text, *ctx.config), needed)
        else:
            with lowering_mode(ctx.mode):
                if needed[-1] and self._collected(ctx, grad, xs, state, scale):
                    needed[-1] = False
                grads = [None] * len(needed)
                if any(needed):
                    out = self.op_backward(grad, *xs, state, scale, ctx.text, *ctx.config, needed)
                    grads = [g if need else None for g, need in zip(out, needed, strict=True)]
        return (*grads, None, None, *[None] * len(ctx.config))

    def _collected(self, ctx: Any, grad: Tensor, xs: list[Tensor], state: Tensor, scale: Tensor) -> bool:
        """Whether the weight's part of the state's gradient went into the sum of this backward, or is not wanted."""
        asked = asked_for(ctx)
        if not asked or not collects(grad, state, scale, ctx.text):
            return asked is False
        weight_grad = self.dense.weight_grad(grad, xs, View.parse(ctx.text).shape, *ctx.config)
        ctx.collector.add(lambda into: add_gradient(into, weight_grad, state, scale, ctx.text))
        return True

    def _differentiable(self, grad: Tensor, args: Any, needed: list[bool]) -> list[Tensor | None]:
        """Gradients through plain torch ops on the generated weight: slower, and differentiable again."""

        # Fresh aliases end the differentiation here: an input may itself have come from the state.
        args = [t.view_as(t) if need else t for t, need in zip(args, needed, strict=False)] + list(args[len(needed) :])
        wanted = [t for t, need in zip(args, needed, strict=False) if need]
        with generated_again() as produce:
            out = self._run(args, produce)
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
        return [next(found) if need else None for need in needed]

    def autocast(self, *args: Any) -> Tensor:
        device, own = args[0].device.type, weight_dtype(*args[self.n + 1 : self.n + 3])
        target = torch.get_autocast_dtype(device) if self.dense.autocast == "lower" else own
        cast = [autocast_to(x, target) for x in args[: self.n + 1]]
        with torch.autocast(device, enabled=False):
            return self.op(*cast, *args[self.n + 1 :])


def _compute_dtype(xs: tuple[Tensor, ...], state: Tensor, scale: Tensor) -> torch.dtype:
    """The first input's type where it is a floating one (an embedding's indices are not)."""
    return xs[0].dtype if xs[0].is_floating_point() else weight_dtype(state, scale)


def autocast_to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Autocast's own rule: floating tensors except float64 are cast."""
    return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)


def own_tensor(out: Tensor) -> Tensor:
    """An op's result must not be a view (torch makes some by squeezing a batch): views of a Function refuse in-place ops."""
    return torch.ops.aten._unsafe_view.default(out, out.shape) if out._is_view() else out


def empty_weight(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype) -> Tensor:
    """What stands for a generated weight where ops are traced on tensors without values."""
    refuse_onnx_export()
    return state.new_empty(View.parse(text).shape, dtype=dtype)


def _empty_state(grad: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    return torch.empty_like(state)
