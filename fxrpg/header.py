"""The header of a file: what a reader needs, beside the tensors, to generate every weight, and its checks.

The header is the string `fxrpg` in the file's metadata: JSON with sorted keys and no spaces. `digest` is the SHA-256 of
that JSON without the field itself, `tensors` that of all tensors. Digests find damage; but whoever writes a file can
compute them, so what each field says is checked as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.assemble import plan_of
from fxrpg.container import DTYPES, TYPES
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.hashing import FORMAT_VERSION
from fxrpg.owner import SCALE
from fxrpg.packing import unpack_bits
from fxrpg.plan import Plan, Scope, checked_seed, first_draws
from fxrpg.view import View
from fxrpg.weights import decode_scales

WITHHELD = "withheld"

KEPT = "_kept"
"""Ending of the name under which a file holds which numbers of a sparse state are not zero, one bit each."""


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
            raise FxrpgError(
                str(path), must, "none", "Pass it as seed=..., --seed or, to from_pretrained, fxrpg_seed=..."
            )
        if stored != WITHHELD and given not in (None, stored):
            raise FxrpgError(str(path), f"the file's seed is {stored}", f"seed={given}", "Leave the argument out.")
        used = stored if given is None else given
        if first_draws(used) != self.fields["draws"]:
            must, found = shown(self.fields["draws"]), f"{first_draws(used)!r} with seed {used}"
            fix = "Pass the seed that the model was transformed with."
            raise FxrpgError(str(path), f"the random functions must draw {must}", found, fix)
        return plan_from(self.fields, used)

    def states(self, plan: Plan) -> dict[str, Tensor]:
        """The state tensors, pruned ones with their zeros in place."""
        found = {state: self.tensors[state] for state in plan.states}
        for state, size in pruned_states(plan).items():
            kept = unpack_bits(self.tensors[state + KEPT], 0, size)
            found[state] = found[state].new_zeros(size).masked_scatter_(kept, found[state])
        return found

    @property
    def frozen_dtype(self) -> torch.dtype:
        """The type of weights whose state is frozen."""
        return next((TYPES[scope["dtype"]] for scope in self.fields["scopes"] if scope["frozen"]), torch.float32)

    def scale(self) -> Tensor:
        """The table of scales, float32."""
        scale = torch.empty(len(self.fields["table"]), dtype=torch.float32, device="cpu")
        for row in self.fields["table"]:
            scale[row["tensor"]] = row["scale"]
        return scale


def pruned_states(plan: Plan) -> dict[str, int]:
    """Names and sizes of the states of which a file holds only the numbers that are not zero, beside a mark for each."""
    scopes = {state: plan.scope(names[0]) for state, names in plan.states.items()}
    return {state: scope.size for state, scope in scopes.items() if scope.generator.sparse and not scope.frozen}


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
            "scope": plan.scope_of[name],
            "tensor": view.tensor,
            "shape": list(view.shape),
            "order": list(view.order),
            "offset": view.offset,
            "scale": scales[view.tensor],
            "kept": [list(kept) for kept in view.kept],
            "original": list(view.original),
        }
        | ({"stack": view.stack} if view.stack else {})
        for name, view in plan.views.items()
    ]
    dense: dict[str, list[str]] = {}
    for name, reason in plan.dense.items():
        dense.setdefault(reason, []).append(name)
    header = {
        "format": FORMAT_VERSION,
        "seed": WITHHELD if withhold_seed else plan.seed,
        "draws": first_draws(plan.seed),
        "scopes": [_scope_fields(plan, i, tensors, scale) for i in range(len(plan.scopes))],
        "table": table,
        "rules": list(plan.rules),
        "dense": dense,
        "channels": {path: [list(kept) for kept in sides] for path, sides in plan.channels.items()},
        "aliases": aliases,
        "frozen": [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad],
        "tensors": digest,
    }
    return header | {"digest": header_digest(header)}


def _scope_fields(plan: Plan, i: int, tensors: dict[str, Tensor], scale: Tensor) -> dict[str, Any]:
    scope = plan.scopes[i]
    state = plan.state_of(next(name for name in plan.views if plan.scope_of[name] == i))
    dtype = scale.dtype if scope.frozen or state not in tensors else tensors[state].dtype
    return {
        "name": scope.name,
        "method": scope.generator.method,
        "settings": dataclasses.asdict(scope.generator),
        "size": scope.size,
        "state": scope.state,
        "frozen": scope.frozen,
        "dtype": DTYPES[dtype],
    }


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


def plan_from(fields: dict[str, Any], seed: int) -> Plan:
    scopes = tuple(
        Scope(
            name=scope["name"],
            generator=Generator.registry[scope["method"]](**scope["settings"]),
            size=scope["size"],
            state=scope["state"],
            frozen=scope["frozen"],
        )
        for scope in fields["scopes"]
    )
    rows = fields["table"]
    counts: list[list[int]] = [[] for _ in scopes]
    for row in rows:
        counts[row["scope"]].append(prod(row["original"] or row["shape"]))
    totals = [scope.generator.addresses(counts[i])[1] for i, scope in enumerate(scopes)]
    views = {
        row["name"]: View(
            generator=scopes[row["scope"]].generator,
            seed=seed,
            tensor=row["tensor"],
            shape=tuple(row["shape"]),
            order=tuple(row["order"]),
            offset=row["offset"],
            total=totals[row["scope"]],
            size=scopes[row["scope"]].size,
            kept=tuple(map(tuple, row["kept"])),
            original=tuple(row["original"]),
            stack=row.get("stack", 0),
        )
        for row in rows
    }
    return Plan(
        seed=seed,
        scopes=scopes,
        views=views,
        scope_of={row["name"]: row["scope"] for row in rows},
        names={row["name"]: (row["name"], *row["ties"]) for row in rows},
        dense={name: reason for reason, names in fields["dense"].items() for name in names},
        rules=tuple(fields["rules"]),
        channels={path: (tuple(out), tuple(into)) for path, (out, into) in fields["channels"].items()},
    )


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxlong = _shorten.maxother = 120


def shown(value: Any) -> str:
    """`repr(value)`, cut where a file made it too long or too deep for an error message."""
    return _shorten.repr(value)


def damaged(path: Any, must: str, found: str) -> FxrpgError:
    fix = "The file is damaged or was not written by fxrpg: fetch or save it again."
    return FxrpgError(str(path), must, found if len(found) <= 300 else f"{found[:300]}...", fix)
