"""Find the largest modules whose graphs compute what they do, prove it on example inputs, and install the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxrpg.assemble import copy_module, trace_of
from fxrpg.digest import PLAN
from fxrpg.errors import FxrpgError
from fxrpg.lowering import current_mode
from fxrpg.owner import generated_name, link_of, plain_class
from fxrpg.passes.region import FUSED, RegionTracer, fuse_layers, generates, reason_of
from fxrpg.proof import difference, kept_randomness, seed
from fxrpg.regions import (
    REGION,
    Call,
    Part,
    Region,
    Traced,
    Unknown,
    answering,
    holds_module,
    install,
    region_class,
    seen,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Unproved(Exception):
    """A region that is not to be trusted; the text says why."""


class Body(NamedTuple):
    """A module's graph in one mode, for no module in particular: paths are relative to its root.

    Args:
        training: path of each module that the code could see -> its mode, if it was traced through; the root, "", comes
            first.
        reads: (path, attribute) -> what the code found there.
        code: (root, *tensors) -> output.
        fused: (path of a layer, what its node does, paths of idle modules that it passes by).
        below: paths of modules that the graph calls and that may hold regions of their own -> why they were no part.
    """

    training: dict[str, bool | None]
    reads: dict[tuple[str, str], Any]
    code: Any
    fused: list[tuple[str, str, tuple[str, ...]]]
    below: dict[str, str]

    def bound(self, root: nn.Module, call: Call) -> Traced:
        """The graph with guards on the modules of `root`. Raises Unproved if they are not as in the one that was traced."""
        parts = []
        for path, training in self.training.items():
            module = root.get_submodule(path)
            cls: Any = type(module)
            own = [(name, value) for (where, name), value in self.reads.items() if where == path]
            reads = tuple((name, seen(module, name)) for name, _value in own)
            if any(not holds_module(old) and old != new for (_, old), (_, new) in zip(own, reads, strict=True)):
                raise Unproved("running it changes what its code reads")
            children = tuple(module._modules.items())
            parts.append(Part(module, cls if path else region_class(cls), training, children, reads))
        return Traced(call, tuple(parts), self.code)


def check_examples(inputs: Any, kwargs: Any) -> Arguments | None:
    """Example inputs as (args, kwargs); None without any. Raises FxrpgError for what is no tuple or no dict."""
    if inputs is None and kwargs is None:
        return None
    if inputs is not None and not isinstance(inputs, tuple):
        fix = "Write example_inputs=(x,)."
        raise FxrpgError("transform, example_inputs", "must be a tuple of arguments", type(inputs).__name__, fix)
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
        fix = "Write example_kwargs={'mask': mask}."
        found = "a key that is no string" if isinstance(kwargs, Mapping) else type(kwargs).__name__
        raise FxrpgError("transform, example_kwargs", "must be a dict of keyword arguments", found, fix)
    return inputs or (), dict(kwargs or {})


def install_regions(root: nn.Module, examples: Arguments | None) -> None:
    """Give the largest modules in a transformed `root` that can be proved a region each; note why others have none.

    A region is a module whose forward torch.fx can trace; calls like the examples are then answered by the graph, where
    nothing has changed since: another form of call, another mode, a hook, a patched forward, another submodule, another
    value that the code reads, torch.compile and torch.func take the module's own forward.

    A module is proved in eval and in train mode, with gradients and without, on the arguments that it gets when `root`
    runs on `examples`: outputs, arguments changed in place, buffers, gradients, and the random numbers it draws. All runs
    are of copies; models in 16 bits are proved in float32, where rounding hides nothing.

    Raises:
        FxrpgError: `root` does not run on the examples in eval mode (strict transforms raise their own).
    """
    if examples is None:
        return
    trace = trace_of(root)
    if any(t.is_meta for t in (*root.parameters(), *root.buffers())):
        trace.dropped[""] = "the meta device has no values to compare"
        return
    with kept_randomness():
        pending = _candidates(root, [""])
        if isinstance(root, fx.GraphModule) or current_mode() == "materialized" or not pending:
            record(copy_module(root), [], examples)
            return
        while pending:
            pending = _candidates(root, _install_level(root, pending, examples))


def _install_level(root: nn.Module, paths: list[str], examples: Arguments) -> list[str]:
    """Try a region for each of these modules, none inside another; the paths where to try next."""
    trace, plain = trace_of(root), copy_module(root)
    calls, failure = record(plain, paths, examples)
    plain = _widened(plain)
    traced, trial = copy_module(plain), copy_module(plain)
    below: list[str] = []
    for path in paths:
        module = root.get_submodule(path)
        if (path, False) not in calls:  # nobody calls it: its parent reads what is inside
            below += _children(module, path)
            continue
        try:
            bodies = _proved(path, calls, (plain, traced, trial))
            region = _region(module, bodies, {mode: calls[path, mode] for mode in bodies})
        except Exception as e:  # whatever tracing or running it may raise
            trace.dropped[path] = str(e) if isinstance(e, Unproved) else reason_of(e)
            below += _children(module, path)
            continue
        below += _note(root, path, bodies[False])
        if bodies[False].fused:
            if failure:
                trace.dropped[path] = f"in train mode: {failure}"
            install(module, region)
    return below


def _region(module: nn.Module, bodies: Mapping[bool, Body], calls: Mapping[bool, Arguments]) -> Region:
    return Region(tuple(body.bound(module, Call.of(*calls[mode])[0]) for mode, body in bodies.items()))


def _note(root: nn.Module, path: str, body: Body) -> list[str]:
    """Note what a region does; the paths of modules in it that may hold regions of their own."""
    trace, below = trace_of(root), []
    for layer, op, _idle in body.fused:
        owner = root.get_submodule(_joined(path, layer))
        trace.expect(generated_name(owner, "weight"), "staged", op, way="region")
    for inner, reason in body.below.items():
        full = _joined(path, inner)
        if reason:
            trace.dropped[full] = reason
        below += _children(root.get_submodule(full), full) if reason else [full]
    return below


def record(
    model: nn.Module, paths: list[str], examples: Arguments
) -> tuple[dict[tuple[str, bool], Arguments], str | None]:
    """Run `model` in both modes: (path, training) -> the arguments of the first call there; and why train mode failed.

    Raises FxrpgError where eval mode fails.
    """
    calls: dict[tuple[str, bool], Arguments] = {}
    failure = None

    def watch(path: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            if (path, model.training) not in calls:
                calls[path, model.training] = _cloned((args, kwargs))

        return note

    hooks = [model.get_submodule(p).register_forward_pre_hook(watch(p), prepend=True, with_kwargs=True) for p in paths]
    for training in (False, True):
        model.train(training)
        args, kwargs = _cloned(examples)
        try:
            seed()
            with torch.enable_grad():
                model(*args, **kwargs)
        except Exception as e:  # the user's code may raise anything
            failure = reason_of(e)
            if not training and isinstance(e, FxrpgError):
                raise  # it says what to do about it
            if not training:
                fix = "Pass arguments that model(*example_inputs, **example_kwargs) takes."
                if PLAN in model.__dict__:
                    fix += " If it takes these, a module reads weights through parameters() or state_dict(): leave them dense."
                raise FxrpgError("transform, example_inputs", "the model must run on them", failure, fix) from e
            calls = {key: value for key, value in calls.items() if not key[1]}
    for hook in hooks:
        hook.remove()
    return calls, failure


def _proved(path: str, calls: Mapping[tuple[str, bool], Arguments], models: tuple[nn.Module, ...]) -> dict[bool, Body]:
    """mode -> graph of the module at `path`, proved equal on its calls. `models`: to run as it is, to trace, to try."""
    plain, traced, trial = (model.get_submodule(path) for model in models)
    bodies: dict[bool, Body] = {}
    wide = {mode: _wide(calls[path, mode]) for mode in (False, True) if (path, mode) in calls}
    for mode, arguments in wide.items():
        models[1].train(mode)
        bodies[mode] = _body(traced, arguments)
    if not bodies[False].fused:
        return bodies
    install(trial, _region(trial, bodies, wide))
    for mode, arguments in wide.items():
        models[0].train(mode)
        models[2].train(mode)
        for gradients in (True, False):
            if answering(trial, *arguments) is None:
                raise Unproved("its guards do not hold for the call that it was traced with")
            if other := difference(plain, trial, arguments, gradients):
                words = f"{'train' if mode else 'eval'} mode, {'with' if gradients else 'without'} gradients"
                raise Unproved(f"its graph gives other {other} than the module ({words})")
    return bodies


def _body(module: nn.Module, arguments: Arguments) -> Body:
    """The graph of a module in the mode that it is in."""
    call, tensors = Call.of(*arguments)
    if odd := [type(x).__name__ for x in tensors if type(x) is not Tensor]:
        raise Unknown(f"a tensor of class {odd[0]}")
    leaves = pytree.tree_leaves(arguments)
    tracer = RegionTracer(lambda proxies: call.arguments(leaves, proxies), len(tensors))
    graph = tracer.trace_module(module)
    gm = fx.GraphModule(module, graph)
    called = {str(node.target) for node in graph.find_nodes(op="call_module")}
    fuse_layers(gm)
    paths = {id(part): path for path, part in module.named_modules()}
    training: dict[str, bool | None] = {paths[id(part)]: part.training for part in tracer.through}
    training |= {path: module.get_submodule(path).training for path in tracer.modes}
    looked_at = {path for path, _name in tracer.reads} | set(_around(module, called))
    training |= dict.fromkeys(path for path in paths.values() if path in looked_at and path not in training)
    source = gm.graph.python_code("self")
    namespace = dict(source.globals)
    exec(compile(source.src, f"<region of {type(module).__name__}>", "exec"), namespace)
    below = {
        str(node.target): tracer.leaves.get(str(node.target), "") for node in gm.graph.find_nodes(op="call_module")
    }
    fused = [node.meta[FUSED] for node in gm.graph.nodes if FUSED in node.meta]
    training |= {path: module.get_submodule(path).training for _layer, _op, idle in fused for path in idle}
    return Body(training, tracer.reads, namespace["forward"], fused, below)


def _around(module: nn.Module, called: set[str], path: str = "") -> Iterator[str]:
    """Paths of the modules in which the called ones stand, or that nobody calls: code may count and choose among those."""
    if path not in called:
        yield path
        for name, child in module.named_children():
            yield from _around(child, called, _joined(path, name))


def _candidates(root: nn.Module, paths: Iterable[str]) -> list[str]:
    """Of these modules, or where they have no forward of their inside, those that could have a region; each once."""
    found: list[str] = []
    for path in paths:
        module = root.get_submodule(path)
        if not any(generates(layer) for layer in module.modules()):
            continue
        called = type(module).forward is not nn.Module.forward  # a ModuleList is not
        if not called or link_of(module) is not None or isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            found += _candidates(root, _children(module, path))
        elif isinstance(module, nn.Sequential) or not plain_class(module).__module__.startswith("torch.nn"):
            found.append(path)
    once: dict[int, str] = {}
    for path in found:
        once.setdefault(id(root.get_submodule(path)), path)
    return [path for path in once.values() if REGION not in root.get_submodule(path).__dict__]


def _children(module: nn.Module, path: str) -> list[str]:
    return [_joined(path, name) for name, _child in module.named_children()]


def _joined(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _cloned(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), arguments)


def _wide(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.float() if _narrow(x) else x, arguments)


def _widened(model: nn.Module) -> nn.Module:
    return model.float() if any(map(_narrow, (*model.parameters(), *model.buffers()))) else model


def _narrow(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize < 4
