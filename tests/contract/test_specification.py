"""The specification's own snippets, with only the package name changed."""

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressionMethod,
    CompressionMethodRegistry,
    ConfigManager,
    LayerAdapter,
    LowRankCompression,
    compress_model,
    get_backend,
)
from pquant_lightning.methods.low_rank.svd import TruncatedSVDLinear


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Linear(256, 10))


def test_low_rank_compression_takes_a_dict(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    method = LowRankCompression({"rank": 64, "method": "svd"})
    assert (method.rank, method.method, method.name) == (64, "svd", "low_rank")

    compressed = method.compress(model, train_loader=None, val_loader=None)

    assert isinstance(compressed[0], TruncatedSVDLinear)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    info = method.get_compression_info(model, compressed)
    assert info["method"] == "low_rank"
    assert info["rank"] == 64
    assert info["original_params"] == sum(p.numel() for p in model.parameters())
    assert info["compressed_params"] == sum(p.numel() for p in compressed.parameters())
    assert info["compression_ratio"] == info["original_params"] / info["compressed_params"] > 1
    method.validate_config()


def test_truncated_svd_linear_from_linear() -> None:
    layer = nn.Linear(100, 80)
    new = TruncatedSVDLinear.from_linear(layer, rank=64)
    assert (new.first.weight.shape, new.second.weight.shape) == ((64, 100), (80, 64))
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(new.dense_weight(), (u[:, :64] * s[:64]) @ vh[:64], atol=1e-4, rtol=0)


@pytest.mark.usefixtures("own_registries")
def test_registry() -> None:
    class MyCompression(CompressionMethod):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config)
            self.rank = config.get("rank", 64)

        def compress(self, model: nn.Module, train_loader: Any = None, val_loader: Any = None) -> nn.Module:
            small = copy.deepcopy(model)
            small[0] = TruncatedSVDLinear.from_linear(model[0], rank=self.rank)
            return small

        def get_compression_info(self, original_model: nn.Module, compressed_model: nn.Module) -> dict[str, Any]:
            return {"rank": self.rank}

    CompressionMethodRegistry.register("mine", MyCompression)
    method = CompressionMethodRegistry.get("mine", {"rank": 8})
    assert (method.config, method.name) == ({"rank": 8}, "MyCompression")
    assert "mine" in CompressionMethodRegistry.list_available()
    model = nn.Sequential(nn.Linear(64, 64))
    assert compress_model(model, "mine", rank=8)[0].first.out_features == 8
    assert method.get_compression_info(model, model) == {"rank": 8}
    with pytest.raises(ValueError, match="Unknown compression method: 'unknown'. Available: "):
        CompressionMethodRegistry.get("unknown", {})


def test_registry_gives_the_standard_method() -> None:
    method = CompressionMethodRegistry.get("low_rank", {"rank": 64})
    assert isinstance(method, LowRankCompression)
    assert method.rank == 64


def test_layer_adapter(model: nn.Module) -> None:
    adapter = LayerAdapter(backend=None)
    assert [adapter.is_compressible(layer) for layer in model] == [True, False, True, True]
    linear: Any = adapter.get_layer_info(model[0])
    expected = {"type": "linear", "in_features": 256, "out_features": 256, "shape": (256, 256)}
    assert {key: linear[key] for key in expected} == expected
    conv: Any = adapter.get_layer_info(model[2])
    expected = {"type": "conv2d", "in_channels": 8, "out_channels": 8, "kernel_size": (3, 3), "shape": (8, 8, 3, 3)}
    assert {key: conv[key] for key in expected} == expected
    assert adapter.get_layer_info(model[1]) is None
    new = nn.Linear(256, 10)
    adapter.replace_layer(model, "3", new)
    assert model[3] is new


@pytest.mark.parametrize("framework", ["pytorch", "tensorflow", "jax"])
def test_backends(framework: str) -> None:
    backend = get_backend(framework)
    config = {"in_channels": 3, "out_channels": 4, "kernel_size": 3}
    for layer_type, options, x in (
        ("linear", {"in_features": 6, "out_features": 4}, torch.ones(2, 6)),
        ("conv2d", config, torch.ones(2, 3, 8, 8)),
    ):
        layer = backend.create_layer(layer_type, options)
        weights = backend.get_weights(layer)
        backend.set_weights(layer, {name: 0 * values for name, values in weights.items()})
        output = numpy.asarray(backend.forward(layer, x))
        assert output.shape[:2] == (2, 4)
        assert not output.any()
    assert type(get_backend()) is type(get_backend("pytorch"))


def test_config_manager(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "pquant_config.yaml"
    path.write_text("compression: {methods: [low_rank], low_rank: {rank: 32, method: svd}}\ntraining: {epochs: 10}\n")

    config = ConfigManager.load_config(path)
    config_validated = ConfigManager.validate_config(config)

    assert config_validated == config
    assert compress_model(model, config)[0].spec["rank"] == 32
    assert set(ConfigManager.load_config()) == {"compression", "training", "evaluation"}
    with pytest.raises(ValueError, match="Missing required key: 'compression'"):
        ConfigManager.validate_config({})
    with pytest.raises(ValueError, match="Unknown compression method: 'unknown'"):
        ConfigManager.validate_config({"compression": {"methods": ["unknown"]}})
