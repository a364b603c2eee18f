"""Coarse-grained pruning: whole channels of least l1 norm leave the model, which does fewer operations from then on."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from fxrpg.assemble import StandIn, copy_module, plan_of, replan, weight_of
from fxrpg.errors import FxrpgError
from fxrpg.generator import View
from fxrpg.owner import link_of
from fxrpg.plan import Plan

Channels = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Path of a module -> the indices left of its outputs and of its inputs; () is all."""

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._NormBase
# What treats every channel alike, one by one: pruning passes through it.
_CHANNELWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Sigmoid,
    nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_CHANNELWISE_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, torch.sigmoid,
    torch.tanh, F.softplus, F.dropout, F.dropout2d, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
_CHANNELWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous"}


def prune_channels(model: nn.Module, amount: float) -> nn.Module:
    """A copy of `model` without the channels of least l1 norm: a smaller model, from the same state.

    A layer's outputs can go where everything that reads them is known to take them one by one (normalisation,
    activations, pooling) until another layer's inputs: within residual blocks, for instance, but not where branches are
    added. Every such layer loses the same fraction. What is left of a generated weight reads the state where it did.
    (arXiv:2107.07110, Appendix A.)

    Args:
        model: the result of `transform`, of a module that torch.fx can trace.
        amount: fraction of the channels to drop in each layer, in (0, 1), rounded down; at least one stays.

    Raises:
        FxrpgError: `model` is not transformed or cannot be traced, or has no channels that can go; `amount` out of range.
    """
    plan = plan_of(model)
    if isinstance(amount, bool) or not isinstance(amount, float) or not 0 < amount < 1:
        raise FxrpgError("prune_channels, amount", "must be a float in (0, 1)", repr(amount), "Pass such as 0.3.")
    left: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    modules = dict(model.named_modules())
    for producer, (followers, readers) in _groups(model).items():
        norms = _weight(model, plan, producer).abs().flatten(1).sum(1)
        drop = int(amount * len(norms))
        kept = tuple(sorted(torch.argsort(norms, descending=True, stable=True)[: len(norms) - drop].tolist()))
        for path in (producer, *followers):
            left[path] = kept, left.get(path, ((), ()))[1]
        for path in readers:
            left[path] = left.get(path, ((), ()))[0], _inputs(modules[path], kept, len(norms))
    if not left:
        fix = "Use fxrpg.prune, which zeroes single numbers."
        raise FxrpgError("prune_channels", "needs layers whose outputs only other layers read", "none", fix)
    result = copy_module(model)
    narrow_modules(result, left)
    replan(result, _narrowed_plan(model, plan, left))
    return result


def narrow_modules(root: nn.Module, channels: Channels, where: Any = "prune_channels") -> None:
    """Take channels out of modules of `root`, in place: their sizes, and the dense parameters and buffers they hold."""
    for path, (outputs, inputs) in channels.items():
        try:
            module: Any = root.get_submodule(path)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear | _Conv | _Norm):
            found = "none" if module is None else type(module).__name__
            fix = "Pass a model of the architecture that was saved."
            raise FxrpgError(str(where), f"{path!r} must be a layer whose channels were pruned", found, fix)
        for name, index in (
            ("weight", outputs),
            ("bias", outputs),
            ("running_mean", outputs),
            ("running_var", outputs),
        ):
            _narrow_tensor(module, name, index, inputs if name == "weight" else ())
        _set_sizes(module, len(outputs), len(inputs))


def _narrow_tensor(module: nn.Module, name: str, outputs: Sequence[int], inputs: Sequence[int]) -> None:
    tensor = module._parameters.get(name, module._buffers.get(name))
    if tensor is None or isinstance(tensor, StandIn):
        return
    narrowed = tensor.detach()
    for axis, kept in enumerate((outputs, inputs)):
        if kept:
            narrowed = narrowed.index_select(axis, torch.tensor(kept, device=narrowed.device))
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = nn.Parameter(narrowed, requires_grad=tensor.requires_grad)
    else:
        module._buffers[name] = narrowed


def _set_sizes(module: Any, outputs: int, inputs: int) -> None:
    if isinstance(module, _Norm):
        module.num_features = outputs or module.num_features
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = outputs or module.out_features, inputs or module.in_features
    elif module.groups > 1:  # depthwise: one input for each output
        module.out_channels = module.in_channels = module.groups = outputs or module.groups
    else:
        module.out_channels, module.in_channels = outputs or module.out_channels, inputs or module.in_channels


def _groups(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """Layer whose outputs can go -> (modules that carry its channels on, layers that read them)."""
    graph = _traced(model)
    modules = dict(model.named_modules())
    shared = _shared_modules(model)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for node in graph.nodes:
        module: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Linear) or (
            isinstance(module, _Conv) and module.groups == 1 and not module.transposed
        ):
            found = _followed(node, modules)
            if found and not any(calls[path] > 1 or path in shared for path in (node.target, *found[0], *found[1])):
                groups[str(node.target)] = found
    return groups


