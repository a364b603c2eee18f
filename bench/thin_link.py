"""How long a model takes over a thin link: two processes, a socket between them, and the bits at both ends compared.

    python bench/thin_link.py                                   # both ends on this machine

    python bench/thin_link.py receive --port 5000               # or each end by itself
    python bench/thin_link.py send --port 5000

The receiver has the architecture, the plan and the seed, no weights. Each model is sent once in full and once as an update,
after some more steps of training; the receiver answers with the digest of all weights that it then has. Nobody is
authenticated and nothing is encrypted: other addresses than the machine's own are refused without --open.
"""

from __future__ import annotations

import argparse
import copy
import ipaddress
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fxrpg  # noqa: E402
from fxrpg.checkpoint import file_size, plain_tensor  # noqa: E402
from fxrpg.digest import PLAN  # noqa: E402
from fxrpg.errors import FxrpgError  # noqa: E402
from fxrpg.header import tensors_digest  # noqa: E402
from fxrpg.networks import resnet20  # noqa: E402

BITS_PER_SECOND = 100
SEED = 7
LOOPBACK = "127.0.0.1"
PREFIX = 4
"""Bytes of a frame's length, which come before it, highest first."""
DELTA_HEADER = 1 << 10
"""More bytes than a delta has beside its tensors."""

PLANS: dict[str, dict[str, Any]] = {
    "dense": {},
    "ring, 1,000": {"dof": 1_000, "plan": [fxrpg.Rule("*", "generate")]},
    "PRANC, 1,000": {"dof": 1_000, "method": fxrpg.Pranc(norms=True)},
}
"""Model -> arguments of transform: of a ResNet-20, PRANC generates all parameters, the ring all but those of norms."""


class Link:
    """Frames over a connected socket: a length, then so many bytes. Each has to pass whole within `seconds`."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection, self.seconds = connection, seconds

    def send(self, data: bytes) -> int:
        """Send one frame. Returns the bytes that went out."""
        frame = len(data).to_bytes(PREFIX, "big") + data
        self.connection.settimeout(self.seconds)
        with _told("must take a frame"):
            self.connection.sendall(frame)
        return len(frame)

    def receive(self, most: int) -> bytes:
        """The next frame. Raises FxrpgError if it is of more than `most` bytes, late, or cut off."""
        deadline = time.monotonic() + self.seconds
        size = int.from_bytes(self._exactly(PREFIX, deadline), "big")
        if size > most:
            raise FxrpgError("link", f"a frame must have at most {most:,} bytes", f"{size:,}", "Check the sender.")
        return self._exactly(size, deadline)

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts, left = [], size
        with _told(f"must send {size:,} bytes"):
            while left:
                self.connection.settimeout(max(1e-3, deadline - time.monotonic()))
                part = self.connection.recv(min(left, 1 << 16))
                if not part:
                    raise ConnectionError(f"the end after {size - left:,}")
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
                parts.append(part)
                left -= len(part)
        return b"".join(parts)


@contextmanager
def _told(must: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise FxrpgError("link", f"the other end {must}", str(e), "See what it says, and start both again.") from e


def checked_host(host: str, allow_others: bool) -> str:
    """`host`, an IP address, unless it is another machine's and those are not allowed."""
    try:
        mine = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise FxrpgError("--host", "must be an IP address", repr(host), f"Pass one such as {LOOPBACK}.") from None
    if not mine and not allow_others:
        fix = "Pass --open on a network that you trust: nothing here is authenticated."
        raise FxrpgError("--host", "must be this machine's own", host, fix)
    return host


