"""A file is compared by what rounding explains: one that is 2 % off is refused, one that rounds otherwise is not."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import compress_model, export_model
from pquant_lightning.backends.lowering.trace import Traced
from pquant_lightning.exporters._noise import moved_values, rounding_layers
from pquant_lightning.exporters.base import ExportError
from pquant_lightning.exporters.onnx import OnnxExporter

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Module:
    torch.manual_seed(0)
    sizes = ((64, 128), (128, 96), (96, 40))
    return nn.Sequential(*[part for i, o in sizes for part in (nn.Linear(i, o, bias=False), nn.ReLU())][:-1]).eval()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 24, 3, bias=False), nn.Conv2d(24, 24, 3, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(24, 8, 3, bias=False)).eval()


MODELS: dict[str, tuple[Any, Tensor, str]] = {
    "linear": (linear, X, "2.scale"),
    "conv": (convolutions, IMAGES, "2.scale"),
}


def damaged(path: Path, name: str, factor: float) -> None:
    model = onnx.load(path)
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(found) * np.float32(factor)
    found.CopyFrom(onnx.numpy_helper.from_array(values, name))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_a_scale_that_is_2_percent_off_is_an_error(
    name: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, x, scale = MODELS[name]
    small = compress_model(build(), "ptq", train_loader=[x], scheme=scheme, min_saving=0.0)
    result = export_model(small, x[:8], tmp_path / "whole.onnx")
    assert result.rms_error is not None
    assert result.rms_error < 0.03
    write = OnnxExporter.write

    def wrong(self: OnnxExporter, traced: Traced, path: Path) -> None:
        write(self, traced, path)
        damaged(path, scale, 1.02)

    monkeypatch.setattr(OnnxExporter, "write", wrong)
    with pytest.raises(ExportError, match="The exported file computes something else.*explained by rounding"):
        export_model(small, x[:8], tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_sample_with_large_values_makes_the_grid_of_a_whole_input_coarse(tmp_path: Path) -> None:
    small = compress_model(linear(), "ptq", scheme="dynamic", min_saving=0.0)
    x = torch.cat([X[:7], 6 * X[7:8]])  # in PyTorch each row has its own grid
    result = export_model(small, x, tmp_path / "net.onnx")
    assert result.rms_error is not None
    assert result.rms_error > 1e-3


def test_inputs_beyond_the_calibrated_range_are_no_damage(tmp_path: Path) -> None:
    small = compress_model(convolutions(), "ptq", train_loader=[IMAGES / 4], min_saving=0.0)
    assert export_model(small, IMAGES[:4], tmp_path / "net.onnx").max_error is not None


def test_values_are_moved_by_whole_steps_and_only_within_the_block() -> None:
    small = compress_model(linear(), "ptq", train_loader=[X], min_saving=0.0)
    assert rounding_layers(small) == [small[0], small[2], small[4]]
    seen: list[Tensor] = []
    with moved_values(small, 0, rounds_inputs=False), torch.no_grad():
        handle = small[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))  # behind the block's own
        moved = small(X)
        handle.remove()
    steps = (seen[0] - X) / small[0].act_grid[0]
    assert set(steps.round(decimals=2).unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert 2 <= (steps.abs() > 0.5).sum() <= 3  # of 2048
    with torch.no_grad():
        assert not torch.equal(small(X), moved)
        assert torch.equal(small(X), small(X))
