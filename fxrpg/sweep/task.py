"""What a sweep runs for each size and seed: a program that follows one protocol, the built-in digits or the user's script.

The protocol: the program is called as `python PROGRAM --dof D --seed S ARGUMENTS`, without `--dof` for the dense baseline,
and prints a line `accuracy: A`, a fraction from 0 to 1; the last such line counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxrpg.api import transform
from fxrpg.demo import digits as demo
from fxrpg.errors import FxrpgError
from fxrpg.generator import Generator

DIGITS = Path(__file__).with_name("digits.py")
DEFAULT_SIZES: dict[str, tuple[int | float, ...]] = {
    "ring": (256, 1024, 4096, 16384, 65536),
    "pranc": (64, 128, 256, 512),
    "pemn": (1e-3, 1e-2, 1e-1, 1.0),
}
"""For the digits."""


@dataclass(frozen=True, order=True)
class Job:
    """One run: `dof` is None for the dense baseline."""

    dof: int | float | None
    seed: int

    def __str__(self) -> str:
        return f"{'dense' if self.dof is None else f'DoF {self.dof!r}'}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A program and its settings.

    Args:
        name: what it is called in tables: "digits", or the script's file name.
        method: the method with all its settings; "" where the script decides.
        program: the interpreter's arguments that start it.
        arguments: what every run gets after the size and the seed.
        code: SHA-256 of the program's file: another program's results are other results.
    """

    name: str
    method: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    code: str

    def command(self, job: Job) -> list[str]:
        """The interpreter's arguments for one run."""
        size = [] if job.dof is None else ["--dof", repr(job.dof)]
        return [*self.program, *size, "--seed", str(job.seed), *self.arguments]

    def shown(self, job: Job) -> str:
        """The command of one run as a person would type it."""
        return shlex.join(["python", *self.command(job)])


def digits_task(generator: Generator, epochs: int, dofs: Sequence[int | float]) -> Task:
    """The built-in task: the demo's ResNet on scikit-learn's digits.

    Raises:
        FxrpgError: scikit-learn is missing, `epochs` is out of range, or the method cannot have one of the sizes.
    """
    if epochs < 1:
        raise FxrpgError("--epochs", "must be 1 or more", repr(epochs), "Pass such as --epochs 20.")
    demo.digits()
    for dof in dofs:
        transform(demo.resnet(0), dof=dof, method=generator)  # a size that cannot be is said before training, not after
    method = json.dumps({"method": generator.method, **dataclasses.asdict(generator)})
    return Task(
        name="digits",
        method=repr(generator),
        program=("-m", "fxrpg.sweep.digits"),
        arguments=("--method", method, "--epochs", str(epochs)),
        code=_digest(DIGITS),
    )


def script_task(script: Path, arguments: Sequence[str]) -> Task:
    """The user's script.

    Raises:
        FxrpgError: it is no file.
        OSError: it cannot be read.
    """
    if not script.is_file():
        found = "a folder or a device" if script.exists() else "nothing there"
        raise FxrpgError(f"--script {script}", "must be a Python file", found, "Pass such as --script train.py.")
    program = f"./{script}" if str(script).startswith("-") else str(script)  # or it would be an option of python's
    return Task(name=script.name, method="", program=(program,), arguments=tuple(arguments), code=_digest(script))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
