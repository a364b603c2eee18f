"""The bench of the ring's learning rate: its fits find what was put in, and its groups are those that it says."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

import fxrpg

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

learning_rate = pytest.importorskip("learning_rate", reason="needs scikit-learn; pip install 'fxrpg[demo]'")

GRID = [4.0**power for power in range(-5, 4)]
USES = [1.0, 2.6, 10.3, 41.1, 164.5, 658.0]


def accuracies(p: float, constant: float = 2.0) -> list[list[float]]:
    """Of each size and multiplier, where the best multiplier is constant * uses^-p."""
    return [[90 - np.log2(m / (constant * uses**-p)) ** 2 for m in GRID] for uses in USES]


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.75])
def test_a_power_is_found(p):
    rows = accuracies(p)
    tops = [learning_rate.best(GRID, row) for row in rows]
    assert tops == pytest.approx([np.log2(2 * uses**-p) for uses in USES])
    assert learning_rate.power(USES, tops) == pytest.approx(p)
    means = {q: learning_rate.following(GRID, USES, rows, q) for q in learning_rate.POWERS}
    assert max(means, key=means.get) == p


def test_a_best_multiplier_at_the_edge_stays_there():
    assert learning_rate.best([1.0, 4.0, 16.0], [3.0, 2.0, 1.0]) == 0
    assert learning_rate.best([1.0, 4.0, 16.0], [1.0, 2.0, 3.0]) == 4


def test_only_complete_seeds_count():
    case = learning_rate.CASES[0]
    rows = [
        {"model": case.model, "optimizer": case.optimizer, "dof": "" if dof is None else str(dof), "seed": str(seed),
         "multiplier": str(multiplier), "uses": str(uses), "accuracy": "90"}
        for seed in range(2) for (dof, uses), multiplier in itertools.product(
            zip(learning_rate.SIZES, USES, strict=True), case.multipliers)
    ]  # fmt: skip
    assert learning_rate._grid(case, rows[:-1])[1].shape == (1, 6, 7)
    assert learning_rate._grid(case, rows)[1].shape == (2, 6, 7)
    assert case.name in learning_rate.report(rows)
    assert learning_rate.CASES[1].name not in learning_rate.report(rows)


@pytest.mark.parametrize("name", learning_rate.MODELS)
def test_the_same_weights_get_the_rate(name):
    """Of a dense model those that a ring would generate; everything else learns as it does beside a ring."""
    build = learning_rate.MODELS[name]
    small, rings, uses = learning_rate.groups_of(build(0), 256, 0.1, 0.5, 0)
    dense, plain, one = learning_rate.groups_of(build(0), None, 0.1, 0.5, 0)
    rates = [{group["name"]: (group["lr"], group["weight_decay"]) for group in groups} for groups in (rings, plain)]
    assert rates[0] == rates[1]
    assert rates[0]["ring"] == (0.05, 5e-4)
    sizes = [{group["name"]: sum(p.numel() for p in group["params"]) for group in groups} for groups in (rings, plain)]
    assert sizes[0]["ring"] == 256
    assert sizes[1]["ring"] == fxrpg.ledger(small).generated
    assert sizes[0] | {"ring": 0} == sizes[1] | {"ring": 0}
    assert (uses, one) == (sizes[1]["ring"] / 256, 1.0)
    assert sum(p.numel() for p in dense.parameters()) == sum(sizes[1].values())


def test_every_row_is_of_a_case():
    wanted = {(c.model, c.optimizer, m) for c in learning_rate.CASES for m in c.multipliers}
    rows = learning_rate.read()
    assert {(row["model"], row["optimizer"], float(row["multiplier"])) for row in rows} == wanted
    keys = [tuple(row[key] for key in learning_rate.KEY) for row in rows]
    assert len(keys) == len(set(keys))
