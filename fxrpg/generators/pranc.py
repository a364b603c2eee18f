"""PRANC: every weight is a combination of random basis vectors that are drawn again whenever they are needed.

PRANC: Pseudo RAndom Networks for Compacting deep models, Section 3: theta = sum_k alpha_k B_k.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxrpg.basis import LAWS, Law
from fxrpg.errors import FxrpgError
from fxrpg.fixed_point import GRADIENT_BITS, fixed_point, from_parts
from fxrpg.generator import Generator
from fxrpg.shares import Share
from fxrpg.straight_through import straight_through
from fxrpg.view import View

MANY_DRAWS = 10**11


@dataclass(frozen=True, kw_only=True)
class Pranc(Generator):
    """k learned coefficients of a seeded random basis; `dof` = k.

    Element i of the weight is sum_k alpha_k v_ik, with v drawn from (seed, tensor id, i, k) alone: any entry of any basis
    vector can be had without the others, none is ever stored. The model starts as basis vector 0 (alpha = e_0), whose
    deviation in each layer is that of the layer's own initialiser.

    Args:
        law: of the basis values, all of unit variance before the layer's scale: "rademacher" (signs), "uniform" (with the
            layer's bound, as in the authors' code), "normal" (near normal: sums of eight uniforms), "khatri_rao" (signs
            of rank one in each layer: one matrix product instead of a draw for every weight and vector).
        norms: generate the affine parameters of normalisation layers too (the paper; the authors' code trains them).
        sparse: coefficients that are zero are pruned: they stay zero, and files do not store them. `fxrpg.truncate` and
            `fxrpg.prune` set it; a model that starts with it can only ever train alpha_0, the one that is not zero.
    """

    method: ClassVar[str] = "pranc"
    state_name: ClassVar[str] = "fxrpg_alpha"
    pair: ClassVar[str] = "fxrpg.kernels.fused.pranc"
    native: ClassVar[str] = "fxrpg.kernels.native.pranc"
    decays: ClassVar[bool] = False

    law: str = "rademacher"
    norms: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.law not in tuple(LAWS):
            raise FxrpgError("Pranc(law=...)", f"must be one of {tuple(LAWS)}", repr(self.law), "Pass one of them.")

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("conv", "linear", "bias", *(("norm",) if self.norms else ()))

    @property
    def splits(self) -> bool:
        return True

    def state_size(self, dof: int | float, shapes: Sequence[tuple[int, ...]]) -> int:
        """The number of coefficients: an int is taken exactly, a fraction is one of the generated weights, rounded."""
        return dof if isinstance(dof, int) else max(1, round(dof * self.most(shapes)))

    def extents(self, counts: Sequence[int]) -> list[int]:
        return list(counts)

    def scales(self, views: Sequence[View], deviations: Sequence[float]) -> tuple[float, list[float]]:
        return 1.0, list(deviations)

    def init_state(self, views: Sequence[View], unit: float) -> Tensor:
        alphas = torch.zeros(views[0].size, dtype=torch.float64, device="cpu")
        alphas[0] = unit
        return alphas

    def materialize(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        return self.summed(LAWS[self.law], state, view, dtype)

    def summed(self, law: Law, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        """`materialize` with the sums that `law` makes."""
        share = Share.of(state, view)
        limbs, weights = fixed_point(state.detach(), law.bits, size=view.size, largest=share.largest(state))
        values = torch.empty(view.count, dtype=dtype, device=state.device)
        first = 0
        for sums in share.summed(law.combine(share.padded(limbs), view, share.start)):
            values[first : first + sums.shape[1]] = _divided(from_parts(sums, weights), law.deviation)
            first += sums.shape[1]
        return view.from_logical(values)

    def reference(self, state: Tensor, view: View) -> Tensor:
        if view.ranks:
            fix = "Take the model from before fxrpg.distribute."
            raise FxrpgError("torch.func", "needs all coefficients in one process", "a basis split over ranks", fix)
        law = LAWS[self.law]
        basis = law.vectors(view, view.size, state.device) / law.deviation
        live = state * (state.detach() != 0) if self.sparse else state
        smooth = view.from_logical(live.to(torch.float64) @ basis).to(state.dtype)
        return straight_through(self.materialize(state, view, state.dtype), smooth)

    def accumulate(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        return self.projected(LAWS[self.law], grad, state, view)

    def projected(self, law: Law, grad: Tensor, state: Tensor, view: View) -> Tensor:
        """`accumulate` with the sums that `law` makes."""
        share = Share.of(state, view)
        grad = share.averaged(grad) if view.average else grad
        limbs, weights = fixed_point(view.to_logical(grad), law.bits, GRADIENT_BITS)
        drawn = law.project(limbs, view, share.first - share.start + share.count, share.start)
        found = _divided(from_parts(drawn[:, share.first - share.start :], weights), law.deviation)
        return (found * (state != 0) if self.sparse else found).to(grad.dtype)

    def materialize_part(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        return (self.materialize if self._drawn_alone(view) else super().materialize_part)(state, view, dtype)

    def accumulate_part(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        return (self.accumulate if self._drawn_alone(view) else super().accumulate_part)(grad, state, view)

    def _drawn_alone(self, view: View) -> bool:
        """Whether a part's values can be drawn without the rest: of a basis of rank one, whole rows can."""
        if view.parent is not None and view.parent.kept:  # its elements are counted without the channels that are gone
            return False
        rows = view.fan_in == view.whole.fan_in and view.first % view.fan_in == 0
        return rows or self.law != "khatri_rao"

    def tangent(self, direction: Tensor, state: Tensor, view: View) -> Tensor:
        return self.materialize(direction * (state != 0) if self.sparse else direction, view, direction.dtype)

    def pruned(self) -> Pranc:
        return dataclasses.replace(self, sparse=True)

    def check(self, views: Sequence[View]) -> None:
        draws = sum(LAWS[self.law].draws(view) for view in views)
        if draws > MANY_DRAWS:
            warnings.warn(
                f"a pass over the {sum(view.count for view in views):,} weights of this PRANC basis draws {draws:.1e} values "
                f"(more than {MANY_DRAWS:.0e}): Pranc(law='khatri_rao') draws fewer, and so does scope='layer'",
                stacklevel=3,
            )


def _divided(values: Tensor, deviation: float) -> Tensor:
    """`values` / `deviation`, rounded once: by a number that is not a tensor of theirs, a GPU would multiply by its inverse."""
    return values if deviation == 1 else values / torch.full((), deviation, dtype=values.dtype, device=values.device)
