"""What onnxruntime makes of our ONNX files: integer layers are fused to its integer kernels, and hold our codes."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import compress_model, export_model, load_compressed, save_compressed
from pquant_lightning.core.compressed_layer import compressed_layers


class Residual(nn.Module):
    """Two blocks with batch norms and shortcuts, depthwise ones among them, a pooling and a head."""

    def __init__(self, norms: bool = False) -> None:
        super().__init__()
        ends = [nn.BatchNorm2d(16) if norms else nn.Identity() for _ in range(2)]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.first = nn.Sequential(depthwise, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), ends[0])
        inner, outer = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.second = nn.Sequential(inner, nn.ReLU(), outer, ends[1])
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.first(x))
        x = torch.relu(self.pool(x + self.second(x)))
        return self.head(x.mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 40))


def kernels(path: Path) -> Counter[str]:
    """The operations of the graph that onnxruntime really runs."""
    options, optimized = onnxruntime.SessionOptions(), path.with_suffix(".optimized.onnx")
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def error_of(path: Path, net: nn.Module, x: Tensor = IMAGES) -> float:
    """That of the file's output, relative to the network's own."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = net(x).numpy()
    return float(np.linalg.norm(output - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"scheme": "dynamic"}, "DynamicQuantizeMatMul"),
        ({"scheme": "static"}, "MatMulIntegerToFloat"),
        ({"scheme": "weight_only", "bits": 4, "group_size": 16, "first_last_bits": 4}, "MatMulNBits"),
    ],
    ids=str,
)
def test_linear_layers_run_in_integers(options: dict[str, Any], kernel: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compress_model(mlp(), "ptq", train_loader=[X], min_saving=0.0, **options)
    result = export_model(small, X[:1], tmp_path / "net.onnx")
    assert kernels(result.path)[kernel] == 3
    if options.get("bits") != 4:
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(result.path).graph.initializer}
        for name, layer in compressed_layers(small).items():
            np.testing.assert_array_equal(stored[f"{name}.codes"], layer.codes.t().numpy())


def test_a_fractional_zero_point_of_4_bits_is_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compress_model(mlp(), "ptq", scheme="weight_only", bits=4, group_size=16, rounding="hqq", min_saving=0.0)
    zero = small[2].zero
    assert (zero != zero.round()).any()
    result = export_model(small, X[:1], tmp_path / "net.onnx", accuracy_level=0)
    assert result.max_error is not None
    assert result.max_error < 1e-5
    assert kernels(result.path)["MatMulNBits"] >= 1


