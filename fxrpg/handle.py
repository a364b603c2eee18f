"""The handle: a generated weight that generates only when an op consumes it.

It goes through a lowering where there is a rule, else through the ordinary op on a materialized weight. Both keep one
promise: neither a generated weight nor an alias of it is saved for backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxrpg.errors import FxrpgError
from fxrpg.lowering import LOWERINGS, Generated, NotLowered, current_mode, generate_weight

Step = Callable[[Tensor], Any]


class Use(NamedTuple):
    """How an op last consumed a generated weight."""

    way: str
    path: str
    reason: str


class Trace:
    """What becomes of a model's generated weights: name -> consuming op -> its last use."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.seen: dict[str, dict[str, Use]] = {}

    def note(self, name: str, path: str, op: str, reason: str = "", way: str = "handle") -> None:
        """Record one consumption. In strict mode a weight that was not lowered raises."""
        self.seen.setdefault(name, {})[op] = Use(way, path, reason)
        if self.strict and path == "materialized":
            raise FxrpgError(
                name,
                f"{op} needs a lowering to consume a generated weight (strict=True)",
                reason,
                f'Transform with strict=False to materialize it, or leave it dense with Rule("{name}", "dense").',
            )


class Handle(Tensor):
    """A generated weight that has not been generated: its metadata, and how to produce it.

    `chain` holds the layout and type changes made so far (`.t()`, `.view(...)`, `.to(dtype)`): they are replayed each time
    an op consumes the handle. `aliasing` says that none of them has moved an element.
    """

    generated: Generated
    weight_name: str
    weight_trace: Trace
    chain: tuple[Step, ...]
    aliasing: bool
    differentiable: bool

    @staticmethod
    def __new__(
        cls,
        generated: Generated,
        name: str,
        trace: Trace,
        chain: tuple[Step, ...] = (),
        like: Tensor | None = None,
        aliasing: bool = True,
    ) -> Handle:
        state = generated.state
        like = torch.empty(generated.shape, dtype=state.dtype, device="meta") if like is None else like
        handle = Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), dtype=like.dtype, device=state.device
        )
        handle.generated, handle.weight_name, handle.weight_trace = generated, name, trace
        handle.chain, handle.aliasing = chain, aliasing
        # like a view of a parameter, a step taken without gradients leads none back
        handle.differentiable = like.requires_grad and torch.is_grad_enabled() if chain else state.requires_grad
        return handle

    def rearranged(self, step: Step) -> Any:
        """The handle (or handles) after one more layout or type change. Runs it on the meta device to learn the shape."""
        size, stride, dtype = self._geometry()
        stand_in = torch.empty_strided(size, stride, dtype=dtype, device="meta", requires_grad=self.differentiable)
        result = step(stand_in)
        if isinstance(result, Tensor):
            return self._after(step, result, stand_in)
        parts = [self._after(_part(step, i), part, stand_in) for i, part in enumerate(result)]
        return type(result)(parts)

    def _after(self, step: Step, result: Tensor, stand_in: Tensor) -> Handle:
        aliasing = self.aliasing and _storage(result) == _storage(stand_in)
        return Handle(self.generated, self.weight_name, self.weight_trace, (*self.chain, step), result, aliasing)

    def _geometry(self) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
        with torch._C.DisableTorchFunctionSubclass():
            return self.size(), self.stride(), self.dtype

    def as_weight(self) -> Generated:
        """The weight as a rule takes it: as it is, or transposed. Raises NotLowered after any other change."""
        if not self.chain:
            return self.generated
        state = self.generated.state
        size, stride, dtype = self._geometry()
        detached = state.requires_grad and not self.differentiable
        whole = torch.empty(self.generated.shape, device="meta")
        if self.aliasing and not detached and dtype == state.dtype:
            if (size, stride) == (whole.size(), whole.stride()):
                return self.generated
            if whole.dim() == 2 and (size, stride) == (whole.t().size(), whole.t().stride()):
                return Generated.of(*self.generated[:3], transposed=True)
        raise NotLowered("the weight was rearranged, cast or detached on the way")

    def produce(self) -> Tensor:
        """The weight itself, on autograd's record, with the chain replayed."""
        weight = _replay(torch.ops.fxrpg.generate.default(*self.generated[:3]), self.chain)
        return weight if self.differentiable else weight.detach()  # the chain may have been made without gradients

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        size, _stride, dtype = self._geometry()
        return f"Handle({self.weight_name!r}, shape={tuple(size)}, dtype={dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.produce().detach()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _REQUIRES_GRAD:
            return args[0].differentiable
        _refuse_write(func, args, kwargs)
        if (step := _rearrangement(func, args, kwargs)) is not None:
            with contextlib.suppress(NotImplementedError):  # what the meta device cannot do
                return args[0].rearranged(step)
        return consume(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached only below autograd, where a gradient would be lost without a word."""
        handles = _handles((args, kwargs))
        if torch.is_grad_enabled() and any(h.differentiable for h in handles):
            raise FxrpgError(
                handles[0].weight_name,
                f"{func} must meet a generated weight through torch's function dispatch",
                "a call that bypasses it, which would lose the gradient",
                f'Leave the weight dense with Rule("{handles[0].weight_name}", "dense").',
            )
        for handle in handles:
            handle.weight_trace.note(
                handle.weight_name, "materialized", str(func), "called below torch's function dispatch"
            )
        args, kwargs = pytree.tree_map_only(Handle, Handle.produce, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def handle_of(state: Any, scale: Any, view: str, name: str) -> Any:
    """A handle on a view, for the nodes of a graph that no lowering covers. In compiled code, the generated tensor."""
    if isinstance(state, torch.fx.Proxy):  # a graph module is traced anew when it is unpickled
        return state.tracer.create_proxy("call_function", handle_of, (state, scale, view, name), {})
    if torch.compiler.is_compiling():
        return torch.ops.fxrpg.generate.default(state, scale, view)
    return Handle(Generated.of(state, scale, view), name, Trace())


def consume(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on arguments that hold handles: lowered if a rule covers the call, else on materialized weights."""
    handles = _handles((args, kwargs))
    op = getattr(func, "__name__", str(func))
    try:
        out, weight = _lowered(func, args, kwargs)
    except NotLowered as reason:
        for handle in handles:
            handle.weight_trace.note(handle.weight_name, "materialized", op, str(reason))
        return _materialized(func, args, kwargs, handles)
    for handle in handles:
        if handle is weight:
            handle.weight_trace.note(handle.weight_name, "staged", op)
        else:
            handle.weight_trace.note(handle.weight_name, "materialized", op, "stands beside the op's weight")
    return out


def _lowered(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Handle]:
    """`func` through its rule, and the handle that was its weight. Raises NotLowered where no rule covers the call."""
    rule = LOWERINGS.get(func)
    if rule is None:
        raise NotLowered("no lowering for this op")
    if current_mode() == "materialized":
        raise NotLowered("lowering_mode('materialized')")
    weight = args[rule.position] if len(args) > rule.position else kwargs.get(rule.keyword)
    if not isinstance(weight, Handle):
        raise NotLowered(f"the generated tensor is not the op's argument {rule.keyword!r}")
    generated = weight.as_weight()
    if generated.transposed and not rule.transposable:
        raise NotLowered("the weight was transposed on the way")
    rest = [generated if i == rule.position else _replace_handles(arg, Handle.produce) for i, arg in enumerate(args)]
    named = {k: generated if v is weight else _replace_handles(v, Handle.produce) for k, v in kwargs.items()}
    return rule.call(*rest, **named), weight


def _materialized(func: Any, args: Any, kwargs: dict[str, Any], handles: list[Handle]) -> Any:
    """Run `func` on the full weights; what autograd saves of them is a recipe, and backward generates again."""
    weights = {id(handle): handle.produce() for handle in handles}
    args, kwargs = _replace_handles((args, kwargs), lambda h: weights[id(h)])
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return func(*args, **kwargs)
    hooks = _Recipes({_storage(weights[id(handle)]): handle for handle in handles})
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        return func(*args, **kwargs)


class _Recipes:
    """Saved-tensor hooks that keep a recipe in place of any alias of a generated weight.

    Other tensors go to the hooks that were in force outside (activation checkpointing, offloading), or are kept.
    """

    def __init__(self, handles: dict[int, Handle]) -> None:
        self.handles = handles
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(self, tensor: Tensor) -> tuple[str, Any]:
        handle = self.handles.get(_storage(tensor)) if tensor.layout == torch.strided else None
        if handle is None:
            return ("outer", self.outer[0](tensor)) if self.outer else ("kept", tensor)
        geometry = tensor.size(), tensor.stride(), tensor.storage_offset()
        return "recipe", (handle.generated, handle.weight_name, handle.chain, handle.generated.state._version, geometry)

    def unpack(self, packed: tuple[str, Any]) -> Tensor:
        kind, content = packed
        if kind != "recipe":
            return self.outer[1](content) if kind == "outer" else content
        generated, name, chain, version, geometry = content
        if generated.state._version != version:
            raise RuntimeError(
                f"{name}: its generator's state was changed in place (an optimizer step?) between forward and backward, "
                "so the weight that backward needs is gone. Run backward before the step."
            )
        with torch.no_grad():
            return _replay(generate_weight(*generated[:3]), chain).as_strided(*geometry)


def _part(step: Step, i: int) -> Step:
    return lambda weight: step(weight)[i]


def _replay(weight: Tensor, chain: tuple[Step, ...]) -> Tensor:
    for step in chain:
        weight = step(weight)
    return weight


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _handles(tree: Any) -> list[Handle]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Handle)]


