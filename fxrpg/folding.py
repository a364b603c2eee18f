"""Norms and activations as epilogues: what modules become at the end of the op before them, decided when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.epilogue import ACTIVATIONS, EPILOGUES, Epilogue, wants_gradient, wide_type

_MODULES: dict[type, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid",
}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RunningNorm(NamedTuple):
    """A batch norm that uses its running statistics, where a graph holds its tensors and no module. Each is [C] or None."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


Norm = nn.Module | RunningNorm | None


def affine_of_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What a batch norm does with its running statistics: (factor, shift), each [C], float32 (float64 for float64).

    factor = weight / sqrt(var + eps), shift = bias - mean * factor.
    """
    if (node := _traced(affine_of_norm, weight, bias, mean, var, eps)) is not None:
        return node
    wide = wide_type(var.dtype)
    factor = (var.to(wide) + eps).rsqrt()
    factor = factor if weight is None else factor * weight.to(wide)
    mean = mean.to(wide)
    return factor, -mean * factor if bias is None else torch.addcmul(bias.to(wide), mean, factor, value=-1)


def epilogue_of_norm(op: str, norm: Norm, activation: Any, *args: Any) -> Any:
    """One node of a rewritten graph: a staged op, the batch norm that follows it, and the activation that follows that.

    The modules decide when it runs: one op where the norm uses its running statistics, nothing looks on (hooks) and no
    gradient is wanted, else one after the other, as the graph had them: batch statistics are taken and kept as ever.

    Args:
        op: name of the staged op.
        norm: the norm, a module or its tensors, if any.
        activation: a module, or a name in `ACTIVATIONS`.
        args: of the staged op.
    """
    if (node := _traced(epilogue_of_norm, op, norm, activation, *args)) is not None:
        return node
    return run_layers(getattr(torch.ops.fxrpg, op).default, args, norm, activation)


def _traced(function: Callable[..., Any], *args: Any) -> Any:
    """A node that calls `function`, where a graph module is traced anew (as it is when it is unpickled), else None."""
    for arg in args:
        if isinstance(arg, fx.Proxy):
            return arg.tracer.create_proxy("call_function", function, args, {})
    return None


def run_layers(base: Any, args: tuple[Any, ...], norm: Norm, activation: nn.Module | str) -> Tensor:
    """`activation(norm(base(*args)))`, as one op where that gives the same."""
    if is_fixed(norm, activation, args):
        return run_fixed(base, args, norm, activation)
    return run_after(base(*args), norm, activation)


def is_fixed(norm: Any, activation: nn.Module | str, args: tuple[Any, ...]) -> bool:
    """Whether norm and activation are, as they stand, a fixed function of each element.

    That is: torch's own, with running statistics in eval mode; nothing looks on, and no gradient is wanted.
    """
    if activation_name(activation) is None or wants_gradient((*args, *_tensors(norm))):
        return False
    if norm is None:
        return True
    if any(statistic is None for statistic in _tensors(norm)[2:]):
        return False
    return isinstance(norm, RunningNorm) or (type(norm) in NORMS and not norm.training and not hooked(norm))


def run_fixed(base: Any, args: tuple[Any, ...], norm: Any, activation: nn.Module | str) -> Tensor:
    """The same, of a norm and an activation that are fixed: one op for what the op's epilogue can take."""
    epilogue, name = EPILOGUES.get(base), activation_name(activation)
    if epilogue is None or name is None or (norm is not None and not _fits(epilogue, args, norm)):
        return run_after(base(*args), norm, activation)
    factor = shift = None
    if norm is not None:
        factor, shift = affine_of_norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    return epilogue.op(*epilogue.join(args, factor, shift, name))


def run_after(out: Tensor, norm: Norm, activation: nn.Module | str) -> Tensor:
    """`activation(norm(out))`."""
    out = out if norm is None else norm(out)
    return ACTIVATIONS[activation](out) if isinstance(activation, str) else activation(out)


def _fits(epilogue: Epilogue, args: tuple[Any, ...], norm: Any) -> bool:
    """Whether a norm, whose channels are the second axis, meets the op's output channels there, in a type they share."""
    x, dtypes = args[0], {t.dtype for t in _tensors(norm) if t is not None}
    shared = dtypes == {x.dtype} or (dtypes == {torch.float32} and x.dtype.itemsize == 2)
    return shared and x.dim() + epilogue.axis(args) == 1


def _tensors(norm: Any) -> tuple[Tensor | None, ...]:
    return () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def activation_name(activation: nn.Module | str) -> str | None:
    """Its name in `ACTIVATIONS`; None for a module that is not torch's own or is not called alone (hooks)."""
    if isinstance(activation, str):
        return activation
    if hooked(activation):
        return None
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _MODULES.get(type(activation))


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module) or bool(nn.modules.module._has_any_global_hook())
