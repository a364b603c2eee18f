"""Bits and codes: the bytes that files hold, against Python's integers."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxrpg import Pemn
from fxrpg.packing import codes_of, pack_bits, pack_quantised, packed_size, read_quantised, steps_of, unpack_bits
from fxrpg.view import View


def fixed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Bits.


def test_golden_bytes():
    """The first entry is the lowest bit of the first byte; the last byte is filled up with zeros."""
    assert pack_bits(torch.tensor([True])).tolist() == [1]
    assert pack_bits(torch.tensor([False, True, False, False, False, False, False, True, True])).tolist() == [130, 1]
    assert pack_bits(torch.ones(17, dtype=torch.bool)).tolist() == [255, 255, 1]
    assert pack_bits(torch.zeros(0, dtype=torch.bool)).tolist() == []


@given(st.lists(st.booleans(), max_size=200), st.data())
def test_bytes_are_their_definition(mask, data):
    packed = pack_bits(torch.tensor(mask, dtype=torch.bool))
    whole = sum(bit << i for i, bit in enumerate(mask))
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == whole.to_bytes(-(-len(mask) // 8), "little")
    first = data.draw(st.integers(0, len(mask)))
    count = data.draw(st.integers(0, len(mask) - first))
    found = unpack_bits(packed, first, count)
    assert found.dtype == torch.bool
    assert found.tolist() == mask[first : first + count]


def test_masks_of_any_shape_are_packed_row_by_row():
    mask = torch.rand(5, 3, 7, generator=fixed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 0, 105).view(5, 3, 7), mask)
    assert torch.equal(pack_bits(mask.permute(2, 0, 1)), pack_bits(mask.permute(2, 0, 1).contiguous()))
    assert torch.equal(pack_bits(mask.to(torch.uint8)), pack_bits(mask))


def test_packing_makes_no_tensor_elsewhere():
    mask = torch.rand(20, generator=fixed(0)) < 0.5
    with torch.device("meta"):
        assert torch.equal(unpack_bits(pack_bits(mask), 3, 9), mask[3:12])


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.05])
def test_half_kept_is_a_bit_a_weight_and_no_less(keep):
    """At keep=0.5 a mask of random scores is noise: no compressor makes it smaller. Far from half it can be."""
    generator = Pemn(keep=keep)
    count = 100_000
    view = View(generator=generator, seed=0, tensor=0, shape=(count,), order=(0,), offset=0, total=count, size=9)
    packed = generator.freeze(generator.init_state([view], 1.0), view)
    assert len(packed) == count // 8
    smaller = len(zlib.compress(packed.numpy().tobytes(), 9)) / len(packed)
    assert smaller >= 1 if keep == 0.5 else smaller < (0.95 if keep == 0.25 else 0.5)


# Quantised values.


def test_golden_codes():
    """Two codes of four bits share a byte, the first in its lower half; in two's complement; then the float32 steps."""
    values = torch.tensor([7.0, -7.0, 1.0, -2.0, 3.4])
    assert pack_quantised(values, 4, 0).tolist() == [0x97, 0xE1, 0x03, 0, 0, 0x80, 0x3F]
    assert pack_quantised(values, 4, 2).tolist()[:3] == [0x97, 0x93, 0x07]
    assert pack_quantised(127 * values / 7, 8, 0).tolist() == [127, 129, 18, 220, 62, 0, 0, 0x80, 0x3F]


NUMBERS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40)


@given(NUMBERS, st.sampled_from([4, 8]), st.integers(0, 45), st.data())
def test_codes_are_their_definition(numbers, bits, block, data):
    values = torch.tensor(numbers)
    packed, size = pack_quantised(values, bits, block), len(numbers)
    run = block or size
    assert len(packed) == packed_size(size, bits, block) == -(-size * bits // 8) + 4 * -(-size // run)
    whole = packed.tolist()
    if bits == 8:
        codes = [byte - 256 * (byte > 127) for byte in whole[:size]]
    else:
        halves = [half for byte in whole[: -(-size // 2)] for half in (byte & 15, byte >> 4)]
        codes = [half - 16 * (half > 7) for half in halves[:size]]
    steps = torch.tensor(whole[-4 * -(-size // run) :], dtype=torch.uint8).view(torch.float32)
    assert all(abs(code) <= 2 ** (bits - 1) - 1 for code in codes)
    assert codes == [torch.round(v / steps[i // run]).item() for i, v in enumerate(values)]
    for start, step in zip(range(0, size, run), steps.tolist(), strict=True):
        largest = values[start : start + run].abs().max()
        exact = largest / (2 ** (bits - 1) - 1)
        assert step == (exact if exact >= torch.finfo(torch.float32).tiny else 1)
    cells = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50))).view(1, -1)
    expected = [[codes[cell] * steps[cell // run].item() for cell in cells[0].tolist()]]
    assert torch.equal(read_quantised(packed, cells, size, bits, block), torch.tensor(expected))


@pytest.mark.parametrize("bits", [4, 8])
def test_subnormal_numbers_are_zeros(bits):
    """A step below the least normal number has few digits, or is flushed: codes would leave their range."""
    values = torch.tensor([2e-43, -2.7e-43, 1e-40])
    assert steps_of(values, bits, 0).tolist() == [1]
    assert codes_of(values, steps_of(values, bits, 0), 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_numbers_break_their_run(bits, bad):
    values = torch.tensor([1.0, bad, 2.0, 3.0])
    found = read_quantised(pack_quantised(values, bits, 2), torch.arange(4), 4, bits, 2)
    assert found.isnan().tolist() == [True, True, False, False]
    live = codes_of(values, steps_of(values, bits, 2), 2) * steps_of(values, bits, 2).repeat_interleave(2)
    assert live.isnan().tolist() == [True, True, False, False]
