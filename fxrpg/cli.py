"""The command line: `fxrpg demo | explain | info | pack | unpack | verify | sweep | bench`."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load as read_safetensors
from tabulate import tabulate
from torch import nn

from fxrpg import checkpoint, header
from fxrpg.api import transform
from fxrpg.building import build
from fxrpg.compact import freeze
from fxrpg.demo import digits, flags, vision
from fxrpg.errors import FxrpgError
from fxrpg.explain import explain
from fxrpg.fit import fit
from fxrpg.generator import Generator, generator_from
from fxrpg.ledger import ledger
from fxrpg.owner import SCALE
from fxrpg.plan import Plan, Scope
from fxrpg.rule import Rule
from fxrpg.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after a mistake of the user's, told in one line on stderr. `sweep`, `bench`: 1 too."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot write
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    code = 0
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FxrpgError, OSError) as e:
        print(f"fxrpg {arguments.command}: {_one_line(str(e))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fxrpg {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _one_line(text: str) -> str:
    """`text` in one line, without characters that would control the terminal (names come from files)."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {_one_line(message)}. Run `{self.prog} --help` for an example.", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxrpg",
        description="PyTorch models whose weights are generated from a few free numbers.",
        epilog="example: fxrpg demo",
    )
    parser.add_argument("--version", action="version", version=f"fxrpg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    example = "fxrpg demo --data cifar10 --root data --model resnet20 --method pranc --dof 10000"
    command = _command(commands, "demo", _demo, "train on handwritten digits, or on your own pictures", example)
    command.add_argument(
        "--out", type=Path, default=Path("fxrpg-demo"), help="folder for files and plot (default: %(default)s)"
    )
    command.add_argument(
        "--epochs", type=int, help="passes over the training images (default: 20; --data: the recipe's)"
    )
    command.add_argument("--seeds", type=int, help="runs of each size on digits (default: 3)")
    flags.add_flags(command, lambda group: _add_transform(group, "ring, pranc, pemn or dense"))

    example = "fxrpg explain torchvision.models:resnet18 --dof 0.1"
    command = _command(commands, "explain", _explain, "what would be generated, and how", example)
    _add_model(command)
    _add_transform(command)

    command = _command(commands, "info", _info, "what a packed file holds", "fxrpg info resnet18.safetensors")
    command.add_argument("file", type=Path, help="a packed file")

    example = "fxrpg pack my_models:build --dof 2359296 --weights trained.pt --out packed.safetensors"
    command = _command(commands, "pack", _pack, "transform a model and write its file", example)
    _add_model(command)
    _add_transform(command)
    command.add_argument("--out", type=Path, required=True, help="the file to write")
    command.add_argument(
        "--weights",
        type=Path,
        help="a state_dict (.pt or .safetensors): of the transformed model, taken as it is; of the plain one, projected",
    )
    command.add_argument("--withhold-seed", action="store_true", help="leave the seed out of the file (no encryption)")
    command.add_argument(
        "--freeze", action="store_true", help="pack for inference: masks as bits, a ring with --set bits=8 as its codes"
    )

    example = "fxrpg unpack packed.safetensors --out dense.safetensors"
    command = _command(commands, "unpack", _unpack, "write the full weights of a packed file", example)
    command.add_argument("file", type=Path, help="a packed file")
    command.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    command.add_argument("--seed", type=int, help="the seed, if the file withholds it")

    command = _command(
        commands, "verify", _verify, "check every byte of a packed file", "fxrpg verify packed.safetensors"
    )
    command.add_argument("file", type=Path, help="a packed file")
    command.add_argument("--seed", type=int, help="the seed, if the file withholds it")
    command.add_argument("--model", help="also load the file into this model (package.module:callable)")

    _add_sweep(commands)

    example = "fxrpg bench --quick --only 'layer/*'"
    command = _command(commands, "bench", _bench, "time layers, models and bases, each against a baseline", example)
    command.add_argument("--quick", action="store_true", help="a few cases: under 2 minutes in place of 8")
    command.add_argument("--only", default="", metavar="GLOB", help="only cases whose name matches, such as 'layer/*'")
    command.add_argument("--device", default="", help="cuda or cpu (default: a GPU if there is one)")
    command.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="(default: bfloat16, on a CPU float32)"
    )
    command.add_argument("--out", type=Path, help="folder for CSV, tables and pictures (default: bench/results)")
    command.add_argument("--seconds", type=float, help="stop after so many seconds (over 0), whatever is left")
    return parser


