"""The contest of a whole model: the dense one, the authors' gathered weights, and generated weights as users get them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxrpg
from bench import networks
from bench.authors import index_weights
from bench.cases import ModelCase
from bench.contest import Contest, Contestant, in_mode
from bench.measure import Call
from fxrpg.assemble import plan_of
from fxrpg.device import runs_kernels
from fxrpg.weights import accumulate_gradient, decode_scales

CHECKED_BATCH = 32
"""A training step is compared on so many samples at most: the truth is computed in float32."""
SLACK = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""By type: an error may be twice the dense model's own in that type, and so much more."""

Results = dict[str, Tensor]


def contest(case: ModelCase, device: torch.device, dtype: torch.dtype) -> Contest:
    """Forward in `dtype`, in evaluation; a training step of SGD on float32 parameters, under autocast to `dtype`."""
    torch.manual_seed(0)
    torch.compiler.reset()
    _, side = networks.NETWORKS[case.network]
    train = case.direction == "train"
    images = _channels_last(torch.randn(case.batch, 3, side, side, device=device))
    dense, small = _models(case.network, case.dof, device, torch.float32 if train else dtype)
    task = _Task(case, images, dense, small, dtype)
    found = [task.contestant("dense", dense, opponent=True)]
    if case.compiled and device.type == "cuda":
        found.append(task.contestant("dense compiled", dense, compiled=True, opponent=True))
    authors, stored = _authors(dense, small)
    found.append(task.contestant("authors", authors, stored=stored, opponent=True))
    modes = ("auto", "fused", "staged") if runs_kernels(device) else ("staged",)
    found += [task.contestant(f"ring {mode}", small, mode=mode) for mode in modes]
    if case.compiled and device.type == "cuda":
        found.append(task.contestant("ring compiled", small, mode="auto", compiled=True))
    if case.regions:
        found.append(task.contestant("ring regions", _with_regions(case, task.images, small), mode="auto"))
    return Contest(contestants=found, flops=task.flops(dense), dtype=dtype, graph=case.graph)


