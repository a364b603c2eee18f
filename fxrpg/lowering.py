"""The registry of lowerings: which op replaces `op(x, weight)` when the weight is a generated view.

A layer's file in `kernels/` adds its rule with `@lowers(...)` and its op with `fxrpg.staging`. A handle meets the rule
when an op consumes it, a graph when the `lower` pass finds the pattern: both call the same function.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
