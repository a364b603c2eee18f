"""A model of the zoo, transformed, beside what its results are compared with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxrpg
from bench.zoo.calls import Arguments, Outcome, leaves, run, seed
from bench.zoo.catalogue import Build
from fxrpg.assemble import plan_of
from fxrpg.explain import Explanation

METHODS: dict[str, dict[str, Any]] = {
    "ring": {"method": "ring", "dof": 0.1},
    "pranc": {"method": fxrpg.Pranc(law="khatri_rao"), "dof": 64},  # its cheapest law
    "pemn": {"method": "pemn", "dof": 0.1},
}

ROUNDING = 256
"""Units in the last place of a tensor's largest number: how far two orders of summation come apart."""


def transformed(model: nn.Module, method: str, arguments: Arguments) -> nn.Module:
    """`model` with every weight generated that can be."""
    plan = [fxrpg.Rule("*", "generate")]
    args, kwargs = arguments
    return fxrpg.transform(model, **METHODS[method], plan=plan, seed=1, example_inputs=args, example_kwargs=kwargs)


class Both(NamedTuple):
    """What a transformed model did, and what its materialized one did."""

    small: Outcome
    dense: Outcome


class Subject:
    """A model that is checked.

    Args:
        build: how to build it.
        method: of `METHODS`.
        dtype: the type to build it in.
    """

    def __init__(self, build: Build, method: str, dtype: torch.dtype = torch.float32) -> None:
        self.build, self.method, self.dtype = build, method, dtype
        seed()
        model, args, kwargs = build()
        self.original = model.to(dtype)
        self.arguments: Arguments = pytree.tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
        )
        for p in self.original.parameters():
            p.grad = torch.full_like(p, 0.5)
        self.before = everything(self.original, self.arguments)
        self.small = transformed(self.original, method, self.arguments)
        self.after = everything(self.original, self.arguments)
        self.largest = 0.0
        """The largest relative difference that a comparison has found."""
        self.notes: list[str] = []

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding may make."""
        return ROUNDING * torch.finfo(self.dtype).eps

    @functools.cached_property
    def dense(self) -> nn.Module:
        """The ordinary model of the same weights, made before anything has run."""
        return fxrpg.materialize(self.small)

    @functools.cached_property
    def views(self) -> dict[str, Any]:
        """Name -> view of each generated weight."""
        return plan_of(self.small).views

    @functools.cached_property
    def into_inputs(self) -> bool:
        """Whether the model lets gradients of its inputs be asked for: some switch them on or off by themselves."""
        try:
            run(fxrpg.materialize(self.small), self.arguments, train=True)
        except RuntimeError:
            return False
        return True

    @functools.cached_property
    def train(self) -> Both:
        """A call of both in train mode."""
        _ = self.into_inputs, self.dense
        small, dense = (run(m, self.arguments, True, self.into_inputs) for m in (self.small, self.dense))
        return Both(small, dense)

    @functools.cached_property
    def eval(self) -> Both:
        """A call of both in eval mode, after that in train mode, whose buffers it reads."""
        _ = self.train
        small, dense = (run(m, self.arguments, False) for m in (self.small, self.dense))
        _ = self.explained  # before the checks consume weights in other ways
        return Both(small, dense)

    @functools.cached_property
    def explained(self) -> Explanation:
        """What became of each weight in those calls."""
        return fxrpg.explain(self.small)

    @functools.cached_property
    def wide(self) -> Subject:
        """The same in float64, transformed anew."""
        return Subject(self.build, self.method, torch.float64)

    def backward(self, model: nn.Module) -> None:
        """Leave gradients in the `grad` of a model's parameters, as training does."""
        model.train()
        model.zero_grad()
        seed()
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), self.arguments)
        out = leaves(model(*args, **kwargs)).values()
        losses = [x.float().pow(2).mean() for x in out if isinstance(x, Tensor) and x.requires_grad and x.numel()]
        torch.stack(losses).sum().backward()


def everything(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """All that transforming must leave as it is: tensors, gradients, modes, classes, arguments, random numbers to come."""
    found: dict[str, Any] = {f"state {name}": x.detach().clone() for name, x in model.state_dict().items()}
    found |= {f"buffer {name}": x.detach().clone() for name, x in model.named_buffers()}
    for name, p in model.named_parameters(remove_duplicate=False):
        found |= {
            f"gradient of {name}": p.grad if p.grad is None else p.grad.clone(),
            f"requires {name}": p.requires_grad,
        }
    for name, module in model.named_modules():
        found |= {f"mode of {name}": module.training, f"class of {name}": type(module).__name__}
    found |= {f"argument {path}": x.clone() if isinstance(x, Tensor) else x for path, x in leaves(arguments).items()}
    return found | {"random numbers": torch.get_rng_state()}


@contextlib.contextmanager
def no_regions() -> Iterator[None]:
    """Have every module run its own forward: a region leaves calls to its module while hooks look on everywhere."""
    hook = nn.modules.module.register_module_forward_pre_hook(_look)
    try:
        yield
    finally:
        hook.remove()


def _look(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


def works(call: Callable[[], Any]) -> bool:
    """Whether `call` does not raise: what the ordinary model cannot do, the transformed one need not."""
    try:
        call()
    except Exception:  # whatever a model may raise
        return False
    return True
