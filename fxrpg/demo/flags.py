"""The flags of `fxrpg demo --data`, and the job that they describe."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fxrpg.demo.vision import Job
from fxrpg.errors import FxrpgError
from fxrpg.networks import NETWORKS
from fxrpg.pictures import SETS
from fxrpg.ranks import started_together
from fxrpg.schedules import SCHEDULES
from fxrpg.steps import AMP

TRAINING = ("accumulate", "clip", "amp", "ema", "seed", "workers", "snapshot_every", "log_every")
"""Flags that are fields of `Training` as they are."""


def add_flags(command: argparse.ArgumentParser, add_transform: Callable[[Any], None]) -> None:
    """Everything that needs --data. `add_transform` adds what decides how a model is transformed."""
    group = command.add_argument_group("your own pictures", "Train a model by a method, as its paper does.")
    before = set(vars(command.parse_args([])))
    group.add_argument("--data", choices=SETS, help="what the pictures are; needs torchvision (fxrpg[vision])")
    group.add_argument(
        "--root", type=Path, help="the folder that they lie in (imagefolder: ROOT/train/CLASS, ROOT/val/CLASS)"
    )
    group.add_argument("--download", action="store_true", help="fetch CIFAR to ROOT if it is not there")
    group.add_argument("--side", type=int, default=224, help="pixels, of an imagefolder (default: %(default)s)")
    names = ", ".join(name for name in NETWORKS if "-256-" not in name and "-8" not in name)
    group.add_argument(
        "--model", default="resnet20",
        help=f"{names} (also with 256, and 8 layers), one of torchvision.models, or package.module:callable of your own "
        "(default: %(default)s)",
    )  # fmt: skip
    add_transform(group)
    train = command.add_argument_group("its training")
    recipes = ", ".join(SCHEDULES)
    train.add_argument("--recipe", default="", help=f"{recipes} (default: by method, data and model)")
    train.add_argument("--batch", type=int, help="pictures a step, over all processes (default: the recipe's)")
    train.add_argument("--lr", type=float, help="highest learning rate (default: the recipe's)")
    train.add_argument(
        "--active", type=int, help="coefficients of PRANC that move in an epoch, 0 for all (default: the recipe's)"
    )
    train.add_argument("--no-norm-decay", action="store_true", help="no weight decay for norms and biases")
    train.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    train.add_argument("--clip", type=float, help="largest norm of the gradient")
    train.add_argument("--amp", choices=[name for name in AMP if name], default="", help="mixed precision")
    train.add_argument(
        "--ema", type=float, help="decay of an average of the parameters, such as 0.999; tested in their place"
    )
    train.add_argument("--device", default="", help="cpu or cuda (default: a GPU if there is one)")
    train.add_argument("--workers", type=int, default=0, help="processes that load pictures (default: %(default)s)")
    train.add_argument("--log-every", type=int, default=100, help="steps between two lines (default: %(default)s)")
    train.add_argument("--tensorboard", action="store_true", help="curves in OUT/tensorboard (fxrpg[tensorboard])")
    train.add_argument("--snapshot-every", type=int, default=500, help="steps (default: %(default)s)")
    train.add_argument(
        "--resume", action="store_true", help="go on where the run in OUT was interrupted, if there is one"
    )
    added = set(vars(command.parse_args([]))) - before
    command.set_defaults(needs_data={name: command.get_default(name) for name in added})


def check_no_data(arguments: argparse.Namespace) -> None:
    """Without --data nothing that needs it."""
    if started_together():
        fix = "Pass --data, or start one process."
        raise FxrpgError("demo", "on digits, runs in one process", f"WORLD_SIZE={os.environ['WORLD_SIZE']}", fix)
    for name, default in arguments.needs_data.items():
        flag = f"--{name.replace('_', '-')}"
        given = any(word.partition("=")[0] == flag for word in arguments.argv)  # with its default, maybe
        if given or getattr(arguments, name) != default:
            fix = "Pass --data cifar10 --root FOLDER, or leave it out."
            raise FxrpgError(flag, "needs --data, pictures of your own", "none", fix)


def job_of(arguments: argparse.Namespace, transform: Callable[[nn.Module], nn.Module]) -> Job:
    """What the flags ask for. `transform` makes a model one of theirs; not called for "dense"."""
    if arguments.root is None:
        raise FxrpgError("--root", "must name the folder of the pictures", "none", "Pass --root FOLDER.")
    if arguments.seeds is not None:
        raise FxrpgError("--seeds", "is for the digits", "--data", "Pass --seed, once for each run.")
    dense = arguments.method == "dense"
    how = {name: getattr(arguments, name) for name in ("dof", "set", "scope", "rule")}
    if dense and any(how[name] for name in ("dof", "set", "rule")):
        name = next(name for name in ("dof", "set", "rule") if how[name])
        raise FxrpgError(f"--{name}", "is for ring, pranc and pemn", "--method dense", "Leave it out.")
    options = {name: getattr(arguments, name) for name in TRAINING}
    options |= {name: getattr(arguments, name) for name in ("epochs", "batch") if getattr(arguments, name) is not None}
    return Job(
        data=arguments.data,
        root=arguments.root,
        out=arguments.out,
        model=arguments.model,
        method=arguments.method,
        transform=None if dense else transform,
        how={name: str(value) for name, value in how.items()},
        recipe=arguments.recipe,
        training=options,
        lr=arguments.lr,
        active=arguments.active,
        decay_norms=not arguments.no_norm_decay,
        side=arguments.side,
        download=arguments.download,
        device=arguments.device,
        tensorboard=arguments.tensorboard,
        resume=arguments.resume,
        again=_again(arguments.argv),
    )


def _again(argv: list[str]) -> str:
    """The command that goes on after an interruption."""
    start = "fxrpg demo"
    if started_together():
        start = f"torchrun --nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', '')} -m fxrpg.demo"
    return shlex.join([*start.split(), *(word for word in argv[1:] if word != "--resume"), "--resume"])
