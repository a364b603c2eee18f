"""The op `fxrpg.embedding` on fused kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxrpg.dispatch import Choice
from fxrpg.kernels.fused import embedding
from fxrpg.weights import weight_dtype


def forward(choice: Choice, where: Any, xs: Any, finish: Any, config: Any) -> Tensor | None:
    """The rows at the indices; see `fusing.forward`."""
    view, state, scale = where
    return embedding.forward(view, state, scale, xs[0], weight_dtype(state, scale))


def state_grad(choice: Choice, where: Any, grad: Tensor, xs: Any, config: Any) -> Tensor | None:
    """The gradient of the state, float32."""
    view, state, scale = where
    return embedding.state_grad(view, state, scale, grad, xs[0], *config)
