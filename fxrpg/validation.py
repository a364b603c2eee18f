"""What a file may say: every field of a header and the shape of every tensor, checked before anything is built from them.

Digests find damage; but whoever writes a file can compute them, so what each field says is checked as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
import re
import typing
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxrpg.container import DTYPES, MOST_DIMS
from fxrpg.digest import DIGEST
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.hashing import FORMAT_VERSION, SEED_LIMIT
from fxrpg.header import (
    KEPT,
    WITHHELD,
    canonical,
    damaged,
    header_digest,
    plan_from,
    pruned_states,
    shown,
)
from fxrpg.owner import SCALE
from fxrpg.packing import unpack_bits
from fxrpg.plan import Scope
from fxrpg.view import View
from fxrpg.weights import decode_scales, encode_scales

STATE_DTYPES = ("F64", "F32", "F16", "BF16")
MOST_ELEMENTS = 1 << 48  # of all weights, and of one tensor: a petabyte in float32
_OTHER_VERSION = "Use the version of fxrpg that wrote the file."

_FIELDS: dict[str, Any] = {
    "format": int, "draws": str, "scopes": list, "table": list, "rules": list, "dense": dict, "channels": dict,
    "aliases": dict, "frozen": list, "tensors": str, "digest": str,
}  # fmt: skip
_SCOPE = {
    "name": str, "method": str, "settings": dict, "size": int, "state": str, "frozen": bool, "dtype": str,
}  # fmt: skip
_ROW = {
    "name": str, "ties": list, "scope": int, "tensor": int, "shape": list, "order": list, "offset": int,
    "scale": float, "kept": list, "original": list,
}  # fmt: skip


def parse(path: Any, metadata: dict[str, str]) -> dict[str, Any]:
    """The header, checked field by field."""
    if "fxrpg" not in metadata:
        raise damaged(path, "must be written by fxrpg.save", "a safetensors file without the header 'fxrpg'")
    try:
        fields = json.loads(metadata["fxrpg"])
        as_written = canonical(fields) == metadata["fxrpg"]
        digest = header_digest(fields) if type(fields) is dict else ""
    except (ValueError, RecursionError) as e:
        raise damaged(path, "the header must be JSON", str(e)) from None
    if type(fields) is not dict or type(fields.get("format")) is not int:
        raise damaged(path, "the header must name its format version", "none")
    if fields["format"] != FORMAT_VERSION:
        must = f"format version must be {FORMAT_VERSION}"
        raise FxrpgError(str(path), must, shown(fields["format"]), _OTHER_VERSION)
    if not as_written:
        raise damaged(path, "the header must be in its one form (keys sorted, none twice, no spaces)", "another form")
    if _types(fields) not in (_FIELDS | {"seed": int}, _FIELDS | {"seed": str}):
        raise damaged(path, f"the header must have the fields {sorted([*_FIELDS, 'seed'])}, typed", shown(fields))
    if digest != fields["digest"]:
        raise damaged(path, "the header must match its digest", "another one")
    for scope in fields["scopes"]:
        _check_scope(path, scope)
    for row in fields["table"]:
        _check_row(path, row)
    _check_table(path, fields)
    _check_names(path, fields)
    _check_channels(path, fields)
    return fields


def check_tensors(path: Any, fields: dict[str, Any], found: dict[str, tuple[str, Sequence[int]]]) -> None:
    """The tensors that a file declares, name -> (type, shape), must be those its header speaks of."""
    plan = plan_from(fields, 0)
    states = {*plan.states, *(state + KEPT for state in pruned_states(plan))}
    for state, names in plan.states.items():
        scope = plan.scope(names[0])
        _check_state(path, state, scope, plan.views[names[0]].whole, found)
        dtype = fields["scopes"][plan.scope_of[names[0]]]["dtype"]
        if not scope.frozen and not scope.generator.local and found[state][0] != dtype:
            raise damaged(path, f"{shown(state)} must be of type {dtype}", found[state][0])
    for name, (dtype, shape) in found.items():
        # an empty tensor takes no bytes whatever its other sides are
        if dtype not in DTYPES.values() or len(shape) > MOST_DIMS or prod(max(n, 1) for n in shape) > MOST_ELEMENTS:
            raise damaged(path, f"{shown(name)} must be a tensor that torch can hold", shown((dtype, list(shape))))
    generated = [name for row in fields["table"] for name in (row["name"], *row["ties"])]
    for name in (*generated, *fields["aliases"], SCALE, DIGEST):
        if name in found:
            raise damaged(path, f"{shown(name)} must not be stored, since it follows from the header", "a tensor")
    missing = {*fields["aliases"].values()} - (found.keys() - states) | {*fields["frozen"]} - found.keys()
    for name in sorted(missing):
        raise damaged(path, f"must hold the dense tensor {shown(name)}, which the header mentions", "none")


def _check_state(path: Any, state: str, scope: Scope, view: View, found: dict[str, tuple[str, Sequence[int]]]) -> None:
    """A state must be there, in the form that its scope says: trainable, frozen, or without its zeros."""
    dtype, shape = found.get(state, ("", ()))
    shown_as = shown((dtype, list(shape))) if dtype else "none"
    generator = scope.generator
    if scope.frozen:
        expected = generator.frozen_shape(view)
        if dtype != "U8" or tuple(shape) != expected:
            raise damaged(path, f"must hold {shown(state)}, bytes of shape {expected}", shown_as)
    elif generator.sparse:
        bits = [-(-scope.size // 8)]
        if dtype not in STATE_DTYPES or len(shape) != 1 or shape[0] > scope.size:
            must = f"must hold {shown(state)}, floating-point, of at most {scope.size} numbers"
            raise damaged(path, must, shown_as)
        kept = found.get(state + KEPT, ("", ()))
        if kept[0] != "U8" or list(kept[1]) != bits:
            raise damaged(path, f"must hold {shown(state + KEPT)}, bytes of shape {bits}", shown(kept))
    elif dtype not in STATE_DTYPES or tuple(shape) != generator.state_shape(view):
        length = generator.state_shape(view)
        size = f"length {length[0]}" if len(length) == 1 else f"shape {length}"
        raise damaged(path, f"must hold {shown(state)}, floating-point, of {size}", shown_as)


def check_kept(path: Any, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A state without its zeros must have one number for each bit that is set."""
    for state, size in pruned_states(plan_from(fields, 0)).items():
        stored, marks = len(tensors[state]), tensors[state + KEPT]
        bits = unpack_bits(marks, 0, 8 * len(marks))
        if int(bits.sum()) != stored or bool(bits[size:].any()):
            raise damaged(path, f"{shown(state + KEPT)} must mark {stored} of {size} numbers", "others")