def _add_sweep(commands: Any) -> None:
    example = "fxrpg sweep --script train.py --dof 1000,10000,100000 --seeds 5 --within 0.5 --out sizes -- --epochs 10"
    summary = "train a grid of sizes and seeds, resumably; fit a power law and recommend a size"
    command = _command(commands, "sweep", _sweep, summary, example)
    command.add_argument("--dof", type=_numbers, help="sizes, separated by commas (default, for digits: by method)")
    command.add_argument("--seeds", type=int, default=3, help="runs of each size (default: %(default)s)")
    command.add_argument(
        "--script",
        type=Path,
        help="train with this script instead of on digits; it is run as `python SCRIPT --dof D --seed S ARGUMENTS`, without "
        "--dof for the dense baseline, and prints a line such as `accuracy: 0.93`, a fraction",
    )
    command.add_argument("arguments", nargs="*", metavar="ARGUMENTS", help="for the script; write them after --")
    command.add_argument("--method", help="of the digits: ring, pranc or pemn (default: ring)")
    command.add_argument(
        "--set", action="append", type=_setting, metavar="NAME=VALUE", help="a setting of the method; repeatable"
    )
    command.add_argument("--epochs", type=int, help="of the digits: passes over the images (default: 20)")
    command.add_argument("--no-dense", action="store_true", help="leave the dense baseline out")
    command.add_argument(
        "--within", type=float, default=1.0, help="points of accuracy below dense that are fine (default: %(default)s)"
    )
    command.add_argument("--jobs", type=int, help="runs at a time (default: one a core; 1 if a run fills a GPU)")
    command.add_argument("--threads", type=int, default=1, help="CPU threads of each run (default: %(default)s)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("fxrpg-sweep"),
        help="folder for results, resumed if there (default: %(default)s)",
    )


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
    )
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="package.module:callable that builds the model without arguments")


def _add_transform(command: argparse._ActionsContainer, methods: str = "ring, pranc or pemn") -> None:
    command.add_argument("--dof", type=_number, help="degrees of freedom: a whole number, or a fraction such as 0.1")
    command.add_argument("--method", default="ring", help=f"{methods} (default: %(default)s)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help='a setting of the method, such as "block=1" or "law=khatri_rao"; repeatable',
    )
    command.add_argument(
        "--scope",
        default="model",
        help="who shares a state: model, stage, block, position or layer (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    command.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="PATTERN=ACTION[:DOF]",
        help='"generate", "dense" or a method for parameters by name, such as "fc.*=dense" or "fc.*=pranc:20"; repeatable, '
        "the first match counts",
    )


def _number(text: str) -> int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"must be a number, found {text!r}")


