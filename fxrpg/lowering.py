"""The registry of lowerings: which op replaces `op(x, weight)` when the weight is a generated view.

A layer's file in `kernels/` adds its rule with `@lowers(...)` and its op with `define_staged_op`. A handle meets the rule
when an op consumes it, a graph when the `lower` pass finds the pattern: both call the same function.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.device import require_triton
from fxrpg.errors import FxrpgError
from fxrpg.generator import View
from fxrpg.roles import Role

LIBRARY = torch.library.Library("fxrpg", "DEF")
MODES = ("auto", "fused", "staged", "materialized")

_mode: contextvars.ContextVar[str] = contextvars.ContextVar("fxrpg_lowering_mode", default="auto")


@contextlib.contextmanager
def lowering_mode(mode: str) -> Iterator[None]:
    """Choose how ops on generated weights run inside the block.

    Args:
        mode: "auto"; "fused": inside the kernel that uses the weight (an op without a fused kernel is staged and
            `explain` says so); "staged": one layer's weight at a time, then the ordinary op; "materialized": no lowering,
            the reference that the others are tested against. Graphs are lowered by the mode in force when they are
            transformed, compiled code is always lowered.

    Raises:
        FxrpgError: unknown mode, or "fused" where no Triton kernel can run.
    """
    if mode not in MODES:
        raise FxrpgError("lowering_mode", f"must be one of {MODES}", repr(mode), "Pass one of them.")
    if mode == "fused":
        require_triton("lowering_mode('fused')")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def current_mode() -> str:
    """The mode that `lowering_mode` has set here; "auto" outside."""
    return _mode.get()


class Generated(NamedTuple):
    """A generated weight as an argument of a rule. In a graph the tensors are `torch.fx.Proxy` objects."""

    state: Any
    scale: Any
    view: str
    shape: tuple[int, ...]
    """The weight's shape as the op sees it."""
    transposed: bool = False

    @classmethod
    def of(cls, state: Any, scale: Any, view: str, transposed: bool = False) -> Generated:
        """The weight of the view `view`, or its transpose."""
        shape = View.parse(view).shape
        return cls(state, scale, view, shape[::-1] if transposed else shape, transposed)


class NotLowered(Exception):
    """Raised by a rule for a call it does not cover; the text is the reason that `explain` shows."""


@dataclass(frozen=True)
class Rule:
    """How one consuming op is lowered: `call` has the op's own signature, with a Generated in place of the weight."""

    call: Callable[..., Any]
    position: int
    keyword: str
    transposable: bool
    role: Callable[..., Role] | None


LOWERINGS: dict[Any, Rule] = {}
LAYERS: dict[Any, Callable[..., Any]] = {}


def lowers(
    *targets: Any,
    position: int = 1,
    keyword: str = "weight",
    transposable: bool = False,
    role: Callable[..., Role] | None = None,
) -> Callable:
    """Register the decorated function as the lowering of `targets` (torch functions or ATen overloads).

    Args:
        position: where the weight stands among the op's positional arguments.
        keyword: its name when given by keyword.
        transposable: whether the rule also takes a weight that was transposed on the way.
        role: (shape, transposed, *arguments of the call) -> the role of a parameter that is this op's weight in a graph.
    """

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            LOWERINGS[target] = Rule(call, position, keyword, transposable, role)
        return call

    return register


def compiles(*layers: type) -> Callable:
    """Register the decorated (module, weight: Generated, *inputs) -> output as what the stock `layers` do in compiled code."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        LAYERS.update(dict.fromkeys(layers, call))
        return call

    return register


def dims_of(x: Any) -> int | None:
    """Number of dimensions of a rule's argument; None for a value in a graph whose shape nothing tells."""
    if isinstance(x, Tensor):
        return x.dim()
    value = x.node.meta.get("val") if isinstance(x, torch.fx.Proxy) else None
    return value.dim() if isinstance(value, Tensor) else None


def scale_of(scale: Tensor, view: View) -> Tensor:
    """The layer's scale, a 0-dimensional float32 tensor. `scale` holds bit patterns, so that no cast of a model rounds it."""
    return scale.view(torch.float32)[view.tensor]


