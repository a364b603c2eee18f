"""Every shell command of the README runs as it stands there, in a folder that has what it names, on less data and time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_readme import BLOCKS

ROOT = Path(__file__).parents[1]
SHELL = [code for language, code in BLOCKS if language == "sh"]
LINES = [line.split("  #")[0].rstrip() for code in SHELL for line in code.splitlines() if line.strip()]

LESS = (
    (r"^(fxrpg demo|torchrun)", "--epochs 1 --batch 16"),
    (r"^fxrpg sweep --script", "--steps 2"),
    (r"^fxrpg sweep --method", "--epochs 1 --seeds 2"),
    (r"^fxrpg sweep", "--epochs 1 --seeds 1 --dof 256,1024"),
    (r"^fxrpg bench", "--seconds 3 --out build"),
    (r"^fxrpg", ""),
)
"""What is written behind a command, so that it does less of the same."""

ELSEWHERE = {
    "make test": "it is what runs this test",
    "make demo": "the demo is tested in test_digits.py",
}
NEEDS_TORCHVISION = [line for line in LINES if "torchvision" in line or "resnet50" in line]

MODELS = """
from torch import nn
def build():
    layers = nn.Conv2d(3, 64, 3, 2), nn.ReLU(), nn.Conv2d(64, 128, 3, 2), nn.ReLU(), nn.Conv2d(128, 128, 3, 2), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
"""

# Python imports this by itself: pictures without a data set, and torchvision beside a torch that it was not built for.
SITE = """
import os, sys
if "PICTURES" in os.environ and sys.argv[0].endswith(("fxrpg", "-m")):
    import torch
    torch.set_num_threads(1)
    if os.environ["PICTURES"] == "torchvision":
        sys.path.append(os.environ["ROOT"])
        from bench.zoo.torchvision_cpu import make_importable
        make_importable()
    from fxrpg.demo import vision
    from test_vision import few_pictures
    vision.load_pictures = few_pictures
"""


def run(line: str, folder: Path, pictures: str = "few") -> str:
    """What the command prints, as a shell in that folder runs it."""
    more = next((more for pattern, more in LESS if re.match(pattern, line)), None)
    assert more is not None, f"say in LESS how to run {line!r}"
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join(map(str, (folder / "site", ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PICTURES": pictures, "ROOT": str(ROOT)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        f"{line} {more}",
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of the user's own that the README's commands name."""
    if shutil.which("fxrpg", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs the command fxrpg beside this Python (`make test` installs it)")
    (tmp_path / "my_models.py").write_text(MODELS)
    script = next(code for language, code in BLOCKS if language == "python" and '"--dof"' in code)
    (tmp_path / "train.py").write_text(script)
    names: dict = {}
    exec(MODELS, names)
    torch.save(names["build"]().state_dict(), tmp_path / "trained.pt")
    return tmp_path


@pytest.mark.parametrize("number", range(len(SHELL)))
def test_block(number, folder):
    """The commands of one block in their order, since one may read what another wrote."""
    lines = [line.split("  #")[0].rstrip() for line in SHELL[number].splitlines() if line.strip()]
    for line in lines:
        if line not in ELSEWHERE and line not in NEEDS_TORCHVISION:
            run(line, folder)


@pytest.mark.zoo
@pytest.mark.parametrize("line", NEEDS_TORCHVISION)
def test_with_torchvision(line, folder):
    run(line, folder, "torchvision")


def test_every_command_is_run_or_said_why_not():
    assert set(ELSEWHERE) <= set(LINES)
    assert len(LINES) - len(ELSEWHERE) >= 20
