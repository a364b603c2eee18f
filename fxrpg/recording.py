"""How ops are put on autograd's record: an Autograd kernel that torch.func's transforms can pass through too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxrpg.collecting import joined
from fxrpg.lowering import transforming
from fxrpg.shares import PLAIN, local
from fxrpg.view import View


def autograd_kernel(
    op: Any,
    save: Callable[..., None],
    differentiate: Callable[..., Any],
    plain: Callable[..., Any],
    state: int | None = None,
) -> Callable[..., Any]:
    """The Autograd kernel of `op`: as `torch.library.register_autograd` makes it, but open to torch.func's transforms.

    Args:
        save: (ctx, inputs, output), keeps what backward needs.
        differentiate: (ctx, grad) -> one gradient or None for each input.
        plain: the op written in plain torch, for transforms that cannot enter an autograd.Function here.
        state: the place of the state among the inputs, two before the view, if the op's backward knows `ctx.collector`.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        *args, ctx.collector = args  # type: ignore[assignment]
        with torch._C._AutoDispatchBelowAutograd():
            out = op(*args)
        save(ctx, args, out)  # here and not in a setup_context, for which torch inspects a signature at each call
        return out

    def backward(ctx: Any, *grads: Any) -> Any:
        return *differentiate(ctx, *grads), None

    members = {"forward": forward, "backward": backward}
    name = f"{op.name().replace('::', '_')}_function"
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in members.items()})

    place = [argument.name for argument in op._schema.arguments].index("state")

    def kernel(*args: Any) -> Any:
        if type(args[place]) not in PLAIN:
            args = (*args[:place], local(args[place], args[place + 2], op.name()), *args[place + 1 :])
        if transforming():
            return plain(*args)
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if state is None or not View.parse(args[state + 2]).generator.collects:
            return function.apply(*args, None)
        shared, collector = joined(args[state])
        return function.apply(*args[:state], shared, *args[state + 1 :], collector)

    return kernel
