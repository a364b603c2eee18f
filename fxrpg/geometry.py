"""How a generated weight would lie in memory, and the functions of torch that ask for no more than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.functions import METADATA


class Geometry(NamedTuple):
    """How a handle would lie in the memory of its weight."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        """That of a tensor, or of a handle."""
        with torch._C.DisableTorchFunctionSubclass():
            return cls(tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def stand_in(self, requires_grad: bool = False) -> Tensor:
        """A tensor without memory that lies like that."""
        options: Any = {"dtype": self.dtype, "device": "meta", "requires_grad": requires_grad}
        if not self.offset:
            return torch.empty_strided(self.size, self.stride, **options)
        reach = self.offset + 1 + sum(n * step for n, step in zip(self.size, self.stride, strict=True))
        with torch.set_grad_enabled(requires_grad):
            return torch.empty(reach, **options).as_strided(self.size, self.stride, self.offset)

    def number(self, device: torch.device) -> Tensor:
        """A tensor of this shape and type on `device`, which is one number in memory."""
        return torch.empty((), dtype=self.dtype, device=device).expand(self.size)


def _functions(names: str, *places: Any) -> set[Any]:
    return {getattr(place, name) for name in names.split() for place in places if hasattr(place, name)}


_LIKE = _functions("empty_like full_like ones_like rand_like randint_like randn_like zeros_like", torch)
_NEW = _functions("new_empty new_empty_strided new_full new_ones new_tensor new_zeros", Tensor)
_OTHER = _functions("expand_as view_as reshape_as type_as to", Tensor)
_BOTH = _functions("is_same_size result_type", torch, Tensor)

_NEVER = _functions("is_conj is_neg is_shared is_pinned is_distributed _is_view", torch, Tensor)
_NONE = {getattr(Tensor, name).__get__ for name in ("name", "_backward_hooks", "_post_accumulate_grad_hooks")}

CONSTANTS: dict[Any, Any] = dict.fromkeys(_NEVER, False) | dict.fromkeys(_NONE)
"""What some functions say of every generated weight."""

ASKED = METADATA | {Tensor.__dir__}
"""What a handle answers itself."""

ASKS_FOR_GRAD: set[Any] = {Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__}
"""What makes a detached tensor a leaf of autograd."""

ADDRESSES = _functions("data_ptr const_data_ptr mutable_data_ptr", Tensor)
"""What asks where a weight lies: nowhere."""


def shapes_only(func: Any, args: Any, kwargs: dict[str, Any], device_of: Callable[[Any], torch.device | None]) -> Any:
    """What `func` returns if it takes the geometry of its handles alone; NotImplemented if it takes their values.

    Args:
        device_of: the device of a handle's state; None for what is no handle.
    """
    kind = func is Tensor.type and len(args) == 1 and not kwargs  # without arguments it tells the type
    place = 0 if kind or func in _LIKE or func in _NEW or func in _BOTH else 1
    if place == 1 and (func not in _OTHER or len(args) < 2 or device_of(args[0]) is not None):
        return NotImplemented
    devices = [device_of(x) for x in args]
    if not any(devices):
        return NotImplemented
    if func in _LIKE:
        return func(Geometry.of(args[0]).stand_in(), *args[1:], **{"device": devices[0], **kwargs})
    return func(*(Geometry.of(x).number(d) if d else x for x, d in zip(args, devices, strict=True)), **kwargs)
