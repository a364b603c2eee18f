"""What a parameter is to the module that owns it: which are weights, in which logical order, with which initial deviation.

One line of the table per kind of owner; it follows from the owner's class and the shape alone, never from tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

LAYER_KINDS = ("conv", "linear")  # whose first and last layer some methods leave dense
PLAIN_KINDS = ("bias", "norm")  # what is generated only by methods that say so


@dataclass(frozen=True)
class Role:
    """A weight's place in its layer.

    Args:
        kind: "linear", "conv", "embedding", "bilinear", "rnn" or "raw"; or "bias" or "norm", which are no weights.
        order: the axes of PyTorch's shape in logical order (out, kernel..., in), the fastest-running last.
        std: standard deviation that the layer's default initialiser gives (used where the weight itself has none to show).
        stack: leading axes in logical order that only count weights, as in a tensor that holds a mixture's experts.
    """

    kind: str
    order: tuple[int, ...]
    std: float
    stack: int = 0


@dataclass(frozen=True)
class Refusal:
    """Why a parameter that looks like a weight cannot be generated."""

    reason: str


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_Finder = Callable[[Any, str, tuple[int, ...]], Role | Refusal | None]
_FINDERS: list[tuple[type, _Finder]] = []


def finds_roles(*owners: type) -> Callable[[_Finder], _Finder]:
    """Register the decorated (owner, attribute, shape) -> Role, Refusal or None for modules of these classes."""

    def register(finder: _Finder) -> _Finder:
        _FINDERS.extend((owner, finder) for owner in owners)
        return finder

    return register


def role_of(owner: nn.Module, attribute: str, shape: tuple[int, ...]) -> Role | Refusal | None:
    """What the owner's parameter `attribute` is, or None if it is no weight (a bias, a norm, anything unknown)."""
    for cls, finder in _FINDERS:
        if isinstance(owner, cls) and (role := finder(owner, attribute, shape)):
            return role
    return None


