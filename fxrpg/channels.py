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
# What treats every channel alike, one by one: pruning passes through it. Elementwise wherever the channels lie,
_ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Sigmoid,
    nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Dropout,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh, torch.sigmoid,
    torch.tanh, F.softplus, F.dropout,
}  # fmt: skip
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous"}
# or over the pixels of an image.
_SPATIAL = (
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Upsample, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
_SPATIAL_FUNCTIONS = {
    F.dropout2d, F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip


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
        weight = _weight(model, plan, producer)
        if weight.is_meta:
            fix = "Load a file or a state_dict into the model first."
            raise FxrpgError(f"prune_channels, {producer}", "must hold values", "a tensor on the meta device", fix)
        norms = weight.abs().flatten(1).sum(1, dtype=torch.float64)
        drop = int(amount * len(norms))
        kept = tuple(sorted(torch.argsort(norms, descending=True, stable=True)[: len(norms) - drop].tolist()))
        for path in (producer, *followers):
            left[path] = kept, left.get(path, ((), ()))[1]
        for path in readers:
            left[path] = left.get(path, ((), ()))[0], _inputs(modules[path], modules[producer], kept, len(norms))
    if not left:
        fix = "Use fxrpg.prune, which zeroes single numbers."
        raise FxrpgError("prune_channels", "needs layers whose outputs only other layers read", "none", fix)
    result = copy_module(model)
    narrow_modules(result, left)
    replan(result, _narrowed_plan(model, plan, left))
    return result


def narrow_modules(root: nn.Module, channels: Channels, where: Any = "prune_channels") -> None:
    """Take channels out of modules of `root`, in place: their sizes, and the dense parameters and buffers they hold."""
    modules, fix = dict(root.named_modules()), "Pass a model of the architecture that was saved."
    for path, (outputs, inputs) in channels.items():
        module = modules.get(path)
        if not isinstance(module, nn.Linear | _Conv | _Norm):
            found = "none" if module is None else type(module).__name__
            raise FxrpgError(str(where), f"{path!r} must be a layer whose channels were pruned", found, fix)
        try:
            _narrow_tensor(module, "weight", outputs, inputs)
            for name in ("bias", "running_mean", "running_var"):
                _narrow_tensor(module, name, outputs)
        except IndexError as e:
            raise FxrpgError(str(where), f"{path!r} must have the channels that were kept", str(e), fix) from None
        _set_sizes(module, len(outputs), len(inputs))


def _narrow_tensor(module: nn.Module, name: str, *sides: Sequence[int]) -> None:
    tensor = module._parameters.get(name, module._buffers.get(name))
    if tensor is None or isinstance(tensor, StandIn):
        return
    narrowed = tensor.detach()
    for axis, kept in enumerate(sides):
        if kept:
            if kept[-1] >= narrowed.shape[axis]:  # for which index_select has several errors
                raise IndexError(f"a {name} of shape {tuple(narrowed.shape)}")
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
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    fixed = _shared_modules(model) | {path for path, count in calls.items() if count > 1}
    fixed |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    fixed |= {path for path, module in modules.items() if not _plain(module)}
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if _mixes_channels(module):
            found = _followed(node, modules)
            if found and fixed.isdisjoint((node.target, *found[0], *found[1])):
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


def _plain(module: nn.Module) -> bool:
    """Whether a layer's parameters are its own, not what a weight_norm or a parametrization makes of others."""
    return {"weight", "bias"} <= {*module._parameters, *(link.weights if (link := link_of(module)) else ())}


def _mixes_channels(module: Any) -> bool:
    """Whether a layer's every output reads all inputs."""
    return isinstance(module, nn.Linear) or (isinstance(module, _Conv) and module.groups == 1 and not module.transposed)


def _followed(producer: fx.Node, modules: dict[str, Any]) -> tuple[list[str], list[str]] | None:
    """What carries the outputs of `producer` on, and the layers that read them; None where anything else meets them."""
    first = modules[str(producer.target)]
    width, image = _outputs(first), not isinstance(first, nn.Linear)
    carriers: list[str] = []
    readers: list[str] = []
    todo, seen = [(node, image) for node in producer.users], {producer}
    while todo:
        node, image = todo.pop()  # whether the channels are those of an image, or lie along the last axis
        if node in seen:
            continue
        seen.add(node)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if _reads(module, width, image):
            readers.append(str(node.target))
            continue
        if _carries(module, width, image):
            carriers.append(str(node.target))
        elif not _is_channelwise(node, module, image):
            return None
        image = image and not _flattens(node, module)
        todo.extend((user, image) for user in node.users)
    return (carriers, readers) if readers else None


def _reads(module: Any, width: int, image: bool) -> bool:
    """Whether a layer takes the channels as its inputs: of a flattened image, several for each."""
    if not _mixes_channels(module) or isinstance(module, nn.Linear) == image:
        return False
    return _width_in(module) == width if image else _width_in(module) % width == 0


def _carries(module: Any, width: int, image: bool) -> bool:
    """Whether a module has a parameter for each channel and keeps channels apart: norms, depthwise convolutions."""
    if isinstance(module, _Norm):
        # along the last axis an instance norm mixes channels
        return module.num_features == width and (image or not isinstance(module, nn.modules.instancenorm._InstanceNorm))
    depthwise = isinstance(module, _Conv) and module.groups == module.in_channels == module.out_channels == width > 1
    return depthwise and image


def _is_channelwise(node: fx.Node, module: Any, image: bool) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if _flattens(node, module):
        return True
    if node.op == "call_module":
        one = isinstance(module, nn.PReLU) and module.num_parameters == 1
        return one or isinstance(module, _ELEMENTWISE) or (image and isinstance(module, _SPATIAL))
    if node.op == "call_method":
        return node.target in _ELEMENTWISE_METHODS
    return node.target in _ELEMENTWISE_FUNCTIONS or (image and node.target in _SPATIAL_FUNCTIONS)


def _flattens(node: fx.Node, module: Any) -> bool:
    """Whether all axes but the first become one."""
    if node.op == "call_module":
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        return (node.args[1:], node.kwargs) in (((1,), {}), ((1, -1), {}), ((), {"start_dim": 1}))
    return False


def _outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _width_in(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _inputs(reader: Any, producer: Any, kept: Sequence[int], width: int) -> tuple[int, ...]:
    """The inputs of `reader` that the kept channels reach, where flattening gives several a channel.

    They lie channel by channel where an image was flattened, position by position behind a linear layer.
    """
    each = _width_in(reader) // width
    if isinstance(producer, nn.Linear):
        return tuple(width * i + channel for i in range(each) for channel in kept)
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
