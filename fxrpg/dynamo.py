"""The backend of `torch.compile(model, backend="fxrpg")`: lowers the graphs that Dynamo captures, then compiles them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx

from fxrpg.digest import PLAN
from fxrpg.discovery import NAME
from fxrpg.errors import FxrpgError
from fxrpg.handle import Handle
from fxrpg.lowering import Generated
from fxrpg.owner import SCALE, TRACE, Link
from fxrpg.passes.decompose import decompose
from fxrpg.passes.lifetimes import shorten_lives
from fxrpg.passes.lower import GENERATE, OP, lower_readings, op_name, readings
from fxrpg.passes.pipeline import view_of
from fxrpg.plan import Plan
from fxrpg.staging import DENSE_OPS
from fxrpg.trace import Trace
from fxrpg.view import View


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """Compile a graph of Dynamo's with its generated weights lowered.

    Args:
        mode: as in `torch.compile`.
        options: `{"backend": name or function}` says who compiles the lowered graph (Inductor by default); all others are
            that backend's.

    Raises:
        FxrpgError: a strict model has a weight that no lowering covers; no such backend.
    """
    others = dict(options or {})
    backend = others.pop("backend", "inductor")
    traces = list(_traces(gm, example_inputs))
    handed_on = take_outputs(gm, traces)
    lower_graphs(gm, traces)
    compiled = _compiler(backend, mode, others)(gm, example_inputs)
    return functools.partial(_run, compiled, handed_on) if handed_on else compiled


def _run(compiled: Any, handed_on: dict[int, Callable[..., Any]], *inputs: Any) -> Any:
    """Run a graph, and put handles in the places of its outputs that `take_outputs` took."""
    made = {place: make(*inputs) for place, make in handed_on.items()}
    return tuple(made.get(place, out) for place, out in enumerate(compiled(*inputs)))


def take_outputs(gm: fx.GraphModule, traces: list[tuple[Trace, Plan]]) -> dict[int, Callable[..., Any]]:
    """Take the weights, in whatever form, out of a graph's outputs: place -> (*inputs of the graph) -> a handle.

    Where the code cannot be compiled as one graph, what the first part has read goes to the next as an ordinary tensor,
    which an op there would keep for backward.
    """
    places = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    (output,) = gm.graph.find_nodes(op="output")
    outputs: list[Any] = list(output.args[0])
    taken: dict[int, Callable[..., Any]] = {}
    for generate in gm.graph.find_nodes(op="call_function", target=GENERATE):
        state, scale, text = generate.args
        found = [(t, name) for t, plan in traces for name, view in plan.views.items() if view.text == text]
        written = readings(generate)[generate] is None
        if not found or written or not {state, scale} <= places.keys():
            continue
        trace, name = found[0]
        for form in readings(generate):
            steps = _steps(generate, form)
            for i in [i for i, out in enumerate(outputs) if out is form]:
                taken[i] = functools.partial(_hand_on, places[state], places[scale], text, name, trace, steps)
                outputs[i] = None
    if taken:
        output.args = (tuple(outputs),)
        gm.recompile()
    return taken


def _steps(generate: fx.Node, form: fx.Node) -> tuple[Callable[[Any], Any], ...]:
    """What makes a form of a weight, apart from the graph: passes will take its nodes out."""
    if form is generate:
        return ()
    function: Any = getattr(torch.Tensor, str(form.target)) if form.op == "call_method" else form.target
    arguments = form.args, form.kwargs

    def step(weight: Any) -> Any:
        args, kwargs = fx.node.map_arg(arguments, lambda _: weight)
        return function(*args, **kwargs)

    return *_steps(generate, form.all_input_nodes[0]), step


def _hand_on(
    state: int, scale: int, text: str, name: str, trace: Trace, steps: tuple[Callable[[Any], Any], ...], *inputs: Any
) -> Any:
    """A handle on a weight, rearranged as the graph did it."""
    weight: Any = Handle(Generated.of(inputs[state], inputs[scale], text), name, trace).attached()
    for step in steps:
        weight = step(weight)
    return weight


def _compiler(backend: Any, mode: str | None, options: dict[str, Any]) -> Any:
    """What `torch.compile` would call with a graph."""
    if backend == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)
    known = importlib.import_module("torch._dynamo.backends.registry").list_backends(exclude_tags=())
    if backend == NAME or not (callable(backend) or backend in known):
        raise FxrpgError(
            'torch.compile(backend="fxrpg")',
            'options={"backend": ...} must name another backend of torch.compile, or be one',
            repr(backend),
            f"Choose from {', '.join(name for name in known if name != NAME)}.",
        )
    return torch._TorchCompileWrapper(backend, mode, options, None)


def lower_graphs(gm: fx.GraphModule, traces: list[tuple[Trace, Plan]]) -> None:
    """Lower a graph of Dynamo's and those inside it, in place, and tell the models that its inputs belong to.

    What has no lowering stays a `generate`, whose result AOTAutograd does not keep for backward.
    """
    for graph in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in graph.graph.nodes:
            if "example_value" in node.meta:
                node.meta["val"] = node.meta["example_value"]
        decompose(graph)
        left = lower_readings(graph)
        _note(graph, left, traces)
        shorten_lives(graph)
        for node in graph.graph.nodes:
            node.meta.pop("val", None)
        graph.graph.lint()
        graph.recompile()


def _traces(gm: fx.GraphModule, example_inputs: list[Any]) -> Iterator[tuple[Trace, Plan]]:
    """Of each transformed model whose scales are among a graph's inputs: every weight is generated with them."""
    inputs = {id(x) for x in (*example_inputs, *gm.buffers())}
    for root in Link.roots():
        if id(root._buffers.get(SCALE)) in inputs:
            yield root.__dict__[TRACE], root.__dict__[PLAN]


def _note(gm: fx.GraphModule, left: dict[fx.Node, dict[str, str]], traces: list[tuple[Trace, Plan]]) -> None:
    """Tell what becomes of the weights in a graph, which knows them by their views alone."""
    uses: list[tuple[Any, str, str, str]] = []
    for node in gm.graph.nodes:
        if node.target is GENERATE:
            uses += [(node.args[2], "materialized", op, reason) for op, reason in left.get(node, {}).items()]
            uses += [(node.args[2], "staged", _op(user), "") for user in node.users if user.target in DENSE_OPS]
        elif text := view_of(node):
            uses.append((text, "staged", _op(node), ""))
    for trace, plan in traces:
        names = {view: name for name, view in plan.views.items()}
        for text, path, op, reason in uses:
            view = View.parse(text)
            while view.parent:
                view = view.parent
            if view in names:
                trace.note(names[view], path, op, reason, way="compiled")


def _op(node: fx.Node) -> str:
    """The function that a lowered op stands for, under the name that a handle would note."""
    dense: Any = DENSE_OPS.get(node.target)
    if OP in node.meta or dense is None:
        return node.meta.get(OP, op_name(node))
    if dense.name != "conv":
        return dense.name
    arguments: Any = node.args[len(dense.inputs) :]
    _bias, _state, _scale, text, *config = arguments
    return f"conv{'_transpose' if config[3] else ''}{len(View.parse(text).shape) - 2}d"
