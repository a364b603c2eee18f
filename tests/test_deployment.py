"""Models leave the machine: exported programs run in another process, materialized ones where fxrpg cannot be imported."""

from __future__ import annotations

import importlib
import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import fxrpg
from fxrpg import cli

ROOT = Path(__file__).parents[1]
EVERY = [fxrpg.Rule("*", "generate")]
METHODS = {
    "ring": {"dof": 0.2, "plan": EVERY},
    "pranc": {"dof": 20, "method": "pranc", "plan": EVERY},
    "pemn": {"dof": 0.1, "method": "pemn", "plan": EVERY},
}
CLASSES = {
    "resnet20": (("networks", "resnet20", {}), (2, 3, 16, 16)),
    "convmixer": (("networks", "convmixer", {"dim": 16, "depth": 2}), (2, 3, 8, 8)),
    "encoder": (
        ("torch.nn", "TransformerEncoderLayer", {"d_model": 16, "nhead": 2, "dim_feedforward": 32}),
        (5, 2, 16),
    ),
    "lstm": (("torch.nn", "LSTM", {"input_size": 8, "hidden_size": 16, "num_layers": 2}), (5, 2, 8)),
}
"""Model -> the class that a receiver has too (module, name, arguments), and the shape of an input."""


# the papers' networks as a module of the user's own, which needs no fxrpg
NETWORKS = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("networks", {str(ROOT / "fxrpg" / "networks.py")!r})
sys.modules["networks"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["networks"])
"""
exec(NETWORKS)


def build(name: str) -> nn.Module:
    (module, attribute, arguments), shape = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(importlib.import_module(module), attribute)(**arguments)
    model(torch.randn(shape))  # running statistics
    return model.eval()


def child(code: str, *arguments: str) -> str:
    """What another process prints: with one thread, as the tests have."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NETWORKS + code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_FXRPG = """
import importlib, json, sys, torch
from safetensors.torch import load_file
sys.modules["fxrpg"] = None  # importing it raises
torch.set_num_threads(1)
folder, classes = sys.argv[1], json.loads(sys.argv[2])
for name, (where, method) in ((name, pair) for name, pairs in classes.items() for pair in pairs):
    module, attribute, arguments = where
    prefix = f"{folder}/{name}-{method}"
    x, expected = torch.load(f"{prefix}.io")
    models = [torch.load(f"{prefix}.whole.pt", weights_only=False)]
    for state in (torch.load(f"{prefix}.pt", weights_only=True), load_file(f"{prefix}.unpacked.safetensors")):
        model = getattr(importlib.import_module(module), attribute)(**arguments).eval()
        model.load_state_dict(state, strict=True)
        models.append(model)
    for model in models:
        out = model(x)
        assert torch.equal(out[0] if isinstance(out, tuple) else out, expected), (name, method)
        assert "fxrpg" not in repr(type(model)).lower()
try:
    import fxrpg
except ImportError:
    assert not any(name.startswith("fxrpg.") for name in sys.modules)
    print("all of them, without fxrpg")
