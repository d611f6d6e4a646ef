"""Rounding the weights of a model's layers by what their inputs are: moments in passes, then layers alike together."""

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pquant_lightning.core.affine import blocks
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.errors import counted, named
from pquant_lightning.core.moments import InputMoments, MomentSource
from pquant_lightning.methods.quantization._adaround import adaround_codes
from pquant_lightning.methods.quantization._gptq import gptq_codes
from pquant_lightning.methods.quantization._grids import Rounded, code_bits, weight_grid
from pquant_lightning.methods.quantization._layers import QuantLayer

log = logging.getLogger(__name__)

_BATCH_BYTES = 2**26  # of the moments of layers that are rounded at a time


@dataclass(frozen=True)
class DataRounding:
    """GPTQ's options, see `PTQCompression`."""

    act_order: bool
    damping: float


def round_with_data(
    model: nn.Module, layers: dict[str, QuantLayer], samples: Samples, options: DataRounding, max_bytes: int
) -> None:
    """Sets `rounded` of the layers by GPTQ or AdaRound, as their specs say.

    Layers that the samples do not reach keep the nearest codes of HQQ's grid.

    Args:
        model: holds the layers.
        layers: Linear and convolutions, by name.
        samples: what the moments are computed on.
        options: of GPTQ.
        max_bytes: moments held at a time.
    """
    source = MomentSource(model, list(layers), samples, max_bytes)
    if source.blocks:
        log.info(
            "Second moments of the inputs do not fit into %s bytes: they are measured in %d blocks.",
            f"{max_bytes:,}",
            len(source.blocks),
        )
    elif (passes := len(source.parts)) > 1:
        log.info(
            "Second moments of the inputs do not fit into %s bytes: %d passes over the samples.",
            f"{max_bytes:,}",
            passes,
        )
    scarce: list[tuple[str, int, int]] = []  # layer, vectors seen, their dimensions
    for part in source.parts:
        moments = {name: found for name in part if (found := source.get(name)) is not None}
        sizes = {name: found.width for name, found in moments.items()}
        scarce += [(name, source.counts[name], size) for name, size in sizes.items() if source.counts[name] < size]
        for alike in _alike({name: layers[name] for name in moments}):
            _round([layers[name] for name in alike], [moments[name] for name in alike], options)
    if missed := [name for name in layers if name not in source.counts]:
        log.warning("The samples never reach %s: rounded without data, by HQQ.", named(missed))
    if scarce:
        name, count, size = scarce[0]
        log.warning(
            "%s saw fewer input vectors than a vector has entries (%r: %d for %d): damping (%g of the mean diagonal) "
            "makes up for the rest. More samples (num_samples) would serve the rounding.",
            counted(len(scarce), "layer"),
            name,
            count,
            size,
            options.damping,
        )


def _alike(layers: dict[str, QuantLayer]) -> list[list[str]]:
    """Names of layers that can be rounded together: equal shapes and grids, as many as keep memory bounded."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        keys = ("group_size", "zero_point")
        shape = (layer.weight.shape[0], layer.weight[0].numel(), getattr(layer, "groups", 1))
        found[(*shape, layer.weight.device, code_bits(layer.spec), *(layer.spec[key] for key in keys))].append(name)
    batches = []
    for (_, inputs, groups, *_), names in found.items():
        size = max(1, _BATCH_BYTES // (4 * groups * inputs**2))
        batches += [names[first : first + size] for first in range(0, len(names), size)]
    return batches


def _round(layers: list[QuantLayer], moments: list[InputMoments], options: DataRounding) -> None:
    spec = layers[0].spec
    groups = len(moments[0].mean)
    values = torch.cat([blocks(layer.weight.detach(), 0, spec["group_size"]) for layer in layers])
    scale, zero = weight_grid(values, {**spec, "range": "mse"})  # HQQ's grid costs more and gains nothing here
    centered = [_is_centered(layer) for layer in layers]
    moment = torch.cat([m.covariance if c else m.second for m, c in zip(moments, centered, strict=True)])

    def each(tensor: Any) -> Any:  # (layers * out, ...) to (layers * groups, out / groups, ...)
        return None if tensor is None else tensor.flatten(1).unflatten(0, (len(layers) * groups, -1))

    problem = (each(values), moment, each(scale), each(zero), code_bits(spec))
    learned = spec["rounding"] == "adaround"
    codes = adaround_codes(*problem) if learned else gptq_codes(*problem, options.act_order, options.damping)
    parts = codes.flatten(0, 1).chunk(len(layers))
    zeros = [None] * len(layers) if zero is None else zero.chunk(len(layers))
    for layer, part, own_scale, own_zero in zip(layers, parts, scale.chunk(len(layers)), zeros, strict=True):
        layer.rounded = Rounded(
            part.reshape(layer.weight.shape).to(torch.int8),
            own_scale.clone(),
            None if own_zero is None else own_zero.clone(),
        )


def _is_centered(layer: QuantLayer) -> bool:
    """Bias correction takes the mean error away, exactly where the inputs are not padded: only the rest counts."""
    return bool(layer.spec["correct_bias"]) and isinstance(layer, nn.Linear)
