"""Tiny random models of transformers' families, each with an example batch: what a user may bring along."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the zoo is built from transformers' configurations")

Batch = dict[str, Tensor]

VOCABULARY = 64
TOKENS = 12

_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_TEXT, "intermediate_size": 64, "max_position_embeddings": 32}
_DECODER = {**_ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
_EXPERTS = {**_DECODER, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_IMAGE = {"image_size": 32, "num_labels": 10}
_PATCHES = {**_IMAGE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_VIT = {**_PATCHES, "intermediate_size": 64}
_SPEECH = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WAVES = {
    **_SPEECH,
    "intermediate_size": 64,
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _tokens() -> Batch:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, TOKENS)), "attention_mask": torch.ones(2, TOKENS).long()}


def _pairs() -> Batch:
    return {**_tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (2, TOKENS - 3))}


def _images() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _large_images() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def _waves() -> Batch:
    return {"input_values": torch.randn(2, 800)}


def _spectra() -> Batch:
    return {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": torch.randint(3, 32, (2, 7))}


_MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], Batch]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER, _tokens),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 32,
        },
        _tokens,
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER, _tokens),
    "electra": (
        "ElectraForTokenClassification",
        "ElectraConfig",
        {**_ENCODER, "embedding_size": 16, "num_hidden_layers": 3},
        _tokens,
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        _tokens,
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_ENCODER, "embedding_size": 16}, _tokens),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, _tokens),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER, _tokens),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, "tie_word_embeddings": True}, _tokens),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}, _tokens),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 8}, _tokens),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_DECODER, "partial_rotary_factor": 0.5}, _tokens),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _tokens,
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "rotary_dim": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _tokens,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_ENCODER, "rotary_pct": 0.5}, _tokens),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
        _tokens,
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        _tokens,
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_TEXT, "multi_query": True}, _tokens),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_DECODER, "num_local_experts": 4}, _tokens),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 32},
        _tokens,
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8}, _tokens),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        _pairs,
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 32,
        },
        _pairs,
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], **_IMAGE},
        _images,
    ),
    "regnet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 8, **_IMAGE},
        _images,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [3, 3], "num_stages": 2, **_IMAGE},
        _images,
    ),
    "mobilenet": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.35, **_IMAGE},
        _images,
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 1280,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 32],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 2],
            "expand_ratios": [1, 4, 4],
            "depthwise_padding": [],
            **_IMAGE,
        },
        _images,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT, _images),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT, _images),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_VIT, "use_relative_position_bias": True}, _images),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 64,
            "num_labels": 10,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        _large_images,
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [3, 3],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [4, 4],
            **_IMAGE,
        },
        _large_images,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": {**_VIT, "num_hidden_layers": 3},
            "projection_dim": 16,
        },
        lambda: {**_tokens(), **_images()},
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", _WAVES, _waves),
    "hubert": ("HubertForCTC", "HubertConfig", _WAVES, _waves),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 32,
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 20,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        _spectra,
    ),
}

NAMES = tuple(_MODELS)


def build(name: str) -> tuple[nn.Module, Batch]:
    """A model of the zoo in eval mode, and a batch of two samples; both always the same."""
    architecture, config, options, draw = _MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**options)
        model = getattr(transformers, architecture)(settings).eval()
        for parameter in model.parameters():  # no bias or scale is a constant, and no layer's output is next to nothing
            spread = 0.1 if parameter.dim() < 2 else (2 / math.prod(parameter.shape[1:])) ** 0.5
            nn.init.normal_(parameter, parameter.mean().item() if parameter.dim() < 2 else 0.0, spread)
        return model, draw()
