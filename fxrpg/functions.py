"""Torch's functions as a handle sees them: which read metadata, which only rearrange, which write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Step = Callable[[Tensor], Any]


@functools.lru_cache(maxsize=4096)
def writes(func: Any) -> bool:
    """Whether `func` changes its first argument, by torch's own convention: a trailing underscore."""
    name = getattr(func, "__name__", "")
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))


def rearrangement(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Step | None:
    """What `func` does to a tensor on `device`, given the other arguments, if it only changes layout or type."""
    if func in _CASTS:
        target, dtype = _cast_target(func, args, kwargs)
        same_place = target is None or torch.device(target).type == device.type
        return (lambda w: w.to(dtype) if dtype else w) if same_place else None
    if func is Tensor.__getitem__:
        args = pytree.tree_map_only(Tensor, _as_number, args)
    if func not in _REARRANGEMENTS or any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs))):
        return None
    return lambda w: func(w, *args, **kwargs)


def _as_number(index: Tensor) -> Any:
    """An index of one integer selects, as torch has it; any other stays."""
    number = index.dim() == 0 and index.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    return int(index) if number and not (index.is_meta or torch._C._functorch.is_batchedtensor(index)) else index


def _cast_target(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, torch.dtype | None]:
    if func in _CAST_DTYPES:
        return None, _CAST_DTYPES[func]
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return other.device, other.dtype
    return torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})[:2]


def _functions(names: str) -> set[Any]:
    """The functions `torch.<name>` and methods `Tensor.<name>` that exist."""
    return {getattr(place, name) for name in names.split() for place in (torch, Tensor) if hasattr(place, name)}


def _getters(names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names.split() if hasattr(Tensor, name)}


METADATA = _functions(
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point is_complex"
    " is_signed is_inference get_device dim_order __len__ __hash__"
) | _getters(
    "shape dtype device ndim layout names itemsize nbytes is_cuda is_cpu is_meta is_sparse is_sparse_csr is_quantized"
    " is_mkldnn is_mps is_xpu is_nested _base _version output_nr retains_grad"
)

# What autograd knows of a tensor.
REQUIRES_GRAD = _getters("requires_grad")
GRAD, IS_LEAF = _getters("grad"), _getters("is_leaf")
RECORD = _getters("is_leaf grad_fn")
METADATA |= RECORD

_REARRANGEMENTS = _functions(
    "__getitem__ adjoint as_strided broadcast_to chunk contiguous detach diagonal dsplit expand expand_as flatten hsplit"
    " moveaxis movedim narrow permute positive ravel reshape reshape_as select split split_with_sizes squeeze swapaxes"
    " swapdims t tensor_split transpose unbind unflatten unfold unsqueeze unsafe_chunk unsafe_split view view_as vsplit"
) | _getters("T mT H mH data")

_CAST_DTYPES = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
_CASTS = {Tensor.to, Tensor.type_as, *_CAST_DTYPES}

_INPLACE = "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul"
_WRITES = {"__setitem__", "__set__", "__delete__", "register_hook", "retain_grad", "backward"}
_WRITES |= {f"__i{op}__" for op in _INPLACE.split()}
