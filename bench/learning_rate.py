"""How a ring's best learning rate depends on how often its numbers are used: `python bench/learning_rate.py run`.

Small models learn digits with the ring's rate multiplied by powers of 4, everything else at one rate. Each run is a line of
bench/results/learning_rate.csv; what is there already is not run again. `python bench/learning_rate.py report` fits the
power p of the rule multiplier = c * (N / M)^p, and says what accuracy the rule gives for other powers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import tasks  # noqa: E402

import fxrpg  # noqa: E402

CSV = ROOT / "bench" / "results" / "learning_rate.csv"
KEY = ("model", "optimizer", "dof", "multiplier", "seed")
COLUMNS = (*KEY, "lr", "uses", "accuracy", "loss", "seconds", "commit", "torch", "date")
SIZES = (None, 65_536, 16_384, 4096, 1024, 256)
"""Of the ring; None is the dense model, whose weights are used once."""
SEEDS = 3
EPOCHS = 12
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
Row = dict[str, object]


def resnet(seed: int) -> nn.Module:
    """The ResNet of the other benches, with batch norms: scaling its weights changes nothing that it computes."""
    return tasks.resnet(channels_in=1, classes=10, seed=seed)


def perceptron(seed: int, width: int = 256) -> nn.Module:
    """Four linear layers without norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sides = itertools.pairwise((64, width, width, width, 10))
        layers = [layer for side in sides for layer in (nn.Linear(*side), nn.ReLU())][:-1]
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(nn.Flatten(), *layers)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and an optimizer, the rate `lr` of what is stored, and the multipliers of the ring's: 4^first ... 4^last."""

    model: str
    optimizer: Literal["sgd", "adam"]
    lr: float
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.optimizer}"

    @property
    def multipliers(self) -> list[float]:
        return [4.0**power for power in range(self.first, self.last + 1)]


MODELS: dict[str, Callable[[int], nn.Module]] = {"ResNet": resnet, "perceptron": perceptron}
CASES = (
    Case(model="ResNet", optimizer="sgd", lr=0.4, first=-4, last=2),
    Case(model="ResNet", optimizer="adam", lr=0.01, first=-2, last=3),
    Case(model="perceptron", optimizer="sgd", lr=0.05, first=-4, last=3),
    Case(model="perceptron", optimizer="adam", lr=0.003, first=-2, last=3),
)


@cache
def _digits() -> tasks.Task:
    return tasks.digits()


def groups_of(
    model: nn.Module, dof: int | None, lr: float, multiplier: float, seed: int
) -> tuple[nn.Module, list[dict], float]:
    """(the model to train, its groups, M / N): of a dense model, the weights that a ring would generate get their own rate."""
    small = fxrpg.transform(model, dof=256 if dof is None else dof, seed=seed)
    decay = 5e-4
    if dof is not None:
        ledger = fxrpg.ledger(small)
        groups = fxrpg.parameter_groups(small, lr=lr, weight_decay=decay, state_lr=lr * multiplier)
        return small, groups, ledger.ratio
    names = {row.name for row in fxrpg.explain(small).rows if row.status == "generated"}
    groups = fxrpg.parameter_groups(model, lr=lr, weight_decay=decay)
    weights = [p for name, p in model.named_parameters() if name in names]
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not weight for weight in weights)]
    return model, [*groups, {"name": "ring", "params": weights, "lr": lr * multiplier, "weight_decay": decay}], 1.0


def run(case: Case, dof: int | None, multiplier: float, seed: int) -> Row:
    """Train and test one model."""
    torch.set_num_threads(1)
    model, groups, uses = groups_of(MODELS[case.model](seed), dof, case.lr, multiplier, seed)
    task, begin = _digits(), time.process_time()
    tasks.train(model, task, epochs=EPOCHS, seed=seed, optimizer=case.optimizer, parameters=groups)
    seconds = round(time.process_time() - begin, 2)
    accuracy = tasks.accuracy(model, task)
    with torch.no_grad():
        loss = F.cross_entropy(model(task.test_images), task.test_labels).item()
    key = {"model": case.model, "optimizer": case.optimizer, "dof": dof or "", "multiplier": multiplier, "seed": seed}
    return key | {
        "lr": case.lr, "uses": round(uses, 2), "accuracy": round(accuracy, 3), "loss": round(loss, 4), "seconds": seconds
    }  # fmt: skip


def best(multipliers: Sequence[float], accuracies: Sequence[float]) -> float:
    """The logarithm (base 2) of the best multiplier: the top of the parabola through the best one tried and its neighbours."""
    x, y = np.log2(multipliers), np.asarray(accuracies)
    top = int(y.argmax())
    if top in (0, len(x) - 1):
        return float(x[top])
    a, b, _ = np.polyfit(x[top - 1 : top + 2], y[top - 1 : top + 2], 2)
    return float(-b / (2 * a)) if a < 0 else float(x[top])


