"""Every type of layer that an adapter covers x every method: what is saved is loaded into the model, equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pquant_lightning import compress_model, finalize, load_compressed, register_adapter, save_compressed
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CheckpointError
from tests.contract.table import TABLE, registered_methods

WIDTH, OTHER = 32, 24


class Kernel(nn.Module):
    """A user's convolution that keeps its window first: `(k, in, out)`."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, channels, outputs) / channels**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, self.kernel.permute(2, 1, 0), padding=1)


def kernel_to_conv(layer: Kernel) -> nn.Conv1d:
    _, channels, outputs = layer.kernel.shape
    conv = nn.Conv1d(channels, outputs, 3, padding=1, bias=False)
    conv.weight = nn.Parameter(layer.kernel.detach().permute(2, 1, 0).contiguous())
    return conv


class Transposed(nn.Sequential):
    """transformers' `Conv1D`, one of them square, so that its transpose has the same shape; and a Linear."""

    def __init__(self) -> None:
        layers = (Conv1D(OTHER, WIDTH), nn.ReLU(), Conv1D(OTHER, OTHER), nn.ReLU(), Conv1D(WIDTH, OTHER))
        super().__init__(*layers, nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Windows(nn.Sequential):
    """`Kernel`."""

    def __init__(self) -> None:
        super().__init__(Kernel(WIDTH, OTHER), nn.ReLU(), Kernel(OTHER, OTHER), nn.ReLU(), Kernel(OTHER, WIDTH))


MODELS: dict[str, tuple[type[nn.Sequential], Callable[[], Tensor]]] = {
    "transposed": (Transposed, lambda: torch.randn(8, WIDTH)),
    "windows": (Windows, lambda: torch.randn(2, WIDTH, 9)),
}
PRUNING = {"unstructured_pruning": {"sparsity": 0.5}, "structured_pruning": {"sparsity": 0.5}}
OPTIONS: dict[str, dict[str, Any]] = {name: dict(TABLE[name].rows[0]) for name in registered_methods()} | PRUNING
COVERED = [  # Tucker takes windows apart only, and structured pruning knows no channels of a user's type
    (model, name)
    for model in MODELS
    for name in OPTIONS
    if not (model == "transposed" and name == "tucker") and not (model == "windows" and name == "structured_pruning")
]


@pytest.fixture(autouse=True)
def kernel_adapter(own_registries: None) -> None:
    register_adapter(Kernel, kernel_to_conv)


def shaken(model: nn.Module) -> nn.Module:
    """With other values in everything that trains, so that an adapter is no longer zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn_like(parameter) * (parameter != 0))
        for layer in compressed_layers(model).values():
            if hasattr(layer, "lora_B"):
                layer.lora_B.normal_(std=0.1)
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(x)
    return result


@pytest.mark.parametrize(("model", "name"), COVERED)
def test_what_is_saved_is_loaded(model: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, draw = MODELS[model]
    x = draw()
    dense = make()
    small = shaken(compress_model(dense, name, train_loader=[x], **OPTIONS[name]))
    expected = run(finalize(small), x)
    assert not torch.equal(expected, run(dense, x))
    for file in ("model.safetensors", "model.pt"):
        loaded = load_compressed(make(), save_compressed(small, tmp_path / file))
        assert torch.equal(run(loaded, x), expected), file


@pytest.mark.parametrize("model", MODELS)
def test_a_merged_model_is_compressed_further(model: str, tmp_path: Path) -> None:
    make, draw = MODELS[model]
    x = draw()
    merged = finalize(shaken(compress_model(make(), "lora", r=2)))
    small = compress_model(merged, "ptq", scheme="weight_only")
    assert len([layer for layer in compressed_layers(small).values() if "bits" in layer.spec]) == len(merged) // 2 + 1
    loaded = load_compressed(make(), save_compressed(small, tmp_path / "model.safetensors"))
    assert torch.equal(run(loaded, x), run(small, x))


@pytest.mark.parametrize("model", MODELS)
def test_a_plain_file_is_not_taken_for_the_merged_layer(model: str) -> None:
    """A square weight the other way round has the shape of the ordinary layer's."""
    make, _ = MODELS[model]
    for small in (compress_model(make(), "lora", r=2), finalize(compress_model(make(), "lora", r=2))):
        with pytest.raises(CheckpointError, match="uncompressed"):
            small.load_state_dict(make().state_dict())
