"""Files that others write, cut, fill or replace meanwhile: whole, or one clear error, never a dead process or a mixture."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import Net, bits, forged, refusal, transformed

import fxrpg
from fxrpg import checkpoint, container

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

SHARED = """
import os, random, signal, sys, traceback
import torch
from torch import nn
import fxrpg
from fxrpg import checkpoint
torch.set_num_threads(1)
path, kind = sys.argv[1:]
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 8))
small = [fxrpg.transform(model, dof=dof, seed=dof) for dof in (20, 400)]
bytes_of = []
for one in small:
    fxrpg.save(one, path)
    bytes_of.append(open(path, "rb").read())
seeds = {20: small[0].fxrpg_ring.tolist(), 400: small[1].fxrpg_ring.tolist()}

def replace():
    while True:
        for one in small:
            fxrpg.save(one, path)

def cut():  # in place, as no one should
    rng = random.Random(1)
    while True:
        with open(path, "rb+") as file:
            file.truncate(rng.choice((0, 5, 100, rng.randrange(len(bytes_of[0])))))
            file.seek(0)
            file.write(rng.choice(bytes_of))

def reads():
    whole = 0
    for _ in range(120):
        try:
            ring = fxrpg.load(model, path).fxrpg_ring
        except fxrpg.FxrpgError:
            assert kind == "cut"
            continue
        assert ring.tolist() == seeds[len(ring)]
        whole += 1
    assert whole == 120 or kind == "cut"

def child(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid

writer = child({"replace": replace, "cut": cut}[kind])
readers = [child(reads), child(reads)]
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in readers]
os.kill(writer, signal.SIGKILL)
os.waitpid(writer, 0)
assert codes == [0, 0], codes
"""


@pytest.mark.parametrize("kind", ["replace", "cut"])
def test_readers_and_a_writer_in_processes_of_their_own(kind, tmp_path):
    """Saved again and again, a file is the old or the new one whole; cut short in place, it is that or an error."""
    done = subprocess.run(
        [sys.executable, "-c", SHARED, str(tmp_path / "m.safetensors"), kind],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def between(monkeypatch, act) -> None:
    """Have `act` happen after a file's header was read and before its tensors are."""
    read_tensors = container.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *args: (act(), read_tensors(*args))[1])


def test_a_file_cut_short_while_it_is_read(monkeypatch, tmp_path):
    path = tmp_path / "m.safetensors"
    fxrpg.save(transformed(Net), path)
    between(monkeypatch, lambda: os.truncate(path, 0))
    # what was read ahead is there still, or not: the file is the old one, or an error
    with contextlib.suppress(fxrpg.FxrpgError):
        fxrpg.load(Net(), path)
    assert "must be a whole safetensors file" in refusal(fxrpg.load, Net(), path)


def test_a_large_file_cut_short_while_it_is_read(monkeypatch, tmp_path):
    path = tmp_path / "m.safetensors"
    small = fxrpg.transform(torch.nn.Linear(1000, 100), dof=90_000, plan=[fxrpg.Rule("*", "generate")])
    fxrpg.save(small, path)
    between(monkeypatch, lambda: os.truncate(path, 200_000))
    assert "fewer bytes than when it was opened" in refusal(checkpoint.read, path)


@pytest.mark.parametrize("act", ["replaced", "removed"])
def test_a_file_replaced_or_removed_while_it_is_read(act, monkeypatch, tmp_path):
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    small = transformed(Net)
    fxrpg.save(small, path)
    fxrpg.save(transformed(Net, 40), other)
    between(monkeypatch, (lambda: os.replace(other, path)) if act == "replaced" else path.unlink)
    assert bits({"": fxrpg.load(Net(), path).fxrpg_ring}) == bits({"": small.fxrpg_ring})


# A full disk, and other places where nothing can be written.


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk in memory: (its folder, a function that makes it read-only)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs, as root has it: {done.stderr.strip()}")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    subprocess.run(["umount", str(folder)], check=True)


def large() -> torch.nn.Module:
    return fxrpg.transform(torch.nn.Linear(1000, 100), dof=90_000, plan=[fxrpg.Rule("*", "generate")])


def test_a_full_disk(disk):
    folder, _ = disk
    fxrpg.save(transformed(Net), folder / "m.safetensors")
    before = (folder / "m.safetensors").read_bytes()
    with pytest.raises(OSError, match=r"m\.safetensors: .*No space left on device"):
        fxrpg.save(large(), folder / "m.safetensors")
    assert (folder / "m.safetensors").read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["m.safetensors"]


def test_a_read_only_disk(disk):
    folder, lock = disk
    fxrpg.save(transformed(Net), folder / "m.safetensors")
    lock()
    with pytest.raises(OSError, match=r"Read-only file system.*m\.safetensors"):
        fxrpg.save(transformed(Net), folder / "m.safetensors")
    fxrpg.load(Net(), folder / "m.safetensors")


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_limit_on_the_size_of_files(verb, tmp_path):
    """As a full disk, for who cannot mount one; and on the command line."""
    (tmp_path / "wide.py").write_text("from torch import nn\ndef build(): return nn.Linear(100, 99)\n")
    small = fxrpg.transform(torch.nn.Linear(100, 99), dof=50, plan=[fxrpg.Rule("*", "generate")])
    fxrpg.save(small, tmp_path / "small.safetensors")
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"old")
    arguments = {
        "pack": ["wide:build", "--dof", "9000", "--rule", "*=generate", "--out", str(out)],
        "unpack": [str(tmp_path / "small.safetensors"), "--out", str(out)],
    }[verb]
    done = subprocess.run(
        [sys.executable, "-B", "-m", "fxrpg", verb, *arguments],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"fxrpg {verb}: {out}: ")
    assert done.stderr.count("\n") == 1
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "small.safetensors", "wide.py"]


def test_a_name_as_long_as_names_may_be(tmp_path):
    path = tmp_path / ("n" * 255)
    fxrpg.save(transformed(Net), path)
    fxrpg.load(Net(), path)
    assert list(tmp_path.iterdir()) == [path]


def test_links(tmp_path):
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "target")
    with pytest.raises(FileNotFoundError):
        fxrpg.load(Net(), dangling)
    fxrpg.save(transformed(Net), dangling)
    assert dangling.is_symlink()
    fxrpg.load(Net(), tmp_path / "target")
    (tmp_path / "folder").symlink_to(tmp_path)
    assert "a folder or a device" in refusal(fxrpg.save, transformed(Net), tmp_path / "folder")
    assert "a folder or a device" in refusal(fxrpg.load, Net(), tmp_path / "folder")
    (tmp_path / "pipe link").symlink_to(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    assert "a folder or a device" in refusal(fxrpg.load, Net(), tmp_path / "pipe link")
    assert "a folder or a device" in refusal(checkpoint.read, "/dev/zero")


def test_weights_that_are_more_than_the_memory_are_not_begun(tmp_path):
    """Each alone would fit: a system that promises more than it has would kill the process instead."""
    source, path = tmp_path / "source", tmp_path / "m.safetensors"
    fxrpg.save(transformed(Net), source)
    side = 1 << 30

    def change(fields, tensors):
        first = fields["table"][0] | {"shape": [side, 1]}
        fields["table"] = [first | {"name": f"w{i}", "tensor": i, "offset": i * side} for i in range(1 << 10)]  # 4 TiB

    forged(source, path, change)
    assert "bytes of weights must fit into memory" in refusal(checkpoint.unpack, path)
