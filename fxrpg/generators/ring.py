"""The ring (RPG): every weight reads a permuted, sign-reflected stretch of one cyclic parameter vector.

Recurrent Parameter Generators, arXiv:2107.07110, Eq. 1-3 and Section 3, "Even Parameter Distribution".
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxrpg import addresses
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.hashing import INIT, Bijection, near_normal
from fxrpg.packing import codes_of, pack_quantised, packed_size, read_quantised, rounded, spread, steps_of
from fxrpg.straight_through import straight_through
from fxrpg.view import Form, View

BLOCKS = (1, 8, 16, 32, 64)
LAYOUTS = ("arc", "shuffle", "block_diagonal", "hash")

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGN = -(1 << 31)


@dataclass(frozen=True, kw_only=True)
class Ring(Generator):
    """A shared ring of N free numbers; `dof` = N.

    Logical elements are grouped in blocks of `block`; element i of block b reads cell `(pi(b) * block + i) mod N`, and
    each element has its own sign. With pi a bijection every cell is used floor or ceil of M/N times (arXiv:2107.07110,
    Section 3), where M counts the weights, padded to whole blocks.

    Args:
        block: 1 (the paper's element-wise ring), 8, 16, 32 or 64 consecutive elements that stay together.
        layout: "arc": each weight permutes its own stretch of the ring (Fig. 1, Eq. 3); "shuffle": one permutation over
            all weights (the authors' code); "block_diagonal": one permutation and one row of signs a weight, the same for
            every filter (Section 3, "Destructive Weight Sharing"), with block 1, even within each weight; "hash": hashed cells,
            used unevenly (HashedNets), as a baseline.
        permute: False leaves blocks in order (the paper's ablation).
        reflect: False leaves out the signs (the paper's ablation).
        bits: None, or 8 or 4: weights read the ring rounded to so many bits, and its gradient passes straight through.
        bits_block: cells that share a quantisation step; 0 is one step for the ring.
        sparse: cells that are zero are pruned: they stay zero, and files do not store them.
    """

    method: ClassVar[str] = "ring"
    state_name: ClassVar[str] = "fxrpg_ring"
    native: ClassVar[str] = "fxrpg.kernels.native.ring"
    collects: ClassVar[bool] = True
    keeps_ends: ClassVar[bool] = True

    block: int = 32
    layout: str = "arc"
    permute: bool = True
    reflect: bool = True
    bits: int | None = None
    bits_block: int = 0
    sparse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("block", BLOCKS), ("layout", LAYOUTS), ("bits", (8, 4, None))):
            value = getattr(self, name)
            text = "8, 4 or None" if name == "bits" else f"one of {allowed}"
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise FxrpgError(f"Ring({name}=...)", f"must be {text}", repr(value), "Pass one of them.")
        if self.layout == "hash" and not self.permute:
            must, fix = "needs layout 'arc' or 'shuffle'", "A hash has no order to leave as it is."
            raise FxrpgError("Ring(permute=False)", must, "'hash'", fix)
        if self.layout == "block_diagonal" and self.block != 1:
            found, fix = f"block={self.block}", "Pass Ring(layout='block_diagonal', block=1)."
            raise FxrpgError("Ring(layout='block_diagonal')", "needs block=1", found, fix)
        if type(self.bits_block) is not int or self.bits_block < 0:
            found = repr(self.bits_block)
            raise FxrpgError("Ring(bits_block=...)", "must be an int of 0 or more", found, "Pass such as 64.")

    @property
    def granule(self) -> int:
        return self.block

    def state_size(self, dof: int | float, shapes: Sequence[tuple[int, ...]]) -> int:
        """An int is taken exactly; a fraction rounds to the nearest whole number of blocks that fits."""
        if isinstance(dof, int):
            return dof
        weights = self.most(shapes)
        blocks = max(1, min(round(dof * weights / self.block), weights // self.block))
        return min(blocks * self.block, weights)

    def reuse(self, views: Sequence[View]) -> float:
        """M / N, of a hashed ring on average."""
        return sum(view.count for view in views) / views[0].size

    def extents(self, counts: Sequence[int]) -> list[int]:
        return [-(-count // self.block) * self.block for count in counts]

    def init_state(self, views: Sequence[View], unit: float) -> Tensor:
        first = views[0]
        values = near_normal(first.size, first.seed, INIT, min(view.tensor for view in views))
        # A short ring would miss its deviation by chance: set it.
        found = rounded(values.square().mean().sqrt().item())
        return values * (unit / found) if found else torch.full_like(values, unit)

    def form(
        self, state: Tensor, view: View, step: int, dtype: torch.dtype | None = None, tables: bool = False
    ) -> Form:
        return importlib.import_module("fxrpg.tiles.ring").ring_form(self, state, view, step, tables)

    def cost(self, view: View, step: int) -> str:
        return "block" if self.block > 1 and self.aligned(view, step) and view.size % self.block == 0 else "element"

    def aligned(self, view: View, step: int) -> bool:
        """Whether tiles whose columns begin at multiples of `step` consist of whole runs, of a block or 32 elements."""
        run = 32 if self.block in (1, 64) else self.block
        return self.layout != "block_diagonal" and step % run == 0 and view.fan_in % run == 0

    def kernel_state(self, state: Tensor, view: View) -> Tensor:
        if state.dtype == torch.uint8:
            assert self.bits is not None
            cells = torch.arange(view.size, device=state.device)
            return read_quantised(state, cells, view.size, self.bits, self._run(view.size))
        return self._rounded(state).contiguous()

    def quantised(self, bits: int, block: int) -> Ring:
        return dataclasses.replace(self, bits=bits, bits_block=block)

    def pruned(self) -> Ring:
        return dataclasses.replace(self, sparse=True)

    @property
    def freezes(self) -> bool:
        return self.bits is not None

    def freeze(self, state: Tensor, view: View) -> Tensor:
        assert self.bits is not None
        return pack_quantised(state, self.bits, self._run(view.size))

    def frozen_shape(self, view: View) -> tuple[int, ...]:
        assert self.bits is not None
        return (packed_size(view.size, self.bits, self._run(view.size)),)

    def materialize(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        state = state.detach()
        if state.dtype == torch.uint8:
            assert self.bits is not None
            cells = self._cells(self.block_cells(view, view.size, state.device), view.size).view(-1)[: view.count]
            values = read_quantised(state, cells, view.size, self.bits, self._run(view.size)).to(dtype)
            return view.from_logical(self._reflected(values, view))
        return self._gathered(self._rounded(state).to(dtype), view)

    def reference(self, state: Tensor, view: View) -> Tensor:
        # A ring of the numbers 1 .. N tells which cell each entry reads, and with which sign.
        ring = torch.arange(1, state.numel() + 1, dtype=torch.float64, device=state.device)
        read = self._gathered(ring, view)
        if self.sparse:
            state = state * (state.detach() != 0)
        state = straight_through(self._rounded(state.detach()), state) if self.bits else state
        return state[read.abs().long() - 1] * read.sign().to(state.dtype)

    def tangent(self, direction: Tensor, state: Tensor, view: View) -> Tensor:
        return self._gathered(direction * (state != 0) if self.sparse else direction, view)

    def accumulate(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        if self.layout == "arc" and torch.are_deterministic_algorithms_enabled():
            found = self.gather_gradient(grad, state, view)
        else:
            found = self.scatter_gradient(grad, state, view)
        return found.mul_(state != 0) if self.sparse else found

    def fit(self, state: Tensor, targets: Sequence[tuple[View, float, Tensor]]) -> Tensor:
        """Every cell becomes the weighted mean of the entries it stands for: least squares, since each reads one cell."""
        linear = dataclasses.replace(self, bits=None, sparse=False)
        numerator, denominator = torch.zeros_like(state), torch.zeros_like(state)
        for view, scale, target in targets:
            numerator += linear.scatter_gradient(target * scale, state, view)
            signs = linear._gathered(torch.ones_like(state), view)
            denominator += linear.scatter_gradient(signs * scale**2, state, view)
        fitted = torch.where(denominator > 0, numerator / denominator.clamp(min=torch.finfo(state.dtype).tiny), state)
        return fitted * (state != 0) if self.sparse else fitted

    def _rounded(self, state: Tensor) -> Tensor:
        """The ring as weights read it: itself, or in few bits."""
        if not self.bits:
            return state
        wide, run = state.float(), self._run(len(state))
        steps = steps_of(wide, self.bits, run)
        codes = codes_of(wide, steps, run) + 0.0  # packed codes know no negative zero either
        return (codes * spread(steps, run, len(wide))).to(state.dtype)

    def _run(self, size: int) -> int:
        """Cells of a ring of that size that share a step, 0 for all."""
        return self.bits_block if self.bits_block < size else 0

    def materialize_part(self, state: Tensor, view: View, dtype: torch.dtype) -> Tensor:
        if state.dtype == torch.uint8 or not self._addressed_alone(view):
            return super().materialize_part(state, view, dtype)
        return self._gathered(self._rounded(state.detach()).to(dtype), view)

    def accumulate_part(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        if torch.are_deterministic_algorithms_enabled() or not self._addressed_alone(view):
            return super().accumulate_part(grad, state, view)
        found = self.scatter_gradient(grad, state, view)
        return found.mul_(state != 0) if self.sparse else found

    def _addressed_alone(self, view: View) -> bool:
        """Whether the blocks and the sign words of a part are no other part's too."""
        pruned = view.parent is not None and bool(
            view.parent.kept
        )  # its elements are counted without the channels gone
        return self.layout != "block_diagonal" and view.first % max(self.block, 32) == 0 and not pruned

    def _gathered(self, ring: Tensor, view: View) -> Tensor:
        """The weight that reads `ring`, with its signs."""
        if self._whole_rows(view, ring.numel()):
            rows = addresses.block_rows(self, view, ring.numel(), ring.device)
            values = ring.view(-1, self.block).index_select(0, rows)
        else:
            values = ring[self._cells(self.block_cells(view, ring.numel(), ring.device), ring.numel())]
        values = values.view(-1)[: view.count]
        return view.from_logical(self._reflected(values, view))

    def scatter_gradient(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        """The adjoint by scatter-add: element by element into its cell. On the CPU in a fixed order."""
        blocks = self._signed_blocks(grad, view)
        out = grad.new_zeros(state.numel())
        if self._whole_rows(view, state.numel()):
            rows = addresses.block_rows(self, view, state.numel(), grad.device)
            out.view(-1, self.block).index_add_(0, rows, blocks)
        else:
            starts = self.block_cells(view, state.numel(), grad.device)
            out.index_add_(0, self._cells(starts, state.numel()).view(-1), blocks.view(-1))
        return out

    def gather_gradient(self, grad: Tensor, state: Tensor, view: View) -> Tensor:
        """The adjoint by gathering through the inverse permutation: each cell sums its users in a fixed tree, no atomics.

        For the layout "arc": in the others a weight has no stretch of the ring of its own.
        """
        assert self.layout == "arc"
        size = state.numel()
        blocks = self._signed_blocks(grad, view)
        if bijection := self.bijection(view):
            place = torch.arange(blocks.shape[0], device=grad.device)
            blocks = blocks.index_select(0, bijection.inverse(place))
        lead = view.offset % size
        laps = -(-(lead + blocks.numel()) // size)
        rows = grad.new_zeros(laps * size)
        rows[lead : lead + blocks.numel()] = blocks.view(-1)
        rows = rows.view(laps, size)
        while len(rows) > 1:
            half = -(-len(rows) // 2)
            rows[: len(rows) - half] += rows[half:]
            rows = rows[:half]
        return rows[0].clone() if laps > 1 else rows[0]

    def block_cells(self, view: View, size: int, device: torch.device) -> Tensor:
        """The ring cell in which each block of the weight starts, int64 [blocks]."""
        return addresses.block_cells(self, view, size, device)

    def bijection(self, view: View) -> Bijection | None:
        """The permutation that the layout and the settings make of blocks, or of the columns of every filter."""
        return addresses.bijection(self, view)

    def _whole_rows(self, view: View, size: int) -> bool:
        """Whether every block is one aligned row of the ring: then rows are moved instead of elements."""
        return self.block > 1 and size % self.block == 0

    def _cells(self, starts: Tensor, size: int) -> Tensor:
        """The cell of every element, int64 [blocks, block]."""
        lanes = torch.arange(self.block, device=starts.device)
        return (starts[:, None] + lanes) % size

    def _signed_blocks(self, grad: Tensor, view: View) -> Tensor:
        """The gradient's elements with their signs, padded with zeros to whole blocks, [blocks, block]."""
        values = self._reflected(view.to_logical(grad), view)
        padding = -view.count % self.block
        return torch.nn.functional.pad(values, (0, padding)).view(-1, self.block)

    def _reflected(self, values: Tensor, view: View) -> Tensor:
        """`values` (logical order) with each element's sign bit flipped where the sign stream says so."""
        if not self.reflect:
            return values
        count = view.fan_in if self.layout == "block_diagonal" else view.count
        flips = (addresses.sign_words(view, count, values.device)[:, None] << addresses.lanes(values.device)) & _SIGN
        flips = flips.view(-1)[:count]
        flips = flips.repeat(view.count // count) if count != view.count else flips
        size = values.element_size()
        word = _SIGNED[size]
        if size != 4:
            flips = flips.to(word) << 32 if size == 8 else (flips >> 32 - 8 * size).to(word)
        return (values.contiguous().view(word) ^ flips).view(values.dtype)
