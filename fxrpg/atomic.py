"""Files that are written beside their place and moved there when complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fxrpg.errors import FxrpgError

SUFFIX = ".part"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, empty file beside `path` to write to. When the block ends it is synced to disk and takes the place of `path`.

    A killed process leaves the old file or the new one. Of a symbolic link, the file that it points to is replaced.

    Raises:
        FxrpgError: `path` is a folder or a device.
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise FxrpgError(str(path), "must be a file, or a new name", "a folder or a device", "Choose another path.")
    temporary = target.with_name(f"{_beginning(target)}{secrets.token_hex(8)}{SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            mode = os.stat(file.fileno()).st_mode  # what the user's umask leaves; some writers would make it private
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as e:
        if e.errno is None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from None  # the caller does not know the temporary name
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(path: str | os.PathLike[str]) -> None:
    """Remove what killed processes left beside `path` of files that were to replace it. Nobody may be writing it now."""
    target = Path(os.path.realpath(path))
    for left in target.parent.glob(f"{_beginning(target)}*{SUFFIX}"):
        with contextlib.suppress(OSError):
            left.unlink()


def _beginning(target: Path) -> str:
    """How the names of temporary files for `target` begin: short, since its own may be as long as can be."""
    return f".fxrpg.{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}."
