"""The main job of `fxrpg sweep`: run what is missing of a grid of sizes and seeds, then judge, draw and report all of it."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from fxrpg.errors import FxrpgError
from fxrpg.sweep import picture, report, results
from fxrpg.sweep.outcome import Outcome, law_text, outcome
from fxrpg.sweep.processes import Done, Failure, run_all
from fxrpg.sweep.results import Row
from fxrpg.sweep.task import Job, Task
from fxrpg.version import __version__


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which runs, where to, and how many at a time.

    Args:
        out: folder for `results.csv`, `accuracy.png` and `report.html`; made if there is none.
        dofs: sizes, all ints or all fractions.
        seeds: each size is trained with the seeds 0 .. seeds - 1.
        dense: whether the dense model is trained too.
        within: the gap to dense that is accepted, in percentage points.
        jobs: processes at a time; None: one for each `threads` cores.
        threads: CPU threads of each process. The last bits of a sum depend on it, and so can an accuracy.
    """

    out: Path
    dofs: tuple[int | float, ...]
    seeds: int = 3
    dense: bool = True
    within: float = 1.0
    jobs: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FxrpgError(f"--{name}", "must be 1 or more", repr(value), f"Pass such as --{name} 2.")
        if not 0 <= self.within < math.inf:
            raise FxrpgError("--within", "must be 0 points or more", repr(self.within), "Pass such as --within 1.0.")
        kinds = {type(dof) for dof in self.dofs}
        good = all(dof >= 1 if isinstance(dof, int) else 0 < dof <= 1 for dof in self.dofs)
        if not self.dofs or len(kinds) > 1 or not good or len(set(self.dofs)) < len(self.dofs):
            must = "must be different whole numbers of 1 or more, or different fractions in (0, 1]"
            fix = "Pass such as --dof 256,1024,4096 or --dof 0.001,0.01,0.1."
            raise FxrpgError("--dof", must, ",".join(map(repr, self.dofs)) or "none", fix)

    @property
    def runs(self) -> list[Job]:
        """All runs, each seed's in turn: what is there early says something of every size."""
        sizes = [*([None] if self.dense else []), *sorted(self.dofs)]
        return [Job(dof, seed) for seed in range(self.seeds) for dof in sizes]

    @property
    def parallel(self) -> int:
        """Processes at a time."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.jobs or max(1, cores // self.threads)


def sweep(task: Task, grid: Grid) -> int:
    """Run what `results.csv` does not hold yet, then write picture and report of all that it holds. Returns the exit code.

    Returns:
        0, or 1 if a run failed.

    Raises:
        FxrpgError: a package is missing, the folder holds runs of other settings or is in use, or a program does not follow
            the protocol.
        OSError: a file cannot be written.
    """
    _check_packages()
    from filelock import FileLock, Timeout

    common, kind = _common(task, grid), type(grid.dofs[0])
    path = grid.out / "results.csv"
    results.check_same(results.read(path), common, kind, path)
    grid.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(grid.out / ".lock", timeout=0):
            rows = results.read(path)
            results.check_same(rows, common, kind, path)
            failures = _run_missing(task, grid, common, rows, path)
            return _conclude(task, grid, rows, failures)
    except Timeout:
        fix = "Wait for it, or choose another --out."
        raise FxrpgError(str(grid.out), "must be used by one sweep at a time", "another one at work", fix) from None


def _common(task: Task, grid: Grid) -> dict[str, Any]:
    """What the rows of all runs share that are made now."""
    return {
        "task": task.name,
        "method": task.method,
        "arguments": json.dumps(task.arguments),
        "code": task.code,
        "threads": grid.threads,
        "fxrpg": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _check_packages() -> None:
    for name in ("matplotlib.figure", "scipy.special", "jinja2", "filelock"):
        try:
            import_module(name)
        except ImportError as e:
            fix = "Install what a sweep needs: pip install 'fxrpg[sweep]'."
            raise FxrpgError("sweep", f"the module {name!r} must be importable", str(e), fix) from None


def _run_missing(task: Task, grid: Grid, common: dict[str, Any], rows: list[Row], path: Path) -> list[Failure]:
    """Run what is not in `rows`, adding each finished run to them and to the file."""
    there = {row.job for row in rows}
    missing = [job for job in grid.runs if job not in there]
    print(f"{report.visible(task.name)}: {len(missing)} of {len(grid.runs)} runs to do", flush=True)
    failures = []
    runs = run_all(task, missing, parallel=grid.parallel, threads=grid.threads)
    try:
        with contextlib.closing(runs), tqdm(total=len(missing), unit="run", disable=None if missing else True) as bar:
            for done in runs:
                if isinstance(done, Failure):
                    failures.append(done)
                else:
                    rows.append(_row(common, done))
                    results.write(path, rows)
                bar.set_postfix_str(f"{done.job}" + (f"; {len(failures)} failed" if failures else ""), refresh=False)
                bar.update()
    except KeyboardInterrupt:
        print(f"{len(rows)} runs are in {path}; the same command goes on from there", file=sys.stderr)
        raise
    return failures


def _row(common: dict[str, Any], done: Done) -> Row:
    return Row(
        **common,
        dof=done.job.dof,
        seed=done.job.seed,
        accuracy=done.accuracy,
        seconds=round(done.seconds, 2),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _conclude(task: Task, grid: Grid, rows: Sequence[Row], failures: Sequence[Failure]) -> int:
    """Print and write what came out."""
    if rows:
        found = outcome(rows, grid.within)
        title = f"{task.name}: test error against degrees of freedom"
        picture.write_png(found, report.visible(title), grid.out / "accuracy.png")
        report.write(task, rows, found, failures, grid.out / "report.html")
        print(f"\n{_table(found)}\n")
        if found.law:
            print(law_text(found.law))
        print(found.advice.text)
        print(f"written to {grid.out}: results.csv, accuracy.png, report.html")
    for failure in failures:
        print(f"failed: {failure.job}: {report.visible(failure.reason)}", file=sys.stderr)
    if failures:
        again = report.visible(task.shown(failures[0].job))
        print(f"{len(failures)} runs failed; the same command tries them again. By hand: {again}", file=sys.stderr)
    return 1 if failures else 0


def _table(found: Outcome) -> str:
    rows = []
    for size in found.all:
        std = "" if size.std is None else f" +- {size.std:.2f}"
        gap = "-" if size.gap is None or size.dof is None else f"{size.gap.points:.2f}"
        runs = str(len(size.accuracies))
        rows.append([size.name, runs, f"{size.mean:.2f}{std}", gap, size.within or "-", f"{size.seconds:.1f}"])
    headers = ["DoF", "runs", "accuracy, %", "gap to dense", f"within {found.within:g}", "seconds a run"]
    return tabulate(rows, headers, disable_numparse=True, colalign=["right"] * 6)
