"""The itemised count: every number in a transformed model, and every byte of its file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from fxrpg.assemble import plan_of, views_in
from fxrpg.checkpoint import file_size
from fxrpg.digest import DIGEST
from fxrpg.header import pruned_states
from fxrpg.owner import SCALE, tensor_at
from fxrpg.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What a transformed model is made of.

    Args:
        dof: free numbers that generate weights, of a pruned state those that are left; of a PEMN mask the values of its
            prototype, which a seed stands for.
        generated: weights generated from them, none of them stored.
        dense: other parameters, stored as they are (frozen ones included).
        trainable: numbers that require gradients: states (for masks a score a weight) and dense parameters.
        frozen: dense parameters that do not.
        mask_bits: trained bits of masks, one a weight (none for a ring or a basis).
        scales: fixed numbers, one a weight tensor.
        buffers: numbers in the model's own persistent buffers.
        padding: positions of the ring's address space that no weight fills (the ends of last blocks).
        bytes_stored: size of the file that `fxrpg.save` writes (on the meta device without the digits of unknown scales).
        bytes_resident: bytes of all parameters and buffers in memory.
    """

    dof: int
    generated: int
    dense: int
    trainable: int
    frozen: int
    mask_bits: int
    scales: int
    buffers: int
    padding: int
    bytes_stored: int
    bytes_resident: int

    @property
    def ratio(self) -> float:
        """Generated weights per degree of freedom; infinite where all numbers of a pruned state are zero."""
        return self.generated / self.dof if self.dof else math.inf

    def __str__(self) -> str:
        rows = [
            ["degrees of freedom", self.dof, f"{self.ratio:,.4f} generated weights each"],
            ["generated weights", self.generated, "never stored"],
            ["dense parameters", self.dense, f"{self.frozen:,} of them frozen" if self.frozen else ""],
            ["trainable in all", self.trainable, "numbers with a gradient: states, for masks their scores, and dense"],
            ["mask bits", self.mask_bits, "what masks come to once they are frozen" if self.mask_bits else ""],
            ["scales", self.scales, "fixed, one a weight tensor"],
            ["buffers", self.buffers, "numbers in the model's own buffers"],
            ["padding", self.padding, "unused positions at the ends of last blocks"],
            ["bytes stored", self.bytes_stored, "the file that fxrpg.save writes"],
            ["bytes resident", self.bytes_resident, "parameters and buffers in memory"],
        ]
        return tabulate(rows, intfmt=",", colalign=("left", "right", "left"))


def ledger(model: nn.Module) -> Ledger:
    """Count everything in a transformed `model`.

    Raises:
        FxrpgError: `model` is not transformed.
    """
    plan = plan_of(model)
    states = set(plan.states)
    own = {*states, SCALE, DIGEST}
    parameters = [p for name, p in model.named_parameters() if name not in own]
    dense, frozen = (sum(p.numel() for p in parameters if not (only and p.requires_grad)) for only in (False, True))
    saved = {id(t): t for name, t in model.state_dict(keep_vars=True).items() if name not in own}
    buffers = [t for t in saved.values() if not isinstance(t, nn.Parameter)]
    resident = {id(t): t for t in (*model.parameters(), *model.buffers())}
    masked = [view for name, view in views_in(model).items() if plan.scope(name).generator.masks]
    pruned = _pruned(model, plan)
    return Ledger(
        dof=plan.size - pruned,
        generated=sum(view.count for view in views_in(model).values()),
        dense=dense,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) - pruned,
        frozen=frozen,
        mask_bits=sum(view.count for view in masked),
        scales=len(plan.views),
        buffers=sum(t.numel() for t in buffers),
        padding=plan.padding,
        bytes_stored=file_size(model),
        bytes_resident=sum(t.nbytes for t in resident.values()),
    )


def _pruned(model: nn.Module, plan: Plan) -> int:
    """Numbers of pruned states that are zero for good."""
    held = [tensor_at(model, state) for state in pruned_states(plan)]
    return sum(int((state == 0).sum()) for state in held if not state.is_meta)
