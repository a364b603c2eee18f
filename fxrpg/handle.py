"""The handle: a generated weight that generates only when an op consumes it.

It goes through a lowering where there is a rule, else through the ordinary op on a materialized weight. Both keep one
promise: neither a generated weight nor an alias of it is saved for backward.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxrpg.dispatch import choices
from fxrpg.errors import FxrpgError
from fxrpg.functions import GRAD, IS_LEAF, RECORD, REQUIRES_GRAD, Step, rearrangement, writes
from fxrpg.geometry import ADDRESSES, ASKED, ASKS_FOR_GRAD, CONSTANTS, Geometry, shapes_only
from fxrpg.lowering import DECOMPOSITIONS, Generated, NotLowered, Rule, current_mode, rule_for, transforming
from fxrpg.parts import part_of
from fxrpg.recipes import Recipe, Recipes, storage_of
from fxrpg.shares import local
from fxrpg.surroundings import compiled_elsewhere, keep_mode
from fxrpg.trace import Trace
from fxrpg.view import View
from fxrpg.weights import generate_weight, weight_dtype


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep Dynamo from compiling `function`, and what it calls, after a graph break. Does not import Dynamo by itself."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules or not torch._C._dynamo.eval_frame.get_eval_frame_callback():
            return function(*args, **kwargs)  # Dynamo looks at no frame here
        if not disabled:
            disabled.append(torch._dynamo.disable(function))
        return disabled[0](*args, **kwargs)

    return run


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
    leaf: bool = False
    """Whether it is detached from the state and gathers a gradient of its own, as a full weight."""

    @staticmethod
    @not_compiled
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
        dtype = weight_dtype(state, generated.scale)
        like = torch.empty(generated.shape, dtype=dtype, device="meta") if like is None else like
        handle = Tensor._make_wrapper_subclass(
            cls, like.size(), strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            device=state.device,
        )  # fmt: skip
        handle.generated, handle.weight_name, handle.weight_trace = generated, name, trace
        handle.chain, handle.aliasing = chain, aliasing
        # like a view of a parameter, a step taken without gradients leads none back
        handle.differentiable = like.requires_grad and torch.is_grad_enabled() if chain else state.requires_grad
        return handle

    def rearranged(self, step: Step) -> Any:
        """The handle (or handles) after one more layout or type change. Runs it on the meta device to learn the shape."""
        stand_in = Geometry.of(self).stand_in(self.differentiable)
        result = step(stand_in)
        if isinstance(result, Tensor):
            return self._after(step, result, stand_in)
        parts = [self._after(_part(step, i), part, stand_in) for i, part in enumerate(result)]
        return type(result)(parts)

    def _after(self, step: Step, result: Tensor, stand_in: Tensor) -> Handle:
        aliasing = self.aliasing and storage_of(result) == storage_of(stand_in)
        return Handle(
            self.generated, self.weight_name, self.weight_trace, (*self.chain, step), result, aliasing
        ).attached()

    def as_weight(self, transposable: bool) -> Generated:
        """The weight as a rule takes it: as it is, transposed, or a part. Raises NotLowered after any other change."""
        if not self.chain:
            return self.generated
        state, scale, text = self.generated[:3]
        size, stride, offset, dtype = Geometry.of(self)
        detached = state.requires_grad and not self.differentiable and torch.is_grad_enabled()
        if self.aliasing and not detached and dtype == weight_dtype(state, scale):
            view = View.parse(text)
            whole = torch.empty(view.shape, device="meta")
            if (size, stride) == (whole.size(), whole.stride()):
                return self.generated
            if transposable and whole.dim() == 2 and (size, stride) == (whole.t().size(), whole.t().stride()):
                return Generated.of(state, scale, text, transposed=True)
            if part := part_of(view, tuple(size), tuple(stride), offset):
                return Generated.of(state, scale, part.text)
        raise NotLowered("the weight was rearranged, cast or detached on the way")

    def attached(self) -> Handle:
        """This handle on autograd's record, for code that takes it past torch's function dispatch (an autograd.Function).

        Ops that meet it there never look at this record: they generate from the state, which has its own.
        """
        if not (self.differentiable and torch.is_grad_enabled()) or transforming():
            return self
        state, scale, text = self.generated[:3]
        handle = _Attach.apply(local(state, text, self.weight_name), scale, self)
        return handle if isinstance(handle, Handle) else self

    def recipe(self) -> Recipe:
        """How to produce the weight again, without autograd."""
        (state, scale, text), chain = self.generated[:3], self.chain
        state = local(state, text, self.weight_name)
        return Recipe(lambda: _replay(generate_weight(state, scale, text), chain), state, self.weight_name)

    def produce(self) -> Tensor:
        """The weight itself, on autograd's record, with the chain replayed."""
        weight = _replay(torch.ops.fxrpg.generate.default(*self.generated[:3]), self.chain)
        # a chain that was made without gradients leads none back
        return weight.detach() if self.generated.state.requires_grad and not self.differentiable else weight

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        geometry = Geometry.of(self)
        return f"Handle({self.weight_name!r}, shape={tuple(geometry.size)}, dtype={geometry.dtype})"

    @property
    def __cuda_array_interface__(self) -> Any:
        raise AttributeError("a generated weight lies nowhere in memory")

    def __format__(self, spec: str) -> str:
        return super().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.produce().detach()

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        detached = func in ASKS_FOR_GRAD and args[0].chain and not args[0].differentiable
        if detached:
            args[0].leaf = bool((*args[1:], *kwargs.values(), True)[0])
        if detached or any(isinstance(x, Handle) and x.leaf for x in args):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in REQUIRES_GRAD:
            return args[0].differentiable
        if func in GRAD:
            return None
        if func in RECORD and not args[0].chain:
            return func in IS_LEAF or None  # a weight as it is looks like the parameter it stands for
        if func in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in CONSTANTS:
            return CONSTANTS[func]
        if func in ADDRESSES:
            raise _no_address(args[0])
        _refuse_write(func, args, kwargs)
        if func is Tensor.__iter__:
            return iter(args[0].unbind(0))
        first = args[0] if args and isinstance(args[0], Handle) else None
        if (
            first is not None
            and (step := rearrangement(func, args[1:], kwargs, first.generated.state.device)) is not None
        ):
            with contextlib.suppress(NotImplementedError):  # what the meta device cannot do
                return first.rearranged(step)
        out = shapes_only(func, args, kwargs, _device_of)
        return consume(func, args, kwargs) if out is NotImplemented else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached below autograd, where the handle stands in for the weight: in backward, or past the function dispatch."""
        for handle in _handles((args, kwargs)):
            handle.weight_trace.note(
                handle.weight_name, "materialized", str(func), "met below torch's function dispatch"
            )
        with torch.no_grad():
            args, kwargs = _replace_handles((tuple(args), dict(kwargs or {})), Handle.produce)
        return func(*args, **kwargs)


class _Attach(torch.autograd.Function):
    """The record of a handle: its gradient goes through the chain's adjoint to the state."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, scale: Tensor, handle: Handle) -> Handle:
        ctx.save_for_backward(state, scale)
        ctx.view, ctx.chain = handle.generated.view, handle.chain
        like = Geometry.of(handle).stand_in()
        attached = Handle(handle.generated, handle.weight_name, handle.weight_trace, ctx.chain, like, handle.aliasing)
        attached.differentiable = True
        return attached

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        state, scale = ctx.saved_tensors
        grad = grads[0]
        if ctx.chain:
            with torch.enable_grad():
                shape = View.parse(ctx.view).shape
                weight = torch.zeros(shape, dtype=state.dtype, device=state.device, requires_grad=True)
                (grad,) = torch.autograd.grad(_replay(weight, ctx.chain), weight, grad)
        return torch.ops.fxrpg.accumulate.default(grad, state, scale, ctx.view), None, None


