"""What every generator and every layer must honour. A new one is added to a table here and inherits the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxrpg.generator import Generator
from fxrpg.generators.pemn import Pemn
from fxrpg.generators.pranc import Pranc
from fxrpg.generators.ring import Ring
from fxrpg.lowering import LOWERINGS, Generated
from fxrpg.staging import DENSE_OPS
from fxrpg.view import View
from fxrpg.weights import encode_scales

GENERATORS: dict[str, list[Generator]] = {
    "ring": [
        Ring(),
        Ring(block=1),
        Ring(block=8, layout="shuffle"),
        Ring(block=64, permute=False),
        Ring(block=16, reflect=False),
        Ring(block=1, layout="hash"),
        Ring(block=1, layout="block_diagonal"),
        Ring(bits=8),
        Ring(bits=4, bits_block=8, sparse=True),
    ],
    "pranc": [Pranc(), Pranc(law="uniform"), Pranc(law="normal"), Pranc(law="khatri_rao"), Pranc(sparse=True)],
    "pemn": [
        Pemn(),
        Pemn(prototype="one_layer", values="signed_constant"),
        Pemn(permuted=True, keep=0.3),
        Pemn(threshold="global"),
    ],
}
"""Examples of every registered method, one for each branch of its code."""


@dataclass(frozen=True)
class LayerCase:
    """One call of a consuming op: `function(*inputs, ...)` with the weight and the bias put in by the suite.

    Args:
        op: name of the op in `torch.ops.fxrpg` that the call is lowered to.
        function: the torch function; the suite calls `call(function, inputs, weight, bias)`.
        inputs: shapes of the inputs.
        weight: shape of the weight.
        order: its logical order.
        bias: shape of the bias, or None.
        kwargs: further arguments of the function.
        call: how the arguments are put together.
    """

    op: str
    function: Callable[..., Tensor]
    inputs: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...]
    order: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    call: str = "weight_second"

    def run(self, inputs: list[Tensor], weight: Any, bias: Tensor | None) -> Tensor:
        if self.call == "weight_last":
            return self.function(*inputs, weight, bias, **self.kwargs)
        if self.call == "product":
            return self.function(*inputs, weight)
        if self.call == "product_left":
            return self.function(weight, *inputs)
        if self.call == "einsum":
            return self.function(self.kwargs["equation"], inputs[0], weight)
        if self.call == "grouped":
            if isinstance(weight, Tensor) and weight.dtype == torch.float64:  # which torch's own does not take
                ends = [0, *inputs[1].tolist()]
                return torch.cat([inputs[0][a:b] @ w for a, b, w in zip(ends, ends[1:], weight, strict=False)])
            return self.function(inputs[0], weight, offs=inputs[1])
        if self.call == "bias_first":
            return self.function(bias, *inputs, weight)
        if self.op == "embedding":
            return self.function(inputs[0], weight, **self.kwargs)
        return self.function(inputs[0], weight, bias, **self.kwargs)

    def lowered(self, inputs: list[Tensor], weight: Generated, bias: Tensor | None) -> Tensor:
        """The same call through the registry."""
        place = {"product_left": (0,), "einsum": (2,)}.get(self.call, (1, 2))
        (rule,) = (rule for rule in LOWERINGS[self.function] if rule.position in place)
        return LayerCase.run(
            LayerCase(self.op, rule.call, self.inputs, self.weight, self.order, self.bias, self.kwargs, self.call),
            inputs,
            weight,
            bias,
        )

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.op == "embedding":
            return [torch.randint(self.weight[0], shape, generator=generator) for shape in self.inputs]
        if self.op == "grouped":
            rows = torch.randn(self.inputs[0], generator=generator, dtype=torch.float64).to(dtype)
            return [rows, torch.tensor([3, 3, len(rows)], dtype=torch.int32)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.inputs]

    def make_bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else torch.linspace(-1, 1, prod(self.bias), dtype=dtype).view(self.bias)

    def __str__(self) -> str:
        options = "".join(f"-{key}{value}".replace(" ", "") for key, value in self.kwargs.items())
        return f"{self.function.__name__}-{'x'.join(map(str, self.weight))}{options}{'-bias' if self.bias else ''}"


def _conv(dims: int, groups: int = 1, transposed: bool = False, **kwargs: Any) -> LayerCase:
    kernel = (3, 2, 3)[:dims]
    weight = (4, 6 // groups, *kernel)
    function = getattr(F, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")
    spatial = tuple(range(2, 2 + dims))
    channels_in, channels_out = (4, 6) if transposed else (6, 4)
    shape = (2, channels_in, *(7, 6, 5)[:dims])
    order = (1, *spatial, 0) if transposed else (0, *spatial, 1)
    return LayerCase("conv", function, (shape,), weight, order, (channels_out,), {"groups": groups, **kwargs})


LAYERS: list[LayerCase] = [
    LayerCase("linear", F.linear, ((3, 5),), (4, 5), (0, 1), (4,)),
    LayerCase("linear", F.linear, ((2, 3, 5),), (4, 5), (0, 1)),
    LayerCase("linear", F.linear, ((5,),), (4, 5), (0, 1), (4,)),
    LayerCase("linear", torch.matmul, ((2, 3, 5),), (5, 4), (1, 0), call="product"),
    LayerCase("linear", torch.mm, ((3, 5),), (5, 4), (1, 0), call="product"),
    LayerCase("linear", torch.addmm, ((3, 5),), (5, 4), (1, 0), (4,), call="bias_first"),
    *(_conv(dims) for dims in (1, 2, 3)),
    *(_conv(dims, transposed=True) for dims in (1, 2, 3)),
    _conv(2, groups=2, stride=2, padding=(1, 0), dilation=(1, 2)),
    _conv(2, groups=2, transposed=True, stride=(2, 3), padding=1, output_padding=(1, 2), dilation=1),
    _conv(1, padding="same"),
    _conv(2, padding="same", dilation=2),
    _conv(2, padding="valid", stride=2),
    LayerCase("conv", F.conv2d, ((1, 6, 5, 5),), (6, 1, 3, 3), (0, 2, 3, 1), (6,), {"groups": 6}),
    LayerCase("conv", F.conv2d, ((6, 5, 5),), (4, 6, 1, 1), (0, 2, 3, 1), (4,)),
    LayerCase("conv", F.conv_transpose1d, ((4, 5),), (4, 3, 2), (1, 2, 0), (3,), {"stride": 2}),
    LayerCase("embedding", F.embedding, ((2, 7),), (9, 4), (0, 1)),
    LayerCase(
        "embedding", F.embedding, ((7,),), (9, 4), (0, 1), kwargs={"padding_idx": -2, "scale_grad_by_freq": True}
    ),
    LayerCase("bilinear", F.bilinear, ((3, 4), (3, 5)), (2, 4, 5), (0, 1, 2), (2,), call="weight_last"),
    LayerCase("bilinear", F.bilinear, ((2, 3, 4), (2, 3, 5)), (2, 4, 5), (0, 1, 2), call="weight_last"),
    LayerCase("contraction", torch.bmm, ((3, 2, 5),), (3, 5, 4), (0, 2, 1), call="product"),
    LayerCase("contraction", torch.baddbmm, ((3, 2, 5),), (3, 5, 4), (0, 2, 1), (3, 2, 4), call="bias_first"),
    LayerCase("contraction", torch.matmul, ((2, 3, 7, 5),), (3, 5, 4), (0, 2, 1), call="product"),
    LayerCase("contraction", torch.matmul, ((2, 5, 7),), (4, 5), (0, 1), call="product_left"),
    LayerCase("contraction", torch.bmm, ((3, 5, 2),), (3, 4, 5), (0, 1, 2), call="product_left"),
    LayerCase(
        "contraction",
        torch.einsum,
        ((2, 7, 3, 5),),
        (3, 4, 5),
        (0, 1, 2),
        None,
        {"equation": "... h i, h o i -> ... h o"},
        "einsum",
    ),
    LayerCase("grouped", torch._grouped_mm, ((8, 8), (3,)), (3, 8, 16), (0, 2, 1), call="grouped"),
]
"""At least one call of every staged op, and one for each of its options."""


def generated(
    generator: Generator, shape: tuple[int, ...], order: tuple[int, ...], size: int, dtype: torch.dtype, seed: int = 3
) -> Generated:
    """A generated weight with a random state that requires gradients, somewhere in a larger address space."""
    offsets, total = generator.addresses([prod(shape)] * 5)
    view = View(
        generator=generator, seed=seed, tensor=1, shape=shape, order=order, offset=offsets[3], total=total, size=size
    )
    draw = torch.Generator().manual_seed(seed)
    state = torch.randn(generator.state_shape(view), generator=draw, dtype=torch.float64).to(dtype)
    scale = encode_scales(torch.tensor([9.0, 0.75, 9.0]))
    return Generated.of(state.requires_grad_(), scale, view.text)


def opcheck(case: LayerCase, inputs: list[Tensor], weight: Generated, bias: Tensor | None) -> None:
    """`torch.library.opcheck` of the ops that a call and its backward run, with the arguments that they are given."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func, args)) if func.namespace == "fxrpg" else None
            return func(*args, **(kwargs or {}))

    with Record():
        case.lowered([x.requires_grad_(x.is_floating_point()) for x in inputs], weight, bias).sum().backward()
    assert {func.name() for func, _ in calls} == {f"fxrpg::{case.op}", f"fxrpg::{case.op}_backward"}
    for func, args in calls:
        args = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
        if func in DENSE_OPS:
            args = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(func, tuple(args))


def pairs() -> Iterator[tuple[Generator, LayerCase]]:
    """Every layer with every generator."""
    for examples in GENERATORS.values():
        for generator in examples:
            for case in LAYERS:
                yield generator, case
