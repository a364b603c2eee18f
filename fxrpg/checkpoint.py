"""Files: one safetensors file holds the state, what is dense, and a header from which every weight can be generated.

The header is the string `fxrpg` in the file's metadata: JSON with sorted keys and no spaces. `digest` is the SHA-256 of
that JSON without the field itself; `tensors` holds a SHA-256 for each tensor, over its name, type, shape and bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxrpg.assemble import assemble, check_untransformed, copy_without, plan_of
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator, View
from fxrpg.hashing import FORMAT_VERSION, SEED_LIMIT
from fxrpg.lowering import generate_weight
from fxrpg.owner import DIGEST, SCALE
from fxrpg.plan import Plan, first_draws

WITHHELD = "withheld"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def save(model: nn.Module, path: str | os.PathLike[str], *, withhold_seed: bool = False) -> None:
    """Write a transformed `model` to one safetensors file: state, dense parameters, buffers, seed and table.

    The file is written beside its place and moved there when complete: a killed process leaves the old file or the new.

    Args:
        model: the result of `transform`.
        path: where to.
        withhold_seed: leave the seed out; `load` then needs it. This is obfuscation, not encryption: the weights can be
            searched for by trying seeds.

    Raises:
        FxrpgError: `model` is not transformed, or has state that is not a tensor.
        OSError: the file cannot be written.
    """
    tensors, aliases = _stored_tensors(model)
    header = _header(model, tensors, aliases, withhold_seed)
    write_tensors(path, tensors, {"fxrpg": _canonical(header)})


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def file_size(model: nn.Module) -> int:
    """Bytes of the file that `save` would write, without writing it."""
    tensors, aliases = _stored_tensors(model)
    header = _header(model, tensors, aliases, withhold_seed=False, hashed=False)
    entries: dict[str, Any] = {"__metadata__": {"fxrpg": _canonical(header)}}
    begin = 0
    # safetensors lays tensors out by falling alignment, then by name
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = begin + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + begin


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
            raise FxrpgError(str(path), "the seed must be given, because the file withholds it", "none", "Pass seed=...")
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


def read(path: str | os.PathLike[str]) -> Contents:
    """Read and verify a file: its structure, version, header and every byte, before anything is built from it.

    Raises:
        FxrpgError: naming what is wrong.
        OSError: the file cannot be opened.
    """
    with open(path, "rb"):
        pass  # an unreadable path is an OSError, not a damaged file
    try:
        with safe_open(path, framework="pt") as file:
            fields = _parse(path, file.metadata() or {})
            names = set(file.keys())
            if names != set(fields["tensors"]):
                raise _damaged(path, "must hold the tensors that the header names", f"others: {sorted(names)[:3]}...")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except SafetensorError as e:
        raise _damaged(path, "must be a whole safetensors file", str(e)) from None
    for name, tensor in tensors.items():
        if tensor_digest(name, tensor) != fields["tensors"][name]:
            raise _damaged(path, f"the digest of tensor {name!r} must match its bytes", "another one")
    state = Generator.registry[fields["method"]].state_name
    if state not in tensors or list(tensors[state].shape) != [fields["size"]]:
        raise _damaged(path, f"must hold {state!r} of length {fields['size']}", "none or another length")
    return Contents(fields, {name: tensor.clone() for name, tensor in tensors.items()})


def load(model: nn.Module, path: str | os.PathLike[str], *, seed: int | None = None, strict: bool = False) -> nn.Module:
    """A copy of `model`, freshly built and untransformed, that generates its weights from the file at `path`.

    The table in the file decides what is generated, not a plan. Tensors keep the type they have in the file and go to the
    device of the parameter they replace (the CPU for one on the meta device).

    Args:
        model: a module of the architecture that was saved; its weights are not read. Stays untouched.
        path: a file written by `save`.
        seed: needed where the file withholds it.
        strict: as in `transform`.

    Raises:
        FxrpgError: the file is damaged, of another version, without its seed, or of another model.
    """
    contents = read(path)
    plan = contents.plan(path, seed)
    check_untransformed(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, view in plan.views.items():
        for alias in plan.names[name]:
            if alias not in parameters:
                raise _other_model(path, f"the model must have the parameter {alias!r}", "none")
            if tuple(parameters[alias].shape) != view.shape:
                raise _other_model(path, f"{alias!r} must have shape {view.shape}", str(tuple(parameters[alias].shape)))
            if parameters[alias] is not parameters[name]:
                raise _other_model(path, f"{alias!r} and {name!r} must be one tied parameter", "two")
    planned = [parameters[name] for name in plan.views]
    device = planned[0].device if not planned[0].is_meta else torch.device("cpu")
    result = copy_without(model, planned)
    state = contents.tensors[plan.generator.state_name].to(device)
    assemble(result, plan, state, contents.scale().to(device), strict)
    _fill(result, contents, path, {plan.generator.state_name, SCALE, DIGEST})
    return result


def verify(path: str | os.PathLike[str], seed: int | None = None) -> Plan:
    """Check a file in full, seed included where it is known, and return its plan. Raises FxrpgError as `read` does."""
    contents = read(path)
    return contents.plan(path, seed)


def unpack(path: str | os.PathLike[str], seed: int | None = None) -> dict[str, Tensor]:
    """The state_dict of the ordinary model that a file stands for, full weights included. Needs no model."""
    contents = read(path)
    plan = contents.plan(path, seed)
    tensors = dict(contents.tensors)
    state, scale = tensors.pop(plan.generator.state_name), contents.scale().view(torch.int32)
    for name, view in plan.views.items():
        weight = generate_weight(state, scale, view.text)
        tensors |= dict.fromkeys(plan.names[name], weight)
    return tensors | {alias: tensors[name] for alias, name in contents.fields["aliases"].items()}


def tensor_digest(name: str, tensor: Tensor) -> str:
    """SHA-256 over a tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(f"{name}|{_DTYPES[tensor.dtype]}|{list(tensor.shape)}|".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds by name (tied tensors once), and alias -> name for the rest. Scales and digest are in the header."""
    plan_of(model)
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    by_id: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in (SCALE, DIGEST):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            fix = "Store it beside the file; fxrpg files hold tensors only."
            raise FxrpgError(f"save, {name}", "must be a tensor of a type that safetensors knows", found, fix)
        if id(tensor) in by_id:
            aliases[name] = by_id[id(tensor)]
        else:
            kept[name] = tensor.detach()
            by_id[id(tensor)] = name
    return kept, aliases


def _header(
    model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], withhold_seed: bool, hashed: bool = True
) -> dict[str, Any]:
    plan = plan_of(model)
    scale = model.get_buffer(SCALE)
    scales = [0.0] * len(plan.views) if scale.is_meta else scale.cpu().view(torch.float32).tolist()
    table = [
        {
            "name": name,
            "names": list(plan.names[name]),
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
        "dense": plan.dense,
        "aliases": aliases,
        "tensors": {name: tensor_digest(name, t.cpu()) if hashed else "0" * 64 for name, t in tensors.items()},
    }
    return header | {"digest": _digest(header)}


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in header.items() if k != "digest"}).encode()).hexdigest()


_FIELDS = {
    "format": int, "method": str, "settings": dict, "seed": (int, str), "draws": str, "size": int, "table": list,
    "rules": list, "dense": dict, "aliases": dict, "tensors": dict, "digest": str,
}  # fmt: skip
_ROW = {"name": str, "names": list, "tensor": int, "shape": list, "order": list, "offset": int, "scale": float}


def _parse(path: Any, metadata: dict[str, str]) -> dict[str, Any]:
    """The header, checked field by field."""
    if "fxrpg" not in metadata:
        raise _damaged(path, "must be written by fxrpg.save", "a safetensors file without the header 'fxrpg'")
    try:
        fields = json.loads(metadata["fxrpg"])
    except (ValueError, RecursionError) as e:
        raise _damaged(path, "the header must be JSON", str(e)) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise _damaged(path, "the header must name its format version", "none")
    if fields["format"] != FORMAT_VERSION:
        fix = "Use the version of fxrpg that wrote the file."
        raise FxrpgError(str(path), f"format version must be {FORMAT_VERSION}", str(fields["format"]), fix)
    if set(fields) != set(_FIELDS) or not all(isinstance(fields[k], t) for k, t in _FIELDS.items()):
        raise _damaged(path, f"the header must have the fields {sorted(_FIELDS)}", f"{sorted(fields)}")
    if _digest(fields) != fields["digest"]:
        raise _damaged(path, "the header must match its digest", "another one")
    _check_table(path, fields)
    return fields


def _check_table(path: Any, fields: dict[str, Any]) -> None:
    """What a digest cannot tell: whoever wrote the header, it must describe weights that can be generated."""
    generator = _generator(path, fields)
    table = fields["table"]
    for row in table:
        if not isinstance(row, dict) or set(row) != set(_ROW) or not all(isinstance(row[k], t) for k, t in _ROW.items()):
            raise _damaged(path, f"each row of the table must have the fields {sorted(_ROW)}", repr(row)[:80])
        whole = all(type(n) is int and 0 < n < 1 << 48 for n in row["shape"]) and row["shape"]
        if not whole or sorted(row["order"], key=repr) != list(range(len(row["shape"]))):
            raise _damaged(path, f"{row['name']!r} must have a shape and an order of its axes", f"{row['shape']}, {row['order']}")
        if not all(isinstance(alias, str) for alias in row["names"]) or row["name"] not in row["names"]:
            raise _damaged(path, f"{row['name']!r} must be one of its own names", repr(row["names"])[:80])
    views = _views(fields, generator, seed=0)
    if sorted(row["tensor"] for row in table) != list(range(len(table))) or len(views) != len(table) or not table:
        raise _damaged(path, "the table must number its weights from 0", "others")
    offset = 0
    for row in sorted(table, key=lambda row: row["tensor"]):
        if row["offset"] != offset:
            raise _damaged(path, f"{row['name']!r} must start at {offset}", str(row["offset"]))
        offset += generator.extents([views[row["name"]].count])[0]
    if not 1 <= fields["size"] <= sum(view.count for view in views.values()):
        raise _damaged(path, "the state must be no larger than the weights", str(fields["size"]))
    if isinstance(fields["seed"], str) != (fields["seed"] == WITHHELD) or (
        fields["seed"] != WITHHELD and not 0 <= fields["seed"] < SEED_LIMIT
    ):
        raise _damaged(path, "the seed must be in [0, 2^64) or withheld", repr(fields["seed"]))


def _generator(path: Any, fields: dict[str, Any]) -> Generator:
    if fields["method"] not in Generator.registry:
        fix = "Use the version of fxrpg that wrote the file."
        raise FxrpgError(str(path), f"the method must be one of {sorted(Generator.registry)}", fields["method"], fix)
    try:
        return Generator.registry[fields["method"]](**fields["settings"])
    except (TypeError, FxrpgError) as e:
        raise _damaged(path, f"must hold settings of the method {fields['method']!r}", str(e)) from None


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
        names={row["name"]: tuple(row["names"]) for row in fields["table"]},
        dense=dict(fields["dense"]),
        rules=tuple(fields["rules"]),
    )


def _fill(model: nn.Module, contents: Contents, path: Any, own: set[str]) -> None:
    """Put the file's dense tensors into a freshly assembled model, in the file's types, ties kept."""
    wanted = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in own}
    given = {name: tensor for name, tensor in contents.tensors.items() if name not in own}
    given |= {alias: given[name] for alias, name in contents.fields["aliases"].items() if name in given}
    for name in sorted(wanted.keys() ^ given.keys()):
        side = "the file has none" if name in wanted else "the model has none"
        raise _other_model(path, f"model and file must both hold the dense tensor {name!r}", side)
    made: dict[int, Tensor] = {}
    for name, old in wanted.items():
        if old.shape != given[name].shape:
            raise _other_model(path, f"{name!r} must have shape {tuple(given[name].shape)}", str(tuple(old.shape)))
        if id(old) not in made:
            new = given[name].to(old.device if not old.is_meta else "cpu")
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for name, old in wanted.items():
        prefix, _, attribute = name.rpartition(".")
        module = model.get_submodule(prefix)
        (module._parameters if isinstance(old, nn.Parameter) else module._buffers)[attribute] = made[id(old)]  # type: ignore[assignment]
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if tensor.is_meta:
            fix = "Build the model on a real device: the buffer is not part of its state_dict, so no file holds it."
            raise _other_model(path, f"{name!r} must have values", "a tensor on the meta device", fix)


def _damaged(path: Any, must: str, found: str) -> FxrpgError:
    return FxrpgError(str(path), must, found, "The file is damaged or was not written by fxrpg: fetch or save it again.")


def _other_model(path: Any, must: str, found: str, fix: str = "Pass a model of the architecture that was saved.") -> FxrpgError:
    return FxrpgError(f"load, {path}", must, found, fix)
