"""What one training step of ResNet-18 exchanges between ranks: dense, ring, PRANC and PEMN. `python bench/traffic.py`.

Bytes are those of the collectives as torch's profiler saw them: what one rank hands to gloo, buffers included, on two CPU
processes.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import fxrpg  # noqa: E402
from fxrpg.networks import resnet18  # noqa: E402

BYTES = {"float": 4, "double": 8, "int": 4, "long int": 8, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}
CASES: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "dense": ("DDP", lambda model: DistributedDataParallel(model)),
    "ring, 2,359,296 numbers": ("DDP", lambda model: _ddp(model, dof=2_359_296)),
    "ring, 36,864 numbers": ("DDP", lambda model: _ddp(model, dof=36_864)),
    "PRANC, 64 coefficients": ("DDP", lambda model: _ddp(model, dof=64, method=fxrpg.Pranc(law="khatri_rao"))),
    "PRANC, 64, basis split": (
        "distribute",
        lambda model: fxrpg.distribute(fxrpg.transform(model, dof=64, method=fxrpg.Pranc(law="khatri_rao"))),
    ),
    "PEMN, one score a weight": ("DDP", lambda model: _ddp(model, dof=1e-3, method="pemn")),
}


def _ddp(model: nn.Module, **settings: object) -> nn.Module:
    return DistributedDataParallel(fxrpg.transform(model, **settings))  # type: ignore[arg-type]


def exchanged(step: Callable[[], object]) -> int:
    """Bytes of the tensors that this rank hands to collectives while `step` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
    seen = [event for event in profile.events() or () if event.name.startswith("gloo:")]
    return sum(math.prod(event.input_shapes[0]) * BYTES[event.input_dtypes[0]] for event in seen)


def traffic(case: str) -> int:
    """Bytes that this rank exchanges in forward and backward of a ResNet-18 of 1,000 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CASES[case][1](resnet18())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
    return exchanged(lambda: model(x).logsumexp(1).sum().backward())


def table(found: dict[str, int]) -> str:
    """The bytes by case, and their ratio to dense training's."""
    rows = [(case, CASES[case][0], n, n / found["dense"]) for case, n in found.items()]
    headers = ("ResNet-18", "ranks joined by", "bytes a step", "of dense")
    return tabulate(rows, headers, intfmt=",", floatfmt=".4f")


def _work(rank: int, world: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {case: traffic(case) for case in CASES}
    if rank == 0:
        print(table(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (2, f"{folder}/store"), nprocs=2)
