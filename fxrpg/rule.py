"""One line of a plan: which parameters, and what becomes of them."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator, generator_from

GENERATE, DENSE = "generate", "dense"
Dof = int | float | Mapping[str, int | float] | None
Scoping = str | Callable[[str], str]
"""A word of `scopes.py` ("model", "stage", "block", "position", "layer"), or a function from a name to its scope's name."""


@dataclass(frozen=True, eq=False)
class Rule:
    """One line of a plan; the first line that matches a parameter decides.

    Args:
        pattern: a glob on parameter names ("layer1.*"; `*` crosses dots), a regular expression after "re:", a module of the
            model (all its parameters), or a function (name, parameter) -> bool.
        action: "generate" (any eligible weight; with a plain name, any trainable parameter of two or more dimensions),
            "dense", or a method: its name, or settings such as `fxrpg.Ring(block=1)`.
        dof: degrees of freedom of the parameters that this rule decides about, which then share a state of their own. A rule
            with another method than the rest of the model needs it, or a fraction as the model's `dof`.
        scope: which of them share one, as in `transform`; they then have states of their own.
    """

    pattern: str | nn.Module | Callable[[str, Tensor], bool]
    action: str | Generator = GENERATE
    dof: Dof = None
    scope: Scoping | None = None

    def __post_init__(self) -> None:
        where = f"Rule({_shown(self.pattern)}, ...)"
        known = (GENERATE, DENSE, *sorted(Generator.registry))
        if self.action not in known and not isinstance(self.action, Generator):
            fix = "Pass one of them."
            raise FxrpgError(where, f"the action must be one of {known} or a method's settings", repr(self.action), fix)
        if not isinstance(self.pattern, str) and not callable(self.pattern):
            fix = 'Write fxrpg.Rule("layer1.*", "dense").'
            raise FxrpgError(where, "the pattern must be a string, a module or a function", repr(self.pattern), fix)
        if self.action == DENSE and (self.dof is not None or self.scope is not None):
            found = f"dof={self.dof!r}" if self.dof is not None else f"scope={self.scope!r}"
            raise FxrpgError(where, "a dense parameter has neither dof nor scope", found, "Leave them out.")
        if isinstance(self.pattern, str) and self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except (re.error, OverflowError, RecursionError) as e:  # repeats too large, brackets too deep
                raise FxrpgError(where, "needs a regular expression after 're:'", str(e), "Correct it.") from None

    @functools.cached_property
    def generator(self) -> Generator | None:
        """The method that the rule names, if it names one."""
        return None if self.action in (GENERATE, DENSE) else generator_from(self.action)

    def matches(self, name: str, parameter: Tensor) -> bool:
        """Whether the rule decides about the parameter called `name`."""
        if isinstance(self.pattern, nn.Module):
            return any(p is parameter for p in self.pattern.parameters())
        if not isinstance(self.pattern, str):
            return bool(self.pattern(name, parameter))
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)

    def __str__(self) -> str:
        dof = "" if self.dof is None else f", dof={self.dof}"
        scope = "" if self.scope is None else f", scope={_shown(self.scope)}"
        return f"{_shown(self.pattern)} -> {self.action}{dof}{scope}"


def _shown(pattern: Any) -> str:
    if isinstance(pattern, str):
        return pattern
    return type(pattern).__name__ if isinstance(pattern, nn.Module) else getattr(pattern, "__name__", "function")
