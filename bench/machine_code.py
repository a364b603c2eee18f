"""What a kernel launch comes to on a GPU that need not be there: compiled by Triton, read back from the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fxrpg.kernels.fused.launch import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
PRODUCTS = re.compile(r"(?:HG|IG|QG|H|I|UTCH|UTCI|UTCQ)MMA|v_mfma_[a-z0-9_]+")
"""Tensor cores: of Hopper (HGMMA, IGMMA), of Ampere (HMMA, IMMA), of Blackwell (UTC...) and of AMD."""
WIDE = re.compile(r"LDG(?:STS)?\.E\.(?:\w+\.)*128|(?:global|buffer)_load_dwordx4")
"""Loads of 16 bytes a thread from global memory."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """A compiled kernel in numbers.

    Args:
        registers: of 32 bits, a thread (on AMD, vector registers).
        spills: of registers to memory: instructions that read or write local memory, or on AMD the registers.
        shared: bytes of shared memory a program.
        instructions: of the main loop, which is the largest; of the whole kernel where it has none.
        wide_loads: instructions of the main loop that load 16 bytes a thread.
        mma: names of the instructions of tensor cores.
    """

    registers: int
    spills: int
    shared: int
    instructions: int
    wide_loads: int
    mma: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: where it is, its name, and where it jumps ("" if it does not)."""

    place: int
    name: str
    jump: int | None = None


def target_of(name: str) -> GPUTarget:
    """The target that a card's table names: "sm_90", "gfx942"."""
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def compiled(launch: Launch, target: str) -> Any:
    """The kernel that Triton compiles for a launch on `target`, by Triton's own reading of the arguments.

    Which integers become constants and which pointers are known to be aligned decides how wide loads are. Triton's binder
    is asked for it, as its `JITFunction.run` does, rather than a copy of its rules.
    """
    kernel, machine = launch.kernel, target_of(target)
    backend = make_backend(machine)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    named = launch.constants | launch.options
    bound, specialization, rest = bind(*launch.args, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=machine, options=options.__dict__)


def code_of(kernel: Any) -> Code:
    """What a compiled kernel's machine code says."""
    if "cubin" in kernel.asm:
        return _nvidia(kernel.asm["cubin"], kernel.metadata.shared)
    return _amd(kernel.asm["amdgcn"], kernel.metadata.shared)


def _nvidia(cubin: bytes, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = list(_sass(text))
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    local = sum(line.name.startswith(("LDL", "STL")) for line in lines)
    return _counted(lines, registers, local + stack, shared)


def _sass(text: str) -> Iterator[Instruction]:
    for place, name, rest in SASS.findall(text):
        jump = re.search(r"0x([0-9a-f]+)", rest) if name.split(".")[0] == "BRA" else None
        yield Instruction(int(place, 16), name, int(jump[1], 16) if jump else None)


def _amd(text: str, shared: int) -> Code:
    places, lines = {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            places[label[1]] = len(lines)
        elif found := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            lines.append((found[1], found[2]))
    jumps = (rest.strip() if name.startswith(("s_cbranch", "s_branch")) else "" for name, rest in lines)
    code = [
        Instruction(i, name, places.get(jump)) for i, ((name, _), jump) in enumerate(zip(lines, jumps, strict=True))
    ]
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    return _counted(code, registers, spills, shared)


def _counted(lines: list[Instruction], registers: int, spills: int, shared: int) -> Code:
    start, end = _main_loop(lines)
    products = sorted({match[0] for line in lines if (match := PRODUCTS.match(line.name))})
    wide = sum(bool(WIDE.match(line.name)) for line in lines[start:end])
    return Code(
        registers=registers,
        spills=spills,
        shared=shared,
        instructions=end - start,
        wide_loads=wide,
        mma=tuple(products),
    )


def _main_loop(lines: list[Instruction]) -> tuple[int, int]:
    """[start, end) of what the longest backward jump encloses. A kernel ends in a jump to itself, which is none."""
    index = {line.place: i for i, line in enumerate(lines)}
    loops = [(index[x.jump], i + 1) for i, x in enumerate(lines) if x.jump is not None and x.jump < x.place]
    return max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(lines)))
