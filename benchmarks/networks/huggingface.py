"""Architectures of Hugging Face transformers, each made small by its configuration, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from networks.torchvision import declare_operators

INSTALL = "pip install transformers"

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip


def networks() -> dict[str, Any]:
    with suppress(ImportError):
        declare_operators()  # transformers imports torchvision if it is there
    import transformers

    # In alphabetical order; the class of the model, that of its configuration, the configuration, the inputs.
    rows: dict[str, tuple[str, str, dict[str, Any], Callable[[], Any]]] = {
        "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}, words),
        "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 32}, two_texts),
        "bert": ("BertForSequenceClassification", "BertConfig", TEXT, words),
        "bert-mlm": ("BertForMaskedLM", "BertConfig", TEXT, words),
        "clip": ("CLIPModel", "CLIPConfig", clip(), text_and_image),
        "deberta-v2": (
            "DebertaV2ForSequenceClassification", "DebertaV2Config",
            {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, words,
        ),
        "detr": ("DetrForObjectDetection", "DetrConfig", {**SEQ2SEQ, **detr()}, partial(image, 64)),
        "distilbert": (
            "DistilBertForSequenceClassification", "DistilBertConfig",
            {"vocab_size": 64, "max_position_embeddings": 32, "n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48},
            words,
        ),
        "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}, words),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, **SPECIAL}, words),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, **SPECIAL}, words),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt2(), words),
        "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, words),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, **SPECIAL}, words),
        "marian": (
            "MarianMTModel", "MarianConfig",
            {**SEQ2SEQ, "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 0}, two_texts,
        ),
        "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, **SPECIAL}, words),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, **SPECIAL, "num_local_experts": 4}, words),
        "opt": ("OPTForCausalLM", "OPTConfig", opt(), words),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, **SPECIAL}, words),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, **SPECIAL}, words),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, **SPECIAL}, words),
        "qwen3-moe": (
            "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
            {**GROUPED, **SPECIAL, "num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}, words,
        ),
        "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, words),
        "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", segformer(), partial(image, 64)),
        "swin": (
            "SwinForImageClassification", "SwinConfig",
            {
                "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                "window_size": 4,
            },
            partial(image, 32),
        ),
        "t5": (
            "T5ForConditionalGeneration", "T5Config",
            {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, two_texts,
        ),
        "vit": ("ViTForImageClassification", "ViTConfig", VISION, partial(image, 32)),
        "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", wav2vec2(), speech),
        "whisper": (
            "WhisperForConditionalGeneration", "WhisperConfig",
            {
                **SEQ2SEQ, **SPECIAL, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16,
                "decoder_start_token_id": 1,
            },
            sounds,
        ),
    }  # fmt: skip
    return {name: partial(build, transformers, *row) for name, row in rows.items()}


def build(
    library: Any, model: str, config: str, options: dict[str, Any], inputs: Callable[[], Any]
) -> tuple[nn.Module, Any]:
    settings = getattr(library, config)(**options)
    settings.use_cache = False  # what a cache holds is no output whose size must stay
    return getattr(library, model)(settings), inputs()


def ids(length: int = 7) -> Tensor:
    return torch.randint(3, 60, (2, length))


def words() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(5)}


def image(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def text_and_image() -> dict[str, Tensor]:
    return {**words(), **image(32)}


def speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids(5)}


def clip() -> dict[str, Any]:
    parts = {
        "text_config": {**TEXT, **SPECIAL, "projection_dim": 16},
        "vision_config": {**VISION, "projection_dim": 16},
    }
    return {**parts, "projection_dim": 16}


def detr() -> dict[str, Any]:
    from transformers import ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    none = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return {**none, "backbone_config": backbone, "num_queries": 5}


def gpt2() -> dict[str, Any]:
    return {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}


def opt() -> dict[str, Any]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return {**sizes, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}


def segformer() -> dict[str, Any]:
    sizes = {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16}
    return {**sizes, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4]}


def wav2vec2() -> dict[str, Any]:
    sizes = {key: TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    convs = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    return {**sizes, **convs, "vocab_size": 32, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
