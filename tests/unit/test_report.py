"""The report's numbers against counts by hand."""

import json

import pytest
import torch
from torch import nn

from pquant_lightning import (
    EvaluationPipeline,
    LowRankCompression,
    analyze_model,
    compress_model,
    compression_report,
    finalize,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.report import as_call, count_macs
from pquant_lightning.core.serialization import read_artifact
from pquant_lightning.utils.visualization import plot_weight_histograms


def _mlp():
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


class ConvNet(nn.Module):
    """Conv (grouped), batch norm, strided conv, linear."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, bias=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.conv2(self.norm(self.conv1(x))).mean((2, 3)))


def _by_name(report):
    return {layer.name: layer for layer in report.layers}


def test_low_rank_mlp():
    model = _mlp()
    small = compress_model(model, "low_rank", rank=8, exclude=["2"])
    report = compression_report(model, small, torch.randn(3, 64))
    layer = _by_name(report)["0"]
    before, after = 64 * 100 + 100, 64 * 8 + 8 * 100 + 100
    head = 100 * 10 + 10
    assert layer.params == (before, after)
    assert layer.size_bytes == (4 * before, 4 * after)
    assert layer.macs == (64 * 100, 8 * (64 + 100))
    assert report.params == (before + head, after + head)
    assert report.size_bytes == (4 * (before + head), 4 * (after + head))
    assert report.macs == (64 * 100 + 1000, 8 * 164 + 1000)
    assert report.compression_ratio == pytest.approx((before + head) / (after + head))
    assert report.size_ratio == pytest.approx((after + head) / (before + head))


def test_the_error_is_the_relative_frobenius_error_of_the_weight():
    model = _mlp()
    small = compress_model(model, "low_rank", rank=8, exclude=["2"])
    values = torch.linalg.svdvals(model[0].weight.double())
    expected = (values[8:].norm() / values.norm()).item()
    assert _by_name(compression_report(model, small))["0"].error == pytest.approx(expected, rel=1e-3)


def test_quantized_conv_net():
    """int8 codes, a float32 scale per output channel, two float32 numbers of input range."""
    model = ConvNet()
    trained = compress_model(model, "qat", bits=8)
    trained(torch.randn(2, 4, 9, 9))
    report = compression_report(model, trained, torch.randn(2, 4, 9, 9))
    layers = _by_name(report)
    conv1, conv2, head = 16 * 2 * 9, 32 * 16 * 9, 32 * 10
    assert layers["conv1"].params == (conv1 + 16, conv1 + 16)
    assert layers["conv1"].size_bytes == (4 * (conv1 + 16), conv1 + 4 * (16 + 16 + 2))
    assert layers["conv2"].size_bytes == (4 * conv2, conv2 + 4 * (32 + 2))
    assert layers["head"].size_bytes == (4 * (head + 10), head + 4 * (10 + 10 + 2))
    assert layers["conv1"].macs == (81 * conv1, 81 * conv1)
    assert layers["conv2"].macs == (16 * conv2, 16 * conv2)
    norm = 4 * 4 * 16 + 8  # weight, bias, mean, variance, and the counter of batches
    before = sum(layer.size_bytes[0] for layer in report.layers) + norm
    after = sum(layer.size_bytes[1] for layer in report.layers) + norm
    assert report.size_bytes == (before, after)
    assert report.params[0] == sum(p.numel() for p in model.parameters())
    assert report.params[1] == report.params[0]
    assert report.macs == (81 * conv1 + 16 * conv2 + head,) * 2


def test_the_report_of_the_training_form_is_that_of_the_finalized_one():
    model, inputs = ConvNet(), torch.randn(2, 4, 9, 9)
    trained = compress_model(model, "qat")
    trained(inputs)
    assert (
        compression_report(model, trained, inputs).size_bytes == compression_report(model, finalize(trained)).size_bytes
    )


def test_the_bytes_are_those_of_the_tensors_in_the_file(tmp_path):
    model = ConvNet()
    trained = compress_model(model, "qat", bits=4)
    state, _ = read_artifact(save_compressed(trained, tmp_path / "model.safetensors"))
    stored = sum(t.numel() * t.element_size() for key, t in state.items() if not key.endswith("_extra_state"))
    assert compression_report(model, trained).size_bytes[1] == stored


def test_low_rank_and_quantized():
    model = _mlp()
    stacked = compress_model(compress_model(model, "low_rank", rank=8, exclude=["2"]), "qat", exclude=["2"])
    stacked(torch.randn(4, 64))
    layer = _by_name(compression_report(model, stacked))["0"]
    assert layer.method == "low rank 8 + 8-bit weights, 8-bit static inputs"
    assert layer.size_bytes[1] == (64 * 8 + 4 * (8 + 2)) + (8 * 100 + 4 * (100 + 100 + 2))


class Tied(nn.Module):
    """Embedding and head share one matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_tied_weights_are_counted_once():
    model = Tied()
    trained = compress_model(model, "qat", act_bits=16)
    report = compression_report(model, trained, torch.tensor([[1, 2, 3]]))
    assert (trained.embed.kind, trained.head.kind) == ("quant_embedding", "quant_linear")
    assert report.params == (50 * 16 + 50, 50 * 16 + 50)
    assert report.size_bytes == (4 * (50 * 16 + 50), 50 * 16 + 4 * (50 + 50))
    assert report.macs == (3 * 16 * 50, 3 * 16 * 50)


def test_a_layer_used_twice_is_counted_once_in_bytes_and_twice_in_macs():
    layer = nn.Linear(64, 64)
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
    small = compress_model(model, "low_rank", rank=4)
    report = compression_report(model, small, torch.randn(1, 64))
    assert report.params == (64 * 64 + 64, 2 * 64 * 4 + 64)
    assert report.macs == (2 * 64 * 64, 2 * 2 * 64 * 4)


@pytest.mark.parametrize(
    ("layer", "inputs", "macs"),
    [
        (nn.Linear(8, 16), (2, 5, 8), 2 * 5 * 8 * 16),
        (nn.Conv1d(4, 8, 5, padding=2), (3, 4, 10), 3 * 10 * 8 * 4 * 5),
        (nn.Conv2d(4, 8, 3, stride=2, groups=4), (1, 4, 9, 9), 16 * 8 * 1 * 9),
        (nn.Conv3d(2, 4, 2), (1, 2, 3, 3, 3), 8 * 4 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.BatchNorm1d(8), (4, 8), 0),
    ],
)
def test_macs_of_one_layer(layer, inputs, macs):
    assert count_macs(nn.Sequential(layer), torch.randn(inputs))[""] == macs


class Looks(nn.Module):
    """Its forward looks at values, which "meta" tensors do not have."""

    def __init__(self, look):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.look = look

    def forward(self, x):
        self.look(x)
        return self.fc(x)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: bool(x.mean() > 0),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x + torch.zeros(1),
        lambda x: x.numpy(),
    ],
    ids=["bool", "tolist", "mask", "other_device", "numpy"],
)
def test_a_forward_that_looks_at_values_gives_no_macs(look):
    model = Looks(look)
    report = compression_report(model, compress_model(model, "qat"), torch.randn(2, 64))
    assert report.macs is None
    assert _by_name(report)["fc"].macs is None
    assert _by_name(report)["fc"].params == (64 * 65, 64 * 65)


