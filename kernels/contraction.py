"""Products of an input with a generated tensor that no linear layer covers: einsum, batched products, weights on the left."""

from __future__ import annotations

import functools
import operator
import string
from collections.abc import Callable
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxrpg.lowering import Generated, NotLowered, lowers, shape_of
from fxrpg.roles import Role
from fxrpg.staging import DenseOp, define_staged_op

aten = torch.ops.aten


class Terms(NamedTuple):
    """The indices of a product of two tensors: of its input, its weight, its output."""

    x: str
    weight: str
    out: str

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def parse(cls, terms: str) -> Terms:
        """The inverse of `text`."""
        return cls(*terms.split(" "))

    @property
    def text(self) -> str:
        return " ".join(self)


def contraction_ref(x: Tensor, weight: Tensor, bias: None, terms: str, first: bool) -> Tensor:
    """The sum over all indices that `terms` (of input, weight, output) does not leave; `first`: the weight stands first."""
    t = Terms.parse(terms)
    if first:
        return torch.einsum(f"{t.weight},{t.x}->{t.out}", weight, x)
    return torch.einsum(f"{t.x},{t.weight}->{t.out}", x, weight)


def contraction_input_grads(
    grad: Tensor, xs: tuple[Tensor], weight: Tensor, needed: list[bool], terms: str, first: bool
) -> list:
    t = Terms.parse(terms)
    return [torch.einsum(f"{t.out},{t.weight}->{t.x}", grad, weight)]


def contraction_weight_grad(grad: Tensor, xs: tuple[Tensor], shape: tuple[int, ...], terms: str, first: bool) -> Tensor:
    t = Terms.parse(terms)
    return torch.einsum(f"{t.x},{t.out}->{t.weight}", xs[0], grad)


def contraction_flops(xs: list, weight: tuple[int, ...], out: tuple[int, ...], terms: str, first: bool) -> int:
    t = Terms.parse(terms)
    sizes = dict(zip(t.x + t.weight, (*xs[0], *weight), strict=True))
    return 2 * prod(sizes.values())


define_staged_op(
    DenseOp(
        name="contraction",
        inputs=("x",),
        config="str terms, bool first",
        forward=contraction_ref,
        input_grads=contraction_input_grads,
        weight_grad=contraction_weight_grad,
        flops=contraction_flops,
    )
)


def contract(x: Any, weight: Generated, terms: Terms, first: bool) -> Any:
    """The lowered product. Raises NotLowered where einsum would repeat an input or sum over one alone."""
    shape = shape_of(x)
    if shape is None or not isinstance(x, Tensor | torch.fx.Proxy):
        raise NotLowered("a product is lowered for an input of known shape")
    if len(shape) != len(terms.x) or len(weight.shape) != len(terms.weight):
        raise NotLowered("the product's indices do not fit its tensors")
    sizes = dict(zip(terms.weight, weight.shape, strict=True))
    once = [i for i, n in enumerate(shape) if n == 1 != sizes.get(terms.x[i], 1) and terms.x[i] in terms.out]
    if once:  # one input for all matrices of a stack
        left = [i for i in range(len(shape)) if i not in once]
        x, shape = x.squeeze(once), tuple(shape[i] for i in left)
        terms = terms._replace(x="".join(terms.x[i] for i in left))
    if any(sizes.get(index, n) != n for index, n in zip(terms.x, shape, strict=True)):
        raise NotLowered("a product is lowered for sizes that are equal, not repeated")
    return torch.ops.fxrpg.contraction.default(x, None, *weight[:3], terms.text, first)


def terms_of(equation: str, dims: int, position: int) -> Terms:
    """The indices of an einsum of two operands, of which that in the place `position` is the weight.

    Args:
        dims: of the input: an ellipsis stands for what its own indices leave.

    Raises:
        NotLowered: diagonals, indices of one operand that are summed alone, an ellipsis of the weight.
    """
    given, arrow, out = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    if len(operands) != 2:
        raise NotLowered("einsum is lowered for two operands")
    if not arrow:
        letters = sorted(i for i in set(given) - set(",.") if given.count(i) == 1)
        out = ("..." if "..." in given else "") + "".join(letters)
    weight, x = operands[position], operands[1 - position]
    free = [i for i in string.ascii_letters if i not in equation]
    rest = "".join(free[: max(0, dims - len(x.replace("...", "")))]) if "..." in x else ""
    found = Terms(x.replace("...", rest), weight, out.replace("...", rest))
    if "." in weight or any(len(set(indices)) != len(indices) for indices in found):
        raise NotLowered("einsum is lowered without diagonals and without an ellipsis of the weight")
    if not set(found.x) ^ set(found.weight) <= set(found.out):
        raise NotLowered("einsum is lowered where no index of one operand is summed alone")
    return found


def product_terms(left: int, right: int, position: int) -> Terms:
    """The indices of `torch.matmul` for tensors of so many dimensions; the one in the place `position` is the weight."""
    batch = string.ascii_lowercase[: max(left, right, 2) - 2]
    a = batch[len(batch) - max(0, left - 2) :] + ("nm" if left > 1 else "m").upper()
    b = batch[len(batch) - max(0, right - 2) :] + ("mp" if right > 1 else "m").upper()
    out = batch + ("N" if left > 1 else "") + ("P" if right > 1 else "")
    return Terms(b, a, out) if position == 0 else Terms(a, b, out)


