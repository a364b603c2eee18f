"""Models that would not fit: planned on the meta device, by shapes alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import fxrpg

WIDTH, KEYS, HIDDEN, WORDS, BLOCKS = 4096, 1024, 14336, 128256, 32


class Block(nn.Module):
    """One layer of Llama-3-8B, as far as parameters go."""

    def __init__(self) -> None:
        super().__init__()
        sides = {"q": (WIDTH, WIDTH), "k": (WIDTH, KEYS), "v": (WIDTH, KEYS), "o": (WIDTH, WIDTH)}
        sides |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        for name, (into, out) in sides.items():
            self.add_module(name, nn.Linear(into, out, bias=False))
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH) for _ in range(2)])


class Llama(nn.Module):
    """All 8,030,261,248 parameters of Llama-3-8B, by the shapes of arXiv:2407.21783, Table 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)


def meta_llama() -> nn.Module:
    with torch.device("meta"):
        return Llama()


def test_the_ledger_of_llama_3_8b():
    model = meta_llama()
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    small = fxrpg.transform(model, dof=80_000_000, plan=[fxrpg.Rule("*", "generate")])
    found, norms = fxrpg.ledger(small), (2 * BLOCKS + 1) * WIDTH
    assert (found.dof, found.generated, found.dense) == (80_000_000, 8_030_261_248 - norms, norms)
    assert (found.trainable, found.padding, found.mask_bits) == (80_000_000 + norms, 0, 0)
    assert found.scales == 2 + 7 * BLOCKS
    assert found.bytes_resident == 4 * (80_000_000 + norms + 3 * found.scales + 64)
    assert found.bytes_stored > 4 * found.trainable
    blocks_only = fxrpg.ledger(fxrpg.transform(model, dof=80_000_000))  # a ring leaves the head and one layer dense
    assert blocks_only.generated == 8_030_261_248 - norms - 2 * WORDS * WIDTH - WIDTH * WIDTH
    assert fxrpg.explain(small).fraction("staged") == 1


def test_planning_allocates_nothing_of_the_weights(tmp_path):
    """In a process of its own, whose peak is that of importing torch: planning adds a few megabytes to it."""
    script = tmp_path / "plan.py"
    script.write_text(
        "import resource, fxrpg, test_large\n"
        "model = test_large.meta_llama()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "small = fxrpg.transform(model, dof=80_000_000)\n"
        "str(fxrpg.ledger(small)), str(fxrpg.explain(small))\n"
        "print(peak() - before, before)\n"
    )
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{folder}:{folder.parent}", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    added, _before = map(int, run.stdout.split())
    assert added < 100_000  # kilobytes
