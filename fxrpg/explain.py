"""What became of each weight: generated or dense, by which way and path, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from tabulate import tabulate
from torch import nn

from fxrpg.assemble import plan_of, trace_of, views_in
from fxrpg.device import runs_kernels
from fxrpg.owner import SCALE, owned, plain_class, stock_layer
from fxrpg.plan import Plan
from fxrpg.trace import Use


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter of a transformed model.

    Args:
        name: its name; of a tied one, that under which it is planned.
        shape: its shape.
        status: "generated" or "dense".
        method: of a generated one.
        state: name of the tensor that it is generated from.
        way: "handle" (the module reads a property), "graph" (the graph was rewritten), "region" (a proved graph answers
            calls like the example inputs) or "compiled" (by the backend "fxrpg"); "" if dense or unknown.
        path: "fused", "staged", "materialized" (by at least one op), "unknown" (nothing has consumed it yet), or "" if dense.
        op: the ops that consume it, if known.
        reason: why it is dense or materialized.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    method: str = ""
    state: str = ""
    way: str = ""
    path: str = ""
    op: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """All rows of a model, generated weights first; prints as a table under its headline.

    `dropped`: (module, why it has no region, or none in train mode), for those that were tried.
    """

    rows: tuple[Row, ...]
    dropped: tuple[tuple[str, str], ...] = ()

    def fraction(self, path: str) -> float:
        """The share of the generated weights (elements, not tensors) on `path`."""
        generated = [row for row in self.rows if row.status == "generated"]
        total = sum(prod(r.shape) for r in generated) or 1  # surgery may have taken all of them out
        return sum(prod(r.shape) for r in generated if r.path == path) / total

    def __str__(self) -> str:
        counts = {
            status: sum(prod(row.shape) for row in self.rows if row.status == status)
            for status in ("generated", "dense")
        }
        paths = [path for path in ("fused", "staged", "materialized", "unknown") if self.fraction(path)]
        shares = ", ".join(f"{100 * self.fraction(path):.1f}% {path}" for path in paths)
        headline = f"{counts['generated']:,} weights generated ({shares}), {counts['dense']:,} dense"
        several = len({(row.method, row.state) for row in self.rows if row.status == "generated"}) > 1
        body, headers = [], ["weight", "shape", "status", *["state"] * several, "way", "path", "op", "reason"]
        for r in self.rows:
            state = [f"{r.method}: {r.state}" if r.state else ""] * several
            body.append([r.name, "x".join(map(str, r.shape)), r.status, *state, r.way, r.path, r.op, r.reason])
        alike: dict[str, list[str]] = {}
        for name, reason in self.dropped:
            alike.setdefault(reason, []).append(name)
        lines = "".join(f"\nregion {_some(names)}: left to the module, {reason}" for reason, names in alike.items())
        return headline + "\n\n" + tabulate(body, headers) + (f"\n{lines}" if lines else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def explain(model: nn.Module) -> Explanation:
    """For each parameter of a transformed `model`: what became of it, and why.

    What an ordinary module does with a weight is known once it has run; before that the table tells what stock layers
    will do and "unknown" for others. Works on the meta device.

    Raises:
        FxrpgError: `model` is not transformed.
    """
    plan = plan_of(model)
    trace = trace_of(model)
    uses = {name: {op: use} for name, op, use in _predicted(model)} | trace.seen | trace.expected
    open_choice = runs_kernels(model.get_buffer(SCALE).device)
    generated = [_row(name, plan, uses.get(name, {}), open_choice) for name in views_in(model)]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    dense = [
        Row(name=name, shape=shapes[name], status="dense", reason=reason)
        for name, reason in plan.dense.items()
        if name in shapes
    ]
    dropped = ((path or plain_class(model).__name__, reason) for path, reason in trace.dropped.items())
    return Explanation((*generated, *dense), tuple(dropped))


def _row(name: str, plan: Plan, uses: dict[str, Use], open_choice: bool) -> Row:
    """One row from all uses of a weight: a single op that materializes it counts.

    Where kernels can run, what is only known to be staged (a graph, a layer that has not run) may as well be fused.
    """
    paths = {use.path for use in uses.values()}
    path = next((path for path in ("materialized", "staged", "fused") if path in paths), "unknown")
    reasons = dict.fromkeys(use.reason for use in uses.values() if use.reason)
    if path == "staged" and open_choice and not reasons:
        reasons = {"or fused, as the shapes of a call decide": None}
    return Row(
        name=name,
        shape=plan.views[name].shape,
        status="generated",
        method=plan.views[name].generator.method,
        state=plan.state_of(name),
        way=", ".join(dict.fromkeys(use.way for use in uses.values())),
        path=path,
        op=", ".join(uses),
        reason="; ".join(reasons) if uses else "nothing has consumed it yet",
    )


def _predicted(model: nn.Module) -> Iterator[tuple[str, str, Use]]:
    """(name, layer, use) for weights of layers whose code is torch's own, so that it is known what consumes them."""
    for name, owner, _attribute in owned(model):
        base = plain_class(owner)
        if issubclass(base, _TOGETHER):
            yield name, base.__name__, Use("handle", "staged", "")
        elif stock := stock_layer(base):
            yield name, stock.__name__, Use("handle", "staged", "")


_TOGETHER = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.RNNBase, nn.RNNCellBase)
"""Layers that hand their weights, all together, to one function of torch, which has a decomposition."""
