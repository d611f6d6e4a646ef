"""Models of the main families are exported with open batch and sequence length, and other runtimes compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from pquant_lightning import compress_model, export_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
PICTURES = {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8}
CAUSAL = {**SIZES, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


class Recurrent(nn.Module):
    """An LSTM and a GRU, with several named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(24, 10, batch_first=True)

    def forward(self, signal: Tensor) -> dict[str, Tensor]:
        y, (hidden, _) = self.lstm(signal)
        z, last = self.gru(y)
        return {"z": z, "hidden": hidden, "last": last}


class Pair(nn.Module):
    """Two inputs, one of them optional, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor | None = None, scale: float = 1.0) -> Any:
        y = self.left(left)
        return y if right is None else (y * scale, [y + self.right(right)])


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "vocab_size": 99}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, use_cache=False))


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, use_cache=False))


def whisper() -> Any:
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "num_mel_bins": 8}
    ids = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    places = {"max_source_positions": 16, "max_target_positions": 16, "use_cache": False}
    return hf.WhisperModel(hf.WhisperConfig(**sizes, **heads, **ids, **places))


def with_decoder(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "decoder_input_ids": tokens()["input_ids"]}


Model = tuple[Callable[[], nn.Module], Callable[[], Any]]
MODELS: dict[str, Model] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**SIZES)), tokens),
    "distilbert": (
        lambda: hf.DistilBertModel(hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99)),
        tokens,
    ),
    "albert": (lambda: hf.AlbertModel(hf.AlbertConfig(embedding_size=16, **SIZES)), tokens),
    "gpt2": (gpt2, tokens),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL, num_key_value_heads=2)), tokens),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**CAUSAL, num_key_value_heads=2)), tokens),
    "t5": (t5, lambda: with_decoder(tokens())),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**PICTURES)), pictures),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**PICTURES)), pictures),
    "convnext": (
        lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
        pictures,
    ),
    "whisper": (whisper, lambda: with_decoder({"input_features": torch.randn(2, 8, 32)})),
    "recurrent": (Recurrent, lambda: {"signal": torch.randn(2, 5, 8)}),
    "pair": (Pair, lambda: {"left": torch.randn(3, 6), "right": torch.randn(3, 4), "scale": 0.5}),
}
OPEN = {"input_ids": "tokens", "attention_mask": "tokens", "decoder_input_ids": "steps"}


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build().eval(), inputs()


@pytest.mark.parametrize("kind", ["onnx", "pt2", "jax", "tensorflow"])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_open_and_outputs_equal(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    named = [key for key, value in inputs.items() if isinstance(value, Tensor)]
    axes = {key: {0: "batch"} | ({1: OPEN[key]} if key in OPEN else {}) for key in named}
    result = export_model(model, inputs, tmp_path / "model", kind, dynamic_axes=axes)
    assert result.inputs == tuple(named)
    assert result.max_error is not None
    assert result.max_error <= 1e-5


@pytest.mark.parametrize("name", ["bert", "vit", "convnext", "recurrent"])
def test_lite_files(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    result = export_model(model, inputs, tmp_path / "model.tflite", "tflite")
    assert result.max_error is not None
    assert result.max_error <= 1e-5


@pytest.mark.parametrize("kind", ["onnx", "pt2", "jax", "tensorflow", "tflite"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_integers_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    small = compress_model(model, "ptq", scheme="dynamic", min_saving=0.0)
    result = export_model(small, inputs, tmp_path / "model", kind)
    assert result.integer_weights


@pytest.mark.parametrize("kind", ["onnx", "pt2", "jax", "tensorflow"])
def test_weights_of_16_bits(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 256)).bfloat16()
    result = export_model(model, torch.randn(3, 256).bfloat16(), tmp_path / "model", kind)
    assert result.ratio < 0.55
