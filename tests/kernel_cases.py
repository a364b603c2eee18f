"""What the kernels' tests share: weights on the device, what counts as equal, poisoned memory, and compiling for GPUs.

Kernels are imported inside functions: reading this file needs no Triton.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conformance import generated
from torch import Tensor

from fxrpg.dispatch import Tile
from fxrpg.generator import Generator
from fxrpg.lowering import lowering_mode
from fxrpg.view import View
from fxrpg.weights import accumulate_gradient, generate_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Types of states and weights that kernels read and write."""
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""GPUs that kernels are compiled for: Ampere, Hopper, Blackwell and MI300."""


def weight_of(
    generator: Generator,
    shape: tuple[int, ...],
    *,
    size: int = 96,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Tensor]:
    """A `fused.weight.Weight` on the device, and its scaled values by plain torch.

    Args:
        size: of the state.
        transposed: whether it is the weight of a transposed convolution.
    """
    from fxrpg.kernels.fused.weight import Weight

    first, second, *kernel = range(len(shape))
    order = (second, *kernel, first) if transposed else (first, *kernel, second)
    found = generated(generator, shape, order, size, dtype)
    state, scale = found.state.detach().to(DEVICE), found.scale.to(DEVICE)
    with lowering_mode("materialized"):
        values = generate_weight(state, scale, found.view)
    return Weight.of(View.parse(found.view), state, scale), values


def images(*shape: int, last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images [N, C, H, W], in the layout channels_last if `last`."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal but for so much of each number, and of the largest."""
    size = expected.abs().max().item() or 1.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


def same_bits(found: Tensor | None, expected: Tensor) -> None:
    """Equal in shape, type and every bit, so that -0.0 is not 0.0; but any NaN is as good as another."""
    assert found is not None
    found, expected = found.cpu(), expected.cpu()
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    words = {2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert torch.equal(found.isnan(), expected.isnan())
    there = ~expected.isnan()
    assert torch.equal(found[there].view(words), expected[there].view(words))


def check_convolution(
    kernels: Any, weight: Any, dense: Tensor, x: Tensor, geometry: Any, tile: Tile, step: int = 1
) -> None:
    """Forward and both gradients of one convolution by `kernels`, fused.conv or fused.depthwise, on outputs full of NaN.

    Args:
        step: columns of the weight at whose multiples the tiles of the state's gradient begin.
    """
    stride, padding, dilation, transposed, output_padding, groups = geometry
    x, dense = x.requires_grad_(), dense.requires_grad_()
    if transposed:
        y = F.conv_transpose2d(x, dense, None, stride, padding, output_padding, groups, dilation)
    else:
        y = F.conv2d(x, dense, None, stride, padding, dilation, groups)
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, dense), grad)
    x, y = x.detach(), y.detach()
    out, back = torch.full_like(y, math.nan), torch.full_like(x, math.nan)
    kernels.convolve(out, x, weight, geometry, tile, backward=False)
    close(out, y)
    kernels.convolve(back, grad, weight, geometry, tile, backward=True)
    close(back, dx)
    found = torch.zeros(weight.state.shape, device=DEVICE)
    kernels.state_grad(weight.form(step, torch.float32).into(found), weight, grad, x, geometry, tile)
    with lowering_mode("materialized"):
        expected = accumulate_gradient(dw, weight.state, weight.scale, weight.view.text)
    close(found, expected)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, of integers 77: what is not written shows."""

    def poisoning(empty: Any) -> Any:
        def full(*args: Any, **kwargs: Any) -> Tensor:
            out = empty(*args, **kwargs)
            return out.fill_(math.nan if out.is_floating_point() else 77)

        return full

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poisoning(getattr(owner, name)))
        yield


class Compiled(NamedTuple):
    """What a launch comes to on a target: spilled registers, bytes of shared memory, instructions of tensor cores."""

    kernel: str
    target: str
    spills: int
    shared: int
    mma: str


def compiled(module: str) -> list[Compiled]:
    """Every launch that `launches()` of a test file makes, for every target; by a process that compiles, not interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), environment.get("PYTHONPATH", "")])
    code = f"import kernel_cases, {module}; kernel_cases.print_compiled({module}.launches)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = (line.split(" ") for line in done.stdout.splitlines())
    return [Compiled(kernel, target, int(spills), int(shared), mma) for kernel, target, spills, shared, mma in rows]


def print_compiled(launches: Any) -> None:
    """A line for each launch and target, as `compiled` reads it."""
    from bench import machine_code
    from fxrpg.kernels.fused.launch import recorded

    with recorded() as found:
        launches()
    codes = {}
    for launch, target in itertools.product(found, TARGETS):
        kernel = machine_code.compiled(launch, target)
        if kernel.hash not in codes:  # disassembling takes far longer than finding what was compiled before
            codes[kernel.hash] = machine_code.code_of(kernel)
        code = codes[kernel.hash]
        print(launch.kernel.__name__, target, code.spills, code.shared, ",".join(code.mma))
