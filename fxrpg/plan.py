"""Which weights are generated and why the others are not: ordered rules, resolved to a table name -> view."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator, View
from fxrpg.hashing import FORMAT_VERSION, PERMUTE, SEED_LIMIT, SIGN, derive_key, random_words
from fxrpg.roles import LAYER_KINDS, Refusal, Role, parametrized_layers, raw_role, role_of

GENERATE, DENSE = "generate", "dense"


@dataclass(frozen=True)
class Rule:
    """One line of a plan; the first line that matches a parameter decides.

    Args:
        pattern: a glob on parameter names ("layer1.*"; `*` crosses dots), a regular expression after "re:", or a function
            (name, parameter) -> bool.
        action: "generate" (any eligible weight; with a plain name, any trainable parameter of two or more dimensions) or
            "dense".
    """

    pattern: str | Callable[[str, Tensor], bool]
    action: str

    def __post_init__(self) -> None:
        if self.action not in (GENERATE, DENSE):
            raise FxrpgError(
                f"Rule({self.pattern!r}, ...)",
                "the action must be 'generate' or 'dense'",
                repr(self.action),
                "Pass one.",
            )
        if not isinstance(self.pattern, str) and not callable(self.pattern):
            fix = 'Write fxrpg.Rule("layer1.*", "dense").'
            raise FxrpgError(
                f"Rule({self.pattern!r}, ...)", "the pattern must be a string or a function", "neither", fix
            )
        if isinstance(self.pattern, str) and self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as e:
                raise FxrpgError(
                    f"Rule({self.pattern!r}, ...)", "needs a regular expression after 're:'", str(e), "Correct it."
                ) from None

    def matches(self, name: str, parameter: Tensor) -> bool:
        """Whether the rule decides about the parameter called `name`."""
        if not isinstance(self.pattern, str):
            return bool(self.pattern(name, parameter))
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)

    def __str__(self) -> str:
        pattern = self.pattern if isinstance(self.pattern, str) else getattr(self.pattern, "__name__", "function")
        return f"{pattern} -> {self.action}"


@dataclass(frozen=True)
class Candidate:
    """One distinct parameter of a model, under all its names."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    role: Role | Refusal | None
    layers: tuple[int, ...]
    """Where the layers that own it as a conv or linear weight stand in `named_modules`."""

    @property
    def name(self) -> str:
        """The name that stands for it whatever the order of the modules: of tied names the first in code-point order."""
        return min(self.names)


