"""Saved-tensor hooks by which autograd keeps, in place of a generated weight, how to generate it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.lowering import transforming
from fxrpg.weights import generate_weight


class Recipe(NamedTuple):
    """A weight that was generated.

    Args:
        generate: makes it again, without autograd.
        state: what it is generated from.
        name: for the error where that has changed meanwhile.
    """

    generate: Callable[[], Tensor]
    state: Tensor
    name: str


class Recipes:
    """Hooks for `torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack)`: aliases of weights become recipes.

    Other tensors go to the hooks that were in force outside (activation checkpointing, offloading), or are kept. A weight
    that is added must live as long as the hooks are in force, so that no other tensor gets its storage.
    """

    def __init__(self) -> None:
        self.made: dict[int, Recipe] = {}
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def add(self, weight: Tensor, recipe: Recipe) -> None:
        """Know `weight` from here on."""
        self.made[storage_of(weight)] = recipe

    def pack(self, tensor: Tensor) -> tuple[str, Any]:
        recipe = self.made.get(storage_of(tensor)) if tensor.layout == torch.strided else None
        if recipe is None:
            # detached: an op's own output would hold the op that holds it, a cycle that nothing collects
            return ("outer", self.outer[0](tensor)) if self.outer else ("kept", tensor.detach())
        geometry = tensor.size(), tensor.stride(), tensor.storage_offset()
        return "recipe", (recipe, recipe.state._version, geometry)

    def unpack(self, packed: tuple[str, Any]) -> Tensor:
        kind, content = packed
        if kind != "recipe":
            return self.outer[1](content) if kind == "outer" else content
        recipe, version, geometry = content
        if recipe.state._version != version:
            raise RuntimeError(
                f"{recipe.name}: its generator's state was changed in place (an optimizer step?) between forward and "
                "backward, so the weight that backward needs is gone. Run backward before the step."
            )
        with torch.no_grad():
            return self.again(recipe).as_strided(*geometry)

    def again(self, recipe: Recipe) -> Tensor:
        """The weight once more, for a backward."""
        return recipe.generate()


class Lasting(Recipes):
    """Recipes for a block in which a backward runs too (`create_graph=True`): what it generates again is known as well."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[Tensor] = []

    def add(self, weight: Tensor, recipe: Recipe) -> None:
        self.alive.append(weight.detach())
        super().add(weight, recipe)

    def again(self, recipe: Recipe) -> Tensor:
        weight = recipe.generate()
        if self.made:
            self.add(weight, recipe)
        return weight

    def close(self) -> None:
        """Let the weights go, at the end of the block; recipes that autograd has are good for ever."""
        self.alive.clear()
        self.made.clear()


def storage_of(tensor: Tensor) -> int:
    """What tells whether two tensors share memory."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def generated_again() -> Iterator[Callable[..., Tensor]]:
    """(state, scale, view, dtype) -> weight on autograd's record; what autograd saves of it within the block is a recipe."""
    hooks = Lasting()

    def produce(state: Tensor, scale: Tensor, text: str, dtype: torch.dtype | None) -> Tensor:
        weight = torch.ops.fxrpg.generate.default(state, scale, text)
        weight = weight.to(dtype or weight.dtype)
        if not transforming():
            hooks.add(weight, Recipe(lambda: generate_weight(state.detach(), scale, text, dtype), state, "a weight"))
        return weight

    if transforming():
        yield produce
        return
    try:
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
            yield produce
    finally:
        hooks.close()
