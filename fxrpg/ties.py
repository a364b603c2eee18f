"""The lists by which Hugging Face models tie their parameters: a generated weight is tied by its view, and leaves them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

LISTS = ("_tied_weights_keys", "all_tied_weights_keys")
BEFORE = "_fxrpg_ties"


def untie(root: nn.Module, generated: Collection[str]) -> None:
    """Take the weights called `generated` off the lists that `tie_weights` goes by: it would look for parameters.

    transformers calls it again whenever embeddings are resized or replaced. What stays is written out name by name.
    """
    for path, module in root.named_modules():
        if not hasattr(module, "get_expanded_tied_weights_keys"):
            continue
        prefix = f"{path}." if path else ""
        mine = {name.removeprefix(prefix) for name in generated if name.startswith(prefix)}
        if mine:
            found = module.get_expanded_tied_weights_keys(all_submodels=False), module.all_tied_weights_keys
            module.__dict__[BEFORE] = {key: vars(module)[key] for key in LISTS if key in vars(module)}
            for key, ties in zip(LISTS, found, strict=True):
                module.__dict__[key] = {target: source for target, source in ties.items() if target not in mine}


def tie_again(root: nn.Module) -> None:
    """Undo `untie`."""
    for module in root.modules():
        before = module.__dict__.pop(BEFORE, None)
        if before is not None:
            for key in LISTS:
                module.__dict__.pop(key, None)
            module.__dict__.update(before)
