"""The buffer `fxrpg_digest`: which seed and plan a model's state belongs to, and the refusal of any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.errors import FxrpgError

DIGEST = "fxrpg_digest"
PLAN = "_fxrpg_plan"
WRITTEN = "_fxrpg_written"
CHANGES = 8
"""How many changes of the buffer are looked at: DistributedDataParallel makes one before every forward."""

_initialized = getattr(torch.distributed, "is_initialized", lambda: False)


def encode_digest(digest: str) -> Tensor:
    """The buffer `fxrpg_digest`: the hexadecimal digits as float32, small integers that no cast or average changes."""
    return torch.tensor([int(digit, 16) for digit in digest], dtype=torch.float32, device="cpu")


def decode_digest(buffer: Tensor) -> str:
    """The digest in a buffer; digits out of range become "?"."""
    digits = buffer.detach().float().round().flatten().tolist()
    return "".join(f"{int(digit):x}" if 0 <= digit < 16 else "?" for digit in digits)


def watch_loading(root: nn.Module) -> None:
    """Have `load_state_dict` refuse a state of another seed, plan or implementation, before it changes anything."""
    if not _watches(root):
        root.register_load_state_dict_pre_hook(_check_digest)


def unwatch_loading(root: nn.Module) -> None:
    """Undo `watch_loading`."""
    for key in _watches(root):
        del root._load_state_dict_pre_hooks[key]


def _watches(root: nn.Module) -> list[int]:
    hooks: Any = root._load_state_dict_pre_hooks
    return [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _check_digest]


def _check_digest(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    found = state_dict.get(prefix + DIGEST)
    expected = module.__dict__[PLAN].digest()
    if found is not None and not found.is_meta and (digest := decode_digest(found)) != expected:
        raise FxrpgError(
            f"load_state_dict, {prefix + DIGEST}",
            f"the state must belong to this model's seed and plan (digest {expected[:12]}...)",
            f"digest {digest[:12]}...",
            "Transform the model with the seed, dof, method and plan that the state was trained with.",
        )


def check_written(root: nn.Module) -> None:
    """Refuse a digest that was written into the root past `load_state_dict`: another rank's, or a checkpoint's.

    DistributedDataParallel copies rank 0's numbers to all; on a rank with another seed they would mean other weights.
    """
    if not _initialized():
        return
    digest, (version, changes) = root._buffers.get(DIGEST), root.__dict__.get(WRITTEN, (0, 0))
    if type(digest) is not Tensor or digest.is_meta or digest.is_inference():
        return
    if digest._version == version or changes == CHANGES:
        return
    root.__dict__[WRITTEN] = digest._version, changes + 1
    expected, found = root.__dict__[PLAN].digest(), decode_digest(digest)
    if found != expected:
        raise FxrpgError(
            DIGEST,
            f"every rank and checkpoint must have this model's seed and plan (digest {expected[:12]}...)",
            f"digest {found[:12]}...",
            "Pass the same seed, dof, method and plan to transform everywhere.",
        )
