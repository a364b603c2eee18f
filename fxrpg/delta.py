"""Deltas: the few bytes that turn one model into another of the same plan, for links on which every byte counts.

A delta is a small safetensors file. Of every tensor that differs it holds the exclusive or of its old and new bits: a
difference of numbers would be rounded, while bits come back exactly (NaN and -0.0 too), are all zero where nothing changed,
and mostly zero in the leading bytes of numbers that changed a little. Bytes of one significance lie together and are deflated.
Where the new bits by themselves come out shorter, or the receiver has no old ones, they are sent instead. Names, shapes, types
and the seed are the receiver's own and are not sent.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fxrpg.assemble import copy_module
from fxrpg.checkpoint import plain_tensor
from fxrpg.digest import DIGEST, PLAN
from fxrpg.errors import FxrpgError
from fxrpg.header import DTYPES, shown, tensors_digest

FORMAT = "1"
PAYLOAD = "delta"
XOR, NEW = "xor", "new"
FIELDS = {"format", "plan", "from", "to", "how", "changed"}

Bits = dict[str, np.ndarray]
"""Name -> the bytes of a tensor, uint8 [numbers, bytes of each]."""


def delta(a: nn.Module | None, b: nn.Module) -> bytes:
    """What has to be sent to turn model `a` into model `b`; of tensors that are equal bit for bit, nothing.

    Compared is all that a `state_dict` holds: states, dense parameters and buffers. Ordinary models have deltas too.

    Args:
        a: what the receiver has; None if that is only the architecture, the plan and the seed: then all of `b` is sent.
        b: what it shall have: of the same architecture and, where transformed, of the same seed, plan and sizes.

    Returns:
        A safetensors file, as bytes, for `apply_delta`. The seed is not in it.

    Raises:
        FxrpgError: no modules, other architectures, plans or types, tensors that are not plain or have no values.
    """
    new = _End.of(b, "delta, b")
    old = None if a is None else _End.of(a, "delta, a")
    if old is not None and old.plan != new.plan:
        must = "both models must have the same seed, plan, names, shapes and types"
        raise FxrpgError("delta", must, "two models that differ in them", "Build and transform both alike.")
    before = {} if old is None else old.bits
    sent = {name: bits for name, bits in new.bits.items() if old is None or not np.array_equal(bits, before[name])}
    how, payload = NEW, _deflated(sent)
    if old is not None:
        flipped = _deflated({name: bits ^ before[name] for name, bits in sent.items()})
        how, payload = (XOR, flipped) if len(flipped) < len(payload) else (how, payload)
    fields = {
        "format": FORMAT,
        "plan": new.plan,
        "from": "" if old is None else old.digest,
        "to": new.digest,
        "how": how,
        "changed": np.packbits([name in sent for name in new.bits]).tobytes().hex(),
    }
    return safetensors.torch.save({PAYLOAD: torch.frombuffer(bytearray(payload), dtype=torch.uint8)}, fields)


def apply_delta(model: nn.Module, delta: bytes) -> nn.Module:
    """A copy of `model`, which the receiver has, that is bit for bit the model that `delta` leads to; `model` stays as it is.

    Args:
        model: the model that the delta was made from; for one made from None, any of that architecture, plan and seed.
        delta: what `fxrpg.delta` returned.

    Raises:
        FxrpgError: the delta is damaged, or was not made from this model.
    """
    fields, payload = _parsed(delta)
    mine = _End.of(model, "apply_delta, model")
    if fields["plan"] != mine.plan:
        must = "must have the seed, plan, names, shapes and types of the model that the delta was made from"
        raise FxrpgError("apply_delta, model", must, "others", "Build and transform it as the sender did.")
    if fields["from"] not in ("", mine.digest):
        must = f"must be the model that the delta was made from, {fields['from'][:12]}..."
        fix = "Apply each delta once, in the order in which they were made."
        raise FxrpgError("apply_delta, model", must, f"{mine.digest[:12]}...", fix)
    bits = _inflated(payload, {name: mine.bits[name] for name in _changed(fields["changed"], list(mine.bits))})
    if fields["how"] == XOR:
        bits = {name: flips ^ mine.bits[name] for name, flips in bits.items()}
    made = mine.with_bits(bits)
    if made.digest != fields["to"]:
        raise _damaged("must lead to the model whose digest it holds", "to another one")
    result = copy_module(model)
    state = result.state_dict()
    state.update({name: made.tensors[stored] for name, stored in made.names.items()})
    nn.Module.load_state_dict(result, state)  # past a load_state_dict of the user's own
    return result


@dataclass(frozen=True)
class _End:
    """A model at one end of a link.

    Args:
        generated: digest of the plan; "" for an ordinary model.
        tensors: each distinct tensor, on the CPU, in the order of their names.
        names: every name in the state_dict -> the one under which its tensor stands.
    """

    generated: str
    tensors: dict[str, Tensor]
    names: dict[str, str]

    @classmethod
    def of(cls, model: Any, where: str) -> _End:
        if not isinstance(model, nn.Module):
            raise FxrpgError(where, "must be a torch.nn.Module", type(model).__name__, "Pass the models themselves.")
        plan = model.__dict__.get(PLAN)
        found: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if name == DIGEST:
                continue
            plain = isinstance(tensor, Tensor) and type(tensor.data) is Tensor and tensor.layout == torch.strided
            if not plain or tensor.dtype not in DTYPES or tensor.is_meta:
                fix = "Give it values, densify or gather it first."
                raise FxrpgError(f"{where}, {name}", "must be a plain tensor with values", _kind(tensor), fix)
            names[name] = first.setdefault(id(tensor), name)
            if names[name] == name:
                found[name] = plain_tensor(tensor)
        return cls("" if plan is None else plan.digest(), found, names)

    @cached_property
    def plan(self) -> str:
        """Digest of what both ends must have in common."""
        layout = [(name, DTYPES[t.dtype], list(t.shape)) for name, t in self.tensors.items()]
        return _short(json.dumps([self.generated, layout, self.names]))

    @cached_property
    def digest(self) -> str:
        """Digest of all bits of the model."""
        return _short(self.plan + tensors_digest(self.tensors))

    @cached_property
    def bits(self) -> Bits:
        flat = {name: t.view(-1).view(torch.uint8).numpy() for name, t in self.tensors.items()}
        return {name: flat[name].reshape(-1, t.itemsize) for name, t in self.tensors.items()}

    def with_bits(self, bits: Bits) -> _End:
        """The same model with other bits in some of its tensors."""
        made = dict(self.tensors)
        for name, values in bits.items():
            flat = torch.from_numpy(np.array(values).reshape(-1))
            made[name] = flat.view(made[name].dtype).view(made[name].shape)
        return _End(self.generated, made, self.names)


def _kind(tensor: Any) -> str:
    traits = [str(getattr(tensor, trait, "")) for trait in ("dtype", "layout", "device")]
    return " ".join([type(tensor).__name__, *traits]).rstrip()


def _short(text: str) -> str:
    """128 bits of SHA-256: they find mistakes, and no digest stops one who can write deltas."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sizes(bits: Mapping[str, np.ndarray]) -> dict[int, list[str]]:
    """Bytes of a number -> the tensors of such numbers."""
    sizes = sorted({values.shape[1] for values in bits.values()})
    return {size: [name for name, values in bits.items() if values.shape[1] == size] for size in sizes}


