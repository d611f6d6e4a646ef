"""Which format an export is of: by its name, by a runtime's name, or by the ending of the path; imports no torch."""

from pathlib import Path

from pquant_lightning.core.errors import OptionError, known

ENDINGS = {
    "onnx": ".onnx",
    "pt2": ".pt2",
    "safetensors": ".safetensors",
    "tensorflow": None,
    "tflite": ".tflite",
    "jax": None,
    "peft": None,
}
"""The formats of `export_model`, with the ending of their file; None where a directory is written."""

DEFAULT = "onnx"
"""The format where neither a name nor an ending says one."""

OTHER_NAMES = {
    "onnxruntime": "onnx",
    "ort": "onnx",
    "exported_program": "pt2",
    "torch_export": "pt2",
    "litert": "tflite",
    "tensorflow_lite": "tflite",
    "tf_lite": "tflite",
    "savedmodel": "tensorflow",
    "saved_model": "tensorflow",
    "tf": "tensorflow",
    "stablehlo": "jax",
}
"""Other names of the formats, runtimes among them."""

_READS = {
    "openvino": "OpenVINO reads ONNX: export to 'onnx'",
    "tensorrt": "TensorRT reads ONNX: export to 'onnx'",
    "trt": "TensorRT reads ONNX: export to 'onnx'",
    "directml": "DirectML runs ONNX files: export to 'onnx'",
    "tvm": "TVM reads ONNX: export to 'onnx'",
    "coreml": "coremltools converts exported programs of torch: export to 'pt2'",
    "executorch": "ExecuTorch starts from exported programs of torch: export to 'pt2'",
    "torchscript": "torch.export has taken the place of TorchScript: export to 'pt2'",
    "keras": "Keras opens a SavedModel (keras.layers.TFSMLayer): export to 'tensorflow', or use to_keras(model)",
    "gguf": "no format here leads to GGUF",
    "state_dict": "a state dict is written by save_compressed(model, 'name.pt')",
}
"""Runtimes and formats that are not written, and what leads to them."""

_FOREIGN_ENDINGS = {
    ".pt": "state_dict",
    ".pth": "state_dict",
    ".ckpt": "state_dict",
    ".xml": "openvino",
    ".engine": "tensorrt",
    ".plan": "tensorrt",
    ".mlmodel": "coreml",
    ".mlpackage": "coreml",
    ".pte": "executorch",
    ".keras": "keras",
    ".h5": "keras",
    ".gguf": "gguf",
}


def format_named(name: str) -> str:
    """The format of a name or of a runtime's name.

    Raises:
        OptionError: there is none; the message says which format leads to a runtime that is known.

    >>> format_named("LiteRT"), format_named("onnx")
    ('tflite', 'onnx')
    """
    word = str(name).strip().lower().removeprefix(".").replace("-", "_").replace(" ", "_")
    if word in _READS:
        raise OptionError(f"{name!r} is not a format that is written here: {_READS[word]}.")
    if (found := OTHER_NAMES.get(word, word)) not in ENDINGS:
        raise OptionError(f"There is no format {name!r}. {known(word, [*ENDINGS, *OTHER_NAMES])}")
    return found


def choose_format(path: str | Path, name: str | None = None) -> str:
    """The format of an export: what the ending of the path says and, if it says nothing, what is asked for.

    Args:
        path: where the export goes.
        name: a format, or a runtime's name; None leaves it to the ending, and to `DEFAULT` where there is no ending.

    Raises:
        OptionError: the ending and the name contradict each other, or an ending is of no format.

    >>> choose_format("net.tflite"), choose_format("net", "litert"), choose_format("net")
    ('tflite', 'tflite', 'onnx')
    """
    wanted = None if name is None else format_named(name)
    ending = Path(path).suffix.lower()
    owner = next((entry for entry, own in ENDINGS.items() if own == ending), None)
    if wanted is None:
        if owner is None and ending in _FOREIGN_ENDINGS:
            raise OptionError(f"No export writes {ending} files: {_READS[_FOREIGN_ENDINGS[ending]]}.")
        if owner is None and ending:
            raise OptionError(f"The ending of {Path(path).name!r} is that of no format. {_rule()}")
        return owner or DEFAULT
    if owner not in (None, wanted) or ending in _FOREIGN_ENDINGS:
        of = f"is that of {owner!r}" if owner else "is that of another format"
        own = ENDINGS[wanted]
        remedy = f"name the file {Path(path).stem + own!r}" if own else f"name a directory, such as {Path(path).stem!r}"
        also = f", or ask for {owner!r}" if owner else ""
        raise OptionError(
            f"The ending of {Path(path).name!r} {of}, and the format asked for is {wanted!r}: {remedy}{also}."
        )
    return wanted


def _rule() -> str:
    files = ", ".join(f"{own} ({name})" for name, own in ENDINGS.items() if own is not None)
    folders = ", ".join(repr(name) for name, own in ENDINGS.items() if own is None)
    return f"Give a file one of the endings {files}, or say format=...; {folders} are written as directories."
