"""torch's attention function, which takes all projections of a layer at once."""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F

from fxrpg.lowering import decomposes


def _without_dispatch(function: Any) -> Any:
    """`function`, written in Python, with its own code for any tensors: the ops inside meet generated weights one by one."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    own = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


attention = decomposes(F.multi_head_attention_forward)(_without_dispatch(F.multi_head_attention_forward))
