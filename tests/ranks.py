"""Processes for tests on several ranks: started once, each check runs in some of them, in a process group of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.profiler", "fxrpg"]


class Ranks:
    """`ranks(world, check, *args)` runs `check(*args)` in `world` processes and returns what each rank returns.

    A check is a function of a module that can be imported. One that fails, or is not done in time, on any rank fails the
    test; the processes, of which others may wait in a collective, are then ended, and new ones started when next needed.
    """

    def __init__(self) -> None:
        self.context = multiprocessing.get_context(
            "forkserver"
        )  # torch is imported once, and forked before it has threads
        self.context.set_forkserver_preload(PRELOADED)
        self.workers: list[tuple[Any, Any]] = []

    def __call__(self, world: int, check: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
        while len(self.workers) < world:
            self._start()
        found: dict[int, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_process, pipe) in enumerate(self.workers[:world]):
                pipe.send((check, args, rank, world, os.path.join(folder, "store")))
            deadline = time.monotonic() + seconds
            while len(found) < world:
                waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world]) if rank not in found}
                ready = multiprocessing.connection.wait(list(waiting), max(0, deadline - time.monotonic()))
                if not ready:
                    self.stop()
                    raise TimeoutError(f"{check.__name__}: ranks {sorted(waiting.values())} of {world} did not finish")
                for pipe in ready:
                    self._take(found, waiting[pipe], pipe)
        return [found[rank] for rank in range(world)]

    def _take(self, found: dict[int, Any], rank: int, pipe: Any) -> None:
        try:
            done, result = pipe.recv()
        except EOFError:
            done, result = False, "the process ended"
        if not done:
            self.stop()
            raise AssertionError(f"rank {rank}: {result}")
        found[rank] = result

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.workers.append((process, ours))

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers.clear()


def _work(pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its own process
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    while True:
        try:
            check, args, rank, world, store = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(check, args, rank, world, store))


def _outcome(check: Callable[..., Any], args: Any, rank: int, world: int, store: str) -> tuple[bool, Any]:
    limit = timedelta(seconds=240)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    try:
        result = check(*args)
    except BaseException:  # pytest's own are no Exceptions
        return False, traceback.format_exc()  # leaving the group could wait for the others
    dist.destroy_process_group()
    return True, result