def build(name: str) -> nn.Module:
    """A model as the receiver has it: with weights of its own, none of the sender's."""
    arguments = PLANS[name]
    return fxrpg.transform(resnet20(), seed=SEED, **arguments) if arguments else resnet20()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all tensors of the ordinary model that `model` is or stands for."""
    dense = fxrpg.materialize(model) if PLAN in vars(model) else model
    return tensors_digest({name: plain_tensor(tensor) for name, tensor in dense.state_dict().items()})


def trained(model: nn.Module, steps: int, first: int = 0) -> nn.Module:
    """A copy after some steps of Adam on noise: what a link sees of training, without a data set."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 32, 32, generator=random)
        labels = torch.randint(10, (8,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def serve(listener: socket.socket, seconds: float) -> None:
    """Receive models from one sender until it says that it has no more."""
    listener.settimeout(seconds)
    with _told("must connect"):
        connection, _address = listener.accept()
    with connection:
        link = Link(connection, seconds)
        while name := link.receive(most=64).decode(errors="replace"):
            if name not in PLANS:
                raise FxrpgError("link", f"must name one of {[*PLANS]}", repr(name), "Check the sender.")
            model = build(name)
            most = sum(tensor.nbytes for tensor in model.state_dict().values()) * 2 + DELTA_HEADER
            for _message in range(2):
                model = fxrpg.apply_delta(model, link.receive(most))
                link.send(weights_digest(model).encode())


@dataclass(frozen=True)
class Row:
    """What one model cost: bytes of its file (None for the dense one), of both messages, and whether the ends agree."""

    model: str
    file: int | None
    first: int
    update: int
    same: bool


def send(link: Link, steps: int) -> Iterator[Row]:
    """Send each model, then what some more steps changed in it. The receiver's own first weights are others."""
    torch.manual_seed(SEED)
    for name in PLANS:
        before = trained(build(name), steps)
        after = trained(before, steps, first=steps)
        link.send(name.encode())
        sizes, same = [], []
        for old, new in ((None, before), (before, after)):
            sizes.append(link.send(fxrpg.delta(old, new)))
            same.append(link.receive(most=64).decode(errors="replace") == weights_digest(new))
        yield Row(name, file_size(after) if PLANS[name] else None, *sizes, all(same))
    link.send(b"")


def table(rows: Sequence[Row]) -> str:
    def seconds(size: int) -> str:
        return f"{size * 8 / BITS_PER_SECOND:,.0f} s"

    lines = [
        (
            row.model,
            "" if row.file is None else f"{row.file:,}",
            f"{row.first:,}",
            seconds(row.first),
            f"{row.update:,}",
            seconds(row.update),
            "yes" if row.same else "NO",
        )
        for row in rows
    ]
    rate = f"at {BITS_PER_SECOND} bit/s"
    headers = ["ResNet-20", "file, bytes", "all of it, bytes", rate, "update, bytes", rate, "same bits"]
    return tabulate(lines, headers, colalign=("left", *["right"] * 5, "left"), disable_numparse=True)


def both_ends(seconds: float, steps: int) -> list[Row]:
    """The receiver in a process of its own on this machine, the sender here."""
    command = [sys.executable, __file__, "receive", "--port", "0", "--timeout", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            words = receiver.stdout.readline().split() if receiver.stdout else []
            if not words:
                raise FxrpgError("link", "the receiver must start", "an error", "See what it says.")
            return _sent(LOOPBACK, int(words[-1]), seconds, steps)
        finally:
            try:
                receiver.wait(seconds)
            except subprocess.TimeoutExpired:
                receiver.kill()


def _sent(host: str, port: int, seconds: float, steps: int) -> list[Row]:
    with _told("must listen"):
        connection = socket.create_connection((host, port), seconds)
    with connection:
        return list(send(Link(connection, seconds), steps))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Send models over a thin link and compare the bits at both ends.")
    parser.add_argument("end", nargs="?", choices=["both", "send", "receive"], default="both")
    parser.add_argument("--host", default=LOOPBACK, help="IP address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="0 lets the receiver choose (default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="allow other machines; nothing is authenticated")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one frame (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="of training before each message (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        host = checked_host(arguments.host, arguments.open)
        if arguments.end == "receive":
            with socket.create_server((host, arguments.port)) as listener:
                print(f"listening on {host}, port {listener.getsockname()[1]}", flush=True)
                serve(listener, arguments.timeout)
            return 0
        where = host, arguments.port, arguments.timeout, arguments.steps
        rows = both_ends(*where[2:]) if arguments.end == "both" else _sent(*where)
    except (FxrpgError, OSError) as e:
        print(f"thin_link: {e}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0 if all(row.same for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
