"""Saved-tensor hooks by which autograd keeps, in place of a generated weight, how to generate it again."""

from __future__ import annotations

import contextlib
import weakref
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

    def to(self, dtype: torch.dtype) -> Recipe:
        """The recipe of a copy in another type."""
        return self._replace(generate=lambda: self.generate().to(dtype))


class Recipes:
    """Hooks for `torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack)`: aliases of weights become recipes.

    So do the copies in 16 bits that autocast makes of them within an op. Other tensors go to the hooks that were in force
    outside (activation checkpointing, offloading), or are kept. A weight that is added must live as long as the hooks are in
    force, so that no other tensor gets its storage.
    """

    def __init__(self) -> None:
        self.made: dict[int, Recipe] = {}
        self.cast: list[tuple[weakref.ref[Tensor], Recipe]] = []
        """Of weights that autocast may cast; asked for here, because within an op that it knows autocast looks disabled."""
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def add(self, weight: Tensor, recipe: Recipe) -> None:
        """Know `weight` from here on."""
        self.made[storage_of(weight)] = recipe
        device = weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            self.cast.append((weakref.ref(weight), recipe))

    def of(self, tensor: Tensor) -> Recipe | None:
        """The recipe of what `tensor` is an alias of, if that was generated."""
        if tensor.layout != torch.strided:
            return None
        found = self.made.get(storage_of(tensor))
        if found is None and tensor.dtype in (torch.bfloat16, torch.float16):
            return next((r.to(tensor.dtype) for w, r in self.cast if _is_cast(tensor, w())), None)
        return found

    def pack(self, tensor: Tensor) -> tuple[str, Any]:
        recipe = self.of(tensor)
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


def _is_cast(tensor: Tensor, weight: Tensor | None) -> bool:
    """Whether `tensor` is an alias of a copy of `weight` in its type: whether the copy would lie in memory bit for bit so."""
    if type(weight) is not Tensor or tensor.untyped_storage().nbytes() != weight.numel() * tensor.element_size():
        return False
    copy = weight.detach().to(tensor.dtype)
    here, there = (t.as_strided((weight.numel(),), (1,), 0).view(torch.int16) for t in (tensor.detach(), copy))
    return torch.equal(here, there)


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
