"""Folders of Hugging Face models: configuration, generation settings, and the file that `fxrpg.save` writes.

That file is called `fxrpg.safetensors`, because transformers loads a `model.safetensors` that lacks weights as if they were
to be trained from scratch: it draws them at random and only logs so. Of a folder without one it says that it has no weights.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fxrpg.assemble import plan_of
from fxrpg.checkpoint import load, save
from fxrpg.errors import FxrpgError
from fxrpg.owner import plain_class

WEIGHTS = "fxrpg.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, withhold_seed: bool = False) -> None:
    """Write a transformed Hugging Face `model` to a folder, from which `from_pretrained` builds it without any other code.

    Args:
        model: the result of `transform` of a `transformers.PreTrainedModel`.
        folder: where to; made if it does not exist. Tokenizers and processors can be saved beside it.
        withhold_seed: as in `save`.

    Raises:
        FxrpgError: `model` is not transformed or none of transformers; `folder` holds ordinary weights, which transformers
            would take for the model's; or as `save` does.
        OSError: a file cannot be written.
    """
    plan_of(model)
    cls: Any = plain_class(model)
    if not _pretrained(cls):
        fix = "Save other models with fxrpg.save."
        raise FxrpgError("save_pretrained", "model must be a transformers.PreTrainedModel", cls.__name__, fix)
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FxrpgError(str(folder), "must be a folder, or a new name", "a file", "Choose another path.")
    if found := _ordinary_weights(target):
        fix = "Choose another folder, or remove it."
        raise FxrpgError(str(folder), "must hold no ordinary weights, which transformers would read", found, fix)
    target.mkdir(parents=True, exist_ok=True)
    whole: Any = model
    config = copy.deepcopy(whole.config)
    config.architectures, config.dtype = [cls.__name__], whole.dtype
    config.save_pretrained(target)
    if whole.can_generate():
        whole.generation_config.save_pretrained(target)
    save(model, target / WEIGHTS, withhold_seed=withhold_seed)


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    model_class: Any = None,
    seed: int | None = None,
    strict: bool = False,
) -> nn.Module:
    """The model that `save_pretrained` wrote to `folder`, on the CPU, in eval mode, without its full weights in memory.

    Buffers that no file holds (rotary frequencies, say) are computed anew, as transformers does it. No code in the folder
    is run. Other implementations of attention or experts are set afterwards: `model.set_attn_implementation("eager")`.

    Args:
        folder: a local folder.
        model_class: the model's class, where transformers itself does not have it.
        seed: needed where the file withholds it.
        strict: as in `transform`.

    Raises:
        FxrpgError: a file is missing, damaged or of another model; the class is unknown; transformers is not installed.
        OSError: a file cannot be opened.
    """
    where = Path(folder)
    _check_files(where)
    config, cls = _architecture(where, model_class)
    with _usable(where / CONFIG), _without_values():
        empty = cls._from_config(config)
    model: Any = load(empty, where / WEIGHTS, seed=seed, strict=strict)
    if model.can_generate():
        _check_file(where, GENERATION, "Save the model again with fxrpg.save_pretrained.")
        generation = _transformers().GenerationConfig
        with _usable(where / GENERATION):
            model.generation_config = generation.from_pretrained(where, local_files_only=True)
    return model.eval()


def _architecture(folder: Path, given: Any) -> tuple[Any, Any]:
    """The folder's configuration, and the model class: the given one, or that of transformers which it names."""
    if given is not None and not _pretrained(given):
        fix = "Pass the model's class itself, not an Auto class."
        raise FxrpgError("model_class", "must be a subclass of transformers.PreTrainedModel", repr(given), fix)
    transformers = _transformers()
    with _usable(folder / CONFIG):
        if given is not None:
            return given.config_class.from_pretrained(folder, local_files_only=True), given
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = (config.architectures or [None])[0]
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not _pretrained(found) or not isinstance(config, found.config_class or ()):
        fix = "Import the class yourself and pass it as model_class=..."
        raise FxrpgError(str(folder / CONFIG), "must name a model class of transformers", repr(name), fix)
    return config, found


def _pretrained(cls: Any) -> bool:
    """Whether `cls` is a model class of transformers, which is not imported to find out."""
    bases = cls.__mro__ if isinstance(cls, type) else ()
    return any(b.__name__ == "PreTrainedModel" and b.__module__.startswith("transformers.") for b in bases)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as e:
        fix = "Run: pip install transformers."
        raise FxrpgError("from_pretrained", "transformers must be installed", str(e), fix) from None


@contextlib.contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises about a file that is not as it should be into one error."""
    try:
        yield
    except Exception as e:
        fix = "Save the model again with fxrpg.save_pretrained; of a class of your own, pass it as model_class=..."
        must, found = "must be a configuration that transformers can use", textwrap.shorten(str(e), 300)
        raise FxrpgError(str(path), must, found, fix) from e


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Put parameters that this thread's modules register on the meta device. Buffers, which a file may lack, get values."""
    thread = threading.get_ident()

    def moved(module: nn.Module, name: str, parameter: Any) -> Any:
        if type(parameter) is not nn.Parameter or parameter.is_meta or threading.get_ident() != thread:
            return None  # a tied parameter that was moved already stays the same object
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        fix = "Pass a folder that fxrpg.save_pretrained wrote; fetch one from a hub first."
        raise FxrpgError(str(folder), "must be a local folder", "a file" if folder.exists() else "none", fix)
    fix = "Pass a folder that fxrpg.save_pretrained wrote."
    if (found := _ordinary_weights(folder)) and not (folder / WEIGHTS).is_file():
        fix = (
            f"Transform a model and load {found} into it, if a transformed model's own save_pretrained or a Trainer wrote "
            f"it. {fix}"
        )
    for name in (WEIGHTS, CONFIG):
        _check_file(folder, name, fix)


def _check_file(folder: Path, name: str, fix: str) -> None:
    if not (folder / name).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder"
        raise FxrpgError(str(folder), f"must hold {name}", found, fix)


def _ordinary_weights(folder: Path) -> str:
    """Name of a file in which transformers would look for all weights; "" if there is none."""
    found = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]
    return min(path.name for path in found) if found else ""
