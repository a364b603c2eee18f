"""Runs a sweep's programs in parallel, each in a process of its own with its own number of threads.

A process ends with the sweep, on Linux even when the sweep is killed; a run that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import IO

from fxrpg.errors import FxrpgError
from fxrpg.sweep.task import Job, Task

TAIL = 65_536
"""Bytes at the end of a program's output that are read."""

DIES_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Becomes the program after asking Linux to kill it when the sweep is killed, which cannot do it then (PR_SET_PDEATHSIG)."""


@dataclass(frozen=True)
class Done:
    """A run that gave an accuracy, a fraction, in so many seconds."""

    job: Job
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A run that gave none, and why."""

    job: Job
    reason: str


def run_all(task: Task, jobs: Sequence[Job], *, parallel: int, threads: int) -> Generator[Done | Failure]:
    """Run all jobs, `parallel` at a time; gives each as it ends. When left early, what runs is killed.

    Raises:
        FxrpgError: a program succeeds without following the protocol.
    """
    running = _Running(threads)
    pool = ThreadPoolExecutor(parallel)
    try:
        for future in as_completed([pool.submit(running.run, task, job) for job in jobs]):
            yield future.result()
    finally:
        running.stop()
        pool.shutdown(cancel_futures=True)


class _Running:
    """The processes that run now."""

    def __init__(self, threads: int) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._environment = os.environ | dict.fromkeys(names, str(threads))
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, task: Task, job: Job) -> Done | Failure:
        begin = time.perf_counter()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with self._lock:
                if self._stopped:
                    return Failure(job, "not started")
                process = self._start(task.command(job), out, err)
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
            return _outcome(task, job, code, _tail(out), _tail(err), time.perf_counter() - begin)

    def stop(self) -> None:
        """Kill what runs, with all that it started, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                with contextlib.suppress(OSError):  # it ended by itself
                    os.killpg(process.pid, signal.SIGKILL)

    def _start(self, command: list[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        """In a session of its own, so that Ctrl-C reaches the sweep alone: a script might take it for the end of training."""
        if sys.platform == "linux":
            command = ["-I", "-S", "-c", DIES_WITH_PARENT, str(os.getpid()), *command]
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=self._environment,
            start_new_session=True,
        )


def _outcome(task: Task, job: Job, code: int, out: str, err: str, seconds: float) -> Done | Failure:
    """What a program's exit code and output mean."""
    said = [line.strip() for line in err.splitlines() if line.strip(" \t^~")]  # not what marks a place in a traceback
    last = " / ".join(said[-3:])[-400:] or "nothing"
    if code:
        ended = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        return Failure(job, f"{ended}; its stderr ends with: {last}")
    lines = [line for line in out.splitlines() if line.startswith("accuracy:")]
    text = lines[-1].removeprefix("accuracy:").strip() if lines else ""
    value = float(text) if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf)", text, re.I) else None
    if value is not None and not math.isfinite(value):
        return Failure(job, f"its accuracy is {text}; its stderr ends with: {last}")
    if value is None or not 0 <= value <= 1:
        found = f"{lines[-1][:100]!r}" if lines else "no such line"
        raise FxrpgError(
            f"{task.shown(job)} (exit code 0)",
            "must print its accuracy, a fraction from 0 to 1, in a line such as 'accuracy: 0.93'",
            f"{found}; its stderr ends with: {last}",
            "End the script with print('accuracy:', correct / tested).",
        )
    return Done(job, value, seconds)


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    return file.read().decode(errors="replace")
