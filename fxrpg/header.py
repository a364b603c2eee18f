"""The header of a file: what a reader needs, beside the tensors, to generate every weight, and its checks.

The header is the string `fxrpg` in the file's metadata: JSON with sorted keys and no spaces. `digest` is the SHA-256 of
that JSON without the field itself, `tensors` that of all tensors. Digests find damage; but whoever writes a file can
compute them, so what each field says is checked as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import reprlib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.assemble import plan_of
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator, View
from fxrpg.hashing import FORMAT_VERSION, SEED_LIMIT
from fxrpg.lowering import decode_scales, encode_scales
from fxrpg.owner import DIGEST, SCALE
from fxrpg.plan import Plan, checked_seed, first_draws

WITHHELD = "withheld"
# in the order in which safetensors lays tensors out
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
STATE_DTYPES = ("F64", "F32", "F16", "BF16")
MOST_ELEMENTS = 1 << 48  # of all weights, and of one tensor: a petabyte in float32
MOST_DIMS = 64  # torch's own limit

_FIELDS: dict[str, Any] = {
    "format": int, "method": str, "settings": dict, "draws": str, "size": int, "table": list, "rules": list,
    "dense": dict, "aliases": dict, "frozen": list, "tensors": str, "digest": str,
}  # fmt: skip
_ROW = {"name": str, "ties": list, "tensor": int, "shape": list, "order": list, "offset": int, "scale": float}
_OTHER_VERSION = "Use the version of fxrpg that wrote the file."


@dataclass(frozen=True)
class Contents:
    """A file that has been read and verified.

    Args:
        fields: the header.
        tensors: name -> tensor, in memory of its own.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def plan(self, path: Any, seed: int | None = None) -> Plan:
        """The plan, with the seed of the file or, where that is withheld, the given one."""
        stored, given = self.fields["seed"], None if seed is None else checked_seed(seed)
        if stored == WITHHELD and given is None:
            must = "the seed must be given, because the file withholds it"
            raise FxrpgError(str(path), must, "none", "Pass seed=...")
        if stored != WITHHELD and given not in (None, stored):
            raise FxrpgError(str(path), f"the file's seed is {stored}", f"seed={given}", "Leave the argument out.")
        used = stored if given is None else given
        if first_draws(used) != self.fields["draws"]:
            must, found = shown(self.fields["draws"]), f"{first_draws(used)!r} with seed {used}"
            fix = "Pass the seed that the model was transformed with."
            raise FxrpgError(str(path), f"the random functions must draw {must}", found, fix)
        return _plan(self.fields, used)

    def scale(self) -> Tensor:
        """The table of scales, float32."""
        scale = torch.empty(len(self.fields["table"]), dtype=torch.float32, device="cpu")
        for row in self.fields["table"]:
            scale[row["tensor"]] = row["scale"]
        return scale


def header_of(
    model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], *, withhold_seed: bool, digest: str
) -> dict[str, Any]:
    """The header of a transformed model's file. `tensors` are the model's own, `digest` the `tensors_digest` of them."""
    plan = plan_of(model)
    scale = model.get_buffer(SCALE)
    scales = [0.0] * len(plan.views) if scale.is_meta else decode_scales(scale.cpu()).tolist()
    table = [
        {
            "name": name,
            "ties": [alias for alias in plan.names[name] if alias != name],
            "tensor": view.tensor,
            "shape": list(view.shape),
            "order": list(view.order),
            "offset": view.offset,
            "scale": scales[view.tensor],
        }
        for name, view in plan.views.items()
    ]
    dense: dict[str, list[str]] = {}
    for name, reason in plan.dense.items():
        dense.setdefault(reason, []).append(name)
    header = {
        "format": FORMAT_VERSION,
        "method": plan.generator.method,
        "settings": dataclasses.asdict(plan.generator),
        "seed": WITHHELD if withhold_seed else plan.seed,
        "draws": first_draws(plan.seed),
        "size": plan.size,
        "table": table,
        "rules": list(plan.rules),
        "dense": dense,
        "aliases": aliases,
        "frozen": [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad],
        "tensors": digest,
    }
    return header | {"digest": header_digest(header)}


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over all tensors (contiguous, on the CPU) in the order of their names: name, type, shape, bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, DTYPES[tensor.dtype], list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in header.items() if k != "digest"}).encode()).hexdigest()


