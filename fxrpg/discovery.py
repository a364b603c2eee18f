"""Where torch.compile finds the backend "fxrpg": by the package's entry point, which a checkout must bring itself."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxrpg.version import __version__

NAME = "fxrpg"
ENTRY = importlib.metadata.EntryPoint(NAME, "fxrpg.dynamo:compile_graph", "torch_dynamo_backends")
"""As in pyproject.toml."""


class Checkout(importlib.metadata.Distribution):
    """What would be on disk if the package were installed, as far as torch asks for it."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {__version__}\n",
            "entry_points.txt": f"[{ENTRY.group}]\n{ENTRY.name} = {ENTRY.value}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parents[1] / path


class Finder(importlib.metadata.DistributionFinder):
    """Tells importlib.metadata of the checkout, after all that is installed: an installed fxrpg comes first."""

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[Checkout]:
        context = context or importlib.metadata.DistributionFinder.Context()
        return [Checkout()] if context.name in (None, NAME) and context.path is sys.path else []


def announce() -> None:
    """Let torch find the backend. Loads neither Dynamo nor the backend: torch reads entry points when it looks for a name."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
    registry = sys.modules.get("torch._dynamo.backends.registry")
    if registry is not None:  # it may have read them already, and does so once
        registry._BACKENDS.setdefault(NAME, ENTRY)
