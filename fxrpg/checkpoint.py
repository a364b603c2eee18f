"""Files: one safetensors file holds the state, what is dense, and a header from which every weight can be generated."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fxrpg.assemble import assemble, check_untransformed, copy_without, plan_of
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.header import DTYPES, Contents, canonical, damaged, header_of, parse, tensors_digest
from fxrpg.lowering import generate_weight
from fxrpg.owner import DIGEST, SCALE
from fxrpg.plan import Plan


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
    header = header_of(model, tensors, aliases, withhold_seed)
    write_tensors(path, tensors, {"fxrpg": canonical(header)})


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            mode = os.stat(file.fileno()).st_mode  # what the user's umask leaves; safetensors would make it private
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        os.chmod(temporary, mode)
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
    header = header_of(model, tensors, aliases, withhold_seed=False, hashed=False)
    entries: dict[str, Any] = {"__metadata__": {"fxrpg": canonical(header)}}
    begin = 0
    # safetensors lays tensors out by falling alignment, then by name
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = begin + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + begin


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
            fields = parse(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise damaged(path, "must be a whole safetensors file", str(e)) from None
    if tensors_digest(tensors) != fields["tensors"]:
        raise damaged(path, "the tensors must match their digest", "another one")
    state = Generator.registry[fields["method"]].state_name
    if state not in tensors or list(tensors[state].shape) != [fields["size"]]:
        raise damaged(path, f"must hold {state!r} of length {fields['size']}", "none or another length")
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


def _stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds by name (tied tensors once), and alias -> name for the rest. Scales and digest are in the header."""
    plan_of(model)
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    by_id: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in (SCALE, DIGEST):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            found = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            fix = "Store it beside the file; fxrpg files hold tensors only."
            raise FxrpgError(f"save, {name}", "must be a tensor of a type that safetensors knows", found, fix)
        if id(tensor) in by_id:
            aliases[name] = by_id[id(tensor)]
        else:
            kept[name] = tensor.detach()
            by_id[id(tensor)] = name
    return kept, aliases


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


def _other_model(
    path: Any, must: str, found: str, fix: str = "Pass a model of the architecture that was saved."
) -> FxrpgError:
    return FxrpgError(f"load, {path}", must, found, fix)
