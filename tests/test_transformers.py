"""Hugging Face models: their files, generate(), the Trainer, accelerate, and what transformers calls on a model."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file

import fxrpg

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from bench.zoo.torchvision_cpu import make_importable  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # what asked for a file of the hub would fail, not wait
make_importable()
transformers = pytest.importorskip("transformers", reason="needs transformers and accelerate, of version 5 and 1")
accelerate = pytest.importorskip("accelerate", reason="needs transformers and accelerate, of version 5 and 1")

pytestmark = [
    pytest.mark.zoo,
    # transformers renames its activation checkpointing, and torch says so of a checkpoint that needs no gradient
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]

EVERYTHING = [fxrpg.Rule("*", "generate")]
VOCABULARY = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = VOCABULARY | {"hidden_size": 32, "num_hidden_layers": 2}
TEXT = SIZES | {"num_attention_heads": 4, "intermediate_size": 64}
LLAMA = TEXT | {"num_key_value_heads": 2}
GPT2 = VOCABULARY | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "tie_word_embeddings": True}
T5 = VOCABULARY | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | {"num_local_experts": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", SIZES | {"state_size": 4}),
    "vit": ("ViTForImageClassification", "ViTConfig", TEXT | {"image_size": 32, "patch_size": 8}),
}  # fmt: skip


def built(name, seed=0):
    cls, config, settings = MODELS[name]
    torch.manual_seed(seed)
    return getattr(transformers, cls)(getattr(transformers, config)(**settings))


def small_of(name, plan=EVERYTHING, dof=600, seed=0, **kwargs):
    """A tiny transformed model in eval mode."""
    return fxrpg.transform(built(name, seed), dof=dof, plan=plan, **kwargs).eval()


def inputs_of(model):
    torch.manual_seed(1)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(3, 60, (2, 8))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def logits(model):
    with torch.no_grad():
        return model(**inputs_of(model)).logits


def trained_a_little(model):
    """Other values in every state and dense parameter than a fresh model has."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(torch.linspace(-0.01, 0.01, parameter.numel()).view(parameter.shape), alpha=1 + i % 3)
    return model


@pytest.fixture
def logged(caplog):
    """What transformers logs: it has handlers of its own."""
    logging = transformers.utils.logging
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


# folders


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_same_model_back(name, tmp_path):
    small = trained_a_little(small_of(name))
    before = copy.deepcopy(small.config.to_dict())
    fxrpg.save_pretrained(small, tmp_path / "new" / "folder")
    assert small.config.to_dict() == before
    again = fxrpg.from_pretrained(tmp_path / "new" / "folder")
    assert not again.training
    assert type(again) is type(small)
    assert torch.equal(logits(again), logits(small))
    assert {*again.state_dict()} == {*small.state_dict()}
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        (other,) = (t for n, t in itertools.chain(again.named_parameters(), again.named_buffers()) if n == name)
        assert torch.equal(tensor, other), name
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad)
    again.train()
    again(**inputs_of(again)).logits.sum().backward()
    assert again.fxrpg_ring.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_keeps_the_type(dtype, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    small = fxrpg.transform(model, dof=600, plan=EVERYTHING).eval()
    fxrpg.save_pretrained(small, tmp_path)
    again = fxrpg.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(small))


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_of("llama", dof=20, method=fxrpg.Pranc(law="khatri_rao")),
        lambda: fxrpg.freeze(small_of("llama", dof=1e-1, method="pemn")),
        lambda: fxrpg.freeze(small_of("llama", method=fxrpg.Ring(bits=8))),
        lambda: fxrpg.prune(small_of("llama"), 0.5),
        lambda: small_of("t5", plan=[], scope="block"),
    ],
    ids=["pranc", "pemn", "quantised", "pruned", "blocks"],
)
def test_every_kind_of_model_has_a_folder(make, tmp_path):
    small = make()
    fxrpg.save_pretrained(small, tmp_path)
    assert torch.equal(logits(fxrpg.from_pretrained(tmp_path)), logits(small))


