"""A run of the bench: the files it leaves, the tables and pictures of them, and the command with its mistakes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from fxrpg import cli
from fxrpg.cli import main

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench import layer_contest, pictures, report, run  # noqa: E402
from bench.contest import Result  # noqa: E402

CPU = torch.device("cpu")


# The files.


def rows(case: str, *contestants: str, status: str = "ok", date: str = "now") -> list[report.Row]:
    stamp = {"device": "cpu", "date": date}
    return [report.row_of(case, "forward", Result(contestant=c, status=status), stamp) for c in contestants]


def test_a_run_replaces_the_rows_of_its_cases_and_keeps_others():
    before = rows("a", "dense", "old", date="before") + rows("b", "dense", date="before")
    found = report.merged(before, rows("a", "dense", "new") + rows("c", ""))
    assert [(row["case"], row["contestant"], row["date"]) for row in found] == [
        ("a", "dense", "now"),
        ("a", "new", "now"),
        ("b", "dense", "before"),
        ("c", "", "now"),
    ]
    skipped = report.merged(found, rows("b", "", status="skipped: no time left"))
    assert skipped == found, "what was measured is not lost where there was no time"
    again = report.merged(found, rows("c", "dense"))
    assert [row["contestant"] for row in again if row["case"] == "c"] == ["dense"]


def timed(case: str, direction: str = "forward", **ratios: float) -> list[report.Row]:
    """Rows of one case: contestants, the baseline first, with their times over its own."""
    return [
        report.row_of(
            case,
            direction,
            Result(
                contestant=name, milliseconds=2 * ratio, ratio=ratio, flops=1000, bytes_moved=100, roofline=0.1 / ratio
            ),
            {"device": "cpu", "date": "2026-01-31"},
        )
        for name, ratio in ratios.items()
    ]


def test_tables():
    found = report.tables(timed("layer/a", dense=1, ring=109.546, mask=0.77))
    assert found.splitlines()[0].split("  ")[-1].strip() == "mask"
    assert "dense (baseline), ms" in found, "one baseline needs no column"
    line = " ".join(found.splitlines()[2].split())
    assert line == "layer/a forward float32 2.00 10% 110 (<1%) 0.770 (13%)"
    assert found.splitlines()[-1] == report.LEGEND
    two = report.tables(timed("pranc/a", dense=1, ring=2) + timed("pranc/b", normal=1, ring=2))
    assert "baseline" in two.splitlines()[0]
    assert "dense" in two.splitlines()[2]
    assert "normal" in two.splitlines()[3]


def test_the_log_rounds_as_the_table_does():
    some = timed("layer/a", dense=1, ring=109.546, mask=11.72)
    assert run._summary(some) == "dense 2.00 ms, ring x110, mask x11.7"
    assert all(number in report.tables(some) for number in ("2.00", "110 (", "11.7 ("))
    assert [report.three_digits(x) for x in ("0.04084", "99.96", "1234")] == ["0.0408", "100", "1234"]


def test_many_cases_are_drawn_as_groups():
    few = timed("layer/net/a/b1", dense=1, ring=2) + timed("layer/net/b/b1", dense=1, ring=2)
    assert list(pictures.groups(few)) == ["layer/net/a/b1 forward", "layer/net/b/b1 forward"]
    other = [{**row, "dtype": "bfloat16"} for row in few]
    assert list(pictures.groups(few + other))[-1] == "layer/net/b/b1 forward bfloat16"
    many = [row for i in range(30) for b in (1, 8) for row in timed(f"layer/net/l{i}/b{b}", dense=1, ring=2)]
    found = pictures.groups(many)
    assert len(found) == 30
    assert next(iter(found)) == "layer/net/l0 forward (2)"
    assert sum(map(len, found.values())) == len(many)


def test_columns():
    asked = "case device direction contestant status milliseconds ratio goal peak_mib bytes roofline commit torch triton date"
    assert set(asked.split()) <= set(report.COLUMNS)


def bench(folder: Path, only: str, seconds: float = 60.0, *more: str) -> int:
    options = ["--quick", "--device", "cpu", "--only", only, "--out", str(folder), "--seconds", str(seconds)]
    return main(["bench", *options, *more])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / f"{run.machine_name(CPU)}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need it; pip install 'fxrpg[demo]'")
    assert bench(tmp_path, "layer/tiny/linear/*") == 0
    first = table(tmp_path)
    cases = [(row["case"], row["direction"], row["contestant"]) for row in first]
    assert len(set(cases)) == len(cases) == 2 + 4 + 4 + 3
    assert {row["status"] for row in first} == {"ok"}
    assert all(float(row["milliseconds"]) > 0 for row in first)
    assert all(float(row["ratio"]) > 0 and float(row["roofline"]) > 0 for row in first[2:])
    assert {row["path"] for row in first if "staged" in row["contestant"]} == {"staged"}
    machine = run.machine_name(CPU)
    for name in (f"{machine}-roofline.png", f"{machine}-ratios.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert (tmp_path / f"{machine}.txt").read_text().strip() in out
    told = [line.removeprefix("wrote ") for line in out.splitlines() if line.startswith("wrote ")]
    assert {Path(path) for path in told} == set(tmp_path.iterdir()), "every file is told, and no other"
    assert "layer/tiny/linear/b2 wgrad" in out
    assert bench(tmp_path, "layer/tiny/linear/*/forward") == 0
    assert [(row["case"], row["direction"], row["contestant"]) for row in table(tmp_path)] == cases


@pytest.mark.parametrize("only", ["pranc/*", "model/*"])
def test_bases_and_models(only, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert bench(tmp_path, only) == 0
    assert {row["status"] for row in table(tmp_path)} == {"ok"}
    assert not list(tmp_path.glob("*.png")), "no pictures without matplotlib"


def test_a_wrong_result_makes_the_run_fail(tmp_path, monkeypatch, capsys):
    generated = layer_contest.Work.generated
    monkeypatch.setattr(layer_contest.Work, "generated", lambda *args: 1.1 * generated(*args))
    assert bench(tmp_path, "layer/tiny/linear/*/forward") == 1
    found = {row["contestant"]: row for row in table(tmp_path)}
    assert found["dense"]["status"] == found["authors"]["status"] == "ok"
    for name in ("ring staged", "pemn staged"):
        assert found[name]["status"].startswith("failed: relative error")
        assert (found[name]["milliseconds"], found[name]["ratio"]) == ("", "")
    assert "ring staged: failed: relative error" in capsys.readouterr().err


def test_a_case_that_cannot_be_set_up_fails_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_contest, "Indexed", lambda *args: 1 / 0)
    assert bench(tmp_path, "layer/tiny/linear/*ward") == 1
    assert table(tmp_path)[-1]["status"] == "failed: ZeroDivisionError: division by zero"


def test_no_time_left(tmp_path):
    assert bench(tmp_path, "layer/tiny/*", 0.001) == 0
    skipped = [row for row in table(tmp_path) if row["contestant"] == ""]
    assert len(skipped) == 12
    assert {row["status"] for row in skipped} == {"skipped: no time left"}


# The command.


def test_without_the_folder_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fxrpg" / "cli.py"))
    assert main(["bench", "--quick"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fxrpg bench: bench: needs the folder bench of a checkout")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nothing/*", "--device", "cpu"], "--only: must match a case, found 'nothing/*'"),
        (["--only", "decode/*", "--device", "cpu"], "on a CPU with --quick are layer/tiny, pranc/tiny, model/tiny."),
        *(
            (["--seconds", seconds, "--device", "cpu"], f"--seconds: must be over 0, found {seconds}.")
            for seconds in ("0", "-5", "nan")
        ),
        (["--device", "banana"], "--device: must be a device of torch, found 'banana'"),
        (["--device", "meta"], "--device: must be a GPU or the CPU, found 'meta'"),
    ],
)
def test_mistakes(options, message, tmp_path, capsys):
    assert main(["bench", "--quick", "--out", str(tmp_path / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device: needs a GPU that torch can use" in capsys.readouterr().err


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert bench(tmp_path / "file", "layer/tiny/linear/*") == 2
    assert "File exists" in capsys.readouterr().err


def test_names_of_machines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert run.machine_name(torch.device("cuda")) == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(run, "processor", lambda: "AMD EPYC 9654 96-Core Processor")
    assert run.machine_name(CPU) == "cpu-amd-epyc-9654-96-core-processor"


def test_names_of_processors(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t: 85\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\n")
    assert run.processor(file).split() == ["Intel", "Xeon"]
    file.write_text("processor\t: 0\n")  # as on ARM
    monkeypatch.setattr(run.platform, "processor", lambda: "")
    monkeypatch.setattr(run.platform, "machine", lambda: "aarch64")
    assert run.processor(file) == run.processor(tmp_path / "missing") == "aarch64"
