"""The container of a file, safetensors: read through one descriptor, never mapped into memory.

The library maps a file: then whoever cuts it short kills its reader (SIGBUS). It also opens it twice: then whoever replaces
it between the two has the reader see one file's header beside the other's tensors.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from math import prod
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fxrpg.errors import FxrpgError

# in the order in which safetensors lays tensors out
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TYPES = {text: dtype for dtype, text in DTYPES.items()}
MOST_DIMS = 64  # torch's own limit
MOST_HEADER = 100_000_000  # bytes: the library's own limit


class Entry(NamedTuple):
    """One tensor as the container declares it."""

    dtype: str
    shape: tuple[int, ...]


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """The file at `path`, open for reading. Raises FxrpgError for what is no file, OSError for what cannot be opened."""
    # a pipe does not wait for who writes to it; on Windows bytes stay as they are
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FxrpgError(str(path), "must be a file", "a folder or a device", "Pass a file that fxrpg.save wrote.")
    return os.fdopen(descriptor, "rb")


def read_layout(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata, and what tensors the file declares, in the order of their bytes; `file` then stands at the first one.

    Raises:
        ValueError, RecursionError: the file is not a whole safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_exactly(file, 8), "little")
    if length > min(MOST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = _exactly(file, length).decode()
    found = json.loads(text, object_pairs_hook=_once, parse_constant=_refused) if text.startswith("{") else None
    if found is None:
        raise ValueError("a header that is no JSON object")
    metadata = found.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("metadata that is not text by name")
    entries, end = {}, 0
    declared = [(*_entry(fields), name) for name, fields in found.items()]
    for begin, then, entry, name in sorted(declared):
        if begin != end:
            raise ValueError(f"a tensor that begins at {begin}, where the last one ends at {end}")
        entries[name], end = entry, then
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length} bytes of tensors, of which the header tells {end}")
    return metadata, entries


def read_tensors(file: BinaryIO, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors that `read_layout` found. Raises ValueError where the file ends early or holds what is no truth value."""
    tensors = {}
    for name, entry in entries.items():
        tensor = tensors[name] = torch.empty(entry.shape, dtype=TYPES[entry.dtype], device="cpu")
        there = tensor.view(-1).view(torch.uint8)
        if file.readinto(there.numpy()) != len(there):  # type: ignore[attr-defined]
            raise ValueError("fewer bytes than when it was opened")
        if tensor.dtype == torch.bool and bool((there > 1).any()):  # torch's ops disagree on what those are
            raise ValueError("a truth value that is neither 0 nor 1")
    return tensors


def _exactly(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise ValueError(f"{len(found)} bytes where there must be {count}")
    return found


def _entry(fields: Any) -> tuple[int, int, Entry]:
    """(first byte, byte after the last, what lies there) of a tensor, whose size is what its shape and type come to."""
    if type(fields) is not dict or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor without just type, shape and place")
    dtype, shape, place = fields["dtype"], fields["shape"], fields["data_offsets"]
    known = type(dtype) is str and dtype in TYPES
    whole = all(type(numbers) is list and all(type(n) is int and n >= 0 for n in numbers) for numbers in (shape, place))
    if not known or not whole or len(shape) > MOST_DIMS or len(place) != 2:
        raise ValueError("a tensor of a type, shape or place that torch has not")
    if place[1] - place[0] != prod(shape) * TYPES[dtype].itemsize:
        raise ValueError("a tensor whose place is not as large as its shape")
    return place[0], place[1], Entry(dtype, tuple(shape))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a header with a name twice")
    "".join(found).encode()  # a ValueError for half a surrogate pair, which is no text
    return found


def _refused(text: str) -> Any:
    raise ValueError(f"{text} in the header")
