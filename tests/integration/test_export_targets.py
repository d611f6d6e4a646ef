"""ONNX files for every processor: no product of bytes saturates, and what runs without VNNI computes the same."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import compress_model, export_model
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import OptionError

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 40, (8, 6), generator=torch.Generator().manual_seed(0))
_WEIGHT = {"DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "MatMulInteger": 1, "ConvInteger": 1}
_FUSED = ("Conv", "Gemm", "MatMul")  # to integer kernels, where what they read is dequantized


class Tied(nn.Module):
    """A table of words whose weight is also that of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids)))


def convolutions() -> nn.Module:
    last = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    first = nn.Conv2d(3, 32, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), last, nn.Conv2d(32, 8, 1))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 40))


MODELS: dict[str, tuple[Any, Tensor]] = {
    "linear": (linear, X.abs()),
    "conv": (convolutions, IMAGES),
    "tied": (Tied, TOKENS),
}
FULL = [(name, scheme, True) for name in MODELS for scheme in ("static", "dynamic")]
ROWS = [*FULL, ("linear", "dynamic", False), ("conv", "static", False)]


def quantized(name: str, scheme: str, full: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, x = MODELS[name]
    options = {"scheme": scheme, "min_saving": 0.0, "reduce_range": not full}
    small = compress_model(build().eval(), "ptq", train_loader=[x], **options)
    for layer in compressed_layers(small).values():  # rows in which all weights are equal saturate most
        if full and isinstance(layer, nn.Linear):
            layer.codes[: len(layer.codes) // 2] = 127
            layer._forget()
    return small, x


def weights(path: Path) -> dict[str, Any]:
    """The weights, (out, terms), of all products of bytes in a file."""
    graph, found = onnx.load(path).graph, {}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        name = node.input[_WEIGHT[node.op_type]] if node.op_type in _WEIGHT else None
        if node.op_type in _FUSED and (before := made.get(node.input[1])) and before.op_type == "DequantizeLinear":
            name = before.input[0] if made[node.input[0]].op_type == "DequantizeLinear" else None
        if name is not None:
            rows = values[name] if node.op_type in ("Conv", "ConvInteger") else values[name].T
            found[name] = rows.reshape(len(rows), -1)
    return found


def saturates(rows: Any) -> bool:
    """Whether two products of a row can exceed 16 bits together beside an input of 255."""
    if rows.dtype == np.uint8:
        return False
    ordered = np.sort(rows.astype(np.int64), 1)
    high, low = (255 * np.clip(ends, 0, None).sum(1).max() for ends in (ordered[:, -2:], -ordered[:, :2]))
    return bool(max(high, low) > 2**15 - 1)


def outputs(path: Path, x: Tensor, precise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize(("name", "scheme", "full"), ROWS)
def test_no_product_saturates_on_any_processor(name: str, scheme: str, full: bool, tmp_path: Path) -> None:
    small, x = quantized(name, scheme, full)
    result = export_model(small, x[:2], tmp_path / "net.onnx")
    found = weights(result.path)
    assert found
    assert result.target == "any"
    assert not [key for key, rows in found.items() if saturates(rows)]
    assert (full or name == "tied") == any(rows.dtype == np.uint8 for rows in found.values())
    np.testing.assert_array_equal(outputs(result.path, x, precise=False), outputs(result.path, x, precise=True))


def test_signed_weights_where_only_vnni_is_wanted(tmp_path: Path) -> None:
    small, x = quantized("linear", "static", full=True)
    result = export_model(small, x[:2], tmp_path / "net.onnx", target="vnni", verify=False)
    assert result.target == "vnni"
    assert {rows.dtype for rows in weights(result.path).values()} == {np.dtype(np.int8)}
    assert all(saturates(rows) for rows in weights(result.path).values())
    other = export_model(small, x[:2], tmp_path / "any.onnx", verify=False)
    np.testing.assert_array_equal(outputs(result.path, x, precise=True), outputs(other.path, x, precise=False))


def test_the_target_is_a_choice_of_onnx(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="There is no target 'vnnni'. Did you mean 'vnni'"):
        export_model(linear(), X, tmp_path / "net.onnx", target="vnnni")
    with pytest.raises(OptionError, match="target='vnni' is a choice of 'onnx'; 'pt2' has none"):
        export_model(linear(), X, tmp_path / "net.pt2", target="vnni")
    assert list(tmp_path.iterdir()) == []
    assert export_model(linear(), X, tmp_path / "net.pt2").target is None
