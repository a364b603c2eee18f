"""What is kept on a device between calls: made once, by another thread on a GPU, and never let go while a graph reads it."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxrpg.device import kept


def made_by(threads: list[int]):
    @kept(2)
    def make(number: int) -> Tensor:
        threads.append(threading.get_ident())
        return torch.full((3,), number)

    return make


def test_a_result_is_made_once():
    threads: list[int] = []
    make = made_by(threads)
    assert make(1) is make(1)
    assert threads == [threading.get_ident()]


def test_fake_tensors_are_not_kept():
    make = made_by([])
    with FakeTensorMode():
        assert type(make(1)) is not Tensor
    assert torch.equal(make(1), torch.ones(3, dtype=torch.int64))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as `kept` can tell; returns what says whether a CUDA graph is being captured."""
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    return capturing


def test_on_a_gpu_another_thread_makes_it(gpu):
    threads: list[int] = []
    make = made_by(threads)
    assert make(1) is make(1)
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


@pytest.mark.parametrize("captured", [True, False])
def test_what_a_captured_graph_reads_outlives_the_cache(gpu, captured):
    make = made_by([])
    found = weakref.ref(make(1))
    gpu[0] = captured
    make(1)
    gpu[0] = False
    for number in (2, 3, 4):
        make(number)
    assert (found() is not None) == captured
