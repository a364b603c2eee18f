"""Models by name: the papers' networks, those of torchvision, and any callable."""

from __future__ import annotations

import difflib
import importlib
import importlib.util

import torch
from torch import nn

from fxrpg.building import build
from fxrpg.errors import FxrpgError
from fxrpg.networks import NETWORKS


def build_network(name: str, classes: int, side: int, seed: int) -> nn.Module:
    """The network called `name` for pictures of `side` pixels; torch's global generators are left as they were.

    Raises:
        FxrpgError: there is none; it does not take such pictures, or does not return one number a class.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if ":" in name:
            model = build(name)
        elif name in NETWORKS:
            model = NETWORKS[name](classes, side)
        else:
            model = _from_torchvision(name, classes)
    _check(model, name, classes, side)
    return model


def _from_torchvision(name: str, classes: int) -> nn.Module:
    names: list[str] = list(NETWORKS)
    missing = "; for more, pip install 'fxrpg[vision]'"
    try:
        if importlib.util.find_spec("torchvision") is not None:
            models = importlib.import_module("torchvision.models")
            names, missing = [*names, *models.list_models(module=models)], " or of torchvision.models"
            if name in names:
                return models.get_model(name, weights=None, num_classes=classes)
    except (ImportError, RuntimeError):  # the latter where it does not fit the torch that is installed
        pass
    near = difflib.get_close_matches(name, dict.fromkeys(names), 3)
    must = f"must be one of {', '.join(NETWORKS)}{missing}, or package.module:callable"
    fix = f"Did you mean {' or '.join(near)}?" if near else "Pass one of them."
    raise FxrpgError("--model", must, repr(name), fix)


@torch.no_grad()
def _check(model: nn.Module, name: str, classes: int, side: int) -> None:
    """One look at two pictures, before anything is trained."""
    must = f"must take pictures [n, 3, {side}, {side}] and return [n, {classes}], a number for each class"
    fix = "Choose a model for such pictures."
    mode = model.training
    try:
        out = model.eval()(torch.zeros(2, 3, side, side))
    except Exception as e:  # the model may be of any make
        raise FxrpgError(f"--model {name}", must, f"{type(e).__name__}: {e}", fix) from e
    finally:
        model.train(mode)
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if shape != (2, classes):
        raise FxrpgError(f"--model {name}", must, f"{shape} for two pictures", fix)