def _traced(model: nn.Module) -> fx.Graph:
    if isinstance(model, fx.GraphModule):
        fix = "Transform the module that the graph was traced from, and prune that."
        raise FxrpgError("prune_channels", "needs a module with its layers", "a graph module", fix)
    try:
        return fx.Tracer().trace(model)
    except Exception as e:  # a forward may do anything to a proxy
        fix = "Use fxrpg.prune, which zeroes single numbers of any model."
        raise FxrpgError(
            "prune_channels", "needs a model that torch.fx can trace", f"{type(e).__name__}: {e}", fix
        ) from e


def _shared_modules(model: nn.Module) -> set[str]:
    """Paths of modules that have several names, or a parameter or a generated weight that another module has too."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        link = link_of(module)
        names = [name for name, *_ in link.weights.values()] if link else []
        for thing in (id(module), *map(id, module._parameters.values()), *map(hash, names)):
            if thing != id(None):
                paths.setdefault(thing, []).append(path)
    return {path for found in paths.values() if len(found) > 1 for path in found}


def _followed(producer: fx.Node, modules: dict[str, Any]) -> tuple[list[str], list[str]] | None:
    """What carries the outputs of `producer` on, and the layers that read them; None where anything else meets them."""
    carriers: list[str] = []
    readers: list[str] = []
    todo, seen = list(producer.users), {producer}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Linear) or (
            isinstance(module, _Conv) and module.groups == 1 and not module.transposed
        ):
            readers.append(str(node.target))
            continue
        if isinstance(module, _Norm) or _is_depthwise(module):
            carriers.append(str(node.target))
        elif not _is_channelwise(node, module):
            return None
        todo.extend(node.users)
    width = _outputs(modules[str(producer.target)])
    fits = all(_width_in(modules[path]) % width == 0 for path in readers)
    return (carriers, readers) if readers and fits else None


def _is_depthwise(module: Any) -> bool:
    return (
        isinstance(module, _Conv) and module.groups == module.in_channels == module.out_channels and module.groups > 1
    )


def _is_channelwise(node: fx.Node, module: Any) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        flatten = isinstance(module, nn.Flatten) and module.start_dim == 1
        return (
            isinstance(module, _CHANNELWISE) or flatten or (isinstance(module, nn.PReLU) and module.num_parameters == 1)
        )
    if node.op == "call_method":
        return node.target in _CHANNELWISE_METHODS or (node.target == "flatten" and node.args[1:2] == (1,))
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim")
    return node.target in _CHANNELWISE_FUNCTIONS or bool(node.target is torch.flatten and start == 1)


def _outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _width_in(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _inputs(reader: Any, kept: Sequence[int], width: int) -> tuple[int, ...]:
    """The inputs of `reader` that the kept channels reach: flattened images give several a channel."""
    each = _width_in(reader) // width
    return tuple(each * channel + i for channel in kept for i in range(each))


def _weight(model: nn.Module, plan: Plan, path: str) -> Tensor:
    """The weight of a layer, generated or dense."""
    module = model.get_submodule(path)
    link = link_of(module)
    if link and "weight" in link.weights:
        return weight_of(model, link.weights["weight"][0])
    return module.get_parameter("weight").detach()


def _narrowed_plan(model: nn.Module, plan: Plan, left: Channels) -> Plan:
    """The plan with the channels gone, as indices of the model that was transformed, before any pruning."""
    views, channels = dict(plan.views), dict(plan.channels)
    for path, sides in left.items():
        before = channels.get(path, ((), ()))
        channels[path] = tuple(map(_composed, before, sides))  # type: ignore[assignment]
        link = link_of(model.get_submodule(path))
        for attribute, (name, *_) in link.weights.items() if link else ():
            views[name] = _narrowed_view(plan.views[name], sides if attribute == "weight" else (sides[0],))
    return dataclasses.replace(plan, views=views, channels=channels)


def _narrowed_view(view: View, sides: Sequence[tuple[int, ...]]) -> View:
    dims = len(view.shape)
    sides = [*sides, *[()] * dims][:dims]
    kept = tuple(map(_composed, view.kept or ((),) * dims, sides))
    shape = tuple(len(some) or side for some, side in zip(sides, view.shape, strict=True))
    return dataclasses.replace(view, kept=kept, shape=shape, original=view.whole.shape)


def _composed(before: tuple[int, ...], now: Sequence[int]) -> tuple[int, ...]:
    """Indices `now` into what `before` has left, as indices into the whole."""
    if not now:
        return before
    return tuple(before[i] for i in now) if before else tuple(now)
