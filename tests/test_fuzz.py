"""Hostile input: mutated files by the thousand, what a coverage-guided fuzzer left, and options of any text."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import fuzz_coverage
import fuzz_files
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import Parts, entries_of, parts_of, places, signed, written
from torch import nn

import fxrpg
from fxrpg import FxrpgError, Rule, checkpoint, cli

ROOT = Path(__file__).parents[1]
CORPUS = sorted((ROOT / "tests" / "corpus").iterdir())


def test_twenty_thousand_mutated_files():
    """Two processes, because an audit hook and a limit on memory stay. A failure names the command that repeats it."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz_files.py"), "--files", "10000"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen([*command, "--first", first], env=environment, stdout=subprocess.PIPE, text=True)
        for first in ("0", "10000")
    ]
    for half in halves:
        printed, _ = half.communicate()
        assert half.returncode == 0, printed
        counts = json.loads(printed)
        assert sum(counts.values()) == 10_000
        for outcome in ("read, load, info", "read, load, verify", "read, load, unpack", "refused"):
            assert counts[outcome] > 300, "the mutator makes files of every kind"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return fuzz_files.cases(tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_the_coverage_guided_fuzzer_left(path, found, tmp_path):
    fuzz_coverage.replay(path.read_bytes(), found, tmp_path / "m.safetensors")


def test_seeds_of_the_coverage_guided_fuzzer(found, tmp_path):
    for data in fuzz_coverage.seeds(found).values():
        fuzz_coverage.replay(data, found, tmp_path / "m.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(data=st.data(), kind=st.sampled_from(["scopes", "methods", "everything", "pruned"]))
def test_any_json_in_any_place(data, kind, found, tmp_path_factory):
    case = found[kind]
    parts = parts_of(case.data)
    *spot, last = data.draw(st.sampled_from(list(places(parts.fields))))
    holder = parts.fields
    for key in spot:
        holder = holder[key]
    holder[last] = data.draw(JSON)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(written(*entries_of(parts, signed(Parts(parts.fields, parts.tensors)))))
    fuzz_files.attempt(case, path, (fuzz_files.load, *fuzz_files.VERBS))


WORDS = st.sampled_from(
    ["re:", "*", "0.weight", "=", ":", "dense", "generate", "ring", "pranc", "pemn", "1", "0.5", "-1", "1e400", "nan",
     "block", "bits", "law", "keep", "(", ")", "[", "]", "{9}", "{99999999999}", "\\", "\n", "\0", "?", "True", "é", "9" * 5000]
)  # fmt: skip
OPTIONS = st.sampled_from(["--rule", "--set", "--scope", "--dof", "--method", "--seed"])
TEXT = st.lists(WORDS | st.text(max_size=3), max_size=6).map("".join)


@settings(max_examples=300)
@given(options=st.lists(st.tuples(OPTIONS, TEXT)))
@example([("--rule", "re:a{99999999999999999999}=dense")])
@example([("--rule", f"re:{'(' * 3000}=dense")])
@example([("--set", "block={[]:1}")])
@example([("--dof", "9" * 5000)])
def test_options_of_any_text(options):
    """Exit code 2 or FxrpgError, whatever stands there; nothing else."""
    fuzz_coverage.as_options("\n".join(word for option in options for word in option).encode("utf-8", "surrogatepass"))


@settings(max_examples=300)
@given(pattern=TEXT, action=st.sampled_from(["dense", "generate", "ring", "pemn"]) | TEXT, name=TEXT)
def test_rules_of_any_text(pattern, action, name):
    with contextlib.suppress(FxrpgError), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets in sets, which mean something else some day
        Rule(pattern, action).matches(name, torch.empty(0))


def test_a_list_as_a_key_is_told_as_any_other_mistake(capsys):
    with pytest.raises(FxrpgError, match="must be of type int"):
        cli._configured("ring", dict([cli._setting("block={[]:1}")]))


def test_code_in_the_name_of_a_state(tmp_path):
    """torch.fx writes names into a graph's code: a state could have carried code of the file's author there."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    path, witness = tmp_path / "m.safetensors", tmp_path / "witness"
    fxrpg.save(fxrpg.transform(model, dof=5), path)
    parts = parts_of(path.read_bytes())
    state = f'fxrpg_ring") or open("{witness}", "w") or getattr(self, "fxrpg_ring'.replace(".", "\\x2e")
    parts.fields["scopes"][0]["state"] = state
    parts.tensors[state] = parts.tensors.pop("fxrpg_ring")
    path.write_bytes(written(*entries_of(parts, signed(parts))))
    with pytest.raises(FxrpgError, match="a scope must name its state"):
        fxrpg.load(model, path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"\2", b"\xff"])
def test_truth_values_that_are_neither(content, tmp_path):
    """torch's ops disagree on what they are."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_buffer("mask", torch.tensor([True, False]))
    path = tmp_path / "m.safetensors"
    fxrpg.save(fxrpg.transform(model, dof=5), path)
    parts = parts_of(path.read_bytes())
    parts.tensors["mask"] = "BOOL", [2], b"\1" + content
    path.write_bytes(written(*entries_of(parts, signed(parts))))
    with pytest.raises(FxrpgError, match="neither 0 nor 1"):
        checkpoint.read(path)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_every_depth_around_the_limit(opening, found, tmp_path):
    """Python's limit counts the calls above, which differ from one step of the checks to the next."""
    parts, path = parts_of(found["plain"].data), tmp_path / "m.safetensors"
    closing = {"[": "]", '{"a":': "}"}[opening]
    for depth in range(800, 1010):
        deep = f"{opening * depth}1{closing * depth}"
        path.write_bytes(written(*entries_of(parts, signed(parts).replace('"rules":[]', f'"rules":{deep}'))))
        with pytest.raises(FxrpgError):
            checkpoint.read(path)


def test_names_of_any_length_make_short_errors(found, tmp_path):
    case, path = found["plain"], tmp_path / "m.safetensors"
    parts = parts_of(case.data)
    parts.fields["table"][0]["name"] = "y" * 100_000
    path.write_bytes(written(*entries_of(parts, signed(parts))))
    with pytest.raises(FxrpgError) as caught:
        fxrpg.load(case.model, path)
    assert len(str(caught.value)) < 1000
