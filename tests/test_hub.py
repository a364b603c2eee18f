"""A mixin for the Hub: a folder without code comes back bit for bit, and it is what would be uploaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors import safe_open
from torch import nn

import fxrpg
from fxrpg import FxrpgError
from fxrpg.hub import HubMixin

FILES = ["README.md", "config.json", "fxrpg.safetensors"]


class Net(nn.Module, HubMixin, license="mit", tags=["digits"]):
    """Some arguments fit into JSON, one does not; `seed` is the model's own, and not that of its generated weights."""

    def __init__(self, width: int, depth: int = 3, act: nn.Module | None = None, seed: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.norm = nn.BatchNorm1d(width)
        self.act = act or nn.ReLU()
        self.seed = seed

    def forward(self, x):
        return self.act(self.norm(self.layers(x)))


class Layer(nn.Linear, HubMixin):
    """The root owns generated weights itself, so its class is generated."""


class Bare(nn.Module, HubMixin):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def small(width: int = 8, **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = fxrpg.transform(Net(width, **arguments), dof=50, seed=11)
    model(torch.randn(16, width))  # running statistics
    return model.eval()


def test_a_folder_comes_back(tmp_path):
    model = small(depth=4, seed=5)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == FILES
    again = Net.from_pretrained(tmp_path / "new" / "folder")
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))
    assert isinstance(again, Net)
    assert not again.training
    assert (again.seed, fxrpg.ledger(again).dof) == (5, 50)
    again.save_pretrained(str(tmp_path / "copy"))
    for name in FILES:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


def test_what_the_files_hold(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"act": None, "depth": 3, "seed": 3, "width": 8}
    with safe_open(tmp_path / "fxrpg.safetensors", framework="pt") as file:
        assert "fxrpg_ring" in file.keys()  # noqa: SIM118
        assert "layers.1.weight" not in file.keys()  # noqa: SIM118
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.license) == ("fxrpg", "mit")
    assert {"fxrpg", "digits"} <= set(card.data.tags)
    assert str(fxrpg.ledger(model)) in card.text
    assert "Net.from_pretrained" in card.text


def test_a_root_that_is_a_layer(tmp_path):
    layer = fxrpg.transform(Layer(4, 5), dof=7, plan=[fxrpg.Rule("*", "generate")])
    layer.save_pretrained(tmp_path)
    x = torch.randn(2, 4)
    for cls in (Layer, type(layer)):
        assert torch.equal(cls.from_pretrained(tmp_path)(x), layer(x))
    assert "# Layer" in (tmp_path / "README.md").read_text()


def test_a_model_without_arguments_has_a_config_too(tmp_path):
    fxrpg.transform(Bare(), dof=5).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    Bare.from_pretrained(tmp_path)


def test_arguments_that_json_cannot_hold(tmp_path):
    model = small(act=nn.Tanh())
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(Net.from_pretrained(tmp_path, act=nn.Tanh())(x), model(x))


def test_a_withheld_seed(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    fxrpg.save(model, tmp_path / "fxrpg.safetensors", withhold_seed=True)
    with pytest.raises(FxrpgError, match="withholds"):
        Net.from_pretrained(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(Net.from_pretrained(tmp_path, fxrpg_seed=11)(x), model(x))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub's API without a network: what is uploaded lands in a folder, from which it can be fetched."""
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append(("create", repo_id, kwargs["private"]))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        calls.append(("upload", repo_id, kwargs["commit_message"]))
        shutil.copytree(folder_path, tmp_path / repo_id)
        return "a commit"

    def fetch(repo_id, filename, **kwargs):
        calls.append(("fetch", repo_id, filename, kwargs["revision"]))
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("fxrpg.hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **kwargs: fetch(**kwargs))
    return calls


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_and_fetch(hub, tmp_path, way):
    model = small()
    if way == "push_to_hub":
        model.push_to_hub("user/net", private=True, commit_message="first")
    else:
        folder = tmp_path / "elsewhere"
        model.save_pretrained(folder, push_to_hub=True, repo_id="user/net", private=True, commit_message="first")
    assert hub == [("create", "user/net", True), ("upload", "user/net", "first")]
    uploaded = tmp_path / "user" / "net"
    assert sorted(path.name for path in uploaded.iterdir()) == FILES
    for path in uploaded.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK")), "nothing pickled"
    again = Net.from_pretrained("user/net", revision="v1")
    x = torch.randn(3, 8)
    assert torch.equal(again(x), model(x))
    assert hub[2:] == [("fetch", "user/net", name, "v1") for name in ("config.json", "fxrpg.safetensors")]


def test_code_in_a_folder_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save_pretrained(tmp_path)
    for name in ("modeling.py", "__init__.py", "setup.py", "fxrpg.py", "Net.py"):
        (tmp_path / name).write_text("raise SystemExit('run')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling.Net"}, "trust_remote_code": True, "__class__": "os.system"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    Net.from_pretrained(tmp_path)
    assert not (tmp_path / "run").exists()


def refused(call, *args) -> str:
    with pytest.raises(FxrpgError) as caught:
        call(*args)
    return str(caught.value)


def test_an_ordinary_model_is_refused_before_anything_is_touched(tmp_path):
    small().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "must be a transformed model" in refused(Net(8).save_pretrained, tmp_path)
    broken = small()
    broken.norm.running_mean = torch.zeros(8).to_sparse()
    assert "must be a plain tensor" in refused(broken.save_pretrained, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "must be a transformed model" in refused(Net(8).save_pretrained, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    assert "must be a folder" in refused(small().save_pretrained, tmp_path / "file")


def test_folders_that_are_not_whole(tmp_path):
    assert "an empty folder" in refused(Net.from_pretrained, tmp_path)
    small().save_pretrained(tmp_path)
    for text, must in (("{", "must be JSON"), ("[1]", "constructor's arguments"), ("[" * 100_000, "must be JSON")):
        (tmp_path / "config.json").write_text(text)
        assert must in refused(Net.from_pretrained, tmp_path)
    (tmp_path / "config.json").write_text('{"width": 9}')
    assert "must have shape" in refused(Net.from_pretrained, tmp_path)
    (tmp_path / "config.json").unlink()
    assert "must hold config.json" in refused(Net.from_pretrained, tmp_path)


def test_without_huggingface_hub():
    code = "import sys; sys.modules['huggingface_hub'] = None\nimport fxrpg\nfrom fxrpg.hub import HubMixin"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "huggingface_hub must be installed" in done.stderr.splitlines()[-1]
