"""`fxrpg sweep`: what it runs, keeps, resumes, refuses and survives, with a script of the user's and on digits."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fxrpg import Ring
from fxrpg.cli import main
from fxrpg.sweep import digits, results, run
from fxrpg.sweep.results import Row
from fxrpg.sweep.task import Job

ROOT = Path(__file__).parents[1]
SCRIPT = """
import argparse, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--dof", type=float)
parser.add_argument("--seed", type=int, required=True)
parser.add_argument("--sleep", type=float, default=0)
parser.add_argument("--fail", type=float)
a = parser.parse_args()
with open("log", "a") as log:
    log.write(f"{os.getpid()} {a.dof} {a.seed} {os.environ['OMP_NUM_THREADS']}\\n")
time.sleep(a.sleep)
if a.fail is not None and a.fail == a.dof:
    raise ValueError("too \\x1b[2J <b>small</b>")
error = 0.02 if a.dof is None else 0.4 * a.dof ** -0.3
print("accuracy: of no interest")
print("accuracy:", 1 - error * (1 + 0.05 * a.seed))
print("bye")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a script in it."""
    (tmp_path / "toy.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a sweep."""
    capsys.readouterr()
    try:
        code = main(["sweep", *map(str, argv)])
    except SystemExit as e:
        code = int(e.code or 0)
    return (code, *capsys.readouterr())


def mistake(capsys, *argv: object) -> str:
    """The one line that a sweep says that must refuse."""
    code, out, err = call(capsys, *argv)
    assert (code, err.count("\n")) == (2, 1), out + err
    assert err[:-1].isprintable()
    assert "Traceback" not in err
    return err


def logged() -> list[list[str]]:
    """Process, size, seed and threads of every run of the script so far."""
    return [line.split() for line in Path("log").read_text().splitlines()] if Path("log").exists() else []


TOY = ("--script", "toy.py", "--dof", "100,1000,10000", "--seeds", 2, "--out", "out")


def test_a_script(capsys):
    code, out, err = call(capsys, *TOY, "--jobs", 2, "--threads", 3)
    assert (code, err) == (0, "")
    grid = {(dof, seed) for dof in ("None", "100.0", "1000.0", "10000.0") for seed in "01"}
    assert {(dof, seed) for _, dof, seed, _ in logged()} == grid
    assert len(logged()) == len(grid)
    assert {threads for *_, threads in logged()} == {"3"}
    with open("out/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["dof"], row["seed"]) for row in rows} == {
        (d.replace(".0", "").replace("None", ""), s) for d, s in grid
    }
    for row in rows:
        error = 0.4 * int(row["dof"]) ** -0.3 if row["dof"] else 0.02
        assert float(row["accuracy"]) == 1 - error * (1 + 0.05 * int(row["seed"]))
        assert (row["task"], row["arguments"], row["threads"], row["method"]) == ("toy.py", "[]", "3", "")
    assert "error = 41% * DoF^-0.300" in out
    assert "DoF 10,000 is the smallest size that is surely within 1 point of dense: 0.54 points below" in out
    assert Path("out/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in Path("out").iterdir()} - {".lock"} == {"results.csv", "accuracy.png", "report.html"}


def test_what_is_there_is_not_run_again_and_the_grid_may_grow(capsys):
    assert call(capsys, *TOY)[0] == 0
    first = Path("out/results.csv").read_text()
    count, report = len(logged()), Path("out/report.html").read_bytes()
    code, out, _ = call(capsys, *TOY, "--within", 30, "--jobs", 1)
    assert (code, len(logged())) == (0, count)
    assert "0 of 8 runs to do" in out
    assert "DoF 100 is the smallest size that is surely within 30 points" in out
    assert Path("out/results.csv").read_text() == first
    assert Path("out/report.html").read_bytes() != report
    assert call(capsys, *TOY)[0] == 0
    assert Path("out/report.html").read_bytes() == report, "the same runs, the same bytes"
    assert call(capsys, *TOY[:3], "100,300", "--seeds", 3, "--out", "out")[0] == 0
    assert {(dof, seed) for _, dof, seed, _ in logged()[count:]} == {
        ("None", "2"), ("100.0", "2"), ("300.0", "0"), ("300.0", "1"), ("300.0", "2"),
    }  # fmt: skip
    assert Path("out/results.csv").read_text().startswith(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--threads", 2), "threads: 2), found 1"),
        (("--", "--sleep", "0.01"), 'arguments: ["--sleep", "0.01"]), found []'),
        ("edited", "the same program, found another version"),
        ("other.py", "task: other.py), found toy.py"),
        (("--dof", 0.5), "sizes of one kind, whole numbers or fractions, found DoF 100"),
    ],
)
def test_other_settings_are_refused(change, message, capsys, folder):
    sweep = (*TOY[:3], 100, *TOY[4:])
    assert call(capsys, *sweep, "--seeds", 1)[0] == 0
    before = Path("out/results.csv").read_bytes()
    if change == "edited":
        (folder / "toy.py").write_text(SCRIPT + "\n")
    if change == "other.py":
        (folder / change).write_text(SCRIPT)
        sweep = ("--script", change, *sweep[2:])
    err = mistake(capsys, *sweep, *(change if isinstance(change, tuple) else ()))
    assert message in err
    assert "Choose another --out" in err
    assert Path("out/results.csv").read_bytes() == before
    assert len(logged()) == 2


