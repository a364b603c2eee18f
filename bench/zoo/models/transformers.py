"""Models of transformers in tiny configurations: text, speech, images, and text with images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.zoo.catalogue import Example, images, tokens
from bench.zoo.torchvision_cpu import make_importable

Inputs = Callable[[], dict[str, Any]]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 100}
GROUPED = TEXT | {"num_key_value_heads": 2}
PATCHES = SMALL | {"image_size": 32, "patch_size": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
BOTH = ("encoder", "decoder")
WHISPER = {
    "vocab_size": 100, "num_mel_bins": 16, "d_model": 32, "max_source_positions": 20, "max_target_positions": 20,
    "pad_token_id": 0, "decoder_start_token_id": 1,
    **{f"{part}_{name}": value for part in BOTH for name, value in [("layers", 2), ("attention_heads", 4), ("ffn_dim", 64)]},
}  # fmt: skip
WAV2VEC2 = {
    "vocab_size": 32, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3, "mask_time_prob": 0.0,
}  # fmt: skip
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
}  # fmt: skip


def labelled() -> dict[str, Any]:
    return {"input_ids": tokens(), "labels": tokens()}


def speech() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 16, 40), "labels": tokens()}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600)}


def pixels() -> dict[str, Any]:
    return {"pixel_values": images(32)}


def pairs() -> dict[str, Any]:
    return {"input_ids": tokens(), "pixel_values": images(32), "return_loss": True}


def build(model: str, config: str, options: dict[str, Any], inputs: Inputs) -> Example:
    make_importable()
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options)), (), inputs()


TABLE: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "BertForMaskedLM": ("BertConfig", TEXT, labelled),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **ENDS},
        labelled,
    ),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, labelled),
    "MistralForCausalLM": ("MistralConfig", GROUPED, labelled),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | {"num_local_experts": 2}, labelled),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | {"head_dim": 8}, labelled),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        labelled,
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        labelled,
    ),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER | ENDS, speech),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", SMALL | WAV2VEC2, sound),
    "ViTForImageClassification": ("ViTConfig", PATCHES, pixels),
    "SwinModel": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        pixels,
    ),
    "SegformerForSemanticSegmentation": ("SegformerConfig", SEGFORMER, pixels),
    "CLIPModel": (
        "CLIPConfig",
        {
            "text_config": {**TEXT, "max_position_embeddings": 20, "projection_dim": 16, **ENDS},
            "vision_config": PATCHES,
            "projection_dim": 16,
        },
        pairs,
    ),
}  # fmt: skip

MODELS = {f"hf.{model}": ("transformers", functools.partial(build, model, *entry)) for model, entry in TABLE.items()}