def test_no_example_gives_no_macs():
    model = _mlp()
    assert compression_report(model, compress_model(model, "qat")).macs is None


def test_counting_leaves_the_model_untouched():
    model = ConvNet().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert count_macs(model, torch.randn(2, 4, 9, 9))[""] > 0
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "example", [{"x": torch.ones(2, 64)}, (torch.ones(2, 64),), [torch.ones(2, 64)], torch.ones(2, 64)]
)
def test_example_inputs_in_every_form(example):
    args, kwargs = as_call(example)
    assert [*args, *kwargs.values()][0].shape == (2, 64)
    assert count_macs(Looks(lambda x: None), example)[""] == 2 * 64 * 64


def test_printed_table():
    model = _mlp()
    report = compression_report(model, compress_model(model, "low_rank", rank=8, exclude=["2"]), torch.randn(1, 64))
    text = str(report)
    for part in ("low rank 8", "6,500 → 1,412", "26,000 → 5,648", "6,400 → 1,312", "whole model", "% of the bytes"):
        assert part in text


def test_skipped_layers_are_printed_with_their_reason():
    plan = LowRankCompression(rank=8).plan(_mlp())
    model = _mlp()
    report = compression_report(model, compress_model(model, "low_rank", rank=8))
    text = str(type(report)(report.layers, plan.skipped, report.params, report.size_bytes, report.macs))
    assert all(f"left alone: {skip.name}: {skip.reason}" in text for skip in plan.skipped)