def handle_of(state: Any, scale: Any, view: str, name: str) -> Any:
    """A handle on a view, for the nodes of a graph that no lowering covers. In compiled code, the generated tensor."""
    if isinstance(state, torch.fx.Proxy):  # a graph module is traced anew when it is unpickled
        return state.tracer.create_proxy("call_function", handle_of, (state, scale, view, name), {})
    if torch.compiler.is_compiling() and not compiled_elsewhere():
        return torch.ops.fxrpg.generate.default(state, scale, view)
    return Handle(Generated.of(state, scale, view), name, Trace()).attached()


def consume(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on arguments that hold handles: lowered if a rule covers the call, else on materialized weights."""
    handles = _handles((args, kwargs))
    op = getattr(func, "__name__", str(func))
    if not handles:
        raise FxrpgError(
            op,
            "generated weights must stand in tuples, lists or dicts",
            "another container",
            "Unpack it before the call.",
        )
    if any(handle.leaf for handle in handles):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    keep_mode()
    try:
        if func in DECOMPOSITIONS and current_mode() != "materialized":
            return DECOMPOSITIONS[func](*args, **kwargs)
        with choices() as seen:
            out = _lowered(func, args, kwargs, len(handles))
        path, reason = (seen[0].path, seen[0].reason) if seen else ("staged", "")
    except NotLowered as e:
        out = _materialized(func, args, kwargs, handles)
        path, reason = "materialized", str(e)
    for handle in handles:
        handle.weight_trace.note(handle.weight_name, path, op, reason)
    return out


def _lowered(func: Any, args: Any, kwargs: dict[str, Any], handles: int) -> Any:
    """`func` through its rule, for arguments with so many handles. Raises NotLowered where no rule covers the call."""
    rule = rule_for(func, args, kwargs, lambda x: isinstance(x, Handle))
    if rule is None:
        raise NotLowered("no lowering for this op")
    if current_mode() == "materialized":
        raise NotLowered("lowering_mode('materialized')")
    if any(isinstance(x, Tensor) and not isinstance(x, Handle) and x.is_nested for x in args):
        raise NotLowered("called with a nested tensor")
    weight = rule.weight_in(args, kwargs)
    if not isinstance(weight, Handle):
        raise NotLowered(f"the generated tensor is not the op's argument {rule.keyword!r}")
    generated = weight.as_weight(rule.transposable)
    if handles == 1 and not kwargs:
        return rule.call(*args[: rule.position], generated, *args[rule.position + 1 :])
    args, kwargs = _with_bias(rule, args, rule.arguments(kwargs))
    if len(_handles((args, kwargs))) > 1:
        raise NotLowered("several generated tensors meet in this op")
    args, kwargs = _replace_handles((args, kwargs), lambda handle: generated)
    return rule.call(*args, **kwargs)


def _with_bias(rule: Rule, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The call's arguments with a generated bias produced: it is added and gone, no lowered op keeps it."""
    place = rule.bias_position
    if place is not None and len(args) > place and isinstance(args[place], Handle):
        args = (*args[:place], args[place].produce(), *args[place + 1 :])
    if isinstance(bias := kwargs.get(rule.bias), Handle):
        kwargs = kwargs | {rule.bias: bias.produce()}
    return args, kwargs


def _materialized(func: Any, args: Any, kwargs: dict[str, Any], handles: list[Handle]) -> Any:
    """Run `func` on the full weights; what autograd saves of them is a recipe, and backward generates again."""
    weights = {id(handle): handle.produce() for handle in handles}
    full_args, full_kwargs = _replace_handles((args, kwargs), lambda h: weights[id(h)])
    if transforming():
        return func(*full_args, **full_kwargs)
    hooks = Recipes()
    for handle in handles:
        hooks.add(weights[id(handle)], handle.recipe())
    if not torch.is_grad_enabled():
        out = func(*full_args, **full_kwargs)
    else:
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            out = func(*full_args, **full_kwargs)

    def again(handle: Handle) -> Step:
        return lambda weight: func(
            *_replace_handles(args, lambda _: weight), **_replace_handles(kwargs, lambda _: weight)
        )

    known = {storage_of(weights[id(handle)]): handle for handle in handles}
    return _without_aliases(out, known, again) if len(handles) == 1 else out


def _without_aliases(out: Any, handles: dict[int, Handle], again: Callable[[Handle], Step]) -> Any:
    """What an op returned, with a handle in the place of each alias of the weight (an op that returns its input, a view)."""

    def replaced(tensor: Any, pick: Callable[[Any], Any]) -> Any:
        strided = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not strided or (handle := handles.get(storage_of(tensor))) is None:
            return tensor
        geometry = Geometry.of(tensor)
        like = geometry.stand_in(tensor.requires_grad)
        step = again(handle)
        chain = (*handle.chain, lambda weight: pick(step(weight)))
        return Handle(
            handle.generated, handle.weight_name, handle.weight_trace, chain, like, handle.aliasing
        ).attached()

    if type(out) in (tuple, list):
        return type(out)(replaced(part, operator.itemgetter(i)) for i, part in enumerate(out))
    return replaced(out, lambda result: result)


def _part(step: Step, i: int) -> Step:
    return lambda weight: step(weight)[i]


def _replay(weight: Tensor, chain: tuple[Step, ...]) -> Tensor:
    for step in chain:
        weight = step(weight)
    return weight


def _handles(tree: Any) -> list[Handle]:
    """The handles in a pytree. Tuples, of which there are many, without torch's general walk."""
    if isinstance(tree, Handle):
        return [tree]
    if type(tree) is tuple:
        return [handle for part in tree for handle in _handles(part)]
    if not isinstance(tree, list | tuple | dict) or not tree:
        return []
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Handle)]


