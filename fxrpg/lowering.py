"""The registry of lowerings: which op replaces `op(x, weight)` when the weight is a generated view.

A layer's file in `kernels/` adds its rule with `@lowers(...)` and its op with `fxrpg.staging`. A handle meets the rule
when an op consumes it, a graph when the `lower` pass finds the pattern: both call the same function.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fxrpg import native
from fxrpg.device import require_triton, runs_kernels
from fxrpg.errors import FxrpgError
from fxrpg.roles import Role
from fxrpg.view import View

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


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way: both follow plain torch ops only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def kernels_wanted(device: torch.device) -> bool:
    """Whether Triton kernels generate on `device` in the mode in force: on a GPU; interpreted ones, only if asked for."""
    mode = current_mode()
    return mode != "materialized" and (device.type == "cuda" or mode != "auto") and runs_kernels(device)


def native_wanted(view: View, *tensors: Tensor) -> bool:
    """Whether C code generates the view on the CPU: in every mode but the reference's, unless Triton's interpreter does."""
    mode = current_mode()
    if not view.generator.native or mode == "materialized" or kernels_wanted(tensors[0].device):
        return False
    return native.wanted(*tensors)


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
    role: Callable[..., Role | None] | None
    bias: str

    def weight_in(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a call has in the weight's place."""
        return args[self.position] if len(args) > self.position else kwargs.get(self.keyword)

    @functools.cached_property
    def bias_position(self) -> int | None:
        """Where `call` takes a bias; None for an op without one."""
        return self.names.index(self.bias) if self.bias in self.names else None

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the arguments of `call`."""
        return tuple(inspect.signature(self.call).parameters)

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments as `call` names them. Raises NotLowered for one that it does not know (`out`, say)."""
        if not kwargs:
            return {}
        renamed = {"weight" if key == self.keyword else key: value for key, value in kwargs.items()}
        for key in renamed:
            if key not in self.names:
                raise NotLowered(f"called with {key!r}")
        return renamed


LOWERINGS: dict[Any, tuple[Rule, ...]] = {}
"""torch function or ATen overload -> its rules, one for each place that a weight may have among its arguments."""
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Function of several weights -> the same in functions of one weight each, called with the handles themselves."""
LAYERS: dict[Any, Callable[..., Any]] = {}


def lowers(
    *targets: Any,
    position: int = 1,
    keyword: str = "weight",
    transposable: bool = False,
    role: Callable[..., Role | None] | None = None,
    bias: str = "bias",
) -> Callable:
    """Register the decorated function as the lowering of `targets` (torch functions or ATen overloads).

    Args:
        position: where the weight stands among the op's positional arguments.
        keyword: its name when given by keyword.
        transposable: whether the rule also takes a weight that was transposed on the way.
        role: (shape, transposed, *arguments of the call) -> the role of a parameter that is this op's weight in a graph.
        bias: the name of the function's argument that is added to the output; it may be generated too.
    """

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            rule = Rule(call, position, keyword, transposable, role, bias)
            others = (other for other in LOWERINGS.get(target, ()) if other.position != position)
            LOWERINGS[target] = (*others, rule)
        return call

    return register


def decomposes(*targets: Any) -> Callable:
    """Register the decorated function, of the same signature, as what `targets` do with generated weights.

    It receives handles and hands each to a function that has a rule. It may raise NotLowered before it does anything.
    """

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS.update(dict.fromkeys(targets, call))
        return call

    return register


def rule_for(target: Any, args: Any, kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]) -> Rule | None:
    """The rule of `target` in whose place the call has a weight; its first one where that is nowhere; None without any."""
    rules = LOWERINGS.get(target, ())
    return next((rule for rule in rules if is_weight(rule.weight_in(args, kwargs))), rules[0] if rules else None)


def compiles(*layers: type) -> Callable:
    """Register the decorated (module, weight: Generated, *inputs) -> output as what the stock `layers` do in compiled code."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        LAYERS.update(dict.fromkeys(layers, call))
        return call

    return register


def shape_of(x: Any) -> tuple[int, ...] | None:
    """The shape of a rule's argument; None for a value in a graph whose shape nothing tells."""
    node = x.node if isinstance(x, torch.fx.Proxy) else x
    if isinstance(node, torch.fx.Node):
        x = node.meta.get("val", node.meta.get("example_value"))
    return tuple(x.shape) if isinstance(x, Tensor) else None


def encode_scales(values: Tensor) -> Tensor:
    """The buffer `fxrpg_scale` for positive scales of 16 significant bits: float32 [n, 3], rows (high, low, exponent).

    A scale is (256 * high + low) * 2^exponent. All entries are integers of at most eight bits, which every floating type
    holds exactly: no cast of the model, no average over equal models, changes a scale.
    """
    mantissa, exponent = torch.frexp(values.to(torch.float64).cpu())
    whole = torch.round(mantissa * (1 << 16))
    high = torch.floor(whole / 256)
    return torch.stack([high, whole - 256 * high, exponent.to(torch.float64) - 16], 1).to(torch.float32)


