"""`fxrpg demo --data`: from the flags to the files, on pictures of the test's own."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from fake_pictures import fake_cifar10, fake_image_folder
from safetensors.torch import load_file
from torch import nn

import fxrpg
from fxrpg.cli import main
from fxrpg.demo import vision
from fxrpg.demo.models import build_network
from fxrpg.networks import NETWORKS, lenet
from fxrpg.pictures import Pictures, PictureTensor

sys.path.append(str(Path(__file__).parents[1]))
DEMO = ("demo", "--data", "cifar10", "--root", "data", "--model", "lenet", "--epochs", "2", "--batch", "16")
RING = (*DEMO, "--dof", "500")


def few_pictures(*_args, count=48, **_others):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=draw)
    pixels = (20 * labels[:, None, None, None] + torch.randint(50, (count, 3, 32, 32), generator=draw)).to(torch.uint8)
    train, test = (PictureTensor(pixels[part], labels[part], (0.4,) * 3, (0.2,) * 3, changed=part.start is None)
                   for part in (slice(None, 32), slice(32, None)))  # fmt: skip
    return Pictures(train, test, classes=10, side=32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vision, "load_pictures", few_pictures)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(capsys, *argv, code=0):
    """What a command says; both streams."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    out, err = capsys.readouterr()
    assert bool(err) == bool(code)
    return out + err


@pytest.mark.parametrize(
    ("method", "dof"), [("ring", ("--dof", 500)), ("pranc", ("--dof", 20)), ("pemn", ("--dof", "1e-2")), ("dense", ())]
)
def test_every_method(method, dof, folder, capsys):
    out = run(capsys, *DEMO, "--method", method, *dof, "--out", "new/run")
    recipe = {"ring": "rpg-cifar", "dense": "rpg-cifar", "pemn": "pemn-resnet"}.get(method, "pranc")
    lines = out.splitlines()
    assert lines[0] == "cifar10: 32 training and 16 test pictures, 10 classes"
    assert lines[1].startswith(f"lenet, {method}; recipe {recipe}, batch 16, lr 0.")
    assert "epoch 2 of 2: lr " in out
    assert lines[-1].startswith("test accuracy ")
    assert {path.name for path in (folder / "new" / "run").iterdir()} == {"log.csv", "snapshot.pt", "model.safetensors"}
    with open("new/run/log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    snapshot = torch.load("new/run/snapshot.pt", weights_only=True)["model"]
    if method == "dense":
        model = lenet()
        model.load_state_dict(load_file("new/run/model.safetensors"))
        assert all(torch.equal(value, snapshot[name]) for name, value in model.state_dict().items())
    else:
        model = fxrpg.load(lenet(), "new/run/model.safetensors")
        trained = fxrpg.ledger(model)
        assert trained.dof == {"ring": 500, "pranc": 20, "pemn": 481}[method]
        shared = model.state_dict().keys() & snapshot.keys() - {"fxrpg_digest"}
        assert shared
        assert all(torch.equal(model.state_dict()[name], snapshot[name]) for name in shared)


def test_what_the_flags_mean(folder, capsys, monkeypatch):
    seen = []
    whole = vision.Trainer
    monkeypatch.setattr(vision, "Trainer", lambda *args, **kwargs: seen.append(whole(*args, **kwargs)) or seen[-1])
    run(
        capsys, *RING, "--recipe", "pemn-convmixer", "--lr", "0.01", "--accumulate", 2, "--clip", "0.5", "--amp", "bf16",
        "--ema", "0.5", "--seed", 7, "--workers", 1, "--log-every", 1, "--snapshot-every", 3, "--no-norm-decay",
        "--set", "block=1", "--rule", "0.weight=dense", "--scope", "layer",
    )  # fmt: skip
    (trainer,) = seen
    expected = {
        "epochs": 2,
        "batch": 16,
        "accumulate": 2,
        "clip": 0.5,
        "amp": "bf16",
        "ema": 0.5,
        "seed": 7,
        "workers": 1,
    }
    expected |= {"log_every": 1, "snapshot_every": 3}
    assert {name: getattr(trainer.training, name) for name in expected} == expected
    optimizer = trainer._stepper.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [group["initial_lr"] for group in optimizer.param_groups] == 3 * [0.01]
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0, 0.005, 0.005]
    assert {name for name, _ in trainer.model.named_parameters() if name.startswith("fxrpg_")} == {
        "fxrpg_ring_3", "fxrpg_ring_7", "fxrpg_ring_9",
    }  # fmt: skip
    assert (folder / "fxrpg-demo" / "average.safetensors").exists()


