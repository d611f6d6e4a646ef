"""The format of an export: what the ending says, what a runtime's name means, and that both agree."""

from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import PQuantError, export_model
from pquant_lightning.core.errors import OptionError
from pquant_lightning.exporters.export import EXPORTERS
from pquant_lightning.exporters.formats import ENDINGS, OTHER_NAMES, choose_format


@pytest.mark.parametrize("name", ENDINGS)
def test_the_table_is_that_of_the_exporters(name: str) -> None:
    assert list(ENDINGS) == list(EXPORTERS)
    assert EXPORTERS[name].is_directory == (ENDINGS[name] is None)
    assert set(OTHER_NAMES.values()) <= set(EXPORTERS)


@pytest.mark.parametrize(("name", "ending"), [item for item in ENDINGS.items() if item[1] is not None])
def test_the_ending_decides(name: str, ending: str) -> None:
    assert choose_format(f"net{ending}") == choose_format(f"NET{ending.upper()}") == name
    assert choose_format(f"net{ending}", name) == name
    for other in set(ENDINGS) - {name}:
        with pytest.raises(OptionError, match=f"is that of '{name}', and the format asked for is '{other}'"):
            choose_format(f"net{ending}", other)


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("net.pth", None, r"save_compressed\(model, 'name.pt'\)"),
        ("net.keras", "onnx", "is that of another format"),
        ("net.xml", None, "OpenVINO reads ONNX"),
        ("net.foo", None, "is that of no format.*'tensorflow', 'jax', 'peft' are written as directories"),
        ("net", "TensorRT", "TensorRT reads ONNX: export to 'onnx'"),
        ("net", "onxn", "Did you mean 'onnx'"),
        ("net", "lite-rt", "Did you mean 'litert'"),
    ],
)
def test_what_is_not_written_is_answered(path: str, name: str | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        choose_format(path, name)


def test_runtimes_are_understood() -> None:
    assert choose_format("net", "LiteRT") == choose_format("net", "tensorflow-lite") == "tflite"
    assert choose_format("net", "SavedModel") == choose_format("net", "saved model") == "tensorflow"
    assert choose_format("net") == choose_format("net", "onnxruntime") == "onnx"


def test_a_file_is_what_its_name_says(tmp_path: Any) -> None:
    net, x = nn.Linear(4, 2), torch.randn(3, 4)
    result = export_model(net, x, tmp_path / "net.pt2")
    assert result.format == "pt2"
    torch.testing.assert_close(torch.export.load(result.path).module()(x), net(x))
    with pytest.raises(PQuantError, match="net.tflite"):
        export_model(net, x, tmp_path / "net.tflite", "onnx")
    assert not (tmp_path / "net.tflite").exists()
