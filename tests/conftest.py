"""Settings that every test shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch_settings import threads

from fxrpg.device import interpreted

settings.register_profile("fxrpg", deadline=None, derandomize=True)
settings.load_profile("fxrpg")


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine several threads wait for one another at every small operation. Tests of threads set their own."""
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def exact_products():
    """On a GPU torch's convolutions round float32 to TF32 unless told otherwise. Tests of TF32 turn it on themselves."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device; those marked `kernels` run there too, and in Triton's interpreter."""
    there = torch.cuda.is_available()
    for item in items:
        if "kernels" in item.keywords and there:
            item.add_marker(pytest.mark.gpu)
        elif "kernels" in item.keywords and not interpreted():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device or TRITON_INTERPRET=1 (`make test` sets it)"))
        elif "gpu" in item.keywords and not there:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run where torch.cuda.is_available()"))
