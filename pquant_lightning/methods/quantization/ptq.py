"""Post-training quantization: the trained weights and measured ranges of inputs are rounded, once, at the end."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from pquant_lightning.core.calibration import Samples, from_rank_zero
from pquant_lightning.core.compressed_layer import compressed_layers, weight_of
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError, counted
from pquant_lightning.core.graph import trace
from pquant_lightning.core.moments import has_moments
from pquant_lightning.core.options import check_count
from pquant_lightning.core.plan import CompressionPlan
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.quantization._awq import scale_by_activations
from pquant_lightning.methods.quantization._base import QuantizationMethod, own_layers
from pquant_lightning.methods.quantization._equalization import equalize
from pquant_lightning.methods.quantization._forms import FLOAT
from pquant_lightning.methods.quantization._integer import IntLayer
from pquant_lightning.methods.quantization._kernels import why_no_kernel
from pquant_lightning.methods.quantization._layers import TRAINING_KINDS, QuantLayer
from pquant_lightning.methods.quantization._rounding import DataRounding, round_with_data
from pquant_lightning.methods.quantization._scaling import find_links
from pquant_lightning.methods.quantization._smoothing import smooth
from pquant_lightning.methods.quantization._speed import keep_faster

log = logging.getLogger(__name__)

_WORDS = {
    "nearest": "rounding to nearest",
    "hqq": "HQQ, without data",
    "gptq": "GPTQ, with data",
    "adaround": "AdaRound, with data",
    "awq": "AWQ, with data",
}
_BY_MOMENTS = ("gptq", "adaround")
_WITH_DATA = (*_BY_MOMENTS, "awq")


@CompressionMethodRegistry.register("ptq")
class PTQCompression(QuantizationMethod):
    """Post-training quantization of Linear, Conv, ConvTranspose and Embedding layers.

    In a Trainer the model stays in floating point; at the end of fit the ranges of its layers' inputs are measured on
    training data, and the artefact holds integers. Weights have a grid per output channel (or group), symmetric where
    the layer computes in integers, else below 8 bits with a zero point. At 8 bits they are rounded to the nearest code;
    below, by GPTQ where there are data, else to the nearest code of a grid found by HQQ. Norms, softmax and biases stay
    in floating point; embeddings have no inputs to round. Batch norms are folded into the layer before them; the mean
    error of each layer is taken into its bias.

    Args:
        bits: bits of weights and inputs, 2 to 8.
        weight_bits: bits of the weights where they differ from `bits`.
        act_bits: bits of the inputs where they differ from `bits`.
        scheme: "static" measures ranges of inputs by calibration; "dynamic" takes them from each row (of a convolution:
            each sample) when it comes; "weight_only" leaves inputs in floating point.
        group_size: so many values along the inputs share a scale, instead of a whole output channel; layers whose
            channels it does not divide keep a scale per channel.
        rounding: "gptq" chooses the codes of a layer for a small error of its output, on data (embeddings, transposed
            convolutions and weights shared by layers are rounded as by "hqq"); "adaround" learns for the same
            purpose which weights are rounded up; "awq" moves factors between layers, as `equalize` does, so that inputs
            of large magnitude get finer weights (layers whose inputs nothing can undo them for are rounded as by
            "nearest", which the log says); "hqq" finds the grid for an error of the weights that forgives
            outliers, without data; "nearest" finds it for the least squared error; "auto" is "nearest" at 8 bits, and
            below "gptq" with data, "hqq" without. The log says which.
        data_aware: whether "auto" chooses weights by data: None = where there are some, True = there must be some,
            False = never.
        act_order: GPTQ rounds the inputs with the largest second moment first.
        damping: GPTQ adds this share of the second moment's mean diagonal to the diagonal.
        max_statistics_bytes: second moments held at a time; more take more passes over the samples.
        equalize: move factors between layers so that a layer's outputs and the inputs that read them have weights of
            equal range, channel by channel; for nets whose channels differ much in range, as with depthwise
            convolutions. The float model computes the same. Needs samples, to see who reads whom.
        smooth: SmoothQuant's alpha in [0, 1], e.g. 0.5: move factors from the inputs of layers to their weights, into
            the norm or layer before; for nets in which a few channels have much larger values than others. The float
            model computes the same. None does not.
        fold_norms: fold batch norms away; needs samples of data, to see what feeds them.
        correct_bias: correct the mean output of each layer, by its mean input in calibration.
        keep_if: "faster" times each layer against its float form on a batch of calibration, on this machine, and leaves
            those in floating point that would not get faster; the log names them. None keeps all.
        overrides: bits of single layers: glob patterns over module names to `bits`, `weight_bits` or `act_bits`; the
            last pattern that matches counts, e.g. `{"head": {"bits": 8}}`. A weight that layers share has one number
            of bits: patterns for any of them count.
        first_last_bits: at least so many bits in the first and the last layer, in models of three layers or more. None
            means 8, or no exception where weights have a scale per group.
        observer: how a range of inputs is chosen from calibration: "histogram" and "mse" for the least squared error
            (each end by itself, or both alike), "minmax", "moving_average" of the batches' extremes, "percentile"
            (99.999), "entropy".
        num_samples: samples of the training data to calibrate on; 0 does without, which "static" cannot.
        reduce_range: 8-bit weights keep to the codes -63 .. 63 where inputs have 8 bits too, so that processors without
            VNNI multiply them exactly at full speed: they add two products in 16 bits. False takes all codes, for half
            of the rounding error of the weights, and about half of the speed on such processors.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: bits outside 2..8 (or 16), 16 for both, or options that exclude each other.

    References:
        Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3. Frantar et al., "GPTQ", 2023.
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020.
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, equation 11.
        Xiao et al., "SmoothQuant", 2023, equation 4. Lin et al., "AWQ", 2023.
        Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.

    >>> PTQCompression(bits=4, scheme="weight_only", group_size=32).bits_of("fc", False)
    (4, 16)
    """

    scheme: Literal["static", "dynamic", "weight_only"] = "static"
    group_size: int | None = None
    rounding: Literal["auto", "nearest", "hqq", "gptq", "adaround", "awq"] = "auto"
    data_aware: bool | None = None
    act_order: bool = True
    damping: float = 0.01
    max_statistics_bytes: int = 2**30
    equalize: bool = False
    smooth: float | None = None
    fold_norms: bool = True
    correct_bias: bool = True
    keep_if: Literal["faster"] | None = None

    acts_after_training = True

    def validate_config(self) -> None:
        super().validate_config()
        if self.group_size is not None:
            check_count(type(self), "group_size", self.group_size, 2)
        check_count(type(self), "max_statistics_bytes", self.max_statistics_bytes, 1)
        if not 0 < self.damping <= 1:
            raise OptionError(f"PTQCompression: damping is a share in (0, 1], got {self.damping}.")
        if self.num_samples == 0 and (self.data_aware or self.rounding in _WITH_DATA):
            raise OptionError("PTQCompression: GPTQ, AdaRound and AWQ need data, so num_samples is at least 1, got 0.")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise OptionError(f"PTQCompression: smooth is a strength in [0, 1] (0.5 is usual), got {self.smooth}.")
        if self.smooth is not None and self.scheme == "weight_only":
            raise OptionError(
                "PTQCompression: smooth helps layers that round their inputs, and scheme='weight_only' rounds none. "
                "Leave it out, or use scheme='static' or 'dynamic'."
            )
        if self.num_samples == 0 and (self.equalize or self.smooth is not None or self.keep_if is not None):
            raise OptionError(
                "PTQCompression: equalize, smooth and keep_if need samples: num_samples is at least 1, got 0."
            )
        if self.data_aware is False and self.rounding in _WITH_DATA:
            raise OptionError(
                f"PTQCompression: rounding={self.rounding!r} needs data; data_aware=False forbids them. Leave one out."
            )
        if self.scheme == "weight_only" and self.act_bits not in (None, FLOAT):
            raise OptionError(
                f"PTQCompression: scheme='weight_only' leaves inputs in floating point, got act_bits={self.act_bits}. "
                "Use scheme='static' or 'dynamic'."
            )
        if self.scheme == "static" and self.num_samples == 0:
            raise OptionError("PTQCompression: scheme='static' measures inputs, so num_samples is at least 1, got 0.")

    @property
    def steering(self) -> frozenset[str]:  # what the calibration at the end of each fit does
        rounding = {"data_aware", "act_order", "damping", "max_statistics_bytes"}
        return frozenset({"num_samples", "observer", "equalize", "smooth", "keep_if", *rounding})

    @property
    def needs_samples(self) -> bool:
        asked = bool(self.data_aware) or self.rounding in _WITH_DATA or self.equalize or self.smooth is not None
        asked = asked or self.keep_if is not None
        return self.scheme == "static" or asked

    def bits_of(self, name: str, is_end: bool, sharing: Sequence[str] = ()) -> tuple[int, int]:
        protected = is_end and not (self.first_last_bits is None and self.group_size is not None)
        weight_bits, act_bits = super().bits_of(name, protected, sharing)
        return weight_bits, FLOAT if self.scheme == "weight_only" else act_bits

    def layer_options(self, layer: nn.Module, spec: dict[str, Any], context: CompressionContext) -> dict[str, Any]:
        axis = TRAINING_KINDS[type(layer)].axis
        weight = weight_of(layer)
        divides = self.group_size is not None and (weight.numel() // weight.shape[axis]) % self.group_size == 0
        group_size = self.group_size if divides else None
        tied = id(layer.weight) in context.notes.get("tied", ())  # all its users must come to the same codes
        rounding = self._rounding_of(layer, spec["bits"], context, tied)
        correctable = not isinstance(layer, nn.Embedding) and axis == 0
        return {
            "act": self.scheme if spec["act_bits"] < FLOAT else None,
            "range": "max" if spec["bits"] == 8 else "mse" if rounding in ("nearest", "awq") else "hqq",
            "zero_point": spec["bits"] < 8
            and not tied
            and why_no_kernel(layer, spec["act_bits"], group_size) is not None,
            "rounding": rounding,
            "group_size": group_size,
            "norm": spec["norm"] if self.fold_norms else None,
            "correct_bias": self.correct_bias and correctable and self.num_samples > 0,
        }

    def _rounding_of(self, layer: nn.Module, bits: int, context: CompressionContext, tied: bool) -> str:
        wanted = "nearest" if bits == FLOAT else self.rounding
        if wanted == "auto":
            data = self.data_aware is not False and context.samples is not None
            wanted = "nearest" if bits >= 8 else "gptq" if data else "hqq"
        by_rows = has_moments(layer) and TRAINING_KINDS[type(layer)].axis == 0  # not transposed: a row is an output
        return "hqq" if wanted in _WITH_DATA and (tied or not by_rows) else wanted

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        super().apply(model, plan, context)
        found = Counter(entry.spec["rounding"] for entry in plan.layers if entry.spec["bits"] < FLOAT)
        shown = ", ".join(f"{counted(count, 'layer')} by {_WORDS[rounding]}" for rounding, count in found.items())
        log.info("ptq rounds the weights of %s", shown)

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        if context.samples is None and self.needs_samples:
            if self.scheme == "static":
                why = "scheme='static' measures the inputs of the layers"
            elif self.data_aware or self.rounding in _WITH_DATA:
                why = "GPTQ (or AdaRound, AWQ) rounds weights by the inputs of the layers"
            elif self.keep_if is not None:
                why = "keep_if='faster' times the layers on samples"
            else:
                why = "equalize or smooth sees on samples which layers read which"
            raise CalibrationError(
                f"ptq with {why}: give compress_model a train_loader (a loader, a list of batches or a datamodule), or "
                "use scheme='dynamic' or 'weight_only' and rounding='hqq', without these."
            )
        if context.samples is not None:
            self._move_factors(model, context.samples, context.by)
        super().calibrate(model, context)
        if context.samples is not None:
            own = own_layers(model, context.by)
            rounded = {n: layer for n, layer in own.items() if layer.spec["rounding"] in _BY_MOMENTS}
            round_with_data(
                model, rounded, context.samples, DataRounding(self.act_order, self.damping), self.max_statistics_bytes
            )
            if self.keep_if == "faster":
                keep_faster(model, own_layers(model, context.by), context.samples)

    def _move_factors(self, model: nn.Module, samples: Samples, by: str) -> None:
        """Rescales neighbouring layers, as the options say; the model computes the same."""
        by_activations = any(layer.spec["rounding"] == "awq" for layer in own_layers(model, by).values())
        if not (self.equalize or self.smooth is not None or by_activations):
            return
        links = from_rank_zero(find_links(model, trace(model, samples)), samples)
        if self.equalize:
            log.info(
                "ptq has equalized the ranges of channels across %s of layers", counted(equalize(model, links), "pair")
            )
        if self.smooth is not None:
            log.info("ptq has smoothed the inputs at %s", counted(smooth(model, links, samples, self.smooth), "place"))
        if by_activations:
            scaled = scale_by_activations(model, links, samples, self.max_statistics_bytes)
            _leave_nearest(own_layers(model, by), scaled)

    @classmethod
    def finalize(cls, model: nn.Module) -> None:
        outdated = [
            name for name, layer in compressed_layers(model).items() if isinstance(layer, QuantLayer) and layer.outdated
        ]
        if outdated:
            raise ModelError(
                f"The weights loaded into {outdated[0]!r} (and {len(outdated) - 1} more) are from before equalize, "
                "smooth or AWQ rescaled them at the end of fit, and the ranges measured since are not theirs. Load the "
                "artefact that the fit has written (compressed.safetensors)."
            )
        static = [
            layer
            for layer in compressed_layers(model).values()
            if isinstance(layer, QuantLayer) and not layer.spec["trains"] and layer.spec["act"] == "static"
        ]
        deployed = any(isinstance(layer, IntLayer) for layer in compressed_layers(model).values())
        if static and not deployed and not any(layer.deployable for layer in static):
            raise ModelError(
                "The model was to be quantized after training and has not been calibrated: the checkpoint is from the "
                "middle of a fit. Load the artefact that the fit has written (compressed.safetensors), or finish the "
                "fit: trainer.fit(model, ckpt_path=...)."
            )
        super().finalize(model)


def _leave_nearest(layers: dict[str, QuantLayer], scaled: set[str]) -> None:
    """Says which layers AWQ cannot scale, and that they are rounded to nearest."""
    left = [name for name, layer in layers.items() if layer.spec["rounding"] == "awq" and name not in scaled]
    for name in left:
        layers[name].spec = {**layers[name].spec, "rounding": "nearest"}
    if left:
        log.warning(
            "AWQ cannot scale the inputs of %s: something else reads them, too, or they come from no norm or layer. "
            "They are rounded to nearest.",
            ", ".join(map(repr, left)),
        )