def test_to_dict_is_json():
    model = _mlp()
    report = compression_report(model, compress_model(model, "qat"), torch.randn(1, 64))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["params"] == list(report.params)
    assert data["size_ratio"] == report.size_ratio
    assert data["layers"][0]["name"] == "0"


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_macs_are_those_of_one_sample(samples):
    """Whatever the batch size of the example, and the same in every report."""
    model, inputs = ConvNet(), torch.randn(samples, 4, 9, 9)
    expected = {"conv1": 81 * 16 * 2 * 9, "conv2": 16 * 32 * 16 * 9, "head": 320}
    small = compress_model(model, "ptq", scheme="weight_only")
    assert {layer.name: layer.macs[0] for layer in compression_report(model, small, inputs).layers} == expected
    assert {layer.name: layer.macs for layer in analyze_model(model, inputs, spectra=False).layers} == expected
    found = EvaluationPipeline(["macs"]).run(model, small, [inputs])["macs"]
    assert (found.before, found.unit) == (sum(expected.values()), "MACs per sample")


def test_the_size_is_that_of_the_files(tmp_path):
    model = ConvNet()
    small = compress_model(model, "ptq", scheme="weight_only", bits=4, min_saving=0.0)
    for compressed in (small, compress_model(model, "unstructured_pruning", sparsity=0.9)):
        report = compression_report(model, compressed)
        files = [save_compressed(m, tmp_path / f"{i}.safetensors") for i, m in enumerate((model, compressed))]
        assert report.file_bytes == tuple(file.stat().st_size for file in files)
        assert report.size_bytes[1] < report.file_bytes[1]
        assert f"{report.file_bytes[0]:,} → {report.file_bytes[1]:,}" in str(report)


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_into_which_a_norm_is_folded_are_compared_with_such_weights(transposed):
    """The errors of a loaded model are those that it had before its norms were folded away."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose2d(4, 6, 3) if transposed else nn.Conv2d(4, 6, 3)
            self.norm = nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).mean((2, 3)))

    model = Normed().eval()
    with torch.no_grad():
        model.norm.running_var.uniform_(0.01, 9)
        model.norm.weight.uniform_(-3, 3)
    data = [torch.randn(8, 4, 9, 9)]
    small = compress_model(model, "ptq", train_loader=data, min_saving=0.0)
    assert type(small.norm).__name__ == "FoldedNorm"
    error = _by_name(compression_report(model, small))["conv"].error
    assert 1e-4 < error < 0.01  # 8 bits; without the norm's factors they differ by about the weights themselves
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    folded = model.conv.weight * scale.view((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
    exact = (folded - weight_of(small.conv)).norm() / folded.norm()
    assert error == pytest.approx(float(exact), rel=1e-4)
    figure = plot_weight_histograms(model, small, ["conv"])
    before, after = (line.get_ydata() for line in figure.axes[0].lines)
    assert abs(before - after).sum() < 10  # of 200 per cent; histograms of other ranges hardly overlap