def parse(path: Any, metadata: dict[str, str]) -> dict[str, Any]:
    """The header, checked field by field."""
    if "fxrpg" not in metadata:
        raise damaged(path, "must be written by fxrpg.save", "a safetensors file without the header 'fxrpg'")
    try:
        fields = json.loads(metadata["fxrpg"])
        as_written = canonical(fields) == metadata["fxrpg"]
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
    if header_digest(fields) != fields["digest"]:
        raise damaged(path, "the header must match its digest", "another one")
    generator = _generator(path, fields)
    for row in fields["table"]:
        _check_row(path, row)
    _check_table(path, fields, generator)
    _check_names(path, fields, generator)
    return fields


def check_tensors(path: Any, fields: dict[str, Any], found: dict[str, tuple[str, Sequence[int]]]) -> None:
    """The tensors that a file declares, name -> (type, shape), must be those its header speaks of."""
    state = Generator.registry[fields["method"]].state_name
    dtype, shape = found.get(state, ("", ()))
    if dtype not in STATE_DTYPES or list(shape) != [fields["size"]]:
        must = f"must hold {state!r}, floating-point, of length {fields['size']}"
        raise damaged(path, must, shown((dtype, list(shape))) if dtype else "none")
    for name, (dtype, shape) in found.items():
        # an empty tensor takes no bytes whatever its other sides are
        if dtype not in DTYPES.values() or len(shape) > MOST_DIMS or prod(max(n, 1) for n in shape) > MOST_ELEMENTS:
            raise damaged(path, f"{shown(name)} must be a tensor that torch can hold", shown((dtype, list(shape))))
    generated = [name for row in fields["table"] for name in (row["name"], *row["ties"])]
    for name in (*generated, *fields["aliases"], SCALE, DIGEST):
        if name in found:
            raise damaged(path, f"{shown(name)} must not be stored, since it follows from the header", "a tensor")
    missing = {*fields["aliases"].values()} - (found.keys() - {state}) | {*fields["frozen"]} - found.keys()
    for name in sorted(missing):
        raise damaged(path, f"must hold the dense tensor {shown(name)}, which the header mentions", "none")


def _types(fields: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in fields.items()}  # exact: True is no number here


def _generator(path: Any, fields: dict[str, Any]) -> Generator:
    if fields["method"] not in Generator.registry:
        must = f"the method must be one of {sorted(Generator.registry)}"
        raise FxrpgError(str(path), must, shown(fields["method"]), _OTHER_VERSION)
    cls = Generator.registry[fields["method"]]
    hints, must = typing.get_type_hints(cls), f"must hold settings of the method {fields['method']!r}"
    allowed = {f.name: typing.get_args(hints[f.name]) or (hints[f.name],) for f in dataclasses.fields(cls)}
    given = _types(fields["settings"])
    if set(given) != set(allowed) or not all(given[name] in allowed[name] for name in given):
        raise damaged(path, must, shown(fields["settings"]))
    try:
        return cls(**fields["settings"])
    except FxrpgError as e:
        raise damaged(path, must, str(e)) from None


def _check_row(path: Any, row: Any) -> None:
    if type(row) is not dict or _types(row) != _ROW:
        raise damaged(path, f"each row of the table must have the fields {sorted(_ROW)}, typed", shown(row))
    name, shape, order = row["name"], row["shape"], row["order"]
    whole = 0 < len(shape) <= MOST_DIMS and all(type(n) is int and 0 < n <= MOST_ELEMENTS for n in shape)
    if not whole or not all(type(n) is int for n in order) or sorted(order) != list(range(len(shape))):
        raise damaged(path, f"{shown(name)} must have a shape and an order of its axes", shown((shape, order)))