def _replace_handles(tree: Any, produce: Callable[[Handle], Any]) -> Any:
    return pytree.tree_map_only(Handle, produce, tree)


def _refuse_write(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """An in-place write to a generated weight would be lost, so it raises."""
    name = getattr(func, "__name__", "")
    writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    first = args[:1] or [kwargs.get(key) for key in ("tensor", "input", "self")]
    target = _handles((first if writes else (), kwargs.get("out")))
    if target:
        raise FxrpgError(
            target[0].weight_name,
            "a generated weight is read-only: it is computed from the generator's state",
            f"a call of {name!r} on it",
            f'Train or set the state instead, or leave the weight dense with Rule("{target[0].weight_name}", "dense").',
        )


_WRITES = {"__setitem__", "__set__", "__delete__", "register_hook", "retain_grad", "backward"} | {
    f"__i{op}__"
    for op in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]
}


def _rearrangement(func: Any, args: Any, kwargs: dict[str, Any]) -> Step | None:
    """The step that `func` adds to its first argument's chain, if it only changes layout or type."""
    if not args or not isinstance(args[0], Handle):
        return None
    handle, rest = args[0], args[1:]
    if func in _CASTS:
        device, dtype = _cast_target(func, rest, kwargs)
        same_place = device is None or torch.device(device).type == handle.generated.state.device.type
        return (lambda w: w.to(dtype) if dtype else w) if same_place else None
    if func not in _REARRANGEMENTS or any(isinstance(x, Tensor) for x in pytree.tree_leaves((rest, kwargs))):
        return None
    return lambda w: func(w, *rest, **kwargs)


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
    " is_mkldnn is_mps is_xpu is_nested is_leaf grad_fn grad _base _version output_nr retains_grad"
)

_REQUIRES_GRAD = _getters("requires_grad")

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