def _types(fields: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in fields.items()}  # exact: True is no number here


def _check_scope(path: Any, scope: Any) -> None:
    if type(scope) is not dict or _types(scope) != _SCOPE:
        raise damaged(path, f"each scope must have the fields {sorted(_SCOPE)}, typed", shown(scope))
    generator = _generator(path, scope)
    state = generator.frozen_name(generator.state_name) if scope["frozen"] else generator.state_name
    # a graph's code names its states: nothing but letters, digits and underscores may follow
    rest = "" if generator.local else "[0-9A-Za-z_]*"
    named = re.fullmatch(re.escape(state) + rest, scope["state"]) is not None
    if not named or (scope["frozen"] and not generator.freezes) or scope["dtype"] not in STATE_DTYPES:
        raise damaged(path, "a scope must name its state, whether it is frozen, and its type", shown(scope))


def _generator(path: Any, fields: dict[str, Any]) -> Generator:
    if fields["method"] not in Generator.registry:
        must = f"the method must be one of {sorted(Generator.registry)}"
        raise FxrpgError(str(path), must, shown(fields["method"]), _OTHER_VERSION)
    cls, must = Generator.registry[fields["method"]], f"must hold settings of the method {fields['method']!r}"
    allowed = _types_of_settings(cls)
    given = _types(fields["settings"])
    if set(given) != set(allowed) or not all(given[name] in allowed[name] for name in given):
        raise damaged(path, must, shown(fields["settings"]))
    try:
        return cls(**fields["settings"])
    except FxrpgError as e:
        raise damaged(path, must, str(e)) from None


@functools.cache
def _types_of_settings(cls: type[Generator]) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(cls)
    return {f.name: typing.get_args(hints[f.name]) or (hints[f.name],) for f in dataclasses.fields(cls)}


def _check_row(path: Any, row: Any) -> None:
    if type(row) is not dict or _types(row) not in (_ROW, _ROW | {"stack": int}):
        raise damaged(path, f"each row of the table must have the fields {sorted(_ROW)}, typed", shown(row))
    name, shape, order, kept = row["name"], row["shape"], row["order"], row["kept"]
    for sides in (shape, row["original"] if kept else shape):
        whole = 0 < len(sides) <= MOST_DIMS and all(type(n) is int and 0 < n <= MOST_ELEMENTS for n in sides)
        if not whole or not all(type(n) is int for n in order) or sorted(order) != list(range(len(sides))):
            raise damaged(path, f"{shown(name)} must have a shape and an order of its axes", shown((sides, order)))
    if not 0 < row.get("stack", 1) < max(2, len(shape) - 1):
        raise damaged(path, f"{shown(name)} must be a stack of matrices", shown((shape, row["stack"])))
    pruned = len(kept) == len(shape) and all(
        left == side if some == [] else _indices(some, side) and len(some) == left
        for some, side, left in zip(kept, row["original"], shape, strict=True)
    )
    if not pruned and (kept or row["original"]):
        raise damaged(path, f"{shown(name)} must tell the channels that it kept on each axis", shown(kept))