def generate_weight(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of the view `text`, scaled, in `dtype` (the state's by default): the one place where weights come to be.

    The scale is one float32 multiplication (float64 for float64), then one rounding to `dtype`.
    """
    view = View.parse(text)
    dtype = dtype or state.dtype
    values = view.generator.materialize(state, view, dtype)
    if dtype.itemsize >= 4:
        return values.mul_(scale_of(scale, view))
    return values.float().mul_(scale_of(scale, view)).to(dtype)


def accumulate_gradient(grad: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    """Gradient of the state from the gradient of the scaled weight: summed in float32 (float64 for float64)."""
    view = View.parse(text)
    wide = torch.promote_types(grad.dtype, torch.promote_types(state.dtype, torch.float32))
    scaled = grad.to(wide) * scale_of(scale, view)
    return view.generator.accumulate(scaled, state, view).to(state.dtype)


def _no_gradient(*args: Any) -> Any:
    raise AssertionError("asked for a gradient that the op does not have")  # an index, or the bias of an embedding


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
        autocast: "lower" casts inputs to autocast's type as torch does for this op, "state" to the state's type.
    """

    name: str
    inputs: tuple[str, ...]
    config: str
    forward: Callable[..., Tensor]
    weight_grad: Callable[..., Tensor]
    input_grads: Callable[..., list[Tensor | None]] = _no_gradient
    bias_grad: Callable[..., Tensor] = _no_gradient
    autocast: str = "lower"


DENSE_OPS: dict[Any, DenseOp] = {}
"""Every staged op, and the op on an ordinary weight that it stands for."""


def define_staged_op(dense: DenseOp) -> None:
    """Define `torch.ops.fxrpg.<name>` and `<name>_backward`: generate, run the ordinary op, drop; in backward again.

    What is saved for backward is the inputs, the state and the scales, never a weight.
    """
    inputs = ", ".join(f"Tensor {name}" for name in dense.inputs)
    config = f", {dense.config}" if dense.config else ""
    weight = "Tensor state, Tensor scale, str view"
    n = len(dense.inputs)
    returns = ", ".join(["Tensor"] * (n + 2))
    LIBRARY.define(f"{dense.name}({inputs}, Tensor? bias, {weight}{config}) -> Tensor")
    LIBRARY.define(f"{dense.name}_backward(Tensor grad, {inputs}, {weight}{config}, bool[] needed) -> ({returns})")
    op = getattr(torch.ops.fxrpg, dense.name).default
    op_backward = getattr(torch.ops.fxrpg, f"{dense.name}_backward").default
    DENSE_OPS[op] = dense

    def forward(*args: Any) -> Tensor:
        xs, (bias, state, scale, text), config = args[:n], args[n : n + 4], args[n + 4 :]
        return dense.forward(*xs, generate_weight(state, scale, text, _compute_dtype(xs, state)), bias, *config)

    def forward_fake(*args: Any) -> Tensor:
        xs, (bias, state, _, text), config = args[:n], args[n : n + 4], args[n + 4 :]
        weight = state.new_empty(View.parse(text).shape, dtype=_compute_dtype(xs, state))
        return dense.forward(*xs, weight, bias, *config)

    def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        xs, (state, scale, text), config, needed = args[:n], args[n : n + 3], args[n + 3 : -1], args[-1]
        grads: list[Tensor | None] = [None] * (n + 2)
        if any(needed[:n]):
            weight = generate_weight(state, scale, text, _compute_dtype(xs, state))
            grads[:n] = dense.input_grads(grad, xs, weight, needed[:n], *config)
            del weight
        if needed[n]:
            grads[n] = dense.bias_grad(grad, *config)
        if needed[n + 1]:
            weight_grad = dense.weight_grad(grad, xs, View.parse(text).shape, *config)
            grads[n + 1] = accumulate_gradient(weight_grad, state, scale, text)
        return tuple(grad.new_empty(0) if g is None else g for g in grads)

    def backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        xs, (state, _, text), config, needed = args[:n], args[n : n + 3], args[n + 3 : -1], args[-1]
        grads: list[Tensor | None] = [None] * (n + 2)
        if any(needed[:n]):
            weight = state.new_empty(View.parse(text).shape, dtype=_compute_dtype(xs, state))
            grads[:n] = dense.input_grads(grad, xs, weight, needed[:n], *config)
        grads[n] = dense.bias_grad(grad, *config) if needed[n] else None
        grads[n + 1] = torch.empty_like(state) if needed[n + 1] else None
        return tuple(grad.new_empty(0) if g is None else g for g in grads)

    def plain(*args: Any) -> Tensor:
        xs, (bias, state, scale, text), config = args[:n], args[n : n + 4], args[n + 4 :]
        return dense.forward(*xs, plain_weight(state, scale, text).to(_compute_dtype(xs, state)), bias, *config)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: n + 3])
        ctx.text, ctx.config = inputs[n + 3], inputs[n + 4 :]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *xs, bias, state, scale = ctx.saved_tensors
        needed = [bool(need) for need in ctx.needs_input_grad[: n + 2]]
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can itself be differentiated
            grads = _differentiable_grads(dense, grad, xs, bias, state, scale, ctx.text, ctx.config, needed)
        else:
            out = op_backward(grad, *xs, state, scale, ctx.text, *ctx.config, needed)
            grads = [g if need else None for g, need in zip(out, needed, strict=True)]
        return (*grads, None, None, *[None] * len(ctx.config))

    def autocast(*args: Any) -> Tensor:
        device = args[0].device.type
        target = torch.get_autocast_dtype(device) if dense.autocast == "lower" else args[n + 1].dtype
        cast = [_autocast_to(x, target) for x in args[: n + 1]]
        with torch.autocast(device, enabled=False):
            return op(*cast, *args[n + 1 :])

    LIBRARY.impl(dense.name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{dense.name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxrpg::{dense.name}", forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"fxrpg::{dense.name}_backward", backward_fake, lib=LIBRARY)
    LIBRARY.impl(dense.name, autograd_kernel(op, save, differentiate, plain), "Autograd")
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(dense.name, autocast, key)


def autograd_kernel(
    op: Any, save: Callable[..., None], differentiate: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """The Autograd kernel of `op`: as `torch.library.register_autograd` makes it, but open to torch.func's transforms.

    Args:
        save: (ctx, inputs, output), keeps what backward needs.
        differentiate: (ctx, grad) -> one gradient or None for each input.
        plain: the op written in plain torch, for torch.func (which cannot enter an autograd.Function from here).
    """

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    members = {"forward": forward, "setup_context": save, "backward": differentiate}
    name = f"{op.name().replace('::', '_')}_function"
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in members.items()})

    def kernel(*args: Any) -> Any:
        return plain(*args) if torch._C._are_functorch_transforms_active() else function.apply(*args)

    return kernel


def plain_weight(state: Tensor, scale: Tensor, text: str) -> Tensor:
    """`generate_weight` in plain torch ops that autograd and torch.func follow: slow, saves what it likes, the reference."""
    view = View.parse(text)
    return view.generator.reference(state, view) * scale_of(scale, view).to(state.dtype)


def _compute_dtype(xs: tuple[Tensor, ...], state: Tensor) -> torch.dtype:
    """The first input's type where it is a floating one (an embedding's indices are not)."""
    return xs[0].dtype if xs[0].is_floating_point() else state.dtype


def _autocast_to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Autocast's own rule: floating tensors except float64 are cast."""
    return x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)


def _differentiable_grads(
    dense: DenseOp,
    grad: Tensor,
    xs: list[Tensor],
    bias: Tensor | None,
    state: Tensor,
    scale: Tensor,
    text: str,
    config: tuple[Any, ...],
    needed: list[bool],
) -> list[Tensor | None]:
    """Gradients through plain torch ops on the materialized weight: slower, and differentiable again."""
    weight = torch.ops.fxrpg.generate.default(state, scale, text).to(_compute_dtype(tuple(xs), state))
    out = dense.forward(*xs, weight, bias, *config)
    wanted: Any = [t for t, need in zip((*xs, bias, state), needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needed]