def decode_scales(buffer: Tensor) -> Tensor:
    """The scales that rows (high, low, exponent) stand for, float32, of shape [n] (or [] for one row)."""
    high, low, exponent = buffer.to(torch.float32).round().unbind(-1)
    return torch.ldexp(high * 256 + low, exponent)


def scale_of(scale: Tensor, view: View) -> Tensor:
    """The layer's scale, a 0-dimensional float32 tensor."""
    return decode_scales(scale[view.tensor])


def weight_dtype(state: Tensor, scale: Tensor) -> torch.dtype:
    """The type of weights: the state's; of a frozen state, which is bytes, that of the scales, which casts follow too."""
    return state.dtype if state.is_floating_point() else scale.dtype


def generate_weight(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of the view `text`, scaled, in `dtype` (`weight_dtype` by default): the one place where weights come to be.

    The scale is one float32 multiplication (float64 for float64), then one rounding to `dtype`.
    """
    view = View.parse(text)
    dtype = dtype or weight_dtype(state, scale)
    if kernels_wanted(state.device) and view.whole is view and not view.ranks:
        found = importlib.import_module(view.generator.pair).generate(view, state.detach(), scale, dtype)
        if found is not None:
            return found
    if native_wanted(view, state, scale):
        whole = view if view.parent else view.whole
        found = importlib.import_module(view.generator.native).generate(
            whole, state.detach(), _factor(scale, view), dtype
        )
        if found is not None:
            return found if view.parent else view.narrowed(found)
    if view.parent:
        values = view.generator.materialize_part(state, view, dtype)
    else:
        values = view.narrowed(view.generator.materialize(state, view.whole, dtype))
    if dtype.itemsize >= 4:
        return values.mul_(_factor(scale, view))
    return values.float().mul_(_factor(scale, view)).to(dtype)


def _factor(scale: Tensor, view: View) -> Any:
    """The layer's scale as something to multiply by: on the CPU a number, which takes fewer small ops than a tensor."""
    if scale.device.type != "cpu" or torch._C._len_torch_dispatch_stack():
        return scale_of(scale, view)
    high, low, exponent = scale[view.tensor].tolist()
    return math.ldexp(256 * round(high) + round(low), round(exponent))


def plain_weight(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype | None = None) -> Tensor:
    """`generate_weight` in plain torch ops that autograd and torch.func follow: slow, saves what it likes, the reference."""
    if not state.is_floating_point():
        return generate_weight(state, scale, text, dtype)  # frozen: nothing to follow
    view = View.parse(text)
    wide = torch.promote_types(state.dtype, torch.float32)
    values = view.narrowed(view.generator.reference(state, view.whole))
    return (values.to(wide) * scale_of(scale, view).to(wide)).to(dtype or state.dtype)


def accumulate_gradient(grad: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    """Gradient of the state from the gradient of the scaled weight: summed in float32 (float64 for float64)."""
    view = View.parse(text)
    wide = torch.promote_types(grad.dtype, torch.promote_types(state.dtype, torch.float32))
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    if native_wanted(view, grad, state, scale):
        whole, widened = (view, grad) if view.parent else (view.whole, view.widened(grad))
        module = importlib.import_module(view.generator.native)
        found = module.accumulate(widened.to(wide), state.detach(), whole, _factor(scale, view))
        if found is not None:
            return as_stored(found, state)
    scaled = grad.to(wide) * scale_of(scale, view)
    if view.parent:
        return as_stored(view.generator.accumulate_part(scaled, state, view), state)
    scaled = view.widened(scaled)
    if kernels_wanted(state.device) and view.whole is view and wide == torch.float32 and not view.ranks:
        found = importlib.import_module(view.generator.pair).accumulate(scaled, state.detach(), view)
        if found is not None:
            return as_stored(found, state)
    return as_stored(view.generator.accumulate(scaled, state, view.whole), state)


def as_stored(grad: Tensor, state: Tensor) -> Tensor:
    """A gradient in the type and the layout of its state: scores of a channels_last model are channels_last too."""
    same = (grad.dtype, grad.stride()) == (state.dtype, state.stride())
    return grad if same else torch.empty_like(state).copy_(grad)


def tangent_weight(direction: Tensor, state: Tensor, scale: Tensor, text: str) -> Tensor:
    """The derivative of the scaled weight along a direction of the state: the adjoint of `accumulate_gradient`."""
    view = View.parse(text)
    values = view.narrowed(view.generator.tangent(direction, state.detach(), view.whole))
    return values * scale_of(scale, view).to(values.dtype)
