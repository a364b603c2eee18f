"""Where channels can leave a model: layers whose outputs only other layers read, as torch.fx shows it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxrpg.errors import FxrpgError
from fxrpg.owner import link_of

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


def channel_groups(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """Layer whose outputs can go, in both modes -> (modules that carry its channels on, layers that read them)."""
    modes = {module: module.training for module in model.modules()}
    found = []
    try:
        for mode in (True, False):
            for module in modes:
                module.training = mode
            found.append(_groups(model))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {path: group for path, group in found[0].items() if found[1].get(path) == group}


def _groups(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """The groups in the mode that the model is in."""
    graph = _traced(model)
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    fixed = _shared_modules(model) | {path for path, count in calls.items() if count > 1}
    fixed |= {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    fixed |= {path for path, module in modules.items() if not _plain(module) or _hooked(module)}
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if _mixes_channels(module):
            found = _followed(node, modules)
            if found and fixed.isdisjoint((node.target, *found[0], *found[1])):
                groups[str(node.target)] = found
    return groups


def _hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says, which a graph does not show."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


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
        if module is not None and _hooked(module):
            return None
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
    return width_in(module) == width if image else width_in(module) % width == 0


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


def width_in(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels
