"""What must hold of every transformed model: each check returns None, or in one line what does not."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxrpg
from bench.zoo.calls import Difference, call, compare, differing_bits, largest, run
from bench.zoo.subject import Subject, no_regions, seed, transformed, works
from bench.zoo.watch import Saved
from fxrpg.assemble import plan_of
from fxrpg.owner import SCALE, generated_of, link_of
from fxrpg.weights import accumulate_gradient

Check = Callable[[Subject], str | None]

CANCELLED = 1e-2
"""Of the largest gradient: below it, differences are seen relative to that. A bias before a norm has a gradient of zero,
of which rounding alone is left."""


def untouched(subject: Subject) -> str | None:
    """Transforming leaves the model and the examples bit for bit as they were, and draws no random numbers."""
    return differing_bits(subject.after, subject.before)


def tied(subject: Subject) -> str | None:
    """What was one parameter is one view or one parameter, and nothing else is."""
    expected = _partition(_identities(subject.original))
    for form, model in (("transformed", subject.small), ("materialized", subject.dense)):
        names = [name for group in expected for name in group]
        if missing := [name for name in names if _identity(model, name) is None]:
            return f"{form}: no {missing[0]}"
        found = _partition({name: _identity(model, name) for name in names})
        if found != expected:
            return f"{form}: {', '.join(sorted(min(found ^ expected, key=sorted)))} tied otherwise"
    return None


def train_outputs(subject: Subject) -> str | None:
    """The model computes in train mode what its materialized one does."""
    return _same(subject, lambda s: compare(s.train.small.outputs, s.train.dense.outputs))


def eval_outputs(subject: Subject) -> str | None:
    """The same in eval mode."""
    return _same(subject, lambda s: compare(s.eval.small.outputs, s.eval.dense.outputs))


def buffers(subject: Subject) -> str | None:
    """A call in train mode leaves the same in the model's buffers."""

    def difference(s: Subject) -> Difference:
        own = {name: b for name, b in s.train.small.buffers.items() if name in s.train.dense.buffers}
        return compare(own, s.train.dense.buffers)

    return _same(subject, difference)


def state_gradients(subject: Subject) -> str | None:
    """A state's gradient is the chain rule through the weights: the sum of what their gradients come to in it."""

    def difference(s: Subject) -> Difference:
        expected = chain_rule(s)
        found = {name: s.train.small.gradients[name] for name in expected}
        return compare(_zeros(found, expected), expected, CANCELLED * largest(expected))

    return _same(subject, difference)


def dense_gradients(subject: Subject) -> str | None:
    """Gradients of what stayed dense are those of the materialized model."""

    def difference(s: Subject) -> Difference:
        expected, states = s.train.dense.gradients, plan_of(s.small).states
        found = {name: grad for name, grad in s.train.small.gradients.items() if name not in states}
        return compare(found, {name: expected[name] for name in found}, CANCELLED * largest(expected))

    return _same(subject, difference)


def input_gradients(subject: Subject) -> str | None:
    """Gradients of the inputs are those of the materialized model."""
    return _same(
        subject,
        lambda s: compare(s.train.small.inputs, s.train.dense.inputs, CANCELLED * largest(s.train.dense.inputs)),
    )


def nothing_saved(subject: Subject) -> str | None:
    """Neither a generated weight nor an equal slice of one is kept for backward; what the model makes of one is told."""
    dense = dict(fxrpg.materialize(subject.small).named_parameters(remove_duplicate=False))
    saved = Saved({name: dense[name] for name in subject.views}, subject.small)
    into_inputs = subject.into_inputs
    with saved:
        call(subject.small, subject.arguments, True, into_inputs)
    if saved.derived:
        subject.notes.append(
            f"computed from {len(saved.derived)} weights and kept for backward by the model's own code"
        )
    kept = [f"{name}: {what}" for name, what in saved.generated.items()]
    return f"{len(kept)} weights kept, {kept[0]}" if kept else None


def deep_copies(subject: Subject) -> str | None:
    """A deep copy computes the same bits, and nothing done to it is seen in the model."""
    small = subject.small
    for model in (subject.dense, small):  # so that both hold what an eval call leaves
        expected = run(model, subject.arguments, False).outputs
    if not works(lambda: copy.deepcopy(subject.dense)):
        return None
    twin = copy.deepcopy(small)
    if other := differing_bits(run(twin, subject.arguments, False).outputs, expected):
        return f"other bits in {other}"
    links = (link for module in twin.modules() if (link := link_of(module)))
    if any(link.root is not twin for link in links):
        return "the copy reads the state of the model"
    with torch.no_grad():
        for x in _tensors(twin).values():
            x.zero_()
    other = differing_bits(run(small, subject.arguments, False).outputs, expected)
    return f"a change of the copy changes the model's {other}" if other else None


def files(subject: Subject) -> str | None:
    """What is saved and loaded into a model of other weights has the same bits and computes them (without regions)."""
    seed(1)
    fresh = subject.build()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fxrpg.save(subject.small, path)
        loaded = fxrpg.load(fresh, path)
    return _same_bits(subject, loaded)


def pickles(subject: Subject) -> str | None:
    """What can be pickled as an ordinary model can be as a transformed one, with the same bits (without regions)."""
    if not works(lambda: pickle.loads(pickle.dumps(subject.dense))):
        return None
    return _same_bits(subject, pickle.loads(pickle.dumps(subject.small)))


def frozen(subject: Subject) -> str | None:
    """Weights that are frozen beforehand stay as they are: dense, without a gradient, unmoved by training."""
    seed()
    model = subject.build()[0]
    generated = list(subject.views)
    names = generated[1::3] or [name for name, _ in model.named_parameters() if name not in generated][:1]
    kept = {name: model.get_parameter(name).requires_grad_(False) for name in names}
    if not any(p.requires_grad for name, p in model.named_parameters() if name in generated):
        return None  # every weight is one of these
    with fxrpg.lowering_mode("materialized"):  # which looks for no regions
        small = transformed(model, subject.method, subject.arguments)
    subject.backward(small)
    for name in kept:
        if not isinstance(_identity(small, name), int):
            return f"{name} was generated"
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    for name, original in kept.items():
        found = small.get_parameter(name)
        if found.requires_grad or found.grad is not None:
            return f"{name} is trained"
        if not torch.equal(found, original):
            return f"{name} was changed"
    return None


def steps(subject: Subject) -> str | None:
    """A step of SGD moves parameters that require gradients, and the weights through them; nothing else."""
    small = subject.small
    subject.backward(small)
    states = {name: small.get_parameter(name) for name in plan_of(small).states}
    trainable = {name: p for name, p in small.named_parameters() if p.requires_grad}
    slopes = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    steepest = largest({name: slope for name, slope in slopes.items() if name in states})
    if not steepest:
        return None  # the call reaches no generated weight
    before = {name: x.detach().clone() for name, x in _tensors(small).items()}
    weights = _weights(small, subject)
    rate = 4 * largest(states) / steepest  # enough to turn masks over
    torch.optim.SGD(trainable.values(), lr=rate).step()
    for name, x in _tensors(small).items():
        moved = differing_bits({name: x}, {name: before[name]}) is not None  # memory that nobody filled may hold NaN
        if moved and name not in slopes:
            return f"{name} was changed"
        if (
            name in states
            and name in slopes
            and not moved
            and (before[name] - rate * slopes[name] != before[name]).any()
        ):
            return f"{name} was not changed"  # though its gradient is more than rounding swallows
    after = _weights(small, subject)
    return "no weight was changed" if all(torch.equal(after[name], weights[name]) for name in weights) else None


CHECKS: tuple[Check, ...] = (
    untouched, tied, train_outputs, buffers, state_gradients, dense_gradients, input_gradients, eval_outputs, nothing_saved,
    deep_copies, files, pickles, frozen, steps,
)  # fmt: skip
"""In this order: the last ones change the model."""


def _same(subject: Subject, difference: Callable[[Subject], Difference]) -> str | None:
    """What differs by more than rounding.

    A model that picks among near ties (experts, boxes, maxima) or is ill conditioned makes much of rounding: what differs is
    compared once more in float64, where rounding is 5e8 times smaller and everything else is as it was.
    """
    found = difference(subject)
    subject.largest = max(subject.largest, found.value)
    if found.value <= subject.tolerance:
        return None
    if subject.dtype == torch.float32:
        try:
            exact = difference(subject.wide)
        except Exception as e:  # whatever a model that does not run in float64 raises
            return f"{found} (and in float64: {type(e).__name__})"
        if exact.value <= 1e-9:
            subject.notes.append(f"{found}, by rounding: equal in float64")
            return None
        return f"{found}, in float64 {exact.value:.1e}"
    return str(found)


def chain_rule(subject: Subject) -> dict[str, Tensor]:
    """The gradient of each state, from those of the materialized model's weights."""
    small, plan = subject.small, plan_of(subject.small)
    scale = small.get_buffer(SCALE)
    found = {name: torch.zeros_like(small.get_parameter(name), requires_grad=False) for name in plan.states}
    for name, view in plan.views.items():
        if (grad := subject.train.dense.gradients[name]) is not None:
            state = plan.state_of(name)
            found[state] += accumulate_gradient(grad, small.get_parameter(state).detach(), scale, view.text)
    return found


def _zeros(found: dict[str, Tensor | None], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """No gradient is a gradient of zero."""
    return {name: torch.zeros_like(like[name]) if x is None else x for name, x in found.items()}


def _identity(model: nn.Module, name: str) -> Any:
    """What tells whether two names are one: the parameter, or the state and the view; None for a name that is not there."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    if (link := link_of(owner)) and attribute in link.weights:
        generated = generated_of(owner, attribute)
        return id(generated.state), generated.view
    found = owner._parameters.get(attribute)
    return None if found is None else id(found)


def _identities(model: nn.Module) -> dict[str, Any]:
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def _partition(identities: dict[str, Any]) -> set[frozenset[str]]:
    groups: dict[Any, set[str]] = {}
    for name, identity in identities.items():
        groups.setdefault(identity, set()).add(name)
    return set(map(frozenset, groups.values()))


def _weights(model: nn.Module, subject: Subject) -> dict[str, Tensor]:
    """The generated weights in full."""
    dense = dict(fxrpg.materialize(model).named_parameters(remove_duplicate=False))
    return {name: dense[name].detach() for name in subject.views}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _same_bits(subject: Subject, other: nn.Module) -> str | None:
    if name := differing_bits(other.state_dict(), subject.small.state_dict()):
        return f"other bits in {name}"
    with no_regions():
        expected, found = (run(m, subject.arguments, False).outputs for m in (subject.small, other))
    name = differing_bits(found, expected)
    return f"other bits in the outputs' {name}" if name else None
