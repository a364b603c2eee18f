"""C code for the CPU: the same bits as plain torch, for every setting; built when it can be, done without when not."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_settings import threads

import fxrpg
from fxrpg import native
from fxrpg.assemble import plan_of
from fxrpg.lowering import lowering_mode
from fxrpg.weights import accumulate_gradient, generate_weight

ROOT = Path(__file__).parents[1]
HAS_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler: cc, gcc or clang on the PATH")

METHODS = [
    *(fxrpg.Ring(block=b, layout=layout) for b in (1, 8, 16, 32, 64) for layout in ("arc", "shuffle", "hash")),
    *(fxrpg.Ring(block=b, permute=False) for b in (1, 32)),
    *(fxrpg.Ring(block=b, reflect=False) for b in (1, 32)),
    fxrpg.Ring(block=1, layout="block_diagonal"),
    fxrpg.Ring(bits=8),
    fxrpg.Ring(sparse=True),
    fxrpg.Pemn(),
    fxrpg.Pemn(values="signed_constant", keep=0.3, per_layer=True),
    fxrpg.Pemn(permuted=True),
    fxrpg.Pemn(threshold="global"),
    fxrpg.Pemn(prototype="one_layer"),
    *(fxrpg.Pranc(law=law) for law in ("rademacher", "khatri_rao", "uniform")),
]  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layers() -> nn.Sequential:
    """Layers whose memory lies in logical order, in rows and taps, and in neither."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.Conv2d(7, 12, (3, 1)), nn.Conv2d(40, 9, 3), nn.ConvTranspose2d(12, 5, (3, 2)),
        nn.Conv2d(5, 10, 1), nn.Conv2d(10, 10, 3, groups=10), nn.Conv3d(4, 6, (3, 2, 2)), nn.Linear(33, 170),
        nn.Linear(170, 3), nn.Linear(1, 1), nn.Embedding(11, 5),
    )  # fmt: skip


