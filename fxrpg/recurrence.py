"""Sub-network recurrence: the same module several times, each time with weights of its own from one shared state."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxrpg.assemble import check_untransformed, copy_module
from fxrpg.errors import FxrpgError
from fxrpg.roles import NORMS, PLAIN_KINDS, Role, parametrized_layers, role_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unrolled(nn.ModuleList):
    """The steps of a recurrence, in their order. Called, it runs them one after the other on what the last one returned.

    It is a list too: `for step in unrolled: x = x + step(x)` writes any other recurrence.
    """

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        for step in self:
            x = step(x, *args, **kwargs)
        return x


def unroll(module: nn.Module, times: int, *, own_norm: bool = True) -> Unrolled:
    """`module` written out `times` times, so that `transform` gives each time its own view of one ring.

    Steps share every parameter of `module` but its weights (of convolutions, linear layers, embeddings...): those get a
    view each, with a permutation and signs of its own, from a ring that may be as small as one step:
    `fxrpg.transform(net, dof=1 / times)`, or `plan=[fxrpg.Rule(net.core, "generate", dof=...)]`. (arXiv:2107.07110,
    Section 4, sub-network level; with fresh norms and views its recurrent models are best.)

    Args:
        module: what is to recur; untouched. The first step is a copy too.
        times: how often, 1 or more.
        own_norm: give each step its own normalisation layers, statistics included (BatchNorm, GroupNorm, LayerNorm,
            RMSNorm); else all share those of the first.

    Raises:
        FxrpgError: `times` below 1; a module that is transformed, or has hooks, which would run once for each step.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise FxrpgError(
            "unroll, times", "must be an int of 1 or more", repr(times), "Pass how often the module recurs."
        )
    if not isinstance(module, nn.Module):
        raise FxrpgError("unroll", "needs a torch.nn.Module", type(module).__name__, "Pass the module that recurs.")
    check_untransformed(module)
    for name, part in module.named_modules():
        if hooks := [kind for kind in _HOOKS if getattr(part, kind)]:
            must, fix = "must have no hooks when it is unrolled", "Remove them, unroll, and register them on each step."
            raise FxrpgError(f"unroll, {name or type(module).__name__}", must, ", ".join(hooks), fix)
    first = copy_module(module)
    return Unrolled([first, *(_step(first, own_norm) for _ in range(times - 1))])


def _step(first: nn.Module, own_norm: bool) -> nn.Module:
    """A copy of `first` that shares with it what steps share."""
    shared: dict[int, Any] = {}
    holders = {id(holder): layer for holder, layer in parametrized_layers(first)}
    for part in first.modules():
        norm = isinstance(part, NORMS)
        if norm and not own_norm:
            shared[id(part)] = part
        for name, parameter in part._parameters.items():
            role = None if parameter is None else role_of(holders.get(id(part), part), name, tuple(parameter.shape))
            weight = isinstance(role, Role) and role.kind not in PLAIN_KINDS
            if parameter is not None and not weight and not norm:
                shared[id(parameter)] = parameter
    return copy_module(first, shared)