def test_failures_are_told_at_the_end_and_tried_again(capsys, folder):
    code, out, err = call(capsys, *TOY, "--", "--fail", 1000)
    assert code == 1
    assert err.count("failed: DoF 1000, seed") == 2
    assert r"ValueError: too \x1b[2J <b>small</b>" in err
    assert "By hand: python toy.py --dof 1000 --seed" in err
    assert "10,000" in out
    assert [row.dof for row in results.read(Path("out/results.csv"))].count(1000) == 0
    text = Path("out/report.html").read_text()
    assert "&lt;b&gt;small&lt;/b&gt;" in text
    assert "<b>" not in text
    count = len(logged())
    assert call(capsys, *TOY, "--", "--fail", 1000)[0] == 1
    assert len(logged()) == count + 2


def test_when_all_runs_fail_there_is_no_report(capsys):
    code, _, err = call(capsys, *TOY[:3], 7, "--no-dense", "--out", "out", "--", "--fail", 7)
    assert code == 1
    assert "3 runs failed" in err
    assert not Path("out/report.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import sys; print('fine'); print('some trouble', file=sys.stderr)",
            "found no such line; its stderr ends with: some t",
        ),
        ("print('accuracy: 93.1')", "found 'accuracy: 93.1'"),
        ("print('accuracy: -0.1')", "found 'accuracy: -0.1'"),
        ("print('accuracy: 0.5 or so')", "found 'accuracy: 0.5 or so'"),
        ("print('accuracy: 1_0e-2')", "found 'accuracy: 1_0e-2'"),
        ("print('accuracy:', end='')", "found 'accuracy:'"),
    ],
)
def test_a_script_that_does_not_follow_the_protocol(text, message, capsys, folder):
    (folder / "bad.py").write_text(text)
    err = mistake(capsys, "--script", "bad.py", "--dof", 10, "--out", "out")
    assert "bad.py" in err
    assert message in err
    assert "print('accuracy:', correct / tested)" in err
    assert not Path("out/results.csv").exists()


def test_an_accuracy_that_is_no_number_is_a_failed_run(capsys, folder):
    (folder / "nan.py").write_text("import sys; print('accuracy:', 'nan' if '--dof' in sys.argv else 1)")
    code, out, err = call(capsys, "--script", "nan.py", "--dof", 10, "--seeds", 1)
    assert code == 1
    assert "failed: DoF 10, seed 0: its accuracy is nan" in err
    assert "no small model to compare with" in out


