"""How the bench measures: calls in turn under one time budget, on a GPU by events; what the machine itself can do."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

MOST_ROUNDS = 200
"""After so many repetitions a median stands still."""


@dataclass(frozen=True)
class Timing:
    """Of one call: median and spread (half the distance between the quartiles, over the median)."""

    milliseconds: float
    spread: float


def timing_of(samples: Sequence[float]) -> Timing:
    """The median of samples in milliseconds."""
    median = statistics.median(samples)
    if len(samples) < 4 or not median:
        return Timing(median, 0.0)
    low, _, high = statistics.quantiles(samples, n=4)
    return Timing(median, (high - low) / 2 / median)


class Clock:
    """Takes the time of single calls on a device, each after its caches have been filled with something else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache = torch.empty(0)
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.cache = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)

    def round(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call, made one after the other."""
        if self.device.type != "cuda":
            return [_host_milliseconds(call) for call in calls]
        events = []
        for call in calls:
            self.cache.zero_()  # while the device writes it, the host gets ahead with what is timed
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in events]


def _host_milliseconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def in_turn(
    calls: Sequence[Call], seconds: float, round_of: Callable[[Sequence[Call]], list[float]], warm: int = 2
) -> list[Timing]:
    """Timings of calls made in turn, in a new order each round, so that whatever disturbs the machine meets all alike.

    Args:
        seconds: after which no new round begins; one is always made.
        round_of: makes each call once and returns their milliseconds, such as `Clock.round`.
        warm: rounds before those that count.
    """
    end = time.perf_counter() + seconds
    for _ in range(warm):
        if time.perf_counter() < end:
            round_of(calls)
    samples: list[list[float]] = [[] for _ in calls]
    order, shuffle = list(range(len(calls))), random.Random(0)
    while calls and len(samples[0]) < MOST_ROUNDS and (not samples[0] or time.perf_counter() < end):
        shuffle.shuffle(order)
        for place, milliseconds in zip(order, round_of([calls[i] for i in order]), strict=True):
            samples[place].append(milliseconds)
    return [timing_of(some) for some in samples]


def captured(call: Call) -> Call | None:
    """The replay of a CUDA graph of `call`, which has run before; None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception:  # some errors of a capture come back when the device is next waited for
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()
        return None
    return graph.replay


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that a call takes at most beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine does at most, measured now.

    Args:
        bandwidth: bytes a second of a large copy, read and written.
        rate: floating-point operations a second of a large matrix product, by type.
    """

    bandwidth: float
    rate: dict[torch.dtype, float]

    def fraction(self, milliseconds: float, flops: float, bytes_moved: float, dtype: torch.dtype) -> float:
        """The least time that the machine could take, over the time taken."""
        least = max(bytes_moved / self.bandwidth, flops / self.rate[dtype] if dtype in self.rate else 0.0)
        return 1e3 * least / milliseconds if milliseconds else 0.0


@dataclass(frozen=True)
class Ceiling:
    """One ceiling as it is timed: a call, and what it does."""

    name: str
    call: Call
    flops: int
    bytes_moved: int
    dtype: torch.dtype


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], *, small: bool = False) -> Iterator[Ceiling]:
    """A large copy, and large matrix products of random numbers.

    Args:
        small: sizes for a test.
    """
    cuda = device.type == "cuda"
    yield _copy(1 << (28 if cuda else 20 if small else 24), device)
    for dtype in dtypes:
        yield _product(8192 if cuda else 128 if small else 1024, device, dtype)


def _copy(numbers: int, device: torch.device) -> Ceiling:
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return Ceiling("copy", lambda: target.copy_(source), 0, 8 * numbers, torch.float32)


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Ceiling:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Ceiling(f"matmul {dtype_name(dtype)}", lambda: left @ right, 2 * side**3, 3 * left.nbytes, dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Budget:
    """The seconds of a run, shared out among what is still to do."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun = clock()
        self.seconds = seconds
        self.guess = seconds / 20
        self.longest: dict[str, float] = {}

    def spent(self) -> float:
        return self.clock() - self.begun

    def left(self) -> float:
        return self.seconds - self.spent()

    def share(self, kind: str, remaining: int) -> float:
        """Seconds for the next of `remaining` cases, which is of `kind`; 0 if one may not even be set up in time."""
        left = self.left()
        return left / max(1, remaining) if left > self.longest.get(kind, self.guess) else 0.0

    @contextlib.contextmanager
    def spending(self, kind: str, timing: float) -> Iterator[None]:
        """Around a case of `kind`: remembers the longest time that one has taken beside the seconds meant for `timing`."""
        begin = self.clock()
        try:
            yield
        finally:
            self.longest[kind] = max(self.longest.get(kind, 0.0), self.clock() - begin - timing)
