"""What handles cost a model of many tiny layers: `python bench/zoo/overhead.py`, forward times as ratios to the dense model.

A BERT of two layers of width 32, on 8 x 128 tokens: generating and dispatching cost most where the layers cost least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in (str(ROOT), str(Path(__file__).parent)))]

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402
from torch import nn  # noqa: E402

import fxrpg  # noqa: E402
from bench.zoo.torchvision_cpu import make_importable  # noqa: E402

PLANS = {"default plan": [], "every weight": [fxrpg.Rule("*", "generate")]}


def tiny_bert() -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"
    make_importable()
    import transformers

    sides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=100, **sides)).eval()


def seconds(model: nn.Module, tokens: torch.Tensor, gradients: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(gradients):
        model(input_ids=tokens)
    return time.perf_counter() - start


def measured(dense: nn.Module, small: nn.Module, tokens: torch.Tensor, gradients: bool, repeats: int) -> list[float]:
    """Median milliseconds of both, called in turns."""
    times: list[tuple[float, float]] = []
    for i in range(repeats + 20):
        pair = seconds(dense, tokens, gradients), seconds(small, tokens, gradients)
        times += [pair] if i >= 20 else []  # the first ones warm up
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200, help="calls of each model (default: %(default)s)")
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    dense, tokens = tiny_bert(), torch.randint(3, 90, (8, 128))
    rows = []
    for plan, rules in PLANS.items():
        small = fxrpg.transform(dense, dof=0.1, plan=rules).eval()
        for gradients in (False, True):
            ours = measured(dense, small, tokens, gradients, repeats)
            rows.append([plan, "recorded" if gradients else "no_grad", *ours, ours[1] / ours[0]])
    print(tabulate(rows, ["weights", "autograd", "dense ms", "transformed ms", "ratio"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