def power(uses: Sequence[float], tops: Sequence[float]) -> float:
    """p of the rule multiplier = c * uses^-p that is nearest to the best multipliers (their logarithms to base 2)."""
    return -float(np.polyfit(np.log2(uses), tops, 1)[0])


def following(
    multipliers: Sequence[float],
    uses: Sequence[float],
    accuracies: Sequence[Sequence[float]],
    p: float,
    constant: float | None = None,
) -> float:
    """The mean accuracy over sizes under the rule of power `p`, with a constant c or, if None, the one that suits it best.

    Args:
        accuracies: for each size, of each multiplier; between those that were tried, interpolated over logarithms, and
            beyond them that of the last.
    """
    x, shifts = np.log2(multipliers), -p * np.log2(uses)
    # those that leave nothing outside the grid
    tried = np.linspace(x[0] - shifts.min(), x[-1] - shifts.max(), 61)
    constants = tried if constant is None else np.log2([constant])
    rows = [np.interp(constants + shift, x, row) for shift, row in zip(shifts, accuracies, strict=True)]
    return float(np.mean(rows, axis=0).max())


def report(rows: list[dict[str, str]]) -> str:
    """The tables: best multipliers and their power; accuracy under the rule of several powers, and without any.

    A case counts with the seeds for which all its runs are there; the error of a power is that of its mean over them.
    """
    tops, rules = [], []
    for case in CASES:
        uses, grid = _grid(case, rows)
        if not len(grid):
            continue
        mean = grid.mean(0)
        own = [power(uses, [best(case.multipliers, row) for row in seed]) for seed in grid]
        error = f" +- {statistics.stdev(own) / math.sqrt(len(own)):.2f}" if len(own) > 1 else ""
        top = [best(case.multipliers, row) for row in mean]
        tops.append([case.name, str(len(own)), *(f"{2**x:.2g}" for x in top), f"{power(uses, top):.2f}{error}"])
        for constant in (1.0, None):
            means = [following(case.multipliers, uses, mean, p, constant) for p in POWERS]
            rules.append([case.name, "best" if constant is None else constant, *means, mean.max(1).mean()])
    sizes = ["dense" if dof is None else f"{dof:,}" for dof in SIZES]
    first = tabulate(tops, ["best multiplier", "seeds", *sizes, "power p"], disable_numparse=True)
    headers = ["mean accuracy, %", "c", *(f"p = {p:g}" for p in POWERS), "best for each"]
    return f"{first}\n\n{tabulate(rules, headers, floatfmt='.1f')}"


def _grid(case: Case, rows: list[dict[str, str]]) -> tuple[list[float], np.ndarray]:
    """M / N of each size, and the accuracies [seeds, sizes, multipliers] of the seeds that are complete."""
    some = [row for row in rows if (row["model"], row["optimizer"]) == (case.model, case.optimizer)]
    found = {(row["dof"], float(row["multiplier"]), int(row["seed"])): float(row["accuracy"]) for row in some}
    uses = {row["dof"]: float(row["uses"]) for row in some}
    places = [[(_text(dof), multiplier) for multiplier in case.multipliers] for dof in SIZES]
    seeds = [s for s in range(SEEDS) if all((*place, s) in found for line in places for place in line)]
    grid = np.array([[[found[*place, seed] for place in line] for line in places] for seed in seeds])
    return [uses.get(_text(dof), math.nan) for dof in SIZES], grid


def _text(dof: int | None) -> str:
    return "" if dof is None else str(dof)


def read() -> list[dict[str, str]]:
    """All lines of the CSV file."""
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(jobs: int, only: str) -> None:
    """Run what is missing, `jobs` models at a time; only cases whose name holds the text `only`."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    stamp = {"commit": commit, "torch": torch.__version__.partition("+")[0], "date": datetime.date.today().isoformat()}
    done = {tuple(row[key] for key in KEY) for row in read()}
    wanted = [(c, d, m, s) for s in range(SEEDS) for c in CASES if only in c.name for d in SIZES for m in c.multipliers]
    missing = [(c, d, m, s) for c, d, m, s in wanted if (c.model, c.optimizer, _text(d), str(m), str(s)) not in done]
    new = not CSV.exists()
    with CSV.open("a", newline="") as file, ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for future in as_completed(pool.submit(run, *job) for job in missing):
            writer.writerow(future.result() | stamp)
            file.flush()


def main() -> None:
    epilog = "example: python bench/learning_rate.py run --jobs 2"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument("what", choices=["run", "report"])
    jobs = "models trained at a time, one thread each (default: %(default)s)"
    parser.add_argument("--jobs", type=int, default=2, help=jobs)
    parser.add_argument("--only", default="", help="only cases whose name, such as 'ResNet, sgd', holds this text")
    arguments = parser.parse_args()
    if arguments.what == "run":
        measure(arguments.jobs, arguments.only)
    print(report(read()))


if __name__ == "__main__":
    main()
