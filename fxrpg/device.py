"""Where Triton is asked for, and the clear error when it cannot be had. Importing this file imports no Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from fxrpg.errors import FxrpgError


def triton_installed() -> bool:
    """Whether the package `triton` can be imported. Looks, does not import."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`: on a GPU, and in the interpreter on the CPU."""
    there = interpreted() if device.type == "cpu" else device.type == "cuda"
    return there and triton_installed()


def settled(tensor: Tensor) -> Tensor:
    """`tensor`, finished: to be kept on a GPU for later calls, whose stream may be another."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def require_triton(where: str) -> None:
    """Raise unless a Triton kernel could run here: Triton installed, and a GPU or `TRITON_INTERPRET=1`.

    Raises:
        FxrpgError: naming `where` and the part that is missing.
    """
    if not triton_installed():
        raise FxrpgError(
            where,
            "a fused kernel needs the package triton",
            "none installed",
            "Install it with `pip install triton` (Linux), or use the mode 'staged'.",
        )
    if not interpreted() and not torch.cuda.is_available():
        raise FxrpgError(
            where,
            "a fused kernel needs a GPU or Triton's interpreter",
            "neither",
            "Use the mode 'auto' or 'staged', or set TRITON_INTERPRET=1 before Python starts (slow, for tests).",
        )
