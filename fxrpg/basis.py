"""The laws of PRANC's basis: drawn from counters, summed exactly, never stored.

Every law has integer values v, of unit variance after division by `deviation`. A weight is theta_i = sum_k alpha_k v_ik,
with alpha in fixed point: integers whose products and sums a float64 holds exactly, in any order. So a weight has the same
bits on every device, with any number of threads and any size of chunk, and costs no more than a float sum. Gradients go
back the same way, d_k = sum_i g_i v_ik with g in fixed point: a training step is as reproducible as a weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fxrpg.hashing import COLUMN, ROW, crossed_words, words_at
from fxrpg.view import View

CHUNK = 7 << 12
"""Words drawn at a time. What is made of them stays in a core's cache, and below the 32,768 elements from which torch would
split each of these many small steps between threads, which on a busy machine wait for one another."""

_BINNED = 128
"""Words whose 256 sums by byte are kept at a time, a megabyte."""


class Law(ABC):
    """How the values of a basis are drawn.

    Attributes:
        bits: bits of the largest |v|.
        deviation: standard deviation of v.
    """

    bits: ClassVar[int]
    deviation: ClassVar[float]

    @abstractmethod
    def combine(self, numbers: Tensor, view: View, start: int = 0) -> Iterator[Tensor]:
        """sum_k numbers[:, k] v_ik for every element i, some elements at a time in logical order.

        Args:
            numbers: float64 [n, k].
            start: the first of the k basis vectors, a multiple of 32.

        Yields:
            float64 [n, elements]; exact if the numbers are integers and every sum stays below 2^53.
        """

    @abstractmethod
    def project(self, numbers: Tensor, view: View, size: int, start: int = 0) -> Tensor:
        """The adjoint: sum_i numbers[:, i] v_ik for the `size` basis vectors from `start`, a multiple of 32.

        Args:
            numbers: float64 [n, count].

        Returns:
            float64 [n, size]; exact as in `combine`.
        """

    @abstractmethod
    def vectors(self, view: View, size: int, device: torch.device) -> Tensor:
        """All v_ik for k < `size` at once, float64 [size, count]: as large as it says, the definition of the others."""

    def draws(self, view: View) -> int:
        """Values that one pass over the weight draws."""
        return view.count * view.size


class Rademacher(Law):
    """Signs, 32 basis vectors a word. Eight at a time they pick one of 256 ready sums: no sign is ever unpacked."""

    bits, deviation = 0, 1.0

    def combine(self, numbers: Tensor, view: View, start: int = 0) -> Iterator[Tensor]:
        groups = -(-numbers.shape[1] // 32)
        numbers = torch.nn.functional.pad(numbers, (0, 32 * groups - numbers.shape[1])).view(len(numbers), groups, 4, 8)
        for rows in _row_chunks(view.count, view, numbers.device):
            part = numbers.new_zeros(len(numbers), len(rows))
            for first, words in _crossed(rows, groups, view, start // 32):
                tables = _sums_of_signs(numbers[:, first : first + len(words)])  # [n, words, 4, 256]
                for byte in range(4):
                    chosen = ((words >> 8 * byte & 0xFF) + _starts(len(words), numbers.device)).view(-1)
                    for row, table in zip(part, tables[:, :, byte].flatten(1), strict=True):
                        row += table.index_select(0, chosen).view(words.shape).sum(0)
            yield part

    def project(self, numbers: Tensor, view: View, size: int, start: int = 0) -> Tensor:
        parts = []
        for group in range(0, groups := -(-size // 32), _BINNED):
            batch = min(_BINNED, groups - group)
            bins = numbers.new_zeros(len(numbers), batch, 4, 256)
            done = 0
            for rows in _row_chunks(view.count, view, numbers.device):
                some = numbers[:, done : done + len(rows)]
                for first, words in _crossed(rows, batch, view, start // 32 + group):
                    starts = _starts(len(words), numbers.device)
                    chosen = [((words >> 8 * byte & 0xFF) + starts).view(-1) for byte in range(4)]
                    for row, tables in zip(some, bins[:, first : first + len(words)], strict=True):
                        repeated = row.expand(words.shape).reshape(-1)
                        for byte in range(4):
                            tables[:, byte] += _binned(chosen[byte], repeated, len(words))
                done += len(rows)
            parts.append(_signed_sums(bins).flatten(1))
        return torch.cat(parts, 1)[:, :size] if parts else numbers.new_zeros(len(numbers), 0)

    def vectors(self, view: View, size: int, device: torch.device) -> Tensor:
        rows = _rows(0, view.count, view, device)
        return _signs(crossed_words(rows, _columns(0, -(-size // 32), view, device)), size)


class Drawn(Law):
    """Values that are drawn one by one, then multiplied as a matrix."""

    words: ClassVar[float]
    """Words that one value takes."""

    @abstractmethod
    def values(self, rows: Tensor, first: int, count: int, view: View) -> Tensor:
        """Values of the basis vectors `first .. first + count - 1` on some elements: float64 [count, elements]."""

    def combine(self, numbers: Tensor, view: View, start: int = 0) -> Iterator[Tensor]:
        for rows in _row_chunks(view.count, view, numbers.device):
            part = numbers.new_zeros(len(numbers), len(rows))
            for first, count in self._runs(numbers.shape[1], len(rows)):
                part += numbers[:, first : first + count] @ self.values(rows, start + first, count, view)
            yield part

    def project(self, numbers: Tensor, view: View, size: int, start: int = 0) -> Tensor:
        out, done = numbers.new_zeros(len(numbers), size), 0
        for rows in _row_chunks(view.count, view, numbers.device):
            some = numbers[:, done : done + len(rows)]
            for first, count in self._runs(size, len(rows)):
                out[:, first : first + count] += some @ self.values(rows, start + first, count, view).t()
            done += len(rows)
        return out

    def vectors(self, view: View, size: int, device: torch.device) -> Tensor:
        return self.values(_rows(0, view.count, view, device), 0, size, view)

    def _runs(self, size: int, rows: int) -> Iterator[tuple[int, int]]:
        """(first, count) of the basis vectors in each chunk: an even count, because two may share a word."""
        step = 2 * max(1, int(CHUNK / max(1, self.words)) // rows // 2)
        return ((first, min(step, size - first)) for first in range(0, size, step))


class Uniform(Drawn):
    """Two values a word: odd integers in [-65535, 65535]."""

    bits, deviation = 16, math.sqrt(((1 << 32) - 1) / 3)
    words = 0.5

    def values(self, rows: Tensor, first: int, count: int, view: View) -> Tensor:
        words = crossed_words(rows, _columns(first // 2, -(-count // 2), view, rows.device))
        halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], 1).view(-1, len(rows))[:count]
        return halves.to(torch.float64).mul_(2).sub_(0xFFFF)


class Normal(Drawn):
    """Sums of eight 16-bit uniform integers (Irwin-Hall), as the initial states: near normal, and exact everywhere."""

    bits, deviation = 18, math.sqrt(8 * ((1 << 32) - 1) / 12)
    words = 4.0

    def values(self, rows: Tensor, first: int, count: int, view: View) -> Tensor:
        words = crossed_words(rows, _columns(4 * first, 4 * count, view, rows.device)).view(count, 4, len(rows))
        halves = (words & 0xFFFF) + (words >> 16 & 0xFFFF)
        return halves.sum(1, dtype=torch.int32).sub_(4 * 0xFFFF).to(torch.float64)


class KhatriRao(Law):
    """Signs of rank one, v_k[i, j] = u_k[i] w_k[j]: the weight, outputs by inputs, is U diag(alpha) W^T, one product."""

    bits, deviation = 0, 1.0

    def combine(self, numbers: Tensor, view: View, start: int = 0) -> Iterator[Tensor]:
        for outputs in self._output_chunks(view):
            part = numbers.new_zeros(len(numbers), outputs.stop - outputs.start, view.fan_in)
            for first, left, right in self._factors(view, numbers.shape[1], numbers.device, outputs, start):
                some = numbers[:, first : first + len(left)]
                part += (left.t() * some[:, None, :]) @ right
            yield part.view(len(numbers), -1)

    def project(self, numbers: Tensor, view: View, size: int, start: int = 0) -> Tensor:
        out = numbers.new_zeros(len(numbers), size)
        matrices = numbers.view(len(numbers), -1, view.fan_in)
        for outputs in self._output_chunks(view):
            some = matrices[:, outputs]
            for first, left, right in self._factors(view, size, numbers.device, outputs, start):
                out[:, first : first + len(left)] += ((left @ some) * right).sum(2)
        return out

    def _output_chunks(self, view: View) -> Iterator[slice]:
        """Rows of the weight as a matrix, some at a time: the inputs' signs are drawn again for each."""
        outputs, step = view.count // view.fan_in, max(1, 16 * CHUNK // view.fan_in)
        return (slice(first, min(first + step, outputs)) for first in range(0, outputs, step))

    def vectors(self, view: View, size: int, device: torch.device) -> Tensor:
        whole = slice(0, view.count // view.fan_in)
        some = [left[:, :, None] * right[:, None, :] for _, left, right in self._factors(view, size, device, whole)]
        return torch.cat(some).view(size, -1)

    def draws(self, view: View) -> int:
        return (view.count // view.fan_in + view.fan_in) * view.size

    def _factors(
        self, view: View, size: int, device: torch.device, outputs: slice, start: int = 0
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first, u, w) for chunks of the basis: signs, float64 [chunk, outputs] and [chunk, inputs]."""
        rows = self._words(view, device, outputs)
        step = 32 * max(1, CHUNK // (16 * len(rows)))
        for first in range(0, size, step):
            count = min(step, size - first)
            signs = _signs(crossed_words(rows, _columns((start + first) // 32, -(-count // 32), view, device)), count)
            yield first, signs[:, : -view.fan_in], signs[:, -view.fan_in :]

    def _words(self, view: View, device: torch.device, outputs: slice) -> Tensor:
        """The random words of some outputs, then of all inputs: int32."""
        whole = view.whole
        above = view.first // view.fan_in  # of a part, which begins with a row
        inputs = whole.count // whole.fan_in  # where the inputs' words begin, after those of all outputs
        parts = ((above + outputs.start, above + outputs.stop), (inputs, inputs + view.fan_in))
        return torch.cat([_rows(start, stop, whole, device) for start, stop in parts])


LAWS: dict[str, Law] = {"rademacher": Rademacher(), "uniform": Uniform(), "normal": Normal(), "khatri_rao": KhatriRao()}


def _row_chunks(count: int, view: View, device: torch.device) -> Iterator[Tensor]:
    """The random word of each element, some at a time: int32."""
    for start in range(0, count, CHUNK):
        yield _rows(start, min(start + CHUNK, count), view, device)


def _rows(start: int, stop: int, view: View, device: torch.device) -> Tensor:
    """The random words of the elements `start .. stop - 1`, int32; of a part, which begins at `first` of its whole."""
    elements = torch.arange(view.first + start, view.first + stop, device=device)
    return words_at(elements, view.seed, ROW, view.tensor)


def _crossed(rows: Tensor, groups: int, view: View, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """(first, words [some, elements]) for chunks of the groups `start + first` of 32 basis vectors, first < `groups`."""
    step = max(1, CHUNK // len(rows))
    columns = _columns(start, groups, view, rows.device)
    for first in range(0, groups, step):
        yield first, crossed_words(rows, columns[first : first + step])


def _columns(first: int, count: int, view: View, device: torch.device) -> Tensor:
    """The random word of each column of the basis, int32 [count]."""
    return words_at(torch.arange(first, first + count, device=device), view.seed, COLUMN, view.tensor)


def _signs(words: Tensor, count: int) -> Tensor:
    """The first `count` rows of signs in rows of words, 32 in each, the first in the lowest bit: float64 [count, ...]."""
    lanes = torch.arange(32, dtype=torch.int32, device=words.device)[:, None]
    return 1 - 2 * (words[:, None] >> lanes & 1).view(-1, words.shape[1])[:count].to(torch.float64)


def _starts(count: int, device: torch.device) -> Tensor:
    """Where each of `count` tables of 256 begins, int32 [count, 1]."""
    return 256 * torch.arange(count, dtype=torch.int32, device=device)[:, None]


def _sums_of_signs(numbers: Tensor) -> Tensor:
    """All 256 signed sums of each eight numbers: [..., 8] -> [..., 256]. Bit j of the index turns number j."""
    sums = numbers.sum(-1, keepdim=True)
    for j in range(8):
        sums = torch.cat([sums, sums - 2 * numbers[..., j : j + 1]], -1)
    return sums


def _signed_sums(bins: Tensor) -> Tensor:
    """The adjoint of `_sums_of_signs`, [..., 256] -> [..., 8]: by halves."""
    found = []
    for _ in range(8):
        low, high = bins.unflatten(-1, (2, -1)).unbind(-2)  # the highest bit that is left: clear, set
        found.append((low - high).sum(-1))
        bins = low + high
    return torch.stack(found[::-1], -1)


def _binned(chosen: Tensor, values: Tensor, tables: int) -> Tensor:
    """Sums of `values`, whole numbers, by bin: float64 [tables, 256]."""
    if values.device.type == "cpu":
        return torch.bincount(chosen, weights=values, minlength=256 * tables).view(tables, 256)
    return values.new_zeros(256 * tables).index_add_(0, chosen, values).view(tables, 256)
