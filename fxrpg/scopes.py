"""Who shares a state with whom, how large each state is, and where each weight lies in it."""

from __future__ import annotations

import math
import numbers
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.plan import Choice, Scope
from fxrpg.rule import Dof, Rule, Scoping
from fxrpg.view import View

WORDS = ("model", "stage", "block", "position", "layer")


def lay_out(
    chosen: Sequence[Choice], model: nn.Module, *, dof: Dof, scope: Scoping, seed: int
) -> tuple[tuple[Scope, ...], dict[str, View], dict[str, int]]:
    """Scopes, views and name -> scope for the chosen weights.

    Ids and positions follow the names' code-point order, so they do not depend on traversal.

    Raises:
        FxrpgError: a DoF that is missing, out of range, or given for no scope; an unknown scope.
    """
    groups = _groups(chosen, model, scope)
    sizes = _sizes(groups, dof)
    scopes = _named([(label, members[0].generator, sizes[label]) for label, members in groups.items()])
    index = {choice.candidate.name: i for i, members in enumerate(groups.values()) for choice in members}
    ids = {name: tensor for tensor, name in enumerate(sorted(index))}
    views: dict[str, View] = {}
    for i, members in enumerate(groups.values()):
        members = sorted(members, key=lambda choice: choice.candidate.name)
        offsets, total = scopes[i].generator.addresses([choice.candidate.parameter.numel() for choice in members])
        for choice, offset in zip(members, offsets, strict=True):
            views[choice.candidate.name] = View(
                generator=scopes[i].generator,
                seed=seed,
                tensor=ids[choice.candidate.name],
                shape=tuple(choice.candidate.parameter.shape),
                order=choice.role.order,
                offset=offset,
                total=total,
                size=scopes[i].size,
                stack=choice.role.stack,
            )
    return scopes, {choice.candidate.name: views[choice.candidate.name] for choice in chosen}, index


Label = tuple[Rule | None, str]
"""The rule that keeps a group apart, if any, and what its weights have in common."""


def _groups(chosen: Sequence[Choice], model: nn.Module, scope: Scoping) -> dict[Label, list[Choice]]:
    groups: dict[Label, list[Choice]] = {}
    scopings: dict[Rule | None, Callable[[str], str]] = {}
    for choice in chosen:
        rule = choice.rule
        if rule not in scopings:
            wanted = scope if rule is None else "model" if rule.scope is None else rule.scope
            scopings[rule] = scoping_of(model, wanted)
        name = scopings[rule](choice.candidate.name)
        if not isinstance(name, str):
            must, fix = "the function must return a scope's name, a string", 'Return "" for weights of no scope.'
            raise FxrpgError(f"scope of {choice.candidate.name}", must, repr(name), fix)
        label = rule, name
        groups.setdefault(label, []).append(choice)
    by_first_name = sorted(groups.items(), key=lambda item: min(choice.candidate.name for choice in item[1]))
    return dict(by_first_name)


def scoping_of(model: nn.Module, scope: Scoping) -> Callable[[str], str]:
    """The function from a parameter's name to its scope's name that `scope` stands for.

    "model": one scope; "layer": one for each module that owns weights; "block": one for each repeated block, that is each
    outermost module with parts of its own whose class occurs more than once in the model (a residual block, a transformer
    layer, one of several stacked sub-networks); "stage": one for each module that holds repeated blocks side by side
    (what arXiv:2107.07110, Fig. 3, calls the building blocks of a ResNet); "position": one for each place within a block,
    shared by all blocks of one class. Weights outside of any block share the scope "".
    """
    if callable(scope):
        return scope
    if scope not in WORDS:
        fix = "Pass one, or a function from a parameter's name to its scope's name."
        raise FxrpgError("scope", f"must be one of {WORDS} or a function", repr(scope), fix)
    if scope == "model":
        return lambda name: ""
    if scope == "layer":
        return _owner_name
    blocks = repeated_blocks(model)
    if not blocks:
        fix = "Pass scope='layer', or a function from a parameter's name to its scope's name."
        raise FxrpgError(
            f"scope={scope!r}", "needs a model with repeated blocks", f"none in {type(model).__name__}", fix
        )

    def of_block(name: str) -> str:
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            return ""
        if scope == "stage":
            return _owner_name(block)
        return block if scope == "block" else f"{blocks[block]}.{_owner_name(name[len(block) + 1 :])}"

    return of_block


def repeated_blocks(model: nn.Module) -> dict[str, str]:
    """Path -> class name of the outermost modules, with parts of their own, whose class occurs more than once."""

    def is_block(module: nn.Module) -> bool:
        # a graph module keeps its parts in modules without a class of their own
        plain = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or type(module) is nn.Module
        return not plain and any(True for _ in module.children())

    classes = Counter(type(module) for module in model.modules() if is_block(module))
    blocks: dict[str, str] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if path and not inside and is_block(module) and classes[type(module)] > 1:
            blocks[path] = type(module).__name__
    return blocks


def _owner_name(name: str) -> str:
    return name.rpartition(".")[0]


def _sizes(groups: Mapping[Label, list[Choice]], dof: Dof) -> dict[Label, int]:
    """The DoF of each group: split by share of weights where one int is given for several."""
    pools: dict[Rule | None, dict[str, list[tuple[int, ...]]]] = {}
    for (rule, name), members in groups.items():
        shapes = [tuple(choice.candidate.parameter.shape) for choice in members]
        pools.setdefault(rule, {})[name] = shapes
    if None not in pools and dof is not None and not isinstance(dof, float):
        fix = "Leave it out, or give it to a rule."
        raise FxrpgError("dof", "must have weights that no rule gives a state of their own", repr(dof), fix)
    sizes: dict[Label, int] = {}
    for rule, scopes in pools.items():
        generator = next(members[0].generator for (r, _), members in groups.items() if r is rule)
        wanted, where = (dof, "dof") if rule is None else (rule.dof, f"plan rule {rule}, dof")
        if rule is not None and wanted is None and isinstance(dof, float) and generator.needs_dof:
            wanted = dof  # a fraction means the same for the rule's own weights
        for name, size in _split(generator, scopes, wanted, where).items():
            sizes[rule, name] = size
    return sizes


