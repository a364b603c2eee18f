"""What became of each weight: generated or dense, by which way and path, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch.fx as fx
from tabulate import tabulate
from torch import nn

from fxrpg.assemble import owners_of, plan_of, trace_of
from fxrpg.handle import handle_of
from fxrpg.owner import link_of, plain_class, stock_layer
from fxrpg.passes.lower import OP, REASONS
from fxrpg.plan import Plan
from fxrpg.staging import DENSE_OPS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter of a transformed model.

    Args:
        name: its name; of a tied one, that under which it is planned.
        shape: its shape.
        status: "generated" or "dense".
        way: "handle" (the module reads a property) or "graph" (the graph was rewritten); "" if dense.
        path: "staged", "materialized", "unknown" (nothing has consumed it yet), or "" if dense.
        op: the op that consumes it, if known.
        reason: why it is dense or materialized.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    way: str = ""
    path: str = ""
    op: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """All rows of a model, in the model's order; prints as a table under its headline."""

    rows: tuple[Row, ...]

    def fraction(self, path: str) -> float:
        """The share of the generated weights (elements, not tensors) on `path`."""
        generated = [row for row in self.rows if row.status == "generated"]
        return sum(prod(r.shape) for r in generated if r.path == path) / sum(prod(r.shape) for r in generated)

    def __str__(self) -> str:
        counts = {
            status: sum(prod(row.shape) for row in self.rows if row.status == status)
            for status in ("generated", "dense")
        }
        paths = [path for path in ("fused", "staged", "materialized", "unknown") if self.fraction(path)]
        shares = ", ".join(f"{100 * self.fraction(path):.1f}% {path}" for path in paths)
        headline = f"{counts['generated']:,} weights generated ({shares}), {counts['dense']:,} dense"
        body = [[r.name, "x".join(map(str, r.shape)), r.status, r.way, r.path, r.op, r.reason] for r in self.rows]
        return headline + "\n\n" + tabulate(body, ["weight", "shape", "status", "way", "path", "op", "reason"])


def explain(model: nn.Module) -> Explanation:
    """For each parameter of a transformed `model`: what became of it, and why.

    What an ordinary module does with a weight is known once it has run; before that the table tells what stock layers
    will do and "unknown" for others. Works on the meta device.

    Raises:
        FxrpgError: `model` is not transformed.
    """
    plan = plan_of(model)
    rows = {row.name: row for row in (*_handle_rows(model, plan), *_graph_rows(model, plan))}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    dense = [
        Row(name=name, shape=shapes[name], status="dense", reason=reason)
        for name, reason in plan.dense.items()
        if name in shapes
    ]
    return Explanation((*(rows[name] for name in plan.views), *dense))


def _handle_rows(model: nn.Module, plan: Plan) -> Iterator[Row]:
    seen = trace_of(model).seen
    for name, owner, _attribute in owners_of(model, plan) if not isinstance(model, fx.GraphModule) else _called(model):
        stock = stock_layer(plain_class(owner))
        predicted = ("staged", stock.__name__, "") if stock else ("unknown", "", "nothing has consumed it yet")
        path, op, reason = seen.get(name, predicted)
        shape = plan.views[name].shape
        yield Row(name=name, shape=shape, status="generated", way="handle", path=path, op=op, reason=reason)


def _called(gm: fx.GraphModule) -> Iterator[tuple[str, nn.Module, str]]:
    """The owners that the graph calls as modules."""
    for node in gm.graph.find_nodes(op="call_module"):
        for module in gm.get_submodule(node.target).modules():
            if link := link_of(module):
                for attribute, (name, *_view) in link.weights.items():
                    yield name, module, attribute


def _graph_rows(model: nn.Module, plan: Plan) -> Iterator[Row]:
    if not isinstance(model, fx.GraphModule):
        return
    names = {view.text: name for name, view in plan.views.items()}
    found = {name: Row(name=name, shape=v.shape, status="generated", way="graph", path="unknown",
                       reason="the graph does not read it") for name, v in plan.views.items()}  # fmt: skip
    for node in model.graph.nodes:
        if node.target in DENSE_OPS:
            name = names[node.args[len(DENSE_OPS[node.target].inputs) + 3]]
            path, op, reason = "staged", node.meta.get(OP, DENSE_OPS[node.target].name), ""
        elif node.target is handle_of:
            name, path = node.args[3], "materialized"
            reasons = node.meta.get(REASONS, {})
            op, reason = ", ".join(reasons), "; ".join(dict.fromkeys(reasons.values()))
        else:
            continue
        found[name] = Row(
            name=name, shape=plan.views[name].shape, status="generated", way="graph", path=path, op=op, reason=reason
        )
    yield from (
        row for name, row in found.items() if row.path != "unknown" or name not in {n for n, _, _ in _called(model)}
    )
