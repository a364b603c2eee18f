"""The contest of a PRANC pass over all weights of a network: each law's kernels, and a normal basis drawn by torch."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import BasisCase
from bench.contest import Contest, Contestant, disagreement
from fxrpg.basis import LAWS
from fxrpg.generator import Generator
from fxrpg.lowering import kernels_wanted
from fxrpg.view import View
from fxrpg.weights import encode_scales

CHUNK = 1 << 28
"""Values of a normal basis that are in memory at a time."""
CHECKED = 1 << 31
"""Draws of plain torch that a test of a law may take: it compares the smallest weights of the network, while they fit."""
LIMIT = 1e-6


def contest(case: BasisCase, device: torch.device, dtype: torch.dtype) -> Contest:
    """Weights are generated, and coefficients' gradients summed, in float32, whatever `dtype` is."""
    torch.manual_seed(0)
    alpha = torch.randn(case.size, device=device)
    sizes = [layer.shape for layer in case.layers for _ in range(layer.times)]
    grads = [torch.randn(size, device=device) for size in sizes]
    normal = _Normal(alpha, sum(grad.numel() for grad in grads), case.direction)
    found = [normal.contestant("normal basis", normal.run)]
    if case.compiled and device.type == "cuda":
        found.append(normal.contestant("normal basis compiled", normal.compiled()))
    found += [_law(case, generator, alpha, grads) for generator in case.generators]
    weights = sum(grad.numel() for grad in grads)
    return Contest(contestants=found, flops=2 * weights * case.size, dtype=torch.float32)


class _Normal:
    """theta = sum_k alpha_k B_k of a normal basis that `torch.randn` draws, a chunk of vectors at a time, or its adjoint."""

    def __init__(self, alpha: Tensor, weights: int, direction: str) -> None:
        self.alpha, self.weights, self.direction = alpha, weights, direction
        self.chunk = max(1, min(len(alpha), (CHUNK if alpha.is_cuda else CHUNK >> 6) // weights))
        self.grad = torch.ones(weights, device=alpha.device)

    def run(self) -> Tensor:
        parts = self.alpha.split(self.chunk)
        drawn = (torch.randn(len(part), self.weights, device=part.device) for part in parts)
        if self.direction == "gradient":
            return torch.cat([basis @ self.grad for basis in drawn])
        theta = torch.zeros(self.weights, device=self.alpha.device)
        for part, basis in zip(parts, drawn, strict=True):
            theta.addmv_(basis.t(), part)
        return theta

    def compiled(self) -> Callable[[], Any]:
        """The same in one compiled expression, which need not write the basis out."""
        weights, backwards = self.weights, self.direction == "gradient"

        def run(alpha: Tensor, grad: Tensor) -> Tensor:
            basis = torch.randn(len(alpha), weights, device=alpha.device)
            return (basis * grad).sum(1) if backwards else (basis * alpha[:, None]).sum(0)

        torch.compiler.reset()
        fast = torch.compile(run, dynamic=False)
        return lambda: fast(self.alpha, self.grad)

    def contestant(self, name: str, call: Callable[[], Any]) -> Contestant:
        vector = self.grad if self.direction == "gradient" else self.alpha
        expected = float(vector.norm())  # what is summed is normal, with this deviation

        def problem(found: Tensor) -> str:
            spread = float(found.square().mean().sqrt())
            return (
                "" if abs(spread / expected - 1) < 8 / len(found) ** 0.5 else f"spread {spread:.3g}, not {expected:.3g}"
            )

        moved = self.alpha.nbytes + self.grad.nbytes
        return Contestant(
            name=name, call=call, problem=problem, stored=self.alpha.nbytes, bytes_moved=moved, opponent=True
        )


def _law(case: BasisCase, generator: Any, alpha: Tensor, grads: Sequence[Tensor]) -> Contestant:
    views = _views(generator, grads, len(alpha))
    scale = encode_scales(torch.ones(len(views))).to(alpha.device)
    pair = importlib.import_module(generator.pair) if kernels_wanted(alpha.device) else None

    def generate(view: View) -> Tensor:
        if pair and (found := pair.generate(view, alpha, scale, alpha.dtype)) is not None:
            return found
        return generator.materialize(alpha, view, alpha.dtype)

    def accumulate(view: View, grad: Tensor) -> Tensor:
        if pair and (found := pair.accumulate(grad, alpha, view)) is not None:
            return found
        return generator.accumulate(grad, alpha, view)

    def call() -> list[Tensor]:
        if case.direction == "generate":
            return [generate(view) for view in views]
        return [accumulate(view, grad) for view, grad in zip(views, grads, strict=True)]

    def problem(found: list[Tensor]) -> str:
        for place in _affordable(generator, views):
            view = views[place]
            if case.direction == "generate":
                expected = generator.materialize(alpha, view, alpha.dtype)
            else:
                expected = generator.accumulate(grads[place], alpha, view)
            if wrong := disagreement(found[place], expected, LIMIT):
                return f"weight {place}: {wrong}"
        return ""

    moved = alpha.nbytes + sum(grad.nbytes for grad in grads)
    return Contestant(name=generator.law, call=call, problem=problem, stored=alpha.nbytes, bytes_moved=moved)


def _views(generator: Generator, grads: Sequence[Tensor], size: int) -> list[View]:
    counts = [grad.numel() for grad in grads]
    offsets, total = generator.addresses(counts)
    found = []
    for place, (grad, offset) in enumerate(zip(grads, offsets, strict=True)):
        order = (0, *range(2, grad.dim()), 1)
        where: dict[str, Any] = {
            "tensor": place,
            "shape": tuple(grad.shape),
            "order": order,
            "offset": offset,
            "total": total,
            "size": size,
        }
        found.append(View(generator=generator, seed=1, **where))
    return found


def _affordable(generator: Any, views: Sequence[View]) -> list[int]:
    """The smallest views whose basis plain torch may draw for a test; at least one."""
    places = sorted(range(len(views)), key=lambda place: views[place].count)
    spent = itertools.accumulate(LAWS[generator.law].draws(views[place]) for place in places)
    return [place for i, (place, draws) in enumerate(zip(places, spent, strict=True)) if not i or draws <= CHECKED]
