"""Coarse-grained pruning: whole channels of least l1 norm leave the model, which does fewer operations from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.assemble import StandIn, copy_module, plan_of, replan, weight_of
from fxrpg.channel_groups import channel_groups, width_in
from fxrpg.errors import FxrpgError
from fxrpg.header import shown
from fxrpg.owner import link_of
from fxrpg.plan import Plan
from fxrpg.view import View

Channels = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Path of a module -> the indices left of its outputs and of its inputs; () is all."""

_Conv = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._NormBase


def prune_channels(model: nn.Module, amount: float) -> nn.Module:
    """A copy of `model` without the channels of least l1 norm: a smaller model, from the same state.

    A layer's outputs can go where everything that reads them is known to take them one by one (normalisation,
    activations, pooling) until another layer's inputs: within residual blocks, for instance, but not where branches are
    added, nor where a hook looks on. A BatchNorm1d behind a linear layer is taken to see rows [N, C]. Every such layer
    loses the same fraction. What is left of a generated weight reads the state where it did.
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
    for producer, (followers, readers) in channel_groups(model).items():
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
        fix = "Use fxrpg.prune, which zeroes single numbers. (torch.fx does not look into layers of torch.nn such as a "
        fix += "TransformerEncoderLayer, and shared layers stay whole.)"
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
            raise FxrpgError(str(where), f"{shown(path)} must be a layer whose channels were pruned", found, fix)
        try:
            _narrow_tensor(module, "weight", outputs, inputs)
            for name in ("bias", "running_mean", "running_var"):
                _narrow_tensor(module, name, outputs)
        except IndexError as e:
            raise FxrpgError(str(where), f"{shown(path)} must have the channels that were kept", str(e), fix) from None
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


def _inputs(reader: Any, producer: Any, kept: Sequence[int], width: int) -> tuple[int, ...]:
    """The inputs of `reader` that the kept channels reach, where flattening gives several a channel.

    They lie channel by channel where an image was flattened, position by position behind a linear layer.
    """
    each = width_in(reader) // width
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
