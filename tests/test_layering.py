"""Imports flow one way: a file imports only from files of its own storey or below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STOREYS = {
    "errors": 0, "functions": 0, "hashing": 0, "device": 0, "packing": 0, "fixed_point": 0, "least_squares": 0,
    "straight_through": 0, "version": 0, "geometry": 0, "native": 0, "atomic": 0, "container": 0, "onnx_export": 0,
    "building": 0, "networks": 0, "pictures": 0, "batches": 0, "ranks": 0, "stopping": 0, "snapshots": 0, "journal": 0,
    "collecting": 1, "view": 1, "generator": 1, "roles": 1, "shares": 1, "trace": 1, "basis": 1, "rule": 1, "addresses": 1,
    "plan": 2, "scopes": 2, "lowering": 2, "staging": 2, "parts": 2, "recipes": 2, "dispatch": 2, "fusing": 2, "tiles": 2,
    "epilogue": 2, "folding": 2, "weights": 2, "recording": 2,
    "surroundings": 3, "digest": 3, "handle": 3, "several": 3, "owner": 3, "regions": 3, "generators": 3,
    "kernels": 4,
    "passes": 5,
    "assemble": 6, "optimizers": 6, "ties": 6, "proof": 6, "region_search": 6, "examples": 6, "api": 6, "header": 6,
    "validation": 6, "filling": 6, "checkpoint": 6, "channels": 6, "channel_groups": 6, "compact": 6, "recurrence": 6,
    "training": 6, "distributed": 6, "ledger": 6, "fit": 6, "explain": 6, "dynamo": 6, "discovery": 6, "pretrained": 6,
    "schedules": 6, "steps": 6, "trainer": 6, "delta": 6, "hub": 6, "parameter_groups": 6,
    "cli": 7, "demo": 7, "sweep": 7, "__init__": 7, "__main__": 7,
}  # fmt: skip
FOLDERS = [
    *("fxrpg", "fxrpg/demo", "fxrpg/generators", "fxrpg/sweep", "fxrpg/tiles"),
    *("kernels", "kernels/fused", "kernels/native", "passes"),
]
FILES = [p for folder in FOLDERS for p in sorted((ROOT / folder).glob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "fxrpg" else ("fxrpg", *parts))


def imported(path: Path) -> list[str]:
    """Every name of the project that the file imports, at any depth of its code."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [
                f"{node.module}.{alias.name}" if node.module == "fxrpg" else str(node.module) for alias in node.names
            ]
    return [name for name in names if name.startswith("fxrpg")]


def storey(name: str) -> int:
    parts = name.split(".")
    return STOREYS[parts[1]] if len(parts) > 1 else STOREYS["__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = module_name(path)
    for name in imported(path):
        assert storey(name) <= storey(mine), f"{mine} imports {name}"


def test_every_file_has_a_storey():
    assert {module_name(path).split(".")[1] for path in FILES} == set(STOREYS)


def test_kernels_and_passes_are_the_folders_at_the_root():
    for folder in ("kernels", "passes"):
        link = ROOT / "fxrpg" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
        assert not (ROOT / folder / "__init__.py").exists()


def test_files_and_functions_stay_small():
    """A file of over 300 lines, or a function of over 45, needs a reason; here are those that have one."""
    reasons = {
        "fxrpg/handle.py": "the handle and the two ways of consuming it call one another",
        "fxrpg/cli.py": "its parser is a table",
        "fxrpg/demo/digits.py": "a program: model, training, table and picture",
    }
    for path in FILES:
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if name in reasons:
            continue
        assert text.count("\n") <= 300, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{name}: {node.name}"
