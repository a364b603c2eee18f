"""A mutator that knows the file format: from a real file it makes broken, lying and consistently forged ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from safetensors import deserialize

NAN, INFINITY = float("nan"), float("inf")
CODE = 'fxrpg_ring"), open("written", "w"), getattr(self, "fxrpg_ring'
SIZES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
WHOLE = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 13, 31, 32, 33, 64, 65, 1000, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 47]
WHOLE += [1 << 48, (1 << 48) + 1, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**40, 10**400]
REAL = [0.0, -0.0, 0.5, 1.0, 0.3, -1e9, 1e-320, 1e-30, 1e308, NAN, INFINITY, -INFINITY]
NAMES = ["", "x", ".", "..", "../../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J\x07", "\u202egpj", "\ud800", "é.x"]
NAMES += ["__class__", "__init__", "__dict__", "forward", "weight", "0", "0.weight", "2.weight", "2.bias", "1e5"]
NAMES += [
    "fxrpg_ring",
    "fxrpg_ring_",
    "fxrpg_scale",
    "fxrpg_digest",
    "fxrpg_alpha",
    "_score",
    "_mask",
    "_kept",
    CODE,
    "9" * 500,
]
WORDS = ["withheld", "ring", "pranc", "pemn", "arc", "shuffle", "block_diagonal", "hash", "rademacher", "khatri_rao"]
WORDS += ["uniform", "normal", "one_layer", "random_padding", "layer", "global", "signed_constant", "y" * 3000, *SIZES]
OTHER = [None, True, False, [], {}, [[]], {"": []}, [0, 1], [1, 0], [[0], [0]], ["a"], [NAN], {"a": {"a": {"a": [1]}}}]
VALUES = [*WHOLE, *REAL, *NAMES, *WORDS, *OTHER]


@dataclass
class Parts:
    """What a file consists of: header fields, and name -> (type, shape, bytes) of its tensors."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]


def parts_of(data: bytes) -> Parts:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fxrpg"])
    return Parts(header, {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(data)})


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def signed(parts: Parts) -> str:
    """The header's text with digests that fit, as whoever writes a file can compute them."""
    digest = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(parts.tensors.items()):
        digest.update(json.dumps([name, dtype, shape]).encode() + data)
    fields = {key: value for key, value in parts.fields.items() if key not in ("tensors", "digest")}
    fields |= {"tensors": digest.hexdigest()} if "tensors" in parts.fields else {}
    own = {"digest": hashlib.sha256(canonical(fields).encode()).hexdigest()} if "digest" in parts.fields else {}
    return canonical(fields | own)


def entries_of(parts: Parts, text: str) -> tuple[dict[str, Any], bytes]:
    """The container's own header, and the bytes behind it."""
    entries: dict[str, Any] = {"__metadata__": {"fxrpg": text}}
    data = b""
    for name, (dtype, shape, content) in parts.tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return entries, data


def written(entries: Any, data: bytes, text: str = "") -> bytes:
    header = (text or json.dumps(entries)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data


def mutated(source: bytes, rng: random.Random) -> bytes:
    """One file made from `source`, by one to three changes of one kind."""
    kind = rng.choices((_bytes, _container, _text, _forged), (15, 20, 10, 55))[0]
    return kind(source, rng)


def _bytes(source: bytes, rng: random.Random) -> bytes:
    data = bytearray(source)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(data) or 1), int.from_bytes(data[:8], "little")
        action = rng.randrange(7)
        if action == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            del data[place:]
        elif action == 2:
            data += rng.randbytes(rng.choice((1, 8, 100)))
        elif action == 3:
            del data[place : place + rng.choice((1, 2, 8, 50))]
        elif action == 4:
            data[place:place] = data[rng.randrange(len(data) or 1) :][:20]
        elif action == 5:
            new = rng.choice((0, 1, length - 1, length + 1, len(data), len(data) - 8, 10**8, (1 << 63), (1 << 64) - 1))
            data[:8] = struct.pack("<Q", min(max(new, 0), (1 << 64) - 1))
        else:
            junk = b"\0" * 8, b"\xff" * 8, b'"' * 8, b"[" * 8, b"NaN     ", b"\\ud800\\u"
            data[place : place + 8] = rng.choice(junk)
    return bytes(data)


