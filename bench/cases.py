"""What the bench times, as data: layers, decoding, passes of a PRANC basis, whole models."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.layers import NETWORKS, TINY, Layer
from fxrpg.generator import Generator
from fxrpg.generators.pemn import Pemn
from fxrpg.generators.pranc import Pranc
from fxrpg.generators.ring import Ring

BATCHES = (1, 8, 32, 256)
DIRECTIONS = ("forward", "dgrad", "wgrad")
RING = 2_359_296
"""Numbers of the ring that layers read, of which a small one reads a part: the RPG paper's for ResNet-18.

In 16 bits it fits the L2 of large GPUs.
"""
PROTOTYPE = 65_536
"""Values of the prototype under a case's masks."""

SWEPT = {
    "resnet18": ("layer1.conv", "layer2.conv", "layer3.conv", "layer4.conv"),
    "resnet50": ("layer2.first", "layer3.reduce", "layer3.expand"),
    "convnext": ("stage3.depthwise", "stage3.widen"),
    "vit": ("qkv", "fc1"),
    "llama": ("qo", "gate_up", "down"),
}
"""The layers that are timed at every batch; the others at a batch of 32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time in one direction, by several contestants.

    Args:
        name: unique together with the direction.
        direction: "forward", "dgrad" (the input's gradient), "wgrad" (the weight's, or the state's); "generate",
            "gradient" of a basis; "forward", "train" of a model.
        batch: samples.
        goal: the ratio to the dense op that fused forms aim at, if one was set.
        rank: cases of a lower rank come first, and are left when time runs out last.
        quick: whether `--quick` has it.
        heavy: whether it is too much for a CPU.
    """

    name: str
    direction: str
    batch: int = 1
    goal: float | None = None
    rank: int = 2
    quick: bool = False
    heavy: bool = False

    @property
    def title(self) -> str:
        """What `--only` is matched with."""
        return f"{self.name}/{self.direction}"

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """One op of a layer.

    Args:
        generators: methods that generate its weight, each in each of the lowering `modes`.
        sizes: degrees of freedom of each method.
        compiled: whether torch.compile runs the dense op too, which takes seconds.
    """

    layer: Layer
    generators: tuple[Generator, ...] = (Ring(block=32), Pemn())
    sizes: tuple[int, ...] = (RING, PROTOTYPE)
    modes: tuple[str, ...] = ("auto", "fused", "staged")
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class BasisCase(Case):
    """A pass of a PRANC basis of `size` vectors over all conv and linear weights of a network."""

    layers: tuple[Layer, ...] = field(repr=False)
    size: int
    generators: tuple[Generator, ...] = tuple(Pranc(law=law) for law in ("rademacher", "uniform", "khatri_rao"))
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """A whole model, as users call it.

    Args:
        network: of `networks.NETWORKS`.
        dof: of its ring.
        graph: whether calls are replayed as a CUDA graph, which leaves out what Python and launching cost.
        compiled: whether torch.compile runs it too.
        regions: whether a model transformed with example inputs runs too.
    """

    network: str
    dof: int | float
    graph: bool = False
    compiled: bool = False
    regions: bool = False


def _generators(direction: str) -> tuple[Generator, ...]:
    """Those that have something to do: masks are frozen here."""
    return (Ring(block=32),) if direction == "wgrad" else (Ring(block=32), Pemn())


def _layer_case(layer: Layer, batch: int, direction: str) -> LayerCase:
    swept = layer.name in SWEPT.get(layer.network, ())
    decoding = layer.network == "llama" and batch == 1 and direction == "forward"
    return LayerCase(
        name=f"{'decode' if decoding else 'layer'}/{layer.network}/{layer.name}/b{batch}",
        direction=direction,
        batch=batch,
        goal=1.0 if decoding else None,
        rank=0 if decoding else 1 if swept and (batch == 32 or direction == "forward") else 2 if swept else 3,
        quick=decoding or (batch == 32 and (layer.network, layer.name) in QUICK),
        heavy=batch > 32,
        layer=layer,
        generators=_generators(direction),
        compiled=swept and batch == 32 and direction == "forward",
    )


QUICK = (("resnet18", "layer2.conv"), ("resnet18", "layer4.conv"), ("convnext", "stage3.depthwise"), ("vit", "fc1"))


def _layer_cases() -> Iterable[Case]:
    for network in ("resnet18", "resnet50", "convnext", "vit", "llama"):
        for layer in NETWORKS[network]:
            every = layer.name in SWEPT[network]
            batches = BATCHES if every else (1, 32) if network == "llama" else (32,)
            for batch, direction in itertools.product(batches, DIRECTIONS):
                yield _layer_case(layer, batch, direction)


def _basis_cases() -> Iterable[Case]:
    for network, size in itertools.product(("resnet20", "resnet18"), (1_000, 10_000)):
        for direction in ("generate", "gradient"):
            yield BasisCase(
                name=f"pranc/{network}/k{size}",
                direction=direction,
                rank=1,
                quick=network == "resnet20" and size == 1_000,
                heavy=network == "resnet18",
                layers=NETWORKS[network],
                size=size,
                compiled=network == "resnet20" and size == 1_000,
            )


def _model_cases() -> Iterable[Case]:
    for network, direction, batch in itertools.product(
        ("resnet18", "vit", "resnet50", "convnext"), ("forward", "train"), (1, 32, 256)
    ):
        first = network == "resnet18"
        for graph in (False, True)[: 1 + (direction == "forward" and batch == 1)]:
            yield ModelCase(
                name=f"model/{network}/b{batch}" + ("/graph" if graph else ""),
                direction=direction,
                batch=batch,
                rank=1 if first else 2,
                quick=first and batch == 32,
                heavy=batch > 1,
                network=network,
                dof=RING if first else 0.2,
                graph=graph,
                compiled=batch == 32 and network in ("resnet18", "vit"),
                regions=direction == "forward" and network in ("resnet18", "resnet50"),
            )


def _tiny_cases() -> Iterable[Case]:
    """What a machine without a GPU does in a moment."""
    for layer, direction in itertools.product(TINY, DIRECTIONS):
        yield LayerCase(
            name=f"layer/tiny/{layer.name}/b2",
            direction=direction,
            batch=2,
            layer=layer,
            generators=_generators(direction),
            sizes=(256, 64),
        )
    for direction in ("generate", "gradient"):
        yield BasisCase(name="pranc/tiny/k64", direction=direction, layers=TINY, size=64)
    for direction in ("forward", "train"):
        yield ModelCase(name="model/tiny/b2", direction=direction, batch=2, network="tiny", dof=256)


CASES: tuple[Case, ...] = tuple(
    sorted(itertools.chain(_layer_cases(), _basis_cases(), _model_cases()), key=lambda case: case.rank)
)
"""The whole set, the most important first."""

TINY_CASES: tuple[Case, ...] = tuple(_tiny_cases())


def chosen(*, quick: bool, cpu: bool, only: str = "") -> list[Case]:
    """The cases of a run.

    Args:
        quick: few; on a CPU, the tiny ones.
        only: a glob that titles must match, such as "layer/resnet18/*"; "" for all.
    """
    cases = TINY_CASES if quick and cpu else CASES
    if not cpu:
        cases = tuple(case for case in cases if case.quick or not quick)
    else:
        cases = tuple(case for case in cases if not case.heavy)
    return [case for case in cases if not only or fnmatch.fnmatchcase(case.title, only)]
