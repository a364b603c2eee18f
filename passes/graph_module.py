"""A graph module that keeps its plan when it is copied or pickled; torch's own keeps only what its graph mentions."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch.fx as fx

from fxrpg.digest import DIGEST, PLAN, watch_loading
from fxrpg.owner import TRACE, link_of, plain_class


def adopt(gm: fx.GraphModule) -> None:
    """Give `gm` the class that keeps its plan."""
    named = next(cls for cls in type(gm).__mro__ if cls.__qualname__.split(".")[-1] != "GraphModuleImpl")
    _set_class(gm, _keeping(named))


def release(gm: fx.GraphModule) -> None:
    """Give `gm` its ordinary class back."""
    _set_class(gm, plain_class(gm))


def _set_class(gm: fx.GraphModule, cls: Any) -> None:
    # torch sets `forward` on the class, so that each graph module has a class of its own with this name
    gm.__class__ = type(cls)("GraphModuleImpl", (cls,), {})
    gm.recompile()


@functools.cache
def _keeping(base: Any) -> Any:
    namespace = {"_fxrpg_base": base, "__deepcopy__": _deepcopy, "__reduce__": _reduce}
    return type(base)(f"Generated{base.__name__}", (base,), namespace)


def _deepcopy(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    result = plain_class(self).__deepcopy__(self, memo)
    return _carry(result, copy.deepcopy(_carried(self), memo))


def _reduce(self: fx.GraphModule) -> tuple[Any, ...]:
    base: Any = plain_class(self)
    return _revive, (base, *base.__reduce__(self)[:2], _carried(self))


def _revive(base: Any, function: Any, arguments: tuple[Any, ...], carried: dict[str, Any]) -> fx.GraphModule:
    gm = function(*arguments)
    _set_class(gm, _keeping(base))
    return _carry(gm, carried)


def _carried(gm: fx.GraphModule) -> dict[str, Any]:
    return {"plan": gm.__dict__[PLAN], "trace": gm.__dict__[TRACE], "digest": gm.get_buffer(DIGEST)}


def _carry(gm: fx.GraphModule, carried: dict[str, Any]) -> fx.GraphModule:
    gm.__dict__[PLAN], gm.__dict__[TRACE] = carried["plan"], carried["trace"]
    gm.register_buffer(DIGEST, carried["digest"])
    for module in gm.modules():
        if link := link_of(module):
            link.root = gm
    watch_loading(gm)
    return gm