@pytest.mark.parametrize("rounding", ["hqq", "gptq"])
def test_zeros_of_pruned_weights_are_zeros_in_the_file(rounding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned = compress_model(mlp(), "unstructured_pruning", pattern="3:4", include=["*"], min_saving=0.0)
    options = {"scheme": "weight_only", "bits": 4, "group_size": 16, "rounding": rounding}
    small = compress_model(pruned, "ptq", train_loader=[X], min_saving=0.0, **options)
    graph = onnx.load(export_model(small, X[:1], tmp_path / "net.onnx").path).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 3

    def halves(packed: Any) -> Any:
        return np.stack([packed & 15, packed >> 4], -1)

    for node, layer in zip(nodes, (pruned[0], pruned[2], pruned[4]), strict=True):
        zero = layer.weight.detach().numpy() == 0
        codes = halves(stored[node.input[1]]).reshape(*zero.shape[:1], -1, 16)
        points = halves(stored[node.input[3]]).reshape(len(zero), -1)[:, : codes.shape[1], None]
        assert zero.mean() == 0.25
        assert (codes == points).reshape(zero.shape)[zero].all()
    assert not [name for name in stored if name.endswith(".rest")]  # no zero point lies between two codes


def assert_in_integers(path: Path, net: Residual) -> None:
    found = kernels(path)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (5, 2)
    assert not found["Conv"] + found["FusedConv"] + found["ConvInteger"]
    assert error_of(path, net) < 0.05


def test_a_net_with_residuals_stays_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Residual().train()
    net(IMAGES)
    small = compress_model(net.eval(), "ptq", train_loader=[IMAGES], min_saving=0.0)
    save_compressed(small, tmp_path / "net.safetensors")
    loaded = load_compressed(Residual(), tmp_path / "net.safetensors")  # the ranges of the outputs are in the file
    result = export_model(loaded, IMAGES[:1], tmp_path / "net.onnx")
    assert_in_integers(result.path, net)


def test_a_trained_net_with_residuals_stays_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Residual(norms=True).train()
    for _ in range(60):  # until the norms have forgotten where they started
        net(IMAGES)
    small = compress_model(net.eval(), "qat", train_loader=[IMAGES])
    result = export_model(small, IMAGES[:1], tmp_path / "net.onnx")
    assert_in_integers(result.path, net)


class Gated(nn.Module):
    """Expanded blocks with a shortcut, as in MobileNets, and channels that are weighed by a gate."""

    def __init__(self, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), activation())
        depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.block = nn.Sequential(
            nn.Conv2d(32, 64, 1), activation(), depthwise, activation(), nn.Conv2d(64, 32, 1, bias=False)
        )
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), gate())
        self.last = nn.Sequential(nn.Conv2d(32, 32, 1), activation(), nn.Conv2d(32, 10, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.last(x * self.weigh(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("activation", "gate", "found"),
    [
        (nn.Hardswish, nn.Hardsigmoid, {"QLinearMul": 5, "QLinearAdd": 6}),
        (nn.SiLU, nn.Sigmoid, {"QLinearMul": 5, "QLinearAdd": 1, "QLinearSigmoid": 5}),
        (nn.ReLU6, nn.Sigmoid, {"QLinearMul": 1, "QLinearAdd": 1, "QLinearSigmoid": 1}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_gates_stay_in_integers(
    activation: type[nn.Module], gate: type[nn.Module], found: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Gated(activation, gate).eval()
    small = compress_model(net, "ptq", train_loader=[IMAGES], min_saving=0.0)
    result = export_model(small, IMAGES[:1], tmp_path / "net.onnx")
    used = kernels(result.path)
    floats = ("Conv", "FusedConv", "Mul", "Add", "Sigmoid", "HardSigmoid", "HardSwish", "Clip", "Relu")
    assert {name: used[name] for name in found} == found
    assert used["QLinearConv"] == 8
    assert not [name for name in floats if used[name]]
    assert error_of(result.path, net) < 0.05


class Windows(nn.Module):
    """Convolutions with strides, dilation, padding by size and by name, one by one, and in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 1),
            nn.ReLU(),
            nn.Conv2d(24, 32, (3, 2), stride=(2, 1), padding=(1, 0)),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, dilation=2, padding="same"),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(64, 32, 1, stride=2),
        )
        self.last = nn.Conv1d(32, 16, 3, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x).flatten(2)).mean(2)


def test_dynamic_convolutions_of_many_channels_are_products_of_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Windows().eval()
    small = compress_model(net, "ptq", scheme="dynamic", min_saving=0.0)
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    result = export_model(small, IMAGES[:1], tmp_path / "net.onnx", dynamic_axes=axes)
    found = kernels(result.path)
    assert found["MatMulIntegerToFloat"] == 5
    assert found["Conv"] + found["FusedConv"] == 1  # of three channels
    assert not found["ConvInteger"]
    assert error_of(result.path, net) < 0.02
    assert error_of(result.path, net, torch.randn(3, 3, 17, 10)) < 0.02


def test_residuals_of_integer_layers_are_not_fused_with_their_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.linear(x))

    net, x, fused = Block().eval(), torch.randn(2, 5, 64), "SkipLayerNormalization"
    assert kernels(export_model(net, x, tmp_path / "float.onnx").path)[fused] == 1
    small = compress_model(net, "ptq", scheme="dynamic", min_saving=0.0)
    found = kernels(export_model(small, x, tmp_path / "net.onnx").path)
    assert (found["LayerNormalization"], found[fused]) == (1, 0)


class Reader(nn.Module):
    """Reads its layers' attributes, as vision transformers do; one of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.spare = nn.Conv2d(3, 16, 3), nn.Linear(16, 10), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x.to(self.conv.weight.dtype))).mean((2, 3))
        return self.head(x.to(self.head.weight.dtype)) * self.head.out_features + self.head.weight.mean()


@pytest.mark.parametrize("options", [{"scheme": "dynamic"}, {"scheme": "static"}, {"scheme": "weight_only"}], ids=str)
def test_attributes_of_layers_can_be_read(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Reader().eval()
    small = compress_model(net, "ptq", train_loader=[IMAGES], min_saving=0.0, **options)
    result = export_model(small, IMAGES[:1], tmp_path / "net.onnx")
    assert result.integer_weights
    assert error_of(result.path, net) < 0.02


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_layers_of_few_weights_are_no_mistake(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).eval()
    small = compress_model(net, "ptq", scheme="weight_only", bits=bits, first_last_bits=bits, min_saving=0.0)
    assert export_model(small, X[:2], tmp_path / "net.onnx").integer_weights


def test_what_leaves_the_model_is_not_cut_to_its_calibrated_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    small = compress_model(net, "ptq", train_loader=[IMAGES], min_saving=0.0)
    small[2].output_range.mul_(0.1)  # as if calibration had seen little
    result = export_model(small, IMAGES[:1], tmp_path / "net.onnx")
    assert error_of(result.path, net) < 0.05


def test_height_and_width_are_open_before_a_stride(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(2)).eval()
    axes = {"input": {0: "batch", 2: "height", 3: "width"}}
    result = export_model(net, IMAGES[:2], tmp_path / "net.onnx", dynamic_axes=axes)
    assert error_of(result.path, net, torch.randn(1, 3, 21, 10)) < 1e-5


def test_tables_of_places_are_not_stored(tmp_path: Path) -> None:
    small = compress_model(nn.Sequential(nn.Conv2d(32, 32, 3)), "ptq", scheme="dynamic", min_saving=0.0)
    sizes = [export_model(small, torch.randn(2, 32, n, n), tmp_path / f"{n}.onnx").size_bytes for n in (16, 64)]
    assert sizes[1] < 1.1 * sizes[0]


def test_output_ranges_are_those_of_the_folded_norm() -> None:
    torch.manual_seed(0)
    net = Residual().train()
    net(IMAGES)
    small = compress_model(net.eval(), "ptq", train_loader=[IMAGES], min_saving=0.0)
    with torch.no_grad():
        output = net.stem[1](net.stem[0](IMAGES))
    torch.testing.assert_close(small.stem[0].output_range, torch.stack(output.aminmax()), rtol=1e-4, atol=0.0)