def _check_table(path: Any, fields: dict[str, Any], generator: Generator) -> None:
    """The table must describe weights that can be generated: whole, side by side, from the state and the seed."""
    rows = sorted(fields["table"], key=operator.itemgetter("tensor"))
    if not rows or [row["tensor"] for row in rows] != list(range(len(rows))):
        raise damaged(path, "the table must number its weights from 0", f"{len(rows)} weights numbered otherwise")
    scales = torch.tensor([row["scale"] for row in rows], dtype=torch.float64, device="cpu")
    for row, scale in zip(rows, decode_scales(encode_scales(scales)).tolist(), strict=True):
        if not 0 < row["scale"] == scale:
            must = f"the scale of {shown(row['name'])} must be positive, of 16 significant bits"
            raise damaged(path, must, shown(row["scale"]))
    counts, offset = [prod(row["shape"]) for row in rows], 0
    for row, extent in zip(rows, generator.extents(counts), strict=True):
        if row["offset"] != offset:
            raise damaged(path, f"{shown(row['name'])} must start at {offset}", shown(row["offset"]))
        offset += extent
        if offset > MOST_ELEMENTS:
            raise damaged(path, f"all weights together must have at most {MOST_ELEMENTS} elements", "more")
    if not 1 <= fields["size"] <= sum(counts):
        raise damaged(path, "the state must hold from 1 to as many numbers as the weights", shown(fields["size"]))
    seed = fields["seed"]
    if not (seed == WITHHELD if type(seed) is str else 0 <= seed < SEED_LIMIT):
        raise damaged(path, "the seed must be in [0, 2^64) or withheld", shown(seed))


def _check_names(path: Any, fields: dict[str, Any], generator: Generator) -> None:
    """Names are text, and none stands for two tensors."""
    lists = [fields["rules"], fields["frozen"], list(fields["aliases"].values())]
    lists += [row["ties"] for row in fields["table"]] + list(fields["dense"].values())
    for names in lists:
        if type(names) is not list or not all(type(name) is str for name in names):
            raise damaged(path, "names must be lists of strings", shown(names))
    generated = [name for row in fields["table"] for name in (row["name"], *row["ties"])]
    dense = [name for names in fields["dense"].values() for name in names]
    for group in ([*generated, *dense], [*generated, *fields["aliases"], generator.state_name, SCALE, DIGEST]):
        once: set[str] = set()
        for name in group:
            if name in once:
                raise damaged(path, f"{shown(name)} must stand for one tensor", "two")
            once.add(name)


def _plan(fields: dict[str, Any], seed: int) -> Plan:
    generator = Generator.registry[fields["method"]](**fields["settings"])
    rows = fields["table"]
    total = sum(generator.extents([prod(row["shape"]) for row in rows]))
    views = {}
    for row in rows:
        place: Any = {"shape": tuple(row["shape"]), "order": tuple(row["order"]), "offset": row["offset"]}
        views[row["name"]] = View(generator=generator, seed=seed, tensor=row["tensor"], total=total, **place)
    return Plan(
        generator=generator,
        seed=seed,
        size=fields["size"],
        views=views,
        names={row["name"]: (row["name"], *row["ties"]) for row in rows},
        dense={name: reason for reason, names in fields["dense"].items() for name in names},
        rules=tuple(fields["rules"]),
    )


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxlong = _shorten.maxother = 120


def shown(value: Any) -> str:
    """`repr(value)`, cut where a file made it too long or too deep for an error message."""
    return _shorten.repr(value)


def damaged(path: Any, must: str, found: str) -> FxrpgError:
    fix = "The file is damaged or was not written by fxrpg: fetch or save it again."
    return FxrpgError(str(path), must, found if len(found) <= 300 else f"{found[:300]}...", fix)
