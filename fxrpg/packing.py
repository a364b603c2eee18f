"""Numbers in few bits: masks at one bit an entry, quantised values at eight or four, scales at sixteen."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rounded(x: float) -> float:
    """`x` with 16 significant bits: those of a measured deviation that do not depend on the number of threads."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * (1 << 16)), exponent - 16)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes, eight entries each, the first in the lowest bit.

    Returns:
        uint8 [ceil(n / 8)]; the last byte is filled up with zeros.
    """
    bits = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, first: int, count: int) -> Tensor:
    """Entries `first .. first + count - 1` of what `pack_bits` packed: bool [count]."""
    low, high = first // 8, -(-(first + count) // 8)
    bits = packed[low:high, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.view(-1)[first - 8 * low :][:count].bool()


def steps_of(values: Tensor, bits: int, block: int) -> Tensor:
    """The step of each run of `block` values (0: of all of them): their largest magnitude over 2^(bits-1) - 1.

    Returns:
        Tensor of the values' type, [blocks]; one for a run of zeros, or of numbers so small that the step would be
        subnormal: a device may flush it, and its few bits make codes out of range.
    """
    block = block or len(values)
    runs = torch.nn.functional.pad(values.detach(), (0, -len(values) % block)).view(-1, block)
    steps = runs.abs().amax(1) / (2 ** (bits - 1) - 1)
    return torch.where(steps < torch.finfo(steps.dtype).tiny, 1, steps)


def codes_of(values: Tensor, steps: Tensor, block: int) -> Tensor:
    """`values` in whole steps, rounded half to even, of the values' type."""
    return torch.round(values / spread(steps, block, len(values)))


def spread(steps: Tensor, block: int, count: int) -> Tensor:
    """The step of every value: [count], or [1] where all have one."""
    return steps.repeat_interleave(block)[:count] if block else steps


def pack_quantised(values: Tensor, bits: int, block: int) -> Tensor:
    """Codes of eight or four bits and their float32 steps, in one tensor of bytes.

    Returns:
        uint8 [code bytes + 4 * blocks]. Two codes of four bits share a byte, the first in its lower half; codes are in
        two's complement.
    """
    wide = values.detach().float()
    steps = steps_of(wide, bits, block)
    codes = codes_of(wide, steps, block).to(torch.int8).view(torch.uint8)
    if bits == 4:
        pairs = torch.nn.functional.pad(codes & 15, (0, len(codes) % 2)).view(-1, 2)
        codes = pairs[:, 0] | pairs[:, 1] << 4
    return torch.cat([codes, steps.view(torch.uint8)])


def packed_size(count: int, bits: int, block: int) -> int:
    """Bytes of `pack_quantised`."""
    return -(-count * bits // 8) + 4 * -(-count // (block or count))


def read_quantised(packed: Tensor, cells: Tensor, count: int, bits: int, block: int) -> Tensor:
    """The values at the int64 indices `cells` of `count` packed ones, float32 of the shape of `cells`."""
    codes = -(-count * bits // 8)
    steps = packed[codes:].clone().view(torch.float32)  # a copy: the steps may begin at any byte
    found = packed[cells * bits // 8]
    if bits == 4:
        found = found >> (cells % 2 * 4).to(torch.uint8) << 4  # the sign bit of the code on top
    codes_there = found.view(torch.int8).to(torch.float32) / (16 if bits == 4 else 1)
    return codes_there * (steps[cells // block] if block else steps)
