"""What transforming, packing and loading cost: `python bench/basics.py`. Medians of three, on this machine, now."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import fxrpg
from fxrpg.networks import resnet18


def median_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def billion_on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(2890, 2890, bias=False) for _ in range(122)))


def main() -> None:
    wide = billion_on_meta()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    meta_seconds = median_seconds(lambda: fxrpg.transform(wide, dof=0.05))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    model = resnet18()
    small = fxrpg.transform(model, dof=2_359_296)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.safetensors"
        fxrpg.save(small, path)
        rows = [
            [
                "transform a ResNet-18, ring 2,359,296",
                f"{median_seconds(lambda: fxrpg.transform(model, dof=2_359_296)):.2f} s",
            ],
            ["its packed file", f"{path.stat().st_size:,} bytes"],
            ["load and verify it", f"{median_seconds(lambda: fxrpg.load(model, path)):.2f} s"],
            ["materialize it", f"{median_seconds(lambda: fxrpg.materialize(small)):.2f} s"],
            [
                f"transform {fxrpg.ledger(fxrpg.transform(wide, dof=0.05)).generated:,} weights on meta",
                f"{meta_seconds:.2f} s",
            ],
            ["memory that this added at most", f"{grown:.0f} MiB"],
        ]
    print(tabulate(rows))


if __name__ == "__main__":
    main()
