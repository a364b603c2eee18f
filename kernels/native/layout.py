"""What C code is told of where a weight's elements lie (layout.h), and of a permutation (random.h)."""

from __future__ import annotations

import ctypes
from math import prod

from fxrpg import hashing
from fxrpg.view import View


class Layout(ctypes.Structure):
    """Logical element (a, k, i) of a contiguous weight lies at the sum of the three times their strides."""

    _fields_ = [("sizes", ctypes.c_int64 * 3), ("strides", ctypes.c_int64 * 3)]

    @property
    def flat(self) -> bool:
        """Whether elements lie in logical order (`is_flat` of layout.h)."""
        return self.sizes[0] == self.sizes[1] == self.strides[2] == 1

    @property
    def run(self) -> int:
        """Elements that are made together (`run_of`)."""
        return 8192 if self.flat else self.sizes[1] * self.sizes[2]

    @classmethod
    def of(cls, view: View) -> Layout | None:
        """The axes of the view in logical order, those merged that run together; None for more than three."""
        axes: list[tuple[int, int]] = []
        for axis in view.order:
            size, stride = view.shape[axis], prod(view.shape[axis + 1 :])
            if size == 1:
                continue
            if axes and axes[-1][1] == stride * size:
                axes[-1] = axes[-1][0] * size, stride
            else:
                axes.append((size, stride))
        if len(axes) > 3 or 0 in view.shape:
            return None
        while len(axes) < 3:
            axes.insert(len(axes) // 2, (1, 1))  # two axes are rows and columns
        sizes, strides = zip(*axes, strict=True)
        found = cls()
        found.sizes[:], found.strides[:] = sizes, strides
        return found


class Bijection(ctypes.Structure):
    """`hashing.Bijection`; of zeros, the identity."""

    _fields_ = [
        ("count", ctypes.c_int64),
        ("a", ctypes.c_uint32),
        ("b", ctypes.c_uint32),
        ("rounds", ctypes.c_int64),
        ("keys", ctypes.c_uint32 * 8),
        ("holes", ctypes.POINTER(ctypes.c_int64)),
    ]

    @classmethod
    def of(cls, permutation: hashing.Bijection) -> Bijection:
        a, b = permutation.factors
        found = cls(count=permutation.count, a=a, b=b, rounds=len(permutation.keys))
        found.keys[: len(permutation.keys)] = permutation.keys
        holes = permutation.holes
        found.holes = (ctypes.c_int64 * max(1, len(holes)))(*holes)
        return found
