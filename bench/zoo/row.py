"""One model of the zoo, in a process of its own: `python -m bench.zoo.row TASK`, with a task as JSON.

Appends a line to the task's file for each thing that it begins and for each row that it has.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bench.zoo.calls import seed
from bench.zoo.catalogue import Build, models
from bench.zoo.checks import CHECKS
from bench.zoo.compiled import compiles, exports
from bench.zoo.subject import Subject
from bench.zoo.watch import Consumed
from fxrpg.assemble import plan_of

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a process is to do.

    Args:
        model: its name.
        methods: one row each.
        out: the file to append to.
        file: that has the models, in place of the zoo's; "" for the zoo's.
        threads: of torch.
        compile, export: whether a ring's row tells that too.
        backend: of torch.compile.
    """

    model: str
    methods: tuple[str, ...]
    out: str
    file: str = ""
    threads: int = 1
    compile: bool = False
    export: bool = False
    backend: str = "aot_eager"


def main(text: str) -> None:
    """Do the task, written as JSON."""
    task = Task(**json.loads(text))
    torch.set_num_threads(task.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")  # the models' own; the tests see those of fxrpg
    with Path(task.out).open("a") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        write({"stage": "build"})
        _package, build = models(Path(task.file) if task.file else None)[task.model]
        consumed = weights_consumed(build)
        for method in task.methods:
            write({"row": measured(task, build, method, consumed, lambda stage: write({"stage": stage}))})


def weights_consumed(build: Build) -> dict[str, int]:
    """Name -> elements of every parameter that the untransformed model consumes as a weight, in either mode."""
    seed()
    model, args, kwargs = build()
    watcher = Consumed(model)
    with watcher:
        for training in (True, False):
            seed()
            model.train(training)
            model(*args, **kwargs)
    return {name: model.get_parameter(name).numel() for name in watcher.names}


def measured(task: Task, build: Build, method: str, consumed: dict[str, int], say: Say) -> dict[str, Any]:
    """The row of one method."""
    start = time.perf_counter()
    row: dict[str, Any] = {"method": method, "eligible": sum(consumed.values()), "generated": 0, "fraction": 0.0}
    say(f"{method}: transform")
    try:
        subject = Subject(build, method)
    except Exception as e:  # whatever a model makes of it
        failed = [f"transform: {told(e)}"]
    else:
        failed = checked(subject, lambda name: say(f"{method}: {name}"))
        try:
            row |= counted(subject, consumed)
        except Exception as e:  # explaining or counting a model must not fail either
            failed.append(f"counted: {told(e)}")
        if method == "ring":
            if task.compile:
                say(f"{method}: compile")
                row |= compiles(subject, task.backend)
            if task.export:
                say(f"{method}: export")
                row |= exports(subject)
    row |= {"ok": not failed, "failed": "; ".join(failed), "seconds": round(time.perf_counter() - start, 1)}
    return row


def checked(subject: Subject, say: Say) -> list[str]:
    """What does not hold, each with the name of its check."""
    failed = []
    for check in CHECKS:
        say(check.__name__)
        try:
            reason = check(subject)
        except Exception as e:  # a check that cannot be made has failed
            reason = told(e)
        if reason:
            failed.append(f"{check.__name__}: {reason}")
    return failed


def told(error: Exception) -> str:
    """An exception in one line, with the place in the project or the model that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:240]}{where}"


def counted(subject: Subject, consumed: dict[str, int]) -> dict[str, Any]:
    """How many weights went which way."""
    _ = subject.eval
    explained, plan = subject.explained, plan_of(subject.small)
    aliases = {alias for names in plan.names.values() for alias in names}
    generated = sum(view.count for view in subject.views.values())
    left = {name: count for name, count in consumed.items() if name not in aliases}
    rows = [row for row in explained.rows if row.status == "generated"]
    in_regions = sum(prod(row.shape) for row in rows if "region" in row.way)
    materialized = Counter(f"{row.op}: {row.reason}" for row in rows if row.path in ("materialized", "unknown"))
    return {
        "eligible": generated + sum(left.values()),
        "generated": generated,
        "fraction": generated / (generated + sum(left.values())),
        "staged": explained.fraction("staged"),
        "fused": explained.fraction("fused"),
        "materialized": explained.fraction("materialized"),
        "regions": in_regions / generated,
        "left_dense": common(Counter(_kind(name) for name in left)),
        "why_materialized": common(materialized),
        "why_no_region": common(Counter(reason for _path, reason in explained.dropped)),
        "dof": plan.size,
        "difference": subject.largest,
        "notes": "; ".join(dict.fromkeys(subject.notes)),
    }


def _kind(name: str) -> str:
    """A parameter's name without the numbers of its blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def common(counts: Counter[str], most: int = 3) -> str:
    """The most common ones, each with its count."""
    return "; ".join(f"{count} x {' '.join(what.split())[:160]}" for what, count in counts.most_common(most))


if __name__ == "__main__":
    main(sys.argv[1])
