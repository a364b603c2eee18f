"""The claims bench: its models, its table in the README, and what its verdicts mean."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

claims = pytest.importorskip("claims", reason="needs scikit-learn and scipy; pip install 'fxrpg[demo]'")


def rows(task, model, values):
    return [
        {"task": task, "model": model, "seed": str(seed), "value": str(value), "dof": "1", "bytes": "1000"}
        for seed, value in enumerate(values)
    ]


def test_the_readme_shows_what_the_csv_file_holds():
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- claims -->\n```text\n")[2].partition("\n```\n<!-- end of claims -->")[0]
    assert shown == claims.report(claims.read())


@pytest.mark.parametrize("task", ["digits", "scenes"])
def test_every_model_has_five_seeds(task):
    found = claims.read()
    for name in claims.MODELS:
        seeds = {row["seed"] for row in found if (row["task"], row["model"]) == (task, name)}
        assert seeds == {str(seed) for seed in range(claims.SEEDS)}, name


def test_every_claim_is_about_models_that_are_measured():
    measured = {row["model"] for row in claims.read()}
    assert {name for claim in claims.CLAIMS for name in (claim.better, claim.worse)} <= measured


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([90, 91, 92], [80, 81, 82.5], "holds"),
        ([80, 81, 82.5], [90, 91, 92], "does not hold"),
        ([80, 91, 82], [81, 82, 90], "within noise"),
    ],
)
def test_a_verdict_compares_the_mean_difference_with_its_error(better, worse, verdict):
    claim = claims.Claim("a > b", "a", "b")
    line = claims._verdict(claim, rows("digits", "a", better) + rows("digits", "b", worse))
    assert line[1].endswith(f", {verdict}")
    assert line[2] == ""  # not measured on scenes


@pytest.mark.parametrize("name", claims.MODELS)
def test_every_model_can_be_trained(name):
    task = claims._task("digits")
    model = claims.MODELS[name](task, 0)
    model(task.train_images[:8]).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_dense_models_of_one_size_are_as_near_as_widths_allow():
    task = claims._task("digits")
    ring, narrow = claims._ring(task, 0), claims._narrow(task, 0)
    assert 0.5 < claims._trainable(narrow) / claims._trainable(ring) < 2