@pytest.mark.parametrize(("flags", "moved"), [(("--active", 5), 10), ((), 20), (("--active", 0), 20)])
def test_coordinate_descent_of_pranc(flags, moved, folder, capsys):
    """Each epoch moves other coefficients; the recipe's 500 are more than there are here."""
    out = run(capsys, *DEMO, "--method", "pranc", "--dof", 20, *flags)
    assert ("5 coefficients an epoch" in out) == (moved == 10)
    alpha = torch.load("fxrpg-demo/snapshot.pt", weights_only=True)["model"]["fxrpg_alpha"]
    start = fxrpg.transform(lenet(), dof=20, method="pranc").fxrpg_alpha
    assert int((alpha != start).sum()) in (
        {moved} if moved == 20 else range(6, 11)
    )  # choices of two epochs may overlap


def test_interrupted_and_resumed_as_it_says(folder, capsys, monkeypatch):
    def pictures(*args, **kwargs):
        found = few_pictures()
        batch, left = found.train.batch, [3]

        def interrupting(indices):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGINT)
            return batch(indices)

        found.train.batch = interrupting
        return found

    with monkeypatch.context() as patch:
        patch.setattr(vision, "load_pictures", pictures)
        out = run(capsys, *RING, "--out", "a b", code=130)
    assert "interrupted after step 3 of 4; to go on:" in out
    said = f"fxrpg {' '.join(RING)} --out 'a b' --resume"
    assert f"  {said}\n" in out
    out = run(capsys, *RING, "--out", "a b", "--resume")
    assert "going on after step 3 of 4" in out
    run(capsys, *RING, "--out", "c")
    assert (folder / "a b" / "model.safetensors").read_bytes() == (folder / "c" / "model.safetensors").read_bytes()
    message = run(capsys, *RING, "--out", "c", code=2)
    assert message.startswith("fxrpg demo: c: must hold no earlier run when one begins")
    message = run(capsys, *RING, "--out", "c", "--seed", 1, "--resume", code=2)
    assert message.startswith("fxrpg demo: resume: seed must be 0")
    message = run(capsys, *RING, "--out", "c", "--set", "block=1", "--resume", code=2)
    assert message.startswith("fxrpg demo: resume: set must be '[]'")


