"""Thousands of mutated files against every reader: `python tests/fuzz_files.py --files 20000 --seed 0` (pytest runs it too).

Each file must be refused with FxrpgError, or read, verified, described, unpacked and loaded into a model that works. A
failure names its number; `--only NUMBER --keep bad.safetensors` makes that file again. Runs in a process of its own: an
audit hook cannot be taken back, and memory is limited to what the process has plus `--memory` megabytes for each file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mutations import mutated
from safetensors.torch import load as load_bytes
from test_checkpoint import FORMS
from torch import fx, nn

import fxrpg
from fxrpg import FxrpgError, checkpoint, cli, header

KINDS = [
    "plain", "scopes", "methods", "tied masks", "pruned", "truncated", "quantised", "frozen ring", "frozen masks",
    "channels", "everything", "graph",
]  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = ("object.", "sys._getframe", "builtins.id", "gc.", "array.", "code.__new__")
LARGEST = 100_000
"""Weights of a file that is unpacked: more are legitimate, and take their time and memory."""


Verb = Callable[["Case", Path], None]


class TooSlow(BaseException):
    """A second of processor time on one file."""


class Guard:
    """Notes, while it is armed, whatever a process does besides computing and reading: writes, programs, imports, code."""

    def __init__(self) -> None:
        self.armed, self.graph, self.seen = False, False, []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or event.startswith(HARMLESS) or (event == "open" and not args[2] & WRITES):
            return
        if event == "ctypes.dlsym":  # the library's own C code, when a function of it is first called
            return
        if self.graph and event in ("compile", "exec", "marshal.loads"):  # torch.fx writes a graph's forward anew
            return
        self.seen.append(f"{event} {args!r}"[:300])


@dataclass(frozen=True)
class Case:
    """A file to start from, and the model that it belongs to."""

    model: nn.Module
    data: bytes
    outputs: torch.Size
    x: torch.Tensor
    seed: int | None


def cases(folder: Path) -> dict[str, Case]:
    found = {}
    for name in [*KINDS, "withheld"]:
        make, small = FORMS.get(name, FORMS["plain"])
        model = small()
        torch.manual_seed(0)
        fxrpg.save(model, folder / "source", withhold_seed=name == "withheld")
        x = torch.randn(3, 5)
        outputs = model.eval()(x).shape
        found[name] = Case(make(), (folder / "source").read_bytes(), outputs, x, 11 if name == "withheld" else None)
    return found


def attempt(case: Case, path: Path, verbs: Sequence[Verb]) -> tuple[str, header.Contents | None]:
    """What became of a file, and what is in it. Raises whatever should not be raised."""
    try:
        contents = checkpoint.read(path)
    except FxrpgError as e:
        check_message(e)
        return "refused", None
    done = ["read"]
    for verb in verbs:
        try:
            verb(case, path)
            done.append(verb.__name__)
        except FxrpgError as e:
            check_message(e)
    return ", ".join(done), contents


def check_message(error: FxrpgError) -> None:
    assert len(error.args) == 4
    assert all(isinstance(part, str) for part in error.args)
    assert len(str(error)) < 2000
    assert "allocate" not in str(error), error


def info(case: Case, path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["info", str(path)]) == 0
    assert all(c == "\n" or c.isprintable() for c in printed.getvalue()), printed.getvalue()


def verify(case: Case, path: Path) -> None:
    checkpoint.verify(path, case.seed)


def unpack(case: Case, path: Path) -> None:
    plan = header.plan_from(checkpoint.read(path).fields, 0)
    if plan.generated < LARGEST:
        tensors = checkpoint.unpack(path, case.seed)
        assert all(tensors[name].shape == view.shape for name, view in plan.views.items())


def load(case: Case, path: Path) -> None:
    loaded = fxrpg.load(case.model, path, seed=case.seed)
    if not isinstance(loaded, fx.GraphModule):
        loaded = loaded.float()  # types come from the file, and layers want one
    with torch.no_grad(), contextlib.suppress(*(RuntimeError,) if isinstance(loaded, fx.GraphModule) else ()):
        assert loaded.eval()(case.x).shape == case.outputs


VERBS = info, verify, unpack


def check_container(contents: header.Contents, data: bytes) -> None:
    """What is accepted is what the library finds in the same bytes."""
    library = load_bytes(data)
    assert {name: (t.dtype, t.shape) for name, t in contents.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in library.items()
    }
    assert header.tensors_digest(library) == contents.fields["tensors"]


def limited(megabytes: int) -> None:
    """Address space for what is mapped now and so much more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))


def tried(case: Case, path: Path, data: bytes, guard: Guard, megabytes: int, verb: Verb) -> str:
    path.write_bytes(data)
    guard.graph, guard.seen = isinstance(case.model, fx.GraphModule), []
    limited(megabytes)
    signal.setitimer(signal.ITIMER_PROF, 1)
    guard.armed = True
    try:
        outcome, contents = attempt(case, path, (load, verb))
    finally:
        guard.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    assert not guard.seen, guard.seen
    if contents:
        check_container(contents, data)
    return outcome


def too_slow(*_: Any) -> None:
    raise TooSlow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, default=64, help="megabytes")
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--keep", type=Path, help="where to write the file of --only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, too_slow)
    numbers = range(arguments.first, arguments.first + arguments.files) if arguments.only is None else [arguments.only]
    outcomes: Counter[str] = Counter()
    failures = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        found, path = cases(Path(folder)), Path(folder) / "m.safetensors"
        for case in found.values():  # imports and caches come before the guard
            path.write_bytes(case.data)
            assert attempt(case, path, (*VERBS, load))[0] == "read, info, verify, unpack, load"
        guard = Guard()
        for number in numbers:
            rng = random.Random(f"{arguments.seed} {number}")
            name = rng.choice(list(found))
            data = mutated(found[name].data, rng)
            if arguments.keep:
                arguments.keep.write_bytes(data)
            try:
                outcomes[tried(found[name], path, data, guard, arguments.memory, VERBS[number % 3])] += 1
            except (Exception, TooSlow):
                failures += 1
                again = f"python tests/fuzz_files.py --seed {arguments.seed} --only {number} --keep bad.safetensors"
                print(f"{again}  # {name}\n{traceback.format_exc(limit=-4)}", flush=True)
                if failures == 10:
                    break
    print(json.dumps(outcomes, sort_keys=True))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
