"""Where one weight lies in a method's state (View), and what kernels are given of it (Form)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.hashing import on_device

if TYPE_CHECKING:
    from fxrpg.generator import Generator

METHODS: dict[str, type[Generator]] = {}
"""Every method by its name; a generator's file registers itself."""


_RARE = ("generator", "stack", "parent", "first", "ranks", "average")


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
        size: degrees of freedom of the state.
        kept: of a weight whose channels were pruned, the indices left on each axis, () for all; `shape` is what is left.
        original: its shape before that.
        stack: leading logical axes that only count matrices, as in the experts of a mixture: [expert, out, in] has one.
        parent: of a part of a weight, the whole; its elements `first`, `first + 1`, ... in logical order are the part.
        first: see `parent`.
        ranks: name of the process group over which the state is split (`fxrpg.distribute`), "" if it is not.
        average: of a split state, whether the ranks see different data, so that weights' gradients are averaged over them.
    """

    generator: Generator
    seed: int
    tensor: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    offset: int
    total: int
    size: int
    kept: tuple[tuple[int, ...], ...] = ()
    original: tuple[int, ...] = ()
    stack: int = 0
    parent: View | None = None
    first: int = 0
    ranks: str = ""
    average: bool = False

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def fan_in(self) -> int:
        """Elements that feed one output."""
        return self.count // math.prod(self.shape[axis] for axis in self.order[: self.stack + 1])

    @functools.cached_property
    def whole(self) -> View:
        """The weight with all its elements and channels, as the generator knows it."""
        if self.parent:
            return self.parent.whole
        return dataclasses.replace(self, shape=self.original, kept=(), original=()) if self.kept else self

    def part(self, first: int, shape: tuple[int, ...], order: tuple[int, ...]) -> View:
        """The part of the weight that begins at its logical element `first`, as a weight of its own."""
        return dataclasses.replace(
            self, shape=shape, order=order, parent=self, first=first, kept=(), original=(), stack=0
        )

    @functools.cached_property
    def text(self) -> str:
        """The canonical string that an op receives."""
        return json.dumps(self.fields(), sort_keys=True, separators=(",", ":"))

    def fields(self) -> dict[str, Any]:
        """Plain data, as the digest covers it: what few weights have is there only where they have it."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _RARE}
        data |= {"stack": self.stack} if self.stack else {}
        data |= {"parent": self.parent.fields(), "first": self.first} if self.parent else {}
        data |= {"ranks": self.ranks, "average": self.average} if self.ranks else {}
        return data | {"method": self.generator.method, "settings": dataclasses.asdict(self.generator)}

    @staticmethod
    @functools.lru_cache(maxsize=1 << 16)
    def parse(text: str) -> View:
        """The view that `text` stands for."""
        return View._from(json.loads(text))

    @staticmethod
    def _from(data: dict[str, Any]) -> View:
        generator = METHODS[data.pop("method")](**data.pop("settings"))
        data |= {name: tuple(data[name]) for name in ("shape", "order", "original")}
        data |= {"parent": View._from(data["parent"])} if "parent" in data else {}
        return View(**data | {"generator": generator, "kept": tuple(map(tuple, data["kept"]))})

    def narrowed(self, weight: Tensor) -> Tensor:
        """The kept channels, or the part, of a weight that has all its elements (of shape `whole.shape`)."""
        if self.parent:
            whole = self.parent.narrowed(weight)
            return self.from_logical(self.parent.to_logical(whole)[self.first : self.first + self.count])
        for axis, kept in enumerate(self.kept):
            if kept:
                weight = weight.index_select(axis, on_device(kept, weight.device))
        return weight

    def widened(self, grad: Tensor) -> Tensor:
        """The adjoint of `narrowed`: zeros for all that is not in it."""
        if self.parent:
            whole = grad.new_zeros(self.parent.count)
            whole[self.first : self.first + self.count] = self.to_logical(grad)
            return self.parent.widened(self.parent.from_logical(whole))
        for axis, kept in enumerate(self.kept):
            if kept:
                sides = list(grad.shape)
                sides[axis] = self.original[axis]
                grad = grad.new_zeros(sides).index_copy(axis, on_device(kept, grad.device), grad)
        return grad

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


class Form(NamedTuple):
    """A view as Triton kernels see it: the generator's device functions, and what they are given.

    `begin(args, spec)` reads the view's numbers once a program, and what it returns goes as `form` to
    `tile(rows, col0, WIDTH, form, spec, DTYPE)`, the unscaled values [rows, WIDTH] of rows and a run of columns of the
    weight as a matrix (outputs by fan-in, in logical order), and to
    `accumulate(grad, mask, rows, col0, WIDTH, form, spec)`, which adds such a tile's float32 gradient into `args[0]`,
    the state: `into` puts the state's gradient in its place. Where sums can be had in a fixed order, `gather` is a pair:
    `gather(grad, use, cell0, WIDTH, form, spec)`, what the uses numbered `use` of a run of the state's numbers add to
    their gradient, and how many uses one number has at most.
    """

    begin: Any
    tile: Any
    accumulate: Any
    args: tuple[Tensor, ...]
    spec: Any
    gather: tuple[Any, int] | None = None

    def into(self, grad: Tensor) -> Form:
        """The form for `accumulate`: `grad`, float32 and contiguous, of the state's shape, is what it adds to."""
        return self._replace(args=(grad, *self.args[1:]))