def test_a_script_that_kills_itself_and_one_that_talks_much(capsys, folder):
    (folder / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    code, _, err = call(capsys, "--script", "dies.py", "--dof", 10, "--seeds", 1, "--no-dense")
    assert code == 1
    assert "killed by SIGKILL" in err
    (folder / "-c.py").write_text("print('x' * 10**6)\nfor i in range(10**5): print(i)\nprint('accuracy: 1')")
    code, out, err = call(capsys, "--script=-c.py", "--dof", 10, "--seeds", 1, "--out", "talks")
    assert (code, err) == (0, "")
    assert "100.00" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--script", "nope.py", "--dof", 10), "--script nope.py: must be a Python file, found nothing there"),
        (("--script", ".", "--dof", 10), "found a folder"),
        (("--script", "toy.py"), "--dof: must be different whole numbers of 1 or more"),
        (("--script", "toy.py", "--dof", "1,0.5"), "--dof: must be"),
        (("--script", "toy.py", "--dof", "10,10"), "--dof: must be"),
        (("--script", "toy.py", "--dof", "1.5"), "--dof: must be"),
        (("--script", "toy.py", "--dof", "nan"), "--dof: must be"),
        (("--script", "toy.py", "--dof", "0"), "--dof: must be"),
        (("--script", "toy.py", "--dof", "1,,2"), "--dof: must be a number, found ''"),
        (("--script", "toy.py", "--dof", 1, "--method", "ring"), "--method: is a setting of the digits"),
        (("--script", "toy.py", "--dof", 1, "--set", "block=1"), "--set: is a setting of the digits"),
        (("--script", "toy.py", "--dof", 1, "--epochs", 3), "--epochs: is a setting of the digits"),
        (("--dof", 10, "--", "--k"), "ARGUMENTS: are for a script, found --k"),
        (("--dof", 10, "--seeds", 0), "--seeds: must be 1 or more"),
        (("--dof", 10, "--jobs", 0), "--jobs: must be 1 or more"),
        (("--dof", 10, "--threads", -1), "--threads: must be 1 or more"),
        (("--dof", 10, "--within", "-1"), "--within: must be 0 points or more"),
        (("--dof", 10, "--within", "inf"), "--within: must be 0 points or more"),
        (("--dof", 10, "--epochs", 0), "--epochs: must be 1 or more"),
        (("--dof", 10**9), "dof: must be an int in [1, 168448]"),
        (("--dof", 10, "--method", "none"), "method: must be one of"),
        (("--dof", 10, "--set", "blok=1"), "--set blok: must be one of"),
    ],
)
def test_mistakes(options, message, capsys, folder):
    before = set(folder.iterdir())
    assert message in mistake(capsys, *options)
    assert set(folder.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize("module", ["matplotlib.figure", "scipy.special", "jinja2", "filelock"])
def test_missing_package_is_said_before_anything_is_done(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'fxrpg[sweep]'" in mistake(capsys, *TOY)
    assert not Path("out").exists()


def sample(**fields: object) -> Row:
    common = {"task": "t", "method": "", "dof": 10, "seed": 0, "accuracy": 0.5, "seconds": 1.0, "arguments": "[]"}
    versions = {"code": "c", "threads": 1, "fxrpg": "1", "torch": "2", "python": "3", "finished": "now"}
    return Row(**(common | versions | fields))  # type: ignore[arg-type]


def test_rows_come_back_as_they_were_written(tmp_path):
    hostile = json.dumps(["a,b", 'quo"te', "new\nline", "\x1b", "\udcff", "é"])
    rows = [
        sample(dof=dof, arguments=text, task="\udcff\n")
        for dof, text in ((None, "[]"), (1, hostile), (1.0, "[]"), (1e-5, "[]"))
    ]
    results.write(tmp_path / "r.csv", rows)
    found = results.read(tmp_path / "r.csv")
    assert found == rows
    assert [type(row.dof) for row in found] == [type(None), int, float, float]
    assert found[1].job == Job(1, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: "", "the columns none"),
        (lambda text: "a,b\n1,2\n", "the columns a,b"),
        (lambda text: text[:-20], "a wrong value in line 2"),
        (lambda text: text.replace(",0.5,", ",1.5,"), "a wrong value in line 2"),
        (lambda text: text.replace(",0.5,", ",nan,"), "a wrong value in line 2"),
        (lambda text: text.replace("t,,10,", "t,,-10,"), "a wrong value in line 2"),
        (lambda text: text + text.splitlines()[1] + "\n", "a run that is there twice"),
        (lambda text: text.replace("[]", '"[]'), "unexpected end of data"),
    ],
)
def test_a_damaged_file_is_refused(damage, message, capsys):
    Path("out").mkdir()
    results.write(Path("out/results.csv"), [sample()])
    text = Path("out/results.csv").read_text()
    Path("out/results.csv").write_text(damage(text))
    before = Path("out/results.csv").read_text()
    assert message in mistake(capsys, *TOY)
    assert Path("out/results.csv").read_text() == before


