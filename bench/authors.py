"""A ring the way its authors store it: an int64 index and a sign for every weight, gathered and multiplied at each use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.view import View


class Indexed:
    """Where a weight lies in a ring, written out.

    The entries stand in the order of channels_last, which spares the convolution a copy of the weight.
    """

    def __init__(self, view: View, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        # A ring of the numbers 1 .. N tells which cell each entry reads, and with which sign.
        cells = torch.arange(1, view.size + 1, dtype=torch.float64, device=device)
        read = view.to_logical(view.generator.materialize(cells, view, torch.float64))
        self.index = read.abs().long() - 1
        self.signs = (read.sign() * scale).to(dtype)
        self.shape = [view.shape[axis] for axis in view.order]
        self.inverse = [view.order.index(axis) for axis in range(len(view.order))]
        self.view = view

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.signs.nbytes

    def weight(self, ring: Tensor) -> Tensor:
        """The weight, of PyTorch's shape."""
        return (ring.index_select(0, self.index) * self.signs).view(self.shape).permute(self.inverse)

    def gradient(self, grad: Tensor, ring: Tensor) -> Tensor:
        """The ring's gradient from the weight's, in the ring's type."""
        values = self.view.to_logical(grad).to(ring.dtype) * self.signs
        return torch.zeros_like(ring).index_add_(0, self.index, values)


def index_weights(model: nn.Module, ring: Tensor, views: dict[str, View], scales: dict[str, float]) -> list[Indexed]:
    """Have the layers of `model`, in place, gather the weights named in `views` from `ring`, a new parameter of its root."""
    parameter = nn.Parameter(ring.detach().clone())
    found = []
    for name, view in views.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        indexed = Indexed(view, scales[name], ring.dtype, ring.device)
        delattr(owner, attribute)
        owner.__class__ = _indexed_class(type(owner), attribute)
        owner.__dict__["indexed"] = (indexed, parameter)  # no submodule: the ring is the root's
        found.append(indexed)
    model.register_parameter("ring", parameter)
    return found


def _indexed_class(base: type[nn.Module], attribute: str) -> Any:
    def read(self: Any) -> Tensor:
        indexed, ring = self.__dict__["indexed"]
        return indexed.weight(ring)

    return type(f"Indexed{base.__name__}", (base,), {attribute: property(read)})
