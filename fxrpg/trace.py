"""What becomes of generated weights when ops consume them."""

from __future__ import annotations

from typing import NamedTuple

from fxrpg.errors import FxrpgError


class Use(NamedTuple):
    """How an op last consumed a generated weight."""

    way: str
    path: str
    reason: str


class Trace:
    """What becomes of a model's generated weights: name -> consuming op -> its last use."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.seen: dict[str, dict[str, Use]] = {}
        self.expected: dict[str, dict[str, Use]] = {}
        """The same for what has been seen of nothing yet: until the weight is first consumed."""
        self.dropped: dict[str, str] = {}
        """Path of a module that keeps to its own forward where a region was tried -> why."""

    def expect(self, name: str, path: str, op: str, way: str) -> None:
        """Say how a weight will be consumed."""
        self.expected.setdefault(name, {})[op] = Use(way, path, "")

    def note(self, name: str, path: str, op: str, reason: str = "", way: str = "handle") -> None:
        """Record one consumption. In strict mode a weight that was not lowered raises."""
        self.expected.pop(name, None)
        self.seen.setdefault(name, {})[op] = Use(way, path, reason)
        if self.strict and path == "materialized":
            raise FxrpgError(
                name,
                f"{op} needs a lowering to consume a generated weight (strict=True)",
                reason,
                f'Transform with strict=False to materialize it, or leave it dense with Rule("{name}", "dense").',
            )
