"""Time and memory on a CPU, against the dense model and the authors' way: `python bench/cpu.py`, or `make bench`.

Contestants of a case run in turn, in one process, many times; memory is of one process each. Rows go to
bench/results/cpu.csv, with a table beside them and a picture.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import nn  # noqa: E402

import fxrpg  # noqa: E402
from bench.cpu_cases import CASES, Case  # noqa: E402
from bench.measure import Call, timing_of  # noqa: E402
from fxrpg import native  # noqa: E402

COLUMNS = (
    "case", "contestant", "milliseconds", "spread", "rounds", "ratio", "bar", "rss_mib", "torch_mib", "generation", "threads",
    "processor", "torch", "date",
)  # fmt: skip
"""`ratio`: the median over the baseline's (the case's first contestant); `spread`: half the distance between the quartiles
over the median; `rss_mib`: what calls after the first take at most, model and all, by the system's account; `torch_mib`: the
same by torch's allocator; `generation`: "C" or "torch"."""

FIRST_CALL = "first call of a ResNet-18"
ROUNDS = 7
"""Of each case at least; more until its seconds are over."""

Row = dict[str, Any]


def measured(case: Case, seconds: float) -> list[Row]:
    """One row a contestant: medians of calls in turn, in an order that alternates, and the first one's ratio."""
    calls = case.build()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end, names = time.perf_counter() + seconds, list(calls)
    while len(samples[names[0]]) < ROUNDS or time.perf_counter() < end:
        for name in names:
            samples[name].append(_milliseconds(calls[name]))
        names.reverse()
    timings = {name: timing_of(some) for name, some in samples.items()}
    base = next(iter(timings.values())).milliseconds
    return [
        {
            "case": case.name,
            "contestant": name,
            "milliseconds": f"{timing.milliseconds:.4g}",
            "spread": f"{timing.spread:.2g}",
            "rounds": len(samples[name]),
            "ratio": f"{timing.milliseconds / base:.3f}",
            "bar": f"{case.bars[name]:.3g}" if name in case.bars else "",
        }
        for name, timing in timings.items()
    ]


def _milliseconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def memory(case: Case, name: str, threads: int) -> dict[str, str]:
    """What the contestant takes at most, measured in a process of its own."""
    # frees go back to the system at once, or the peak would be one of what malloc keeps
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--memory", case.name, name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: f"{value / 2**20:.0f}" for key, value in found.items()}


def _report_memory(case: Case, name: str) -> None:
    """In the child: peaks of two calls as JSON on the last line."""
    # what is imported and built for a first model is no model's
    fxrpg.transform(nn.Linear(2, 2), dof=2, plan=[fxrpg.Rule("*", "generate")])(torch.ones(1, 2)).sum().backward()
    before = _status("VmRSS")
    call = case.build(name)[name]
    call()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    call()
    peak = _status("VmHWM") - before
    del call
    print(json.dumps({"rss_mib": peak, "torch_mib": torch_peak(lambda: case.build(name)[name])}))


