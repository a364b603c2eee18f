"""Models of the user's own, by the name of what builds them."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from fxrpg.errors import FxrpgError


def build(spec: str, device: str = "cpu") -> nn.Module:
    """The model that `package.module:callable` builds; modules in the current folder are found too.

    Raises:
        FxrpgError: the module or the callable does not exist, fails, or builds something else.
    """
    where, fix = f"model {spec!r}", "Write package.module:callable, such as torchvision.models:resnet18."
    module_name, separator, attribute = spec.partition(":")
    if not separator or not module_name or not attribute:
        raise FxrpgError(where, "must name a module and a callable", repr(spec), fix)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    must = "must be importable"
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
        must = "must build without arguments"
        with torch.device(device):
            model = target()
    except (Exception, SystemExit) as e:  # the user's code may do anything
        raise FxrpgError(where, must, f"{type(e).__name__}: {e}", fix) from e
    if not isinstance(model, nn.Module):
        raise FxrpgError(where, "must build a torch.nn.Module", type(model).__name__, fix)
    return model