def _container(source: bytes, rng: random.Random) -> bytes:
    """Entries of the container changed, the data or the length beside them, all else intact."""
    parts = parts_of(source)
    entries, data = entries_of(parts, signed(parts))
    name = rng.choice(list(parts.tensors))
    action = rng.randrange(9)
    if action == 0:
        entries[name][rng.choice(list(entries[name]))] = rng.choice([*VALUES, [rng.choice(WHOLE), rng.choice(WHOLE)]])
    elif action == 1:
        shift = rng.choice((-8, -4, -1, 1, 4, 8, len(data), 1 << 40, -(1 << 40)))
        entries[name]["data_offsets"][rng.randrange(2)] += shift
    elif action == 2:
        entries[name]["data_offsets"] = entries[rng.choice(list(parts.tensors))]["data_offsets"]
    elif action == 3:
        entries[name]["shape"] = rng.choice(([], [0], [1 << 62], [1 << 31, 1 << 31], [1] * 70, [0, 1 << 62], [-1, -1]))
    elif action == 4:
        entries[rng.choice(NAMES)] = rng.choice((entries[name], {}, [], None, entries[name] | {"more": 1}))
    elif action == 5:
        entries["__metadata__"][rng.choice(NAMES)] = rng.choice(["", "x" * 1000, None, 1, {}, []])
    elif action == 6:
        data = rng.choice((data[:-1], data + b"\0", b"", data * 2))
    text = json.dumps(entries)
    if action == 7:  # a name twice, nothing else said
        twice = json.dumps({name: entries[rng.choice(list(parts.tensors))]})
        text = f"{text[:-1]}, {twice[1:]}"
    elif action == 8:
        deep = rng.choice((50, 900, 1000, 5000))
        value = rng.choice(("[" * deep + "]" * deep, '{"":' * deep + "1" + "}" * deep, "NaN"))
        text = f'{text[:-1]}, "x": {value}}}'
    return written(None, data, text + " " * (rng.random() < 0.3))


def _text(source: bytes, rng: random.Random) -> bytes:
    """The header's text changed as text: other forms of the same, broken JSON, deep, long and many things."""
    parts = parts_of(source)
    text = signed(parts)
    place, deep = rng.randrange(len(text)), rng.choice((10, 300, *range(940, 1001), 3000))
    text = rng.choice((
        lambda: text[:place] + rng.choice('{}[]",:0123456789eE+-. \\ntfNI') + text[place + 1 :],
        lambda: text[:place],
        lambda: text[:-1] + ',"rules":[]}',
        lambda: text.replace('"rules":', f'"rules":{"[" * deep}{"]" * deep},"x":', 1),
        lambda: text.replace('"rules":', f'"rules":{"9" * rng.choice((20, 4299, 4300, 5000))},"x":', 1),
        lambda: text.replace('"rules":[]', f'"rules":[{",".join(["[]"] * 5000)}]', 1),
        lambda: text.replace("0.", "NaN", 1),
        lambda: json.dumps(json.loads(text), indent=rng.choice((None, 1))),
    ))()  # fmt: skip
    return written(*entries_of(parts, text))


