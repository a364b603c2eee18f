"""One small case of every kernel, for a checker of memory: `compute-sanitizer --tool memcheck python bench/one_each.py`.

Also with `--tool racecheck`. Each op runs forward and backward in the fused and the staged mode, with odd shapes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
from conformance import GENERATORS, LAYERS, generated  # noqa: E402

from fxrpg.errors import FxrpgError  # noqa: E402
from fxrpg.kernels.fused.launch import LAUNCHES  # noqa: E402
from fxrpg.lowering import lowering_mode  # noqa: E402
from fxrpg.view import View  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="example: python bench/one_each.py")
    parser.parse_args()
    try:
        run()
    except FxrpgError as e:
        parser.error(str(e))


def _whole_weights(device: str) -> None:
    """Weights and gradients of all laws of a basis, a gradient gathered in order, and several weights in one launch."""
    from fxrpg.kernels.fused.many import generate_many

    for generator in (*GENERATORS["pranc"], GENERATORS["ring"][0]):
        weight = generated(generator, (33, 70), (0, 1), 96, torch.float32)
        state, scale = weight.state.detach().to(device).requires_grad_(), weight.scale.to(device)
        torch.use_deterministic_algorithms(generator.method == "ring")
        try:
            with lowering_mode("staged"):
                torch.ops.fxrpg.generate.default(state, scale, weight.view).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    generate_many([View.parse(weight.view)] * 3, state.detach(), scale, torch.float32)


def run() -> None:
    """All cases; then how often each kernel was launched."""
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
    _whole_weights(device)
    for name, count in sorted(LAUNCHES.items()):
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
