"""PrancTrainer: what does not move keeps every bit, choices follow from seed and steps, prefixes train as they are cut."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import fxrpg
from fxrpg import FxrpgError, PrancTrainer
from fxrpg.assemble import plan_of

K = 24
OPTIMIZERS = {
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "adam-amsgrad-decay": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01),
    "sgd-momentum": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, initial_accumulator_value=0.5),
    "adadelta": functools.partial(torch.optim.Adadelta, lr=1.0),
    "nadam-loop": functools.partial(torch.optim.NAdam, lr=0.01, foreach=False),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def model_of(dof=K, **settings) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, 3))
    model = fxrpg.transform(layers, **{"dof": dof, "method": "pranc", **settings})
    with torch.no_grad():
        for state in plan_of(model).states:
            alpha = model.get_parameter(state)
            alpha.copy_(torch.randn(len(alpha), generator=torch.Generator().manual_seed(5)))
    return model


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module):
    return lambda: (model(X) - Y).square().mean()


def entries(optimizer: torch.optim.Optimizer, alpha: Tensor) -> dict[str, Tensor]:
    """The coefficients, and what the optimizer keeps for each of them."""
    kept = {key: value for key, value in optimizer.state[alpha].items() if torch.is_tensor(value) and value.dim()}
    return {key: value.detach().clone() for key, value in {"alpha": alpha, **kept}.items()}


# Coordinate descent.


@EVERY_OPTIMIZER
@pytest.mark.parametrize("warm", [0, 3])
def test_what_is_not_active_keeps_every_bit(make, warm):
    model = model_of()
    optimizer, alpha = make(model.parameters()), model.fxrpg_alpha
    for _ in range(warm):
        PrancTrainer(model, optimizer).step(loss_of(model))
    trainer = PrancTrainer(model, optimizer, active=7, period=2, seed=3)
    for _ in range(5):
        before, dense = entries(optimizer, alpha), model[1].weight.detach().clone()
        plain_model, plain_optimizer = copy.deepcopy((model, optimizer))
        plain_optimizer.zero_grad()
        loss_of(plain_model)().backward()
        plain_optimizer.step()
        moves = trainer.active("fxrpg_alpha")
        assert moves.sum() == 7
        trainer.step(loss_of(model))
        after, plain = entries(optimizer, alpha), entries(plain_optimizer, plain_model.fxrpg_alpha)
        assert after.keys() == plain.keys()
        for key, value in before.items():
            assert torch.equal(after[key][~moves], value[~moves]), key
        for key, value in after.items():
            assert torch.equal(value[moves], plain[key][moves]), key
        assert bool((after["alpha"] != before["alpha"])[moves].all())
        assert not torch.equal(model[1].weight, dense)
        assert torch.equal(model[1].weight, plain_model[1].weight)


@EVERY_OPTIMIZER
def test_all_active_is_plain_training(make):
    found = []
    for active in (None, K, "plain"):
        model = model_of()
        optimizer = make(model.parameters())
        trainer = None if active == "plain" else PrancTrainer(model, optimizer, active=active)
        for _ in range(4):
            if trainer:
                trainer.step(loss_of(model))
            else:
                optimizer.zero_grad()
                loss_of(model)().backward()
                optimizer.step()
        found.append(dict(model.named_parameters()))
    for other in found[1:]:
        assert all(torch.equal(other[name], parameter) for name, parameter in found[0].items())


def test_step_returns_the_loss_before_it():
    model = model_of()
    expected = loss_of(model)().detach()
    loss = PrancTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1)).step(loss_of(model))
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert loss_of(model)() < expected


def trainer_of(model: nn.Module | None = None, **settings) -> PrancTrainer:
    model = model or model_of()
    return PrancTrainer(model, torch.optim.Adam(model.parameters()), **settings)


def choices(trainer: PrancTrainer, steps: int) -> list[list[bool]]:
    found = []
    for trainer.steps in range(steps):
        found.append(trainer.active("fxrpg_alpha").tolist())
    return found


def test_choices_follow_from_seed_and_steps():
    first = choices(trainer_of(active=7), 40)
    assert choices(trainer_of(model_of(seed=9, method=fxrpg.Pranc(law="normal")), active=7), 40) == first
    assert choices(trainer_of(active=7, seed=1), 40) != first
    assert all(sum(moves) == 7 for moves in first)
    assert len({tuple(moves) for moves in first}) == 40
    assert all(any(column) for column in zip(*first, strict=True)), "one never moves"
    resumed = trainer_of(active=7)
    resumed.steps = 17
    assert resumed.active("fxrpg_alpha").tolist() == first[17]


def test_golden_choice():
    assert trainer_of(active=4, seed=7).active("fxrpg_alpha").nonzero().flatten().tolist() == [0, 3, 8, 23]


@pytest.mark.parametrize("period", [1, 2, 5])
def test_others_are_chosen_after_a_period(period):
    once, often = choices(trainer_of(active=7), 4), choices(trainer_of(active=7, period=period), 4 * period)
    assert often == [moves for moves in once for _ in range(period)]


def test_steps_are_counted():
    model = model_of()
    trainer = trainer_of(model, active=7, period=2)
    seen = []
    for expected in range(5):
        assert trainer.steps == expected
        seen.append(trainer.active("fxrpg_alpha"))
        trainer.step(loss_of(model))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])


def test_every_scope_moves_its_share():
    model = model_of({"0": 30, "3": 10}, scope="layer")
    trainer = trainer_of(model, active=8)
    before = {state: model.get_parameter(state).detach().clone() for state in plan_of(model).states}
    moves = {state: trainer.active(state) for state in before}
    assert [int(m.sum()) for m in moves.values()] == [6, 2]
    trainer.step(loss_of(model))
    for state, old in before.items():
        assert torch.equal(model.get_parameter(state) != old, moves[state])


def test_other_methods_beside_train_at_every_step():
    model = model_of(plan=[fxrpg.Rule("3.weight", "ring", dof=9)])
    trainer = trainer_of(model, active=3)
    alpha, ring = model.fxrpg_alpha.detach().clone(), model.fxrpg_ring.detach().clone()
    trainer.step(loss_of(model))
    assert (model.fxrpg_alpha != alpha).sum() == 3
    assert bool((model.fxrpg_ring != ring).all())


def test_truncated_coefficients_stay_truncated():
    model = fxrpg.truncate(model_of(), 9)
    live = model.fxrpg_alpha != 0
    for settings in ({"active": 12}, {"nested": True}):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        trainer = PrancTrainer(model, optimizer, **settings)
        for _ in range(4):
            trainer.step(loss_of(model))
        assert torch.equal(model.fxrpg_alpha != 0, live)


# Nested training.


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_nested_gradients_are_those_of_both_losses(scope):
    model = model_of(scope=scope)
    trainer = PrancTrainer(model, torch.optim.SGD(model.parameters(), lr=0.125), nested=True, seed=2)
    for _ in range(6):
        parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        cut = dict(parameters)
        for state in plan_of(model).states:
            mask = torch.arange(len(parameters[state])) < trainer.prefix(state)
            cut[state] = parameters[state] * mask
        losses = [(torch.func.functional_call(model, p, X) - Y).square().mean() for p in (parameters, cut)]
        gradients = torch.autograd.grad(sum(losses), list(parameters.values()))
        loss = trainer.step(loss_of(model))
        torch.testing.assert_close(loss, losses[0].detach())
        for (name, old), gradient in zip(parameters.items(), gradients, strict=True):
            new = model.get_parameter(name)
            torch.testing.assert_close(new.grad, gradient)
            assert torch.equal(new, old.detach() - 0.125 * new.grad), name


def test_nested_steps_have_their_full_values_while_the_optimizer_runs():
    model = model_of()
    trainer, before = trainer_of(model, nested=True, active=5), model.fxrpg_alpha.detach().clone()
    moves = trainer.active("fxrpg_alpha")
    trainer.step(loss_of(model))
    assert torch.equal(model.fxrpg_alpha != before, moves)


def test_prefixes_are_drawn_from_all_lengths():
    trainer, found = trainer_of(nested=True), []
    for trainer.steps in range(400):
        found.append(trainer.prefix("fxrpg_alpha"))
    assert set(found) == set(range(1, K + 1))
    assert abs(sum(found) / 400 - (K + 1) / 2) < 5 * (K**2 / 12 / 400) ** 0.5
    again = trainer_of(nested=True)
    again.steps = 123
    assert again.prefix("fxrpg_alpha") == found[123]
    other = trainer_of(nested=True, seed=1)
    assert [other.prefix("fxrpg_alpha") for other.steps in range(20)] != found[:20]


def test_a_single_coefficient():
    model = model_of(dof=1)
    trainer = trainer_of(model, nested=True, active=1)
    assert trainer.prefix("fxrpg_alpha") == 1
    before = model.fxrpg_alpha.detach().clone()
    trainer.step(loss_of(model))
    assert model.fxrpg_alpha != before


def test_prefixes_of_a_nested_model_work():
    """Cut to half, a model trained so is better than one that was not."""
    losses = {}
    for nested in (False, True):
        model = model_of(dof=40)
        trainer = PrancTrainer(model, torch.optim.Adam(model.parameters(), lr=0.03), nested=nested)
        for _ in range(150):
            trainer.step(loss_of(model))
        losses[nested] = [loss_of(fxrpg.truncate(model, k, order="index"))().item() for k in (40, 20, 10)]
    for whole, half, quarter in losses.values():
        assert whole < half
        assert whole < quarter
    assert losses[True][1] < 0.5 * losses[False][1]
    assert losses[True][2] < 0.5 * losses[False][2]


# Mistakes.


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_loss_that_raises_changes_no_coefficient(fails_at):
    model = model_of(scope="layer")
    optimizer = torch.optim.Adam(model.parameters())
    trainer = PrancTrainer(model, optimizer, nested=True, active=5)
    trainer.step(loss_of(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == fails_at:
            raise ValueError("no more data")
        return loss_of(model)()

    with pytest.raises(ValueError, match="no more data"):
        trainer.step(loss)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.steps == 1
    trainer.step(loss)
    assert trainer.steps == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 0}, r"PrancTrainer, active: must be an int in \[1, 24\], found 0"),
        ({"active": 25}, r"PrancTrainer, active: must be an int in \[1, 24\], found 25"),
        ({"active": 5.0}, "PrancTrainer, active: must be an int in .*, found 5.0"),
        ({"active": True}, "PrancTrainer, active: must be an int in .*, found True"),
        ({"active": "5"}, "PrancTrainer, active: must be an int in .*, found '5'"),
        ({"period": 0}, "PrancTrainer, period: must be an int of 1 or more, found 0"),
        ({"period": None}, "PrancTrainer, period: must be an int of 1 or more, found None"),
        ({"period": 1.5}, "PrancTrainer, period: must be an int of 1 or more, found 1.5"),
        ({"period": True}, "PrancTrainer, period: must be an int of 1 or more, found True"),
        ({"seed": -1}, "seed: must be an int in"),
        ({"seed": 0.5}, "seed: must be an int in"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(FxrpgError, match=message):
        trainer_of(**settings)


def test_models_and_optimizers_are_checked():
    model, needs = model_of(), "PrancTrainer: needs a PRANC model and an optimizer of its coefficients, found"
    with pytest.raises(FxrpgError, match=f"{needs} an optimizer without them"):
        PrancTrainer(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    for method in ("ring", "pemn"):
        other = fxrpg.transform(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)), dof=5, method=method)
        with pytest.raises(FxrpgError, match=f"{needs} no coefficients"):
            PrancTrainer(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(FxrpgError, match="must be a transformed model"):
        PrancTrainer(nn.Linear(3, 3), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(FxrpgError, match=r"active: must be an int in \[2, 24\]"):
        trainer_of(model_of(scope="layer"), active=1)
    model.fxrpg_alpha.requires_grad_(False)
    with pytest.raises(FxrpgError, match=f"{needs} frozen ones"):
        PrancTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_rprop_starts_resting_coefficients_with_its_own_step_size():
    small = fxrpg.transform(nn.Linear(5, 6), dof=20, method="pranc")
    optimizer = torch.optim.Rprop([small.fxrpg_alpha], lr=0.01)
    trainer = fxrpg.PrancTrainer(small, optimizer, active=4)
    x, resting = torch.randn(8, 5), ~trainer.active("fxrpg_alpha")
    trainer.step(lambda: small(x).square().mean())
    assert bool((optimizer.state[small.fxrpg_alpha]["step_size"][resting] == 0.01).all())


@pytest.mark.parametrize("optimizer", [None, "adam", "lbfgs"])
def test_an_optimizer_that_cannot_step_so_is_refused(optimizer):
    small = fxrpg.transform(nn.Linear(5, 6), dof=20, method="pranc")
    optimizer = torch.optim.LBFGS([small.fxrpg_alpha]) if optimizer == "lbfgs" else optimizer
    with pytest.raises(fxrpg.FxrpgError, match="steps without a closure"):
        fxrpg.PrancTrainer(small, optimizer)


@pytest.mark.parametrize("nested", ["no", 1, None])
def test_nested_is_a_switch(nested):
    small = fxrpg.transform(nn.Linear(5, 6), dof=20, method="pranc")
    with pytest.raises(fxrpg.FxrpgError, match="must be True or False"):
        fxrpg.PrancTrainer(small, torch.optim.SGD(small.parameters(), lr=1.0), nested=nested)


def test_a_loss_in_the_place_of_a_function_is_refused():
    small = fxrpg.transform(nn.Linear(5, 6), dof=20, method="pranc")
    trainer = fxrpg.PrancTrainer(small, torch.optim.SGD(small.parameters(), lr=1.0))
    with pytest.raises(fxrpg.FxrpgError, match="needs a function that returns the loss, found Tensor"):
        trainer.step(small(torch.randn(2, 5)).sum())


def test_a_step_that_fails_loses_no_coefficient():
    small = fxrpg.transform(nn.Linear(5, 6), dof=20, method="pranc")
    small.fxrpg_alpha.detach().copy_(torch.linspace(1, 2, 20))
    optimizer = torch.optim.SGD([small.fxrpg_alpha], lr=1.0)
    trainer = fxrpg.PrancTrainer(small, optimizer, active=4)

    def fail(*_):
        raise RuntimeError("no step")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step"):
        trainer.step(lambda: small(torch.ones(2, 5)).square().mean())
    resting = ~trainer.active("fxrpg_alpha")
    assert torch.equal(small.fxrpg_alpha[resting], torch.linspace(1, 2, 20)[resting])
    assert trainer.steps == 0