def test_a_model_of_the_users_own(folder, capsys):
    (folder / "models_of_mine.py").write_text(
        "from torch import nn\ndef wide(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
        "def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 9))\n"
    )
    words = [word if word != "lenet" else "models_of_mine:wide" for word in DEMO]
    run(capsys, *words, "--method", "pemn", "--dof", "1.0")
    words[words.index("models_of_mine:wide")] = "models_of_mine:narrow"
    message = run(capsys, *words, "--method", "dense", "--out", "b", code=2)
    assert "return [n, 10], a number for each class, found (2, 9) for two pictures" in message
    assert not (folder / "b").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("demo", "--model", "lenet"), "--model: needs --data"),
        (("demo", "--dof", "3"), "--dof: needs --data"),
        (("demo", "--snapshot-every", "3"), "--snapshot-every: needs --data"),
        (("demo", "--resume"), "--resume: needs --data"),
        (("demo", "--data", "cifar10"), "--root: must name the folder"),
        ((*DEMO, "--seeds", "2"), "--seeds: is for the digits"),
        ((*DEMO, "--method", "dense", "--dof", "3"), "--dof: is for ring, pranc and pemn"),
        ((*DEMO, "--method", "dense", "--set", "block=1"), "--set: is for ring, pranc and pemn"),
        ((*DEMO, "--method", "banana", "--dof", "3"), "banana"),
        (DEMO, "dof: must be an int in"),
        ((*RING, "--batch", "33"), "batch: must be at most the number of training examples, 32"),
        (
            (*RING, "--recipe", "pemn-vit", "--batch", "33"),
            "batch: must be at most the number of training examples, 32",
        ),
        ((*RING, "--recipe", "sgd"), "--recipe: must be one of rpg-cifar"),
        ((*RING, "--model", "resnet21"), "Did you mean resnet2"),
        ((*RING, "--model", "nothing:there"), "must be importable"),
        ((*RING, "--device", "banana"), "--device: must be cpu or cuda, and there, found 'banana'"),
        ((*RING, "--device", "meta"), "--device: must be cpu or cuda"),
        ((*RING, "--lr", "nan"), "lr: must be a number above 0"),
        ((*DEMO, "--method", "dense", "--seed", "-1"), "seed"),
        ((*DEMO, "--method", "dense", "--seed", str(1 << 64)), "seed"),
        ((*RING, "--active", "5"), "--active: is for pranc"),
        ((*DEMO, "--method", "pranc", "--dof", "20", "--active", "21"), "active: must be an int in [1, 20]"),
        ((*DEMO, "--method", "pranc", "--dof", "20", "--active", "-1"), "active: must be an int in [1, 20]"),
        (
            (*DEMO, "--method", "pranc", "--dof", "20", "--active", "5", "--amp", "fp16"),
            "unscaled gradients, found fp16",
        ),
        ((*RING, "--ema", "2"), "ema: must lie between 0 and 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(argv, message, folder, capsys):
    text = run(capsys, *argv, code=2)
    assert text.count("\n") == 1
    assert message in text
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("flag", [("--model", "resnet20"), ("--method=ring",), ("--seed", "0")])
def test_flags_of_pictures_need_data_with_their_defaults_too(flag, capsys):
    assert "needs --data" in run(capsys, "demo", *flag, code=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_pictures_of_cifar(name):
    build_network(name, 10, 32, seed=0)


def test_networks_of_larger_pictures_and_seeds():
    assert sum(p.numel() for p in build_network("convnet", 200, 64, seed=0).parameters()) == 857_160
    assert sum(p.numel() for p in build_network("resnet18", 100, 224, seed=0).parameters()) == 11_227_812
    state = torch.get_rng_state()
    one, same, other = (build_network("lenet", 10, 32, seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_vision_transformer_is_one():
    """Every position counts, and pictures do not see one another."""
    model = build_network("vit-256-6", 10, 32, seed=0).eval()
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out, alone = model(pictures), model(pictures[:1])
        turned = model(pictures.roll(4, dims=3))
    torch.testing.assert_close(out[:1], alone)
    assert not torch.allclose(out, turned)
    assert sum(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()) == 6


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is there; `make test` has none"
)
def test_unknown_model_without_torchvision():
    with pytest.raises(fxrpg.FxrpgError, match=r"vit-512-8; for more, pip install 'fxrpg\[vision\]', or package"):
        build_network("resnet50", 10, 224, seed=0)


# With torchvision.


@pytest.fixture
def torchvision(monkeypatch, folder):
    from bench.zoo.torchvision_cpu import make_importable

    make_importable()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    module = importlib.import_module("torchvision")
    for name, value in fake_cifar10(folder / "data", module.datasets.CIFAR10).items():
        monkeypatch.setattr(module.datasets.CIFAR10, name, value)
    return module


@pytest.mark.zoo
def test_cifar10_from_disk(torchvision, capsys):
    out = run(capsys, *RING, "--workers", 1)
    assert out.startswith("cifar10: 80 training and 16 test pictures, 10 classes")


@pytest.mark.zoo
def test_image_folder_and_a_model_of_torchvision(torchvision, folder, capsys):
    fake_image_folder(folder / "images")
    words = ("demo", "--data", "imagefolder", "--root", "images", "--side", 32, "--epochs", 1, "--batch", 4)
    out = run(capsys, *words, "--model", "squeezenet1_1", "--dof", 1000, "--workers", 2)
    assert "squeezenet1_1, ring; recipe rpg-imagenet, batch 4" in out
    model = fxrpg.load(torchvision.models.squeezenet1_1(num_classes=2), "fxrpg-demo/model.safetensors")
    assert fxrpg.ledger(model).dof == 1000
    message = run(capsys, *words, "--model", "squeezenet9", "--dof", 1000, "--out", "b", code=2)
    assert "or of torchvision.models, or package.module:callable" in message
    assert "Did you mean squeezenet1_" in message
