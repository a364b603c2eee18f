"""States that lie in pieces on several ranks: a rank's run of numbers, and the sums over all ranks that go with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.view import View

PLAIN = (Tensor, nn.Parameter)
ALIGNED = 32
"""Basis vectors that may share a random word: a run of them is drawn from a multiple of it."""


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. Does not import torch.distributed.tensor by itself."""
    if type(tensor) in PLAIN:
        return False
    cls = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return cls is not None and isinstance(tensor, cls)


def whole(tensor: Any) -> Tensor:
    """The tensor with the pieces of all ranks, which must all call this; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    full = tensor.detach().full_tensor()
    return nn.Parameter(full, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else full


def local(state: Any, text: str, name: str) -> Any:
    """What an op on this rank reads of a state for the view `text`: of one that `distribute` has split, this rank's piece.

    Ops call this right before they run: gradients then reach the state in the order in which those of a whole one do.

    Raises:
        FxrpgError: a piece of a state that has to be gathered first.
    """
    if not is_sharded(state):
        return state
    if not View.parse(text).ranks:
        raise FxrpgError(
            name,
            "must be generated from the whole state",
            f"a piece of it, {tuple(state.to_local().shape)} of {tuple(state.shape)}, on this rank",
            "Apply fully_shard to the transformed model itself (to its blocks too, if you like) and call the model, not "
            "a part of it; PRANC coefficients can be split by fxrpg.distribute.",
        )
    return state.to_local()


@dataclass(frozen=True)
class Share:
    """The run of a state's numbers that this rank holds, `first .. first + count - 1`; all of them in a single process.

    Args:
        ranks: name of the process group that the state is split over, "" without one.
    """

    first: int
    count: int
    ranks: str = ""

    @classmethod
    def of(cls, state: Tensor, view: View) -> Share:
        """What `state` is of the state that the view reads: DTensor's shard along the first dimension."""
        if not view.ranks:
            return cls(0, view.size)
        group = _group(view.ranks)
        each = -(-view.size // group.size())
        first = min(group.rank() * each, view.size)
        share = cls(first, min(each, view.size - first), view.ranks)
        if len(state) != share.count:
            must = f"rank {group.rank()} of {group.size()} must hold numbers {first} to {first + share.count - 1}"
            raise FxrpgError("distribute", must, f"{len(state)} numbers", "Call fxrpg.distribute with this group.")
        return share

    @property
    def start(self) -> int:
        """Where the rank begins to draw: the basis vectors from there to `first` count nothing."""
        return self.first // ALIGNED * ALIGNED

    def padded(self, rows: Tensor) -> Tensor:
        """Rows of this rank's numbers, [n, count], with zeros for what it draws too much: [n, first - start + count]."""
        return F.pad(rows, (self.first - self.start, 0)) if self.first > self.start else rows

    def largest(self, state: Tensor) -> Tensor | None:
        """The largest magnitude on any rank, infinite where one is not finite: float64 []. None in a single process."""
        if not self.ranks:
            return None
        sizes = torch.nan_to_num(state.detach().double().abs(), nan=torch.inf)
        return self._reduced(F.pad(sizes, (0, 1)).amax(), "MAX")

    def summed(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        """This rank's sums over its numbers, [n, elements] at a time, as sums over all numbers."""
        if not self.ranks:
            return parts
        return iter([self._reduced(torch.cat(list(parts), 1), "SUM")])

    def averaged(self, grad: Tensor) -> Tensor:
        """The mean over the ranks of a weight's gradient."""
        total = self._reduced(grad.clone(memory_format=torch.contiguous_format), "SUM")
        return total / _group(self.ranks).size()

    def _reduced(self, tensor: Tensor, op: str) -> Tensor:
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, op), _group(self.ranks))
        return tensor


def _group(name: str) -> Any:
    """The process group of that name. Raises FxrpgError where there is none (any more)."""
    try:
        return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, AttributeError) as e:
        fix = "Build the model again, and call fxrpg.distribute once the process group is initialised."
        raise FxrpgError("distribute", f"needs its process group {name!r}", str(e).splitlines()[0], fix) from None
