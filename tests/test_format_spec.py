"""The README's "The file format" is enough to read a file by, and what it shows of one is what is there."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import format_reader
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxrpg
from fxrpg import FxrpgError, Ring, Rule

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
READER = ROOT / "tests" / "format_reader.py"


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose1d(5, 6, 2), nn.Linear(7, 9), nn.Linear(9, 33))


def packed(method: Ring, path: Path, dof: int = 45, dtype: torch.dtype = torch.float32) -> nn.Module:
    small = fxrpg.transform(net().to(dtype), dof=dof, method=method, seed=2**63 + 5, plan=[Rule("*", "generate")])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        small.fxrpg_ring.copy_(torch.randn(dof, generator=generator))
        small.fxrpg_ring[::9] = 0
        small.fxrpg_ring[3] = 7e4  # infinite in float16
    fxrpg.save(small, path)
    return small


def bits(tensor: torch.Tensor) -> str:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()).hex()


def compare(small: nn.Module, path: Path) -> None:
    weights = fxrpg.materialize(small).state_dict()
    found = format_reader.read(path.read_bytes())
    assert found
    for name, (_dtype, shape, data) in found.items():
        assert shape == list(weights[name].shape)
        assert data == bits(weights[name]), name


def test_the_reader_knows_nothing_but_the_standard_library(tmp_path):
    tree = ast.parse(READER.read_text())
    modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert modules <= {"hashlib", "itertools", "json", "math", "struct", "sys"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    small = packed(Ring(), tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(READER), str(tmp_path / "m.safetensors")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    weights = fxrpg.materialize(small).state_dict()
    found = json.loads(done.stdout)
    assert {name: data for name, (_, _, data) in found.items()} == {name: bits(weights[name]) for name in found}


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize(("layout", "block"), [("arc", 1), ("arc", 8), ("arc", 32), ("shuffle", 1), ("shuffle", 64)])
def test_every_order(layout, block, permute, reflect, tmp_path):
    method = Ring(layout=layout, block=block, permute=permute, reflect=reflect)
    compare(packed(method, tmp_path / "m"), tmp_path / "m")


@pytest.mark.parametrize("reflect", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "hash", "block": 8},
        {"layout": "hash", "block": 1},
        {"layout": "block_diagonal", "block": 1},
        {"layout": "block_diagonal", "block": 1, "permute": False},
    ],
    ids=str,
)
def test_the_other_layouts(settings, reflect, tmp_path):
    compare(packed(Ring(reflect=reflect, **settings), tmp_path / "m"), tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dof", [1, 7, 500])
def test_types_and_sizes(dof, dtype, tmp_path):
    compare(packed(Ring(), tmp_path / "m", max(dof, 4), dtype), tmp_path / "m")


@pytest.mark.parametrize("bits_block", [0, 5, 100])
@pytest.mark.parametrize("code_bits", [4, 8])
def test_codes(code_bits, bits_block, tmp_path):
    small = fxrpg.freeze(packed(Ring(bits=code_bits, bits_block=bits_block), tmp_path / "m"))
    fxrpg.save(small, tmp_path / "m")
    compare(small, tmp_path / "m")


def test_pruned_numbers_and_channels(tmp_path):
    small = fxrpg.prune(packed(Ring(), tmp_path / "m"), 0.5)
    fxrpg.save(small, tmp_path / "m")
    compare(small, tmp_path / "m")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    small = fxrpg.prune_channels(fxrpg.transform(model, dof=300, plan=[Rule("*", "generate")]), 0.4)
    fxrpg.save(small, tmp_path / "m")
    compare(small, tmp_path / "m")


def test_a_permutation_of_many_blocks(tmp_path):
    """From 2^14 on it has six rounds."""
    model = nn.Linear(129, 128, bias=False)
    small = fxrpg.transform(model, dof=1000, method=Ring(block=1), plan=[Rule("*", "generate")])
    fxrpg.save(small, tmp_path / "m")
    compare(small, tmp_path / "m")


# The worked example.


SECTION = README.split("## The file format\n", 1)[-1].split("\n## ", 1)[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The bytes that the section's own code writes."""
    folder = tmp_path_factory.mktemp("tiny")
    code = next(code for language, code in BLOCKS if language == "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, {})
    return (folder / "tiny.safetensors").read_bytes()


def parts(data: bytes) -> tuple[int, dict, dict]:
    length = int.from_bytes(data[:8], "little")
    container = json.loads(data[8 : 8 + length])
    return 8 + length, container, json.loads(container["__metadata__"]["fxrpg"])


def hexdump(data: bytes, first: int, last: int) -> str:
    lines = []
    for i in range(first, last, 16):
        some = data[i : min(i + 16, last)]
        text = "".join(chr(c) if 32 <= c < 127 else "." for c in some)
        lines.append(f"{i:04x}  {some.hex(' '):47}  {text}")
    return "\n".join(lines)


def steps(data: bytes, name: str, index: tuple[int, ...]) -> str:
    """One weight's way from the seed to its value, by the reader's own functions."""
    r, (body, container, header) = format_reader, parts(data)
    seed, row = header["seed"], next(row for row in header["table"] if row["name"] == name)
    (scope,) = header["scopes"]
    shape, tensor, block = [row["shape"][axis] for axis in row["order"]], row["tensor"], scope["settings"]["block"]
    i = 0
    for axis, side in zip(row["order"], shape, strict=True):
        i = i * side + index[axis]
    count, (b, lane) = row["shape"][0] * row["shape"][1] * row["shape"][2], divmod(i, block)
    blocks = -(-count // block)
    a, other = r.factors(blocks)
    keys = [r.derive_key(seed, r.PERMUTE, tensor, k) for k in range(8)]
    x, path = b, []
    while not path or x >= blocks:  # the same rounds, one walk at a time
        left, right = divmod(x, other)
        for k, key in enumerate(keys):
            t = ((right if k % 2 == 0 else left) * 0x9E3779B1 + key) & r.M32
            step = (((t * (t | 1)) & r.M32) * (a if k % 2 == 0 else other)) >> 32
            left, right = ((left + step) % a, right) if k % 2 == 0 else (left, (right + step) % other)
        x = left * other + right
        path.append(x)
    assert x == r.permuted(b, blocks, seed, r.PERMUTE, tensor)
    cell = ((row["offset"] // block + x) * block + lane) % scope["size"]
    word = r.word_at(i // 32, seed, r.SIGN, tensor)
    begin = body + container[scope["state"]]["data_offsets"][0] + 4 * cell
    value = r.decoded(data[begin : begin + 4], "F32")[0]
    sign = word >> i % 32 & 1
    outer, inner = (r.derive_key(seed, r.SIGN, tensor, k) for k in (0, 1))
    result = r.decoded(r.encoded((-value if sign else value) * row["scale"], "F32"), "F32")[0]
    return "\n".join([
        f"element {list(index)} of {row['shape']}, in order {row['order']}: i = {i}, block b = {b}, lane {lane}",
        f"{blocks} blocks: a = {a}, b = {other}; keys {', '.join(f'{key:08x}' for key in keys)}",
        f"pi({b}) = {' -> '.join(map(str, path))}",
        f"cell = ({row['offset'] // block} + {x}) * {block} + {lane} mod {scope['size']} = {cell}",
        f"at byte {begin:04x}: {data[begin : begin + 4].hex(' ')} = {value}",
        f"sign word {i // 32}: keys {outer:08x}, {inner:08x}; word {word:08x}, bit {i % 32} is {sign}",
        f"weight = {'-' if sign else ''}{value} * {row['scale']} = {result}",
    ])  # fmt: skip


def test_the_bytes_shown_are_those_of_the_file(tiny):
    body = parts(tiny)[0]
    assert hexdump(tiny, 0, 48) in SECTION
    assert hexdump(tiny, body - body % 16, len(tiny)) in SECTION
    assert f"{len(tiny)} bytes" in SECTION


def test_the_fields_shown_are_those_of_the_file(tiny):
    header = parts(tiny)[2]
    rows = dict(re.findall(r"^\| `([a-z.]+)` \| `(.*?)` \|", SECTION, flags=re.MULTILINE))
    holders = {"scope": header["scopes"][0], "row": header["table"][1]}
    expected = {name: value for name, value in header.items() if name not in ("scopes", "table")}
    expected |= {f"{kind}.{name}": value for kind, fields in holders.items() for name, value in fields.items()}
    shown = {name: json.dumps(value, separators=(",", ":")) for name, value in expected.items()}
    assert rows == shown


def test_the_weight_shown_is_computed_so(tiny):
    text = steps(tiny, "0.weight", (3, 1, 2))
    assert text in SECTION, text
    weights = format_reader.read(tiny)
    kind, shape, data = weights["0.weight"]
    values = torch.tensor(format_reader.decoded(bytes.fromhex(data), kind)).view(shape)
    assert text.endswith(f"= {values[3, 1, 2]}")


def test_the_functions_shown_are_the_readers_own():
    shown: dict = {}
    exec(next(code for language, code in BLOCKS if language == "python" and "def pi" in code), shown)
    r = format_reader
    for seed in (0, 5, 2**64 - 1):
        assert [shown["key"](seed, 1, i) for i in range(9)] == [r.derive_key(seed, 1, i) for i in range(9)]
        for i in (0, 1, 2**32 - 1, 2**32, 2**47):
            assert shown["word"](i, seed, 2, 7) == r.word_at(i, seed, 2, 7)
        for count in (1, 2, 3, 5, 40, 20_000):
            assert [shown["pi"](x, count, seed, 1) for x in range(40) if x < count] == [
                r.permuted(x, count, seed, 1) for x in range(40) if x < count
            ]


# The errors that the section explains.


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def write_pt(path: Path) -> None:
    torch.save(plain().state_dict(), path)


def write_damaged(path: Path) -> None:
    fxrpg.save(fxrpg.transform(plain(), dof=5), path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def save_withheld(path: Path) -> None:
    fxrpg.save(fxrpg.transform(plain(), dof=5, seed=3), path, withhold_seed=True)


def load_into(model: nn.Module, write, **given):
    def act(path: Path) -> None:
        write(path)
        fxrpg.load(model, path, **given)

    return act


ERRORS = [
    load_into(plain(), write_pt),
    load_into(plain(), lambda path: save_file(plain().state_dict(), path)),
    load_into(plain(), write_damaged),
    load_into(plain(), save_withheld),
    load_into(plain(), save_withheld, seed=4),
    load_into(nn.Sequential(nn.Linear(4, 4)), save_withheld, seed=3),
    lambda path: fxrpg.transform(fxrpg.transform(plain(), dof=5), dof=5),
    lambda path: fxrpg.save(plain(), path),
    lambda path: fxrpg.transform(plain(), dof=5, plan=[Rule("weight", "dense")]),
    lambda path: fxrpg.transform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), dof=5),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_the_errors_shown_are_what_is_said(number, tmp_path):
    table = SECTION.split("| it says |")[1]
    shown = re.findall(r"^\| `(.*?)` \|", table, flags=re.MULTILINE)
    assert len(shown) == len(ERRORS)
    pattern = ".*".join(map(re.escape, shown[number].split("...")))
    with pytest.raises(FxrpgError, match=pattern):
        ERRORS[number](tmp_path / "m.safetensors")