def parametrized_layers(root: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(holder, layer) for the modules that hold a parametrized layer's parameters in the layer's stead."""
    for layer in root.modules():
        if parametrize.is_parametrized(layer):
            for holder in layer.parametrizations.values():  # type: ignore[operator]
                yield holder, layer


def raw_role(shape: tuple[int, ...]) -> Role:
    """A parameter that the user names as a weight: its own order, fan-in along all axes but the first."""
    return Role("raw", tuple(range(len(shape))), _uniform(prod(shape[1:])))


def linear_role(shape: tuple[int, ...], transposed: bool = False, *_: Any) -> Role:
    """A matrix [out, in], or [in, out] if `transposed`."""
    return Role("linear", (1, 0) if transposed else (0, 1), _uniform(shape[0] if transposed else shape[1]))


def conv_role(shape: tuple[int, ...], transposed: bool = False, *_: Any) -> Role:
    """A kernel [out, in / groups, *kernel], or [in, out / groups, *kernel] of a transposed convolution."""
    kernel = tuple(range(2, len(shape)))
    return Role("conv", (1, *kernel, 0) if transposed else (0, *kernel, 1), _uniform(prod(shape[1:])))


def embedding_role(shape: tuple[int, ...], transposed: bool = False, *_: Any) -> Role:
    """A table [num, dim]; one row is read at a time, so its fan-in is one."""
    return Role("embedding", (0, 1), 1.0)


def bilinear_role(shape: tuple[int, ...], transposed: bool = False, *_: Any) -> Role:
    """A stack of matrices [out, in1, in2]."""
    return Role("bilinear", (0, 1, 2), _uniform(shape[1]))


def bias_role(std: float) -> Role:
    """A bias, drawn like the weight that it goes with."""
    return Role("bias", (0,), std)


def _uniform(fan: int) -> float:
    """Deviation of U(+-1/sqrt(fan)), PyTorch's default for linear, convolution, bilinear and recurrent weights."""
    return 1 / sqrt(3 * max(fan, 1))


def _names(attribute: str) -> tuple[str, ...]:
    """A weight's own name, and those that weight_norm, spectral_norm and parametrizations keep its direction under."""
    return attribute, f"{attribute}_v", f"{attribute}_orig", "original", "original1"


@finds_roles(nn.Linear)
def _linear(owner: nn.Linear, attribute: str, shape: tuple[int, ...]) -> Role | None:
    if attribute == "bias":
        return bias_role(_uniform(owner.in_features))
    found = attribute in _names("weight") and shape == (owner.out_features, owner.in_features)
    return linear_role(shape) if found else None


@finds_roles(nn.modules.conv._ConvNd)
def _conv(owner: nn.modules.conv._ConvNd, attribute: str, shape: tuple[int, ...]) -> Role | None:
    ends = (owner.in_channels, owner.out_channels) if owner.transposed else (owner.out_channels, owner.in_channels)
    if attribute == "bias":
        return bias_role(_uniform(ends[1] // owner.groups * prod(owner.kernel_size)))
    found = attribute in _names("weight") and shape == (ends[0], ends[1] // owner.groups, *owner.kernel_size)
    return conv_role(shape, owner.transposed) if found else None


@finds_roles(nn.Embedding, nn.EmbeddingBag)
def _embedding(owner: nn.Embedding, attribute: str, shape: tuple[int, ...]) -> Role | Refusal | None:
    if attribute not in _names("weight") or shape != (owner.num_embeddings, owner.embedding_dim):
        return None
    return embedding_role(shape) if owner.max_norm is None else Refusal("max_norm rewrites the table in place")


@finds_roles(nn.Bilinear)
def _bilinear(owner: nn.Bilinear, attribute: str, shape: tuple[int, ...]) -> Role | None:
    return bilinear_role(shape) if attribute in _names("weight") and len(shape) == 3 else None


@finds_roles(nn.MultiheadAttention)
def _attention(owner: nn.MultiheadAttention, attribute: str, shape: tuple[int, ...]) -> Role | None:
    if attribute == "in_proj_bias":
        return bias_role(_uniform(owner.embed_dim))
    if attribute not in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return None
    return Role("linear", (0, 1), sqrt(2 / (shape[0] + shape[1])))  # Xavier's rule, this module's own


@finds_roles(nn.RNNBase, nn.RNNCellBase)
def _recurrent(owner: nn.RNNBase, attribute: str, shape: tuple[int, ...]) -> Role | None:
    if not attribute.startswith(("weight_ih", "weight_hh", "weight_hr")) or len(shape) != 2:
        return None
    return Role("rnn", (0, 1), _uniform(owner.hidden_size))


@finds_roles(*NORMS)
def _norm(owner: nn.Module, attribute: str, shape: tuple[int, ...]) -> Role | None:
    """Affine parameters: torch starts them at one and zero, which have no deviation; ones of it, and of a bias, stand in."""
    if attribute not in ("weight", "bias"):
        return None
    return Role("norm", tuple(range(len(shape))), 1.0 if attribute == "weight" else _uniform(prod(shape)))


@finds_roles(nn.Module)
def _lookalike(owner: Any, attribute: str, shape: tuple[int, ...]) -> Role | None:
    """The weight of a layer that is none of torch's, but tells its sides as torch's layers do, or as a Conv1D of GPT-2."""
    if attribute not in _names("weight"):
        return None
    own = vars(owner)

    def sides(*names: str) -> tuple[Any, ...]:
        return tuple(own.get(name) for name in names)

    if shape in (sides("out_features", "in_features"), sides("out_channels", "in_channels")):
        return linear_role(shape)
    if shape == sides("nx", "nf"):
        return linear_role(shape, transposed=True)
    if shape == sides("num_embeddings", "embedding_dim"):
        return embedding_role(shape)
    outputs, inputs, kernel, groups = sides("out_channels", "in_channels", "kernel_size", "groups")
    known = isinstance(kernel, tuple) and isinstance(inputs, int) and isinstance(groups, int) and groups > 0
    return conv_role(shape) if known and shape == (outputs, inputs // groups, *kernel) else None
