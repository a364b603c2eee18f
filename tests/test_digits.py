"""The demo, on a few digits: what it writes, prints, verifies and refuses."""

from __future__ import annotations

import csv
import sys

import matplotlib.figure
import pytest
import torch

from fxrpg import FxrpgError, load
from fxrpg.demo import digits
from fxrpg.demo.digits import Demo, Run, power_law, resnet, summaries, table

DOFS = (100, 4096)  # one that is no multiple of the ring's block


def tiny(out):
    return Demo(out=out, dofs=DOFS, seeds=1, epochs=2, batch=64, train=200, test=100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    result = digits.run(tiny(out))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return out, result


def test_files(runs):
    out, found = runs
    names = {f"{model}-seed0.safetensors" for model in ("dense", "ring-100", "ring-4096")}
    assert {path.name for path in out.iterdir()} == names | {"results.csv", "accuracy.png"}
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["dof"], int(row["errors"])) for row in rows] == [
        (run.model, "" if run.dof is None else str(run.dof), run.errors) for run in found
    ]
    assert [int(row["bytes"]) for row in rows] == [(out / row["file"]).stat().st_size for row in rows]


def test_numbers(runs):
    _, found = runs
    dense, small, large = found
    assert dense.trainable == sum(p.numel() for p in resnet(0).parameters())
    assert dense.generated == 0
    for ring in (small, large):
        assert ring.trainable == dense.trainable - ring.generated + ring.dof
        assert 90_000 < ring.generated < 180_000
    assert small.bytes < large.bytes < dense.bytes
    assert large.bytes - small.bytes == pytest.approx(4 * (DOFS[1] - DOFS[0]), abs=64)


def test_files_hold_what_was_counted(runs):
    out, found = runs
    images, answers = digits.digits()
    for run in found[1:]:
        with torch.no_grad():
            predictions = load(resnet(7), out / run.file).eval()(images[200:300])
        assert int((predictions.argmax(1) != answers[200:300]).sum()) == run.errors


def test_same_command_same_numbers_and_what_it_prints(runs, tmp_path, capsys):
    assert digits.run(tiny(tmp_path)) == runs[1]
    printed, progress = capsys.readouterr()
    assert progress == ""  # no bar where stderr is no terminal
    assert "2 of 2 packed files loaded back: predictions bitwise identical on 100 images" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["ring-100", "100", "1,684.5"] in [line[:3] for line in lines]
    assert ["dense", "-", "-", "170,298"] in [line[:4] for line in lines]


def test_table_over_seeds():
    common = {"model": "ring-64", "dof": 64, "generated": 6400, "trainable": 70, "tested": 200, "file": "f"}
    found = [Run(**common, seed=seed, errors=errors, bytes=1500, seconds=2.0) for seed, errors in enumerate((4, 8))]
    (summary,) = summaries(found)
    assert (summary.error, summary.std) == pytest.approx((3.0, 2**0.5))
    assert table([summary]).splitlines()[-1].split() == [
        "ring-64", "64", "100.0", "70", "97.00", "+-", "1.41", "1.5", "KB", "2.0",
    ]  # fmt: skip


def test_power_law_recovers_its_exponent():
    dofs = (10, 100, 1000, 10_000)
    assert power_law(dofs, [70 * dof**-0.3 for dof in dofs], floor=1e-9) == pytest.approx((70, 0.3))
    assert power_law((10, 1000), (4.0, 0.0), floor=0.04) == pytest.approx((40, 1.0))


def test_picture_of_models_without_errors(tmp_path):
    common = {"seed": 0, "generated": 6400, "trainable": 70, "errors": 0, "tested": 200, "bytes": 1, "seconds": 1.0}
    found = summaries([Run(model=str(dof), dof=dof, file="f", **common) for dof in (None, 10, 100)])
    digits._draw(matplotlib.figure, found, power_law((10, 100), (0.0, 0.0), floor=0.25), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_missing_extra_is_said_before_anything_is_done(monkeypatch, tmp_path):
    for name in ("matplotlib.figure", "sklearn.datasets"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(FxrpgError, match=rf"{name}.*pip install 'fxrpg\[demo\]'"):
                digits.run(tiny(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_gives_another_model_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "load", lambda model, path: model)
    with pytest.raises(FxrpgError, match=r"ring-100-seed0\.safetensors.*bit for bit.*100 of 100"):
        digits.run(tiny(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds: must be 1 or more"),
        ({"dofs": (64,)}, "dofs: must be two or more different"),
        ({"dofs": (64, 64)}, "dofs: must be two or more different"),
        ({"batch": 1001}, "batch <= train"),
        ({"test": 798}, r"train \+ test <= 1797"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(FxrpgError, match=message):
        Demo(**settings)


def test_ring_larger_than_the_weights_is_said_before_training(tmp_path):
    with pytest.raises(FxrpgError, match="dof: must be an int in"):
        digits.run(Demo(out=tmp_path / "out", dofs=(64, 10**6)))
    assert not (tmp_path / "out").exists()
