"""PEMN: every weight is a fixed random value or zero, and only the masks are learned.

Parameter-Efficient Masking Networks, Section 3 (one-layer, max-layer padding MP, random padding RP); the straight-through
scores are those of "What's Hidden in a Randomly Weighted Neural Network?", arXiv:1911.13299.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.hashing import PERMUTE, PROTOTYPE, SCORE, Bijection, near_normal, random_words
from fxrpg.packing import pack_bits, unpack_bits
from fxrpg.straight_through import straight_through
from fxrpg.view import Form, View

PROTOTYPES = ("random_padding", "one_layer")
VALUES = ("normal", "signed_constant")
THRESHOLDS = ("layer", "global")


@dataclass(frozen=True, kw_only=True)
class Pemn(Generator):
    """Learned binary masks over a prototype of D fixed random values, which a seed stands for; `dof` = D.

    An int is D itself; a float below 1 is the paper's ratio r, D = int(n_max * r) + 1, where n_max is the size of the
    largest weight; 1.0 is max-layer padding (MP), D = n_max. A weight's element i is prototype value i mod D where its
    mask is set, else zero. The mask keeps the round(keep * n) entries of largest |score| (halves round up, at least one;
    of equal scores the first in logical order); its gradient passes straight through: d score = dw * value * sign(score).

    Args:
        prototype: "random_padding" (the paper's RP, and MP with dof=1.0; dof=1 is a single value), or "one_layer" (its
            one-layer form): a tensor of its own for each distinct shape, without `dof`.
        keep: fraction of the entries that a mask keeps, in (0, 1).
        values: "normal" (Kaiming normal, fan_in), or "signed_constant" (its deviation with random signs).
        permuted: one random permutation, shared by all weights, between elements and prototype values.
        threshold: "layer": every weight keeps its own largest scores; "global": the largest of all together.
        per_layer: scale each weight by its own fan-in; else all take the deviation of the largest (as the authors do).
    """

    method: ClassVar[str] = "pemn"
    native: ClassVar[str] = "fxrpg.kernels.native.pemn"

    prototype: str = "random_padding"
    keep: float = 0.5
    values: str = "normal"
    permuted: bool = False
    threshold: str = "layer"
    per_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("prototype", PROTOTYPES), ("values", VALUES), ("threshold", THRESHOLDS)):
            if getattr(self, name) not in allowed:
                found = repr(getattr(self, name))
                raise FxrpgError(f"Pemn({name}=...)", f"must be one of {allowed}", found, "Pass one of them.")
        if isinstance(self.keep, bool) or not isinstance(self.keep, float) or not 0 < self.keep < 1:
            fix = "Pass the fraction of entries to keep, such as 0.5."
            raise FxrpgError("Pemn(keep=...)", "must be a float in (0, 1)", repr(self.keep), fix)

    @property
    def state_name(self) -> str:  # type: ignore[override]
        return "_score" if self.local else "fxrpg_score"

    @property
    def masks(self) -> bool:
        return True

    @property
    def local(self) -> bool:
        return self.threshold == "layer"

    @property
    def needs_dof(self) -> bool:
        return self.prototype != "one_layer"

    def most(self, shapes: Sequence[tuple[int, ...]]) -> int:
        return max(map(math.prod, shapes))

    def state_size(self, dof: int | float, shapes: Sequence[tuple[int, ...]]) -> int:
        """D: an int is taken exactly, a ratio r below 1 is int(n_max * r) + 1, and 1.0 is n_max."""
        if not self.needs_dof:
            return sum(map(math.prod, set(shapes)))
        return dof if isinstance(dof, int) else min(int(self.most(shapes) * dof) + 1, self.most(shapes))

    def extents(self, counts: Sequence[int]) -> list[int]:
        return list(counts)

    def scales(self, views: Sequence[View], deviations: Sequence[float]) -> tuple[float, list[float]]:
        """Kaiming's normal rule for ReLU, sqrt(2 / fan_in): of the largest weight, or each weight's own."""
        own = [math.sqrt(2 / view.fan_in) for view in views]
        largest = max(range(len(views)), key=lambda i: (views[i].count, -views[i].tensor))
        return 1.0, own if self.per_layer else [own[largest]] * len(views)

    def init_state(self, views: Sequence[View], unit: float) -> Tensor:
        """Scores of U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's Kaiming uniform."""
        scores = [self._first_scores(view) for view in views]
        return views[0].from_logical(scores[0]) if self.local else torch.cat(scores)

    def state_shape(self, view: View) -> tuple[int, ...]:
        return view.shape if self.local else (view.total,)

    @property
    def freezes(self) -> bool:
        return True

    def freeze(self, state: Tensor, view: View) -> Tensor:
        """The mask of one weight (of all, with a global threshold), one bit an entry in logical order."""
        return pack_bits(self._mask(view.to_logical(state) if self.local else state))

    def frozen_name(self, state: str) -> str:
        return state.replace("_score", "_mask", 1)

    def frozen_shape(self, view: View) -> tuple[int, ...]:
        return (-(-math.prod(self.state_shape(view)) // 8),)

    def form(
        self, state: Tensor, view: View, step: int, dtype: torch.dtype | None = None, tables: bool = False
    ) -> Form:
        return importlib.import_module("fxrpg.tiles.pemn").pemn_form(state, view, step, dtype)

    def cost(self, view: View, step: int) -> str:
        return "table" if step % 32 == 0 and view.fan_in % 32 == 0 and not self.permuted else "element"

    def kernel_state(self, state: Tensor, view: View) -> Tensor:
        state = state.detach().contiguous()  # kernels read packed bits by whole words
        return state.clone() if state.dtype == torch.uint8 and state.data_ptr() % 4 else state

    def materialize(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        # scores that are not finite are not hidden: what they drop is NaN
        rest = (0 * state.detach()).sum(dtype=torch.float64) if state.is_floating_point() else 0.0
        values = torch.where(self.mask(state, view), self.fixed_values(view, state.device), rest)
        return view.from_logical(values.to(dtype))

    def reference(self, state: Tensor, view: View) -> Tensor:
        fixed = view.from_logical(self.fixed_values(view, state.device)).to(state.dtype)
        score = state if self.local else view.from_logical(state[view.offset : view.offset + view.count])
        return straight_through(self.materialize(state.detach(), view, state.dtype), fixed * score.abs())

    def accumulate(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        fixed = self.fixed_values(view, grad.device)
        if self.local:
            return grad * view.from_logical(fixed).to(grad.dtype) * state.sign()
        place = slice(view.offset, view.offset + view.count)
        out = grad.new_zeros(view.total)
        out[place] = view.to_logical(grad) * fixed.to(grad.dtype) * state[place].sign()
        return out

    def tangent(self, direction: Tensor, state: Tensor, view: View) -> Tensor:
        along = direction * state.sign()
        along = along if self.local else view.from_logical(along[view.offset : view.offset + view.count])
        return view.from_logical(self.fixed_values(view, state.device)).to(direction.dtype) * along

    def fit(self, state: Tensor, targets: Sequence[tuple[View, float, Tensor]]) -> Tensor:
        """Scores whose mask is the best there is: it keeps the entries for which their fixed value beats zero by most.

        Of the magnitudes that the scores have now, entries take the largest in the order of what keeping them gains,
        w^2 - (w - value)^2; so training goes on from scores of the usual size. Entries that are dropped although their
        magnitude ties with the least one kept get half of it: where scores tie, the gain does not decide.
        """
        gains = []
        for view, scale, target in targets:
            fixed = self.fixed_values(view, state.device) * scale
            gains.append(fixed * (2 * view.to_logical(target) - fixed))
        order = torch.argsort(torch.cat(gains), stable=True)
        magnitudes = (targets[0][0].to_logical(state) if self.local else state).abs().sort().values
        dropped = len(magnitudes) - kept_of(self.keep, len(magnitudes))
        least = magnitudes[dropped].clone()
        magnitudes[:dropped].mul_(torch.where(magnitudes[:dropped] == least, 0.5, 1.0))
        scores = torch.empty_like(magnitudes).index_copy_(0, order, magnitudes)
        return targets[0][0].from_logical(scores) if self.local else scores

    def fixed_values(self, view: View, device: torch.device) -> Tensor:
        """The weight's fixed values before any mask, of unit deviation, float64 [count] in logical order."""
        if self.prototype == "one_layer":
            return self.drawn(view.count, view.seed, *view.shape, device=device)
        index, needed = torch.arange(view.count, device=device), min(view.size, view.count)
        if self.permuted:
            index, needed = Bijection.keyed(view.total, view.seed, PERMUTE)(index), view.size
        return self.drawn(needed, view.seed, device=device)[index % view.size]

    def mask(self, state: Tensor, view: View) -> Tensor:
        """Which entries the weight keeps, from scores or packed bits: bool [count] in logical order."""
        first = 0 if self.local else view.offset
        if state.dtype == torch.uint8:
            return unpack_bits(state, first, view.count)
        scores = view.to_logical(state.detach()) if self.local else state.detach()
        return self._mask(scores)[first : first + view.count]

    def _mask(self, scores: Tensor) -> Tensor:
        """Exactly round(keep * n) entries of largest magnitude, NaN the largest of all: a selection, never a sort."""
        sizes = _sizes(scores)
        _, least, last = self._selection(sizes)
        index = torch.arange(len(sizes), device=sizes.device)
        return (sizes > least) | ((sizes == least) & (index <= last))

    def kept(self, count: int) -> int:
        """Entries that a mask over so many keeps."""
        return kept_of(self.keep, count)

    def _selection(self, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which sizes are kept, without waiting for the device: (the largest, the least kept, the last kept one of those).

        Returns:
            Two tensors [] of the type of `sizes`, and an index, int64 [].
        """
        count = self.kept(len(sizes))
        kept = torch.topk(sizes, count, sorted=False).values  # not kthvalue: CUDA's is not deterministic
        least = kept.amin()
        ties = (sizes == least).cumsum(0)
        return kept.amax(), least, torch.searchsorted(ties, count - (sizes > least).sum())

    def bounds(self, scores: Tensor, view: View) -> Tensor:
        """What `mask` compares with, and what takes the place of dropped values, for kernels: float64 [3], on the device.

        Args:
            scores: of `state_shape`.

        Returns:
            The least size that is kept, the last entry of that size that is (in logical order), and zero, or NaN where
            scores are not finite.
        """
        largest, least, last = self._selection(_sizes(view.to_logical(scores) if self.local else scores))
        rest = torch.where(largest == math.inf, math.nan, 0.0)
        return torch.stack([least.double(), last.double(), rest.double()])

    def drawn(self, count: int, seed: int, *labels: int, device: torch.device) -> Tensor:
        """`count` values of the prototype, float64."""
        if self.values == "normal":
            return near_normal(count, seed, PROTOTYPE, *labels, device=device)
        words = random_words(0, -(-count // 32), seed, PROTOTYPE, *labels, device=device)
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32, device=device) & 1).view(-1)[:count]
        return 1 - 2 * bits.to(torch.float64)

    def _first_scores(self, view: View) -> Tensor:
        words = random_words(0, view.count, view.seed, SCORE, view.tensor).to(torch.float64)
        return (words + 0.5) / (1 << 31) / math.sqrt(view.fan_in)


def kept_of(keep: float, count: int) -> int:
    """round(keep * count), halves up, within 1 .. count."""
    return min(max(math.floor(keep * count + 0.5), 1), count)


def _sizes(scores: Tensor) -> Tensor:
    """Magnitudes in one row; those that are not finite are all the same."""
    return torch.nan_to_num(scores.detach().abs().view(-1), nan=math.inf, posinf=math.inf)
