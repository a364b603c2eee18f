"""Kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def compiled(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], target: tuple[Any, ...]) -> Any:
    """`kernel` for a target, its tensors taken to begin at multiples of 16 bytes.

    Args:
        arguments: what a launch would pass in front of the constants: tensors and ints.
        constants: "args", a tuple of tensors, and everything that is `tl.constexpr`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    signature, attributes, fixed = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if name == "args":
            signature[name] = tuple(f"*{NAMES[x.dtype]}" for x in value)
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        elif isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[i,] = [["tt.divisibility", 16]]
        elif name in constants:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4, "enable_fp_fusion": True})


def in_process_without_interpreter(module: str, call: str) -> str:
    """What `module.call()`, of a file beside this one, prints where Triton compiles instead of interpreting."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), environment.get("PYTHONPATH", "")])
    code = f"import {module}; {module}.{call}()"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    return found.stdout