def both(model: nn.Module, dtype: torch.dtype):
    """(name, what C makes, what plain torch makes) of every weight and of every state's gradient, in `dtype`."""
    plan, scale, draw = plan_of(model), model.get_buffer("fxrpg_scale"), torch.Generator().manual_seed(1)
    state_of = {name: state for state, names in plan.states.items() for name in names}
    for name, view in plan.views.items():
        state = model.get_parameter(state_of[name]).detach()
        grad = torch.randn(view.shape, generator=draw).to(dtype)
        found = []
        for mode in ("auto", "materialized"):
            with lowering_mode(mode):
                found += [generate_weight(state, scale, view.text, dtype)]
                found += [accumulate_gradient(grad, state, scale, view.text)]
        yield name, found[0], found[2]
        yield f"gradient of {name}", found[1], found[3]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, but for the sign of a zero, and laid out alike."""
    return one.stride() == other.stride() and one.dtype == other.dtype and torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_plain_torch(method, dtype):
    for dof in (1, 37, 320, 4096):
        small = fxrpg.transform(
            layers(), dof=dof if method.needs_dof else None, method=method, plan=[fxrpg.Rule("*", "generate")]
        )
        for name, found, expected in both(small, dtype):
            assert same(found, expected), (dof, name)


@needs_compiler
@given(
    block=st.sampled_from([1, 8, 16, 32, 64]), layout=st.sampled_from(["arc", "shuffle", "hash"]), dof=st.integers(1, 5000),
    out=st.integers(1, 40), inner=st.integers(1, 70), kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    workers=st.integers(1, 3), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
@settings(max_examples=60)
def test_same_bits_for_any_shape(block, layout, dof, out, inner, kernel, workers, seed):
    model = nn.Sequential(nn.Conv2d(inner, out, kernel), nn.Linear(inner, out), nn.ConvTranspose2d(out, inner, kernel))
    method = fxrpg.Ring(block=block, layout=layout)
    dof = min(dof, sum(layer.weight.numel() for layer in model))
    small = fxrpg.transform(model, dof=dof, method=method, seed=seed, plan=[fxrpg.Rule("*", "generate")])
    with threads(workers):
        for name, found, expected in both(small, torch.float32):
            assert same(found, expected), name


@needs_compiler
@pytest.mark.parametrize("dof", [320, 40_000, 200_000])
def test_bits_do_not_depend_on_threads(dof):
    small = fxrpg.transform(
        nn.Sequential(nn.Conv2d(128, 128, 3), nn.Linear(400, 300)), dof=dof, plan=[fxrpg.Rule("*", "generate")]
    )
    found = []
    for count in (1, 2, 5):
        with threads(count):
            small.zero_grad()
            (small[0](torch.ones(1, 128, 4, 4)).sum() + small[1](torch.ones(1, 400)).sum()).backward()
            found.append((small.fxrpg_ring.grad.clone(), small[0].weight.clone(), small[1].weight.clone()))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@needs_compiler
@pytest.mark.parametrize("scores", ["ties", "nan", "inf", "zeros", "subnormal"])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.99])
def test_masks_of_unusual_scores(scores, keep):
    small = fxrpg.transform(layers(), dof=0.3, method=fxrpg.Pemn(keep=keep))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in small.named_parameters():
        if name.endswith("_score"):
            values = torch.randint(-3, 4, parameter.shape, generator=draw).float()
            if scores == "subnormal":
                values *= 1e-44
            if scores in ("nan", "inf"):
                values.view(-1)[::7] = float(scores)
            parameter.data = torch.zeros_like(values) if scores == "zeros" else values
    for name, found, expected in both(small, torch.float32):
        assert torch.equal(found.isnan(), expected.isnan()), name
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), name


@needs_compiler
def test_frozen_masks():
    small = fxrpg.freeze(fxrpg.transform(layers(), dof=0.3, method="pemn"))
    plan, scale = plan_of(small), small.get_buffer("fxrpg_scale")
    for state, (name,) in plan.states.items():
        bits = small.get_buffer(state) if state in dict(small.named_buffers()) else small.get_parameter(state)
        found = generate_weight(bits, scale, plan.views[name].text)
        with lowering_mode("materialized"):
            assert same(found, generate_weight(bits, scale, plan.views[name].text))


@needs_compiler
@pytest.mark.parametrize("alphas", ["zeros", "nan", "huge"])
def test_unusual_coefficients(alphas):
    small = fxrpg.transform(layers(), dof=70, method=fxrpg.Pranc())
    value = {"zeros": 0.0, "nan": float("nan"), "huge": 1e38}[alphas]
    small.fxrpg_alpha.data[1:5] = value
    for name, found, expected in both(small, torch.float32):
        assert torch.equal(found.nan_to_num(1e3), expected.nan_to_num(1e3)), name


@needs_compiler
def test_c_code_is_what_runs():
    view = next(
        iter(plan_of(fxrpg.transform(nn.Linear(64, 64), dof=64, plan=[fxrpg.Rule("*", "generate")])).views.values())
    )
    state = torch.randn(64)
    assert native.wanted(state)
    assert fxrpg.weights.native_wanted(view, state)
    with lowering_mode("materialized"):
        assert not fxrpg.weights.native_wanted(view, state)
    assert not native.wanted(state.to("meta"))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert not native.wanted(state)
    assert torch.func.vmap(lambda x: x * native.wanted(x))(state[None]).abs().sum() == 0


SCRIPT = """
import torch, fxrpg
from torch import nn
from fxrpg import native
torch.manual_seed(0)
small = fxrpg.transform(nn.Sequential(nn.Linear(40, 70), nn.Linear(70, 5)), dof=100, plan=[fxrpg.Rule("*", "generate")])
small(torch.ones(3, 40)).sum().backward()
print(native.library() is not None, small[0].weight.sum().item().hex(), small.fxrpg_ring.grad.double().sum().item().hex())
"""


def run(tmp_path: Path, script: str = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FXRPG_CACHE": str(tmp_path / "cache")} | environment
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@needs_compiler
def test_without_a_compiler_plain_torch_gives_the_same(tmp_path):
    with_c = run(tmp_path).stdout.split()
    empty = tmp_path / "empty"
    empty.mkdir()
    without = run(tmp_path, PATH=str(empty)).stdout.split()
    refused = run(tmp_path, FXRPG_NATIVE="0").stdout.split()
    assert with_c[0] == "True"
    assert without[0] == refused[0] == "False"
    assert with_c[1:] == without[1:] == refused[1:]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script as compiler")
def test_a_compiler_that_fails_is_done_without(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "no such header" >&2\nexit 1\n')
    compiler.chmod(0o755)
    done = run(tmp_path, "import logging; logging.basicConfig()\n" + SCRIPT, CC=str(compiler))
    assert done.stdout.startswith("False")
    assert "no such header" in done.stderr
    assert not list((tmp_path / "cache").iterdir())


@needs_compiler
def test_a_slow_build_says_what_it_is(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep 4\nexec {shutil.which("cc") or "gcc"} "$@"\n')
    compiler.chmod(0o755)
    done = run(tmp_path, CC=str(compiler))
    assert done.stdout.startswith("True")
    assert done.stderr.startswith("fxrpg: compiling C code for this processor, once, into")
    again = run(tmp_path, CC=str(compiler))
    assert again.stdout == done.stdout
    assert again.stderr == ""


@needs_compiler
def test_what_is_built_lies_in_a_folder_of_ones_own(tmp_path):
    run(tmp_path)
    (built,) = (tmp_path / "cache").iterdir()
    assert built.suffix == ".so"
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert run(tmp_path, FXRPG_CACHE=str(open_to_all)).stdout.startswith("True")
    assert not list(open_to_all.iterdir())
    file = tmp_path / "file"
    file.write_text("")
    assert run(tmp_path, FXRPG_CACHE=str(file / "below")).stdout.startswith("True")


@needs_compiler
def test_a_damaged_build_is_done_without(tmp_path):
    first = run(tmp_path).stdout.split()
    (built,) = (tmp_path / "cache").iterdir()
    built.write_bytes(b"no code")
    second = run(tmp_path, "import logging; logging.basicConfig()\n" + SCRIPT)
    assert second.stdout.split() == ["False", *first[1:]]
    assert "plain torch" in second.stderr


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forked_children_generate(tmp_path):
    script = SCRIPT + (
        "import os\nchild = os.fork()\n"
        "if not child:\n    torch.set_num_threads(1)\n    small[0].weight.sum()\n    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert run(tmp_path, script).stdout.splitlines()[-1] == "0"


def test_importing_builds_and_asks_nothing(tmp_path):
    run(tmp_path, "import fxrpg, fxrpg.native")
    assert not (tmp_path / "cache").exists()


def test_logger_is_quiet(caplog):
    with caplog.at_level(logging.WARNING, "fxrpg"):
        native.library()
    assert not caplog.records


@needs_compiler
@pytest.mark.parametrize("method", ["ring", "pemn", "pranc"])
def test_whatever_torch_has_as_default(method):
    """The memory that C code writes to has its own type and device."""
    made = fxrpg.transform(layers(), dof=40, method=method, plan=[fxrpg.Rule("*", "generate")])
    expected = [(name, found.clone()) for name, found, _ in both(made, torch.float32)]
    with torch.device("meta"):
        dense = fxrpg.materialize(made)
    assert all(torch.equal(dense.get_parameter(name), w) for name, w in expected if not name.startswith("gradient"))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            plan = plan_of(made)
            state_of = {name: state for state, names in plan.states.items() for name in names}
            for name, view in plan.views.items():
                state = made.get_parameter(state_of[name]).detach()
                grad = torch.ones(view.shape, dtype=torch.float32)
                found = accumulate_gradient(grad, state, made.fxrpg_scale, view.text)
                with lowering_mode("materialized"):
                    assert same(found, accumulate_gradient(grad, state, made.fxrpg_scale, view.text)), name
        finally:
            torch.set_default_dtype(torch.float32)


@needs_compiler
@pytest.mark.parametrize("method", ["ring", "pemn"])
def test_other_sizes_are_plain_torch_s_to_refuse(method):
    small = fxrpg.transform(nn.Linear(64, 64), dof=3_000, method=method, plan=[fxrpg.Rule("*", "generate")])
    view, scale = plan_of(small).views["weight"], small.fxrpg_scale
    name = next(iter(plan_of(small).states))
    wrong = torch.ones(8, 8) if method == "pemn" else torch.ones(100)

    def called():
        return torch.func.functional_call(small, {name: wrong}, (torch.ones(1, 64),))

    with lowering_mode("materialized"):
        expected = None if method == "pemn" else called()
    if expected is None:
        with pytest.raises(RuntimeError):
            called()
    else:
        torch.testing.assert_close(called(), expected)
    with pytest.raises(RuntimeError):
        torch.ops.fxrpg.accumulate(torch.ones(8, 8), small.get_parameter(name).detach(), scale, view.text)


@needs_compiler
@pytest.mark.parametrize("method", ["ring", "pemn", "pranc"])
def test_tensors_that_are_read_negated(method):
    small = fxrpg.transform(nn.Linear(64, 64), dof=40, method=method, plan=[fxrpg.Rule("*", "generate")])
    view, scale = plan_of(small).views["weight"], small.fxrpg_scale
    state, grad = small.get_parameter(next(iter(plan_of(small).states))).detach(), torch.randn(64, 64)
    found = accumulate_gradient(torch._neg_view(grad), state, scale, view.text)
    assert torch.equal(found, accumulate_gradient(-grad, state, scale, view.text))
    assert torch.equal(
        generate_weight(torch._neg_view(state), scale, view.text), generate_weight(-state, scale, view.text)
    )


@needs_compiler
def test_a_relative_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, FXRPG_CACHE=".").stdout.startswith("True")
