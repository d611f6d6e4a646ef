"""Analysis against known spectra, counts by hand, and the offers of methods."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import LowRankCompression, PQuantError, analyze_model, compress_model
from pquant_lightning.utils.model_analysis import Range, Spectrum


def with_spectrum(values: list[float], rows: int, columns: int) -> torch.Tensor:
    left, right = (torch.linalg.qr(torch.randn(n, len(values)))[0] for n in (rows, columns))
    return left * torch.tensor(values) @ right.mT


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_ranks_of_a_matrix_with_a_known_spectrum(shape):
    values = [8.0, 4.0, 2.0, 1.0]
    found = Spectrum.of(with_spectrum(values, *shape))
    assert len(found.singular_values) == 20
    assert found.singular_values[:4] == pytest.approx(values, rel=1e-5)
    entropy = -sum(v / 15 * math.log(v / 15) for v in values)
    assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-4)  # the 16 zeros add nothing
    assert [found.energy_rank(e) for e in (0.75, 0.9, 0.98, 0.99)] == [1, 2, 3, 4]  # energies 64, 80, 84, 85


def test_extreme_spectra():
    assert Spectrum((0.0, 0.0)).effective_rank == 1.0
    assert Spectrum.of(torch.eye(7)).effective_rank == pytest.approx(7)
    assert Spectrum.of(torch.ones(5, 9)).effective_rank == pytest.approx(1, abs=1e-5)
    assert Spectrum.of(torch.eye(4)).energy_rank(1.0) == 4


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).train()


def test_sizes_and_work_by_hand():
    found = analyze_model(conv_net(), torch.randn(2, 1, 8, 8))
    conv, linear = found.layers
    assert (conv.name, conv.type, conv.shape) == ("0", "Conv2d", (4, 1, 3, 3))
    assert (conv.params, conv.size_bytes, conv.macs) == (40, 160, 36 * 36)
    assert (linear.params, linear.size_bytes, linear.macs) == (1450, 5800, 144 * 10)
    assert found.params == 40 + 8 + 1450
    assert found.size_bytes == (40 + 16 + 1450) * 4 + 8  # running statistics, and the count of batches
    assert found.macs == conv.macs + linear.macs
    assert len(conv.spectrum.singular_values) == 4


def test_ranges_of_weights_and_of_inputs():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, -3.0]])
    batch = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    first, second = analyze_model(net, loader=[batch], num_samples=2).layers
    assert first.weight == Range(-3.0, 1.0, pytest.approx(math.sqrt(10 / 4 - 0.25)))
    assert (first.inputs.minimum, first.inputs.maximum) == (-2.0, 2.0)
    assert first.inputs.std == pytest.approx(math.sqrt(10 / 4), rel=1e-2)
    assert (second.inputs.minimum, second.inputs.maximum) == (0.0, 6.0)  # rectified 1, 0, -6 and 6
    assert first.macs == 4  # of one sample of the first batch, which is the example
    assert first.weight.outlier_ratio == pytest.approx(3 / 1.5)
    assert net.training


def test_only_what_is_asked_for_is_computed():
    layer = analyze_model(conv_net(), spectra=False).layers[0]
    assert (layer.spectrum, layer.inputs, layer.macs, layer.candidates) == (None, None, None, {})


def test_offers_and_what_to_compress_first():
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    net[1].weight.data = with_spectrum([4.0, 3.0, 0.01, 0.01], 64, 64)  # of rank two, nearly
    found = analyze_model(net, methods=["low_rank"], share=0.25)
    assert found.methods == ["low_rank"]
    best = found.layers[1].best("low_rank", 0.25)
    assert best.size_bytes <= 64 * 64 * 4 / 4
    assert best.loss < 1e-4 < found.layers[0].best("low_rank", 0.25).loss
    assert found.suggestions[0].layer == "1"
    assert found.suggestions[0].saved_bytes == 64 * 64 * 4 - best.size_bytes
    gains = [s.saved_bytes / s.loss for s in found.suggestions]
    assert gains == sorted(gains, reverse=True)
    assert found.layers[0].best("low_rank", 1e-6) is None
    generous = analyze_model(net, methods=[LowRankCompression()], share=0.75)
    assert generous.layers[0].best("low_rank", 0.75).loss < found.layers[0].best("low_rank", 0.25).loss


def test_all_methods_once_each():
    found = analyze_model(nn.Sequential(nn.Linear(16, 16)), methods="all")
    assert {"low_rank", "ptq", "tensor_train"} <= set(found.methods)
    offers = [repr([(c.size_bytes, c.loss) for c in found.layers[0].candidates[m]]) for m in found.methods]
    assert len(set(offers)) == len(offers)
    assert analyze_model(nn.Sequential(nn.Linear(16, 16)), methods="ptq").methods == ["ptq"]


def test_attention_and_compressed_layers():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    names = [layer.name for layer in analyze_model(net, torch.randn(1, 3, 16)).layers]
    assert "layers.0.self_attn.q_proj" in names
    assert isinstance(net.layers[0].self_attn, nn.MultiheadAttention)  # the model is as it was
    small = compress_model(nn.Sequential(nn.Linear(64, 64)), "low_rank", rank=4)
    (layer,) = analyze_model(small, methods="low_rank").layers
    assert layer.params == 2 * 4 * 64 + 64
    assert layer.spectrum.effective_rank <= 4 + 1e-3
    assert not layer.candidates  # it is compressed already


def test_progress_and_both_forms():
    seen: list[Any] = []

    def track(items, description):
        seen.extend(name for name, _ in items)
        return items

    found = analyze_model(conv_net(), torch.randn(2, 1, 8, 8), methods=["ptq"], track=track)
    assert seen == ["0", "4"]
    text = str(found)
    assert "whole model" in text
    assert "compress first (1): 4 by ptq (bits=" in text
    payload = json.loads(json.dumps(found.to_dict()))
    assert payload["layers"][1]["spectrum"]["energy_ranks"]["0.95"] == found.layers[1].spectrum.energy_rank(0.95)
    assert payload["suggestions"][0]["layer"] == "4"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analyze_model(nn.ReLU()), "no layer to analyse"),
        (lambda: analyze_model(conv_net(), share=1.0), "in \\(0, 1\\)"),
        (lambda: analyze_model(conv_net(), methods=["low_rnk"]), "Did you mean 'low_rank'"),
        (lambda: analyze_model(conv_net(), loader=[torch.ones(2, 3)]), "cannot be run"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PQuantError, match=message):
        call()
