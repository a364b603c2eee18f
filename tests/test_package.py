"""Importing costs little and asks for nothing; wheel, sdist and editable install hold everything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(*folders: str) -> list[str]:
    """The modules that lie in folders of the package."""
    return [
        ".".join(("fxrpg", *path.relative_to(ROOT / "fxrpg").with_suffix("").parts))
        for folder in folders
        for path in sorted((ROOT / "fxrpg" / folder).glob("*.py"))
        if not path.name.startswith("__")
    ]


MODULES = modules("", "demo", "generators", "kernels", "passes", "sweep")
KERNELS = modules("tiles", "kernels/fused")
"""They need Triton."""
TRITON = importlib.util.find_spec("triton") is not None


def python(code: str, *args: str, **env: str) -> str:
    """What a fresh interpreter prints; the project is imported from the checkout unless `env` says otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_makes_no_cuda_query_and_needs_no_triton():
    """torch.cuda is made to raise, Triton is made absent, and every module is imported."""
    code = """
import importlib, importlib.util, json, sys, torch
def refuse(*args, **kwargs): raise AssertionError("CUDA was asked")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, refuse)
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton": raise ImportError("no triton")
sys.meta_path.insert(0, NoTriton())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import fxrpg
for name in json.loads(sys.argv[1]): importlib.import_module(name)
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
model = fxrpg.transform(torch.nn.Linear(3, 5), dof=4, plan=[fxrpg.Rule("*", "generate")])
model(torch.randn(2, 3)).sum().backward()
try:
    with fxrpg.lowering_mode("fused"): pass
except fxrpg.FxrpgError as e: print(e)
"""
    out = python(code, json.dumps([name for name in MODULES if name != "fxrpg.demo.digits"]))
    assert "needs the package triton" in out
    assert "pip install triton" in out


@pytest.mark.skipif(not TRITON, reason="imports kernels; needs the package triton (Linux)")
def test_importing_kernels_makes_no_cuda_query():
    code = """
import importlib, json, sys, torch, triton
def refuse(*args, **kwargs): raise AssertionError("CUDA was asked")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, refuse)
for name in json.loads(sys.argv[1]): importlib.import_module(name)
"""
    python(code, json.dumps(KERNELS))


def test_quiet_when_used():
    """Nothing is printed or logged by transforming and running a model."""
    code = """
import sys, torch, fxrpg
model = fxrpg.transform(torch.nn.Linear(3, 5), dof=4, plan=[fxrpg.Rule("*", "generate")])
model(torch.randn(2, 3)).sum().backward()
torch.einsum("bi,oi->bo", torch.randn(2, 3), model.weight)
fxrpg.materialize(fxrpg.fit(model, fxrpg.materialize(model)).model)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_loads_nothing_heavy():
    code = """
import sys, torch
before = set(sys.modules)
import fxrpg
print(" ".join(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    loaded = set(python(code).split())
    assert not loaded & {"triton", "sklearn", "matplotlib", "scipy", "hypothesis", "pytest"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the repository holds, with its symbolic links."""
    copy = tmp_path_factory.mktemp("checkout") / "fxrpg"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


CHECK = """
import importlib, json, site, sys
site.addsitedir(sys.argv[1])
sys.path += json.loads(sys.argv[2])
import fxrpg, torch
for name in json.loads(sys.argv[3]): importlib.import_module(name)
model = fxrpg.transform(torch.nn.Linear(3, 5), dof=4, plan=[fxrpg.Rule("*", "generate")])
model(torch.randn(2, 3))
from fxrpg.dispatch import CONFIGS, cards
assert {card.name for card in cards()} == set(json.loads(sys.argv[4])), CONFIGS
print(fxrpg.__file__)
"""
CARDS = [path.stem for path in (ROOT / "kernels" / "configs").glob("*.json")]


def installed_from(folder: Path) -> str:
    """Where fxrpg comes from with `folder` as a site directory. The environment's own packages are on the path, but its
    .pth files, by which the project itself may be installed there, are not read (-S)."""
    arguments = [str(folder), json.dumps(site.getsitepackages())]
    arguments += [json.dumps(MODULES + KERNELS * TRITON), json.dumps(CARDS)]
    command = [sys.executable, "-I", "-S", "-c", CHECK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sdist_and_wheel(checkout, tmp_path):
    """The wheel is built from the sdist, as an index would serve it."""
    run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(checkout), cwd=tmp_path)
    (wheel,), (_sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert CARDS
    held = [module.replace(".", "/") + ".py" for module in MODULES + KERNELS]
    held += [f"fxrpg/kernels/configs/{card}.json" for card in CARDS]
    held.append("fxrpg/sweep/report.html")
    assert not set(held) - names
    assert "fxrpg/py.typed" in names
    assert not any(name.startswith(("kernels/", "passes/", "tests/")) for name in names), "no top-level `kernels`"
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    assert installed_from(target).startswith(str(target))


def test_editable_install(checkout, tmp_path):
    target = tmp_path / "prefix"
    run(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed",
        "--prefix", str(target), "--editable", str(checkout), cwd=tmp_path,
    )  # fmt: skip
    (folder,) = target.glob("lib/python*/site-packages")
    assert installed_from(folder).startswith(str(checkout))
