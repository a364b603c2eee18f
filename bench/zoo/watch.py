"""Watchers that look at ops from outside: which parameters a model consumes as weights, what is kept for backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxrpg.handle import Handle

_SECOND, _ALL = slice(1, 2), slice(None)
WEIGHTS: dict[str, slice] = {
    **dict.fromkeys(("linear", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d", "convolution"), _SECOND),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _SECOND),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "_grouped_mm", "grouped_mm"), _ALL),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), slice(1, None)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"), _ALL),
    **dict.fromkeys(("rnn_relu_cell", "multi_head_attention_forward"), _ALL),
    "bilinear": slice(2, 3),
}
"""Which positional arguments of an op may be its weight; a keyword argument may be too, unless it is called bias."""
TABLES = ("__getitem__", "index_select")
"""Ops that read rows of a table, where the index is a tensor."""


class Flow(TorchFunctionMode):
    """Follows weights through views, slices, casts, and all that is computed from parameters and buffers alone.

    Args:
        sources: the weights by name.
        model: whose parameters and buffers are no data.
    """

    def __init__(self, sources: Mapping[str, Tensor], model: nn.Module) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, frozenset[str]]] = {}
        """Address of a storage -> (a tensor that keeps it alive, names of the weights that it shows)."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.mark(tensor, frozenset())
        for name, tensor in sources.items():
            self.mark(tensor, frozenset({name}))

    def mark(self, tensor: Tensor, names: frozenset[str]) -> None:
        held = self.known.get(address := _address(tensor), (tensor, frozenset[str]()))
        self.known[address] = held[0], held[1] | names

    def shown(self, tensor: Tensor) -> frozenset[str] | None:
        """Names of the weights of which `tensor` is a view or a form; None if it is data."""
        if isinstance(tensor, Handle):
            return frozenset({tensor.weight_name})
        found = self.known.get(_address(tensor))
        return found and found[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see(getattr(func, "__name__", ""), args, kwargs)
        out = func(*args, **kwargs)
        self._follow(getattr(func, "__name__", ""), args, kwargs, out)
        return out

    def see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """What a subclass does with each call."""

    def _follow(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        given = [(x, self.shown(x)) for x in _tensors((args, kwargs))]
        if not given or any(names is None for _, names in given):
            return
        joined = name in ("cat", "concat", "stack")
        for x in _tensors(out):
            if not isinstance(x, Handle) and self.shown(x) is None:
                alike = (names for y, names in given if names and (joined or y.numel() == x.numel()))
                self.mark(x, frozenset[str]().union(*alike))


class Consumed(Flow):
    """Which parameters of two dimensions or more reach an op as its weight.

    A parametrization's original is followed through it: what a norm or a standardisation makes of one weight is that weight.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__({name: p for name, p in model.named_parameters() if p.dim() >= 2}, model)
        self.names: set[str] = set()

    def see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name in TABLES and any(not x.is_floating_point() for x in _tensors((args[1:], kwargs))):
            found: Any = args[:1]
        elif name in WEIGHTS:
            found = args[WEIGHTS[name]], {key: value for key, value in kwargs.items() if "bias" not in key}
        else:
            return
        for x in _tensors(found):
            self.names |= self.shown(x) or frozenset()


class Saved(Flow):
    """What autograd keeps of generated weights.

    Args:
        weights: name -> the generated weights, in full.
        model: whose own parameters and buffers are there anyway.
    """

    FEWEST = 8
    """Different values: fewer, such as the zeros behind a ReLU and of a mask, may be the same by chance."""

    def __init__(self, weights: Mapping[str, Tensor], model: nn.Module) -> None:
        super().__init__({}, model)
        self.weights = {name: w.detach() for name, w in weights.items() if w.numel() >= self.FEWEST}
        self.own = set(self.known)
        self.generated: dict[str, str] = {}
        """Weight -> what was kept of it."""
        self.derived: set[str] = set()
        """Weights of which the model's own code made something that was kept."""

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if tensor.layout == torch.strided and _address(tensor) not in self.own and tensor.numel() >= self.FEWEST:
                self._look(tensor)
        return tensor

    def _look(self, tensor: Tensor) -> None:
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
        flat = tensor.detach().permute(order).reshape(-1)  # as it lies in memory: what is kept may be a transpose
        for name, weight in self.weights.items():
            if weight.dtype == flat.dtype and _holds(weight, flat) and len(flat.unique()) >= self.FEWEST:
                self.generated[name] = f"{tuple(tensor.shape)} of its {tuple(weight.shape)}"
                return
        self.derived |= self.shown(tensor) or frozenset()


def _holds(weight: Tensor, flat: Tensor) -> bool:
    """Whether `flat` is the weight in any order of its elements, or one of equal slices of it."""
    if weight.numel() % flat.numel():
        return False
    rows, pivot = weight.reshape(-1, flat.numel()), flat.abs().argmax()
    for row in (rows[:, pivot] == flat[pivot]).nonzero().flatten().tolist():
        if torch.equal(rows[row], flat):
            return True
    if len(rows) > 1 or weight.abs().max() != flat.abs().max():
        return False
    return torch.equal(weight.reshape(-1).sort()[0], flat.sort()[0])


def _address(tensor: Tensor) -> int:
    """Of the storage; of a tensor without one (a handle), of itself."""
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage().data_ptr() or id(tensor)
        except (NotImplementedError, RuntimeError):
            return id(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    with torch._C.DisableTorchFunction():
        return iter([x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)])
