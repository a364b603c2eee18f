"""What a method must give: a generator."""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxrpg.errors import FxrpgError
from fxrpg.least_squares import conjugate_gradients
from fxrpg.packing import rounded
from fxrpg.view import METHODS, Form, View


@dataclass(frozen=True, kw_only=True)
class Generator(ABC):
    """A method with its settings: a function from weight coordinates to values, with its adjoint.

    A subclass is one file in `generators/`; naming itself registers it. Fields are settings only (numbers, strings,
    booleans): no tensor, no device, no seed.
    """

    registry: ClassVar[dict[str, type[Generator]]] = METHODS
    method: ClassVar[str]
    state_name: ClassVar[str]
    """Of the root's parameter that is the state, or, for a `local` state, the ending of its name: weight + "_score"."""
    pair: ClassVar[str] = "fxrpg.kernels.fused.generate"
    """The module with `generate` and `accumulate` for whole weights on Triton kernels."""
    native: ClassVar[str] = ""
    """The module with `generate` and `accumulate` in C, for the CPU; "" without any."""
    collects: ClassVar[bool] = False
    """Whether weights share a state of which each reads a small part: their gradients are then put into one sum."""
    keeps_ends: ClassVar[bool] = False
    """Whether the method's default plan leaves the first and the last conv or linear layer dense."""
    decays: ClassVar[bool] = True
    """Whether a state is decayed as dense weights are, where nobody says otherwise."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if type(f.default) is bool and type(value) is not bool:
                where = f"{type(self).__name__}({f.name}=...)"
                raise FxrpgError(where, "must be True or False", repr(value), "Pass one of them.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Generator.registry[cls.method] = cls

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of parameters (`roles.py`) that the method generates where no rule says otherwise."""
        return ("conv", "linear")

    @property
    def local(self) -> bool:
        """Whether each weight has a state of its own, of its shape, held by the module that owns it."""
        return False

    @property
    def masks(self) -> bool:
        """Whether what is learned of a weight is one bit an element."""
        return False

    @property
    def sparse(self) -> bool:
        """Whether numbers of the state that are zero are pruned: they stay zero and are not stored in files."""
        return False

    @property
    def splits(self) -> bool:
        """Whether ranks can each hold a run of the state's numbers, and generate weights together."""
        return False

    @property
    def granule(self) -> int:
        """What the size of a state had better be a multiple of."""
        return 1

    @property
    def needs_dof(self) -> bool:
        """Whether `transform` must be told a number of degrees of freedom."""
        return True

    def most(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """The largest DoF for weights of these shapes."""
        return sum(map(math.prod, shapes))

    @abstractmethod
    def state_size(self, dof: int | float, shapes: Sequence[tuple[int, ...]]) -> int:
        """The DoF that a request for weights of these shapes comes to: an int is exact, a float is in (0, 1]."""

    @abstractmethod
    def extents(self, counts: Sequence[int]) -> list[int]:
        """How many positions of the method's address space each weight of the given element counts takes up."""

    def addresses(self, counts: Sequence[int]) -> tuple[list[int], int]:
        """(first position of each weight, positions in all): side by side where the method does not say otherwise."""
        *offsets, total = itertools.accumulate(self.extents(counts), initial=0)
        return offsets, total

    def scales(self, views: Sequence[View], deviations: Sequence[float]) -> tuple[float, list[float]]:
        """What the state starts with, and the fixed scale of each weight, so that weights start with these deviations.

        Returns:
            (unit, one scale a view): the state's own deviation at the start, here the root mean square of the weights'.
            Scales then lie around one, and learning rates and weight decay act as on the dense model.
        """
        energy = sum(v.count * d**2 for v, d in zip(views, deviations, strict=True))
        unit = rounded(math.sqrt(energy / sum(v.count for v in views)))
        return unit, [d / unit for d in deviations]

    def quantised(self, bits: int, block: int) -> Generator:
        """The settings under which the state is read in few bits."""
        fix = "Of masks, fxrpg.freeze packs the scores into one bit a weight." if self.masks else "Use a ring."
        raise FxrpgError("quantize", "needs a ring", f"the method {self.method!r}", fix)

    def pruned(self) -> Generator:
        """The settings under which numbers of the state that are zero are pruned."""
        fix = "Lower `keep` instead."
        raise FxrpgError("prune", "needs a ring or a PRANC basis", f"the method {self.method!r}", fix)

    def reuse(self, views: Sequence[View]) -> float:
        """How many of the weights of these views, which share a state, read each of its numbers; 1 if that sets no rate."""
        return 1.0

    def check(self, views: Sequence[View]) -> None:
        """Warn, when a model is transformed, of what generating all these weights takes."""
        return

    @abstractmethod
    def init_state(self, views: Sequence[View], unit: float) -> Tensor:
        """The state at the start, float64 on the CPU, of `state_shape`, from the seed alone.

        Args:
            views: the weights that share the state.
            unit: from `scales`.
        """

    def state_shape(self, view: View) -> tuple[int, ...]:
        """Shape of the trainable state that `view` reads."""
        return (view.size,)

    @property
    def freezes(self) -> bool:
        """Whether there is a form of the state packed for inference."""
        return False

    def freeze(self, state: Tensor, view: View) -> Tensor:
        """The state packed for inference: uint8 of `frozen_shape`, which `materialize` reads too."""
        raise NotImplementedError

    def frozen_name(self, state: str) -> str:
        """What the name `state` of a trainable state becomes when that is frozen."""
        return state

    def frozen_shape(self, view: View) -> tuple[int, ...]:
        """Shape of what `freeze` returns."""
        raise NotImplementedError

    @abstractmethod
    def materialize(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        """The weight's *unscaled* values, a fresh contiguous tensor of `view.shape` and `dtype`, without autograd.

        Bit-equal everywhere: a function of the state and the view alone, rounded once to `dtype`.
        """

    @abstractmethod
    def reference(self, state: Tensor, view: View) -> Tensor:
        """What `materialize` computes, in the state's dtype and in plain torch ops that autograd and torch.func follow."""

    def form(
        self, state: Tensor, view: View, step: int, dtype: torch.dtype | None = None, tables: bool = False
    ) -> Form | None:
        """How kernels generate values of the view in registers; None for a method too dear for that.

        Args:
            state: of `kernel_state`.
            step: columns begin at multiples of it.
            dtype: the type in which tiles will be asked for, where it is known; it must be if wider than float32.
            tables: whether addresses may come from a table, cached on the device, where the method has one.
        """
        return None

    def cost(self, view: View, step: int) -> str:
        """What one value takes in a kernel where columns begin at multiples of `step`.

        "block": a share of one address for a run of elements; "table": a look-up for a run; "element": an address of its
        own; "own": too much, the method generates in kernels of its own (`form` is None).
        """
        return "own"

    def masked_gradient(self, grad: Tensor, state: Tensor) -> Tensor:
        """A gradient that kernels have summed, without what the settings hold back."""
        return grad.mul_(state != 0) if self.sparse else grad

    def kernel_state(self, state: Tensor, view: View) -> Tensor:
        """The state as kernels read it, where that is not as it is stored."""
        return state.contiguous()

    @abstractmethod
    def accumulate(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        """The exact adjoint of `materialize`: gradient of the state from that of the unscaled weight.

        Args:
            grad: gradient of the unscaled weight, shape `view.shape`, float32 or float64.
            state: the state itself (size and device; values too where the map is not linear).

        Returns:
            Tensor of the state's shape and `grad`'s dtype.
        """

    def materialize_part(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        """`materialize` for a view that is a part of a weight: where a method does not know better, out of the whole."""
        return view.narrowed(self.materialize(state, view.whole, dtype))

    def accumulate_part(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        """`accumulate` for a view that is a part of a weight."""
        return self.accumulate(view.widened(grad), state, view.whole)

    def tangent(self, direction: Tensor, state: Tensor, view: View) -> Tensor:
        """The derivative of the unscaled weight along `direction` (of the state's shape): the adjoint of `accumulate`."""
        return self.materialize(direction, view, direction.dtype)

    def fit(self, state: Tensor, targets: Sequence[tuple[View, float, Tensor]]) -> Tensor:
        """The state, in float64, whose weights come nearest to targets: here by conjugate gradients on the normal equations.

        Args:
            state: the state now.
            targets: (view, scale, wanted weight of `view.shape`, float64) for each weight that reads it.
        """
        live = state if self.sparse else torch.ones_like(state)

        def forward(direction: Tensor) -> Iterator[Tensor]:
            return (self.materialize(direction, view, state.dtype) * scale for view, scale, _ in targets)

        def adjoint(weights: Iterable[Tensor]) -> Tensor:
            pairs = zip(targets, weights, strict=True)
            return sum((self.accumulate(w * s, live, view) for (view, s, _), w in pairs), torch.zeros_like(state))

        return conjugate_gradients(forward, adjoint, [target for _, _, target in targets])


def generator_from(method: str | Generator) -> Generator:
    """The settings that a user's `method=` names: a Generator, or the name of one with its defaults."""
    if isinstance(method, Generator):
        return method
    known = sorted(Generator.registry)
    if method not in known:
        must = f"must be one of {known} or an instance of their classes"
        raise FxrpgError("method", must, repr(method), "Pass one of them.")
    return Generator.registry[method]()
