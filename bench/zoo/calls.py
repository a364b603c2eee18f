"""Calls of a model that can be compared: seeded alike, with all that they return and change, and their gradients."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

SEED = 0x5EED

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Leaves = dict[str, Any]
"""What a structure holds: path -> tensor or plain value."""

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def seed(value: int = SEED) -> None:
    """Seed the generators of torch, Python and NumPy."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def leaves(value: Any) -> Leaves:
    """Tensors and plain values in any structure: containers, dataclasses, objects (a cache of keys and values)."""
    return dict(_leaves(value, "", set()))


def _leaves(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _PLAIN):
        yield path, value
    elif id(value) not in above and not isinstance(value, nn.Module | type) and not callable(value):
        for key, part in _parts(value):
            yield from _leaves(part, f"{path}.{key}" if path else str(key), above | {id(value)})


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple):
        return enumerate(value)
    if dataclasses.is_dataclass(value):
        return ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    return vars(value).items() if hasattr(value, "__dict__") else ()


@dataclass(frozen=True)
class Outcome:
    """All that a call did.

    Args:
        outputs: every tensor and plain value returned, detached.
        buffers: of the module, afterwards.
        inputs: gradients of the floating-point arguments.
        gradients: name -> gradient of each parameter that requires one, of a tied one under all its names.
    """

    outputs: Leaves
    buffers: dict[str, Tensor]
    inputs: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None]


def call(model: nn.Module, arguments: Arguments, train: bool, into_inputs: bool = True) -> tuple[Leaves, list[Tensor]]:
    """The outputs of `model` in train mode with autograd, or in eval mode without; and its inputs that have gradients.

    Args:
        into_inputs: whether gradients of the arguments are wanted.
    """
    model.train(train)
    inputs: list[Tensor] = []

    def fresh(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if not (train and into_inputs and x.is_floating_point()):
            return x
        inputs.append(x.requires_grad_())
        return x.clone()  # no leaf, which must not be changed in place

    args, kwargs = pytree.tree_map_only(Tensor, fresh, copy.deepcopy(arguments))
    seed()
    with torch.set_grad_enabled(train):
        return leaves(model(*args, **kwargs)), inputs


def run(model: nn.Module, arguments: Arguments, train: bool, into_inputs: bool = True) -> Outcome:
    """A call in train mode, of which a random linear function of the outputs is differentiated; or one in eval mode."""
    outputs, inputs = call(model, arguments, train, into_inputs)
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    found = gradients(outputs, [*inputs, *parameters.values()]) if train else []
    kept = {path: x.detach().clone() if isinstance(x, Tensor) else x for path, x in outputs.items()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    by_input = dict(zip(map(str, range(len(inputs))), found, strict=False))
    return Outcome(kept, buffers, by_input, dict(zip(parameters, found[len(inputs) :], strict=False)))


def gradients(outputs: Leaves, wanted: list[Tensor]) -> list[Tensor | None]:
    """Of a random linear function of all outputs: no gradient hides behind another, none vanishes by symmetry."""
    outs = [x for x in outputs.values() if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outs]
    return list(torch.autograd.grad(outs, wanted, weights, allow_unused=True)) if outs else [None] * len(wanted)


class Difference(NamedTuple):
    """The worst place of a comparison: relative to the largest number of its tensor, or `inf` with what is unlike."""

    value: float = 0.0
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where} differs" + (f" by {self.value:.1e} of its largest" if math.isfinite(self.value) else "")


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], floor: float = 0.0) -> Difference:
    """The worst place at which `found` differs.

    Args:
        floor: the least magnitude that a difference is seen relative to.
    """
    if found.keys() != expected.keys():
        return Difference(
            math.inf, f"the presence of {', '.join(map(str, sorted(found.keys() ^ expected.keys())[:3]))}"
        )
    pairs = ((_distance(value, expected[path], floor), path) for path, value in found.items())
    return Difference(*max(pairs, default=(0.0, "")))


def _distance(a: Any, b: Any, floor: float) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if type(a) is type(b) and (a == b or a != a) else math.inf
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return math.inf
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    a, b = a.double(), b.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    if not (gap := float((a - b)[finite].abs().max()) if finite.any() else 0.0):
        return 0.0
    return gap / max(float(b[finite].abs().max()), floor, torch.finfo(torch.float32).tiny)


def largest(tensors: Mapping[str, Tensor | None]) -> float:
    """The largest finite magnitude in any of them."""
    found = (t.detach().abs().nan_to_num(0, 0, 0).max().item() for t in tensors.values() if t is not None and t.numel())
    return max(found, default=0.0)


def differing_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """What is not the same bit for bit; NaNs may differ among one another."""
    if found.keys() != expected.keys():
        return f"{', '.join(map(str, sorted(found.keys() ^ expected.keys())[:3]))} on one side only"
    for name, a in found.items():
        b = expected[name]
        if isinstance(a, Tensor) != isinstance(b, Tensor):
            return f"{name}: {type(a).__name__} against {type(b).__name__}"
        if isinstance(a, Tensor) and ((a.dtype, a.shape) != (b.dtype, b.shape) or not _equal(a, b)):
            return name
        if not isinstance(a, Tensor) and (type(a) is not type(b) or (a != b and a == a)):
            return name
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    same = a.detach() == b.detach()
    return bool((same | (a.detach() != a.detach()) & (b.detach() != b.detach())).all())