def terms_role(shape: tuple[int, ...], terms: Terms) -> Role | None:
    """What a tensor is to a product: indices of both and of the output count matrices, what is summed is their input."""
    stack = [i for i, index in enumerate(terms.weight) if index in terms.x and index in terms.out]
    outputs = [i for i, index in enumerate(terms.weight) if index not in terms.x]
    inputs = [i for i, index in enumerate(terms.weight) if index not in terms.out]
    if not inputs or not outputs:
        return None  # factors of single numbers, or sums of them: no matrix
    std = 1 / sqrt(3 * prod(shape[i] for i in inputs))
    return Role("linear", (*stack, *outputs, *inputs), std, len(stack) + len(outputs) - 1)


def _pair(equation: Any, operands: int, position: int) -> tuple[str, int, str]:
    """An einsum of three operands or more as two: of the weight with the operand that has most in common, then the rest.

    Returns the first's equation (that operand, then the weight), the operand's place, the second's equation (the first's
    result, then the rest in order).
    """
    given, arrow, out = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    terms = given.split(",")
    if not arrow or "." in given or len(terms) != operands:
        raise NotLowered("einsum of more than two operands is lowered with all its indices written out")
    rest = [i for i in range(operands) if i != position]
    partner = max(rest, key=lambda i: len({*terms[i]} & {*terms[position]}))
    rest.remove(partner)
    wanted = {*out}.union(*(terms[i] for i in rest))
    kept = "".join(i for i in dict.fromkeys(terms[partner] + terms[position]) if i in wanted)
    second = ",".join([kept, *(terms[i] for i in rest)])
    return f"{terms[partner]},{terms[position]}->{kept}", partner, f"{second}->{out}"


def _einsum_role(position: int) -> Callable[..., Role | None]:
    def role(shape: tuple[int, ...], transposed: bool, equation: str, *operands: Any) -> Role | None:
        place, partner = position, 1 - position
        try:
            if len(operands) > 2:
                equation, partner, _ = _pair(equation, len(operands), position)
                place = 1
            other = shape_of(operands[partner]) if len(operands) > 1 else None
            return None if other is None else terms_role(shape, terms_of(equation, len(other), place))
        except NotLowered:
            return None

    return role


@lowers(torch.einsum, position=1, role=_einsum_role(0))
@lowers(torch.einsum, position=2, role=_einsum_role(1))
@lowers(torch.einsum, position=3, role=_einsum_role(2))
@lowers(torch.einsum, position=4, role=_einsum_role(3))
def einsum(equation: str, *operands: Any) -> Any:
    if len(operands) > 2:
        position = next(i for i, x in enumerate(operands) if isinstance(x, Generated))
        first, partner, second = _pair(equation, len(operands), position)
        rest = [x for i, x in enumerate(operands) if i not in (partner, position)]
        return torch.einsum(second, einsum(first, operands[partner], operands[position]), *rest)
    if len(operands) != 2 or not isinstance(equation, str):
        raise NotLowered("einsum is lowered for two operands")
    position = 0 if isinstance(operands[0], Generated) else 1
    dims = len(shape_of(operands[1 - position]) or ())
    return contract(operands[1 - position], operands[position], terms_of(equation, dims, position), position == 0)


def product_role(position: int) -> Callable[..., Role | None]:
    """The role function of `torch.matmul`'s operand in the place `position`."""

    def role(shape: tuple[int, ...], transposed: bool, *operands: Any) -> Role | None:
        other = shape_of(operands[1 - position])
        dims = (len(shape), len(other or ())) if position == 0 else (len(other or ()), len(shape))
        return None if other is None else terms_role(shape, product_terms(*dims, position))

    return role


def product(x: Any, weight: Generated, position: int) -> Any:
    """torch.matmul of an input and a weight in the place `position`."""
    shape = shape_of(x)
    if shape is None:
        raise NotLowered("a product is lowered for an input of known shape")
    dims = (len(weight.shape), len(shape)) if position == 0 else (len(shape), len(weight.shape))
    # einsum may lay its output out in another order than matmul, and code after it may ask for a view of that
    return contract(x, weight, product_terms(*dims, position), position == 0).contiguous()


@lowers(
    torch.matmul, Tensor.matmul, Tensor.__matmul__, operator.matmul, torch.mm, Tensor.mm, aten.mm.default,
    position=0, keyword="input", role=product_role(0),
)  # fmt: skip
def matmul_left(weight: Generated, other: Any) -> Any:
    """W @ x."""
    return product(other, weight, 0)


@lowers(torch.bmm, Tensor.bmm, aten.bmm.default, position=0, keyword="input", role=product_role(0))
def bmm_left(weight: Generated, mat2: Any) -> Any:
    return product(mat2, weight, 0)


@lowers(torch.bmm, Tensor.bmm, aten.bmm.default, keyword="mat2", role=product_role(1))
def bmm(input: Any, weight: Generated) -> Any:
    return product(input, weight, 1)


def _baddbmm_role(shape: tuple[int, ...], transposed: bool, *call: Any) -> Role | None:
    return product_role(1)(shape, transposed, *call[1:3])


@lowers(torch.baddbmm, Tensor.baddbmm, aten.baddbmm.default, position=2, keyword="batch2", role=_baddbmm_role)
def baddbmm(input: Any, batch1: Any, weight: Generated, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        raise NotLowered(f"baddbmm is lowered for beta = alpha = 1, found beta = {beta}, alpha = {alpha}")
    return input + product(batch1, weight, 1)
