"""Linear least squares without a matrix: only products with it and its adjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor


def conjugate_gradients(
    forward: Callable[[Tensor], Iterator[Tensor]],
    adjoint: Callable[[Iterable[Tensor]], Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int = 500,
    tolerance: float = 1e-10,
) -> Tensor:
    """The x of least |forward(x) - targets|, by conjugate gradients on the normal equations, from zero.

    Args:
        forward: x -> the blocks of A x, one after the other, so that none need stay.
        adjoint: blocks -> A^T of them, of x's shape.
        targets: the blocks that A x should be.
        steps: at most so many.
        tolerance: stop when the gradient is this fraction of what it was at zero.
    """
    residual = adjoint(targets)
    found, direction, energy = residual.new_zeros(residual.shape), residual.clone(), residual.square().sum()
    enough = tolerance**2 * energy
    for _ in range(steps):
        if energy <= enough:
            break
        there = adjoint(forward(direction))
        length = energy / (direction * there).sum()
        found += length * direction
        residual -= length * there
        energy, before = residual.square().sum(), energy
        direction = residual + energy / before * direction
    return found
