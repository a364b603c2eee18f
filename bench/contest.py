"""What a case is made into: contestants that do the same work, each with a test that it must pass before it is timed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fxrpg
from bench.measure import Call, Ceilings, Clock, captured, in_turn, peak_bytes
from fxrpg import dispatch
from fxrpg.device import runs_kernels

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
"""By type: of the norm of a result's error over the result's norm. TF32 products count as TOLERANCE_TF32."""
TOLERANCE_TF32 = 4e-3

STAGING = ("generate_kernel", "accumulate_kernel")
"""Kernels that write whole weights, or read whole gradients: they prove no fused path."""


@dataclass(kw_only=True)
class Contestant:
    """One way of doing a case's work.

    Args:
        name: "dense", or a method and a mode.
        call: does the work once.
        problem: (what `call` returned) -> what is wrong with it, "" if nothing.
        stored: bytes that the weight takes at rest: the dense one, or a state, or a state with its indices.
        bytes_moved: bytes that must move at least.
        goal: a ratio to reach, if one was set.
        wants: the path that must have run: "fused", "staged"; "" for any.
        explained: the path of a whole model and the reasons, after a call; None if an op's own choice tells it.
        opponent: whether it is no part of the project, so that an error in it is a reason to leave it out.
    """

    name: str
    call: Call
    problem: Callable[[Any], str]
    stored: int = 0
    bytes_moved: int = 0
    goal: float | None = None
    wants: str = ""
    explained: Callable[[], tuple[str, str]] | None = None
    opponent: bool = False


@dataclass(kw_only=True)
class Contest:
    """A case made real: `contestants`, of which the first is what the others are compared with.

    Args:
        flops: operations of one call.
        dtype: that the operations are made in.
        graph: whether to time replays of CUDA graphs where calls can be captured.
    """

    contestants: list[Contestant]
    flops: int
    dtype: torch.dtype
    graph: bool = True


@dataclass(kw_only=True)
class Result:
    """What became of a contestant; `milliseconds` is None unless it passed its test."""

    contestant: str
    status: str = "ok"
    milliseconds: float | None = None
    spread: float | None = None
    ratio: float | None = None
    goal: float | None = None
    peak: int | None = None
    bytes_moved: int = 0
    flops: int = 0
    roofline: float | None = None
    path: str = ""
    timing: str = ""
    dtype: torch.dtype = field(default=torch.float32)


def in_mode(mode: str, call: Call) -> Call:
    """`call` under `fxrpg.lowering_mode(mode)`."""

    def moded() -> object:
        with fxrpg.lowering_mode(mode):
            return call()

    return moded


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """How far a result may be from the dense op's: TF32 may make float32 products on a GPU."""
    return TOLERANCE_TF32 if (dtype, device.type) == (torch.float32, "cuda") else TOLERANCES[dtype]


def disagreement(found: Tensor, expected: Tensor, limit: float) -> str:
    """What is wrong with a result: its error as a whole, or that of one element; "" if nothing."""
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    wide, truth = found.double(), expected.double()
    error = (wide - truth).abs()
    if not bool(error.isfinite().all()):
        return "not finite"
    size = truth.square().mean().sqrt()
    relative = float(error.square().mean().sqrt() / size.clamp(min=1e-300))
    if relative > limit:
        return f"relative error {relative:.1e} is over {limit:.0e}"
    worst = float((error / (size + truth.abs()).clamp(min=1e-300)).max())
    return f"an element is wrong by {worst:.1e} of its size" if worst > 10 * limit else ""


