"""Several processes, as torchrun starts them: one model, one folder, and a run that goes on where one of them died."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import differences

from fxrpg import FxrpgError, snapshots
from fxrpg.ranks import Ranks, joined, started_together
from fxrpg.snapshots import NAME

ROOT = Path(__file__).parents[1]
STEPS = 6

# Python imports this by itself: `python -m fxrpg.demo` then has pictures without torchvision, leaves behind what every process
# ended with, and, where DIES says so, kills the process of rank 1 in the midst of a step.
SITE = """
import os, signal, sys
if "WORLD_SIZE" in os.environ and "elastic" not in " ".join(sys.argv):
    import torch
    from fxrpg import ranks
    from fxrpg.demo import vision
    from test_vision import few_pictures

    torch.set_num_threads(1)

    def pictures(*args, **kwargs):
        found = few_pictures()
        batch, left = found.train.batch, [int(os.environ["DIES"])]
        def counted(indices):
            left[0] -= 1
            if not left[0] and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(indices)
        found.train.batch = counted
        return found

    def run(job, whole=vision.run):
        trainer = whole(job)
        torch.save(trainer.model.state_dict(), f"{os.environ['LEAVES']}-{os.environ['RANK']}.pt")
        return trainer

    vision.load_pictures, vision.run = pictures, run
"""


def torchrun(folder: Path, *argv: str, dies: int = 0, leaves: str = "end") -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node=2 -m fxrpg.demo`, 3 epochs of 2 steps."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    paths = [folder / "site", ROOT, ROOT / "tests"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment |= {"DIES": str(dies), "LEAVES": str(folder / leaves)}
    flags = (
        "--data cifar10 --root data --model resnet20 --dof 1000 --epochs 3 --batch 16 --accumulate 2 --snapshot-every 1"
    )
    torch_command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={_free_port()}",
    ]
    return subprocess.run(
        [*torch_command, "-m", "fxrpg.demo", *flags.split(), *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(folder, "--out", "whole", leaves="whole")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_both_processes_end_with_the_same_weights(whole):
    folder, _ = whole
    first, second = (torch.load(folder / f"whole-{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    stored = snapshots.read(folder / "whole" / NAME)
    assert stored["step"] == STEPS
    assert all(torch.equal(value, first[name]) for name, value in stored["model"].items())


def test_only_the_first_process_prints_and_writes(whole):
    folder, done = whole
    assert done.stdout.count("epoch 3 of 3: lr") == 1
    assert "on 2 processes (cpu)" in done.stdout
    assert {path.name for path in (folder / "whole").iterdir()} == {NAME, "log.csv", "model.safetensors"}
    assert (folder / "whole" / "log.csv").read_text().count("\n") == 4


def test_goes_on_after_one_of_them_died(whole):
    folder, _ = whole
    done = torchrun(folder, "--out", "killed", dies=2 * 3 + 2)
    assert done.returncode != 0
    assert snapshots.read(folder / "killed" / NAME)["step"] == 3
    done = torchrun(folder, "--out", "killed", "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on after step 3 of 6" in done.stdout
    assert differences(snapshots.read(folder / "whole" / NAME), snapshots.read(folder / "killed" / NAME)) == []


def test_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not started_together()
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.device.type, ranks.writes) == (0, 1, "cpu", True)
        model = torch.nn.Linear(2, 2)
        assert ranks.wrapped(model) is model
        assert ranks.each(2.5) == [2.5]
        assert ranks.total(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert not torch.distributed.is_initialized()
    assert not Ranks(rank=1, world=2).writes


def test_incomplete_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(
            FxrpgError, match="must come with RANK, LOCAL_RANK.*found 'RANK'. Start the processes with torchrun"
        ),
        joined("cpu"),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(FxrpgError, match="MASTER_ADDR"), joined("cpu"):
        pass


def test_digits_run_in_one_process(monkeypatch, capsys):
    from fxrpg.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 2
    assert "on digits, runs in one process, found WORLD_SIZE=2" in capsys.readouterr().err
