"""Where Triton is asked for, and the clear error when it cannot be had. Importing this file imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxrpg.errors import FxrpgError

T = TypeVar("T")


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
    """`tensor`, finished: to be kept for later calls, maybe in another stream of a GPU, or outside torch.func."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # which wraps what is made within it
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def kept(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Cache what the decorated function puts on a device, at most so many results: tensors that all later calls may read.

    Made in a thread of its own once there is a GPU: what torch.compile(mode="reduce-overhead") allocates in the calling
    thread lies in its graphs' memory, where nothing may outlive a call. What a capture of a CUDA graph reads is never let
    go, since replays read it at its address. Under dispatch modes (fake tensors, say) nothing is cached.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., T]:
        captured: dict[int, T] = {}

        @functools.lru_cache(maxsize=most)
        def cached(*args: Any) -> T:
            if not torch.cuda.is_initialized():
                with torch.inference_mode(False):
                    return make(*args)
            with ThreadPoolExecutor(1) as other:
                return other.submit(make, *args).result()

        @functools.wraps(make)
        def found(*args: Any) -> T:
            if torch._C._len_torch_dispatch_stack():
                return make(*args)
            value = cached(*args)
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                captured[id(value)] = value
            return value

        return found

    return decorate


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
