"""Which examples make the batches of a run, and in which order: a function of the seed and the step alone.

So a run goes on where it stopped without any state of a random number generator, and does not depend on how many processes
load data. A batch is drawn for all processes together; each takes its own stretch of it.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fxrpg.errors import FxrpgError
from fxrpg.hashing import derive_key

ORDER, PICTURES, MODEL = 101, 102, 103
"""What a key is for: the order of an epoch, the random changes to a batch, what is random in the model."""


class Examples(Protocol):
    """Any map-style dataset of pairs (input, answer). One with `batch(indices)` gives whole batches at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Draw(NamedTuple):
    """One batch of one process: the key of its random changes, and its examples."""

    key: int
    indices: list[int]


@dataclass(frozen=True, kw_only=True)
class Order(Sampler):
    """The batches of one process from the step `first` on, `accumulate` to a step; the rest of an epoch is left out.

    Args:
        count: how many examples there are.
        batch: how many all processes take in a step.
    """

    count: int
    batch: int
    epochs: int
    seed: int = 0
    accumulate: int = 1
    rank: int = 0
    world: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world
        if self.batch % parts:
            must = f"must be a multiple of accumulate * processes, {self.accumulate} * {self.world}"
            raise FxrpgError("batch", must, str(self.batch), f"Pass such as {-(-self.batch // parts) * parts}.")
        if self.batch > self.count:
            must = f"must be at most the number of training examples, {self.count}"
            raise FxrpgError("batch", must, str(self.batch), "Pass a smaller batch.")

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.count // self.batch

    def __iter__(self) -> Iterator[Draw]:
        for step in range(self.first, self.epochs * self.steps):
            epoch, place = divmod(step, self.steps)
            whole = _permutation(self.count, derive_key(self.seed, ORDER, epoch))[place * self.batch :][: self.batch]
            for i, part in enumerate(whole.chunk(self.accumulate * self.world)[self.rank :: self.world]):
                yield Draw(derive_key(self.seed, PICTURES, step, i, self.rank), part.tolist())

    def loader(self, examples: Examples, workers: int, *, pinned: bool = False) -> DataLoader:
        """(inputs, answers) of each batch, made by so many processes beside this one."""
        return _loader(examples, self, workers, pinned)


def in_order(
    examples: Examples, batch: int, workers: int, *, rank: int = 0, world: int = 1, pinned: bool = False
) -> DataLoader:
    """(inputs, answers) of this process's share of all examples, the last batch included."""
    if len(examples) < 1:
        raise FxrpgError("test", "must hold one example or more", "none", "Pass more, or test=None.")
    mine = range(rank, len(examples), world)
    draws = [Draw(0, list(mine[i : i + batch])) for i in range(0, len(mine), batch)]
    return _loader(examples, draws, workers, pinned)


@functools.lru_cache(maxsize=2)
def _permutation(count: int, key: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(key))


class _Drawn(Dataset):
    """Examples by the batch. Random changes follow from the batch's key, through torch's CPU generator."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, draw: Draw) -> Any:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(draw.key)
        try:
            whole = getattr(self.examples, "batch", None)
            return whole(draw.indices) if whole else default_collate([self.examples[i] for i in draw.indices])
        finally:
            torch.set_rng_state(before)


def _loader(examples: Examples, draws: Sampler | Sequence[Draw], workers: int, pinned: bool) -> DataLoader:
    return DataLoader(
        _Drawn(examples),
        batch_size=None,
        sampler=draws,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C goes to the whole group of processes: workers go on until the trainer, which writes a snapshot, ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
