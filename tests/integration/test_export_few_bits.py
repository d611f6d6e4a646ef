"""Weights of 2 to 8 bits in ONNX: onnxruntime's own few-bit product, of the next native width, and what it costs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pquant_lightning import compress_model, export_model
from pquant_lightning.core.errors import OptionError

X = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))


def quantized(bits: int, group_size: int | None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    given = {"scheme": "weight_only", "bits": bits, "first_last_bits": bits, "group_size": group_size, **options}
    return compress_model(net, "ptq", min_saving=0.0, **given)


def products(path: Path) -> list[dict[str, Any]]:
    graph = onnx.load(path).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


@pytest.mark.parametrize(
    ("bits", "group_size", "stored"),
    [(2, 32, 2), (2, 16, 4), (3, 32, 4), (4, 16, 4), (5, 32, 8), (6, None, 8), (7, 32, 8), (8, None, 8)],
)
def test_a_native_width(bits: int, group_size: int | None, stored: int, tmp_path: Path) -> None:
    small = quantized(bits, group_size)
    result = export_model(small, X[:2], tmp_path / "net.onnx")
    found = products(result.path)
    assert [(one["bits"], one["accuracy_level"]) for one in found] == [(stored, 4)] * 2
    assert dict(result.widened) == ({"0": stored, "2": stored} if stored > bits else {})
    codes = sum(size for name, size in _integers(result.path) if name.endswith("codes"))
    assert codes == (96 * 128 + 128 * 64) * stored // 8
    assert result.rounding_error is not None
    assert result.rms_error is not None
    assert 1e-4 < result.rounding_error < 0.01
    assert abs(result.rms_error - result.rounding_error) < 2e-3


def _integers(path: Path) -> list[tuple[str, int]]:
    tensors = onnx.load(path).graph.initializer
    return [(t.name, len(t.raw_data)) for t in tensors if t.data_type == onnx.TensorProto.UINT8]


@pytest.mark.parametrize(("bits", "rounding"), [(2, "hqq"), (3, "hqq"), (5, "nearest")])
def test_inputs_can_be_left_as_they_are(bits: int, rounding: str, tmp_path: Path) -> None:
    small = quantized(bits, 32, rounding=rounding)
    result = export_model(small, X[:2], tmp_path / "net.onnx", accuracy_level=0)
    assert (result.accuracy_level, products(result.path)) == (0, [])
    assert result.max_error is not None
    assert result.max_error < 1e-5
    assert result.rounding_error is None


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_zero_points_are_those_of_the_layer(bits: int, tmp_path: Path) -> None:
    """Inputs that 8 bits hold exactly give the layer's own output, whatever the accuracy level."""
    small = quantized(bits, 32, rounding="hqq")[0]
    x = torch.eye(96)
    result = export_model(nn.Sequential(small), x, tmp_path / "net.onnx")
    assert result.max_error is not None
    assert result.max_error < 1e-5
    session = onnxruntime.InferenceSession(str(result.path))
    weight = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] - small.bias.numpy()
    np.testing.assert_allclose(weight.T, small.dense_weight().numpy(), atol=1e-5)


def test_levels_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="There is no accuracy_level 3. Known: '0', '4'"):
        export_model(quantized(4, 32), X, tmp_path / "net.onnx", accuracy_level=3)
    with pytest.raises(OptionError, match="accuracy_level=4 is a choice of 'onnx'; 'jax' has none"):
        export_model(quantized(4, 32), X, tmp_path / "net", "jax", accuracy_level=4)
