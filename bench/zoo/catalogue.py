"""The real models that `fxrpg.transform` must handle, as data: which there are, which a quick run takes, how to build one."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.errors import FxrpgError

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A module, and arguments that it can be called with."""
Build = Callable[[], Example]
Models = dict[str, tuple[str, Build]]
"""Name -> (the package on PyPI that it is of, how to build it: random weights, seconds on a CPU)."""

FILES = ("torchvision", "timm", "transformers", "others", "specimens")

THIRD = (
    "tv.resnet18", "tv.mobilenet_v3_small", "tv.swin_t", "tv.fasterrcnn_mobilenet",
    "timm.test_efficientnet", "timm.test_nfnet", "timm.test_coatnet", "timm.mobileone_s0", "timm.mobilevit_xxs",
    "hf.BertForMaskedLM", "hf.GPT2LMHeadModel", "hf.MixtralForCausalLM", "hf.MambaForCausalLM", "hf.Wav2Vec2ForCTC",
    "df.AutoencoderKL", "vp.LeViT", "xt.EncoderRotaryGLU", "smp.Unet", "mo.UNETR", "pyg.GAT",
    "nn.LSTMLM_tied", "nn.SpectralNorm",
)  # fmt: skip
"""Of every package and every kind: convolutions plain, depthwise, transposed and in 3D, attention, recurrence, scans,
graphs, detection, experts, tied weights, parametrizations, scaled weights."""


def images(side: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, side, side)


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, 90, (2, length))


def models(file: Path | None = None) -> Models:
    """All models of the zoo; or those of a file that has a dict `MODELS` such as the files in `models/` have."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a model that asked for weights would fail, not wait
    if file is None:
        return {
            name: entry
            for one in FILES
            for name, entry in importlib.import_module(f"bench.zoo.models.{one}").MODELS.items()
        }
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FxrpgError("--models", "must be a Python file", str(file), "Pass one that has a dict MODELS.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(found := getattr(module, "MODELS", None), dict):
        raise FxrpgError("--models", "must have a dict MODELS", f"none in {file}", "Write name -> (package, build).")
    return found


def chosen(every: Models, only: str = "", third: bool = False) -> list[str]:
    """Names of the models of a run.

    Raises:
        FxrpgError: `only` matches none.
    """
    names = [name for name in every if not third or name in THIRD]
    found = [name for name in names if not only or fnmatch.fnmatchcase(name, only)]
    if not found:
        groups = ", ".join(f"'{group}.*'" for group in dict.fromkeys(name.partition(".")[0] for name in names))
        raise FxrpgError("--only", "must match a model", repr(only), f"Pass a glob such as one of {groups}.")
    return found
