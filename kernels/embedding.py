"""Embedding tables."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.dispatch import Problem
from fxrpg.errors import FxrpgError
from fxrpg.lowering import Generated, NotLowered, compiles, lowers
from fxrpg.parts import part_of
from fxrpg.roles import embedding_role
from fxrpg.staging import DenseOp, define_staged_op
from fxrpg.view import View

aten = torch.ops.aten
_INDICES = (torch.int32, torch.int64)


def embedding_ref(index: Tensor, weight: Tensor, bias: None, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """Rows of `weight` [num, dim] at the integer tensor `index` of any shape."""
    return F.embedding(index, weight, None if padding_idx < 0 else padding_idx, scale_grad_by_freq=scale_grad_by_freq)


def embedding_weight_grad(
    grad: Tensor, xs: tuple[Tensor], shape: tuple[int, ...], padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    return aten.embedding_dense_backward.default(grad, xs[0], shape[0], padding_idx, scale_grad_by_freq)


def embedding_problem(
    direction: str, xs: tuple[Tensor], view: View, dtype: torch.dtype, padding_idx: int, scale_grad_by_freq: bool
) -> Problem | str:
    """The op as `dispatch.choose` takes it."""
    if xs[0].dtype not in _INDICES:
        return f"indices are {xs[0].dtype}"
    if not xs[0].numel():
        return "an empty batch"
    if view.order != (0, 1):
        return "the weight is no table in rows"
    sides = {"outputs": view.shape[1], "positions": xs[0].numel(), "terms": 1}
    return Problem(op="embedding", direction=direction, **sides, weights=view.count, step=64, dtype=dtype)


define_staged_op(
    DenseOp(
        name="embedding",
        inputs=("index",),
        config="int padding_idx, bool scale_grad_by_freq",
        forward=embedding_ref,
        weight_grad=embedding_weight_grad,
        fused="fxrpg.kernels.fused.embedding_op",
        problem=embedding_problem,
        autocast="state",
    )
)


@lowers(F.embedding, role=embedding_role)
def embedding(
    input: Any,
    weight: Generated,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None:
        fix = "Leave the table dense with a Rule."
        raise FxrpgError("embedding", "a generated table is read-only", "max_norm, which rewrites it in place", fix)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    # A sparse gradient of the table has no use: the state's is dense.
    config = (-1 if padding_idx is None else padding_idx, scale_grad_by_freq)
    return torch.ops.fxrpg.embedding.default(input, None, *weight[:3], *config)


@lowers(aten.embedding.default, position=0, role=embedding_role)
def aten_embedding(
    weight: Generated, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    return torch.ops.fxrpg.embedding.default(indices, None, *weight[:3], padding_idx, scale_grad_by_freq)


@lowers(Tensor.__getitem__, position=0)
def rows(weight: Generated, index: Any) -> Any:
    """W[index] for an index tensor: rows of a table, or of a stack of them."""
    if not isinstance(index, Tensor) or index.dtype not in _INDICES or not index.dim():
        raise NotLowered("indexing is lowered for one tensor of integers")
    return _picked(weight, torch.where(index < 0, index + weight.shape[0], index))


def _picked(weight: Generated, index: Any) -> Any:
    """What belongs to each index of `index`, from 0 on: [*index, ...]."""
    table = weight
    if len(weight.shape) != 2:  # rows are all that belongs to one index
        num, dim = weight.shape[0], prod(weight.shape[1:])
        part = part_of(View.parse(weight.view), (num, dim), (dim, 1), 0)
        if part is None:
            raise NotLowered("indexing is lowered where what belongs to one index lies together")
        table = Generated.of(weight.state, weight.scale, part.text)
    found = torch.ops.fxrpg.embedding.default(index, None, *table[:3], -1, False)
    return found if table is weight else found.unflatten(-1, weight.shape[1:])


@lowers(torch.index_select, Tensor.index_select, position=0, keyword="input")
def index_select(weight: Generated, dim: int, index: Any) -> Any:
    if dim % len(weight.shape) or index.dim() != 1:
        raise NotLowered("index_select is lowered for rows")
    return _picked(weight, index)


@compiles(nn.Embedding)
def embedding_layer(layer: nn.Embedding, weight: Generated, input: Tensor) -> Tensor:
    return embedding(input, weight, layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq)
