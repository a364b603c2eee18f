"""What torch is doing around a call in this very thread: compiling, tracing, checkpointing.

The flags that torch has for that are the process's: another thread may have set them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import PythonKeyTracer

from fxrpg.lowering import current_mode, lowering_mode


def compiled_elsewhere() -> bool:
    """Whether it is code of another thread for which `torch.compiler.is_compiling()` holds.

    Ask for that first, in the same function: Dynamo would compile this one alone, after a graph break, and fold it.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return not torch._C._len_torch_dispatch_stack() and _tracer() is None


def traced_symbolically() -> bool:
    """Whether torch.fx's symbolic tracer has called this code, which then sees no values."""
    tracer = _tracer()
    return tracer is not None and not isinstance(tracer, PythonKeyTracer)


def _tracer() -> fx.Tracer | None:
    """The tracer that has called this code: a symbolic one, or that of make_fx, which runs code on tensors."""
    if not _symbolic_trace._is_fx_tracing_flag:
        return None
    frame: Any = sys._getframe()
    while (frame := frame.f_back) is not None:
        # by name: Dynamo, once it is imported, has another function in the place of Tracer.trace, which calls it
        if frame.f_code.co_name == "trace" and frame.f_globals is vars(_symbolic_trace):
            return frame.f_locals["self"]
    return None


def keep_mode() -> None:
    """Have activation checkpointing run the block that it runs now in the same lowering mode when it runs it again.

    That is within backward, maybe in a thread of autograd's own, and torch takes along no more than autocast and the
    random state. A block that goes through several modes is left alone: it will set them again itself.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    frame = _checkpoint(hooks[0]) if hooks else None
    if frame is None:
        return
    if not hasattr(frame, "fxrpg_modes"):
        frame.fxrpg_modes = set()
        frame.recompute_fn = functools.partial(_run_again, frame.recompute_fn, frame.fxrpg_modes)
    frame.fxrpg_modes.add(current_mode())


def _checkpoint(pack: Any) -> Any:
    """What torch.utils.checkpoint (use_reentrant=False) knows of a block, from the hook that it puts around it."""
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint" or not getattr(pack, "__closure__", None):
        return None
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    frame = cells["frame"].cell_contents if "frame" in cells else None
    return frame if callable(getattr(frame, "recompute_fn", None)) else None


def _run_again(recompute: Callable[..., None], modes: set[str], *args: Any) -> None:
    with contextlib.ExitStack() as stack:
        if len(modes) == 1:
            stack.enter_context(lowering_mode(*modes))
        recompute(*args)