def _replace_handles(tree: Any, produce: Callable[[Handle], Any]) -> Any:
    if isinstance(tree, Handle):
        return produce(tree)
    if type(tree) is tuple:
        return tuple(_replace_handles(part, produce) for part in tree)
    if not isinstance(tree, list | tuple | dict) or not tree:
        return tree
    return pytree.tree_map_only(Handle, produce, tree)


def _device_of(x: Any) -> torch.device | None:
    return x.generated.state.device if isinstance(x, Handle) else None


def _no_address(handle: Handle) -> FxrpgError:
    return FxrpgError(
        handle.weight_name,
        "a generated weight lies nowhere in memory: it is generated for each op that consumes it",
        "a request for its address",
        "Keep a tensor, weight.clone(), for as long as the address is used. Compare parameters by name, or states.",
    )


def _refuse_write(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """An in-place write to a generated weight would be lost, so it raises."""
    if not writes(func) and "out" not in kwargs:
        return
    first = args[:1] or [kwargs.get(key) for key in ("tensor", "input", "self")]
    target = _handles((first if writes(func) else (), kwargs.get("out")))
    if target:
        raise FxrpgError(
            target[0].weight_name,
            "a generated weight is read-only: it is computed from the generator's state",
            f"a call of {func.__name__!r} on it",
            f'Train or set the state instead, or leave the weight dense with Rule("{target[0].weight_name}", "dense").',
        )