def test_a_folder_keeps_generation_settings_and_leaves_room_for_others(tmp_path):
    small = small_of("llama")
    small.generation_config.max_new_tokens, small.generation_config.num_beams = 5, 2
    fxrpg.save_pretrained(small, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    fxrpg.save_pretrained(trained_a_little(small), tmp_path)  # over the first
    again = fxrpg.from_pretrained(str(tmp_path))
    ids = inputs_of(small)["input_ids"]
    assert torch.equal(again.generate(ids), small.generate(ids))
    assert again.generate(ids).shape == (2, 13)
    assert {*os.listdir(tmp_path)} == {"config.json", "generation_config.json", "fxrpg.safetensors", "tokenizer.json"}


def test_full_weights_are_never_allocated(tmp_path, monkeypatch):
    fxrpg.save_pretrained(small_of("llama-tied"), tmp_path)
    seen = []
    load = fxrpg.pretrained.load
    monkeypatch.setattr(fxrpg.pretrained, "load", lambda model, *a, **k: seen.append(model) or load(model, *a, **k))
    fxrpg.from_pretrained(tmp_path)
    (empty,) = seen
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert empty.model.rotary_emb.inv_freq.device.type == "cpu"
    assert not built("llama").lm_head.weight.is_meta  # the hook is gone


def test_a_withheld_seed_is_asked_for(tmp_path):
    small = small_of("llama", seed=0)
    fxrpg.save_pretrained(small, tmp_path, withhold_seed=True)
    with pytest.raises(fxrpg.FxrpgError, match="seed must be given"):
        fxrpg.from_pretrained(tmp_path)
    with pytest.raises(fxrpg.FxrpgError, match="must draw"):
        fxrpg.from_pretrained(tmp_path, seed=1)
    assert torch.equal(logits(fxrpg.from_pretrained(tmp_path, seed=0)), logits(small))


def test_transformers_itself_refuses_the_folder(tmp_path):
    """It would fill in random weights where a `model.safetensors` has none."""
    small = small_of("llama")
    fxrpg.save_pretrained(small, tmp_path)
    for cls in (type(small), transformers.AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"no file named model.safetensors"):
            cls.from_pretrained(tmp_path)


class OwnConfig(transformers.LlamaConfig):
    model_type = "fxrpg_own"


class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig


def test_a_class_of_ones_own_is_passed(tmp_path):
    torch.manual_seed(0)
    small = fxrpg.transform(OwnModel(OwnConfig(**LLAMA)), dof=600).eval()
    fxrpg.save_pretrained(small, tmp_path)
    with pytest.raises(fxrpg.FxrpgError, match=r"config.json: .*model_class="):
        fxrpg.from_pretrained(tmp_path)
    again = fxrpg.from_pretrained(tmp_path, model_class=OwnModel)
    assert isinstance(again, OwnModel)
    assert torch.equal(logits(again), logits(small))
    for wrong in (transformers.AutoModelForCausalLM, torch.nn.Linear, OwnModel(OwnConfig(**LLAMA)), "OwnModel"):
        with pytest.raises(fxrpg.FxrpgError, match="model_class: must be a subclass of"):
            fxrpg.from_pretrained(tmp_path, model_class=wrong)


def test_code_in_a_folder_is_not_run(tmp_path):
    fxrpg.save_pretrained(small_of("llama"), tmp_path)
    trap = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil:\n    pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "evil"}))
    with pytest.raises(fxrpg.FxrpgError, match=r"config.json: .*model_class="):
        fxrpg.from_pretrained(tmp_path)
    assert not trap.exists()


