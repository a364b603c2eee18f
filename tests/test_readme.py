"""The README's code runs, and what it shows is what comes out."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxrpg
from fxrpg.networks import resnet18

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def _marks(code: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.zoo] if "transformers" in code else []  # which the ordinary environment does not have


@pytest.mark.parametrize("number", [pytest.param(i, marks=_marks(code)) for i, code in enumerate(PYTHON)])
def test_python_block(number, tmp_path):
    code, warnings = PYTHON[number], "error,ignore:`torch.jit:DeprecationWarning"  # as in pyproject.toml
    if _marks(code):
        code, warnings = f"from bench.zoo.torchvision_cpu import make_importable\nmake_importable()\n{code}", "default"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": warnings}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_there_are_python_blocks():
    assert len(PYTHON) >= 18
    assert PYTHON[0].count("\n") <= 16


def test_the_ledger_is_the_one_shown():
    shown = next(code for language, code in BLOCKS if language == "text" and "degrees of freedom" in code)
    printed = str(fxrpg.ledger(fxrpg.transform(resnet18(), dof=2_359_296)))
    # the file's size depends on how many digits each scale has
    exact = [re.sub(r"\s+", " ", re.sub(r"11,6\d\d,\d\d\d", "11.6 MB", text)).strip() for text in (shown, printed)]
    assert exact[0] == exact[1]


def test_the_figures_of_a_cpu_are_those_of_the_file():
    sys.path.insert(0, str(ROOT))
    from bench import cpu

    with (ROOT / "bench" / "results" / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"<!-- cpu -->\n```text\n{cpu.table(rows)}\n```\n<!-- end of cpu -->" in README


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert f"make {target}" in README


def test_commands_are_known():
    shell = "".join(code for language, code in BLOCKS if language == "sh")
    used = set(re.findall(r"^fxrpg (\w+)", shell, flags=re.MULTILINE))
    done = subprocess.run(
        [sys.executable, "-m", "fxrpg", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert used
    assert all(command in done.stdout for command in used)