def _split(generator: Generator, scopes: dict[str, list[tuple[int, ...]]], dof: Dof, where: str) -> dict[str, int]:
    if not generator.needs_dof:
        if dof is not None:
            fix = "Leave it out."
            raise FxrpgError(where, f"{generator} follows from the weights' shapes", repr(dof), fix)
        return {name: generator.state_size(1.0, shapes) for name, shapes in scopes.items()}
    if isinstance(dof, Mapping):
        if set(dof) != set(scopes):
            fix = "Name every scope once, and no other."
            raise FxrpgError(where, f"must have a size for each scope of {sorted(scopes)}", repr(dict(dof)), fix)
        return {
            name: checked_dof(dof[name], generator, shapes, f"{where}[{name!r}]") for name, shapes in scopes.items()
        }
    if len(scopes) == 1 or (isinstance(dof, float) and 0 < dof <= 1):
        return {name: checked_dof(dof, generator, shapes, where) for name, shapes in scopes.items()}
    whole = checked_dof(dof, generator, [shape for shapes in scopes.values() for shape in shapes], where)
    if whole < len(scopes):
        fix = "Pass at least one number for each scope, or a coarser scope."
        raise FxrpgError(where, f"must be at least {len(scopes)}, the number of scopes", repr(dof), fix)
    return _aligned_shares(whole, {name: generator.most(shapes) for name, shapes in scopes.items()}, generator.granule)


def _aligned_shares(whole: int, weights: dict[str, int], granule: int) -> dict[str, int]:
    """`whole` split by share in multiples of `granule`, the rest to the largest share; in any numbers where that cannot be."""
    granules, rest = divmod(whole, granule)
    rooms = {name: count // granule for name, count in weights.items()}
    largest = max(weights, key=lambda name: weights[name])
    if granules < len(weights) or not all(rooms.values()) or granules > sum(rooms.values()):
        return shares(whole, weights)
    sizes = {name: granule * size for name, size in shares(granules, rooms).items()}
    sizes[largest] += rest
    return sizes if sizes[largest] <= weights[largest] else shares(whole, weights)


def shares(whole: int, weights: dict[str, int]) -> dict[str, int]:
    """`whole` split by share: at least one each, never more than the share's own weights, the largest remainders first."""
    total = sum(weights.values())
    exact = {name: whole * count / total for name, count in weights.items()}
    sizes = {name: min(max(1, math.floor(share)), weights[name]) for name, share in exact.items()}
    by_remainder = sorted(weights, key=lambda name: sizes[name] - exact[name])
    while (missing := whole - sum(sizes.values())) != 0:
        step = 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else reversed(by_remainder):
            if missing and 1 <= sizes[name] + step <= weights[name]:
                sizes[name] += step
                missing -= step
    return sizes


def checked_dof(dof: Any, generator: Generator, shapes: Sequence[tuple[int, ...]], where: str = "dof") -> int:
    """The DoF that a request comes to. Raises FxrpgError unless it is an int in range, or a fraction in (0, 1]."""
    most = generator.most(shapes)
    fix = f"Pass an int from 1 to {most}, or a fraction in (0, 1]."
    what = "the generated weights" if most == sum(map(math.prod, shapes)) else "the largest weight"
    must = f"must be an int in [1, {most}] ({what}) or a fraction in (0, 1]"
    if isinstance(dof, bool) or not isinstance(dof, numbers.Real):
        raise FxrpgError(where, must, "none" if dof is None else repr(dof), fix)
    value = int(dof) if isinstance(dof, numbers.Integral) else float(dof)
    exact = isinstance(value, int) or value > 1
    if not 0 < value <= most or (exact and value != int(value)):
        raise FxrpgError(where, must, reprlib.repr(dof), fix)
    return generator.state_size(int(value) if exact else value, shapes)


def _named(found: Sequence[tuple[Label, Generator, int]]) -> tuple[Scope, ...]:
    """Scopes with names of their states: that of the method, with the scope's name where several would have it."""
    counts = Counter(generator.state_name for _, generator, _ in found if not generator.local)
    taken: set[str] = set()
    scopes = []
    for (rule, name), generator, size in found:
        name = ".".join(part for part in (_pattern_name(rule), name) if part)
        state = generator.state_name
        if not generator.local and counts[state] > 1 and name:
            state = f"{state}_{re.sub(r'[^0-9A-Za-z]+', '_', name)}"
        if not generator.local:
            base, ordinal = state, 1
            while {state, f"{state}_kept"} & taken:
                ordinal += 1
                state = f"{base}_{ordinal}"
            taken |= {state, f"{state}_kept"}  # what a file holds beside a pruned state
        scopes.append(Scope(name=name, generator=generator, size=size, state=state))
    return tuple(scopes)


def _pattern_name(rule: Rule | None) -> str:
    """The part of a rule's pattern that can stand in a name."""
    if rule is None:
        return ""
    text = str(rule).partition(" -> ")[0].removeprefix("re:")
    return re.sub(r"[^0-9A-Za-z.]+", "_", text).strip("._") or "rule"
