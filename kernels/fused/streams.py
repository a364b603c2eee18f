"""The random words of a stream, drawn once for all programs of a kernel that cross them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxrpg.hashing import stream_keys
from fxrpg.kernels.fused.launch import cdiv, launch
from fxrpg.tiles.hashing import wide_word_at
from fxrpg.view import View


@triton.jit(do_not_specialize=["outer", "inner"])
def words_kernel(out, count, outer, inner, BLOCK: tl.constexpr):
    """The first `count` words of a stream."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        out + i, wide_word_at(i, outer.to(tl.uint32), inner.to(tl.uint32)).to(tl.int32, bitcast=True), mask=i < count
    )


def keys(view: View, purpose: int) -> tuple[int, int]:
    """The two keys of the view's stream for `purpose` (`hashing.ROW`, ...), as the int32 with their bits."""
    outer, inner = stream_keys(view.seed, purpose, view.tensor)
    return (outer ^ 1 << 31) - (1 << 31), (inner ^ 1 << 31) - (1 << 31)


def stream(view: View, purpose: int, count: int, device: torch.device) -> Tensor:
    """The first `count` words of the view's stream for `purpose`: int32, `hashing.words_at`."""
    out = torch.empty(count, dtype=torch.int32, device=device)
    launch(words_kernel, (cdiv(count, 1024),), out, out, count, *keys(view, purpose), BLOCK=1024)
    return out
