"""Files: one safetensors file holds the state, what is dense, and a header from which every weight can be generated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fxrpg.assemble import assemble, check_untransformed, copy_without, plan_of, states_in
from fxrpg.atomic import replacing
from fxrpg.channels import narrow_modules
from fxrpg.container import DTYPES, opened, read_layout, read_tensors
from fxrpg.digest import DIGEST
from fxrpg.errors import FxrpgError
from fxrpg.filling import check_parameters, fill
from fxrpg.header import KEPT, Contents, canonical, damaged, header_of, pruned_states, tensors_digest
from fxrpg.owner import SCALE, tensor_at
from fxrpg.packing import pack_bits
from fxrpg.plan import Plan
from fxrpg.shares import whole
from fxrpg.validation import check_kept, check_tensors, parse
from fxrpg.weights import encode_scales, generate_weight, weight_dtype


def save(model: nn.Module, path: str | os.PathLike[str], *, withhold_seed: bool = False) -> None:
    """Write a transformed `model` to one safetensors file: state, dense parameters, buffers, seed and table.

    Of a model whose parameters are split over ranks (fully_shard, `fxrpg.distribute`) every rank must call this.
    The file is written beside its place and moved there when complete: a killed process leaves the old file or the new.

    Args:
        model: the result of `transform`.
        path: where to. Of a symbolic link, the file that it points to is replaced.
        withhold_seed: leave the seed out; `load` then needs it. This is obfuscation, not encryption: the weights can be
            searched for by trying seeds.

    Raises:
        FxrpgError: `model` is not transformed, has no values (meta device), or has state that is not a plain tensor; `path`
            is a folder or a device.
        OSError: the file cannot be written.
    """
    held, aliases = _stored_tensors(model)
    for name, tensor in held.items():
        if tensor.is_meta:
            fix = "Load a file or a state_dict into the model first."
            raise FxrpgError(f"save, {name}", "must hold values", "a tensor on the meta device", fix)
    tensors = {name: plain_tensor(tensor) for name, tensor in held.items()}
    header = header_of(model, held, aliases, withhold_seed=withhold_seed, digest=tensors_digest(tensors))
    _check_readable(path, canonical(header), tensors)
    write_tensors(path, tensors, {"fxrpg": canonical(header)})


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Raises as `save` does."""
    try:
        with replacing(path) as temporary:
            save_file(_separate(tensors), temporary, metadata)
    except SafetensorError as e:
        raise OSError(f"{path}: {e}") from None


def file_size(model: nn.Module) -> int:
    """Bytes of the file that `save` would write, without writing it."""
    tensors, aliases = _stored_tensors(model)
    header = header_of(model, tensors, aliases, withhold_seed=False, digest="0" * 64)
    entries: dict[str, Any] = {"__metadata__": {"fxrpg": canonical(header)}}
    begin, layout = 0, list(DTYPES)
    for name, tensor in sorted(tensors.items(), key=lambda item: (layout.index(item[1].dtype), item[0])):
        end = begin + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + begin


def read(path: str | os.PathLike[str]) -> Contents:
    """Read and verify a file: its structure, version, header and every byte, before anything is built from it.

    Raises:
        FxrpgError: naming what is wrong.
        OSError: the file cannot be opened.
    """
    with opened(path) as file:
        try:
            metadata, entries = read_layout(file)
        except (ValueError, RecursionError) as e:
            raise damaged(path, "must be a whole safetensors file", str(e)) from None
        fields = parse(path, metadata)
        check_tensors(path, fields, dict(entries))
        try:
            tensors = read_tensors(file, entries)
        except ValueError as e:
            raise damaged(path, "must be a whole safetensors file", str(e)) from None
    if tensors_digest(tensors) != fields["tensors"]:
        raise damaged(path, "the tensors must match their digest", "another one")
    check_kept(path, fields, tensors)
    return Contents(fields, tensors)


def load(model: nn.Module, path: str | os.PathLike[str], *, seed: int | None = None, strict: bool = False) -> nn.Module:
    """A copy of `model`, freshly built and untransformed, that generates its weights from the file at `path`.

    The table in the file decides what is generated, not a plan. Tensors keep the type they have in the file and go to the
    device of the parameter they replace (the CPU for one on the meta device). What was frozen when it was saved, or is
    frozen in `model`, is frozen.

    Args:
        model: a module of the architecture that was saved; its weights are not read. Stays untouched.
        path: a file written by `save`.
        seed: needed where the file withholds it.
        strict: as in `transform`.

    Raises:
        FxrpgError: the file is damaged, of another version, without its seed, or of another model.
        OSError: the file cannot be opened.
    """
    if not isinstance(model, nn.Module):
        raise FxrpgError("load", "model must be a torch.nn.Module", type(model).__name__, "Pass model, then path.")
    check_untransformed(model)
    contents = read(path)
    plan = contents.plan(path, seed)
    parameters = check_parameters(model, path, plan)
    result = copy_without(model, [parameters[name] for name in plan.views])
    narrow_modules(result, plan.channels, path)
    # the file groups dense names by reason
    plan = dataclasses.replace(plan, dense={name: plan.dense[name] for name in parameters if name in plan.dense})
    states = contents.states(plan)
    for state, names in plan.states.items():
        states[state] = states[state].to(_device(parameters[names[0]]))
    assemble(result, plan, states, contents.scale(), strict, contents.frozen_dtype)
    trainable = dict(result.named_parameters())
    for state, names in plan.states.items():
        if state in trainable:
            trainable[state].requires_grad_(any(parameters[name].requires_grad for name in names))
    same = {id(tensor_at(result, state)) for state in states}
    own = {name for name, tensor in result.state_dict(keep_vars=True).items() if id(tensor) in same}
    fill(result, contents, path, {*own, *(state + KEPT for state in pruned_states(plan)), SCALE, DIGEST})
    return result


