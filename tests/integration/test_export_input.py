"""What `export_model` says to mistakes, and that it leaves nothing half-written behind."""

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import PQuantError, compress_model, export_model, get_backend
from pquant_lightning.backends.base import BackendUnavailable, require
from pquant_lightning.core.errors import ModelError, OptionError
from pquant_lightning.exporters.base import Exporter, ExportError
from pquant_lightning.exporters.export import EXPORTERS


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("mine")
    with pytest.raises(ExportError, match="exists; choose another path, or give overwrite=True"):
        export_model(net(), X, path, "pt2")
    assert path.read_text() == "mine"
    assert export_model(net(), X, path, "pt2", overwrite=True).size_bytes == path.stat().st_size


@pytest.mark.parametrize("kind", ["onnx", "jax", "peft"])
def test_a_directory_of_something_else_is_kept(kind: str, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text("mine")
    with pytest.raises(ExportError, match="holds something else than an export"):
        export_model(net(), X, tmp_path / "project", kind, overwrite=True)
    assert (tmp_path / "project" / "train.py").read_text() == "mine"


def test_a_file_is_not_taken_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "net").write_text("mine")
    with pytest.raises(ExportError, match="is a file, and jax writes a directory"):
        export_model(net(), X, tmp_path / "net", "jax", overwrite=True)


def test_an_export_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "net"
    export_model(net(), X, path, "jax")
    (path / "old").write_text("old")
    export_model(net(), X, path, "jax", overwrite=True)
    assert not (path / "old").exists()
    assert {file.name for file in path.iterdir()} == {"program.stablehlo", "params.safetensors", "meta.json"}


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ExportError, match="cannot be written"):
        export_model(net(), X, tmp_path / "file" / "net.pt2", "pt2")


@pytest.mark.parametrize("kind", ["pt2", "jax"])
def test_a_full_disk_leaves_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = EXPORTERS[kind]
    write = exporter.write

    def then_full(traced: Any, path: Path) -> None:
        write(traced, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write", then_full)
    with pytest.raises(ExportError, match="No space left on device"):
        export_model(net(), X, tmp_path / "net", kind)
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = EXPORTERS["pt2"]
    opened = exporter.open
    monkeypatch.setattr(exporter, "open", lambda *given: lambda x: [1.01 * y for y in opened(*given)(x)])
    with pytest.raises(ExportError, match="computes something else: output 'output' differs by 1.0e-02"):
        export_model(net(), X, tmp_path / "net.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []
    assert export_model(net(), X, tmp_path / "net.pt2", "pt2", verify=False).max_error is None


def test_integers_that_have_become_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compress_model(net(), "ptq", scheme="dynamic", min_saving=0.0)
    monkeypatch.setattr(EXPORTERS["pt2"], "weight_types", lambda path: {"weight": ("float32", 2000)})
    with pytest.raises(ExportError, match="holds 0 bytes of integers, and the integer weights of the model take 360"):
        export_model(small, X, tmp_path / "net.pt2", "pt2")


def test_a_part_of_a_tensor_is_no_more_than_it_is(tmp_path: Path) -> None:
    many = torch.randn(100_000, 6)
    small = export_model(net(), many[:4].clone(), tmp_path / "small.pt2", "pt2")
    assert export_model(net(), many[:4], tmp_path / "part.pt2", "pt2").size_bytes < 1.1 * small.size_bytes


def test_a_batch_of_one_is_left_open(tmp_path: Path) -> None:
    result = export_model(net(), X[:1], tmp_path / "net.onnx")
    run = EXPORTERS["onnx"].open(result.path, _traced())
    assert run([torch.zeros(9, 6)])[0].shape == (9, 3)


def _traced() -> Any:
    from pquant_lightning.backends.lowering.trace import trace

    return trace(net(), X)


class ByValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 3, 2).flatten(1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + 1


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "message"),
    [
        (net(), X, {"format": "onxn"}, OptionError, "no format 'onxn'. Did you mean 'onnx'"),
        (net(), torch.zeros(2, 5), {}, ModelError, r"does not run on the example inputs \(\(2, 5\)"),
        (net(), {"inptu": X}, {}, ModelError, "example inputs do not fit Sequential.forward"),
        (net(), (), {}, ModelError, "do not fit"),
        (net(), X, {"dynamic_axes": {"inputs": {0: "b"}}}, ModelError, "no such input. Did you mean 'input'"),
        (net(), X, {"dynamic_axes": {"input": {3: "b"}}}, ModelError, "opens dimension 3 of 'input', which has 2"),
        (ByValues(), X, {}, ModelError, "decides by the values of tensors"),
        (FixedBatch(), X, {}, ModelError, "fixes the size 'batch' to 4, and it is to be open"),
        (Counting(), X, {}, ModelError, "writes into 'count', and an exported file has no state"),
        (net(), X, {"dynamic_axes": {"input": [0]}}, ModelError, r"as in {'input': {0: 'batch'}}, got \[0\]"),
        (net().to("meta"), X, {}, ModelError, "'0.weight' has no values"),
        (net(), X, {"format": "peft"}, ModelError, "No layer of Sequential has an adapter"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if isinstance(value, type) else None,
)
def test_mistakes(model: nn.Module, inputs: Any, options: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export_model(model, inputs, tmp_path / "net", **{"format": "pt2", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_gives_nan(tmp_path: Path) -> None:
    broken = net()
    nn.init.constant_(broken[2].weight, float("nan"))
    with pytest.raises(ExportError, match="nothing but NaN"):
        export_model(broken, X, tmp_path / "net.pt2", "pt2")


def test_a_fixed_batch_can_be_exported_as_one(tmp_path: Path) -> None:
    result = export_model(FixedBatch(), X, tmp_path / "net.onnx", dynamic_axes={})
    assert result.max_error == 0.0


@pytest.mark.parametrize("kind", [name for name, exporter in EXPORTERS.items() if exporter.packages])
def test_a_missing_framework(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter: Exporter = EXPORTERS[kind]
    missing = exporter.packages[0]

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("pquant_lightning.backends.base.importlib.import_module", blocked)
    remedy = rf'pip install "pquant-lightning\[{exporter.extra}\]"'
    with pytest.raises(BackendUnavailable, match=rf"{missing}.*\n    {remedy}"):
        export_model(net(), X, tmp_path / "net", kind)
    assert issubclass(BackendUnavailable, ImportError)
    assert issubclass(BackendUnavailable, PQuantError)


def test_a_framework_that_is_really_missing() -> None:
    code = """
import sys
sys.modules["jax"] = None
from pquant_lightning import get_backend
try:
    get_backend("jax")
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "pquant-lightning[jax]"' in result.stdout


def test_require_gives_the_module() -> None:
    assert require("builtins", "all") is builtins


def test_unknown_backends_layers_and_weights() -> None:
    with pytest.raises(OptionError, match="no backend 'pytroch'. Did you mean 'pytorch'"):
        get_backend("pytroch")
    backend = get_backend("pytorch")
    with pytest.raises(OptionError, match="no layer type 'linaer'. Did you mean 'linear'"):
        backend.create_layer("linaer", {})
    with pytest.raises(OptionError, match="A layer 'low_rank_linear' cannot be made from.*it has no 'layer'"):
        get_backend("pytorch").create_layer("low_rank_linear", {"rank": 3})
    with pytest.raises(OptionError, match="A layer 'linear' cannot be made from"):
        backend.create_layer("linear", {"in_features": 3})
