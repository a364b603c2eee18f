"""The processes that train together, as torchrun starts them: who writes, which device each has, what they agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxrpg.errors import FxrpgError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `world` of them. Only the one of rank 0 writes files and logs.

    Args:
        group: for what the processes tell one another on the CPU; None where there is one process.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the processes; parameters and buffers become those of rank 0."""
        if self.world == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of rank 0, which are those in its files."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, float64 on the CPU."""
        result = values.detach().to("cpu", torch.float64, copy=True)
        if self.world > 1:
            dist.all_reduce(result, group=self.group)
        return result

    def each(self, value: float) -> list[float]:
        """The value of every process, in the order of their ranks."""
        mine = torch.zeros(self.world, dtype=torch.float64)
        mine[self.rank] = value
        return self.total(mine).tolist()


def started_together() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextlib.contextmanager
def joined(device: str = "") -> Iterator[Ranks]:
    """Meet the other processes, over nccl on GPUs and gloo on CPUs, and part from them at the end.

    Args:
        device: "cpu", "cuda" or "cuda:1"; "" is a GPU if there is one. Of several processes each takes the GPU of its
            LOCAL_RANK.

    Raises:
        FxrpgError: no such device; the variables that torchrun sets are incomplete.
    """
    if not started_together():
        yield Ranks(device=_device(device))
        return
    try:
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        chosen = _device(device, local)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    except (KeyError, ValueError) as e:
        must, fix = "must come with RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT", "Start the processes with torchrun."
        raise FxrpgError("WORLD_SIZE", must, " ".join(str(e).split()), fix) from None
    try:
        group = dist.new_group(backend="gloo")  # a word on the CPU need not wait for a GPU
        yield Ranks(rank=rank, world=dist.get_world_size(), device=chosen, group=group)
    finally:
        dist.destroy_process_group()


def _device(name: str, local: int | None = None) -> torch.device:
    """The device of that name, of several processes on one machine the GPU number `local`."""
    found = repr(name) if local is None else f"{name!r} for local rank {local}"
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        if device.type == "cuda" and local is not None:
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
        fix = "Pass cpu, or nothing; start no more processes than there are GPUs."
        raise FxrpgError("--device", "must be cpu or cuda, and there", found, fix) from None
    return device
