"""Time layers, models and bases, each against a baseline: `python bench/run.py`, or `fxrpg bench`.

First what the machine can do, then each case, the most important first, until all are done or the time is over. What
fails its test is not timed, and makes the exit code 1. Rows go to bench/results/<machine>.csv.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench import cases, pictures, report  # noqa: E402
from bench.contest import Result, held, release  # noqa: E402
from bench.measure import Budget, Ceilings, Clock, ceilings, in_turn  # noqa: E402
from bench.warm import contest_of, warm  # noqa: E402
from fxrpg.errors import FxrpgError  # noqa: E402

SECONDS, QUICK_SECONDS = 440.0, 105.0
"""Of a run, its start and its pictures not counted: 8 and 2 minutes are the limits."""
WARM_SHARE = 0.35
MOST_SECONDS = 3.0
"""For timing one case."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(arguments: argparse.Namespace) -> int:
    """Run the bench with the options of `fxrpg bench`. Returns the exit code: 1 if a contestant failed its test."""
    device = _device(arguments.device)
    cpu = device.type == "cpu"
    dtype = DTYPES[arguments.dtype or ("float32" if cpu else "bfloat16")]
    seconds = arguments.seconds
    if seconds is None:
        seconds = QUICK_SECONDS if arguments.quick else SECONDS
    elif not seconds > 0:  # nor "nan"
        raise FxrpgError("--seconds", "must be over 0", f"{seconds:g}", "Pass such as 60, or leave it out.")
    chosen = _chosen(arguments, cpu)
    if not cpu:
        torch.backends.cudnn.benchmark = True  # the opponents at their best
    budget = Budget(seconds)
    session = _Session(arguments, device, dtype, budget)
    session.measure_ceilings()
    if not cpu:
        release(device)
        warm(chosen, device, dtype, WARM_SHARE * budget.left(), session.say)
    for place, case in enumerate(chosen):
        session.measure(case, place, len(chosen))
    return session.finish()


def _chosen(arguments: argparse.Namespace, cpu: bool) -> list[cases.Case]:
    """The cases that `--only` leaves of those that this device has."""
    every = cases.chosen(quick=arguments.quick, cpu=cpu)
    found = cases.chosen(quick=arguments.quick, cpu=cpu, only=arguments.only)
    if not found:
        groups = list(dict.fromkeys("/".join(case.title.split("/")[:2]) for case in every))
        which = ("a CPU" if cpu else "a GPU") + " with --quick" * arguments.quick
        fix = f"Pass a glob such as '{groups[0]}/*'; the groups on {which} are {', '.join(groups)}."
        raise FxrpgError("--only", "must match a case", repr(arguments.only), fix)
    return found


