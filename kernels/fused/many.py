"""Many small weights in one launch: programs find their weight in a table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.device import kept, settled
from fxrpg.kernels.fused.generate import form_on, generate_into, is_logical, layer_scale, layout_of, place_of
from fxrpg.kernels.fused.launch import cdiv, launch, padded
from fxrpg.tiles.rounding import cast
from fxrpg.view import Form, View

BLOCK = 1024
"""Elements a program writes."""
FIELDS = 8
"""Numbers in a row of the table, besides where the weight's own arguments begin."""
ALIGNED = 64
"""Weights begin at multiples of so many elements of the workspace."""
MOST = 1 << 30
"""Weights of so many elements or more have a launch of their own, with places computed in 64 bits."""


@triton.jit
def own_args(args, first, SHARED: tl.constexpr):
    """A form's arguments, those that are not shared moved on to where this weight's begin."""
    found = ()
    for i in tl.static_range(len(SHARED)):
        own = args[i] if SHARED[i] else args[i] + tl.load(first + i)
        found = found + (own,)  # type: ignore[assignment] # noqa: RUF005, Triton has no starred expressions
    return found


@triton.jit
def generate_many_kernel(
    out, scale, layers,
    BEGIN: tl.constexpr, TILE: tl.constexpr, args, SPEC: tl.constexpr, SHARED: tl.constexpr, FLAT: tl.constexpr,
    LOGICAL: tl.constexpr, SCALED: tl.constexpr, LAYERS: tl.constexpr,
    FIELDS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A run of one row of one of the weights.

    Args:
        layers: int64, as `_table` lays it out.
    """
    program = tl.program_id(0)
    layer = tl.sum((tl.load(layers + tl.arange(0, LAYERS)) <= program).to(tl.int32), 0) - 1
    numbers = layers + LAYERS + layer * (FIELDS + len(SHARED))
    program -= tl.load(layers + layer).to(tl.int32)
    offset, slot = tl.load(numbers) * ALIGNED, tl.load(numbers + 1)
    columns = tl.load(numbers + 2).to(tl.int32)
    across = tl.cdiv(columns, BLOCK)
    row, col0 = program // across, program % across * BLOCK
    form = BEGIN(own_args(args, numbers + FIELDS, SHARED), SPEC)
    value = TILE(row + tl.arange(0, 1), col0, BLOCK, form, SPEC, out.dtype.element_ty)  # [1, BLOCK]
    if SCALED:
        value = cast(value.to(tl.float32) * layer_scale(scale, slot), out.dtype.element_ty)
    column = col0 + tl.arange(0, BLOCK)
    where = column if FLAT else row * columns + column
    if not LOGICAL:
        fan_in, inner = tl.load(numbers + 3).to(tl.int32), tl.load(numbers + 4).to(tl.int32)
        where = place_of(where, fan_in, inner, tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7))
    # padding may be written over: the compiler then sees whole vectors
    limit = tl.cdiv(columns, ALIGNED) * ALIGNED if FLAT and LOGICAL else columns
    tl.store(out + offset + where, tl.reshape(value, (BLOCK,)), mask=column < limit)


class Placed(NamedTuple):
    """A view, its form, and the weight's place in the workspace."""

    view: View
    form: Form
    weight: Tensor


def generate_many(
    views: Sequence[View], state: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> list[Tensor] | None:
    """The weights of views that share a state, each bit-equal to what `generate` makes of it.

    Returns:
        Contiguous tensors that are views of one workspace, made by one launch for all views whose kernels do not differ;
        None where torch has to make one of them, as for `generate`.
    """
    if torch.float64 in (dtype, state.dtype):
        return None
    read: dict[object, Tensor] = {}  # one tensor for all views that read the state alike
    for view in views:
        if (view.generator, view.size) not in read:
            read[view.generator, view.size] = view.generator.kernel_state(state, view)
    forms = [form_on(view, read[view.generator, view.size], dtype) for view in views]
    extents = [cdiv(view.count, ALIGNED) * ALIGNED for view in views]
    *offsets, total = itertools.accumulate(extents, initial=0)
    workspace = torch.empty(total, dtype=dtype, device=state.device)
    groups: dict[object, list[Placed]] = {}
    weights = []
    for view, form, offset in zip(views, forms, offsets, strict=True):
        if form is None:
            return None
        weights.append(workspace[offset : offset + view.count].view(view.shape))
        if view.count >= MOST:
            generate_into(weights[-1], form, view, scale)
        else:
            groups.setdefault(_kind(form, weights[-1], view), []).append(Placed(view, form, weights[-1]))
    for group in groups.values():
        _generate_group(workspace, group, scale)
    return weights


def _kind(form: Form, weight: Tensor, view: View) -> object:
    """What weights written by one launch have in common."""
    shared = tuple(arg.data_ptr() for arg in form.args if arg.dtype != torch.int64)
    return form.begin, form.tile, form.spec, len(form.args), shared, is_logical(weight, view)


def _generate_group(workspace: Tensor, group: list[Placed], scale: Tensor | None) -> None:
    form, columns = group[0].form, list(zip(*(placed.form.args for placed in group), strict=True))
    shared = tuple(args[0].dtype != torch.int64 for args in columns)
    args = tuple(own[0] if same else torch.cat(own) for same, own in zip(shared, columns, strict=True))
    lengths = tuple(
        tuple(0 if same else len(arg) for same, arg in zip(shared, p.form.args, strict=True)) for p in group
    )
    places = tuple(placed.weight.storage_offset() // ALIGNED for placed in group)
    texts = tuple(placed.view.text for placed in group)
    layers, programs = _table(texts, places, lengths, form.spec.flat, workspace.device)
    view, weight = group[0].view, group[0].weight
    launch(
        generate_many_kernel, (programs,), workspace, workspace, args[0] if scale is None else scale, layers,
        BEGIN=form.begin, TILE=form.tile, args=args, SPEC=form.spec, SHARED=shared, FLAT=form.spec.flat,
        LOGICAL=is_logical(weight, view), SCALED=scale is not None, LAYERS=padded(len(group), 1),
        FIELDS=FIELDS, ALIGNED=ALIGNED, BLOCK=BLOCK,
    )  # fmt: skip


@kept(256)
def _table(
    texts: tuple[str, ...],
    places: tuple[int, ...],
    lengths: tuple[tuple[int, ...], ...],
    flat: bool,
    device: torch.device,
) -> tuple[Tensor, int]:
    """(int64 numbers, programs in all): the first program of each weight, padded to a power of two, then a row for each.

    Args:
        places: of the weights, in ALIGNED elements.
        lengths: of their arguments in the concatenated ones.
        flat: whether a weight may be seen as one row.
    """
    rows, firsts, programs = [], [], 0
    starts = [itertools.accumulate(column, initial=0) for column in zip(*lengths, strict=True)]
    for text, place, *own in zip(texts, places, *starts, strict=False):
        view = View.parse(text)
        columns = view.count if flat else view.fan_in
        inner, *strides = layout_of(torch.empty(view.shape, device="meta"), view)
        rows.append([place, view.tensor, columns, view.fan_in, inner, *strides, *own])
        firsts.append(programs)
        programs += cdiv(columns, BLOCK) * (view.count // columns)
    firsts += [1 << 62] * (padded(len(firsts), 1) - len(firsts))
    numbers = [*firsts, *itertools.chain.from_iterable(rows)]
    return settled(torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device)), programs
