"""What a training run tells while it runs: a row an epoch, for a CSV file, for TensorBoard, or for a callback of your own."""

from __future__ import annotations

import csv
import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxrpg.atomic import replacing
from fxrpg.errors import FxrpgError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One epoch. Without test examples, `test_loss` and `accuracy` (from 0 to 1) are None; `seconds` count the training."""

    epoch: int
    step: int
    lr: float
    loss: float
    test_loss: float | None
    accuracy: float | None
    seconds: float


class Callback:
    """What a trainer calls, in the process of rank 0. Override what you need."""

    def begin(self, rows: Sequence[Row]) -> None:
        """Training begins, or goes on after the epochs `rows`: what is recorded beyond them will come again."""

    def write(self, row: Row) -> None:
        """An epoch has ended. It is in no snapshot yet."""

    def end(self) -> None:
        """Training has ended or was interrupted."""


class CsvLog(Callback):
    """One line an epoch in the CSV file at `path`. After an interruption the file goes on as if there had been none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, rows: Sequence[Row]) -> None:
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)

    def write(self, row: Row) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerow(dataclasses.astuple(row))


class TensorBoardLog(Callback):
    """Curves in `folder` for `tensorboard --logdir`. After an interruption they go on where the snapshot was.

    Raises:
        FxrpgError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as e:
            fix = "Run: pip install 'fxrpg[tensorboard]'."
            raise FxrpgError("tensorboard", "the package tensorboard must be installed", str(e), fix) from None
        self.folder = folder
        self._writer: Any = None

    def begin(self, rows: Sequence[Row]) -> None:
        after = rows[-1].step + 1 if rows else 0
        self._writer = self._module.SummaryWriter(str(self.folder), purge_step=after)

    def write(self, row: Row) -> None:
        for name in ("lr", "loss", "test_loss", "accuracy"):
            value = getattr(row, name)
            if value is not None:
                self._writer.add_scalar(name, value, row.step)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()
