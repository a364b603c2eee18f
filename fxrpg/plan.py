"""Which weights are generated and why the others are not: ordered rules, resolved to a table name -> view."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator
from fxrpg.hashing import FORMAT_VERSION, PERMUTE, SEED_LIMIT, SIGN, derive_key, random_words
from fxrpg.roles import LAYER_KINDS, PLAIN_KINDS, Refusal, Role, parametrized_layers, raw_role, role_of
from fxrpg.rule import DENSE, Rule
from fxrpg.view import View


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


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Weights that share a method, its settings and its degrees of freedom.

    Args:
        name: "" for the whole model; else what the weights have in common, such as "layer1.0".
        generator: the method and its settings.
        size: degrees of freedom.
        state: name of the root's tensor that is the state; where each weight has its own, the ending of their names.
        frozen: whether the state is packed for inference: bytes, not trained.
    """

    name: str
    generator: Generator
    size: int
    state: str
    frozen: bool = False


@dataclass(frozen=True)
class Plan:
    """The resolved table: everything that, with the states and the scales, makes up the generated weights.

    Args:
        seed: 0 <= seed < 2^64.
        scopes: who shares what.
        views: name -> view, in the model's order.
        scope_of: name -> index of its scope.
        names: name -> all names of that (tied) weight.
        dense: name -> why the parameter is not generated.
        rules: the rules that led here, as text.
        channels: path of a module whose channels were pruned -> the indices left of its (outputs, inputs); () is all.
    """

    seed: int
    scopes: tuple[Scope, ...]
    views: dict[str, View]
    scope_of: dict[str, int]
    names: dict[str, tuple[str, ...]]
    dense: dict[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    channels: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def generated(self) -> int:
        """Number of generated weights."""
        return sum(view.count for view in self.views.values())

    @property
    def size(self) -> int:
        """Degrees of freedom of all scopes."""
        return sum(scope.size for scope in self.scopes)

    @property
    def padding(self) -> int:
        """Positions of the address space that no weight fills: the ends of last blocks."""
        whole = [view.whole for view in self.views.values()]
        return sum(v.generator.extents([v.count])[0] - v.count for v in whole)

    def scope(self, name: str) -> Scope:
        """The scope of the weight called `name`."""
        return self.scopes[self.scope_of[name]]

    def state_of(self, name: str) -> str:
        """The dotted name, from the root, of the tensor that is the state of the weight called `name`."""
        scope = self.scope(name)
        return name + scope.state if scope.generator.local else scope.state

    @property
    def states(self) -> dict[str, list[str]]:
        """Name of each state tensor -> the weights that read it, in the order of their ids."""
        found: dict[str, list[str]] = {}
        for name, _view in sorted(self.views.items(), key=lambda item: item[1].tensor):
            found.setdefault(self.state_of(name), []).append(name)
        return found

    def with_scopes(self, change: Callable[[Scope], Scope]) -> Plan:
        """This plan with other settings in its scopes, and so in their views."""
        scopes = tuple(change(scope) for scope in self.scopes)
        views = {
            name: dataclasses.replace(view, generator=(own := scopes[self.scope_of[name]]).generator, size=own.size)
            for name, view in self.views.items()
        }
        return dataclasses.replace(self, scopes=scopes, views=views)

    def digest(self) -> str:
        """SHA-256 over seed, methods, table and the random functions' first draws: what states only fit together with."""
        fields = {name: view.fields() | {"state": self.state_of(name)} for name, view in sorted(self.views.items())}
        frozen = [scope.frozen for scope in self.scopes]
        content = {"channels": self.channels, "views": fields, "frozen": frozen, "draws": first_draws(self.seed)}
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
            known = role_of(holders.get(id(module), module), attribute, tuple(parameter.shape))
            role = known or roles.get(name)
            if isinstance(module, fx.GraphModule) and module is not model:
                role = Refusal("held by a graph module inside the model: transform that by itself")
            # what examples tell of raw parameters does not change which layers are the first and the last
            told = role if isinstance(model, fx.GraphModule) else known
            layers = (place,) if isinstance(told, Role) and told.kind in LAYER_KINDS else ()
            old = found.get(id(parameter), Candidate((), parameter, None, ()))
            found[id(parameter)] = Candidate((*old.names, name), parameter, old.role or role, old.layers + layers)
    return list(found.values())


@dataclass(frozen=True)
class Choice:
    """A parameter to generate.

    Args:
        candidate: the parameter.
        role: what it is to its layer.
        generator: the method.
        rule: the rule that chose it, where that gives it a state apart from the rest of the model.
    """

    candidate: Candidate
    role: Role
    generator: Generator
    rule: Rule | None


def choose(
    found: Sequence[Candidate], generator: Generator, rules: Sequence[Rule]
) -> tuple[list[Choice], dict[str, str]]:
    """The candidates to generate, and for all others (by name) the reason why not.

    Raises:
        FxrpgError: a rule that matches nothing, comes too late, or would generate nothing it matches; an empty plan.
    """
    layers = [place for candidate in found for place in candidate.layers]
    ends = {min(layers), max(layers)} if layers and generator.keeps_ends else set()
    chosen: list[Choice] = []
    dense: dict[str, str] = {}
    outcomes: dict[Rule, list[Role | str]] = {rule: [] for rule in rules}
    matched: set[Rule] = set()
    for candidate in found:
        hits = [rule for rule in rules if any(rule.matches(n, candidate.parameter) for n in candidate.names)]
        matched |= set(hits)
        rule = hits[0] if hits else None
        method = (rule.generator if rule else None) or generator
        outcome = _decide(candidate, rule, ends, method)
        if rule:
            outcomes[rule].append(outcome)
        if isinstance(outcome, Role):
            apart = rule is not None and (rule.dof is not None or rule.scope is not None or method != generator)
            chosen.append(Choice(candidate, outcome, method, rule if apart else None))
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


def _decide(candidate: Candidate, rule: Rule | None, ends: set[int], generator: Generator) -> Role | str:
    """The role in which the candidate is generated, or the reason why it stays dense."""
    role, parameter = candidate.role, candidate.parameter
    if rule is not None and rule.action == DENSE:
        return f"rule {rule}"
    if isinstance(role, Role) and role.kind in PLAIN_KINDS and role.kind not in generator.kinds:
        role = None
    if role is None and rule is not None and rule.pattern in candidate.names and parameter.dim() >= 2:
        role = raw_role(tuple(parameter.shape))
    if role is None and parameter.dim() < 2:
        return "not a weight (norm or bias)"
    if role is None:
        return "a raw parameter that nothing is known to take as its weight (example_inputs show it)"
    if isinstance(role, Refusal):
        return role.reason
    if not parameter.requires_grad:
        return "frozen"
    if not parameter.numel():
        return "empty"
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}"
    if rule is None and role.kind not in generator.kinds:
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
    if rule.action != DENSE and refused and len(refused) == len(outcomes):
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