def _configured(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def _damaged(folder):
    file = folder / "fxrpg.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _plain_checkpoint(folder):
    shutil.rmtree(folder)
    built("llama").save_pretrained(folder)


def _own_checkpoint(folder):
    shutil.rmtree(folder)
    small_of("llama").save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "must be a local folder, found none"),
        (lambda f: (f / "config.json").unlink(), r"must hold config.json, found fxrpg.safetensors, generation_config.json"),
        (lambda f: (f / "fxrpg.safetensors").unlink(), r"must hold fxrpg.safetensors, found config.json"),
        (lambda f: (f / "generation_config.json").unlink(), r"must hold generation_config.json"),
        (_plain_checkpoint, r"must hold fxrpg.safetensors, found .*Transform a model and load model.safetensors into it"),
        (_own_checkpoint, r"must hold fxrpg.safetensors, found .*Transform a model and load model.safetensors into it"),
        (lambda f: save_file({"x": torch.ones(1)}, f / "fxrpg.safetensors"), "fxrpg.safetensors: "),
        (_damaged, "the tensors must match their digest"),
        (lambda f: (f / "config.json").write_text("{"), "must be a configuration that transformers can use"),
        (lambda f: (f / "config.json").write_text("[]"), "must be a configuration that transformers can use"),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: must be a configuration"),
        (_configured(hidden_size=-1), "must be a configuration that transformers can use"),
        (_configured(hidden_size=48), r"must have shape"),
        (_configured(num_hidden_layers=1), r"must have the parameter 'model.layers.1"),
        (_configured(tie_word_embeddings=True), "one parameter must have just the names"),
        (_configured(model_type="gpt2"), "must name a model class of transformers, found 'LlamaForCausalLM'"),
        (_configured(model_type="nonesuch"), "must be a configuration that transformers can use"),
        (_configured(architectures=["LlamaModel"]), "must have the parameter"),
        (_configured(architectures=["AutoModel"]), "must name a model class of transformers, found 'AutoModel'"),
        (_configured(architectures=["os"]), "must name a model class of transformers, found 'os'"),
        (_configured(architectures=None), "must name a model class of transformers, found None"),
        (_configured(architectures=[3]), "config.json: must"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_right_is_refused(change, message, tmp_path):
    folder = tmp_path / "folder"
    fxrpg.save_pretrained(small_of("llama"), folder)
    change(folder)
    with pytest.raises(fxrpg.FxrpgError, match=message):
        fxrpg.from_pretrained(folder)


def test_what_cannot_be_saved_to_a_folder(tmp_path):
    with pytest.raises(fxrpg.FxrpgError, match="must be a transformed model"):
        fxrpg.save_pretrained(built("llama"), tmp_path)
    with pytest.raises(fxrpg.FxrpgError, match="must be a transformers.PreTrainedModel, found Linear"):
        fxrpg.save_pretrained(fxrpg.transform(torch.nn.Linear(4, 4), dof=4, plan=EVERYTHING), tmp_path)
    assert not os.listdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    for verb in (lambda: fxrpg.save_pretrained(small_of("llama"), file), lambda: fxrpg.from_pretrained(file)):
        with pytest.raises(fxrpg.FxrpgError, match="found a file"):
            verb()
    built("llama").save_pretrained(tmp_path)
    with pytest.raises(fxrpg.FxrpgError, match=r"must hold no ordinary weights.*found model.safetensors"):
        fxrpg.save_pretrained(small_of("llama"), tmp_path)


def test_transformers_is_imported_by_those_who_use_it(tmp_path):
    code = """
import sys, torch, fxrpg
small = fxrpg.transform(torch.nn.Linear(2, 2), dof=2, plan=[fxrpg.Rule("*", "generate")])
for verb in (lambda: fxrpg.save_pretrained(small, sys.argv[1]), lambda: fxrpg.from_pretrained(sys.argv[1])):
    try:
        verb()
    except fxrpg.FxrpgError:
        continue
    raise SystemExit("no error")
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
open(sys.argv[1] + "/config.json", "w"), open(sys.argv[1] + "/fxrpg.safetensors", "w")
try:
    fxrpg.from_pretrained(sys.argv[1])
except fxrpg.FxrpgError as e:
    assert "transformers must be installed" in str(e), e
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


# what a model's own save_pretrained writes


@pytest.mark.parametrize("plan", [EVERYTHING, [fxrpg.Rule("*layer*.weight", "generate")]], ids=["everything", "layers"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "bert"])
def test_own_save_pretrained_holds_the_states(name, plan, tmp_path, logged):
    small = trained_a_little(small_of(name, plan))
    small.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() <= small.state_dict().keys()
    distinct = {id(tensor) for tensor in small.state_dict(keep_vars=True).values()}
    assert len(held) == len(distinct)
    assert not [record for record in logged.records if record.levelname in ("WARNING", "ERROR")]
    fresh = small_of(name, plan, seed=5)
    assert not torch.equal(logits(fresh), logits(small))
    load_model(fresh, tmp_path / "model.safetensors")
    assert torch.equal(logits(fresh), logits(small))
    with pytest.raises(fxrpg.FxrpgError, match="must belong to this model's seed and plan"):
        load_model(fxrpg.transform(built(name), dof=601, plan=plan), tmp_path / "model.safetensors")


def test_own_save_pretrained_in_shards(tmp_path):
    small = trained_a_little(small_of("llama", [], dof=2000))
    small.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    fresh = small_of("llama", [], dof=2000, seed=5)
    transformers.trainer_utils.load_sharded_checkpoint(fresh, str(tmp_path))
    assert torch.equal(logits(fresh), logits(small))


def test_own_save_pretrained_of_experts(tmp_path):
    """By default transformers writes experts under their names on the hub, which no state_dict has."""
    names = [name for name, p in built("mixtral").named_parameters() if "experts." in name and p.dim() == 3]
    small = trained_a_little(small_of("mixtral", [*(fxrpg.Rule(name, "generate") for name in names), *EVERYTHING]))
    small.save_pretrained(tmp_path, save_original_format=False)
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == small.state_dict().keys()
    assert not [name for name in held if "experts" in name]
    for name, tensor in held.items():
        assert torch.equal(tensor, small.state_dict()[name])


def test_transformers_reports_what_such_a_folder_lacks(tmp_path, logged):
    """It gives random weights: this is why `fxrpg.save_pretrained` names its file otherwise."""
    small = small_of("llama")
    small.save_pretrained(tmp_path)
    _model, report = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert "model.layers.0.mlp.up_proj.weight" in report["missing_keys"]
    assert "fxrpg_ring" in report["unexpected_keys"]
    assert "newly initialized" in logged.text


# generate()


DECODING = {
    "greedy": {"do_sample": False},
    "uncached": {"do_sample": False, "use_cache": False},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled-beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("how", DECODING)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "t5"])
def test_generate_gives_the_dense_models_tokens(name, how):
    small = trained_a_little(small_of(name))
    dense = fxrpg.materialize(small)
    ids, found = inputs_of(small)["input_ids"], []
    for model in (small, dense):
        torch.manual_seed(3)
        found.append(model.generate(ids, max_new_tokens=6, **DECODING[how]))
    assert torch.equal(*found)
    assert found[0].shape[1] == (7 if name == "t5" else 14)


def test_generate_with_an_assistant():
    small, draft = small_of("llama"), small_of("llama", dof=100)
    ids = inputs_of(small)["input_ids"][:1]
    alone = fxrpg.materialize(small).generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(small.generate(ids, max_new_tokens=6, do_sample=False, assistant_model=draft), alone)


# training


class Rows(torch.utils.data.Dataset):
    """Sequences that a model can learn: each token follows from the last."""

    rows = (torch.arange(64)[:, None] * 3 + torch.arange(12) * 5) % 60 + 3

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trained(model, folder, resume=None, **settings):
    """The trainer after six steps, and the losses of those it ran."""
    fixed = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
    }
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 1}
    args = transformers.TrainingArguments(output_dir=str(folder), **fixed | quiet | settings)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Rows())
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINING = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "autocast": {"bf16": True},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("how", TRAINING)
def test_the_trainer_trains(how, tmp_path):
    trainer, losses = trained(small_of("llama-tied", dof=2000), tmp_path, **TRAINING[how])
    assert losses[-1] < losses[0] - 0.3
    states = {"fxrpg_ring", *(name for name, _ in trainer.model.named_parameters() if "norm" in name)}
    assert {name for name, _ in trainer.model.named_parameters()} == states


@pytest.mark.parametrize("how", ["reentrant", "checkpointed"])
def test_activation_checkpointing_gives_the_same_training(how, tmp_path):
    plain, _ = trained(small_of("llama", dof=2000), tmp_path / "plain")
    other, _ = trained(small_of("llama", dof=2000), tmp_path / "other", **TRAINING[how])
    torch.testing.assert_close(other.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_trainer_resumes_where_it_stopped(name, tmp_path):
    whole, losses = trained(small_of(name, dof=2000), tmp_path)
    fresh = small_of(name, dof=2000, seed=5)
    second, rest = trained(fresh, tmp_path, resume=tmp_path / "checkpoint-3")
    assert rest == losses
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], tensor), key
    assert {*load_file(tmp_path / "checkpoint-6" / "model.safetensors")} == {*whole.model.state_dict()}
    fxrpg.save_pretrained(whole.model, tmp_path / "final")
    assert torch.equal(logits(fxrpg.from_pretrained(tmp_path / "final")), logits(whole.model.eval()))


def test_accelerate_prepares_saves_and_loads(tmp_path):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    small = small_of("llama", dof=2000).train()
    optimizer = torch.optim.AdamW(small.parameters(), 1e-2)
    model, optimizer, rows = accelerator.prepare(small, optimizer, torch.utils.data.DataLoader(Rows(), 8))
    losses = []
    for batch in rows:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    unwrapped = accelerator.unwrap_model(model)
    expected = logits(unwrapped)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path / "model"))
    with torch.no_grad():
        unwrapped.fxrpg_ring.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(unwrapped), expected)
    fresh = small_of("llama", dof=2000, seed=5)
    accelerate.load_checkpoint_in_model(fresh, str(tmp_path / "model"))
    assert torch.equal(logits(fresh.train()), expected)


# what transformers calls on a model


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "bert"])
def test_dense_embeddings_stay_tied_and_can_be_resized(name):
    small = small_of(name, [fxrpg.Rule("*layer*.weight", "generate")])
    before, parameters = logits(small), [id(p) for p in small.parameters()]
    small.tie_weights()
    small.init_weights()  # what is there is marked as initialised
    assert [id(p) for p in small.parameters()] == parameters
    assert torch.equal(logits(small), before)
    tied = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert tied == (name != "llama")
    small.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(logits(small)[..., :64], before)
    assert logits(small).shape[-1] == 70
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    small.set_input_embeddings(torch.nn.Embedding(70, 32))
    assert logits(small).shape[-1] == 70


def test_tied_embeddings_stay_one_weight():
    small = small_of("llama-tied")
    first, last = small.get_input_embeddings().weight, small.get_output_embeddings().weight
    assert torch.equal(first.detach() + 0, last.detach() + 0)
    row = next(row for row in fxrpg.explain(small).rows if row.name == "lm_head.weight")
    assert row.status == "generated"
    assert not [row for row in fxrpg.explain(small).rows if row.name == "model.embed_tokens.weight"]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5"])
def test_a_generated_embedding_cannot_be_resized(name):
    small = small_of(name)
    before = logits(small)
    with pytest.raises(fxrpg.FxrpgError, match=r"generated weight is read-only.*leave the weight dense"):
        small.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(logits(small), before)
    assert small.config.vocab_size == small.get_input_embeddings().num_embeddings == 64


def test_counts_are_of_what_is_stored():
    small = small_of("llama")
    stored = sum(p.numel() for p in small.parameters())
    assert small.num_parameters() == small.num_parameters(only_trainable=True) == stored < 1000
    assert small.get_memory_footprint() < 10 * 1024
    assert built("llama").num_parameters() > 20_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts(dtype):
    small = small_of("llama").to(dtype)
    assert small.dtype == dtype
    assert logits(small).dtype == dtype
    close = {"rtol": 0.0, "atol": 1e-6 if dtype == torch.float64 else 0.02}
    torch.testing.assert_close(logits(small), logits(fxrpg.materialize(small)), **close)
    assert torch.equal(logits(small_of("llama").half()), logits(small_of("llama").to(torch.float16)))


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "vit"])
def test_attention_implementations(name):
    small, found = small_of(name), {}
    dense = fxrpg.materialize(small)
    for kind in ("eager", "sdpa"):
        for model in (small, dense):
            model.set_attn_implementation(kind)
        assert torch.equal(logits(small), logits(dense))
        found[kind] = logits(small)
    torch.testing.assert_close(found["eager"], found["sdpa"])


@pytest.mark.parametrize("kind", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementations(kind):
    names = [name for name, p in built("mixtral").named_parameters() if "experts." in name and p.dim() == 3]
    assert len(names) == 4
    small = small_of("mixtral", [*(fxrpg.Rule(name, "generate") for name in names), *EVERYTHING])
    dense = fxrpg.materialize(small)
    assert small.config._experts_implementation == "grouped_mm"
    outputs = []
    for model in (small, dense):
        model.set_experts_implementation(kind)
        outputs.append((logits(model), model.train()(**inputs_of(model)).logits))
        outputs[-1][1].square().sum().backward()
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, parameter in small.named_parameters():
        if not name.startswith("fxrpg_"):
            torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    assert small.fxrpg_ring.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, dropout_rate=0.0))
        small = fxrpg.transform(model, dof=600, plan=EVERYTHING).train()
        if enabled:
            small.gradient_checkpointing_enable({"use_reentrant": reentrant})
            small.enable_input_require_grads()
        small(input_ids=Rows.rows[:2], labels=Rows.rows[:2]).loss.backward()
        grads.append(small.fxrpg_ring.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_from_the_meta_device(tmp_path):
    """`init_empty_weights` leaves the buffers real: the rotary frequencies, which no file holds."""
    small = trained_a_little(small_of("llama"))
    fxrpg.save(small, tmp_path / "small.safetensors")
    with accelerate.init_empty_weights():
        empty = built("llama")
    again = fxrpg.load(empty, tmp_path / "small.safetensors").eval()
    assert torch.equal(logits(again), logits(small))
    planned = fxrpg.transform(empty, dof=600, plan=EVERYTHING)
    assert planned.fxrpg_ring.is_meta
    assert planned.num_parameters() == small.num_parameters()
    with pytest.raises(fxrpg.FxrpgError, match="must hold values"):
        fxrpg.save_pretrained(planned, tmp_path / "folder")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "t5", "bert"])
def test_tie_weights_leaves_generated_weights_alone(name, tmp_path):
    small = trained_a_little(small_of(name))
    before = logits(small)
    small.tie_weights()
    small.tie_weights(recompute_mapping=False)
    small.init_weights()
    small.resize_token_embeddings(64)
    assert torch.equal(logits(small), before)
    small.save_pretrained(tmp_path)
    dense = fxrpg.materialize(small)
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert dense.all_tied_weights_keys == built(name).all_tied_weights_keys
    dense.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(64, 32))
    dense.tie_weights()
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert torch.equal(logits(copy.deepcopy(small)), before)
