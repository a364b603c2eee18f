"""The machine code of the fused kernels, compiled for GPUs that need not be there: what fits, what spills, what it takes."""

from __future__ import annotations

import csv
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxrpg.dispatch import Problem, Tile, cards, tile_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

pytest.importorskip("triton", reason="compiles kernels; needs the package triton (Linux)")

launches = importlib.import_module("launches")
CSV = ROOT / "bench" / "results" / "sass.csv"
ROWS = [(card, row) for card in cards() for row in card.tiles]
MATRIX_OPS = ("linear", "conv")
LIMITS = {"ring": 13, "table": 5, "pemn": 6}
"""Instructions of a thread that a generated weight may take over a stored one, at the reference tile in bfloat16."""
GROWTH = 1.05
AGAIN = "If that is what was wanted, run `python bench/sass.py`."


@pytest.fixture(scope="module")
def found():
    """(case, its row) of everything that bench/sass.py compiles, now, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "sass.py"), "--print", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    cases = launches.cases()
    assert [row["case"] for row in rows] == [case.name for case in cases]
    return list(zip(cases, rows, strict=True))


@pytest.fixture(scope="module")
def recorded():
    """The rows of bench/results/sass.csv, by card and case."""
    with CSV.open(newline="") as file:
        return {(row["card"], row["case"]): row for row in csv.DictReader(file)}


@pytest.fixture
def figures(found, recorded):
    """`found`, where it was compiled by the Triton that the kernels are tuned with."""
    there, here = next(iter(recorded.values()))["triton"], found[0][1]["triton"]
    if there != here:
        pytest.skip(f"figures are those of triton {there}, found {here}; install constraints.txt")
    return found


def told(case, row, what):
    return f"{case.card} ({case.target}), {case.name}: {what.format(**row)}"


@pytest.mark.parametrize(("card", "row"), ROWS, ids=[f"{card.name}-{i}" for i, (card, _) in enumerate(ROWS)])
def test_every_row_of_a_table_is_the_first_for_some_problem(card, row):
    sides = {name: max(1, row[name]) for name in ("positions", "outputs")}
    where = {name: row[name] for name in ("op", "direction")}
    problem = Problem(**where, **sides, terms=1 << 14, weights=1 << 24, step=64, dtype=launches.DTYPES[row["bits"]])
    tile = tile_of(problem, card)
    assert Tile(**row["tile"] | {"splits": tile.splits}) == tile, "an earlier row takes all of its problems"


@pytest.mark.parametrize("target", sorted({card.target for card, _ in ROWS}))
def test_no_register_is_spilled(figures, target):
    bad = [told(case, row, "{spills}") for case, row in figures if case.target == target and int(row["spills"])]
    assert not bad, "spilled registers are read and written in memory; take a smaller tile:\n" + "\n".join(bad)


def test_shared_memory_fits(found):
    most = {card.name: card.shared for card in cards()}
    bad = [told(case, row, "{shared}") for case, row in found if int(row["shared"]) > most[case.card]]
    assert not bad, f"more bytes of shared memory than a program may have ({most}):\n" + "\n".join(bad)


def test_values_and_inputs_are_read_16_bytes_at_a_time(figures):
    bad = []
    for case, row in figures:
        if case.target != "sm_90" or case.op not in MATRIX_OPS or case.direction == "state_grad" or case.bits != 16:
            continue
        n, m, k, threads = case.tile.n, case.tile.m, case.tile.k, 32 * case.tile.warps
        least = 2 * (n * k + (m * k if m >= 16 else 0)) // 16 // threads
        if int(row["wide_loads"]) < least:
            bad.append(told(case, row, f"{{wide_loads}} loads of 16 bytes in the main loop, expected {least}"))
    assert not bad, "narrow loads: is alignment lost in an address?\n" + "\n".join(bad)


def test_products_are_made_by_the_tensor_cores_of_hopper(found):
    """Of 64 outputs or more: fewer are not enough for a warp group."""
    bad = [
        told(case, row, "{mma}")
        for case, row in found
        if case.target == "sm_90" and case.op in MATRIX_OPS and not case.ieee and case.tile.n >= 64
        if row["mma"] != "HGMMA"
    ]
    assert not bad, "expected HGMMA:\n" + "\n".join(bad)


def test_every_other_card_uses_its_tensor_cores(found):
    names = {"sm_80": "HMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    bad = [
        told(case, row, "{mma}")
        for case, row in found
        if case.target in names and case.op in MATRIX_OPS and case.bits == 16
        if not row["mma"].startswith(names[case.target])
    ]
    assert not bad, f"expected {names}:\n" + "\n".join(bad)


def test_sums_over_a_pranc_basis_are_products_of_integers(found):
    rows = [(case, row) for case, row in found if case.op == "pranc"]
    bad = [told(case, row, "{mma}") for case, row in rows if row["mma"] != "IGMMA"]
    assert rows
    assert not bad, "expected IGMMA:\n" + "\n".join(bad)


@pytest.mark.parametrize("op", MATRIX_OPS)
@pytest.mark.parametrize("method", LIMITS)
def test_what_generating_a_weight_takes(figures, op, method):
    where = {"op": op, "method": method, "direction": "forward", "tile": launches.REFERENCE, "bits": 16}
    (row,) = (
        row
        for case, row in figures
        if case.target == "sm_90" and not case.finish and all(getattr(case, name) == at for name, at in where.items())
    )
    most = LIMITS[method]
    assert float(row["extra_per_weight"]) <= most, "instructions a weight over those of a stored one"


def test_no_recorded_figure_has_grown(figures, recorded):
    assert recorded.keys() == {(case.card, case.name) for case, _ in figures}, f"other cases than recorded. {AGAIN}"
    bad = [
        told(case, row, f"{name} {before[name]} -> {row[name]}")
        for case, row in figures
        for before in [recorded[case.card, case.name]]
        for name in ("registers", "spills", "shared", "instructions", "extra_per_weight")
        if float(row[name] or 0) > GROWTH * float(before[name] or 0)
    ]
    assert not bad, f"grown by more than a twentieth since they were recorded. {AGAIN}\n" + "\n".join(bad)
