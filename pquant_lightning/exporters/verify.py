"""Whether an artefact computes what the model does, and holds integers where the model has them."""

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.backends.base import as_numpy
from pquant_lightning.backends.lowering.trace import Traced
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.exporters.base import Exporter, ExportError

FLOAT_TOLERANCE = 1e-4  # relative to the largest output
HALF_TOLERANCE = 3e-2  # of 16-bit floats
ROUNDED_TOLERANCE = 1e-1  # where inputs of layers are rounded: values beside a step may fall on its other side


def compare(exporter: Exporter, path: Path, traced: Traced) -> float:
    """The largest difference relative to the largest output, over a batch of one and a larger one.

    Raises:
        ExportError: it is larger than the numbers explain.
    """
    run, limit, worst = exporter.open(path, traced), tolerance(exporter, traced.model), 0.0
    for inputs in other_inputs(traced):
        expected = traced.run(inputs)
        values = [tensor for tensor in expected if tensor.numel()]
        if values and all(bool(tensor.isnan().all()) for tensor in values):
            raise ExportError("The model gives nothing but NaN on the example inputs; look at its weights.")
        found = run(inputs)
        for name, ours, theirs in zip(traced.outputs, expected, found, strict=True):
            error = _difference(as_numpy(ours), numpy.asarray(theirs), limit)
            worst = max(worst, error)
            if not error <= limit:
                shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
                raise ExportError(
                    f"The exported file computes something else: output {name!r} differs by {error:.1e} of its largest "
                    f"value for inputs of {shapes}; {limit:.0e} would be explained by rounding. Nothing was written; "
                    "verify=False writes it all the same."
                )
    return worst


def _difference(ours: Any, theirs: Any, limit: float) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if not numpy.issubdtype(ours.dtype, numpy.floating) and ours.dtype.name != "bfloat16":
        share = float(numpy.mean(ours != theirs)) if ours.size else 0.0
        return 0.0 if limit > FLOAT_TOLERANCE else share  # a class may change where logits are rounded
    ours, theirs = ours.astype(numpy.float64), theirs.astype(numpy.float64)
    same = (ours == theirs) | (numpy.isnan(ours) & numpy.isnan(theirs))
    if same.all():
        return 0.0
    scale = max(float(numpy.abs(ours[numpy.isfinite(ours)]).max(initial=0.0)), 1e-30)
    off = numpy.abs(ours[~same] - theirs[~same])
    return float(off.max() / scale) if numpy.isfinite(off).all() else float("inf")


def tolerance(exporter: Exporter, model: nn.Module) -> float:
    """How far an artefact may be from a model, relative to the largest output."""
    quantized = [layer.spec for layer in compressed_layers(model).values() if "bits" in layer.spec]
    if any(spec.get("act") or exporter.rounds_inputs for spec in quantized):
        return ROUNDED_TOLERANCE
    if any(t.dtype in (torch.float16, torch.bfloat16) for t in model.parameters()):
        return HALF_TOLERANCE
    return FLOAT_TOLERANCE


def other_inputs(traced: Traced) -> list[list[Tensor]]:
    """Inputs for which the artefact is compared: the example with a batch of one, and with larger open sizes."""
    sizes: dict[str, int] = {}
    first = set()
    for name, tensor in zip(traced.inputs, traced.tensors, strict=True):
        for axis, symbol in traced.axes[name].items():
            sizes[symbol] = tensor.shape[axis]
            if axis == 0:
                first.add(symbol)
    if not sizes:
        return [traced.tensors]
    small = {symbol: 1 if symbol in first else size for symbol, size in sizes.items()}
    large = {symbol: min(2 * size + 1, traced.largest.get(symbol, 2**31)) for symbol, size in sizes.items()}
    return [_resized(traced, wanted) for wanted in (small, large)]


def _resized(traced: Traced, wanted: dict[str, int]) -> list[Tensor]:
    found = []
    for name, tensor in zip(traced.inputs, traced.tensors, strict=True):
        for axis, symbol in traced.axes[name].items():
            tensor = _repeated(tensor, axis, wanted[symbol])
        found.append(tensor.contiguous())
    return found


def _repeated(tensor: Tensor, axis: int, size: int) -> Tensor:
    """With so many values along a dimension: its own, and then its own backwards, and so on."""
    count = -(-size // tensor.shape[axis])
    return torch.cat([tensor if i % 2 == 0 else tensor.flip(axis) for i in range(count)], axis).narrow(axis, 0, size)


def check_integers(exporter: Exporter, path: Path, traced: Traced) -> bool:
    """Whether weights are integers in the artefact.

    Raises:
        ExportError: the model's integer weights have become floating point.
    """
    kinds = exporter.weight_types(path).values()
    stored, total = sum(size for kind, size in kinds if is_integer(kind)), sum(size for _, size in kinds)
    layers = {name: layer for name, layer in compressed_layers(traced.model).items() if layer.deployed}
    wanted = _integer_bytes(exporter, layers)
    if stored < wanted:  # layers that forward does not call may be missing
        layers = {k: layer for k, layer in layers.items() if any(n.startswith(f"{k}.") for n in traced.used)}
        wanted = _integer_bytes(exporter, layers)
    if stored < wanted and total > 1.1 * stored_bytes(traced.model):  # what a graph makes constant it may leave out
        raise ExportError(
            f"The file holds {stored:,} bytes of integers, and the integer weights of the model take {wanted:,}: the "
            "format has turned some into floating point. Leave such layers out (exclude=[...]; in tflite these are "
            "grouped and 3-d convolutions), or choose another format. Nothing was written."
        )
    return wanted > 0


def _integer_bytes(exporter: Exporter, layers: dict[str, Any]) -> int:
    codes = {id(t): t for layer in layers.values() for t in _codes(layer)}.values()  # tied ones once
    return sum(t.numel() * t.element_size() for t in codes if t.numel() >= exporter.least_integers)


def _codes(layer: nn.Module) -> list[Tensor]:
    return [t for t in layer.buffers(recurse=False) if t.dtype in (torch.int8, torch.uint8)]


def is_integer(kind: str) -> bool:
    """Whether a type's name is that of integers of up to 8 bits."""
    return kind.lower().removeprefix("u") in ("int8", "int4", "int2", "i8") or kind.lower() == "u8"
