"""Training steps on the coefficients of a PRANC model: some at a time, or so that prefixes of them work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxrpg.assemble import plan_of
from fxrpg.errors import FxrpgError
from fxrpg.hashing import COORDINATE, Bijection, derive_key
from fxrpg.owner import tensor_at
from fxrpg.plan import checked_seed
from fxrpg.scopes import shares
from fxrpg.shares import is_sharded


class PrancTrainer:
    """Optimisation steps for a PRANC model, with any optimizer.

    `trainer.step(lambda: loss_of(model(x), y))` takes the place of `zero_grad`, `backward` and `optimizer.step`.

    Coordinate descent (PRANC, Section 3): with `active=m` only m coefficients, chosen at random, move for `period` steps,
    then others do. The rest keep their values and their entries in the optimizer's state (momenta, second moments), bit
    for bit; what the optimizer counts for a whole tensor, such as Adam's step, counts for all. Parameters that are no
    coefficients train at every step.

    Nested training (the paper's Section 6): with `nested=True` each step adds the loss of a random prefix of the
    coefficients to that of all, so that a model cut to any prefix (`fxrpg.truncate(model, k, order="index")`) works.

    Args:
        model: the result of `transform` with PRANC.
        optimizer: any that steps without a closure; its parameters hold the model's coefficients.
        active: how many coefficients move at a time; None moves all. With several scopes each gets its share.
        period: steps until others are chosen (the paper: an epoch).
        nested: train prefixes.
        seed: of the choices, which follow from it and the number of steps taken, `steps`, alone.

    Raises:
        FxrpgError: `model` is no PRANC model, or has coefficients that are frozen or split over ranks; a number is out of
            range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        active: int | None = None,
        period: int = 1,
        nested: bool = False,
        seed: int = 0,
    ) -> None:
        plan = plan_of(model)
        self._alphas = {
            state: tensor_at(model, state)
            for state, (name, *_) in plan.states.items()
            if plan.scope(name).generator.method == "pranc"
        }
        if any(is_sharded(alpha) for alpha in self._alphas.values()):
            found = "coefficients that are split over ranks"
            raise FxrpgError("PrancTrainer", "needs whole coefficients", found, "Step the optimizer itself.")
        sizes = {state: len(alpha) for state, alpha in self._alphas.items()}
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            fix = "Pass such as torch.optim.Adam(model.parameters())."
            found = type(optimizer).__name__
            raise FxrpgError("PrancTrainer", "needs a torch optimizer that steps without a closure", found, fix)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = [alpha for alpha in self._alphas.values() if id(alpha) in held and alpha.requires_grad]
        if not sizes or len(trained) < len(sizes):
            held_all = all(id(alpha) in held for alpha in self._alphas.values())
            found = "no coefficients" if not sizes else "frozen ones" if held_all else "an optimizer without them"
            fix = "Transform with method='pranc', and pass the coefficients to the optimizer."
            raise FxrpgError("PrancTrainer", "needs a PRANC model and an optimizer of its coefficients", found, fix)
        if active is not None:
            _check_count("active", active, len(sizes), sum(sizes.values()))
        _check_count("period", period, 1)
        if type(nested) is not bool:
            raise FxrpgError("PrancTrainer, nested", "must be True or False", repr(nested), "Pass one of them.")
        self.optimizer, self.period, self.nested, self.seed = optimizer, period, nested, checked_seed(seed)
        self.steps = 0
        self._active = None if active is None else shares(active, sizes)

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step on `loss`, a function that runs the model and returns the loss. Returns the loss before it, detached."""
        if not callable(loss):
            fix = "Write trainer.step(lambda: loss_of(model(x), y))."
            raise FxrpgError("PrancTrainer.step", "needs a function that returns the loss", type(loss).__name__, fix)
        self.optimizer.zero_grad()
        value = loss()
        value.backward()
        if self.nested:
            self._add_prefix_gradient(loss)
        self.advance()
        return value.detach()

    def advance(self) -> None:
        """What follows the gradients in a step, for loops that make them by themselves: the optimizer's step."""
        if self._active is None:
            self.optimizer.step()
        else:
            self._step_active()
        self.steps += 1

    def active(self, state: str) -> Tensor:
        """Which coefficients of `state` move in the step to come: bool [k]."""
        alpha = self._alphas[state]
        if self._active is None:
            return torch.ones(len(alpha), dtype=torch.bool, device=alpha.device)
        order = Bijection.keyed(len(alpha), self.seed, COORDINATE, self.steps // self.period)
        chosen = order(torch.arange(self._active[state], device=alpha.device))
        return torch.zeros(len(alpha), dtype=torch.bool, device=alpha.device).index_fill_(0, chosen, True)

    def prefix(self, state: str) -> int:
        """How many coefficients of `state` the prefix of the step to come has, from 1 to k."""
        return 1 + (derive_key(self.seed, COORDINATE, self.steps, 0, 0) * len(self._alphas[state]) >> 32)

    def _add_prefix_gradient(self, loss: Callable[[], Tensor]) -> None:
        """Add the gradient of the loss with the coefficients past the prefixes at zero; theirs stays as it is."""
        saved = {}
        for state, alpha in self._alphas.items():
            first = self.prefix(state)
            grad = None if alpha.grad is None else alpha.grad[first:].clone()
            saved[state] = first, alpha.detach()[first:].clone(), grad
            with torch.no_grad():
                alpha[first:] = 0
        try:
            loss().backward()
        finally:
            with torch.no_grad():
                for state, alpha in self._alphas.items():
                    first, values, grad = saved[state]
                    alpha[first:] = values
                    if alpha.grad is not None:
                        alpha.grad[first:] = 0 if grad is None else grad

    def _step_active(self) -> None:
        """The optimizer's step for the active coefficients: it sees the others as zeros without gradient; they are put back.

        So what it keeps for them from a first step on is what it starts with (zeros, Rprop's step sizes).
        """
        before: dict[str, tuple[Tensor, Tensor | None, dict[str, Tensor]]] = {}
        moving = {state: self.active(state) for state in self._alphas}
        with torch.no_grad():
            for state, alpha in self._alphas.items():
                grad = None if alpha.grad is None else alpha.grad.clone()
                moments = {key: value.clone() for key, value in self._moments(alpha).items()}
                before[state] = alpha.detach().clone(), grad, moments
                for tensor in (alpha, alpha.grad):
                    if tensor is not None:
                        tensor.masked_fill_(~moving[state], 0)
        try:
            self.optimizer.step()
        finally:
            for state, alpha in self._alphas.items():
                self._put_back(alpha, moving[state], *before[state])

    @torch.no_grad()
    def _put_back(
        self, alpha: Tensor, moves: Tensor, values: Tensor, grad: Tensor | None, moments: dict[str, Tensor]
    ) -> None:
        """Give resting coefficients what they and the optimizer's state had before, and all their gradients."""
        alpha.copy_(torch.where(moves, alpha, values))
        if grad is not None and alpha.grad is not None:
            alpha.grad.copy_(grad)
        for key, value in self._moments(alpha).items():
            if key in moments:
                value.copy_(torch.where(moves, value, moments[key]))

    def _moments(self, alpha: Tensor) -> dict[str, Tensor]:
        """What the optimizer keeps for every single coefficient."""
        kept = self.optimizer.state.get(alpha, {})
        return {key: v for key, v in kept.items() if isinstance(v, Tensor) and v.shape == alpha.shape and v.dim()}


def _check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= (most or value):
        each = ", one or more for each scope" if name == "active" and least > 1 else ""
        must = f"must be an int in [{least}, {most}]{each}" if most else f"must be an int of {least} or more"
        raise FxrpgError(f"PrancTrainer, {name}", must, repr(value), "Pass one.")