def _indices(kept: Any, side: int) -> bool:
    """Whether `kept` is a rising list of indices below `side`."""
    if type(kept) is not list or not kept or not all(type(i) is int for i in kept):
        return False
    return kept[0] >= 0 and kept[-1] < side and all(a < b for a, b in itertools.pairwise(kept))


def _check_channels(path: Any, fields: dict[str, Any]) -> None:
    """Modules tell which channels they kept, and their generated weights have kept the same."""
    for module, sides in fields["channels"].items():
        pair = type(sides) is list and len(sides) == 2
        if not pair or not all(some == [] or _indices(some, MOST_ELEMENTS) for some in sides):
            raise damaged(path, f"{shown(module)} must tell which outputs and inputs it kept", shown(sides))
    for row in fields["table"]:
        dims = len(row["shape"])
        for name in (row["name"], *row["ties"]):
            module, _, attribute = name.rpartition(".")
            sides = fields["channels"].get(module, []) if attribute in ("weight", "bias") else []
            left = [*(sides if attribute == "weight" else sides[:1]), *[[]] * dims][:dims]
            if left != (row["kept"] or [[]] * dims):
                raise damaged(path, f"{shown(name)} must have kept the channels of its module", shown(row["kept"]))


def _check_table(path: Any, fields: dict[str, Any]) -> None:
    """The table must describe weights that can be generated: whole, in their places, from the states and the seed."""
    rows = sorted(fields["table"], key=operator.itemgetter("tensor"))
    if not rows or [row["tensor"] for row in rows] != list(range(len(rows))):
        raise damaged(path, "the table must number its weights from 0", f"{len(rows)} weights numbered otherwise")
    if {row["scope"] for row in rows} != set(range(len(fields["scopes"]))):
        raise damaged(path, "each weight must be of one of the scopes, and none be empty", "others")
    if len({scope["dtype"] for scope in fields["scopes"] if scope["frozen"]}) > 1:
        raise damaged(path, "all frozen states must stand for weights of one type", "several")
    scales = torch.tensor([row["scale"] for row in rows], dtype=torch.float64, device="cpu")
    for row, scale in zip(rows, decode_scales(encode_scales(scales)).tolist(), strict=True):
        if not 0 < row["scale"] == scale:
            must = f"the scale of {shown(row['name'])} must be positive, of 16 significant bits"
            raise damaged(path, must, shown(row["scale"]))
    if sum(prod(row["original"] or row["shape"]) for row in rows) > MOST_ELEMENTS:
        raise damaged(path, f"all weights together must have at most {MOST_ELEMENTS} elements", "more")
    members: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        members.setdefault(row["scope"], []).append(row)
    for i, scope in enumerate(fields["scopes"]):
        _check_places(path, scope, members[i])
    seed = fields["seed"]
    if not (seed == WITHHELD if type(seed) is str else 0 <= seed < SEED_LIMIT):
        raise damaged(path, "the seed must be in [0, 2^64) or withheld", shown(seed))


def _check_places(path: Any, scope: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    generator = _generator(path, scope)
    shapes = [tuple(row["original"] or row["shape"]) for row in rows]
    offsets, _total = generator.addresses([prod(shape) for shape in shapes])
    for row, offset in zip(rows, offsets, strict=True):
        if row["offset"] != offset:
            raise damaged(path, f"{shown(row['name'])} must start at {offset}", shown(row["offset"]))
    if not generator.needs_dof and scope["size"] != generator.state_size(1.0, shapes):
        raise damaged(path, "the degrees of freedom must follow from the shapes", shown(scope["size"]))
    if generator.needs_dof and not 1 <= scope["size"] <= generator.most(shapes):
        must = f"the degrees of freedom must be from 1 to {generator.most(shapes)}"
        raise damaged(path, must, shown(scope["size"]))


def _check_names(path: Any, fields: dict[str, Any]) -> None:
    """Names are text, and none stands for two tensors."""
    lists = [fields["rules"], fields["frozen"], list(fields["aliases"].values())]
    lists += [row["ties"] for row in fields["table"]] + list(fields["dense"].values())
    for names in lists:
        if type(names) is not list or not all(type(name) is str for name in names):
            raise damaged(path, "names must be lists of strings", shown(names))
    generated = [name for row in fields["table"] for name in (row["name"], *row["ties"])]
    dense = [name for names in fields["dense"].values() for name in names]
    scopes = [(_generator(path, scope), scope["state"], scope["frozen"]) for scope in fields["scopes"]]
    rooted = [state for generator, state, _ in scopes if not generator.local]
    local = [r["name"] + scopes[r["scope"]][1] for r in fields["table"] if scopes[r["scope"]][0].local]
    marks = [state + KEPT for generator, state, frozen in scopes if generator.sparse and not frozen]
    states = [*rooted, *local, *marks]
    for group in ([*generated, *dense], [*generated, *fields["aliases"], *states, SCALE, DIGEST]):
        once: set[str] = set()
        for name in group:
            if name in once:
                raise damaged(path, f"{shown(name)} must stand for one tensor", "two")
            once.add(name)
