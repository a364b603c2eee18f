"""One small case of every kernel, for a checker of memory: `compute-sanitizer --tool memcheck python bench/one_each.py`.

Also with `--tool racecheck`. Each op runs forward and backward in the fused and the staged mode, with odd shapes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
from conformance import GENERATORS, LAYERS, generated  # noqa: E402

from fxrpg.kernels.fused.launch import LAUNCHES  # noqa: E402
from fxrpg.lowering import lowering_mode  # noqa: E402


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for generator in (examples[0] for examples in GENERATORS.values()):
        for case in LAYERS:
            weight = generated(generator, case.weight, case.order, 64, torch.float32)
            state = weight.state.detach().to(device).requires_grad_()
            weight = weight._replace(state=state, scale=weight.scale.to(device))
            for mode in ("fused", "staged"):
                with lowering_mode(mode):
                    inputs = [
                        x.to(device).requires_grad_(x.is_floating_point()) for x in case.make_inputs(torch.float32)
                    ]
                    bias = case.make_bias(torch.float32)
                    case.lowered(inputs, weight, None if bias is None else bias.to(device)).sum().backward()
    for name, count in sorted(LAUNCHES.items()):
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
