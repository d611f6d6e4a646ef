"""Layers of packages that need not be installed: transformers' `Conv1D`, in a real GPT-2."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from pquant_lightning import (
    CompressedLayer,
    LayerAdapter,
    LowRankCompression,
    QATCompression,
    compress_model,
    compression_report,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers

PROJECTIONS = {f"transformer.h.{block}.{name}" for block in (0, 1) for name in ("attn.c_attn", "attn.c_proj")}
MLP = {f"transformer.h.{block}.mlp.{name}" for block in (0, 1) for name in ("c_fc", "c_proj")}


class Gpt2(nn.Module):
    """Two blocks; a plain tensor of tokens to the scores of the next ones."""

    def __init__(self):
        super().__init__()
        config = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = GPT2LMHeadModel(config).eval()

    def forward(self, tokens):
        return self.net(tokens).logits


TOKENS = torch.arange(24).reshape(3, 8)


def _run(model):
    with torch.no_grad():
        return model.eval()(TOKENS)


def _conv1d(inputs=12, outputs=8):
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


def test_the_adapter_gives_a_linear_that_computes_the_same():
    layer, inputs = _conv1d(), torch.randn(2, 5, 12)
    info = LayerAdapter().get_layer_info(layer)
    assert (info["type"], info["shape"]) == ("linear", (8, 12))
    assert LayerAdapter().is_compressible(layer)
    for method in (LowRankCompression(rank=8, min_saving=0), QATCompression(act_bits=16, min_saving=0)):
        model = method.compress(nn.Sequential(layer))
        assert isinstance(model[0], CompressedLayer)
        torch.testing.assert_close(model(inputs), layer(inputs), rtol=0.02, atol=0.02)


def test_a_look_alike_of_the_same_name_is_left_alone():
    class Conv1D(nn.Module):
        pass

    assert not LayerAdapter().is_compressible(Conv1D())


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("low_rank", {"rank": 32, "min_saving": 0.0, "exclude": ["*wte", "*wpe"]}, 1e-4),
        ("ptq", {"train_loader": [TOKENS]}, 0.05),
        ("qat", {"weight_bits": 8, "act_bits": 16}, 0.05),
        ("lora", {"r": 4, "include": ["*.h.*"]}, 1e-5),
    ],
)
def test_gpt2_is_compressed_everywhere_and_computes_the_same(name, options, tolerance, tmp_path):
    model = Gpt2()
    expected = _run(model)

    small = compress_model(model, name, **options)

    assert {f"net.{layer}" for layer in PROJECTIONS | MLP} <= set(compressed_layers(small))
    assert not any(type(module) is Conv1D for module in small.modules())
    assert (_run(small) - expected).norm() <= tolerance * expected.norm()
    loaded = load_compressed(Gpt2, save_compressed(small, tmp_path / "model.safetensors"))
    assert torch.equal(_run(loaded), _run(finalize(small)))


def test_a_training_checkpoint_rebuilds_a_fresh_gpt2():
    trained = LowRankCompression(rank=4, include=["*attn*", "*mlp*"]).compress(Gpt2())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    fresh = LowRankCompression(rank=2, include=["*attn*", "*mlp*"]).compress(Gpt2())  # has the load hook, other ranks

    fresh.load_state_dict(trained.state_dict())

    assert torch.equal(_run(fresh), _run(trained))
    assert fresh.net.transformer.h[0].attn.c_attn.second.weight.shape == (96, 4)


def test_the_report_knows_the_error_of_each_layer():
    model = Gpt2()
    report = compression_report(model, LowRankCompression(rank=4, include=["*attn*"]).compress(model))
    assert len(report.layers) == 4
    assert all(0.1 < layer.error < 1 for layer in report.layers)


def test_the_bias_parameter_is_kept_and_frozen_weights_stay_frozen():
    layer = _conv1d(64, 64)
    layer.weight.requires_grad_(False)
    model = nn.Sequential(layer)
    compress_model(model, "qat", inplace=True)
    assert model[0].bias is layer.bias
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad


def test_shared_weights_are_left_alone_with_the_reason():
    model = nn.Sequential(_conv1d(64, 64), _conv1d(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    reasons = {skip.name: skip.reason for skip in QATCompression().plan(model).skipped}
    assert "shares a parameter with '1'" in reasons["0"]
    assert "shares a parameter with '0'" in reasons["1"]
    assert isinstance(QATCompression().compress(copy.deepcopy(model))[2], CompressedLayer)


def test_pruning_takes_weights_that_lie_the_other_way_round():
    model = nn.Sequential(nn.Linear(12, 12), _conv1d(), nn.Linear(8, 8))
    pruned = compress_model(model, "unstructured_pruning", sparsity=0.5)
    assert int((pruned[1].weight == 0).sum()) == 48
    grouped = compress_model(model, "unstructured_pruning", pattern="2:4", include=["1"])[1].weight  # (in, out)
    assert ((grouped.T.reshape(-1, 4) != 0).sum(1) == 2).all()