class _Session:
    """One run: what it measures, and the rows it has so far."""

    def __init__(self, arguments: Any, device: torch.device, dtype: torch.dtype, budget: Budget) -> None:
        self.device, self.dtype, self.budget = device, dtype, budget
        self.small = arguments.quick and device.type == "cpu"
        self.machine = machine_name(device)
        self.path = (arguments.out or ROOT / "bench" / "results") / f"{self.machine}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)  # before the minutes that lead to it
        self.before = report.read(self.path)
        self.rows: list[report.Row] = []
        self.clock = Clock(device)
        self.stamp = stamp(self.machine)

    def say(self, line: str) -> None:
        print(f"[{self.budget.spent():5.1f} s] {line}", flush=True)

    def measure_ceilings(self) -> None:
        """What later times are compared with."""
        bandwidth, rate = 0.0, {}
        for ceiling in ceilings(self.device, list(dict.fromkeys([self.dtype, torch.float32])), small=self.small):
            timing = in_turn([ceiling.call], 0.05 if self.small else 1.0, self.clock.round)[0]
            seconds = timing.milliseconds / 1e3
            if ceiling.flops:
                rate[ceiling.dtype] = ceiling.flops / seconds
            else:
                bandwidth = ceiling.bytes_moved / seconds
            result = Result(
                contestant="torch", milliseconds=timing.milliseconds, spread=timing.spread, dtype=ceiling.dtype
            )
            result.flops, result.bytes_moved = ceiling.flops, ceiling.bytes_moved
            self.rows.append(report.row_of(f"ceiling/{ceiling.name}", "", result, self.stamp))
        self.ceilings = Ceilings(bandwidth=bandwidth, rate=rate)

    def measure(self, case: cases.Case, place: int, count: int) -> None:
        """One case, or a row that says that there was no time for it."""
        share = self.budget.share(case.kind, count - place)
        if not share:
            skipped = Result(contestant="", status="skipped: no time left", dtype=self.dtype)
            self.rows.append(report.row_of(case.name, case.direction, skipped, self.stamp))
            self.say(f"{place + 1}/{count} {case.title}: skipped, no time left")
            return
        seconds = min(0.5 * share, MOST_SECONDS)
        with self.budget.spending(case.kind, seconds):
            results = self._results(case, seconds)
        rows = [report.row_of(case.name, case.direction, result, self.stamp) for result in results]
        self.rows += rows
        self.save()
        self.say(f"{place + 1}/{count} {case.title}: {_summary(rows)}")

    def _results(self, case: cases.Case, seconds: float) -> list[Result]:
        try:
            contest = contest_of(case, self.device, self.dtype)
            return held(contest, self.ceilings, self.clock, seconds)
        except torch.OutOfMemoryError:
            return [Result(contestant="all", status="skipped: out of memory", dtype=self.dtype)]
        except Exception as e:  # a case that cannot be set up is a failure, not the end of the run
            text = " ".join(str(e).split())[:160]
            return [Result(contestant="all", status=f"failed: {type(e).__name__}: {text}", dtype=self.dtype)]
        finally:
            release(self.device)

    def save(self) -> list[report.Row]:
        """Write the CSV file. Returns all its rows."""
        every = report.merged(self.before, self.rows)
        report.write(self.path, every)
        return every

    def finish(self) -> int:
        """Write the files, print the tables."""
        every = self.save()
        text = self.path.with_suffix(".txt")
        text.write_text(report.tables(every) + "\n")
        print(f"\n{report.tables(self.rows)}\n")
        drawn = pictures.plots(every, self.path.parent, self.machine)
        for path in (self.path, text, *drawn):
            print(f"wrote {path}")
        if not drawn:
            print("no pictures: matplotlib is not installed")
        failed = [row for row in self.rows if row["status"].startswith("failed")]
        for row in failed:
            print(f"{row['case']}/{row['direction']} {row['contestant']}: {row['status']}", file=sys.stderr)
        return 1 if failed else 0


def _summary(rows: list[report.Row]) -> str:
    """The ratios of a case, or what happened."""
    shown = []
    for row in rows:
        if not row["milliseconds"]:
            shown.append(f"{row['contestant']} {row['status']}")
        elif not row["ratio"] or row is rows[0]:
            shown.append(f"{row['contestant']} {report.three_digits(row['milliseconds'])} ms")
        else:
            shown.append(f"{row['contestant']} x{report.three_digits(row['ratio'])}")
    return ", ".join(shown)


def _device(name: str) -> torch.device:
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise FxrpgError("--device", "needs a GPU that torch can use", repr(name), "Pass --device cpu.")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise FxrpgError("--device", "must be a device of torch", repr(name), "Pass cuda or cpu.") from None
    if device.type not in ("cuda", "cpu"):
        raise FxrpgError("--device", "must be a GPU or the CPU", repr(name), "Pass cuda or cpu.")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def machine_name(device: torch.device) -> str:
    """What the files are called after, such as "nvidia-h100-80gb-hbm3" or "cpu-amd-epyc"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {processor()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model without trademarks and clock rate, its architecture where the system does not tell the model."""
    found = None
    if cpuinfo.is_file():  # on Linux, where platform.processor() is empty or the architecture
        found = re.search(r"^model name\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", name, flags=re.IGNORECASE).strip()


def stamp(machine: str) -> report.Row:
    """What every row says of where and when it was measured."""
    return {
        "device": machine,
        "commit": _commit(),
        "torch": torch.__version__.partition("+")[0],
        "triton": _version("triton"),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """The short name of the commit that is checked out; "" without git or outside of a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    from fxrpg.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
