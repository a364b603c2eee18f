"""The table of recipes: the papers' numbers, at any length of run."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxrpg import FxrpgError
from fxrpg.schedules import SCHEDULES, known, schedule_for


def rates(name, steps_per_epoch=10, epochs=None):
    """The learning rate of every step, as the optimizer has it."""
    schedule = SCHEDULES[name]
    steps = (epochs or schedule.epochs) * steps_per_epoch
    optimizer, scheduler = schedule.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}], schedule.lr, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "drops", "gamma"),
    [("rpg-cifar", (60, 120, 160), 0.1), ("rpg-imagenet", (75, 150), 0.1), ("pranc", (1600,), 0.1)],
)
def test_drops_come_after_the_papers_epochs(name, drops, gamma):
    found = rates(name, steps_per_epoch=2)
    changes = [(i / 2, b / a) for i, (a, b) in enumerate(itertools.pairwise(found), 1) if a != b]
    assert changes == [(drop, pytest.approx(gamma)) for drop in drops]
    assert found[0] == SCHEDULES[name].lr


def test_pranc_code_is_step_lr():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], 1e-3)
    theirs, expected = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.5), []
    for _ in range(400):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates("pranc-code", steps_per_epoch=1) == pytest.approx(expected)


def test_cosine_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    theirs, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000), []
    for _ in range(1000):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates("pemn-resnet") == pytest.approx(expected, abs=1e-8)


def test_triangle():
    found = rates("pemn-convmixer")
    assert found[399] == max(found) == 0.05
    assert found[199] == pytest.approx(0.025)
    assert found[799] == pytest.approx(0.05 / 20)
    assert found[-1] == pytest.approx(0)
    assert found[:400] == sorted(found[:400])
    assert found[399:] == sorted(found[399:], reverse=True)


def test_a_shorter_run_has_its_drops_at_the_same_share():
    found = rates("rpg-cifar", steps_per_epoch=3, epochs=20)
    assert [i for i, (a, b) in enumerate(itertools.pairwise(found), 1) if a != b] == [18, 36, 48]


@pytest.mark.parametrize("name", SCHEDULES)
def test_optimizers(name):
    schedule = SCHEDULES[name]
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer, _ = schedule.build([{"params": parameters}, {"params": [], "weight_decay": 0.0}], 0.5, 10)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    assert type(optimizer) is kinds[schedule.optimizer]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [schedule.weight_decay, 0.0]
    assert optimizer.param_groups[0].get("momentum", 0.9) == 0.9
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


def test_lengths_and_batches():
    assert {name: (s.epochs, s.batch, s.lr, s.weight_decay) for name, s in SCHEDULES.items()} == {
        "rpg-cifar": (200, 128, 0.1, 5e-4),
        "rpg-imagenet": (225, 256, 0.3, 3e-5),
        "pranc": (2000, 256, 1e-3, 0),
        "pranc-code": (400, 256, 1e-3, 0),
        "pemn-convmixer": (100, 512, 0.05, 0.005),
        "pemn-vit": (200, 256, 1e-4, 0),
        "pemn-resnet": (100, 256, 0.1, 5e-4),
    }


@pytest.mark.parametrize(
    ("method", "data", "model", "name"),
    [
        ("ring", "cifar100", "resnet18", "rpg-cifar"),
        ("ring", "imagefolder", "resnet18", "rpg-imagenet"),
        ("ring", "cifar10", "vit-512-6", "rpg-cifar"),
        ("pranc", "imagefolder", "resnet18", "pranc"),
        ("pranc", "cifar10", "convnet", "pranc"),
        ("pemn", "cifar10", "convmixer-512-6", "pemn-convmixer"),
        ("pemn", "cifar10", "vit-256-8", "pemn-vit"),
        ("pemn", "imagefolder", "resnet50", "pemn-resnet"),
        ("dense", "cifar10", "convmixer-256-6", "pemn-convmixer"),
        ("dense", "cifar10", "resnet20", "rpg-cifar"),
        ("dense", "imagefolder", "resnet34", "rpg-imagenet"),
    ],
)
def test_which_recipe(method, data, model, name):
    assert schedule_for(method, data, model) == name


def test_unknown_recipe():
    with pytest.raises(FxrpgError, match="--recipe: must be one of rpg-cifar.*found 'adam'"):
        known("adam")