@dataclass(frozen=True)
class Plan:
    """The resolved table: everything that, with the state and the scales, makes up the generated weights.

    Args:
        generator: the method and its settings.
        seed: 0 <= seed < 2^64.
        size: length of the state.
        views: name -> view, in the model's order.
        names: name -> all names of that (tied) weight.
        dense: name -> why the parameter is not generated.
        rules: the rules that led here, as text.
    """

    generator: Generator
    seed: int
    size: int
    views: dict[str, View]
    names: dict[str, tuple[str, ...]]
    dense: dict[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()

    @property
    def generated(self) -> int:
        """Number of generated weights."""
        return sum(view.count for view in self.views.values())

    @property
    def padding(self) -> int:
        """Positions of the address space that no weight fills: the ends of last blocks."""
        return sum(self.generator.extents([v.count])[0] - v.count for v in self.views.values())

    def digest(self) -> str:
        """SHA-256 over seed, method, table and the random functions' first draws: what a state only fits together with."""
        fields = {name: view.fields() for name, view in sorted(self.views.items())}
        content = {"views": fields, "size": self.size, "draws": first_draws(self.seed)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        lines = [f"{name}: {view.generator.method} {tuple(view.shape)}" for name, view in self.views.items()]
        return "\n".join(lines + [f"{name}: dense ({reason})" for name, reason in self.dense.items()])


def checked_seed(seed: Any) -> int:
    """`seed` as an int. Raises FxrpgError unless it is a whole number in [0, 2^64)."""
    whole = hasattr(type(seed), "__index__") and not isinstance(seed, Tensor | bool)
    value = operator.index(seed) if whole else -1
    if not 0 <= value < SEED_LIMIT:
        raise FxrpgError("seed", "must be an int in [0, 2^64)", repr(seed), "Pass one.")
    return value


def first_draws(seed: int) -> str:
    """A fingerprint of the integer random functions under `seed`: another seed or implementation draws otherwise."""
    words = torch.cat([random_words(0, 8, seed, purpose, 0) for purpose in (PERMUTE, SIGN)])
    text = f"{FORMAT_VERSION} {derive_key(seed, PERMUTE)} {words.tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def candidates(model: nn.Module, roles: Mapping[str, Role]) -> list[Candidate]:
    """Every distinct parameter of `model`, in the order of `named_parameters`, with its role.

    The role follows from the owner's class; `roles` (name -> role) speaks for parameters whose owner tells nothing.
    """
    holders = {id(holder): layer for holder, layer in parametrized_layers(model)}
    found: dict[int, Candidate] = {}
    first_place: dict[int, int] = {}
    for place, (prefix, module) in enumerate(model.named_modules(remove_duplicate=False)):
        place = first_place.setdefault(id(module), place)
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            role = role_of(holders.get(id(module), module), attribute, tuple(parameter.shape)) or roles.get(name)
            if isinstance(module, fx.GraphModule) and module is not model:
                role = Refusal("held by a graph module inside the model: transform that by itself")
            layers = (place,) if isinstance(role, Role) and role.kind in LAYER_KINDS else ()
            old = found.get(id(parameter), Candidate((), parameter, None, ()))
            found[id(parameter)] = Candidate((*old.names, name), parameter, old.role or role, old.layers + layers)
    return list(found.values())


def choose(
    found: Sequence[Candidate], generator: Generator, rules: Sequence[Rule]
) -> tuple[list[tuple[Candidate, Role]], dict[str, str]]:
    """The candidates to generate, each with its role, and for all others (by name) the reason why not.

    Raises:
        FxrpgError: a rule that matches nothing, comes too late, or would generate nothing it matches; an empty plan.
    """
    layers = [place for candidate in found for place in candidate.layers]
    ends = {min(layers), max(layers)} if layers and generator.keeps_ends else set()
    chosen: list[tuple[Candidate, Role]] = []
    dense: dict[str, str] = {}
    outcomes: dict[Rule, list[Role | str]] = {rule: [] for rule in rules}
    matched: set[Rule] = set()
    for candidate in found:
        hits = [rule for rule in rules if any(rule.matches(n, candidate.parameter) for n in candidate.names)]
        matched |= set(hits)
        outcome = _decide(candidate, hits[0] if hits else None, ends)
        if hits:
            outcomes[hits[0]].append(outcome)
        if isinstance(outcome, Role):
            chosen.append((candidate, outcome))
        else:
            dense[candidate.name] = outcome
    for rule in rules:
        _check_rule(rule, rule in matched, outcomes[rule])
    if not chosen:
        raise FxrpgError(
            "plan",
            "at least one weight must be generated",
            f"none of {len(found)} parameters ({_most_common(dense.values())})",
            'Name weights with plan=[fxrpg.Rule("*", "generate")], which takes every eligible one.',
        )
    return chosen, dense


def _decide(candidate: Candidate, rule: Rule | None, ends: set[int]) -> Role | str:
    """The role in which the candidate is generated, or the reason why it stays dense."""
    role, parameter = candidate.role, candidate.parameter
    if rule is not None and rule.action == DENSE:
        return f"rule {rule}"
    if role is None and rule is not None and rule.pattern in candidate.names and parameter.dim() >= 2:
        role = raw_role(tuple(parameter.shape))
    if role is None:
        return "not a weight (norm, bias or raw parameter)"
    if isinstance(role, Refusal):
        return role.reason
    if not parameter.requires_grad:
        return "frozen"
    if not parameter.numel():
        return "empty"
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}"
    if rule is None and role.kind not in LAYER_KINDS:
        return f"the default takes conv and linear weights, not {role.kind} ones"
    if rule is None and ends & set(candidate.layers):
        return "the default leaves the first and the last layer dense"
    return role


def _check_rule(rule: Rule, matched: bool, outcomes: list[Role | str]) -> None:
    if not matched:
        raise FxrpgError(
            f"plan rule {rule}",
            "must match a parameter's name",
            "none that does",
            "Compare it with named_parameters().",
        )
    if not outcomes:
        raise FxrpgError(
            f"plan rule {rule}",
            "must decide about a parameter",
            "that earlier rules match all of its own first",
            "Put it before them: the first rule that matches counts.",
        )
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if rule.action == GENERATE and refused and len(refused) == len(outcomes):
        raise FxrpgError(
            f"plan rule {rule}",
            "must match a weight that can be generated",
            f"only {_most_common(refused)}",
            "Drop the rule, or name a trainable parameter of two or more dimensions in full.",
        )


def _most_common(reasons: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return (
        "; ".join(f"{n} x {reason}" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))
        or "no parameter"
    )


def lay_out(chosen: Sequence[tuple[Candidate, Role]], generator: Generator, seed: int) -> dict[str, View]:
    """A view for each chosen weight. Ids and offsets follow the names' code-point order, so they do not depend on traversal."""
    by_name = sorted(chosen, key=lambda pair: pair[0].name)
    extents = generator.extents([candidate.parameter.numel() for candidate, _ in by_name])
    views: dict[str, View] = {}
    offset = 0
    for tensor, ((candidate, role), extent) in enumerate(zip(by_name, extents, strict=True)):
        views[candidate.name] = View(
            generator=generator,
            seed=seed,
            tensor=tensor,
            shape=tuple(candidate.parameter.shape),
            order=role.order,
            offset=offset,
            total=sum(extents),
        )
        offset += extent
    return {candidate.name: views[candidate.name] for candidate, _ in chosen}