def _numbers(text: str) -> tuple[int | float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, found {text!r}")
    value = {"true": "True", "false": "False"}.get(value, value)
    # TypeError: a list as a key; the last two: where it nests too deep
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return name, ast.literal_eval(value)
    return name, value


def _rule(text: str) -> tuple[str, str, int | float | None]:
    pattern, separator, action = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be PATTERN=ACTION, found {text!r}")
    action, separator, dof = action.partition(":")
    return pattern, action, _number(dof) if separator else None


def _transform(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    rules = [Rule(pattern, action, dof=dof) for pattern, action, dof in arguments.rule]
    method = _configured(arguments.method, dict(arguments.set))
    return transform(model, dof=arguments.dof, method=method, scope=arguments.scope, seed=arguments.seed, plan=rules)


def _configured(method: str, settings: dict[str, Any]) -> Generator:
    """The method with the settings of `--set`."""
    generator = generator_from(method)
    known = {f.name: type(getattr(generator, f.name)) for f in dataclasses.fields(generator)}
    for name, value in settings.items():
        if name not in known:
            must = f"must be one of {sorted(known)}, the settings of {method!r}"
            raise FxrpgError(f"--set {name}", must, repr(name), "Pass one of them.")
        if known[name] not in (type(None), type(value)):
            fix = "Pass such as block=1, reflect=False, law=uniform, keep=0.3."
            raise FxrpgError(f"--set {name}", f"must be of type {known[name].__name__}", repr(value), fix)
    return dataclasses.replace(generator, **settings)


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.data is not None:
        vision.run(flags.job_of(arguments, lambda model: _transform(model, arguments)))
        return
    flags.check_no_data(arguments)
    given = {name: getattr(arguments, name) for name in ("epochs", "seeds") if getattr(arguments, name) is not None}
    digits.run(digits.Demo(out=arguments.out, **given))


def _explain(arguments: argparse.Namespace) -> None:
    """On the meta device, where a model of any size costs nothing; on the CPU where its constructor needs values."""
    try:
        model = build(arguments.model, "meta")
        on_meta = all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    except FxrpgError:
        on_meta = False
    small = _transform(model if on_meta else build(arguments.model), arguments)
    print(explain(small))
    print()
    print(ledger(small))


def _info(arguments: argparse.Namespace) -> None:
    contents = checkpoint.read(arguments.file)
    fields, plan = contents.fields, header.plan_from(contents.fields, 0)
    counts = _counts(contents, plan)
    methods = [["method", _method(plan.scopes[0])]]
    if len(plan.scopes) > 1:
        methods = []
        for scope, count in zip(plan.scopes, counts, strict=True):
            dof, generated = _counted(count)
            name = _one_line(f"scope {scope.name or '(rest)'}")
            methods.append([name, f"{_method(scope)}, {dof} degrees of freedom, {generated}"])
    dof, generated = _counted([sum(column) for column in zip(*counts, strict=True)])
    rows = [
        ["format", fields["format"]],
        *methods,
        ["seed", fields["seed"]],
        ["degrees of freedom", dof],
        ["generated weights", generated],
        ["stored tensors", f"{len(contents.tensors)}, {sum(t.numel() for t in contents.tensors.values()):,} numbers"],
        ["bytes", f"{arguments.file.stat().st_size:,}"],
        ["digest", f"{fields['digest']} (verified)"],
    ]
    print(tabulate(rows, disable_numparse=True))
    print()
    several = len(plan.scopes) > 1
    table = [
        [
            _one_line(row["name"]),
            "x".join(map(str, row["shape"])),
            *[_one_line(plan.scopes[row["scope"]].name or "(rest)")] * several,
            row["offset"],
            f"{row['scale']:.6f}",
        ]
        for row in fields["table"]
    ]
    texts = [0, 2] if several else [0]  # a weight may be called 1e5
    columns = ["weight", "shape", *["scope"] * several, "offset", "scale"]
    print(tabulate(table, columns, floatfmt=".6g", disable_numparse=texts))


def _method(scope: Scope) -> str:
    """A scope's method with its settings, without those that are off as they are by default."""
    generator = scope.generator
    shown = [f for f in dataclasses.fields(generator) if f.default or getattr(generator, f.name) != f.default]
    settings = ", ".join(f"{f.name}={getattr(generator, f.name)}" for f in shown)
    return f"{generator.method} ({settings})" + (", frozen" if scope.frozen else "")


def _counts(contents: header.Contents, plan: Plan) -> list[list[int]]:
    """Of each scope the degrees of freedom (of a pruned state those that are left), generated weights, and tensors."""
    counts = [[scope.size, 0, 0] for scope in plan.scopes]
    for state, (first, *_) in plan.states.items():
        if state + header.KEPT in contents.tensors:
            counts[plan.scope_of[first]][0] += len(contents.tensors[state]) - plan.scope(first).size
    for name, view in plan.views.items():
        counts[plan.scope_of[name]][1] += view.count
        counts[plan.scope_of[name]][2] += 1
    return counts


def _counted(count: list[int]) -> tuple[str, str]:
    dof, generated, tensors = count
    each = f" ({generated / dof:.2f} each)" if dof else ""
    return f"{dof:,}", f"{generated:,} in {tensors} tensors{each}"


def _pack(arguments: argparse.Namespace) -> None:
    weights = _read_weights(arguments.weights) if arguments.weights else None
    _check_not_overwritten(arguments.weights, arguments.out)
    model = build(arguments.model)
    if weights is None:
        small = _transform(model, arguments)
    elif SCALE in weights:  # of the transformed model itself
        small = _transform(model, arguments)
        _load_weights(small, weights, arguments.weights)
    else:
        _load_weights(model, weights, arguments.weights)
        fitted = fit(_transform(model, arguments), model)
        small = fitted.model
        print(f"projected {arguments.weights}: {fitted}")
    small = freeze(small) if arguments.freeze else small
    checkpoint.save(small, arguments.out, withhold_seed=arguments.withhold_seed)
    print(ledger(small))
    print(f"wrote {arguments.out}" + ("" if weights else ", the model as it was initialised (no --weights)"))


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state_dict from a file, read without running code from it."""
    fix = "Pass a state_dict saved by torch.save or safetensors."
    if path.exists() and not path.is_file():
        raise FxrpgError(str(path), "must be a file", "a folder or a device", fix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of an archive of another kind, it says in the error too
            if path.suffix == ".safetensors":
                found = read_safetensors(path.read_bytes())  # not mapped: another process may cut the file short
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:
        raise FxrpgError(str(path), "must be a readable state_dict", f"{type(e).__name__}: {e}", fix) from None
    if not isinstance(found, dict):
        raise FxrpgError(str(path), "must hold a dict of tensors", type(found).__name__, fix)
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FxrpgError(str(path), "must hold a dict of tensors", f"{name!r}: {type(value).__name__}", fix)
    return found


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        fix = "Pass the model, dof, seed and rules that the weights belong to."
        raise FxrpgError(str(path), "must fit the model", " ".join(str(e).split())[:300], fix) from None


def _check_not_overwritten(source: Path | None, out: Path) -> None:
    if source and out.exists() and out.samefile(source):
        raise FxrpgError("--out", "must be another file than the one that is read", str(out), "Choose another path.")


def _unpack(arguments: argparse.Namespace) -> None:
    _check_not_overwritten(arguments.file, arguments.out)
    if arguments.out.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        fix = "Pass such as --out dense.safetensors; safetensors.torch.load_file reads it."
        raise FxrpgError("--out", "must name a safetensors file", str(arguments.out), fix)
    tensors = checkpoint.unpack(arguments.file, arguments.seed)
    checkpoint.write_tensors(arguments.out, tensors, {"format": "pt"})  # tied ones under each of their names
    print(f"wrote {arguments.out}: {sum(t.numel() for t in tensors.values()):,} numbers in {len(tensors)} tensors")


def _verify(arguments: argparse.Namespace) -> None:
    contents = checkpoint.read(arguments.file)
    if contents.fields["seed"] == header.WITHHELD and arguments.seed is None and not arguments.model:
        print(f"{arguments.file}: every byte verified; the seed is withheld, pass --seed to verify it")
        return
    contents.plan(arguments.file, arguments.seed)
    if arguments.model:
        checkpoint.load(build(arguments.model), arguments.file, seed=arguments.seed)
    loaded = f", and it loads into {arguments.model}" if arguments.model else ""
    print(f"{arguments.file}: every byte verified, the random functions draw as they did when it was written{loaded}")


def _sweep(arguments: argparse.Namespace) -> int:
    from fxrpg.sweep import run, task  # loads what only a sweep needs

    for_digits = {"--method": arguments.method, "--set": arguments.set, "--epochs": arguments.epochs}
    generator = _configured(arguments.method or "ring", dict(arguments.set or ()))
    sizes = arguments.dof or (() if arguments.script else task.DEFAULT_SIZES.get(generator.method, ()))
    grid = run.Grid(
        out=arguments.out,
        dofs=sizes,
        seeds=arguments.seeds,
        dense=not arguments.no_dense,
        within=arguments.within,
        jobs=arguments.jobs,
        threads=arguments.threads,
    )
    if arguments.script is None:
        if arguments.arguments:
            fix = "Pass --script, or leave them out."
            raise FxrpgError("ARGUMENTS", "are for a script", " ".join(arguments.arguments), fix)
        epochs = 20 if arguments.epochs is None else arguments.epochs
        return run.sweep(task.digits_task(generator, epochs, grid.dofs), grid)
    for option, value in for_digits.items():
        if value is not None:
            fix = f"Leave it out, or write what the script takes after --, such as -- {option} ..."
            raise FxrpgError(option, "is a setting of the digits, and --script decides for itself", repr(value), fix)
    return run.sweep(task.script_task(arguments.script, arguments.arguments), grid)


def _bench(arguments: argparse.Namespace) -> int:
    """The bench lies beside the package in a checkout, and is not installed with it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "cases.py").is_file():
        fix = "Clone the repository and run `python bench/run.py` there."
        raise FxrpgError("bench", "needs the folder bench of a checkout", f"no {root / 'bench'}", fix)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.run").run(arguments)
