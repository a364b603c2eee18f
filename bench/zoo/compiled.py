"""Whether a model compiles and exports: the untransformed one, and the transformed one, with what eager code computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.zoo.calls import Difference, compare, largest, leaves, run, seed
from bench.zoo.catalogue import Build
from bench.zoo.checks import CANCELLED
from bench.zoo.subject import Subject, transformed

TOLERANCE = 1e-4
"""Of a tensor's largest number: compiled code may compute an op by others, in another order."""


def compiles(subject: Subject, backend: str) -> dict[str, str]:
    """Train mode, forward and backward, as one graph: "yes", "other outputs ...", or the exception's name."""

    def difference(model: nn.Module, other: nn.Module) -> Difference:
        torch._dynamo.reset()
        eager = run(model, subject.arguments, True, subject.into_inputs)
        other.forward = torch.compile(other.forward, fullgraph=True, backend=backend)
        found = run(other, subject.arguments, True, subject.into_inputs)
        outputs = compare(found.outputs, eager.outputs)
        return max(outputs, compare(found.gradients, eager.gradients, CANCELLED * largest(eager.gradients)))

    return {f"compiles_{form}": _told(difference, make) for form, make in _forms(subject).items()}


def exports(subject: Subject) -> dict[str, str]:
    """`torch.export.export` in eval mode: "yes", "other outputs ...", or the exception's name."""

    def difference(model: nn.Module, other: nn.Module) -> Difference:
        args, kwargs = copy.deepcopy(subject.arguments)
        eager = run(model, subject.arguments, False)
        with torch.no_grad():
            program = torch.export.export(other.eval(), args, kwargs, strict=False)
            seed()
            found = leaves(program.module()(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return compare(found, eager.outputs)

    return {f"exports_{form}": _told(difference, make) for form, make in _forms(subject).items()}


def _forms(subject: Subject) -> dict[str, Callable[[], nn.Module]]:
    return {"plain": lambda: _built(subject.build), "transformed": lambda: _transformed(subject)}


def _built(build: Build) -> nn.Module:
    seed()
    return build()[0]


def _transformed(subject: Subject) -> nn.Module:
    return transformed(_built(subject.build), subject.method, subject.arguments)


def _told(difference: Callable[[Any, Any], Difference], make: Callable[[], nn.Module]) -> str:
    try:
        found = difference(make(), make())
    except Exception as e:  # by name: that is what is asked
        return type(e).__name__
    return "yes" if found.value <= TOLERANCE else f"other outputs: {found}"