def _deflated(bits: Bits) -> bytes:
    """All bits, those of one significance together: signs and exponents are alike, the ends of fractions are noise."""
    squeeze, parts = zlib.compressobj(9), []
    for names in _sizes(bits).values():
        for plane in np.concatenate([bits[name] for name in names]).T:
            parts += [squeeze.compress(plane.tobytes()), squeeze.flush(zlib.Z_SYNC_FLUSH)]  # a code of its own
    return b"".join([*parts, squeeze.flush()])


def _inflated(payload: bytes, like: Bits) -> Bits:
    """What `_deflated` took, for tensors `like` these: never more bytes than they have."""
    total = sum(values.size for values in like.values())
    squeezed = zlib.decompressobj()
    try:
        flat = squeezed.decompress(payload, total + 1)
    except zlib.error as e:
        raise _damaged("must hold deflated bits", str(e)) from None
    if len(flat) != total or not squeezed.eof or squeezed.unused_data:
        raise _damaged(f"must hold {total} bytes of tensors", "more or fewer")
    bits: Bits = {}
    begin = 0
    for size, names in _sizes(like).items():
        counts = [len(like[name]) for name in names]
        end = begin + size * sum(counts)
        numbers = np.frombuffer(flat[begin:end], np.uint8).reshape(size, -1).T
        bits |= zip(names, np.split(numbers, np.cumsum(counts)[:-1]), strict=True)
        begin = end
    return bits


def _changed(marks: str, names: list[str]) -> list[str]:
    """The names that are marked, one bit each, in hexadecimal digits."""
    try:
        packed = np.frombuffer(bytes.fromhex(marks), np.uint8)
    except ValueError:
        packed = np.zeros(0, np.uint8)
    if len(packed) != -(-len(names) // 8):
        raise _damaged(f"must mark which of {len(names)} tensors it changes", shown(marks))
    return [name for name, bit in zip(names, np.unpackbits(packed), strict=False) if bit]


def _parsed(delta: Any) -> tuple[dict[str, str], bytes]:
    """The fields of a delta and its payload."""
    if not isinstance(delta, bytes | bytearray | memoryview):
        fix = "Pass what fxrpg.delta returned; of a file, Path(name).read_bytes()."
        raise FxrpgError("apply_delta, delta", "must be bytes", type(delta).__name__, fix)
    data = bytes(delta)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError, RecursionError) as e:
        raise _damaged("must be a whole safetensors file", shown(str(e))) from None
    fields, payload = header.get("__metadata__") or {}, tensors.get(PAYLOAD)
    if fields.get("format") != FORMAT or fields.keys() != FIELDS or fields["how"] not in (XOR, NEW):
        raise _damaged(f"must have the fields {sorted(FIELDS)}, format {FORMAT}", shown(fields))
    if len(tensors) != 1 or payload is None or payload.dtype != torch.uint8 or payload.dim() != 1:
        raise _damaged(f"must hold one row of bytes, {PAYLOAD!r}", shown(sorted(tensors)))
    return fields, payload.numpy().tobytes()


def _damaged(must: str, found: str) -> FxrpgError:
    fix = "It is damaged, or of another version of fxrpg: send it again."
    return FxrpgError("apply_delta, delta", must, found, fix)
