"""The file results.csv of a sweep: one line a finished run, with all its settings; complete at every moment."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxrpg.errors import FxrpgError
from fxrpg.sweep.task import Job


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished run. The fields of SAME decide its result, beside dof and seed; the others say how it came about.

    `accuracy` is a fraction, `seconds` wall-clock time from start to end of the process, `arguments` a JSON list.
    """

    task: str
    method: str
    dof: int | float | None
    seed: int
    accuracy: float
    seconds: float
    arguments: str
    code: str
    threads: int
    fxrpg: str
    torch: str
    python: str
    finished: str

    @property
    def job(self) -> Job:
        return Job(self.dof, self.seed)


SAME = ("task", "method", "arguments", "code", "threads")
"""What all rows of one file share."""

COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        FxrpgError: it is no file that `write` wrote.
        OSError: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"the columns {','.join(reader.fieldnames or ['none'])[:100]}")
            rows = [_parsed(reader.line_num, row) for row in reader]
        if len({str(row.job) for row in rows}) < len(rows):
            raise ValueError("a run that is there twice")
    except (ValueError, csv.Error) as e:
        fix = "Repair it by hand, or choose another --out."
        raise FxrpgError(str(path), "must be a file that `fxrpg sweep` wrote", str(e), fix) from None
    return rows


def _parsed(line: int, row: dict[str, Any]) -> Row:
    """One line of the file."""
    try:
        if None in row or None in row.values():
            raise ValueError
        dof = None if not row["dof"] else float(row["dof"]) if set(row["dof"]) & set(".e") else int(row["dof"])
        numbers = {"dof": dof, "seed": int(row["seed"]), "threads": int(row["threads"])}
        row |= numbers | {"accuracy": float(row["accuracy"]), "seconds": float(row["seconds"])}
        if not 0 <= row["accuracy"] <= 1 or not (dof is None or 0 < dof < math.inf):
            raise ValueError
    except ValueError:
        raise ValueError(f"a wrong value in line {line}") from None
    return Row(**row)


def check_same(rows: Iterable[Row], settings: dict[str, Any], kind: type, path: Path) -> None:
    """Refuse to mix runs of different settings in one file, or sizes that are counts and fractions."""
    fix = "Choose another --out for other settings, or pass the same ones to go on."
    for row in rows:
        for name in SAME:
            found, wanted = getattr(row, name), settings[name]
            if found != wanted and name == "code":
                must = "must hold runs of the same program"
                raise FxrpgError(str(path), must, "another version of it", fix)
            if found != wanted:
                must = f"must hold runs of the same settings ({name}: {wanted})"
                raise FxrpgError(str(path), must, str(found) or "none", fix)
        if row.dof is not None and type(row.dof) is not kind:
            must = "must hold sizes of one kind, whole numbers or fractions"
            raise FxrpgError(str(path), must, f"DoF {row.dof!r} beside those of --dof", fix)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows beside the file and move them to its place: a killed process leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow(dataclasses.asdict(row) | {"dof": "" if row.dof is None else repr(row.dof)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