def _device(parameter: nn.Parameter) -> torch.device:
    return torch.device("cpu") if parameter.is_meta else parameter.device


def verify(path: str | os.PathLike[str], seed: int | None = None) -> Plan:
    """Check a file in full, seed included where it is known, and return its plan. Raises FxrpgError as `read` does."""
    return read(path).plan(path, seed)


def unpack(path: str | os.PathLike[str], seed: int | None = None) -> dict[str, Tensor]:
    """The state_dict of the ordinary model that a file stands for, full weights included. Needs no model.

    Raises:
        FxrpgError: as `load`; the weights do not fit into memory.
        OSError: the file cannot be opened.
    """
    contents = read(path)
    plan = contents.plan(path, seed)
    states, scale = contents.states(plan), encode_scales(contents.scale()).to(contents.frozen_dtype)
    own = {*states, *(state + KEPT for state in pruned_states(plan))}
    tensors = {name: tensor for name, tensor in contents.tensors.items() if name not in own}
    sizes = {n: v.count * weight_dtype(states[plan.state_of(n)], scale).itemsize for n, v in plan.views.items()}
    _check_memory(path, sum(sizes.values()))
    for name, view in plan.views.items():
        try:
            weight = generate_weight(states[plan.state_of(name)], scale, view.text)
        except RuntimeError as e:
            if "allocate" not in str(e):  # torch's allocator has no error of its own
                raise
            raise _too_large(f"{path}, {name}", sizes[name], str(e)) from None
        tensors |= dict.fromkeys(plan.names[name], weight)
    return tensors | {alias: tensors[name] for alias, name in contents.fields["aliases"].items()}


def _check_memory(path: Any, needed: int) -> None:
    """A small file may stand for any number of weights: say so before a system kills whoever allocates them."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there > 0:
            raise _too_large(path, needed, f"{there} bytes of memory")


def _too_large(where: Any, needed: int, found: str) -> FxrpgError:
    fix = "Unpack it on a machine with more memory."
    return FxrpgError(str(where), f"{needed} bytes of weights must fit into memory", found, fix)


def _stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds by name (tied tensors once), and alias -> name for the rest. Scales and digest are in the header."""
    if not isinstance(model, nn.Module):
        raise FxrpgError("save", "model must be a torch.nn.Module", type(model).__name__, "Pass model, then path.")
    pruned = pruned_states(plan_of(model))
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    by_id: dict[int, str] = {}
    states = {id(tensor_at(model, state)): state for state in states_in(model)}
    for name, held in model.state_dict(keep_vars=True).items():
        if name in (SCALE, DIGEST) or states.get(id(held), name) != name:
            continue  # a mask's scores in a module of several names stand under one
        tensor = whole(held)
        plain = isinstance(tensor, Tensor) and type(tensor.data) is Tensor and tensor.layout == torch.strided
        if not plain or tensor.dtype not in DTYPES:
            found = f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')} {getattr(tensor, 'layout', '')}".rstrip()
            fix = "Cast, densify or gather it, or store it beside the file."
            raise FxrpgError(f"save, {name}", "must be a plain tensor of a type that safetensors knows", found, fix)
        if id(held) in by_id:
            aliases[name] = by_id[id(held)]
        else:
            kept[name] = tensor
            by_id[id(held)] = name
    for name in pruned.keys() & kept.keys():
        state = kept[name]
        live = state.detach() != 0
        kept[name + KEPT] = pack_bits(live)
        values = state.detach() if state.is_meta else state.detach()[live]
        kept[name] = nn.Parameter(values, requires_grad=state.requires_grad)
    return kept, aliases


def _check_readable(path: Any, text: str, tensors: dict[str, Tensor]) -> None:
    """No file may hold what `read` would refuse: scales never set, a state that was replaced."""
    try:
        check_tensors(path, parse(path, {"fxrpg": text}), {n: (DTYPES[t.dtype], t.shape) for n, t in tensors.items()})
    except FxrpgError as e:
        fix = "Undo what was put into the model by hand; after to_empty(), load a state_dict into it."
        raise FxrpgError(f"save, {path}", e.args[1], e.args[2], fix) from None


def plain_tensor(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, as its bytes lie in a file."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    whole = tensor.is_contiguous() and tensor.numel() > 1  # one element is contiguous whatever its stride
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as safetensors takes them: plain, none sharing memory with another."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = plain_tensor(tensor)
        result[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    return result