"""


def test_plain_pytorch_loads_what_is_materialized(tmp_path, capsys):
    """A state_dict, what `fxrpg unpack` writes, and a whole pickled model: bit for bit, where fxrpg cannot be imported."""
    told = {name: [(where, method) for method in METHODS] for name, (where, _shape) in CLASSES.items()}
    for name, (_where, shape) in CLASSES.items():
        for method, arguments in METHODS.items():
            prefix = tmp_path / f"{name}-{method}"
            small = fxrpg.transform(build(name), seed=3, **arguments)
            dense = fxrpg.materialize(small)
            x = torch.randn(shape)
            torch.testing.assert_close(small(x), dense(x))  # recurrent layers of the library's own sum in another order
            out = dense(x)
            torch.save((x, (out[0] if isinstance(out, tuple) else out).detach()), f"{prefix}.io")
            torch.save(dense.state_dict(), f"{prefix}.pt")
            torch.save(dense, f"{prefix}.whole.pt")
            fxrpg.save(small, f"{prefix}.safetensors")
            assert cli.main(["unpack", f"{prefix}.safetensors", "--out", f"{prefix}.unpacked.safetensors"]) == 0
    capsys.readouterr()
    assert child(WITHOUT_FXRPG, str(tmp_path), json.dumps(told)).strip() == "all of them, without fxrpg"


def pickled_words(model: nn.Module, path: Path) -> list[str]:
    """What of a whole pickled model, its classes or its attributes, speaks of fxrpg."""
    torch.save(model, path)
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [member for member in archive.namelist() if member.endswith("data.pkl")]
        words = [str(argument) for _op, argument, _place in pickletools.genops(archive.read(pickled))]
        members = [member for member in archive.namelist() if b"fxrpg" in archive.read(member)]
    return [word for word in words if "fxrpg" in word] + members


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CLASSES)
def test_nothing_of_fxrpg_is_pickled(name, method, tmp_path):
    model = fxrpg.transform(build(name), **METHODS[method])
    assert pickled_words(model, tmp_path / "transformed.pt")
    assert pickled_words(fxrpg.materialize(model), tmp_path / "model.pt") == []
    if method == "pemn":
        assert pickled_words(fxrpg.materialize(fxrpg.freeze(model)), tmp_path / "frozen.pt") == []


def test_nothing_is_pickled_of_regions_and_pruned_channels(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)
    )
    with_regions = fxrpg.transform(net, dof=50, example_inputs=(torch.randn(1, 3, 12, 12),))
    graph = fxrpg.transform(torch.fx.symbolic_trace(net), dof=50)
    for model in (with_regions, graph, fxrpg.prune_channels(fxrpg.transform(net, dof=50, plan=EVERY), 0.3)):
        assert pickled_words(fxrpg.materialize(model), tmp_path / "model.pt") == []


LOADED = """
import sys, torch, fxrpg
torch.set_num_threads(1)
for path in sys.argv[1:]:
    program = torch.export.load(path)
    for x, expected in torch.load(path + ".io"):
        assert torch.equal(program.module()(x), expected), path
print("same bits")
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_exported_programs_run_in_another_process(tmp_path):
    """States and views travel, weights do not; the batch may have another size there."""
    paths = []
    for name, method in (("convmixer", "ring"), ("convmixer", "pemn"), ("encoder", "ring"), ("encoder", "pranc")):
        small, shape = fxrpg.transform(build(name), **METHODS[method]).eval(), CLASSES[name][1]
        batch = shape.index(2)
        dynamic = ({batch: torch.export.Dim("batch", min=1, max=64)},)
        program = torch.export.export(small, (torch.randn(shape),), dynamic_shapes=dynamic)
        path = f"{tmp_path}/{name}-{method}.pt2"
        torch.export.save(program, path)
        inputs = [torch.randn(*shape[:batch], n, *shape[batch + 1 :]) for n in (2, 5)]
        module = program.module()
        torch.save([(x, module(x).detach()) for x in inputs], f"{path}.io")
        torch.testing.assert_close(module(inputs[1]), small(inputs[1]))
        held = sum(tensor.numel() for tensor in program.state_dict.values())
        assert held < sum(p.numel() for p in fxrpg.materialize(small).parameters()) or method == "pemn"
        paths.append(path)
    assert child(LOADED, *paths).strip() == "same bits"


PACKAGED = """
import sys, torch, fxrpg
torch.set_num_threads(1)
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), expected)
print("same numbers")
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="AOTInductor compiles C++; needs g++")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_aot_inductor(tmp_path):
    """The package calls `torch.ops.fxrpg.*`: a process that runs it imports fxrpg before it loads it."""
    small = fxrpg.transform(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)), dof=50, plan=EVERY)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        program = torch.export.export(small.eval(), (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save((x, small(x).detach()), tmp_path / "io")
    assert child(PACKAGED, package, str(tmp_path / "io")).strip() == "same numbers"