def torch_peak(build: Callable[[], Call]) -> int:
    """Bytes that torch's allocator has in use at most during the second call, with all that is kept since the building."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call = build()
        call()
        with torch.profiler.record_function("second call"):
            call()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "second call")
    total = peak = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total) if event.start_ns() >= begin else total
    return peak


def _status(field: str) -> int:
    """Bytes, from the system's account of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def first_calls(threads: int) -> list[Row]:
    """Seconds until a first forward is through, less those of a second: nothing built yet, built before, and plain torch."""
    code = (
        "import sys, time, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[2]))\n"
        "import fxrpg; from fxrpg.networks import resnet18\n"
        "small, x = fxrpg.transform(resnet18(), dof=2_359_296).eval(), torch.randn(1, 3, 224, 224)\n"
        "times = []\n"
        "with torch.no_grad():\n"
        "    for _ in range(2):\n"
        "        begin = time.perf_counter(); small(x); times.append(time.perf_counter() - begin)\n"
        "print(times[0] - times[1])\n"
    )
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name, native_wanted in (("nothing built", "1"), ("built before", "1"), ("plain torch", "0")):
            environment = os.environ | {"FXRPG_CACHE": cache, "FXRPG_NATIVE": native_wanted}
            command = [sys.executable, "-c", code, str(ROOT), str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            milliseconds = f"{1e3 * float(done.stdout.splitlines()[-1]):.4g}"
            rows.append({"case": FIRST_CALL, "contestant": name, "milliseconds": milliseconds, "rounds": 1})
    return rows


def table(rows: list[Row]) -> str:
    """The rows as people read them."""
    body = [
        [row["case"], row["contestant"], row["milliseconds"], row.get("ratio", ""), row.get("bar", ""), *_mib(row)]
        for row in rows
    ]
    headers = ["case", "contestant", "ms", "ratio", "at most", "peak RSS, MiB", "torch's, MiB"]
    return tabulate(body, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 5))


def _mib(row: Row) -> tuple[str, str]:
    return row.get("rss_mib", ""), row.get("torch_mib", "")


def draw(rows: list[Row], path: Path) -> None:
    """Bars: each contestant's time over its case's baseline, with a mark where the goal is."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("ratio") and row["case"] != FIRST_CALL]
    colors = {"dense": "0.6", "fxrpg": "C0", "authors": "C1", "sort": "C1", "copy": "0.6"}
    figure = Figure(figsize=(10, 0.32 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [float(row["ratio"]) for row in rows], color=[colors[row["contestant"]] for row in rows])
    for place, row in zip(places, rows, strict=True):
        if row["bar"]:
            axes.plot([float(row["bar"])] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.annotate(
            row["ratio"], (float(row["ratio"]), place), xytext=(3, 0), textcoords="offset points", va="center"
        )
    first = {row["case"]: None for row in rows}
    labels = [
        f"{row['case']}: {row['contestant']}" if first.pop(row["case"], 0) is None else row["contestant"]
        for row in rows
    ]
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="time / time of the first of its case (lower is better; black: the goal)")
    axes.set_title(f"{rows[0]['processor']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        name, contestant = arguments.memory
        _report_memory(next(case for case in CASES if case.name == name), contestant)
        return
    chosen = [case for case in CASES if fnmatch.fnmatch(case.name, arguments.only)]
    stamp = {
        "generation": "C" if native.library() else "torch",
        "threads": arguments.threads,
        "processor": _processor(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(
        f"{stamp['processor']}, {arguments.threads} threads, torch {torch.__version__}, generation: {stamp['generation']}"
    )
    rows: list[Row] = []
    for case in chosen:
        found = measured(case, arguments.seconds)
        for row in found:
            row |= memory(case, row["contestant"], arguments.threads) if case.memory and sys.platform == "linux" else {}
        rows += found
        print(f"\n{table(found)}", flush=True)
    if arguments.only == "*":
        rows += first_calls(arguments.threads)
    rows = [row | stamp for row in rows]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = _in_order([*_others(arguments.out / "cpu.csv", rows), *rows])
    with (arguments.out / "cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.out / "cpu.png")
    print(f"\n{table(rows)}\n\nwritten to {arguments.out}: cpu.csv, cpu.png")


def _others(path: Path, rows: list[Row]) -> list[Row]:
    """The rows of a file that are of other cases than these."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["case"] not in {new["case"] for new in rows}]


def _in_order(rows: list[Row]) -> list[Row]:
    """As the cases stand in their list, the first calls last."""
    places = {case.name: place for place, case in enumerate(CASES)}
    return sorted(rows, key=lambda row: places.get(row["case"], len(places)))


def _processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time models and generation on a CPU, each case against its first contestant.",
        epilog="example: python bench/cpu.py --only 'ResNet-20*' --out build/bench",
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="only cases whose name matches (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case, or 7 rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder (default: bench/results)")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "CONTESTANT"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
