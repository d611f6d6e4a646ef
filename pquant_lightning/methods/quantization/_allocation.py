"""Bits for layers: their sensitivities, and one budget of bits or bytes shared out by them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from pquant_lightning.core.affine import blocks, dequantize, unblock
from pquant_lightning.core.budget import allocate
from pquant_lightning.core.calibration import Samples, batch_size, first_samples
from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.compression_method import CompressionContext, relative_error
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import BudgetError, counted
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.plan import Candidate, Skip
from pquant_lightning.core.surgery import replace_layer
from pquant_lightning.methods.quantization._base import ALL_BITS, QuantizationMethod
from pquant_lightning.methods.quantization._grids import code_bits, nearest_codes, weight_grid
from pquant_lightning.methods.quantization._layers import TRAINING_KINDS, QuantLayer
from pquant_lightning.methods.quantization._sensitivity import Losses, fisher_losses, output_losses

log = logging.getLogger(__name__)

Sensitivity = Literal["output", "fisher"]


def checksum(layer: nn.Module) -> float:
    """Tells whether a weight has changed since its sensitivity was measured."""
    return float(weight_of_master(layer).detach().double().square().sum())


def weight_of_master(layer: nn.Module) -> Tensor:
    """The weight that is trained: not the rounded one."""
    weight = layer.weight if isinstance(layer, QuantLayer) else weight_of(layer)
    assert isinstance(weight, Tensor)
    return weight


def measure(
    method: QuantizationMethod,
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    context: CompressionContext,
    sensitivity: Sensitivity,
    count: int,
) -> Losses:
    """Sensitivities of layers for all bits: on samples, else the relative squared errors of their weights.

    Args:
        method: the quantization; its options say how weights would be rounded.
        model: holds the layers, or layers with the same parameters.
        layers: ordinary layers by name.
        context: of the plan.
        sensitivity: how to measure.
        count: samples to measure on.
    """

    def rounded(name: str, bits: int) -> Tensor:
        layer = as_torch(layers[name])
        assert layer is not None
        pinned = replace(context, notes={**context.notes, "bits": {name: bits}, "sensitivities": {}})
        spec = method.plan_layer(name, layer, pinned)
        assert not isinstance(spec, Skip)
        if spec["weight_quantizer"] == "lsq":  # where learned scales start
            spec = {**spec, "range": "mse"}
        weight, axis = weight_of(layer).detach(), TRAINING_KINDS[type(layer)].axis
        values = blocks(weight, axis, spec["group_size"])
        codes, scale, zero = nearest_codes(values, weight_grid(values, spec), code_bits(spec))
        return dequantize(unblock(codes, weight.shape, axis), scale, axis, zero)

    model, layers = _in_ordinary_form(model, layers)
    bits = [few for few in ALL_BITS if few < 16]
    weights = {n: weight_of(layer) for n, layer in layers.items() if isinstance(weight_of(layer), nn.Parameter)}
    if context.samples is None:
        log.info("No samples: how far %s can be rounded is judged by weights alone.", counted(len(layers), "layer"))
        losses = {
            name: {few: relative_error(weight.detach(), rounded(name, few)) ** 2 for few in bits}
            for name, weight in weights.items()
        }
    else:
        samples = at_most(context.samples, count)
        measured = output_losses if sensitivity == "output" else fisher_losses
        losses = measured(model, weights, bits, rounded, samples)
    return {name: {**found, 16: 0.0} for name, found in losses.items()}


def _in_ordinary_form(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[nn.Module, Mapping[str, nn.Module]]:
    """A view of the model in which layers of types that an adapter covers are the ordinary ones, and all the layers.

    Their weights may lie another way round than those that are rounded.
    """
    adapted = {name: new for name, old in layers.items() if (new := as_torch(old)) is not None and new is not old}
    if not adapted:
        return model, layers
    view = share_copy(model)
    for name, ordinary in adapted.items():
        replace_layer(view, name, ordinary)
    return view, {**layers, **adapted}


def choices_of(
    method: QuantizationMethod, layers: Mapping[str, nn.Module], context: CompressionContext, losses: Losses
) -> tuple[dict[str, list[Candidate]], dict[str, str]]:
    """What the budget chooses from, once for each weight; and for every layer the one that speaks for its weight."""
    owners: dict[int, str] = {}
    weights = {name: weight_of(as_torch(layer) or layer) for name, layer in layers.items()}  # kept: ids may come again
    owner_of = {name: owners.setdefault(id(weight), name) for name, weight in weights.items()}
    noted = replace(context, notes={**context.notes, "sensitivities": losses})
    return {name: method.candidates(name, layers[name], noted) for name in owners.values()}, owner_of


def at_most(samples: Samples, count: int) -> Samples:
    """The first `count` samples."""
    batches: list[Any] = []
    for batch in samples.batches:
        left = count - sum(map(batch_size, batches))
        if left > 0:
            batches.append(first_samples(batch, left) if batch_size(batch) > left else batch)
    return replace(samples, batches=tuple(batches))


def share_bits(choices: Mapping[str, Sequence[Candidate]], average: float) -> dict[str, int]:
    """Bits for each layer, at most `average` per weight, for the least sum of losses.

    Raises:
        BudgetError: it cannot be met; the message says what can.
    """
    weights = sum(offers[0].macs for offers in choices.values())
    least = sum(min(c.options["bits"] * c.macs for c in offers) for offers in choices.values()) / weights
    if least > average + 1e-9:
        raise BudgetError(
            f"average_bits={average:g} cannot be met: with the fewest bits that each of the {len(choices)} layers may "
            f"have the average is {least:.3g}. Give at least that, more choices, or fewer layers pinned by overrides."
        )
    return _chosen(allocate(choices, average * weights, lambda c: float(c.options["bits"] * c.macs)))


def share_bytes(choices: Mapping[str, Sequence[Candidate]], megabytes: float, rest: int) -> dict[str, int]:
    """Bits for each layer such that these and the `rest` bytes of the model take at most so many megabytes (10**6).

    Raises:
        BudgetError: it cannot be met; the message says what can.
    """
    least = rest + sum(min(c.size_bytes for c in offers) for offers in choices.values())
    if least > megabytes * 1e6:
        raise BudgetError(
            f"target_size_mb={megabytes:g} cannot be met: {rest / 1e6:.4g} MB are not quantized, and with the fewest "
            f"bits in the {len(choices)} layers the model takes {least / 1e6:.4g} MB. Give at least that, more "
            "choices, or quantize more layers (include, exclude)."
        )
    return _chosen(allocate(choices, megabytes * 1e6 - rest, lambda c: float(c.size_bytes)))


def _chosen(found: Mapping[str, Candidate]) -> dict[str, int]:
    bits = {name: int(candidate.options["bits"]) for name, candidate in found.items()}
    shown = ", ".join(
        f"{count} bits in {counted(list(bits.values()).count(count), 'layer')}" for count in sorted(set(bits.values()))
    )
    log.info("Bits of the weights: %s", shown)
    return bits
