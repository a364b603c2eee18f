"""Compile ahead: worker processes run every contestant once, so that kernels lie in the compilers' caches on disk."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence

import torch

from bench.cases import BasisCase, Case, LayerCase, ModelCase
from bench.contest import Contest

MOST_WORKERS = 12


def contest_of(case: Case, device: torch.device, dtype: torch.dtype) -> Contest:
    """The case made real."""
    from bench import basis_contest, layer_contest, model_contest

    if isinstance(case, LayerCase):
        return layer_contest.contest(case, device, dtype)
    if isinstance(case, BasisCase):
        return basis_contest.contest(case, device, dtype)
    assert isinstance(case, ModelCase)
    return model_contest.contest(case, device, dtype)


def warm(
    cases: Sequence[Case], device: torch.device, dtype: torch.dtype, seconds: float, say: Callable[[str], None]
) -> None:
    """Run the cases' contestants in several processes until all are done, or the seconds are over."""
    workers = min(MOST_WORKERS, (os.cpu_count() or 2) - 1, len(cases))
    if workers < 2:
        return
    end, done = time.monotonic() + seconds, 0
    with multiprocessing.get_context("spawn").Pool(workers, _quiet) as pool:  # leaving it ends the workers
        found = pool.imap_unordered(_run, [(case, device, dtype) for case in cases])
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in cases:
                found.next(timeout=max(0.1, end - time.monotonic()))
                done += 1
    say(f"compiled ahead: {done} of {len(cases)} cases, by {workers} processes")


def _quiet() -> None:
    """A worker's settings: one thread, and no compile workers of its own."""
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def _run(job: tuple[Case, torch.device, torch.dtype]) -> None:
    with contextlib.suppress(Exception):  # the run itself will say what is wrong
        for contestant in contest_of(*job).contestants:
            with contextlib.suppress(Exception):
                contestant.call()
        torch.cuda.synchronize()
    torch.cuda.empty_cache()
