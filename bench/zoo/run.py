"""Prove `fxrpg.transform` on real models: `python bench/zoo/run.py`, or `make zoo`, which installs them first.

Each model and method gets a row: whether the transformed model does what its materialized one does, in every check of
`checks.py`, and which way its weights go. A wrong row makes the exit code 1. Rows go to build/zoo.csv.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in (str(ROOT), str(Path(__file__).parent)))]

from tqdm import tqdm  # noqa: E402

from bench.zoo import catalogue, schedule, table  # noqa: E402
from bench.zoo.row import Task  # noqa: E402
from bench.zoo.subject import METHODS  # noqa: E402
from fxrpg.errors import FxrpgError  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 if all rows are right, 1 if one is wrong, 2 for a mistake in the arguments."""
    arguments = _parser().parse_args(argv)
    try:
        return run(arguments)
    except FxrpgError as e:
        print(f"zoo: {e}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen models. Returns the exit code."""
    every = catalogue.models(arguments.models)
    chosen = catalogue.chosen(every, arguments.only, arguments.third)
    _check_installed({every[name][0] for name in chosen})
    jobs = min(arguments.jobs, len(chosen))
    threads = (os.cpu_count() or 1) if jobs == 1 else 1
    file = str(arguments.models.resolve()) if arguments.models else ""
    options = {"compile": arguments.compile, "export": arguments.export, "backend": arguments.backend}
    methods = tuple(arguments.method)
    tasks = [Task(model=name, methods=methods, out="", file=file, threads=threads, **options) for name in chosen]
    found: dict[str, list[schedule.Row]] = {}
    with tqdm(total=len(tasks), unit="model", file=sys.stderr) as bar:
        for name, rows in schedule.rows(tasks, jobs, arguments.timeout):
            found[name] = [{"package": every[name][0], **row} for row in rows]
            for row in rows:
                if not row["ok"]:
                    bar.write(f"{name} {row['method']}: {row['failed']}", file=sys.stderr)
            bar.update()
    every_row = [row for name in chosen for row in found[name]]
    table.write(arguments.out, every_row)
    print(f"{table.table(every_row)}\n\n{table.totals(every_row)}\n\nwrote {arguments.out}")
    return 0 if all(row["ok"] for row in every_row) else 1


def _check_installed(packages: set[str]) -> None:
    """Refuse a run whose models cannot be built, before it takes minutes."""
    missing = sorted(package for package in packages if not _installed(package))
    if missing:
        raise FxrpgError(
            "zoo",
            "the models' packages must be installed",
            f"no {', '.join(missing)}",
            "Run make zoo, or pass --only 'nn.*'.",
        )


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo", description=__doc__.splitlines()[0], epilog="example: python bench/zoo/run.py --only 'timm.*'"
    )
    add = parser.add_argument
    add("--only", default="", metavar="GLOB", help="models whose names match, such as 'tv.*'")
    add("--third", action="store_true", help="a fixed third of the models: of every package and kind")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="all of them by default")
    add("--out", type=Path, default=ROOT / "build" / "zoo.csv", metavar="FILE.csv", help="build/zoo.csv by default")
    add(
        "--jobs",
        type=_positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="models at a time; by default, one a core",
    )
    add("--timeout", type=float, default=600, metavar="S", help="seconds that a model may take; 600 by default")
    add("--compile", action="store_true", help="also whether models compile as one graph: slow")
    add("--export", action="store_true", help="also whether models export: slow")
    add("--backend", default="aot_eager", metavar="NAME", help="of torch.compile; aot_eager by default")
    add(
        "--models",
        type=Path,
        metavar="FILE.py",
        help="models of your own: a file with MODELS as those in bench/zoo/models",
    )
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
