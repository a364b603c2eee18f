"""Small modules of torch.nn alone: tied and flat weights, raw parameters, control flow, parametrizations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from bench.zoo.catalogue import Build, Example, images, tokens


class LSTMLM(nn.Module):
    """An embedding tied to the head, and an LSTM's flat weights between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 32, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(32, 100)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


class RawParams(nn.Module):
    """Functional convolution and linear layers on raw parameters, one of them in a ParameterList."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.conv2d(x, self.kernel, padding=1).mean((2, 3))
        for weight in self.weights:
            x = functional.linear(x, weight).relu()
        return x * self.gain


class CellLoop(nn.Module):
    """A loop as long as the input, and a branch that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 16)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h) if h.sum() > -1e9 else h


def lstm_lm() -> Example:
    return LSTMLM(), (tokens(),), {}


def transformer() -> Example:
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True), (torch.randn(2, 6, 32), torch.randn(2, 5, 32)), {}


def raw_params() -> Example:
    return RawParams(), (images(8),), {}


def cell_loop() -> Example:
    return CellLoop(), (torch.randn(2, 5, 8),), {}


def weight_norm() -> Example:
    """The parametrization, and the older hook that keeps a computed weight as an attribute."""
    first = parametrizations.weight_norm(nn.Conv1d(4, 8, 3, padding=1))
    second = nn.utils.weight_norm(nn.ConvTranspose1d(8, 4, 4, 2, 1))
    return nn.Sequential(first, nn.ReLU(), second), (torch.randn(2, 4, 16),), {}


def spectral_norm() -> Example:
    first = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    second = nn.Conv2d(8, 4, 3, groups=2, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.LeakyReLU(), second), (images(16),), {}


BUILDS: dict[str, Build] = {
    "nn.LSTMLM_tied": lstm_lm,
    "nn.Transformer": transformer,
    "nn.RawParams": raw_params,
    "nn.CellLoop": cell_loop,
    "nn.WeightNorm": weight_norm,
    "nn.SpectralNorm": spectral_norm,
}

MODELS = {name: ("torch", build) for name, build in BUILDS.items()}
