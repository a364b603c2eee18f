"""What a method must give (Generator), and where one weight lies in a method's state (View)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxrpg.errors import FxrpgError


@dataclass(frozen=True, kw_only=True)
class Generator(ABC):
    """A method with its settings: a function from weight coordinates to values, with its adjoint.

    A subclass is one file in `generators/`; naming itself registers it. Fields are settings only (numbers, strings,
    booleans): no tensor, no device, no seed.
    """

    registry: ClassVar[dict[str, type[Generator]]] = {}
    method: ClassVar[str]
    state_name: ClassVar[str]
    keeps_ends: ClassVar[bool] = False
    """Whether the method's default plan leaves the first and the last conv or linear layer dense."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Generator.registry[cls.method] = cls

    @abstractmethod
    def state_size(self, dof: int | float, weights: int) -> int:
        """Length of the state for a requested `dof` over `weights` generated weights. Raises FxrpgError when it cannot be."""

    @abstractmethod
    def extents(self, counts: Sequence[int]) -> list[int]:
        """How many positions of the method's address space each weight of the given element counts takes up."""

    @abstractmethod
    def init_state(self, size: int, seed: int, std: float) -> Tensor:
        """Initial state, float64 [size] on the CPU, from the seed alone; generated values get standard deviation `std`."""

    @abstractmethod
    def materialize(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        """The weight's *unscaled* values, a fresh contiguous tensor of `view.shape` and `dtype`, without autograd.

        Bit-equal everywhere: the state's value cast to `dtype`, with its sign or mask.
        """

    @abstractmethod
    def reference(self, state: Tensor, view: View) -> Tensor:
        """What `materialize` computes, in the state's dtype and in plain torch ops that autograd and torch.func follow."""

    @abstractmethod
    def accumulate(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        """The exact adjoint of `materialize`: gradient of the state from that of the unscaled weight.

        Args:
            grad: gradient of the unscaled weight, shape `view.shape`, float32 or float64.
            state: the state itself (size and device; values too where the map is not linear).

        Returns:
            Tensor of the state's shape and `grad`'s dtype.
        """


@dataclass(frozen=True, kw_only=True)
class View:
    """One weight as seen in the state. With the state and the layer's scale it is all that is needed to generate it.

    Args:
        generator: the method and its settings.
        seed: 0 <= seed < 2^64.
        tensor: id of the weight within its model; also its slot in the table of scales.
        shape: PyTorch's shape of the weight.
        order: axes of `shape` in logical order (out, kernel..., in), the fastest-running last.
        offset: first position of the weight in the method's address space.
        total: positions of all weights that share the state.
    """

    generator: Generator
    seed: int
    tensor: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    offset: int
    total: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def text(self) -> str:
        """The canonical string that an op receives."""
        return json.dumps(self.fields(), sort_keys=True, separators=(",", ":"))

    def fields(self) -> dict[str, Any]:
        """Plain data, as written to files."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "generator"}
        return data | {"method": self.generator.method, "settings": dataclasses.asdict(self.generator)}

    @staticmethod
    @functools.lru_cache(maxsize=1 << 16)
    def parse(text: str) -> View:
        """The view that `text` stands for."""
        data = json.loads(text)
        generator = Generator.registry[data.pop("method")](**data.pop("settings"))
        shape, order = tuple(data.pop("shape")), tuple(data.pop("order"))
        return View(generator=generator, shape=shape, order=order, **data)

    def to_logical(self, weight: Tensor) -> Tensor:
        """`weight` of `shape` as its elements in logical order, [count]."""
        return weight.permute(self.order).reshape(-1)

    def from_logical(self, values: Tensor) -> Tensor:
        """The inverse of `to_logical`: of `shape`, with the strides of a fresh contiguous tensor."""
        if self.order == tuple(range(len(self.order))):
            return values.view(self.shape)
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        logical = values.view([self.shape[axis] for axis in self.order])
        # not .contiguous(): a 1x1 kernel is contiguous as it is, with strides that a convolution reads as channels_last
        return logical.permute(inverse).clone(memory_format=torch.contiguous_format)


def rounded(x: float) -> float:
    """`x` with 16 significant bits: those of a measured deviation that do not depend on the number of threads."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * (1 << 16)), exponent - 16)


def generator_from(method: str | Generator) -> Generator:
    """The settings that a user's `method=` names: a Generator, or the name of one with its defaults."""
    if isinstance(method, Generator):
        return method
    known = sorted(Generator.registry)
    if method not in known:
        raise FxrpgError(
            "method", f"must be one of {known} or an instance of their classes", repr(method), "Pass one of them."
        )
    return Generator.registry[method]()