@functools.lru_cache(maxsize=1)
def _models(network: str, dof: int | float, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A dense model and the transformed one that computes the same."""
    small = fxrpg.transform(_built(network, device), dof=dof).to(dtype)
    return fxrpg.materialize(small), small


def _built(network: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = networks.NETWORKS[network][0]()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _with_regions(case: ModelCase, images: Tensor, small: nn.Module) -> nn.Module:
    """The model transformed with example inputs."""
    model = _built(case.network, images.device).to(images.dtype).eval()
    found = fxrpg.transform(model, dof=case.dof, example_inputs=(images,))
    found.load_state_dict(small.state_dict())
    return found


def _authors(dense: nn.Module, small: nn.Module) -> tuple[nn.Module, int]:
    """The dense model with its weights gathered from a ring, and the bytes of its indices and signs."""
    plan, model = plan_of(small), copy.deepcopy(dense)
    table = decode_scales(small.get_buffer("fxrpg_scale"))
    scales = {name: float(table[view.tensor]) for name, view in plan.views.items()}
    indexed = index_weights(model, small.get_parameter("fxrpg_ring"), plan.views, scales)
    return model, sum(one.nbytes for one in indexed)


class _Task:
    """What a case asks of every model, and what the dense one answers: in float32, and in the case's type."""

    def __init__(self, case: ModelCase, images: Tensor, dense: nn.Module, small: nn.Module, dtype: torch.dtype) -> None:
        self.case, self.small, self.dtype = case, small, dtype
        self.train = case.direction == "train"
        self.images = images if self.train else images.to(dtype)
        self.labels = torch.randint(10, (case.batch,), device=images.device)
        with _exact():
            self.truth = self._results(self._ready(dense).float(), exact=True)
        own = self._results(self._ready(dense))
        self.allowed = {key: 2 * _error(own[key], self.truth[key]) + SLACK[dtype] for key in self.truth}

    def contestant(
        self, name: str, model: nn.Module, *, mode: str = "", compiled: bool = False, stored: int = 0, opponent: bool = False
    ) -> Contestant:  # fmt: skip
        """`model` as a contestant; under `lowering_mode(mode)` if one is given."""
        ready = self._ready(model)
        run: Any = torch.compile(ready, dynamic=False) if compiled else ready
        call: Call = self._call(ready, run)
        check: Callable[[], Any] = functools.partial(self._results, ready, run)
        if mode:
            call, check = in_mode(mode, call), in_mode(mode, check)
        size = sum(tensor.nbytes for tensor in (*ready.parameters(), *ready.buffers())) + stored
        return Contestant(
            name=name,
            call=call,
            problem=lambda _: self._problem(check()),
            stored=size,
            bytes_moved=size * (2 if self.train else 1) + self.images.nbytes,  # parameters are read, and stepped
            wants="fused" if mode == "fused" else "",
            explained=functools.partial(_explained, ready) if mode else None,
            opponent=opponent,
        )

    def _ready(self, model: nn.Module) -> nn.Module:
        """A copy in the case's mode."""
        return copy.deepcopy(model).train(self.train)

    def _call(self, model: nn.Module, run: Any) -> Call:
        if not self.train:
            return torch.no_grad()(lambda: run(self.images))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

        def step() -> None:
            optimizer.zero_grad()
            _backward(self._loss(run, self.images, self.labels))
            optimizer.step()

        return step

    def _loss(self, run: Any, images: Tensor, labels: Tensor, exact: bool = False) -> Tensor:
        enabled = not exact and self.dtype != torch.float32
        with torch.autocast(images.device.type, dtype=self.dtype if enabled else None, enabled=enabled):
            return F.cross_entropy(run(images), labels)

    def _results(self, model: nn.Module, run: Any = None, exact: bool = False) -> Results:
        """What is compared: logits; in training the loss, and gradients by what they belong to."""
        if not self.train:
            with torch.no_grad():
                return {"output": (run or model)(self.images.float() if exact else self.images).float()}
        model.zero_grad()
        loss = self._loss(run or model, self.images[:CHECKED_BATCH], self.labels[:CHECKED_BATCH], exact)
        _backward(loss)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"loss": loss.detach().view(1), **self._gradients(grads)}

    def _gradients(self, grads: Results) -> Results:
        """Of the ring (of a dense model, by the adjoint from its weights' gradients), and of all other parameters."""
        plan, scales = plan_of(self.small), self.small.get_buffer("fxrpg_scale")
        ring = grads.pop("fxrpg_ring", grads.pop("ring", None))
        if ring is None:
            state = self.small.get_parameter("fxrpg_ring").detach()
            with fxrpg.lowering_mode("materialized"):
                parts = [
                    accumulate_gradient(grads.pop(name), state, scales, view.text) for name, view in plan.views.items()
                ]
            ring = torch.stack(parts).sum(0)
        others = torch.cat([grads[name].flatten().float() for name in sorted(grads)])
        return {"gradient of the ring": ring.float(), "other gradients": others}

    def _problem(self, found: Results) -> str:
        for key, truth in self.truth.items():
            error = _error(found[key], truth)
            if not error <= self.allowed[key]:  # NaN too
                return f"{key}: relative error {error:.1e} is over {self.allowed[key]:.1e}"
        return ""

    def flops(self, dense: nn.Module) -> int:
        """Of one call, as torch counts them on one sample."""
        model = copy.deepcopy(dense).eval()
        with FlopCounterMode(display=False) as counter:
            loss = model(self.images[:1]).sum()
            if self.train:
                loss.backward()
        return counter.get_total_flops() * self.case.batch


def _backward(loss: Tensor) -> None:
    """Backward in the calling thread: `lowering_mode` holds for the thread that sets it."""
    with torch.autograd.set_multithreading_enabled(False):
        loss.backward()


def _explained(model: nn.Module) -> tuple[str, str]:
    """How the model's weights were last generated in forward, by share, and why those that were not fused."""
    found = fxrpg.explain(model)
    shares = {path: found.fraction(path) for path in ("fused", "staged", "materialized", "unknown")}
    reasons = dict.fromkeys(row.reason for row in found.rows if row.status == "generated" and row.path != "fused")
    text = ", ".join(path if share == 1 else f"{100 * share:.0f}% {path}" for path, share in shares.items() if share)
    region = any("region" in row.way for row in found.rows)
    return text + (" in a region" if region else ""), "; ".join(reason for reason in reasons if reason)


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300))


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """No TF32 in the block."""
    cudnn: Any = torch.backends.cudnn
    backends = (cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
