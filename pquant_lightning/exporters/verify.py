"""Whether an artefact computes what the model does, and holds integers where the model has them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.backends.base import as_numpy
from pquant_lightning.backends.lowering.trace import Traced
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.exporters._noise import moved_values, rounding_layers
from pquant_lightning.exporters.base import Exporter, ExportError

FLOAT_TOLERANCE = 1e-4  # relative to the largest output
HALF_TOLERANCE = 3e-2  # of 16-bit floats
GRID_TOLERANCE = 1e-1  # of a format that has other grids than the model: one for a whole input, not for each row of it
_TRIALS = 3
_MARGIN = 2  # between what rounding does in a trial, and what it may do


class Difference(NamedTuple):
    """Of an artefact to the model in PyTorch.

    Attributes:
        largest: of all outputs, relative to the largest output.
        rms: root mean square, relative to the outputs' own.
        explained: the root mean square that rounding explains; None where nothing is rounded.
        rounding: the root mean square that the format's own grids make; None where it has none.
    """

    largest: float
    rms: float
    explained: float | None = None
    rounding: float | None = None


def compare(exporter: Exporter, path: Path, traced: Traced) -> Difference:
    """The largest differences to a model, over a batch of one and a larger one.

    A model of floats is compared by its largest difference. Where inputs of layers are rounded, the root mean square
    of the differences to what the format is to compute may be twice that of a trial, in which values change sides.

    Raises:
        ExportError: it is larger than the numbers explain.
    """
    run, batches = exporter.open(path, traced), other_inputs(traced)
    reference = exporter.reference(traced, path)
    rounds = any(rounding_layers(model, exporter.rounds_inputs) for model in (traced.model, reference))
    own, floor = [traced.run(inputs) for inputs in batches], float_tolerance(traced.model)
    for outputs in own:
        values = [tensor for tensor in outputs if tensor.numel()]
        if values and all(bool(tensor.isnan().all()) for tensor in values):
            raise ExportError("The model gives nothing but NaN on the example inputs; look at its weights.")
    limits, wanted = [[floor] * len(traced.outputs)] * len(batches), own
    if rounds:
        wanted = own if reference is traced.model else [traced.run(inputs, reference) for inputs in batches]
        trials = (_noise(exporter, reference, traced, *batch) for batch in zip(batches, wanted, strict=True))
        limits = [[floor + _MARGIN * found for found in noise] for noise in trials]
    largest, worst_rms = 0.0, 0.0
    for inputs, ours, expected, allowed in zip(batches, own, wanted, limits, strict=True):
        theirs = [numpy.asarray(found) for found in run(inputs)]
        for place, name in enumerate(traced.outputs):
            value = as_numpy(ours[place])
            far = _difference(value, theirs[place], rounds)
            off = _rms(as_numpy(expected[place]), theirs[place]) if rounds else far
            largest, worst_rms = max(largest, far), max(worst_rms, _rms(value, theirs[place]))
            for error, limit in ((off, allowed[place]), (far, GRID_TOLERANCE if rounds else floor)):
                if not error <= limit:
                    raise ExportError(_complaint(name, error, limit, inputs, rounds))
    rounding = None
    if wanted is not own:
        pairs = [pair for batch in zip(own, wanted, strict=True) for pair in zip(*batch, strict=True)]
        rounding = max((_rms(as_numpy(ours), as_numpy(theirs)) for ours, theirs in pairs), default=0.0)
    return Difference(largest, worst_rms, max(map(max, limits)) if rounds else None, rounding)


def _complaint(name: str, error: float, limit: float, inputs: list[Tensor], rounds: bool) -> str:
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    of = "size" if rounds and limit != GRID_TOLERANCE else "largest value"
    return (
        f"The exported file computes something else: output {name!r} differs by {error:.1e} of its {of} for inputs of "
        f"{shapes}; {limit:.0e} would be explained by rounding. Nothing was written; verify=False writes it all the "
        "same."
    )


def _noise(
    exporter: Exporter, reference: nn.Module, traced: Traced, inputs: list[Tensor], expected: list[Tensor]
) -> list[float]:
    """For each output the root mean square that it moves by, relative to its own; of all trials the most."""
    most = [0.0] * len(traced.outputs)
    for seed in range(_TRIALS):
        with moved_values(reference, seed, exporter.rounds_inputs):
            found = traced.run(inputs, reference)
        moves = (_rms(as_numpy(ours), as_numpy(moved)) for ours, moved in zip(expected, found, strict=True))
        most = [max(pair) for pair in zip(most, moves, strict=True)]
    return most


def _is_float(values: Any) -> bool:
    return numpy.issubdtype(values.dtype, numpy.floating) or values.dtype.name == "bfloat16"


def _difference(ours: Any, theirs: Any, rounds: bool) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if not _is_float(ours):
        share = float(numpy.mean(ours != theirs)) if ours.size else 0.0
        return 0.0 if rounds else share  # a class may change where logits are rounded
    ours, theirs = ours.astype(numpy.float64), theirs.astype(numpy.float64)
    same = (ours == theirs) | (numpy.isnan(ours) & numpy.isnan(theirs))
    if same.all():
        return 0.0
    scale = max(float(numpy.abs(ours[numpy.isfinite(ours)]).max(initial=0.0)), 1e-30)
    off = numpy.abs(ours[~same] - theirs[~same])
    return float(off.max() / scale) if numpy.isfinite(off).all() else float("inf")


def _rms(ours: Any, theirs: Any) -> float:
    """Root mean square of the differences, relative to that of `ours`; 0 where these are no floats."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not _is_float(ours):
        return 0.0
    ours, theirs = ours.astype(numpy.float64), theirs.astype(numpy.float64)
    differs = ~((ours == theirs) | (numpy.isnan(ours) & numpy.isnan(theirs)))
    off = numpy.linalg.norm(ours[differs] - theirs[differs])
    size = max(float(numpy.linalg.norm(ours[numpy.isfinite(ours)])), 1e-30)
    return float(off / size) if numpy.isfinite(off) else float("inf")


def float_tolerance(model: nn.Module) -> float:
    """How far another order of sums may lead, by the model's type."""
    kinds: set[torch.dtype] = {t.dtype for t in model.parameters()}
    likes = (getattr(layer, "like", None) for layer in compressed_layers(model).values())
    kinds |= {like.dtype for like in likes if isinstance(like, Tensor)}
    return HALF_TOLERANCE if kinds & {torch.float16, torch.bfloat16} else FLOAT_TOLERANCE


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
