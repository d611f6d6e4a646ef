"""`export_model`: a finalized copy of a model in another format, opened again and compared."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from pquant_lightning.backends.lowering.trace import Axes, trace
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.deploy import dense_form
from pquant_lightning.core.errors import OptionError, known
from pquant_lightning.core.options import check_model
from pquant_lightning.exporters.base import Exporter, ExportError, ExportResult, appearing, size_of
from pquant_lightning.exporters.formats import choose_format
from pquant_lightning.exporters.jax import JaxExporter
from pquant_lightning.exporters.onnx import OnnxExporter
from pquant_lightning.exporters.peft import PeftExporter
from pquant_lightning.exporters.pt2 import Pt2Exporter
from pquant_lightning.exporters.safetensors import SafetensorsExporter
from pquant_lightning.exporters.tensorflow import TensorFlowExporter
from pquant_lightning.exporters.tflite import TfliteExporter
from pquant_lightning.exporters.verify import check_integers, compare

EXPORTERS: dict[str, Exporter] = {
    "onnx": OnnxExporter(),
    "pt2": Pt2Exporter(),
    "safetensors": SafetensorsExporter(),
    "tensorflow": TensorFlowExporter(),
    "tflite": TfliteExporter(),
    "jax": JaxExporter(),
    "peft": PeftExporter(),
}


def export_model(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    format: str | None = None,  # noqa: A002 (the name in the specification)
    *,
    dynamic_axes: Axes | None = None,
    verify: bool = True,
    overwrite: bool = False,
    target: str | None = None,
    accuracy_level: int | None = None,
) -> ExportResult:
    """Writes a model in a format that other runtimes read; the compression stays in it.

    A copy is finalized first: adapters are merged, masks baked, fake quantization becomes integers. Factors stay
    factored, integer weights are integers in the file.

    | format | what | weights of 8 bits | of 2 to 6 bits |
    |---|---|---|---|
    | "onnx" | a file for onnxruntime | integer operations | `MatMulNBits` of 2, 4 or 8 bits, the next width |
    | "pt2" | `torch.export.save` | int8 | packed |
    | "safetensors" | our own file, for `load_compressed` | int8 | packed |
    | "tensorflow" | a SavedModel of ordinary operations | int8 | packed |
    | "tflite" | a file for LiteRT | int8, inputs quantized by the runtime | no |
    | "jax" | StableHLO, parameters, and a description | int8 | packed |
    | "peft" | adapters, in Hugging Face's format | as the base has them | as the base has them |

    In onnxruntime a dynamic grid is that of a whole input tensor, all samples of the batch together, where PyTorch has
    one for each row or sample: a sample with values far larger than the others' makes these coarser.

    Args:
        model: training form or deployed form; not touched.
        example_inputs: what `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        path: the file, or the directory for "tensorflow", "jax" and "peft".
        format: one of those in the table, or the name of its runtime ("litert", "onnxruntime", "saved_model"). None
            means what the ending of the path says, and "onnx" where there is no ending.
        dynamic_axes: by the name of an input, the names of its open sizes by dimension, e.g.
            `{"input_ids": {0: "batch", 1: "tokens"}}`. None leaves the batch open.
        verify: opens the artefact in its own runtime and compares it with the model, on two batch sizes.
        overwrite: replace what is at the path: a file, or the directory of an earlier export of this format.
        target: of "onnx", the processors that the file is for. "any" (None means this, too) computes the same on all
            of them: codes whose products saturate without VNNI are stored as unsigned ones, which takes a quarter
            longer. "vnni" keeps them signed, which is right only on processors with VNNI. Weights that were quantized
            with `reduce_range` (the default) never saturate, and are the same for both.
        accuracy_level: of "onnx", for linear layers of which only the weights are quantized (`MatMulNBits`). 4 (None
            means this, too) rounds their inputs to 8 bits by blocks, and runs several times faster; what it costs is
            `rounding_error` of the result. 0 leaves inputs as they are: 4-bit weights run as fast as in floating
            point, others are unpacked as the file runs.

    Returns:
        What was written, and how far it is from the model.

    Raises:
        BackendUnavailable: the format's packages are not installed.
        OptionError: there is no such format or target, the format has no choice of target, or the ending of the path
            is that of another format.
        ModelError: the model cannot be traced.
        UnsupportedOperationError: it has operations that the format has no counterpart for.
        ExportError: the path exists or cannot be written, the format has no type for the weights, or the artefact
            computes something else.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = export_model(nn.Linear(4, 2), torch.zeros(1, 4), f"{folder}/net.pt2", "pt2")
    >>> result.integer_weights, result.max_error < 1e-5
    (False, True)
    """
    check_model("export_model", model)
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"export_model takes a path as text or pathlib.Path, got {path!r}.")
    format = choose_format(path, format)  # noqa: A001
    exporter, path = chosen_exporter(format, target=target, accuracy_level=accuracy_level), Path(path)
    exporter.check_installed()
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; choose another path, or give overwrite=True.")
    if path.is_dir() and not (exporter.is_directory and (path / exporter.marker).exists()) and any(path.iterdir()):
        raise ExportError(f"{path} is a directory that holds something else than an export; choose another path.")
    if path.is_file() and exporter.is_directory:
        raise ExportError(f"{path} is a file, and {format} writes a directory; choose another path.")
    traced = trace(model, example_inputs, dynamic_axes, exporter.twin, exporter.finalizes)
    _check_bits(exporter, format, traced.model)
    with appearing(path, exporter.is_directory) as temporary:
        exporter.write(traced, temporary)
        integers = check_integers(exporter, temporary, traced)
        found = compare(exporter, temporary, traced) if verify else None
    size = size_of(path)
    ratio = size / max(_float32_bytes(model), 1)
    about: dict[str, Any] = exporter.described(traced.model)
    if found is not None:
        about |= {"max_error": found.largest, "rms_error": found.rms, "rounding_error": found.rounding}
    about |= {"inputs": traced.inputs, "outputs": traced.outputs, "integer_weights": integers}
    return ExportResult(path, format, size, ratio, **{"max_error": None, **about})


def chosen_exporter(format: str, **given: Any) -> Exporter:  # noqa: A002
    """The exporter of a format with what was chosen; None chooses nothing.

    Raises:
        OptionError: the format has no such choice, or no such value.

    >>> chosen_exporter("onnx", target="vnni").described(nn.Identity())["target"]
    'vnni'
    """
    exporter, wanted = EXPORTERS[format], {name: value for name, value in given.items() if value is not None}
    for name, value in wanted.items():
        if name not in exporter.choices:
            having = ", ".join(repr(other) for other, found in EXPORTERS.items() if name in found.choices)
            raise OptionError(f"{name}={value!r} is a choice of {having}; {format!r} has none. Leave it out.")
        if value not in exporter.choices[name]:
            raise OptionError(f"There is no {name} {value!r}. {known(value, map(str, exporter.choices[name]))}")
    return exporter.chosen(**wanted) if wanted else exporter


def _check_bits(exporter: Exporter, format: str, model: nn.Module) -> None:  # noqa: A002
    for name, layer in compressed_layers(model).items():
        bits = layer.spec.get("bits")
        if layer.deployed and bits is not None and bits not in exporter.bits:
            others = [other for other, found in EXPORTERS.items() if bits in found.bits]
            raise ExportError(
                f"{format} has no type for weights of {bits} bits, as layer {name!r} has them. Quantize to "
                f"{' or '.join(map(str, exporter.bits))} bits, or export to {', '.join(map(repr, others))}."
            )


def _float32_bytes(model: nn.Module) -> int:
    dense = dense_form(model)
    return 4 * sum(t.numel() for t in {id(t): t for t in (*dense.parameters(), *dense.buffers())}.values())