def _forged(source: bytes, rng: random.Random) -> bytes:
    """Fields and tensors changed and signed again, so that what stands behind the digests is reached."""
    parts = parts_of(source)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choices((_any_place, _tensor, *CONSISTENT), (10, 4, *[1] * len(CONSISTENT)))[0]
        # the change before may have left no such place
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            change(parts, rng)
    return written(*entries_of(parts, signed(parts)))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value but the whole."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _any_place(parts: Parts, rng: random.Random) -> None:
    fields = parts.fields
    found = list(places(fields))
    if not found:
        return
    *path, last = rng.choice(found)
    holder = at(fields, tuple(path))
    old = holder[last]
    others = [at(fields, p) for p in found]
    action = rng.randrange(6)
    if action == 0:
        holder[last] = rng.choice(VALUES)
    elif action == 1 and type(old) in (int, float):
        holder[last] = rng.choice((old + 1, old - 1, old * 2, old // 2 if type(old) is int else old / 3, -old))
    elif action == 2:
        holder[last] = json.loads(canonical(rng.choice([o for o in others if type(o) is type(old)])))
    elif action == 3:
        del holder[last]
    elif action == 4 and isinstance(holder, list):
        holder.insert(rng.randint(0, len(holder)), json.loads(canonical(old)))
    elif isinstance(old, list):
        rng.shuffle(old)
    elif isinstance(old, dict):
        old[rng.choice(NAMES)] = rng.choice(VALUES)
    else:
        holder[last] = rng.choice([v for v in VALUES if type(v) is type(old)] or VALUES)


def _tensor(parts: Parts, rng: random.Random) -> None:
    if not parts.tensors:
        return
    name = rng.choice(list(parts.tensors))
    dtype, shape, data = parts.tensors[name]
    action = rng.randrange(7)
    if action == 0:
        del parts.tensors[name]
    elif action == 1:
        parts.tensors[rng.choice(NAMES)] = parts.tensors[name]
    elif action == 2:
        dtype = rng.choice([d for d, size in SIZES.items() if len(data) % size == 0])
        parts.tensors[name] = dtype, [len(data) // SIZES[dtype]], data
    elif action == 3 and shape:
        other = [*shape[:-1], max(shape[-1] + rng.choice((-1, 1)), 0)]
        count = SIZES[dtype]
        for side in other:
            count *= side
        parts.tensors[name] = dtype, other, (data * 2)[:count].ljust(count, b"\0")
    elif action == 4:
        parts.tensors[name] = dtype, [*shape, 1] if rng.random() < 0.5 else shape[::-1], data
    elif action == 5:
        parts.tensors[name] = dtype, shape, rng.choice((b"\xff", b"\0", b"\x7f", b"\x80\x01"))[:1] * len(data)
    else:
        parts.tensors[name] = dtype, shape, rng.randbytes(len(data))


def _settings(parts: Parts, rng: random.Random) -> None:
    """Another allowed value of a setting."""
    settings = rng.choice(parts.fields["scopes"])["settings"]
    name = rng.choice(list(settings))
    allowed = {
        "block": (1, 8, 16, 32, 64), "layout": ("arc", "shuffle", "block_diagonal", "hash"), "bits": (4, 8, None),
        "bits_block": (0, 1, 5, 8, 1 << 40), "law": ("rademacher", "uniform", "normal", "khatri_rao"), "keep": (0.1, 0.9),
        "prototype": ("random_padding", "one_layer"), "values": ("normal", "signed_constant"),
        "threshold": ("layer", "global"),
    }  # fmt: skip
    settings[name] = rng.choice(allowed.get(name, (True, False)))


def _resized(parts: Parts, rng: random.Random) -> None:
    """A state of another length, where the header says so too."""
    one = rng.choice(parts.fields["scopes"])
    size = one["size"] = rng.choice((1, 2, 8, 31, 32, 64, min(2 * one["size"], 1000)))
    if one["state"] in parts.tensors and not one["frozen"]:
        dtype = parts.tensors[one["state"]][0]
        parts.tensors[one["state"]] = dtype, [size], rng.randbytes(size * SIZES[dtype])


def _cast(parts: Parts, rng: random.Random) -> None:
    """A state of another type, where the header says so too."""
    one = rng.choice(parts.fields["scopes"])
    one["dtype"] = dtype = rng.choice(("F64", "F32", "F16", "BF16"))
    if one["state"] in parts.tensors and not one["frozen"]:
        shape = parts.tensors[one["state"]][1]
        parts.tensors[one["state"]] = dtype, shape, rng.randbytes(SIZES[dtype] * (shape[0] if shape else 1))


def _renamed(parts: Parts, rng: random.Random) -> None:
    """A weight, a tensor or a state under another name, everywhere."""
    found = [*parts.tensors, *[row["name"] for row in parts.fields["table"]]]
    found += [one["state"] for one in parts.fields["scopes"]]
    old, new = rng.choice(found), rng.choice(NAMES)
    text = canonical(parts.fields).replace(json.dumps(old), json.dumps(new))
    parts.fields = json.loads(text)
    parts.tensors = {new if name == old else name: value for name, value in parts.tensors.items()}


def _longer_table(parts: Parts, rng: random.Random) -> None:
    """One weight more, right behind the others of its scope (in blocks of 32)."""
    rows = parts.fields["table"]
    last = max((row for row in rows if row["scope"] == rows[0]["scope"]), key=lambda row: row["offset"])
    count = 1
    for side in last["original"] or last["shape"]:
        count *= side
    offset = last["offset"] + -(-count // 32) * 32
    rows.append(last | {"name": rng.choice(NAMES), "tensor": len(rows), "offset": offset, "ties": []})


def _many_rows(parts: Parts, rng: random.Random) -> None:
    """Many scopes of a weight each."""
    fields = parts.fields
    one, row = fields["scopes"][0], fields["table"][0]
    state = parts.tensors.get(one["state"])
    for i in range(rng.choice((3, 10, 40))):
        fields["scopes"].append(one | {"name": str(i), "state": f"{one['state']}_{i}"})
        place = {"scope": len(fields["scopes"]) - 1, "tensor": len(fields["table"]), "offset": 0}
        fields["table"].append(row | place | {"name": f"w{i}", "ties": []})
        if state:
            parts.tensors[f"{one['state']}_{i}"] = state


def _seed(parts: Parts, rng: random.Random) -> None:
    parts.fields["seed"] = rng.choice((0, 12, (1 << 64) - 1, "withheld"))


CONSISTENT: list[Callable[[Parts, random.Random], None]] = [
    _settings, _settings, _resized, _resized, _cast, _renamed, _renamed, _longer_table, _many_rows, _seed,
]  # fmt: skip
