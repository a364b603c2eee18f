"""The bench: its cases are the networks' own layers, and what is wrong is never timed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxrpg.networks as papers

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench import contest, layer_contest, measure, networks  # noqa: E402
from bench.cases import CASES, SWEPT, TINY_CASES, LayerCase, chosen  # noqa: E402
from bench.contest import Contest, Contestant, Result, disagreement, held  # noqa: E402
from bench.layers import NETWORKS, TINY  # noqa: E402
from bench.measure import Budget, Ceilings, Clock, in_turn, timing_of  # noqa: E402

CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth=1e9, rate={torch.float32: 1e9})


def weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


# Cases.


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("resnet18", papers.resnet18),
        ("resnet20", papers.resnet20),
        *((name, networks.NETWORKS[name][0]) for name in ("resnet18", "resnet50", "vit", "convnext")),
    ],
)
def test_layers_are_those_of_the_network(network, expected):
    with torch.device("meta"):
        model = expected()
    assert sum(layer.count * layer.times for layer in NETWORKS[network]) == weights(model)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("vit", 86_567_656), ("convnext", 28_589_128)],
)
def test_networks_are_as_large_as_torchvision_has_them(name, parameters):
    with torch.device("meta"):
        model = networks.NETWORKS[name][0]()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_blocks_of_llama():
    """8,030,261,248 parameters, of which two tables of 128,256 tokens and 65 norms are no layers here."""
    assert sum(x.count * x.times for x in NETWORKS["llama"]) == 8_030_261_248 - 2 * 128_256 * 4096 - 65 * 4096


@pytest.mark.parametrize("layer", [layer for some in NETWORKS.values() for layer in some if layer.image], ids=str)
def test_sizes_of_convolutions(layer):
    there, back = layer.sizes(2)
    x, weight = torch.empty(there, device="meta"), torch.empty(layer.shape, device="meta")
    stride, padding, dilation, _, _, groups = layer.config
    assert nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups).shape == back
    assert layer.flops(2) == 2 * 2 * back[2] * back[3] * layer.count


def test_cases_are_well_formed():
    every = (*CASES, *TINY_CASES)
    titles = [case.title for case in every]
    assert len(set(titles)) == len(titles)
    assert [case.rank for case in CASES] == sorted(case.rank for case in CASES)
    assert {case.kind for case in CASES} == {"layer", "decode", "pranc", "model"}
    assert {case.kind for case in chosen(quick=True, cpu=False)} == {"layer", "decode", "pranc", "model"}
    assert all(case.goal == 1.0 for case in every if case.kind == "decode")
    for network, names in SWEPT.items():
        for name in names:
            found = {(c.batch, c.direction) for c in CASES if f"/{network}/{name}/" in c.name}
            assert len(found) == 12, (network, name)
    assert not [case for case in chosen(quick=False, cpu=True) if case.batch > 32]
    assert [case.title for case in chosen(quick=True, cpu=True, only="*/linear/*/dgrad")] == [
        "layer/tiny/linear/b2/dgrad"
    ]


# Measuring.


def test_median_and_spread():
    timing = timing_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.milliseconds == 3.0
    assert timing.spread == pytest.approx((52.0 - 1.5) / 2 / 3)
    assert timing_of([7.0]) == measure.Timing(7.0, 0.0)


def test_calls_are_made_in_turn_and_warm_rounds_do_not_count(monkeypatch):
    monkeypatch.setattr(measure, "MOST_ROUNDS", 9)
    calls, rounds = [object(), object(), object()], []

    def round_of(some):
        rounds.append(list(some))
        return [(1000.0 if len(rounds) <= 2 else 1.0) + calls.index(call) for call in some]

    found = in_turn(calls, 60.0, round_of, warm=2)
    assert len(rounds) == 11
    assert all(sorted(map(id, some)) == sorted(map(id, calls)) for some in rounds)
    assert len({tuple(map(id, some)) for some in rounds}) > 1, "not always in the same order"
    assert [timing.milliseconds for timing in found] == [1.0, 2.0, 3.0]


def test_one_round_is_made_however_little_time_there_is():
    made = []
    found = in_turn([lambda: None], 0.0, lambda calls: made.append(1) or [5.0])
    assert (len(made), found[0].milliseconds) == (1, 5.0)


def test_budget():
    now = [0.0]
    budget = Budget(100.0, clock=lambda: now[0])
    assert budget.share("layer", 4) == 25.0
    with budget.spending("layer", timing=10.0):
        now[0] = 60.0
    assert budget.share("model", 2) == 20.0
    assert budget.share("layer", 2) == 0.0, "to set one up took 50 seconds"
    now[0] = 99.0
    assert budget.share("model", 1) == 0.0


def test_roofline():
    assert CEILINGS.fraction(2.0, flops=1e6, bytes_moved=10, dtype=torch.float32) == pytest.approx(0.5)
    assert CEILINGS.fraction(2.0, flops=10, bytes_moved=1e6, dtype=torch.float32) == pytest.approx(0.5)


# What fails its test is not timed.


def test_disagreement():
    truth = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert disagreement(truth * (1 + 1e-6), truth, 1e-4) == ""
    assert "relative error" in disagreement(truth * 1.01, truth, 1e-4)
    assert "shape" in disagreement(truth[1:], truth, 1e-4)
    for wrong, message in ((torch.nan, "not finite"), (truth[0, 0] + 0.05, "an element is wrong")):
        found = truth.clone()
        found[0, 0] = wrong
        assert message in disagreement(found, truth, 1e-3)


def contestant(name: str, value: object, calls: list[str], **rest) -> Contestant:
    def call():
        calls.append(name)
        if isinstance(value, Exception):
            raise value
        return value

    return Contestant(name=name, call=call, problem=lambda found: "" if found == 1 else "it is wrong", **rest)


def test_what_is_wrong_is_never_timed():
    calls: list[str] = []
    some = [
        contestant("dense", 1, calls),
        contestant("good", 1, calls),
        contestant("wrong", 2, calls),
        contestant("broken", ValueError("no\nkernel"), calls),
        contestant("compiler", ValueError("none"), calls, opponent=True),
        contestant("large", torch.OutOfMemoryError("no"), calls),
        contestant("other", 1, calls, wants="fused"),
    ]
    found = held(Contest(contestants=some, flops=1000, dtype=torch.float32), CEILINGS, Clock(CPU), 0.01)
    assert [result.status for result in found] == [
        "ok",
        "ok",
        "failed: it is wrong",
        "failed: ValueError: no kernel",
        "skipped: ValueError: none",
        "skipped: out of memory",
        "ran ",
    ]
    assert [result.milliseconds is not None for result in found] == [True, True, False, False, False, False, True]
    assert [calls.count(name) for name in ("wrong", "broken", "compiler")] == [1, 1, 1]
    assert found[0].ratio == 1.0
    assert found[1].ratio == found[1].milliseconds / found[0].milliseconds


def test_without_the_dense_time_there_is_no_ratio():
    calls: list[str] = []
    some = [contestant("dense", 2, calls), contestant("good", 1, calls)]
    found = held(Contest(contestants=some, flops=1, dtype=torch.float32), CEILINGS, Clock(CPU), 0.01)
    assert found[1].milliseconds is not None
    assert found[1].ratio is None


def test_replays_are_compared_with_replays_and_calls_with_calls(monkeypatch):
    """On a GPU: what cannot be captured is timed together with the dense op's calls."""
    cost = {"dense": 4.0, "good": 6.0, "stubborn": 10.0, "dense replayed": 1.0, "good replayed": 3.0}
    refused = ["stubborn"]
    monkeypatch.setattr(contest, "captured", lambda call: None if call in refused else f"{call} replayed")
    clock = SimpleNamespace(device=SimpleNamespace(type="cuda"), round=lambda calls: [cost[call] for call in calls])

    def timed() -> list[tuple]:
        some = [Contestant(name=name, call=name, problem=str) for name in ("dense", "good", "stubborn")]
        results = [Result(contestant=one.name) for one in some]
        made = Contest(contestants=some, flops=1, dtype=torch.float32)
        contest._time(list(zip(some, results, strict=True)), made, clock, 0.0)
        return [(result.timing, result.milliseconds, result.ratio) for result in results]

    assert timed() == [("graph", 1.0, None), ("graph", 3.0, None), ("calls", 10.0, 2.5)]
    refused.append("dense")
    assert timed() == [("calls", 4.0, None), ("calls", 6.0, None), ("calls", 10.0, None)]


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.name)
@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad"])
def test_every_op_in_sixteen_bits(layer, direction):
    case = next(c for c in TINY_CASES if isinstance(c, LayerCase) and (c.layer, c.direction) == (layer, direction))
    found = held(layer_contest.contest(case, CPU, torch.bfloat16), CEILINGS, Clock(CPU), 0.0)
    assert {result.status for result in found} == {"ok"}


@pytest.mark.kernels
def test_a_fused_contestant_proves_that_it_ran_fused():
    case = next(c for c in TINY_CASES if c.title == "layer/tiny/linear/b2/forward")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = layer_contest.contest(case, device, torch.float32)
    made.contestants = [c for c in made.contestants if c.name in ("dense", "ring fused", "ring staged")]
    found = {result.contestant: result for result in held(made, CEILINGS, Clock(device), 0.0)}
    assert {result.status for result in found.values()} == {"ok"}
    assert (found["ring fused"].path, found["ring staged"].path) == ("fused", "staged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "launches", lambda device: 0)
        found = {result.contestant: result for result in held(made, CEILINGS, Clock(device), 0.0)}
    assert found["ring fused"].status.startswith("ran unproved")
