"""The report of a sweep: one HTML file that holds everything it shows and asks for nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from fxrpg.sweep import picture
from fxrpg.sweep.outcome import Outcome, Size, law_text
from fxrpg.sweep.processes import Failure
from fxrpg.sweep.results import Row
from fxrpg.sweep.task import Task

TEMPLATE = Path(__file__).with_name("report.html")


def write(task: Task, rows: Sequence[Row], found: Outcome, failures: Sequence[Failure], path: Path) -> None:
    """Write the report, atomically; whatever text comes from settings, scripts or files is shown, never obeyed."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template.filters |= {"visible": visible, "bounds": _bounds}
    text = template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Sweep of {visible(task.name)}",
        subtitle=" · ".join([*([task.method] if task.method else task.arguments), f"{len(rows)} runs"]),
        found=found,
        law=law_text(found.law) if found.law else "",
        pictures=[
            (media, picture.svg_address(found, palette, size))
            for size, width in ((picture.NARROW, "(max-width: 640px) and "), (picture.WIDE, ""))
            for palette, media in (
                (picture.DARK, f"{width}(prefers-color-scheme: dark)"),
                (picture.LIGHT, f"{width}(prefers-color-scheme: light)"),
            )
        ],
        settings=_settings(task, rows),
        versions=_versions(rows),
        rows=sorted(rows, key=lambda row: (row.dof or 0, row.seed)),
        failures=[(str(failure.job), failure.reason, task.shown(failure.job)) for failure in failures],
    )
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def visible(text: object) -> str:
    """`text` without characters that a reader cannot see: control characters, those that turn text around."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _bounds(size: Size) -> str:
    """The bounds of the gap to dense, in brackets; nothing where there are none."""
    if size.gap is None or math.isinf(size.gap.low):
        return ""
    low, high = (round(bound, 2) + 0.0 for bound in (size.gap.low, size.gap.high))  # no -0.00
    return f"({low:.2f} to {high:.2f})"


def _settings(task: Task, rows: Sequence[Row]) -> list[tuple[str, str]]:
    pairs = [
        ("program", task.name),
        ("method", task.method or "as the script decides"),
        ("arguments", " ".join(task.arguments)),
        ("SHA-256 of the program", f"{task.code[:16]}..."),
        ("runs", str(len(rows))),
        ("threads a run", str(rows[0].threads)),
    ]
    return [(name, value) for name, value in pairs if value]


def _versions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each package with the versions that the runs were made with."""
    found = {name: sorted({getattr(row, name) for row in rows}) for name in ("fxrpg", "torch", "python")}
    times = sorted(f"{row.finished[:16].replace('T', ' ')} UTC" for row in rows)
    return [
        *((name, ", ".join(values)) for name, values in found.items()),
        ("finished", " to ".join(dict.fromkeys((times[0], times[-1])))),
    ]
