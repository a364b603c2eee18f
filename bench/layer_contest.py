"""The contest of a layer: the vendor's op, the authors' gather before it, and generated weights in each lowering mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fxrpg
from bench.authors import Indexed
from bench.cases import LayerCase
from bench.contest import Contest, Contestant, disagreement, in_mode, tolerance
from bench.layers import Layer
from fxrpg.device import runs_kernels
from fxrpg.generator import Generator
from fxrpg.staging import DENSE_OPS
from fxrpg.view import View
from fxrpg.weights import accumulate_gradient, encode_scales, generate_weight

SCALE = 1 / 32
"""Of every weight: a power of two, which rounds nothing."""


class Work:
    """A layer's op in one direction on random inputs, for any weight."""

    def __init__(self, layer: Layer, batch: int, direction: str, device: torch.device, dtype: torch.dtype) -> None:
        self.layer, self.direction = layer, direction
        self.op = getattr(torch.ops.fxrpg, layer.op).default
        self.backward = getattr(torch.ops.fxrpg, f"{layer.op}_backward").default
        self.vendor = DENSE_OPS[self.op]
        sizes = layer.sizes(batch)
        self.x, self.grad = (_channels_last(torch.randn(size, device=device).to(dtype)) for size in sizes)

    def dense(self, weight: Tensor) -> Tensor:
        """With an ordinary weight; of "wgrad", its gradient."""
        if self.direction == "forward":
            return self.vendor.forward(self.x, weight, None, *self.layer.config)
        if self.direction == "dgrad":
            return self.vendor.input_grads(self.grad, (self.x,), weight, [True], *self.layer.config)[0]  # type: ignore
        return self.vendor.weight_grad(self.grad, (self.x,), self.layer.shape, *self.layer.config)

    def generated(self, state: Tensor, scale: Tensor, view: View) -> Tensor:
        """With the weight that a view generates; of "wgrad", the state's gradient."""
        if self.direction == "forward":
            return self.op(self.x, None, state, scale, view.text, *self.layer.config)
        needed = [self.direction == "dgrad", False, self.direction == "wgrad"]
        grads = self.backward(self.grad, self.x, state, scale, view.text, *self.layer.config, needed)
        return grads[0 if needed[0] else 2]

    def bytes_moved(self, weight: int) -> int:
        """At least: both of input, output and their gradients that take part, and `weight` bytes."""
        return self.x.nbytes + self.grad.nbytes + weight


def contest(case: LayerCase, device: torch.device, dtype: torch.dtype) -> Contest:
    """The contestants of a layer's op. The state is in float32 where its gradient is wanted, as training has it."""
    torch.manual_seed(0)
    work = Work(case.layer, case.batch, case.direction, device, dtype)
    state_dtype = torch.float32 if case.direction == "wgrad" else dtype
    found: list[Contestant] = []
    for generator, size in zip(case.generators, case.sizes, strict=False):
        weight = _Weight(case.layer, generator, size, device, state_dtype)
        limit = tolerance(dtype, device)
        dense = weight.plain(dtype)
        result = work.dense(dense)
        expected = weight.plain_gradient(result) if case.direction == "wgrad" else result
        if not found:
            found += _opponents(case, work, weight, dense, result, limit)
        modes = case.modes if runs_kernels(device) else ("staged",)
        found += [_generated(case, work, weight, mode, _agrees(expected, limit)) for mode in modes]
    return Contest(contestants=found, flops=case.layer.flops(case.batch), dtype=dtype)


class _Weight:
    """A layer's weight as one method has it, of random numbers."""

    def __init__(self, layer: Layer, generator: Generator, size: int, device: torch.device, dtype: torch.dtype) -> None:
        total = generator.extents([layer.count])[0]
        where: dict[str, Any] = {
            "tensor": 0,
            "shape": layer.shape,
            "order": layer.order,
            "offset": 0,
            "total": total,
            "size": size,
        }
        self.view = View(generator=generator, seed=1, **where)
        shape = generator.state_shape(self.view)
        state = torch.randn(shape, device=device).to(dtype)
        self.state = generator.freeze(state, self.view) if generator.freezes else state
        self.scale = encode_scales(torch.tensor([SCALE])).to(device)
        self.nbytes = min(self.state.nbytes, layer.count * self.state.itemsize)

    @property
    def method(self) -> str:
        return self.view.generator.method

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight by plain torch: the truth."""
        with fxrpg.lowering_mode("materialized"):
            return _channels_last(generate_weight(self.state, self.scale, self.view.text, dtype))

    def plain_gradient(self, grad: Tensor) -> Tensor:
        """The state's gradient from the weight's, by plain torch."""
        with fxrpg.lowering_mode("materialized"):
            return accumulate_gradient(grad, self.state, self.scale, self.view.text)


def _opponents(
    case: LayerCase, work: Work, weight: _Weight, dense: Tensor, result: Tensor, limit: float
) -> list[Contestant]:
    """The vendor's op, eager and compiled, and the authors' way."""
    moved = work.bytes_moved(dense.nbytes)
    vendor = Contestant(
        name="dense",
        call=lambda: work.dense(dense),
        problem=_agrees(result, limit),
        stored=dense.nbytes,
        bytes_moved=moved,
        opponent=True,
    )
    found = [vendor]
    if case.compiled and work.x.is_cuda:
        torch.compiler.reset()  # or shapes after the eighth would run uncompiled
        run = torch.compile(work.vendor.forward, dynamic=False)
        call = lambda: run(work.x, dense, None, *case.layer.config)  # noqa: E731
        found.append(dataclasses.replace(vendor, name="dense compiled", call=call))
    if weight.method == "ring":
        found.append(_authors(work, weight, result, limit))
    return found


def _authors(work: Work, weight: _Weight, result: Tensor, limit: float) -> Contestant:
    indexed = Indexed(weight.view, SCALE, weight.state.dtype, weight.state.device)
    gradient = work.direction == "wgrad"

    def call() -> Tensor:
        if gradient:
            return indexed.gradient(work.dense(weight.state), weight.state)
        return work.dense(indexed.weight(weight.state))

    return Contestant(
        name="authors",
        call=call,
        problem=_agrees(weight.plain_gradient(result) if gradient else result, limit),
        stored=indexed.nbytes + weight.state.nbytes,
        bytes_moved=work.bytes_moved(indexed.nbytes + weight.nbytes),
        opponent=True,
    )


def _generated(case: LayerCase, work: Work, weight: _Weight, mode: str, problem: Callable[[Any], str]) -> Contestant:
    return Contestant(
        name=f"{weight.method} {mode}",
        call=in_mode(mode, lambda: work.generated(weight.state, weight.scale, weight.view)),
        problem=problem,
        stored=weight.state.nbytes,
        bytes_moved=work.bytes_moved(weight.nbytes),
        goal=None if mode == "staged" else case.goal,
        wants="" if mode == "auto" or not runs_kernels(work.x.device) else mode,
    )


def _agrees(expected: Tensor, limit: float) -> Callable[[Any], str]:
    return lambda found: disagreement(found, expected, limit)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
