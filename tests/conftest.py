"""Settings that every test shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from threads import threads

settings.register_profile("fxrpg", deadline=None, derandomize=True)
settings.load_profile("fxrpg")


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine several threads wait for one another at every small operation. Tests of threads set their own."""
    with threads(1):
        yield


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run where torch.cuda.is_available()"))
