"""What the fused kernels are compiled to, without a GPU: `python bench/sass.py` writes bench/results/sass.csv.

Registers, spills, shared memory, instructions of the main loop, and how many of them a generated weight takes over a
stored one: of the shipped tiles on their cards, and of the methods side by side at one tile on Hopper (launches.py).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from launches import Case, cases, dense_of, launch_of  # noqa: E402
from machine_code import Code, code_of, compiled  # noqa: E402

CSV = ROOT / "bench" / "results" / "sass.csv"
FIGURES = ("registers", "spills", "shared", "instructions", "extra_per_weight", "wide_loads", "mma")
COLUMNS = ("case", "card", "target", "kernel", *FIGURES, "commit", "torch", "triton", "date")


@cache
def code(case: Case) -> Code:
    """The machine code of a case, compiled once."""
    return code_of(compiled(launch_of(case), case.target))


def extra_per_weight(case: Case) -> float | None:
    """Instructions of a thread for each weight of a tile over those of the same loop with a stored weight."""
    dense = dense_of(case)
    if dense is None or case.tile is None:
        return None
    weights = case.tile.n * case.tile.k / (32 * case.tile.warps)
    return (code(case).instructions - code(dense).instructions) / weights


def row_of(case: Case) -> dict[str, Any]:
    """One line of the file, without its stamp."""
    torch.set_num_threads(1)
    found, extra = code(case), extra_per_weight(case)
    return {
        "case": case.name,
        "card": case.card,
        "target": case.target,
        "kernel": launch_of(case).kernel.__name__,
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "instructions": found.instructions,
        "extra_per_weight": "" if extra is None else f"{extra:.2f}",
        "wide_loads": found.wide_loads,
        "mma": " ".join(found.mma),
    }


def stamp() -> dict[str, str]:
    """Where and when: the same for all lines."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
    return {"commit": commit, **versions, "date": datetime.date.today().isoformat()}


def rows(jobs: int, verbose: bool) -> Iterator[dict[str, Any]]:
    """All lines, in the order of `launches.cases`, compiled in so many processes."""
    at, found = stamp(), cases()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, row in enumerate(pool.map(row_of, found, chunksize=2)):
            if verbose:
                figures = ", ".join(f"{name} {row[name]}" for name in FIGURES if row[name] != "")
                print(f"{i + 1}/{len(found)}: {row['card']}, {row['case']}: {figures}", file=sys.stderr, flush=True)
            yield row | at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python bench/sass.py")
    parser.add_argument("--jobs", type=int, default=2, help="kernels compiled at a time (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="print the lines and leave the file as it is")
    parser.add_argument("--quiet", action="store_true", help="do not tell how far it is")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("nothing is compiled in Triton's interpreter: unset TRITON_INTERPRET")
    found = list(rows(arguments.jobs, not arguments.quiet))
    CSV.parent.mkdir(exist_ok=True)
    with sys.stdout if arguments.print else CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
