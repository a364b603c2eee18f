"""Whether two modules do the same on an example: what they return and change, their gradients, the random numbers they draw."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxrpg.owner import link_of

_SEED = 0x5EED
_TOLERANCE = 256
"""Units in the last place of a tensor's largest number within which two results count as the same."""


def difference(
    module: nn.Module, other: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], gradients: bool
) -> str | None:
    """What `other` does otherwise than `module` when called with (args, kwargs), in a word; None if only rounding.

    Args:
        gradients: with autograd, and a random linear function of the outputs differentiated, or without.
    """
    expected, found = (_outcome(m, arguments, gradients) for m in (module, other))
    for name, a, b in zip(_Outcome._fields, expected, found, strict=True):
        (xs, form), (ys, other_form) = pytree.tree_flatten(a), pytree.tree_flatten(b)
        if form != other_form or not all(map(_close, xs, ys)):
            return name
    return None


class _Outcome(NamedTuple):
    """All that one call of a module did."""

    outputs: Any
    arguments: list[Any]
    buffers: dict[str, Tensor]
    gradients: list[Tensor | None]
    randomness: list[Any]


def _outcome(module: nn.Module, arguments: Any, gradients: bool) -> _Outcome:
    def fresh(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if not (gradients and x.is_floating_point()):
            return x
        leaves.append(x.requires_grad_())
        return x.clone()  # no leaf, which must not be changed in place

    leaves: list[Tensor] = []
    args, kwargs = pytree.tree_map_only(Tensor, fresh, arguments)
    seed()
    with torch.set_grad_enabled(gradients):
        out = module(*args, **kwargs)
        randomness = _random_states()
        wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad), *_states(module)]
        found = _gradients(out, wanted) if gradients else []
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return _Outcome(out, pytree.tree_leaves((args, kwargs)), buffers, found, randomness)


def _states(module: nn.Module) -> list[Tensor]:
    """The states of the weights that `module` generates: they belong to the root."""
    links = {id(link.root): link for part in module.modules() if (link := link_of(part))}
    roots = [link.root for link in links.values()]
    own = {id(p) for p in module.parameters()}
    return [p for root in roots for p in root.parameters() if p.requires_grad and id(p) not in own]


def _gradients(out: Any, wanted: list[Tensor]) -> list[Tensor | None]:
    """Of a random linear function of all outputs."""
    outs = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
    if not outs or not wanted:
        return []
    generator = torch.Generator("cpu").manual_seed(_SEED)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x) for x in outs]
    return list(torch.autograd.grad(outs, wanted, weights, allow_unused=True))


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (a is b or bool(a == b))
    if (type(a), a.shape, a.dtype, a.stride(), a.requires_grad) != (
        type(b),
        b.shape,
        b.dtype,
        b.stride(),
        b.requires_grad,
    ):
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    a, b = a.detach(), b.detach()
    finite = a[a.isfinite()].abs()
    limit = _TOLERANCE * torch.finfo(a.dtype).eps * (float(finite.max()) if finite.numel() else 0.0)
    return torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True)


def seed() -> None:
    """Seed the global generators, always alike."""
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(_SEED)


def _random_states() -> list[Any]:
    """The global generators' states; NumPy's only if something has imported it."""
    states: list[Any] = [torch.get_rng_state(), random.getstate()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    if numpy := sys.modules.get("numpy"):
        states.append(pickle.dumps(numpy.random.get_state()))
    return states


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Give the global generators back as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), sys.modules.get("numpy")
    array = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)
