"""Coverage-guided fuzzing: `pip install '.[fuzz]'`, then `python tests/fuzz_coverage.py WORK tests/corpus -max_total_time=600`.

WORK is a folder for what it finds; other options are libFuzzer's, such as `-timeout=5`. An input's first byte says what it
is: a file's bytes; the text of a header, which is signed anew and put beside a real file's tensors; or options of the
command line, one a line, for a plan. What it finds goes, minimised (`-minimize_crash=1`), into tests/corpus/, which
tests/test_fuzz.py replays.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

with contextlib.suppress(ImportError):  # only to find inputs, not to replay them
    import atheris

    if __name__ == "__main__":
        with atheris.instrument_imports(include=["fxrpg"]):
            import fxrpg.api
            import fxrpg.checkpoint
            import fxrpg.cli  # noqa: F401

from fuzz_files import Case, attempt, cases, info, load, unpack, verify
from mutations import CONSISTENT, Parts, at, canonical, entries_of, parts_of, places, signed, written
from mutations import VALUES as POOL
from torch import nn

from fxrpg import FxrpgError, cli
from fxrpg.rule import Rule

NAMES = ("0.weight", "1.bias", "layer1.0.conv.weight", "é", "")


def as_file(data: bytes, found: dict[str, Case]) -> bytes:
    return data


def as_header(data: bytes, found: dict[str, Case]) -> bytes:
    """The file that a header's text makes with the tensors of the case that its first byte chooses."""
    case = list(found.values())[data[0] % len(found)] if data else found["plain"]
    parts = parts_of(case.data)
    try:
        fields = json.loads(data[1:])
    except (ValueError, RecursionError):
        return written(*entries_of(parts, data[1:].decode("latin-1")))
    if type(fields) is not dict:
        return written(*entries_of(parts, canonical(fields)))
    return written(*entries_of(parts, signed(Parts(fields, parts.tensors))))


FILES: tuple[Callable[[bytes, dict[str, Case]], bytes], ...] = (as_file, as_header)


def as_options(data: bytes) -> None:
    """Options of `fxrpg explain`, one a line: parsed, and made into a plan of a small model."""
    argv = data.decode("utf-8", "surrogateescape").split("\n")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments = cli._parser().parse_args(["explain", "m:x", *argv])
        except SystemExit:
            return
    with contextlib.suppress(FxrpgError):
        for pattern, action, dof in arguments.rule:
            if not pattern.startswith("re:"):  # an expression of the user's own may take its time
                for name in NAMES:
                    Rule(pattern, action, dof=dof).matches(name, torch.empty(0))
    with contextlib.suppress(FxrpgError), torch.device("meta"):
        cli._transform(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)), arguments)


def replay(data: bytes, found: dict[str, Case], path: Path) -> None:
    """Run one input. Raises what should not be raised."""
    kind, rest = (data[0] % 3, data[1:]) if data else (0, b"")
    if kind == 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            as_options(rest)
        return
    path.write_bytes(FILES[kind](rest, found))
    case = list(found.values())[rest[0] % len(found)] if rest and kind else found["plain"]
    attempt(case, path, (load, info, verify, unpack))


def mutate(data: bytes, limit: int, seed: int) -> bytes:
    """Changes in a header's structure, and libFuzzer's own in all else."""
    rng = random.Random(seed)
    if len(data) > 2 and data[0] % 3 == 1 and rng.random() < 0.7:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            fields = json.loads(data[2:])
            spots = list(places(fields))
            *path, last = rng.choice(spots)
            if rng.random() < 0.3:
                parts = Parts(fields, {})
                rng.choice(CONSISTENT)(parts, rng)
                fields = parts.fields
            else:
                at(fields, tuple(path))[last] = rng.choice((*POOL, at(fields, rng.choice(spots))))
            text = data[:2] + canonical(fields).encode()
            return text if len(text) <= limit else data
    return atheris.Mutate(data, limit)


def seeds(found: dict[str, Case]) -> dict[str, bytes]:
    """Inputs to start from: each case as bytes and as a header, and some options."""
    made = {f"file-{name}": b"\0" + case.data for name, case in found.items()}
    for i, (name, case) in enumerate(found.items()):
        made[f"header-{name}"] = b"\1" + bytes([i]) + canonical(parts_of(case.data).fields).encode()
    options = ["--dof 3 --rule 0.*=dense --rule re:1[.]w.*=pranc:2", "--dof 0.5 --method pemn --set keep=0.3"]
    options += ["--rule *=ring:0.1 --scope layer --seed 7", "--dof 1e-1 --set bits=8 --set block=1 --scope block"]
    return made | {f"options-{i}": b"\2" + text.replace(" ", "\n").encode() for i, text in enumerate(options)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    found = cases(folder)
    work = Path(next((a for a in sys.argv[1:] if not a.startswith("-")), folder))
    work.mkdir(exist_ok=True)
    for name, data in seeds(found).items():
        (work / f"seed-{name.replace(' ', '-')}").write_bytes(data)

    def one(data: bytes) -> Any:
        replay(data, found, folder / "m.safetensors")

    atheris.Setup(sys.argv, one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
