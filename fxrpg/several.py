"""Ops of several weights at once: all of one layer are generated, the op runs, they are dropped; in backward again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.handle import Handle
from fxrpg.lowering import NotLowered, current_mode, lowering_mode, transforming
from fxrpg.recipes import generated_again
from fxrpg.weights import accumulate_gradient, generate_weight

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""(inputs, weights) -> outputs: the ordinary op. It is run again in backward, so it must draw no random numbers."""


class _Source(NamedTuple):
    """Where a weight comes from: `tensor` counts the tensors that the op saves; `view` is "" for one that is stored."""

    tensor: int
    view: str


def run_staged(run: Run, op: str, inputs: Sequence[Tensor], weights: Sequence[Any]) -> tuple[Tensor, ...]:
    """What `run` returns for these inputs and weights, of which handles are generated.

    Inputs and stored weights are saved for backward, and what generates the others; never a weight. Instead `run` is
    run again: vendors' ops keep weights in forms of their own, which no hook would find.

    Args:
        op: its name for `explain`.

    Raises:
        NotLowered: a handle that was rearranged, or a torch.func transform, which follows plain torch ops only.
    """
    if transforming():
        raise NotLowered("torch.func transforms follow plain ops only")
    tensors: list[Tensor] = list(inputs)
    sources: list[_Source] = []
    for weight in weights:
        generated = weight.as_weight(False) if isinstance(weight, Handle) else None
        sources.append(_Source(len(tensors), generated.view if generated else ""))
        tensors += (generated.state, generated.scale) if generated else (weight,)
    out = _Several.apply(run, len(inputs), tuple(sources), *tensors)
    for weight in weights:
        if isinstance(weight, Handle):
            weight.weight_trace.note(weight.weight_name, "staged", op)
    return out


class _Several(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, count: int, sources: tuple[_Source, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.count, ctx.sources, ctx.mode = run, count, sources, current_mode()
        ctx.autocast = _autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        return run(tensors[:count], [_weight(source, tensors) for source in sources])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with lowering_mode(ctx.mode):
            found = (_differentiable if torch.is_grad_enabled() else _gradients)(ctx, grads)
        return None, None, None, *found


def _autocast(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What makes a block like this one: with autocast as it is now, on devices that have it."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return lambda: torch.autocast(device, dtype, enabled=enabled)


def _weight(source: _Source, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[source.tensor]
    return generate_weight(first, tensors[source.tensor + 1], source.view) if source.view else first


def _again(ctx: Any, xs: list[Tensor], weights: list[Tensor], wanted: list[Tensor], grads: Any, graph: bool) -> Any:
    """The gradients of `wanted` by running the op once more, as it was run."""
    with torch.enable_grad(), ctx.autocast():
        out = ctx.run(xs, weights)
    live = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad and g is not None]
    outs, given = zip(*live, strict=True)
    return torch.autograd.grad(outs, wanted, given, create_graph=graph, allow_unused=True)


def _gradients(ctx: Any, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    weights = [_weight(source, leaves) for source in ctx.sources]
    made = {
        source.tensor: w.detach().requires_grad_(needed[source.tensor])
        for source, w in zip(ctx.sources, weights, strict=True)
        if source.view
    }
    weights = [made.get(source.tensor, w) for source, w in zip(ctx.sources, weights, strict=True)]
    wanted = {i: made.get(i, leaves[i]) for i, need in enumerate(needed) if need}
    found = dict(
        zip(wanted, _again(ctx, leaves[: ctx.count], weights, list(wanted.values()), grads, False), strict=True)
    )
    views = {source.tensor: source.view for source in ctx.sources if source.view}
    for i, grad in found.items():
        if i in views and grad is not None:
            found[i] = accumulate_gradient(grad, tensors[i], tensors[i + 1], views[i])
    return [found.get(i) for i in range(len(tensors))]


def _differentiable(ctx: Any, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients that can themselves be differentiated: weights come from ops that autograd follows."""
    needed = ctx.needs_input_grad[3:]
    # fresh aliases end the differentiation here
    tensors = [t.view_as(t) if need else t for t, need in zip(ctx.saved_tensors, needed, strict=True)]

    wanted = {i: tensors[i] for i, need in enumerate(needed) if need}
    with generated_again() as produce:

        def weight(source: _Source) -> Tensor:
            first = tensors[source.tensor]
            return produce(first, tensors[source.tensor + 1], source.view, None) if source.view else first

        weights = [weight(source) for source in ctx.sources]
        gradients = _again(ctx, tensors[: ctx.count], weights, list(wanted.values()), grads, True)
    found = dict(zip(wanted, gradients, strict=True))
    return [found.get(i) for i in range(len(tensors))]
