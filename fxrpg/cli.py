"""The command line: `fxrpg demo | explain | info | pack | unpack | verify`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tabulate import tabulate
from torch import nn

from fxrpg import checkpoint, demo, header
from fxrpg.api import transform
from fxrpg.errors import FxrpgError
from fxrpg.explain import explain
from fxrpg.fit import fit
from fxrpg.ledger import ledger
from fxrpg.plan import Rule
from fxrpg.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after a mistake of the user's, told in one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (FxrpgError, OSError) as e:
        print(f"fxrpg {arguments.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. Run `{self.prog} --help` for an example.", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxrpg",
        description="PyTorch models whose weights are generated from a few free numbers.",
        epilog="example: fxrpg demo",
    )
    parser.add_argument("--version", action="version", version=f"fxrpg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "demo", _demo, "train ring models on handwritten digits", "fxrpg demo --out results")
    command.add_argument(
        "--out", type=Path, default=Path("fxrpg-demo"), help="folder for files and plot (default: %(default)s)"
    )
    command.add_argument("--epochs", type=int, help="passes over the training images, for each model")
    command.add_argument("--seeds", type=int, help="runs of each size")

    command = _command(
        commands,
        "explain",
        _explain,
        "what would be generated, and how",
        "fxrpg explain torchvision.models:resnet18 --dof 0.1",
    )
    _add_model(command)
    _add_transform(command)

    command = _command(commands, "info", _info, "what a packed file holds", "fxrpg info resnet18.safetensors")
    command.add_argument("file", type=Path)

    command = _command(
        commands,
        "pack",
        _pack,
        "transform a model and write its file",
        "fxrpg pack my_models:build --dof 2359296 --weights trained.pt --out packed.safetensors",
    )
    _add_model(command)
    _add_transform(command)
    command.add_argument("--out", type=Path, required=True, help="the file to write")
    command.add_argument(
        "--weights",
        type=Path,
        help="a state_dict (.pt or .safetensors): of the transformed model, taken as it is; of the plain one, projected",
    )
    command.add_argument("--withhold-seed", action="store_true", help="leave the seed out of the file (no encryption)")

    command = _command(
        commands,
        "unpack",
        _unpack,
        "write the full weights of a packed file",
        "fxrpg unpack packed.safetensors --out dense.safetensors",
    )
    command.add_argument("file", type=Path)
    command.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    command.add_argument("--seed", type=int, help="where the file withholds it")

    command = _command(
        commands, "verify", _verify, "check every byte of a packed file", "fxrpg verify packed.safetensors"
    )
    command.add_argument("file", type=Path)
    command.add_argument("--seed", type=int, help="where the file withholds it")
    command.add_argument("--model", help="also load the file into this model (package.module:callable)")
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, example: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
    )
    command.set_defaults(run=run)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="package.module:callable that builds the model without arguments")


def _add_transform(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dof", required=True, type=_number, help="degrees of freedom: a whole number, or a fraction such as 0.1"
    )
    command.add_argument("--method", default="ring", help="method (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    command.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="PATTERN=ACTION",
        help='such as "fc.*=dense"; first match counts',
    )


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None


def _rule(text: str) -> tuple[str, str]:
    pattern, separator, action = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be PATTERN=ACTION, found {text!r}")
    return pattern, action


def build(spec: str, device: str | None = None) -> nn.Module:
    """The model that `package.module:callable` builds; modules in the current folder are found too.

    Raises:
        FxrpgError: the module or the callable does not exist, fails, or builds something else.
    """
    where, fix = f"model {spec!r}", "Write package.module:callable, such as torchvision.models:resnet18."
    module_name, separator, attribute = spec.partition(":")
    if not separator or not module_name or not attribute:
        raise FxrpgError(where, "must name a module and a callable", repr(spec), fix)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as e:
        raise FxrpgError(where, "must be importable", f"{type(e).__name__}: {e}", fix) from None
    try:
        with torch.device(device) if device else torch.device("cpu"):
            model = target()
    except Exception as e:
        raise FxrpgError(where, "must build without arguments", f"{type(e).__name__}: {e}", fix) from e
    if not isinstance(model, nn.Module):
        raise FxrpgError(where, "must build a torch.nn.Module", type(model).__name__, fix)
    return model


def _transform(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    rules = [Rule(pattern, action) for pattern, action in arguments.rule]
    return transform(model, dof=arguments.dof, method=arguments.method, seed=arguments.seed, plan=rules)


def _demo(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("epochs", "seeds") if getattr(arguments, name) is not None}
    demo.run(demo.Demo(out=arguments.out, **given))


def _explain(arguments: argparse.Namespace) -> None:
    small = _transform(build(arguments.model, "meta"), arguments)
    print(explain(small))
    print()
    print(ledger(small))


def _info(arguments: argparse.Namespace) -> None:
    contents = checkpoint.read(arguments.file)
    fields = contents.fields
    generated = sum(torch.Size(row["shape"]).numel() for row in fields["table"])
    settings = ", ".join(f"{key}={value}" for key, value in fields["settings"].items())
    rows = [
        ["format", fields["format"]],
        ["method", f"{fields['method']} ({settings})"],
        ["seed", fields["seed"]],
        ["degrees of freedom", f"{fields['size']:,}"],
        [
            "generated weights",
            f"{generated:,} in {len(fields['table'])} tensors ({generated / fields['size']:.2f} each)",
        ],
        ["stored tensors", f"{len(contents.tensors)}, {sum(t.numel() for t in contents.tensors.values()):,} numbers"],
        ["bytes", f"{arguments.file.stat().st_size:,}"],
        ["digest", f"{fields['digest']} (verified)"],
    ]
    print(tabulate(rows, disable_numparse=True))
    print()
    table = [
        [row["name"], "x".join(map(str, row["shape"])), row["offset"], f"{row['scale']:.6g}"] for row in fields["table"]
    ]
    print(tabulate(table, ["weight", "shape", "offset", "scale"]))


def _pack(arguments: argparse.Namespace) -> None:
    model = build(arguments.model)
    weights = _read_weights(arguments.weights) if arguments.weights else None
    if weights is None:
        small = _transform(model, arguments)
    elif any(name.startswith("fxrpg_") for name in weights):
        small = _transform(model, arguments)
        _load_weights(small, weights, arguments.weights)
    else:
        _load_weights(model, weights, arguments.weights)
        fitted = fit(_transform(model, arguments), model)
        small = fitted.model
        print(f"projected {arguments.weights}: {fitted}; train before use")
    checkpoint.save(small, arguments.out, withhold_seed=arguments.withhold_seed)
    print(ledger(small))
    print(f"wrote {arguments.out}")


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state_dict from a file, read without running code from it."""
    fix = "Pass a state_dict saved by torch.save or safetensors."
    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError:
        raise
    except (SafetensorError, Exception) as e:
        raise FxrpgError(str(path), "must be a readable state_dict", f"{type(e).__name__}: {e}", fix) from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise FxrpgError(str(path), "must hold a dict of tensors", type(found).__name__, fix)
    return found


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        fix = "Pass the model, dof, seed and rules that the weights belong to."
        raise FxrpgError(str(path), "must fit the model", " ".join(str(e).split())[:300], fix) from None


def _unpack(arguments: argparse.Namespace) -> None:
    tensors = checkpoint.unpack(arguments.file, arguments.seed)
    # tied tensors are written under each of their names: safetensors shares no storage
    checkpoint.write_tensors(arguments.out, {name: t.clone() for name, t in tensors.items()}, {"format": "pt"})
    print(f"wrote {arguments.out}: {sum(t.numel() for t in tensors.values()):,} numbers in {len(tensors)} tensors")


def _verify(arguments: argparse.Namespace) -> None:
    contents = checkpoint.read(arguments.file)
    seed = arguments.seed
    if contents.fields["seed"] == header.WITHHELD and seed is None:
        print(f"{arguments.file}: every byte verified; the seed is withheld, pass --seed to verify it")
        return
    if arguments.model:
        checkpoint.load(build(arguments.model), arguments.file, seed=seed)
    contents.plan(arguments.file, seed)
    print(f"{arguments.file}: every byte verified, the random functions draw as they did when it was written")
