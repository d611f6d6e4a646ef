"""Quantization-aware training: weights and inputs are rounded in the forward, gradients pass straight through."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import OptionError, counted, named
from pquant_lightning.core.plan import CompressionPlan
from pquant_lightning.core.reduction import is_distributed, reduced
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.schedule import scheduled
from pquant_lightning.methods.quantization._allocation import choices_of, measure, share_bits
from pquant_lightning.methods.quantization._base import QuantizationMethod, check_average_bits
from pquant_lightning.methods.quantization._folding import norm_of
from pquant_lightning.methods.quantization._forms import FLOAT
from pquant_lightning.methods.quantization._layers import QuantLayer

log = logging.getLogger(__name__)

_LEARNS_BELOW = 5  # bits below which quantizer="auto" learns scales


@dataclass
class _Parts:
    """What `step` looks at in one fit.

    Attributes:
        layers: those that train.
        norms: batch norms behind them.
        unsettled: layers whose learned input scale starts from the first batch of each process, until all processes
            have agreed on it; None before the first step.
    """

    layers: list[QuantLayer]
    norms: list[nn.Module]
    unsettled: list[QuantLayer] | None = None


_PARTS: "WeakKeyDictionary[nn.Module, _Parts]" = WeakKeyDictionary()


@CompressionMethodRegistry.register("qat")
class QATCompression(QuantizationMethod):
    """Quantization-aware training of Linear, Conv, ConvTranspose and Embedding layers, from the start of fit.

    Weights are rounded per output channel, symmetric; inputs per tensor, affine (embeddings: weights only). Ranges of
    inputs start from calibration on training data, where the model can be run on it, else from the first batch. Norms,
    softmax and biases stay in floating point. `finalize` turns the weights into integers, and folds batch norms into
    the layer before them: a scale per channel commutes with the norm's factor per channel, so that the codes are those
    that training has seen.

    Args:
        bits: bits of weights and inputs, 2 to 8; 16 leaves them in floating point.
        weight_bits: bits of the weights where they differ from `bits`.
        act_bits: bits of the inputs where they differ from `bits`.
        quantizer: "ste" rounds weights on the scale of their largest magnitude and inputs on a moving range; "lsq"
            learns the scales (LSQ), and the zero point of inputs (LSQ+); "pact" learns the clipping level of inputs;
            "auto" is "lsq" below 5 bits, else "ste". Weights that layers share are rounded by "ste".
        start: share of the training after which rounding begins.
        initial_bits: bits to begin with, lowered one by one to the target.
        end: share of the training after which the target is reached, with `initial_bits`.
        freeze_observers: share of the training after which moving ranges stand still.
        freeze_norms: share of the training after which the statistics of the batch norms behind quantized layers stand
            still, and the norms compute what deployment will.
        scale_lr: learning rate of learned scales, relative to that of the weights; they have no weight decay.
        average_bits: bits per weight on average, shared out over the layers by what rounding each does to the output
            of the model at the start of fit (see `MixedPrecisionCompression`), instead of equal ones.
        overrides: bits of single layers: glob patterns over module names to `bits`, `weight_bits` or `act_bits`; the
            last pattern that matches counts, e.g. `{"head": {"bits": 8}}`. A weight that layers share has one number
            of bits: patterns for any of them count.
        first_last_bits: at least so many bits in the first and the last layer, in models of three layers or more. None
            means 8, or what `average_bits` gives them.
        observer: how a range of inputs is chosen from calibration: "histogram" and "mse" for the least squared error
            (each end by itself, or both alike), "minmax", "moving_average" of the batches' extremes, "percentile"
            (99.999), "entropy".
        num_samples: samples of the training data to calibrate on; 0 starts from the first batch.
        reduce_range: 8-bit weights keep to the codes -63 .. 63 where inputs have 8 bits too, so that processors without
            VNNI multiply them exactly at full speed: they add two products in 16 bits. False takes all codes, for half
            of the rounding error of the weights, and about half of the speed on such processors.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: bits outside 2..8 (or 16), 16 for both, or shares of the training outside [0, 1] or out of order.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, section 3. We differ: a weight's scale is that of its largest magnitude, so that nothing is clipped.
        Esser et al., "Learned Step Size Quantization", 2020. Bhalgat et al., "LSQ+", 2020. Choi et al., "PACT", 2018.

    >>> QATCompression(bits=4).plan(nn.Sequential(nn.Linear(64, 32))).layers[0].spec["weight_quantizer"]
    'lsq'
    """

    quantizer: Literal["auto", "ste", "lsq", "pact"] = "auto"
    start: float = 0.0
    initial_bits: int | None = None
    end: float = 0.5
    freeze_observers: float = 0.5
    freeze_norms: float = 0.7
    scale_lr: float = 0.1
    average_bits: float | None = None

    trains = True

    @property
    def completes_at(self) -> float:
        return self.start if self.initial_bits is None else self.end

    def validate_config(self) -> None:
        super().validate_config()
        for option in ("start", "end", "freeze_observers", "freeze_norms"):
            if not 0 <= getattr(self, option) <= 1:
                raise OptionError(
                    f"QATCompression: {option} is a share of the training in [0, 1], got {getattr(self, option)}."
                )
        if self.start == 1:
            raise OptionError("QATCompression: start=1 would never round anything; start earlier.")
        if self.average_bits is not None:
            check_average_bits(type(self), self.average_bits)
            if self.weight_bits is not None:
                raise OptionError(
                    "QATCompression: average_bits chooses the bits of weights and goes without weight_bits, got "
                    f"average_bits={self.average_bits}, weight_bits={self.weight_bits}."
                )
        if self.scale_lr <= 0:
            raise OptionError(f"QATCompression: scale_lr is a positive factor, got {self.scale_lr}.")
        if self.initial_bits is not None and not 2 <= self.initial_bits <= 8:
            raise OptionError(f"QATCompression: initial_bits is an int in 2..8, got {self.initial_bits}.")
        if self.initial_bits is not None and self.end <= self.start:
            raise OptionError(
                f"QATCompression: bits are lowered between start and end, got start={self.start}, end={self.end}."
            )

    def bits_of(self, name: str, is_end: bool, sharing: Sequence[str] = ()) -> tuple[int, int]:
        protected = is_end and not (self.average_bits is not None and self.first_last_bits is None)
        return super().bits_of(name, protected, sharing)

    def shared_bits(
        self, model: nn.Module, layers: dict[str, nn.Module], context: CompressionContext
    ) -> dict[str, Any]:
        if self.average_bits is None:
            return {}
        losses = measure(self, model, layers, context, "fisher", 32)
        choices, owner_of = choices_of(self, layers, context, losses)
        bits = share_bits(choices, self.average_bits)
        return {"sensitivities": losses, "bits": {name: bits[owner] for name, owner in owner_of.items()}}

    def layer_options(self, layer: nn.Module, spec: dict[str, Any], context: CompressionContext) -> dict[str, Any]:
        def chosen(bits: int) -> str:
            return ("lsq" if bits < _LEARNS_BELOW else "ste") if self.quantizer == "auto" else self.quantizer

        alone = id(layer.weight) not in context.notes.get("tied", ())  # layers that share a weight come to one scale
        learnable = spec["bits"] < FLOAT and not isinstance(layer, nn.Embedding) and alone
        learns_weight = chosen(spec["bits"]) == "lsq" and learnable
        moves = self.start > 0 or self.initial_bits is not None
        schedule = {name: getattr(self, name) for name in ("start", "initial_bits", "end")}
        frozen = {name: getattr(self, name) for name in ("freeze_observers", "freeze_norms")}
        return {
            "weight_quantizer": "lsq" if learns_weight else "ste",
            "act_quantizer": chosen(spec["act_bits"]) if spec["act"] == "static" else "ste",
            "schedule": {**schedule, **frozen, "moves": moves},
            "scale_lr": self.scale_lr,
        }

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        super().apply(model, plan, context)
        chosen = [(entry.spec["weight_quantizer"], entry.spec["act_quantizer"]) for entry in plan.layers]
        learned = sum("lsq" in pair or "pact" in pair for pair in chosen)
        parts = [
            f"{counted(count, 'layer')} with {what}"
            for count, what in (
                (learned, "learned scales"),
                (len(chosen) - learned, "scales from the ranges of values"),
            )
            if count
        ]
        log.info("qat trains %s.", " and ".join(parts))

    def attach(self, model: nn.Module, state: dict[str, Any]) -> None:
        parts = _PARTS[model] = _parts_of(model)
        for layer in parts.layers:
            layer.meets = is_distributed()

    def observe(self, model: nn.Module, state: dict[str, Any]) -> None:
        layers = (_PARTS.get(model) or _parts_of(model)).layers
        if any(layer.refused for layer in layers):
            _warn_refused(model)
        meeting = [layer for layer in layers if layer.meets and hasattr(layer, "act_range")]
        if not meeting:
            return
        nothing = meeting[0].act_range.new_full((2,), -torch.inf)
        seen = torch.stack([nothing if layer.seen is None else layer.seen for layer in meeting])
        for layer, extremes in zip(meeting, reduced(seen, by="max"), strict=True):
            layer.meet(extremes)

    def step(self, model: nn.Module, state: dict[str, Any], progress: float) -> None:
        parts = _PARTS.get(model) or _parts_of(model)
        _agree_on_first_ranges(parts)
        for layer in parts.layers:
            schedule = layer.spec["schedule"]
            layer.observing = progress < schedule["freeze_observers"]
            if schedule["moves"] and (bits := bits_in_force(layer.spec, progress)) != layer.bits_in_force:
                layer.set_bits(*bits)
        for norm in parts.norms:
            if norm.training and progress >= self.freeze_norms:
                norm.eval()  # again after each validation, which puts the whole model back into training


def _warn_refused(model: nn.Module) -> None:
    """Says, once for each layer, that a training batch gave it values that no range can be made of."""
    found = compressed_layers(model).items()
    refused = {name: layer for name, layer in found if isinstance(layer, QuantLayer) and layer.refused}
    log.warning(
        "qat: the inputs of %s held NaN or infinite values in a training batch; their ranges have not taken them.",
        named(refused),
    )
    for layer in refused.values():
        layer.refused, layer.told = False, True


def _parts_of(model: nn.Module) -> _Parts:
    layers = {
        name: layer
        for name, layer in compressed_layers(model).items()
        if isinstance(layer, QuantLayer) and layer.spec["trains"]
    }
    found = [norm_of(model, name, layer) for name, layer in layers.items()]
    return _Parts(list(layers.values()), [pair[1] for pair in found if pair is not None])


def _agree_on_first_ranges(parts: _Parts) -> None:
    """Gives learned input scales that have started from a batch the range of the first batches of all processes.

    Layers are reduced together, by their place in the model: a process may have reached some of them only.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if parts.unsettled is None:
        parts.unsettled = [layer for layer in parts.layers if hasattr(layer, "act_scale") and not layer.known]
    if not parts.unsettled:
        return
    first = [layer.first_range or (torch.inf, -torch.inf) for layer in parts.unsettled]
    ends = torch.tensor([(-low, high) for low, high in first], device=parts.unsettled[0].weight.device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    still: list[QuantLayer] = []
    for layer, (negated, high) in zip(parts.unsettled, ends.tolist(), strict=True):
        if -negated <= high:
            layer.set_range(-negated, high)
            layer.first_range = None
        else:
            still.append(layer)
    parts.unsettled = still


def bits_in_force(spec: dict[str, Any], progress: float) -> tuple[int, int]:
    """Bits of weights and inputs at a progress of the training in [0, 1]; 16 before the start."""
    schedule = spec["schedule"]
    if progress < schedule["start"]:
        return FLOAT, FLOAT
    first = schedule["initial_bits"]
    if first is None:
        return spec["bits"], spec["act_bits"]
    weight_bits, act_bits = (
        target if target == FLOAT or first <= target else first - round(_lowered(schedule, progress, first - target))
        for target in (spec["bits"], spec["act_bits"])
    )
    return weight_bits, act_bits


def _lowered(schedule: dict[str, Any], progress: float, total: int) -> float:
    return scheduled("linear", progress, total, start=schedule["start"], end=schedule["end"])
