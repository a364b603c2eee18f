"""The command line: each command does its job, and each mistake is told in one line, with exit code 2 and nothing written."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxrpg
from fxrpg import building, checkpoint, cli
from fxrpg.cli import main
from fxrpg.demo import digits

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "explain", "info", "pack", "unpack", "verify", "sweep", "bench")
MODULE = "models_of_a_user"
SOURCE = """
import sys
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

class Holder:
    net = Net

class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(8, 8) for _ in range(4)))
        self[2].weight = self[1].weight

class NoMeta(Net):
    def __init__(self):
        super().__init__()
        self.scale = self[0].weight.std().item()

class HalfMeta(Net):
    def __init__(self):
        super().__init__()
        self[1].weight = nn.Parameter(torch.ones(8, 8, device="cpu"))

class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

def fails():
    raise ValueError("first line\\nsecond line \\x1b[2J")

def leaves():
    sys.exit(0)

def needs(width):
    return Net()

def other():
    return [Net()]

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a module of the user's own in it."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "broken_module.py").write_text("def broken(:\n    pass\n")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop(MODULE, None)


@pytest.fixture
def run(capsys):
    """Run a command that works; returns what it prints."""

    def call(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


@pytest.fixture
def mistake(capsys, folder):
    """Run a command that must refuse; returns the one line that it says."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def call(*argv: object) -> str:
        capsys.readouterr()
        before = files()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.endswith("\n")
        assert err[:-1].isprintable(), "one line, without control characters"
        assert err.startswith("fxrpg")
        assert "Traceback" not in err
        assert files() == before
        return err

    return call


def build(name: str = "Net") -> nn.Module:
    return building.build(f"{MODULE}:{name}")


def pack(**settings) -> nn.Module:
    """A transformed model whose file is packed.safetensors."""
    torch.manual_seed(3)
    small = fxrpg.transform(build(), dof=20, seed=7)
    fxrpg.save(small, "packed.safetensors", **settings)
    return small


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(left), dict(right), rtol=0, atol=0)


# Commands that work.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert f"example: fxrpg {command}" in " ".join(out.split())
    assert err == ""


def test_help_and_version(capsys):
    for option, expected in (("--help", "example: fxrpg demo"), ("--version", f"fxrpg {fxrpg.__version__}")):
        with pytest.raises(SystemExit) as left:
            main([option])
        assert left.value.code == 0
        out = capsys.readouterr().out
        assert expected in out
    assert "COMMAND" not in out


def test_demo(run, folder, monkeypatch):
    sizes = {"dofs": (64, 256), "batch": 50, "train": 100, "test": 20}
    whole = digits.run
    monkeypatch.setattr(digits, "run", lambda settings: whole(dataclasses.replace(settings, **sizes)))
    out = run("demo", "--out", "new/results", "--epochs", 1, "--seeds", 1)
    assert "2 of 2 packed files loaded back" in out
    assert (folder / "new" / "results" / "ring-64-seed0.safetensors").exists()
    assert "ring (block=32" in run("info", "new/results/ring-64-seed0.safetensors")


def test_explain_a_module_of_the_current_folder(run):
    out = run("explain", f"{MODULE}:Net", "--dof", 20)
    assert "64 weights generated (100.0% staged), 99 dense" in out
    assert "degrees of freedom" in out
    out = run("explain", f"{MODULE}:Holder.net", "--dof", 0.5, "--rule", "re:0[.]weight=generate", "--seed", 3)
    assert "104 weights generated" in out


@pytest.mark.parametrize("name", ["NoMeta", "HalfMeta"])
def test_explain_falls_back_to_the_cpu(name, run):
    assert "64 weights generated" in run("explain", f"{MODULE}:{name}", "--dof", 20)


def test_explain_builds_on_the_meta_device(run, monkeypatch):
    devices = []
    monkeypatch.setattr(cli, "transform", lambda model, **_: devices.append(model[0].weight.device) or small)
    small = fxrpg.transform(build(), dof=20)
    run("explain", f"{MODULE}:Net", "--dof", 20)
    assert devices == [torch.device("meta")]


def test_info(run):
    pack()
    out = run("info", "packed.safetensors")
    assert "ring (block=32, layout=arc, permute=True, reflect=True)" in out
    assert "64 in 1 tensors (3.20 each)" in out
    assert "1.weight" in out
    assert f"{Path('packed.safetensors').stat().st_size:,}" in out
    pack(withhold_seed=True)
    assert "withheld" in run("info", "packed.safetensors")


def test_info_tells_one_line_a_scope(run):
    rules = [fxrpg.Rule("0.weight", "pranc", dof=3), fxrpg.Rule("3.weight", fxrpg.Pemn(keep=0.25), dof=0.5)]
    small = fxrpg.transform(build(), dof=20, plan=[*rules, fxrpg.Rule("1.weight", "generate")])
    fxrpg.save(small, "packed.safetensors")
    lines = [" ".join(line.split()) for line in run("info", "packed.safetensors").splitlines()]
    assert [line for line in lines if line.startswith(("scope", "method", "degrees", "generated"))] == [
        "scope 0.weight pranc (law=rademacher), 3 degrees of freedom, 40 in 1 tensors (13.33 each)",
        "scope (rest) ring (block=32, layout=arc, permute=True, reflect=True), "
        "20 degrees of freedom, 64 in 1 tensors (3.20 each)",
        "scope 3.weight pemn (prototype=random_padding, keep=0.25, values=normal, threshold=layer), "
        "13 degrees of freedom, 24 in 1 tensors (1.85 each)",
        "degrees of freedom 36",
        "generated weights 128 in 3 tensors (3.56 each)",
    ]


def test_info_of_smaller_forms(run):
    small = fxrpg.prune(fxrpg.quantize(pack(), 4, block=8), 0.75)
    fxrpg.save(small, "packed.safetensors")
    out = run("info", "packed.safetensors")
    assert "ring (block=32, layout=arc, permute=True, reflect=True, bits=4, bits_block=8, sparse=True)\n" in out
    assert "64 in 1 tensors (12.80 each)" in out, "a quarter of 20 numbers is left"
    fxrpg.save(fxrpg.freeze(small), "packed.safetensors")
    assert "sparse=True), frozen\n" in run("info", "packed.safetensors")
    with torch.no_grad():
        small.fxrpg_ring.zero_()
    fxrpg.save(small, "packed.safetensors")
    assert "64 in 1 tensors\n" in run("info", "packed.safetensors")
    assert fxrpg.ledger(small).ratio == float("inf")


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_info_prints_no_control_characters(scope, run):
    names = {"\x1b[2J\n": nn.Linear(4, 4), "also": nn.Linear(4, 4)}
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict(names), nn.Linear(4, 4))
    fxrpg.save(fxrpg.transform(model, dof=3, scope=scope), "packed.safetensors")
    out = run("info", "packed.safetensors")
    assert "\x1b" not in out
    assert "1.\\x1b[2J" in out
    assert (r"scope 1.\x1b[2J" in out) == (scope == "layer")


def test_pack(run):
    torch.manual_seed(5)
    out = run("pack", f"{MODULE}:Net", "--dof", 20, "--seed", 7, "--rule", "3.*=dense", "--out", "packed.safetensors")
    assert "wrote packed.safetensors" in out
    torch.manual_seed(5)
    small = fxrpg.transform(build(), dof=20, seed=7, plan=[fxrpg.Rule("3.*", "dense")])
    loaded = fxrpg.load(build(), "packed.safetensors")
    assert_equal(loaded.state_dict(), small.state_dict())
    assert loaded._fxrpg_plan.rules == ("3.* -> dense",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dof", 20, "--set", "block=1", "--set", "layout=shuffle"), "ring (block=1, layout=shuffle, permute=True"),
        (("--dof", 20, "--method", "pranc", "--set", "law=khatri_rao"), "pranc (law=khatri_rao)"),
        (("--dof", 0.5, "--method", "pemn", "--set", "keep=0.25"), "pemn (prototype=random_padding, keep=0.25,"),
        (("--method", "pemn", "--set", "prototype=one_layer"), "pemn (prototype=one_layer, keep=0.5,"),
        (("--dof", 20, "--set", "bits=4", "--freeze"), "reflect=True, bits=4), frozen"),
        (("--dof", 1.0, "--method", "pemn", "--freeze"), "threshold=layer), frozen"),
        (("--dof", 20, "--scope", "layer", "--rule", "*=generate"), "scope 1"),
        (
            ("--dof", 0.5, "--rule", "3.weight=pemn", "--rule", "1.*=generate", "--set", "permute=False"),
            "scope 3.weight pemn",
        ),
    ],
    ids=lambda options: " ".join(map(str, options)) if type(options) is tuple else "",
)
def test_pack_with_options(options, expected, run):
    run("pack", f"{MODULE}:Net", *options, "--out", "packed.safetensors")
    assert expected in " ".join(run("info", "packed.safetensors").split())
    run("verify", "packed.safetensors", "--model", f"{MODULE}:Net")
    if "--freeze" not in options:
        run("explain", f"{MODULE}:Net", *options)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pack_projects_a_dense_checkpoint(suffix, run, folder):
    dense = build()
    weights = folder / f"dense{suffix}"
    (torch.save if suffix == ".pt" else save_file)(dense.state_dict(), weights)
    before = weights.read_bytes()
    out = run("pack", f"{MODULE}:Net", "--dof", 64, "--weights", weights, "--out", "packed.safetensors")
    assert "relative squared residual 0.0000" in out
    assert weights.read_bytes() == before
    # as many numbers as weights: nothing is lost
    torch.testing.assert_close(checkpoint.unpack("packed.safetensors"), dict(dense.state_dict()))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_pack_takes_a_transformed_checkpoint_as_it_is(suffix, run, folder):
    small = pack()
    weights = folder / f"small{suffix}"
    (torch.save if suffix == ".pt" else save_file)(small.state_dict(), weights)
    run("pack", f"{MODULE}:Net", "--dof", 20, "--seed", 7, "--weights", weights, "--out", "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == (folder / "packed.safetensors").read_bytes()


def test_pack_withholds_the_seed(run, mistake):
    run("pack", f"{MODULE}:Net", "--dof", 20, "--seed", 7, "--withhold-seed", "--out", "packed.safetensors")
    assert "pass --seed" in run("verify", "packed.safetensors")
    assert "every byte verified, the random functions" in run("verify", "packed.safetensors", "--seed", 7)
    run("verify", "packed.safetensors", "--seed", 7, "--model", f"{MODULE}:Net")
    run("unpack", "packed.safetensors", "--seed", 7, "--out", "dense.safetensors")
    os.unlink("dense.safetensors")
    assert "must draw" in mistake("verify", "packed.safetensors", "--seed", 8)
    assert "the seed must be given" in mistake("verify", "packed.safetensors", "--model", f"{MODULE}:Net")
    assert "the seed must be given" in mistake("unpack", "packed.safetensors", "--out", "dense.safetensors")
    assert "must draw" in mistake("unpack", "packed.safetensors", "--seed", 8, "--out", "dense.safetensors")


@pytest.mark.parametrize("name", ["Net", "Tied"])
def test_unpack_gives_a_state_dict_of_the_plain_model(name, run):
    small = fxrpg.transform(build(name), dof=20)
    fxrpg.save(small, "packed.safetensors")
    assert "wrote dense.safetensors" in run("unpack", "packed.safetensors", "--out", "dense.safetensors")
    plain = build(name)
    plain.load_state_dict(load_file("dense.safetensors"), strict=True)
    x = torch.randn(4, plain[0].in_features)
    assert torch.equal(plain.eval()(x), small.eval()(x))


def test_verify(run, mistake):
    pack()
    assert "every byte verified, the random functions draw" in run("verify", "packed.safetensors")
    run("verify", "packed.safetensors", "--seed", 7, "--model", f"{MODULE}:Net")
    assert "the file's seed is 7, found seed=8" in mistake("verify", "packed.safetensors", "--seed", 8)
    assert "must have the parameter" in mistake("verify", "packed.safetensors", "--model", f"{MODULE}:Hidden")


def test_as_a_program(folder):
    def program(*argv: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
        command = [sys.executable, "-m", "fxrpg", *argv]
        return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)

    done = program("pack", f"{MODULE}:Net", "--dof", "20", "--out", "packed.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert checkpoint.verify("packed.safetensors").size == 20
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    done = program("info", "packed.safetensors", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    done = program("info", "nowhere.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fxrpg info: [Errno 2] No such file or directory: 'nowhere.safetensors'\n"


# Mistakes.


@pytest.mark.parametrize(
    "command", [("explain",), ("pack", "--out", "out.safetensors")], ids=lambda command: command[0]
)
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Net", "must name a module and a callable"),
        ("", "must name a module and a callable"),
        (":Net", "must name a module and a callable"),
        (f"{MODULE}:", "must name a module and a callable"),
        ("no_such_module:Net", "must be importable, found ModuleNotFoundError"),
        ("..:Net", "must be importable, found"),
        ("broken_module:Net", "must be importable, found SyntaxError"),
        ("leaving_module:Net", "must be importable, found SystemExit"),
        (f"{MODULE}:Missing", "must be importable, found AttributeError"),
        (f"{MODULE}:Holder.missing", "must be importable, found AttributeError"),
        (f"{MODULE}:fails", "must build without arguments, found ValueError: first line second line \\x1b[2J"),
        (f"{MODULE}:leaves", "must build without arguments, found SystemExit"),
        (f"{MODULE}:needs", "must build without arguments, found TypeError"),
        (f"{MODULE}:number", "must build without arguments, found TypeError"),
        (f"{MODULE}:other", "must build a torch.nn.Module, found list"),
        (f"{MODULE}:Hidden", "at least one weight must be generated"),
    ],
)
def test_bad_model(command, spec, message, mistake):
    assert message in mistake(*command, spec, "--dof", 20)


@pytest.mark.parametrize(
    "command", [("explain",), ("pack", "--out", "out.safetensors")], ids=lambda command: command[0]
)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dof", "abc", "argument --dof: must be a number, found 'abc'"),
        ("--dof", "", "argument --dof: must be a number"),
        ("--dof", "0", "dof: must be an int"),
        ("--dof", "-1", "dof: must be an int"),
        ("--dof", "0.0", "dof: must be an int"),
        ("--dof", "-0.5", "dof: must be an int"),
        ("--dof", "1.5", "dof: must be an int"),
        ("--dof", "nan", "dof: must be an int"),
        ("--dof", "inf", "dof: must be an int"),
        ("--dof", "65", "dof: must be an int in [1, 64]"),
        ("--dof", "9" * 5000, "dof: must be an int"),
        ("--method", "magic", "method: must be one of"),
        ("--seed", "x", "argument --seed"),
        ("--seed", "-1", "seed: must be an int in [0, 2^64)"),
        ("--seed", str(1 << 64), "seed: must be an int in [0, 2^64)"),
        ("--rule", "fc", "argument --rule: must be PATTERN=ACTION, found 'fc'"),
        ("--rule", "3.weight=ring:many", "argument --rule: must be a number, found 'many'"),
        ("--rule", "1.weight=delete", "the action must be one of ('generate', 'dense', 'pemn', 'pranc', 'ring')"),
        ("--rule", "fc.*=dense", "must match a parameter's name"),
        ("--rule", "=dense", "must match a parameter's name"),
        ("--rule", "re:[=dense", "needs a regular expression"),
        ("--rule", "*.bias=generate", "must match a weight that can be generated"),
        ("--set", "block", "argument --set: must be NAME=VALUE, found 'block'"),
        ("--set", "=1", "argument --set: must be NAME=VALUE"),
        ("--set", "colour=1", "--set colour: must be one of ['bits', 'bits_block', 'block',"),
        ("--set", "block=7", "Ring(block=...): must be one of"),
        ("--set", "block=1.0", "--set block: must be of type int, found 1.0"),
        ("--set", "block=", "--set block: must be of type int, found ''"),
        ("--set", "block=" + "-" * 10**5 + "1", "--set block: must be of type int"),
        ("--set", "layout=[]", "--set layout: must be of type str"),
        ("--set", "reflect=no", "--set reflect: must be of type bool, found 'no'"),
        ("--set", "bits=x", "Ring(bits=...)"),
        ("--scope", "x", "scope: must be one of"),
        ("--scope", "block", "scope='block': needs a model with repeated blocks"),
    ],
)
def test_bad_option(command, option, value, message, mistake):
    values = {"--dof": "20"} | {option: value}
    assert message in mistake(*command, f"{MODULE}:Net", *(f"{k}={v}" for k, v in values.items()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("magic",), "invalid choice: 'magic'"),
        (("magic\n\x1b[2J",), "invalid choice"),
        (("explain",), "the following arguments are required: model"),
        (
            ("explain", f"{MODULE}:Net"),
            "dof: must be an int in [1, 64] (the generated weights) or a fraction in (0, 1]",
        ),
        (("explain", f"{MODULE}:Net", "--method", "pranc"), "dof: must be an int in [1, 147]"),
        (("explain", f"{MODULE}:Net", "--dof", "3", "--method", "pemn", "--set", "prototype=one_layer"), "found 3"),
        (("pack", f"{MODULE}:Net", "--dof", "20"), "the following arguments are required: --out"),
        (
            ("pack", f"{MODULE}:Net", "--dof", "20", "--freeze", "--out", "x"),
            "freeze: needs a mask or a quantised ring",
        ),
        (("info",), "the following arguments are required: file"),
        (("info", "a", "b"), "unrecognized arguments: b"),
        (("info", "a", "--b\nc"), "unrecognized arguments: --b c"),
        (("verify", "a", "--seed"), "expected one argument"),
        (("demo", "--epochs", "x"), "invalid int value"),
        (("demo", "--epochs", "0"), "demo, epochs: must be 1 or more"),
        (("demo", "--seeds", "-2"), "demo, seeds: must be 1 or more"),
        (("demo", "--out", f"{MODULE}.py"), "File exists"),
        (("bench", "--only", "nothing", "--device", "cpu"), "--only: must match a case, found 'nothing'"),
        (("bench", "--device", "banana"), "--device: must be a device of torch, found 'banana'"),
        (("bench", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("bench", "--seconds", "x"), "argument --seconds: invalid float value"),
    ],
)
def test_bad_arguments(argv, message, mistake):
    line = mistake(*argv)
    assert message in line
    assert "fxrpg: error" not in line


def damage(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


BAD_FILES = {
    "missing": (lambda path: None, "No such file or directory"),
    "folder": (lambda path: path.mkdir(), "must be a file, found a folder"),
    "empty": (lambda path: path.write_bytes(b""), "must be a whole safetensors file"),
    "cut": (lambda path: pack() and path.write_bytes(path.read_bytes()[:-1]), "must be a whole safetensors file"),
    "damaged": (lambda path: pack() and path.write_bytes(damage(path.read_bytes())), "must match their digest"),
    "plain": (lambda path: save_file({"a": torch.ones(2)}, path), "without the header 'fxrpg'"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "must be a whole safetensors file"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
@pytest.mark.parametrize(
    "command", [("info",), ("verify",), ("verify", "--seed=7"), ("unpack", "--out=out.safetensors")]
)
def test_bad_file(command, bad, folder, mistake):
    make, message = BAD_FILES[bad]
    make(folder / "packed.safetensors")
    line = mistake(*command, "packed.safetensors")
    assert message in line
    assert line.count("packed.safetensors") == 1


BAD_OUT = {
    "folder that does not exist": ("nowhere/out.safetensors", "No such file or directory: 'nowhere/out.safetensors'"),
    "folder": (".", "must be a file, or a new name, found a folder"),
    "below a file": (f"{MODULE}.py/out.safetensors", "Not a directory"),
    "long name": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("out", BAD_OUT)
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_bad_out(command, out, mistake):
    pack()
    argv = ("unpack", "packed.safetensors") if command == "unpack" else ("pack", f"{MODULE}:Net", "--dof", 20)
    path, message = BAD_OUT[out]
    assert message in mistake(*argv, "--out", path)


def test_the_file_that_is_read_is_never_overwritten(mistake):
    pack()
    os.link("packed.safetensors", "same.safetensors")
    for out in ("packed.safetensors", "./packed.safetensors", "same.safetensors"):
        assert "must be another file" in mistake("unpack", "packed.safetensors", "--out", out)
    torch.save(build().state_dict(), "dense.pt")
    line = mistake("pack", f"{MODULE}:Net", "--dof", 20, "--weights", "dense.pt", "--out", "dense.pt")
    assert "must be another file" in line


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def archive(path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


BAD_WEIGHTS = {
    "missing": (lambda path: None, "No such file or directory"),
    "folder": (lambda path: path.mkdir(), "must be a file, found a folder"),
    "pipe": (os.mkfifo, "must be a file, found a folder or a device"),
    "empty": (lambda path: path.write_bytes(b""), "must be a readable state_dict"),
    "no archive": (lambda path: path.write_bytes(b"abc" * 50), "must be a readable state_dict"),
    "code": (lambda path: torch.save(Payload(), path), "must be a readable state_dict"),
    "module": (lambda path: torch.save(nn.Linear(2, 2), path), "must be a readable state_dict"),
    "script": (archive, "must be a readable state_dict"),
    "list": (lambda path: torch.save([torch.ones(2)], path), "must hold a dict of tensors, found list"),
    "nested": (
        lambda path: torch.save({"state_dict": {}}, path),
        "must hold a dict of tensors, found 'state_dict': dict",
    ),
    "numbered": (lambda path: torch.save({0: torch.ones(2)}, path), "must hold a dict of tensors, found 0: Tensor"),
    "other model": (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "must fit the model"),
    "no weights": (lambda path: torch.save({}, path), "must fit the model"),
    "not finite": (
        lambda path: torch.save({k: v * float("nan") for k, v in build().state_dict().items()}, path),
        "must be finite",
    ),
    "other seed": (
        lambda path: torch.save(fxrpg.transform(build(), dof=20, seed=8).state_dict(), path),
        "must belong to this model's seed and plan",
    ),
    "other dof": (
        lambda path: torch.save(fxrpg.transform(build(), dof=21).state_dict(), path),
        "must belong to this model's seed and plan",
    ),
}


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_bad_weights(bad, folder, mistake):
    make, message = BAD_WEIGHTS[bad]
    make(folder / "weights.pt")
    argv = ("pack", f"{MODULE}:Net", "--dof", 20, "--weights", "weights.pt", "--out", "out.safetensors")
    assert message in mistake(*argv)
    assert not Path("executed").exists()


@pytest.mark.parametrize("bad", ["missing", "folder", "pipe", "empty", "no archive"])
def test_bad_safetensors_weights(bad, folder, mistake):
    BAD_WEIGHTS[bad][0](folder / "weights.safetensors")
    argv = ("pack", f"{MODULE}:Net", "--dof", 20, "--weights", "weights.safetensors", "--out", "out.safetensors")
    assert "weights.safetensors" in mistake(*argv)


def test_a_packed_file_is_no_checkpoint(mistake):
    pack()
    argv = ("pack", f"{MODULE}:Net", "--dof", 20, "--weights", "packed.safetensors", "--out", "out.safetensors")
    assert "packed.safetensors: must fit the model" in mistake(*argv)


def test_a_rule_gives_a_method_and_its_size(run, folder):
    run(
        "pack",
        f"{MODULE}:Net",
        "--dof",
        20,
        "--rule",
        "3.weight=pranc:4",
        "--rule",
        "1.*=generate",
        "--out",
        "m.safetensors",
    )
    scopes = {scope.name: (scope.generator.method, scope.size) for scope in checkpoint.verify("m.safetensors").scopes}
    assert scopes == {"": ("ring", 20), "3.weight": ("pranc", 4)}
