"""The file from which an interrupted run goes on: all that the next step depends on, in one piece."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxrpg.atomic import replacing
from fxrpg.errors import FxrpgError

NAME = "snapshot.pt"
FORMAT = 1
PARTS = {"model", "optimizer", "scheduler", "scaler", "average"}
KEYS = {"format", "settings", "epoch", "step", "loss", "seconds", "rows"} | PARTS


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the snapshot at `path` in one move, when the new one is complete and on the disk.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    with replacing(path) as temporary:
        try:
            torch.save({"format": FORMAT} | dict(state), temporary)
        except RuntimeError as e:  # what torch makes of a full disk
            raise OSError(f"{path}: {str(e).splitlines()[0]}") from None


def _checked(path: Path) -> io.BytesIO:
    """The archive again, of members whose checksums are right: torch looks at none, and may find a member elsewhere."""
    whole = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(whole, "w") as checked:
        for name in archive.namelist():
            checked.writestr(name, archive.read(name))
    whole.seek(0)
    return whole


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU. Every byte is checked, and no code in the file is run.

    Raises:
        FxrpgError: the file is damaged, or no snapshot of this format.
        OSError: it cannot be opened.
    """
    os.close(os.open(path, os.O_RDONLY))  # a file that cannot be read is not a damaged one
    fix = "Remove it to start from the beginning."
    try:
        found = torch.load(_checked(path), map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file makes torch raise anything
        text = f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]
        raise FxrpgError(str(path), "must be a whole snapshot that a training run wrote", text, fix) from None
    if not isinstance(found, dict) or found.keys() != KEYS or found["format"] != FORMAT:
        held = f"the keys {sorted(map(str, found))[:6]}" if isinstance(found, dict) else type(found).__name__
        raise FxrpgError(str(path), f"must be a snapshot of format {FORMAT}", held, fix)
    return found


def check_settings(path: Path, mine: Mapping[str, Any], stored: Any) -> None:
    """A run goes on only as it began."""
    stored = stored if isinstance(stored, dict) else {}
    for name in sorted(mine.keys() | stored.keys()):
        if mine.get(name) != stored.get(name):
            must = f"{name} must be {stored.get(name)!r}, as in the run of {path}"
            fix = "Resume with the settings that the run began with, or choose another folder."
            raise FxrpgError("resume", must, repr(mine.get(name)), fix)
