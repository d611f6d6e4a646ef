"""Layer by layer, before and after; and layers that would not get faster stay in floating point where asked."""

import pytest
import torch
from torch import nn

from pquant_lightning import compress_model, compression_report, prepare
from pquant_lightning.core.errors import CalibrationError, OptionError
from pquant_lightning.methods.quantization import _speed
from pquant_lightning.methods.quantization._integer import IntLayer
from pquant_lightning.utils.layer_timing import layer_table, time_layers

X = torch.randn(16, 64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4))


def test_every_changed_layer_is_timed_with_its_kernel():
    net = network()
    small = compress_model(net, "ptq", train_loader=[X], exclude=["2"])
    timings = time_layers(net, small, X, max_seconds=0.05)
    assert [timing.name for timing in timings] == ["0", "4"]
    assert all(timing.kernel and timing.before_ms > 0 and timing.after_ms > 0 for timing in timings)
    assert all(name in layer_table(timings) for name in ("0", "4", timings[0].kernel))
    low_rank = compress_model(net, "low_rank", rank=4, include=["0", "2"])
    assert [timing.kernel for timing in time_layers(net, low_rank, X, max_seconds=0.05)] == [None, None]


def test_attention_is_timed_by_projection():
    net = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    small = compress_model(net, "ptq", scheme="dynamic", min_saving=0.0)
    assert {"self_attn.q_proj", "linear1"} <= {timing.name for timing in time_layers(net, small, x, max_seconds=0.02)}


def test_the_report_says_how_long_a_layer_takes():
    net = network()
    small = compress_model(net, "ptq", train_loader=[X])
    plain, timed = compression_report(net, small, X), compression_report(net, small, X, timed=True)
    assert all("here" not in layer.method for layer in plain.layers)
    assert all("here" in layer.method for layer in timed.layers)
    with pytest.raises(OptionError, match="give some"):
        compression_report(net, small, timed=True)


@pytest.mark.parametrize("slower", [("2",), ("0", "2", "4"), ()])
def test_slower_layers_stay_in_floating_point(slower, monkeypatch, package_log):
    net = network()
    widths = {96: "0", 64: "2", 4: "4"}  # outputs -> name
    times = lambda layer, x: 1.5 if widths[layer.out_features] in slower else 0.5  # noqa: E731
    monkeypatch.setattr(_speed, "_relative_time", times)
    small = compress_model(net, "ptq", train_loader=[X], keep_if="faster", min_saving=0.0)
    assert {name for name in "024" if not isinstance(small[int(name)], IntLayer)} == set(slower)
    for name in slower:
        assert torch.equal(small[int(name)].weight, net[int(name)].weight)
        assert f"'{name}' (1.5 of its time)" in package_log.text
    again = prepare(network()).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(X), small.eval()(X))


def test_a_kept_norm_is_not_lost(monkeypatch):
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(32, 4, 8, 8)
    net.train()(3 * x)
    monkeypatch.setattr(_speed, "_relative_time", lambda layer, x: 2.0)
    small = compress_model(net.eval(), "ptq", train_loader=[x], keep_if="faster", min_saving=0.0)
    torch.testing.assert_close(small.eval()(x), net(x))


def test_timing_is_real():
    layer = compress_model(network(), "ptq", train_loader=[X], min_saving=0.0, inplace=True)
    assert isinstance(layer[0], IntLayer)
    kept = compress_model(network(), "ptq", train_loader=[X], keep_if="faster", min_saving=0.0)
    assert kept(X).shape == (16, 4)


def test_what_it_needs_is_said():
    with pytest.raises(OptionError, match="keep_if need samples"):
        compress_model(network(), "ptq", train_loader=[X], keep_if="faster", scheme="dynamic", num_samples=0)
    with pytest.raises(CalibrationError, match="keep_if='faster' times the layers"):
        compress_model(network(), "ptq", keep_if="faster", scheme="dynamic")
    with pytest.raises(OptionError, match="keep_if"):
        compress_model(network(), "ptq", train_loader=[X], keep_if="smaller")
