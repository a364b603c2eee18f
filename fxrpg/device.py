"""Where Triton is asked for, and the clear error when it cannot be had. Importing this file imports no Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from fxrpg.errors import FxrpgError


def triton_installed() -> bool:
    """Whether the package `triton` can be imported. Looks, does not import."""
    return importlib.util.find_spec("triton") is not None


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
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        raise FxrpgError(
            where,
            "a fused kernel needs a GPU or Triton's interpreter",
            "neither",
            "Use the mode 'auto' or 'staged', or set TRITON_INTERPRET=1 before Python starts (slow, for tests).",
        )