def start(*argv: object) -> subprocess.Popen[str]:
    """A sweep in a process of its own, with a script that takes its time."""
    command = [sys.executable, "-m", "fxrpg", "sweep", *map(str, argv)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which processes live; runs on Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(number, capsys):
    """Only the runs under way are lost, none goes on alone, and the same command does the rest."""
    path, slow = Path("out/results.csv"), (*TOY, "--jobs", 2, "--", "--sleep", 0.4)
    sweep = start(*slow)
    wait_for(lambda: path.exists() and len(results.read(path)) >= 3)
    with open("log") as log:
        wait_for(lambda: log.read() or len(logged()) >= 4)
    sweep.send_signal(number)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in err
    assert (number == signal.SIGKILL) or "the same command goes on from there" in err
    kept, runs = path.read_text(), logged()
    wait_for(lambda: not any(alive(int(process)) for process, *_ in runs))
    done = {(str(row.dof and float(row.dof)), str(row.seed)) for row in results.read(path)}
    assert 3 <= len(done) < 8
    assert call(capsys, *slow)[0] == 0
    again = {(dof, seed) for _, dof, seed, _ in logged()[len(runs) :]}
    assert len(done) + len(again) == 8
    assert not done & again
    assert path.read_text().startswith(kept)
    assert len(results.read(path)) == 8


def test_one_sweep_at_a_time(capsys):
    sweep = start(*TOY, "--jobs", 1, "--", "--sleep", 60)
    wait_for(lambda: logged())
    assert "must be used by one sweep at a time" in mistake(capsys, *TOY, "--", "--sleep", 60)
    sweep.send_signal(signal.SIGINT)
    assert "0 runs are in out/results.csv" in sweep.communicate(timeout=60)[1]


def test_digits(capsys):
    """Real runs in parallel; what a run gives depends on its settings alone."""
    options = ("--dof", "64", "--seeds", 1, "--epochs", 1, "--set", "block=1", "--out", "out")
    code, _, err = call(capsys, *options, "--jobs", 2)
    assert (code, err) == (0, "")
    rows = results.read(Path("out/results.csv"))
    assert {row.dof for row in rows} == {None, 64}
    assert {row.method for row in rows} == {repr(Ring(block=1))}
    method = {"method": "ring", "block": 1}
    for row in rows:
        assert row.accuracy == digits.train_and_test(dof=row.dof, seed=0, method=method, epochs=1)
    assert "0 of 2 runs to do" in call(capsys, *options)[1]
    assert "method" in mistake(capsys, *options[:-4], "--out", "out")


@pytest.mark.parametrize(("method", "dof"), [("pranc", 8), ("pemn", 0.5), ("ring", 0.5)])
def test_digits_train_by_every_method(method, dof):
    found = digits.train_and_test(dof=dof, seed=0, method={"method": method}, epochs=1)
    assert 0.05 < found < 1
    assert found * 797 == pytest.approx(round(found * 797))


def test_the_order_of_runs_and_how_many_at_a_time():
    grid = run.Grid(out=Path("out"), dofs=(20, 10), seeds=2, jobs=None, threads=10**6)
    assert [str(job) for job in grid.runs] == [
        "dense, seed 0", "DoF 10, seed 0", "DoF 20, seed 0", "dense, seed 1", "DoF 10, seed 1", "DoF 20, seed 1",
    ]  # fmt: skip
    assert grid.parallel == 1
    assert run.Grid(out=Path("out"), dofs=(10,), jobs=7).parallel == 7