def held(contest: Contest, ceilings: Ceilings, clock: Clock, seconds: float) -> list[Result]:
    """Test every contestant, then time those that passed, and only those."""
    results = [Result(contestant=c.name, goal=c.goal, bytes_moved=c.bytes_moved) for c in contest.contestants]
    ready = []
    for contestant, result in zip(contest.contestants, results, strict=True):
        result.flops, result.dtype = contest.flops, contest.dtype
        if _passes(contestant, result, clock.device):
            ready.append((contestant, result))
    _time(ready, contest, clock, seconds)
    base = results[0]
    for result in results:
        if result.milliseconds is None:
            continue
        if result.ratio is None and base.milliseconds:
            result.ratio = result.milliseconds / base.milliseconds
        result.roofline = ceilings.fraction(result.milliseconds, result.flops, result.bytes_moved, result.dtype)
    return results


def _passes(contestant: Contestant, result: Result, device: torch.device) -> bool:
    """Run a contestant once, see which path it took, and compare what it returned."""
    try:
        problem, result.path, reason = _tried(contestant, device)
        if problem:
            result.status = f"failed: {problem}"
            return False
        if contestant.wants and result.path != contestant.wants:
            result.status = f"ran {result.path}" + (f": {reason}" if reason else "")
        peak = peak_bytes(contestant.call, device)
        result.peak = None if peak is None else peak + contestant.stored
    except torch.OutOfMemoryError:
        result.status = "skipped: out of memory"
        release(device)
        return False
    except Exception as e:  # whatever a compiler or a kernel throws is this row's result
        word = "skipped" if contestant.opponent else "failed"
        result.status = f"{word}: {type(e).__name__}: {' '.join(str(e).split())[:160]}"
        release(device)
        return False
    return True


def _tried(contestant: Contestant, device: torch.device) -> tuple[str, str, str]:
    """(what is wrong, the path that ran, why) of one call."""
    before = launches(device)
    with dispatch.choices() as made:
        found = contestant.call()
    launched = launches(device) - before
    path = " and ".join(sorted({choice.path for choice in made}))
    reason = "; ".join(dict.fromkeys(c.reason for c in made if c.path != "fused" and c.reason))
    if contestant.explained:
        path, reason = contestant.explained()
    if "fused" in path and not launched:
        path = f"unproved ({path}, but no kernel was launched)"
    return contestant.problem(found), path, reason


def launches(device: torch.device) -> int:
    """How many fused kernels this process has launched, those that write whole weights not counted."""
    if not runs_kernels(device):
        return 0
    from fxrpg.kernels.fused.launch import LAUNCHES  # imports Triton

    return sum(count for name, count in LAUNCHES.items() if name not in STAGING)


def _time(ready: list[tuple[Contestant, Result]], contest: Contest, clock: Clock, seconds: float) -> None:
    """Fill in the times: of graph replays together, of what cannot be captured together with the first once more."""
    plain, replayed = list(ready), []
    if contest.graph and clock.device.type == "cuda":
        graphs = [captured(contestant.call) for contestant, _ in ready]
        if graphs and ready[0][0] is contest.contestants[0] and not graphs[0]:
            graphs = [None] * len(ready)  # like is compared with like
        replayed = [(graph, result) for graph, (_, result) in zip(graphs, ready, strict=True) if graph]
        plain = [pair for graph, pair in zip(graphs, ready, strict=True) if not graph]
    parts = bool(replayed) + bool(plain)
    if replayed:
        timings = in_turn([graph for graph, _ in replayed], seconds / parts, clock.round)
        for (_, result), timing in zip(replayed, timings, strict=True):
            result.milliseconds, result.spread, result.timing = timing.milliseconds, timing.spread, "graph"
    if plain:
        first = contest.contestants[0]
        again = bool(replayed) and bool(ready) and ready[0][0] is first and plain[0][0] is not first
        calls = [contestant.call for contestant, _ in plain] + ([first.call] if again else [])
        timings = in_turn(calls, seconds / parts, clock.round)
        word = "calls" if clock.device.type == "cuda" else "host"
        for (_, result), timing in zip(plain, timings, strict=False):
            result.milliseconds, result.spread, result.timing = timing.milliseconds, timing.spread, word
            result.ratio = timing.milliseconds / timings[-1].milliseconds if again else None


def release(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a kernel's error every call raises
            torch.cuda.empty_cache()
