"""Reads ring files with nothing but Python's standard library, from the README's section "The file format" alone.

`python -I -S tests/format_reader.py FILE [SEED]` prints {name: [type, shape, the weight's bytes in hexadecimal]}.
"""

import hashlib
import itertools
import json
import math
import struct
import sys

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
PERMUTE, SIGN, CELL = 1, 2, 3
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def derive_key(seed, *labels):
    h = 0
    for word in (1, seed, *labels):
        h = ((h ^ word) + 0x9E3779B97F4A7C15) & M64
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & M64
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & M64
        h ^= h >> 31
    return h >> 32


def mix32(h):
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & M32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & M32
    return h ^ (h >> 16)


def word_at(i, seed, *labels):
    outer, inner = derive_key(seed, *labels, 0), derive_key(seed, *labels, 1)
    return mix32((mix32((i & M32) ^ outer) + (i >> 32) * 0x9E3779B9 + inner) & M32)


def factors(count):
    root = math.isqrt(count)
    lowest = min(root, max(2, (root + 1) // 2))
    a = min(range(root, lowest - 1, -1), key=lambda a: -count % a)  # of equals the largest
    return a, -(-count // a)


def permuted(x, count, seed, *labels):
    a, b = factors(count)
    keys = [derive_key(seed, *labels, r) for r in range(8 if count < 1 << 14 else 6)]
    while True:
        left, right = divmod(x, b)
        for r, key in enumerate(keys):
            source, n = (right, a) if r % 2 == 0 else (left, b)
            t = (source * 0x9E3779B1 + key) & M32
            step = (((t * (t | 1)) & M32) * n) >> 32
            if r % 2 == 0:
                left = (left + step) % a
            else:
                right = (right + step) % b
        x = left * b + right
        if x < count:
            return x


def first_draws(seed):
    words = [word_at(i, seed, purpose, 0) for purpose in (PERMUTE, SIGN) for i in range(8)]
    signed = [word - (1 << 32) if word >> 31 else word for word in words]
    return hashlib.sha256(f"1 {derive_key(seed, PERMUTE)} {signed}".encode()).hexdigest()[:16]


def cells(row, settings, total, size, seed):
    """The ring cell of every element in logical order."""
    shape, order, tensor = row["original"] or row["shape"], row["order"], row["tensor"]
    block, count = settings["block"], math.prod(shape)
    fan_in = count // math.prod(shape[axis] for axis in order[: row.get("stack", 0) + 1])
    first = row["offset"] // block
    for i in range(count):
        b, lane = divmod(i, block)
        if settings["layout"] == "arc":
            place = first + (permuted(b, -(-count // block), seed, PERMUTE, tensor) if settings["permute"] else b)
        elif settings["layout"] == "shuffle":
            place = first + b
            place = permuted(place, total // block, seed, PERMUTE, 0xFFFFFFFF) if settings["permute"] else place
        elif settings["layout"] == "hash":
            place = word_at(b, seed, CELL, tensor) * -(-size // block) >> 32
        else:
            line, column = divmod(i, fan_in)
            column = permuted(column, fan_in, seed, PERMUTE, tensor) if settings["permute"] else column
            yield (row["offset"] + line * fan_in + line // (size // math.gcd(fan_in, size)) + column) % size
            continue
        yield (place * block + lane) % size


def negated(row, settings, seed):
    """Whether the sign of each element in logical order is turned."""
    shape, order = row["original"] or row["shape"], row["order"]
    count = math.prod(shape)
    fan_in = count // math.prod(shape[axis] for axis in order[: row.get("stack", 0) + 1])
    for i in range(count):
        j = i % fan_in if settings["layout"] == "block_diagonal" else i
        yield settings["reflect"] and word_at(j // 32, seed, SIGN, row["tensor"]) >> (j % 32) & 1


def decoded(data, dtype):
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    letter = {"F64": "d", "F32": "f", "F16": "e"}[dtype]
    return list(struct.unpack(f"<{len(data) // WIDTH[dtype]}{letter}", data))


def encoded(value, dtype):
    """The nearest number of the type, ties to even; what is too large is infinite."""
    if dtype == "BF16":
        bits = struct.unpack("<I", encoded(value, "F32"))[0]
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    try:
        return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)
    except OverflowError:
        return encoded(math.copysign(math.inf, value), dtype)


def dense_state(scope, tensors):
    """The ring's numbers: as they are stored, with pruned ones put back as zeros, or from codes and steps."""
    (dtype, data), size, settings = tensors[scope["state"]], scope["size"], scope["settings"]
    if scope["frozen"]:
        bits, run = settings["bits"], settings["bits_block"] if 0 < settings["bits_block"] < size else size
        steps = decoded(data[-(-size * bits // 8) :], "F32")
        codes = [data[i * bits // 8] >> (4 * (i % 2) if bits == 4 else 0) & (1 << bits) - 1 for i in range(size)]
        codes = [code - (1 << bits) if code >> bits - 1 else code for code in codes]
        return [decoded(encoded(code * steps[i // run], "F32"), "F32")[0] for i, code in enumerate(codes)]
    values = decoded(data, dtype)
    if settings["sparse"]:
        kept, left = tensors[scope["state"] + "_kept"][1], iter(values)
        values = [next(left) if kept[i // 8] >> (i % 8) & 1 else 0.0 for i in range(size)]
    return values


def weight(row, scope, total, tensors, seed):
    """The weight's bytes in PyTorch's order, in the type of its scope."""
    state, dtype = dense_state(scope, tensors), scope["dtype"]
    shape, order = row["original"] or row["shape"], row["order"]
    logical = {}  # index in PyTorch's axes -> bytes
    places = itertools.product(*(range(shape[axis]) for axis in order))
    read = cells(row, scope["settings"], total, scope["size"], seed)
    for place, cell, minus in zip(places, read, negated(row, scope["settings"], seed), strict=True):
        value = -state[cell] if minus else state[cell]
        wide = value * row["scale"]
        exact = wide if dtype == "F64" else decoded(encoded(wide, "F32"), "F32")[0]
        logical[tuple(place[order.index(axis)] for axis in range(len(order)))] = encoded(exact, dtype)
    kept = [chosen or range(side) for chosen, side in zip(row["kept"] or [[]] * len(shape), shape, strict=True)]
    return b"".join(logical[index] for index in itertools.product(*kept))


def read(data, seed=None):
    (length,) = struct.unpack("<Q", data[:8])
    container = json.loads(data[8 : 8 + length])
    text, body = container.pop("__metadata__")["fxrpg"], data[8 + length :]
    header, digest = json.loads(text), hashlib.sha256()
    unsigned = {key: value for key, value in header.items() if key != "digest"}
    canonical = json.dumps(unsigned, sort_keys=True, separators=(",", ":"))
    assert header["format"] == 1
    assert header["digest"] == hashlib.sha256(canonical.encode()).hexdigest()
    tensors = {}
    for name, entry in sorted(container.items()):
        begin, end = entry["data_offsets"]
        tensors[name] = entry["dtype"], body[begin:end]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode() + body[begin:end])
    assert header["tensors"] == digest.hexdigest()
    seed = header["seed"] if seed is None else seed
    assert header["draws"] == first_draws(seed)
    found = {}
    for row in header["table"]:
        scope = header["scopes"][row["scope"]]
        assert scope["method"] == "ring"
        block = scope["settings"]["block"]
        together = [r["original"] or r["shape"] for r in header["table"] if r["scope"] == row["scope"]]
        total = sum(-(-math.prod(shape) // block) * block for shape in together)
        found[row["name"]] = [scope["dtype"], row["shape"], weight(row, scope, total, tensors, seed).hex()]
    return found


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        print(json.dumps(read(file.read(), *map(int, sys.argv[2:]))))
