"""Runs each model in a process of its own, several at a time: one that dies or hangs costs its own rows."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.zoo.row import Task

ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


def rows(tasks: Sequence[Task], jobs: int, timeout: float) -> Iterator[tuple[str, list[Row]]]:
    """(model, its rows, one a method), in the order in which they are done.

    Args:
        jobs: processes at a time.
        timeout: seconds that one may take.
    """
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {}
        for place, task in enumerate(tasks):
            task = dataclasses.replace(task, out=str(Path(folder) / f"{place}.jsonl"))
            running[pool.submit(_rows_of, task, timeout)] = task.model
        try:
            for done in concurrent.futures.as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _rows_of(task: Task, timeout: float) -> list[Row]:
    """The rows that the process of one task leaves; for a method that it did not come to, what happened to it."""
    out = Path(task.out)
    end = _ended(task, timeout)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    found = {line["row"]["method"]: line["row"] for line in lines if "row" in line}
    stages = ["start", *(line["stage"] for line in lines if "stage" in line)]
    lost = {"ok": False, "failed": f"{end} ({stages[-1]})"}
    return [{"model": task.model, **found.get(method, lost | {"method": method})} for method in task.methods]


def _ended(task: Task, timeout: float) -> str:
    """How the process of a task ended, in one line."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(task.threads), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", "-m", "bench.zoo.row", json.dumps(dataclasses.asdict(task))]
    with tempfile.TemporaryFile("w+") as words:  # not a pipe, which a talkative process could fill
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"took over {timeout:g} s"
        words.seek(0)
        last = next((line.strip() for line in reversed(words.readlines()) if line.strip()), "nothing said")
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    return f"ended with code {done.returncode}: {last[:240]}"
