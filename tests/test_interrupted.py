"""A run that is killed at any moment, also while it writes a snapshot, and resumed ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import STEPS, differences

from fxrpg import snapshots
from fxrpg.snapshots import NAME

ROOT = Path(__file__).parents[1]
KILLS = 20

# Children are forked from one process that has imported everything and trained once, so that each costs little.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from fxrpg import atomic, snapshots
from small_runs import STEPS, small_run

root, kills = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(0)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_half_way(save):
    # the file as it is when the process dies in the midst of writing it
    def half(state, path, *rest):
        save(state, path, *rest)
        os.truncate(path, draw.randrange(os.path.getsize(path)))
        die()
    return half

def doomed(kind, folder):
    # what the child does before it trains; killed from outside in the first kind
    if kind == "half a snapshot":
        left, save = draw.randrange(1, 5), torch.save
        def counted(*args):
            nonlocal left
            left -= 1
            return (save if left else die_half_way(save))(*args)
        torch.save = counted
    elif kind == "not yet moved":
        atomic.os.replace = die
    small_run(folder).fit(resume=True)
    os._exit(0)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)  # an exception; never back into this loop
    return pid

def finish(pid):
    return os.waitpid(pid, 0)[1]

def whole():
    small_run(root / "whole").fit()
    os._exit(0)

small_run().fit()
start = time.monotonic()
assert finish(child(whole)) == 0
seconds = time.monotonic() - start
found = []
for trial in range(kills):
    kind = ("at a random time", "half a snapshot", "not yet moved", "at a random time")[trial % 4]
    folder = root / str(trial)
    deaths = 0
    while not deaths:
        pid = child(lambda: doomed(kind, folder))
        if kind == "at a random time":
            time.sleep(draw.uniform(0.1, 0.9) * seconds)
            os.kill(pid, signal.SIGKILL)
        deaths += os.WIFSIGNALED(finish(pid))
        if not deaths:  # it was faster: once more, from the beginning
            (folder / snapshots.NAME).unlink()
    left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    step = snapshots.read(folder / snapshots.NAME)["step"] if snapshots.NAME in left else 0
    def rest():
        small_run(folder).fit(resume=True)
        os._exit(0)
    code = finish(child(rest))
    found.append({"kind": kind, "step": step, "parts": sum(name.endswith(".part") for name in left), "code": code})
chain = root / "chain"
for trial in range(kills):
    pid = child(lambda: doomed("at a random time", chain))
    time.sleep(draw.uniform(0.2, 1.8) * seconds / kills + 0.01)
    os.kill(pid, signal.SIGKILL)
    finish(pid)
assert finish(child(lambda: (small_run(chain).fit(resume=True), os._exit(0)))) == 0
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """The folder of all runs, and what is known of the killed ones."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(folder), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_every_killed_run_ends_as_if_it_had_not_been_killed(trials):
    folder, found = trials
    whole = snapshots.read(folder / "whole" / NAME)
    assert whole["step"] == STEPS
    assert [trial["code"] for trial in found] == [0] * KILLS
    assert {i: differences(whole, snapshots.read(folder / str(i) / NAME)) for i in range(KILLS)} == {
        i: [] for i in range(KILLS)
    }


def test_one_run_killed_again_and_again(trials):
    folder, _ = trials
    assert differences(snapshots.read(folder / "whole" / NAME), snapshots.read(folder / "chain" / NAME)) == []


def test_deaths_while_a_snapshot_was_written_left_the_one_before(trials):
    _, found = trials
    half = [trial for trial in found if trial["kind"] == "half a snapshot"]
    assert all(trial["parts"] == 1 for trial in half)
    assert any(trial["step"] > 0 for trial in half)
    assert all((trial["parts"], trial["step"]) == (1, 0) for trial in found if trial["kind"] == "not yet moved")


def test_resumed_runs_sweep_what_killed_ones_left(trials):
    folder, _ = trials
    assert {path.name for i in range(KILLS) for path in (folder / str(i)).iterdir()} == {NAME}


def test_differences_see_one_bit(trials):
    folder, _ = trials
    whole, other = (snapshots.read(folder / "whole" / NAME) for _ in range(2))
    other["average"]["module.fxrpg_ring"].view(torch.int32)[7] ^= 1
    assert differences(whole, other) == [".average.module.fxrpg_ring"]
