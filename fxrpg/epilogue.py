"""Epilogues: an affine for each output channel and an activation, at the end of the op that generates the weight.

Batch norm cannot be folded into a weight that is not stored; what it does in eval mode, `x * factor + shift`, goes here.
A layer's file offers `torch.ops.fxrpg.<name>_epilogue` beside its staged op with `define_epilogue_op`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxrpg import fusing
from fxrpg.lowering import transforming
from fxrpg.staging import DENSE_OPS, LIBRARY, autocast_to, flop_formulas, own_tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "sigmoid": torch.sigmoid,
}
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    **{name: functools.partial(ACTIVATIONS[name], inplace=True) for name in ("relu", "relu6", "silu", "hardswish")},
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_.default, approximate="tanh"),
    "sigmoid": torch.sigmoid_,
}


@dataclass(frozen=True)
class Epilogue:
    """A staged op that has a form with an epilogue.

    Args:
        name: of the op without one in `torch.ops.fxrpg`.
        base: the op itself; its arguments are (*inputs, bias, state, scale, view, *config).
        op: the op with one, which takes (factor, shift, activation) after `view`. factor and shift are [C] or None,
            float32 (float64 for float64): the multiply-add and the activation happen in that type, then one rounding.
        inputs: how many inputs the op has.
        channel_axis: (*config) -> the axis of the output's channels, counted from its end.
        layers: the stock layers that run the op.
    """

    name: str
    base: Any
    op: Any
    inputs: int
    channel_axis: Callable[..., int]
    layers: tuple[type, ...]

    @property
    def view_at(self) -> int:
        """Where the view stands among the arguments of both ops."""
        return self.inputs + 3

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(arguments of the op without an epilogue, (factor, shift, activation))."""
        cut = self.view_at + 1
        return args[:cut] + args[cut + 3 :], args[cut : cut + 3]

    def join(self, args: tuple[Any, ...], factor: Any, shift: Any, activation: str) -> tuple[Any, ...]:
        """The arguments of the op with an epilogue."""
        cut = self.view_at + 1
        return (*args[:cut], factor, shift, activation, *args[cut:])

    def axis(self, args: tuple[Any, ...]) -> int:
        """The channel axis for arguments of the op without an epilogue."""
        return self.channel_axis(*args[self.view_at + 1 :])


EPILOGUES: dict[Any, Epilogue] = {}
"""Staged op -> its form with an epilogue."""


def define_epilogue_op(name: str, channel_axis: Callable[..., int], layers: tuple[type, ...]) -> None:
    """Define `torch.ops.fxrpg.<name>_epilogue` for the staged op `name`. See `Epilogue` for the arguments."""
    base = getattr(torch.ops.fxrpg, name).default
    dense = DENSE_OPS[base]
    xs, inputs = ", ".join(f"Tensor {x}" for x in dense.inputs), len(dense.inputs)
    affine = "Tensor? factor, Tensor? shift, str activation"
    weight = "Tensor? bias, Tensor state, Tensor scale, str view"
    LIBRARY.define(f"{name}_epilogue({xs}, {weight}, {affine}, {dense.config}) -> Tensor")
    op = getattr(torch.ops.fxrpg, f"{name}_epilogue").default
    EPILOGUES[base] = epilogue = Epilogue(name, base, op, inputs, channel_axis, layers)

    def forward(*args: Any) -> Tensor:
        base_args, affine = epilogue.split(args)
        return run_with_epilogue(epilogue, base_args, *affine)

    def fake(*args: Any) -> Tensor:
        return base(*epilogue.split(args)[0])

    def autograd(*args: Any) -> Tensor:
        if wants_gradient(args):
            base_args, affine = epilogue.split(args)
            return _composed(epilogue, base_args, *affine)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def batched(*args: Any) -> Tensor:
        base_args, affine = epilogue.split(args)
        return _composed(epilogue, base_args, *affine)

    def autocast(*args: Any) -> Tensor:
        device = args[0].device.type
        cast = [autocast_to(x, torch.get_autocast_dtype(device)) for x in args[: inputs + 1]]
        with torch.autocast(device, enabled=False):
            return op(*cast, *args[inputs + 1 :])

    LIBRARY.impl(f"{name}_epilogue", forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_epilogue", autograd, "Autograd")
    LIBRARY.impl(f"{name}_epilogue", batched, "FuncTorchBatched")
    torch.library.register_fake(f"fxrpg::{name}_epilogue", fake, lib=LIBRARY)
    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(f"{name}_epilogue", autocast, key)


def run_with_epilogue(
    epilogue: Epilogue, args: tuple[Any, ...], factor: Tensor | None, shift: Tensor | None, activation: str
) -> Tensor:
    """activation(op(*args) * factor + shift): in the kernel, or staged: the op's output is changed in place. No autograd."""
    n = epilogue.inputs
    dense, where, config = DENSE_OPS[epilogue.base], args[n + 1 : n + 4], args[n + 4 :]
    fused = fusing.forward(dense, args[:n], args[n], where, config, factor, shift, activation)
    if fused is not None:
        return own_tensor(fused)
    out = epilogue.base(*args)
    wide = out if factor is None and shift is None else out.to(wide_type(out.dtype))
    axis = epilogue.axis(args)
    if factor is not None and shift is not None:
        torch.addcmul(_along(shift, axis), wide, _along(factor, axis), out=wide)
    elif factor is not None:
        wide.mul_(_along(factor, axis))
    elif shift is not None:
        wide.add_(_along(shift, axis))
    wide = _IN_PLACE[activation](wide)
    return wide if wide is out else out.copy_(wide)


def _composed(
    epilogue: Epilogue, args: tuple[Any, ...], factor: Tensor | None, shift: Tensor | None, activation: str
) -> Tensor:
    """The same out of ops that autograd follows; the one on the generated weight saves none."""
    out = epilogue.base(*args)
    wide = out if factor is None and shift is None else out.to(wide_type(out.dtype))
    axis = epilogue.axis(args)
    if factor is not None:
        wide = wide * _along(factor, axis)
    if shift is not None:
        wide = wide + _along(shift, axis)
    return ACTIVATIONS[activation](wide).to(out.dtype)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _along(values: Tensor, axis: int) -> Tensor:
    """[C] -> [C, 1, ...], to meet a tensor whose channels lie `axis` from its end."""
    return values.view(-1, *[1] * (-axis - 1))


def wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd, or a transform of torch.func, follows the arguments."""
    if transforming():
        return True
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


@functools.cache
def register_epilogue_flops() -> None:
    """Have `torch.utils.flop_counter` count an op with an epilogue as the op without; see `staging.register_flops`."""
    counter = importlib.import_module("torch.utils.flop_counter")
    for epilogue in EPILOGUES.values():
        formula, _backward = flop_formulas(DENSE_OPS[epilogue.base])

        def flops(*args: Any, epilogue: Epilogue = epilogue, formula: Any = formula, **kwargs: Any) -> int:
            return formula(*epilogue.split(args)[0], **kwargs)

        counter.register_flop_formula(epilogue.op.overloadpacket, get_raw=True)(flops)
