"""The header of a file: what a reader needs, beside the tensors, to generate every weight, and its checks.

The header is the string `fxrpg` in the file's metadata: JSON with sorted keys and no spaces. `digest` is the SHA-256 of
that JSON without the field itself, `tensors` that of all tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.assemble import plan_of
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator, View
from fxrpg.hashing import FORMAT_VERSION, SEED_LIMIT
from fxrpg.owner import SCALE
from fxrpg.plan import Plan, first_draws

WITHHELD = "withheld"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


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
        stored = self.fields["seed"]
        if stored == WITHHELD and seed is None:
            raise FxrpgError(
                str(path), "the seed must be given, because the file withholds it", "none", "Pass seed=..."
            )
        if stored != WITHHELD and seed is not None and seed != stored:
            raise FxrpgError(str(path), f"the file's seed is {stored}", f"seed={seed}", "Leave the argument out.")
        seed = stored if seed is None else seed
        if first_draws(seed) != self.fields["draws"]:
            raise FxrpgError(
                str(path),
                f"the random functions must draw {self.fields['draws']}",
                f"{first_draws(seed)} with seed {seed}",
                "Pass the seed that the model was transformed with.",
            )
        return _plan(self.fields, seed)

    def scale(self) -> Tensor:
        """The table of scales, float32."""
        scale = torch.empty(len(self.fields["table"]), dtype=torch.float32)
        for row in self.fields["table"]:
            scale[row["tensor"]] = row["scale"]
        return scale


def header_of(
    model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], withhold_seed: bool, hashed: bool = True
) -> dict[str, Any]:
    plan = plan_of(model)
    scale = model.get_buffer(SCALE)
    scales = [0.0] * len(plan.views) if scale.is_meta else scale.cpu().view(torch.float32).tolist()
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
    header = {
        "format": FORMAT_VERSION,
        "method": plan.generator.method,
        "settings": dataclasses.asdict(plan.generator),
        "seed": WITHHELD if withhold_seed else plan.seed,
        "draws": first_draws(plan.seed),
        "size": plan.size,
        "table": table,
        "rules": list(plan.rules),
        "dense": {reason: [n for n, r in plan.dense.items() if r == reason] for reason in plan.dense.values()},
        "aliases": aliases,
        "tensors": tensors_digest(tensors) if hashed else "0" * 64,
    }
    return header | {"digest": header_digest(header)}


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over all tensors in the order of their names: name, type, shape and bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{DTYPES[tensor.dtype]}|{list(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in header.items() if k != "digest"}).encode()).hexdigest()


_FIELDS: dict[str, Any] = {
    "format": int, "method": str, "settings": dict, "seed": (int, str), "draws": str, "size": int, "table": list,
    "rules": list, "dense": dict, "aliases": dict, "tensors": str, "digest": str,
}  # fmt: skip
_ROW: dict[str, Any] = {
    "name": str,
    "ties": list,
    "tensor": int,
    "shape": list,
    "order": list,
    "offset": int,
    "scale": float,
}


def parse(path: Any, metadata: dict[str, str]) -> dict[str, Any]:
    """The header, checked field by field."""
    if "fxrpg" not in metadata:
        raise damaged(path, "must be written by fxrpg.save", "a safetensors file without the header 'fxrpg'")
    try:
        fields = json.loads(metadata["fxrpg"])
    except (ValueError, RecursionError) as e:
        raise damaged(path, "the header must be JSON", str(e)) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise damaged(path, "the header must name its format version", "none")
    if fields["format"] != FORMAT_VERSION:
        fix = "Use the version of fxrpg that wrote the file."
        raise FxrpgError(str(path), f"format version must be {FORMAT_VERSION}", str(fields["format"]), fix)
    if set(fields) != set(_FIELDS) or not all(isinstance(fields[k], t) for k, t in _FIELDS.items()):
        raise damaged(path, f"the header must have the fields {sorted(_FIELDS)}", f"{sorted(fields)}")
    if header_digest(fields) != fields["digest"]:
        raise damaged(path, "the header must match its digest", "another one")
    _check_table(path, fields)
    return fields


def _check_table(path: Any, fields: dict[str, Any]) -> None:
    """What a digest cannot tell: whoever wrote the header, it must describe weights that can be generated."""
    generator = _generator(path, fields)
    table = fields["table"]
    for row in table:
        if (
            not isinstance(row, dict)
            or set(row) != set(_ROW)
            or not all(isinstance(row[k], t) for k, t in _ROW.items())
        ):
            raise damaged(path, f"each row of the table must have the fields {sorted(_ROW)}", repr(row)[:80])
        whole = all(type(n) is int and 0 < n < 1 << 48 for n in row["shape"]) and row["shape"]
        if not whole or sorted(row["order"], key=repr) != list(range(len(row["shape"]))):
            raise damaged(
                path, f"{row['name']!r} must have a shape and an order of its axes", f"{row['shape']}, {row['order']}"
            )
        if not all(isinstance(alias, str) for alias in row["ties"]):
            raise damaged(path, f"the ties of {row['name']!r} must be names", repr(row["ties"])[:80])
    views = _views(fields, generator, seed=0)
    if sorted(row["tensor"] for row in table) != list(range(len(table))) or len(views) != len(table) or not table:
        raise damaged(path, "the table must number its weights from 0", "others")
    offset = 0
    for row in sorted(table, key=lambda row: row["tensor"]):
        if row["offset"] != offset:
            raise damaged(path, f"{row['name']!r} must start at {offset}", str(row["offset"]))
        offset += generator.extents([views[row["name"]].count])[0]
    if not 1 <= fields["size"] <= sum(view.count for view in views.values()):
        raise damaged(path, "the state must be no larger than the weights", str(fields["size"]))
    if isinstance(fields["seed"], str) != (fields["seed"] == WITHHELD) or (
        fields["seed"] != WITHHELD and not 0 <= fields["seed"] < SEED_LIMIT
    ):
        raise damaged(path, "the seed must be in [0, 2^64) or withheld", repr(fields["seed"]))


def _generator(path: Any, fields: dict[str, Any]) -> Generator:
    if fields["method"] not in Generator.registry:
        fix = "Use the version of fxrpg that wrote the file."
        raise FxrpgError(str(path), f"the method must be one of {sorted(Generator.registry)}", fields["method"], fix)
    try:
        return Generator.registry[fields["method"]](**fields["settings"])
    except (TypeError, FxrpgError) as e:
        raise damaged(path, f"must hold settings of the method {fields['method']!r}", str(e)) from None


def _views(fields: dict[str, Any], generator: Generator, seed: int) -> dict[str, View]:
    rows = fields["table"]
    counts = [torch.Size(row["shape"]).numel() for row in rows]
    total = sum(generator.extents(counts))
    return {
        row["name"]: View(
            generator=generator,
            seed=seed,
            tensor=row["tensor"],
            shape=tuple(row["shape"]),
            order=tuple(row["order"]),
            offset=row["offset"],
            total=total,
        )
        for row in rows
    }


def _plan(fields: dict[str, Any], seed: int) -> Plan:
    generator = Generator.registry[fields["method"]](**fields["settings"])
    return Plan(
        generator=generator,
        seed=seed,
        size=fields["size"],
        views=_views(fields, generator, seed),
        names={row["name"]: (row["name"], *row["ties"]) for row in fields["table"]},
        dense={name: reason for reason, names in fields["dense"].items() for name in names},
        rules=tuple(fields["rules"]),
    )


def damaged(path: Any, must: str, found: str) -> FxrpgError:
    return FxrpgError(
        str(path), must, found, "The file is damaged or was not written by fxrpg: fetch or save it again."
    )
