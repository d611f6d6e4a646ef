"""What post-training quantization and quantization-aware training share: bits per layer, norms, calibration."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pquant_lightning.core.affine import blocks, mse_scale
from pquant_lightning.core.calibration import collect_inputs, output_ranges
from pquant_lightning.core.compressed_layer import compressed_layers, weight_of
from pquant_lightning.core.compression_method import (
    CompressionContext,
    LayerMethod,
    Stage,
    check_patterns,
    matches,
    relative_error,
)
from pquant_lightning.core.deploy import deployed_bytes, stored_bytes
from pquant_lightning.core.errors import CalibrationError, OptionError, known, named
from pquant_lightning.core.graph import outer_layers, trace
from pquant_lightning.core.layer_adapter import as_torch, layer_spec
from pquant_lightning.core.options import check_count
from pquant_lightning.core.plan import Candidate, CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.structure import absolute_path, relative_path
from pquant_lightning.core.surgery import get_layer
from pquant_lightning.methods.quantization._folding import fold_norms
from pquant_lightning.methods.quantization._forms import FLOAT
from pquant_lightning.methods.quantization._grids import code_bits, nearest_codes, weight_grid
from pquant_lightning.methods.quantization._kernels import why_no_kernel
from pquant_lightning.methods.quantization._layers import TRAINING_KINDS, QuantLayer
from pquant_lightning.methods.quantization._observers import Observer, choose_range
from pquant_lightning.methods.quantization._ties import (
    losing,
    others,
    shared_weights,
    warn_of_contradictions,
    weight_bits,
)

log = logging.getLogger(__name__)

ALL_BITS = (2, 3, 4, 6, 8, 16)  # that a budget chooses from
_CHANNELS = 64  # on which an error is estimated
_BY_DATA = ("gptq", "adaround", "awq")  # roundings whose errors are known when they are made
_PER_LAYER = ("bits", "weight_bits", "act_bits")


def check_average_bits(owner: type, value: float, least: int = ALL_BITS[0]) -> None:
    """Checks an average number of bits, which layers have between `least` and 16 of.

    Raises:
        OptionError: it is out of range.
    """
    if not least <= value <= ALL_BITS[-1]:
        raise OptionError(
            f"{owner.__name__}: average_bits is a number of bits per weight between {least} and {ALL_BITS[-1]} (which "
            f"leaves a layer alone), got {value:g}."
        )


class QuantizationMethod(LayerMethod):
    """Base of the methods that quantize layers.

    Args:
        bits: bits of weights and inputs, 2 to 8; 16 leaves them in floating point.
        weight_bits: bits of the weights where they differ from `bits`.
        act_bits: bits of the inputs where they differ from `bits`.
        overrides: bits of single layers: glob patterns over module names to `bits`, `weight_bits` or `act_bits`; the
            last pattern that matches counts, e.g. `{"head": {"bits": 8}}`. A weight that layers share has one number
            of bits: patterns for any of them count.
        first_last_bits: at least so many bits in the first and the last layer, in models of three layers or more.
        observer: how a range of inputs is chosen from calibration: "histogram" and "mse" for the least squared error
            (each end by itself, or both alike), "minmax", "moving_average" of the batches' extremes, "percentile"
            (99.999), "entropy".
        num_samples: samples of the training data to calibrate on; 0 does without.
        reduce_range: 8-bit weights keep to the codes -63 .. 63 where inputs have 8 bits too, so that processors without
            VNNI multiply them exactly at full speed: they add two products in 16 bits. False takes all codes, for half
            of the rounding error of the weights, and about half of the speed on such processors.

    Raises:
        OptionError: bits outside 2..8 (or 16), or 16 for both.
    """

    bits: int = 8
    weight_bits: int | None = None
    act_bits: int | None = None
    overrides: dict[str, dict[str, int]] | None = None
    first_last_bits: int | None = None
    observer: Observer = "histogram"
    num_samples: int = 300
    reduce_range: bool = True

    stage = Stage.QUANTIZE
    keeps_ties = True

    @property
    def wanted_samples(self) -> int:
        return self.num_samples

    def validate_config(self) -> None:
        super().validate_config()
        name = type(self).__name__
        check_count(type(self), "num_samples", self.num_samples, 0)
        given = [(option, getattr(self, option)) for option in (*_PER_LAYER, "first_last_bits")]
        for pattern, options in (self.overrides or {}).items():
            for option, value in options.items():
                if option not in _PER_LAYER:
                    raise OptionError(f"overrides[{pattern!r}] has no option {option!r}. {known(option, _PER_LAYER)}")
                given.append((f"overrides[{pattern!r}][{option!r}]", value))
        for option, value in given:
            if value is not None and not (2 <= value <= 8 or value == FLOAT):
                raise OptionError(f"{name}: {option} is an int in 2..8, or 16 to leave it alone, got {value}.")
        if self.bits_of("", False) == (FLOAT, FLOAT) and not self.overrides:
            raise OptionError(f"{name} with 16 bits for weights and inputs would change nothing; use bits in 2..8.")

    def bits_of(self, name: str, is_end: bool, sharing: Sequence[str] = ()) -> tuple[int, int]:
        """Bits of weights and inputs of a layer.

        Args:
            name: of the layer.
            is_end: whether it is the first or the last one.
            sharing: names of the layers that have the same weight; overrides of its bits count for all of them.
        """
        chosen = {option: getattr(self, option) for option in _PER_LAYER}
        pair = (chosen["weight_bits"] or chosen["bits"], chosen["act_bits"] or chosen["bits"])
        if is_end:
            least = self.first_last_bits or 8
            pair = (max(pair[0], least), max(pair[1], least))
        for pattern, options in (self.overrides or {}).items():
            if matches(name, pattern):
                both = options.get("bits")
                pair = (options.get("weight_bits") or both or pair[0], options.get("act_bits") or both or pair[1])
            elif any(matches(other, pattern) for other in sharing):
                pair = (weight_bits(options) or pair[0], pair[1])
        return pair

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        context = context or CompressionContext(by=self.name)
        model = self.opened(model, context)
        check_patterns(model, "overrides", self.overrides or {})
        context = self.prepared(model, context)
        plan = super().plan(model, context)
        warn_of_contradictions(context.notes["tied"], self.overrides or {})
        if self.min_saving > 0 and (left := losing(model, plan, context.notes["tied"], self.min_saving)):
            context = replace(context, notes={**context.notes, "left": left})
            plan = super().plan(model, context)
        layers = {entry.name: get_layer(model, entry.name) for entry in plan.layers}
        shared = self.shared_bits(model, layers, context) if layers and context.choices is None else {}
        return super().plan(model, replace(context, notes={**context.notes, **shared})) if shared else plan

    def prepared(self, model: nn.Module, context: CompressionContext) -> CompressionContext:
        graph = None if context.samples is None else trace(model, context.samples)
        norms = {} if graph is None else graph.foldable_norms(model)
        tied = shared_weights(dict(model.named_modules()))
        found = {"ends": outer_layers(model, graph), "norms": norms, "tied": tied}
        return replace(context, notes={**found, **context.notes})

    def choose(
        self, name: str, layer: nn.Module, options: dict[str, Any], context: CompressionContext
    ) -> dict[str, Any] | Skip:
        return self.plan_layer(name, layer, replace(context, notes={**context.notes, "bits": {name: options["bits"]}}))

    def shared_bits(
        self, model: nn.Module, layers: dict[str, nn.Module], context: CompressionContext
    ) -> dict[str, Any]:
        """`bits` by layer that a budget gives, and the `sensitivities` it is shared by; empty where there is none."""
        return {}

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict[str, Any] | Skip:
        kind = TRAINING_KINDS.get(type(layer))
        if kind is None:
            return Skip(name, f"{self.name} does not cover {type(layer).__name__}")
        if getattr(layer, "max_norm", None) is not None:
            return Skip(name, "its max_norm rewrites the weight in the forward")
        if name in context.notes.get("left", ()):
            return Skip(name, context.notes["left"][name])
        sharing = others(layer, name, context.notes.get("tied", {}))
        bits, act_bits = self.bits_of(name, name in context.notes.get("ends", ()), sharing)
        bits = context.notes.get("bits", {}).get(name, bits)
        if isinstance(layer, nn.Embedding):
            act_bits = FLOAT  # indices are not rounded
        if bits == FLOAT and (act_bits == FLOAT or name in context.notes.get("bits", {})):
            shown = f", which is that of {sharing[0]!r}, too" if sharing else ""
            return Skip(name, f"16 bits leave its weight{shown}, in floating point")
        norm = context.notes.get("norms", {}).get(name)
        spec: dict[str, Any] = {
            "kind": kind.kind,
            "bits": bits,
            "act_bits": act_bits,
            "act": None if act_bits == FLOAT else "static",
            "trains": self.trains,
            "weight_quantizer": "ste",
            "act_quantizer": "ste",
            "range": "max",
            "zero_point": False,
            "rounding": "nearest",
            "group_size": None,
            "norm": norm and relative_path(name, norm),
            "correct_bias": False,
            "schedule": None,
            "scale_lr": 1.0,
            **sensitivity_entries(name, layer, context.notes),
        }
        spec.update(self.layer_options(layer, spec, context))
        reason = why_no_kernel(layer, spec["act_bits"], spec["group_size"])
        spec["kernel"] = "integer" if reason is None else f"dequantize: {reason}"
        if self.reduce_range and reason is None and (spec["bits"], spec["act_bits"]) == (8, 8) and not sharing:
            spec["code_bits"] = 7
        return spec

    def layer_options(self, layer: nn.Module, spec: dict[str, Any], context: CompressionContext) -> dict[str, Any]:
        """What a method decides differently in the spec of a layer."""
        return {}

    def candidates(self, name: str, module: nn.Module, context: CompressionContext) -> list[Candidate]:
        found, layer = [], as_torch(module)
        assert layer is not None
        macs = weight_of(layer).numel()
        measured = context.notes.get("sensitivities", {}).get(name)
        sharing = others(layer, name, context.notes.get("tied", {}))
        for bits in self.bits_offered(name, name in context.notes.get("ends", ()), sharing):
            spec = self.plan_layer(name, layer, replace(context, notes={**context.notes, "bits": {name: bits}}))
            if isinstance(spec, Skip) and bits < FLOAT:
                return []
            if isinstance(spec, Skip):
                found.append(Candidate({"bits": bits}, stored_bytes(layer), macs, 0.0))
                continue
            size = deployed_bytes({**spec, "by": self.name, "layer": layer_spec(layer)}, layer)
            loss = _error(layer, spec) ** 2 if measured is None else measured[bits]
            found.append(Candidate({"bits": bits}, size, macs, loss))
        return found

    def bits_offered(self, name: str, is_end: bool, sharing: Sequence[str] = ()) -> list[int]:
        """The bits of weights that a budget may choose from, fewest first; arguments as those of `bits_of`."""
        found = [o for p, o in (self.overrides or {}).items() if any(matches(n, p) for n in (name, *sharing))]
        pinned = [bits for options in found if (bits := weight_bits(options)) is not None]
        if pinned:
            return [pinned[-1]]
        least = self.first_last_bits if is_end and self.first_last_bits else 0
        return [bits for bits in ALL_BITS if bits >= least]

    def expected_error(self, layer: nn.Module, plan: LayerPlan, context: CompressionContext) -> float | None:
        """That of rounding to nearest, on a few output channels; None where data decide how weights are rounded."""
        if plan.spec.get("rounding") in _BY_DATA:
            return None
        return _error(layer, plan.spec, _CHANNELS)

    # -- applying ----------------------------------------------------------------------------------------------------

    def fill(self, new: QuantLayer, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        if plan.spec["bits"] < FLOAT:
            context.errors[plan.name] = _error(old, plan.spec)
        if hasattr(new, "weight_scale"):
            new.weight_scale.copy_(mse_scale(blocks(new.weight, new.axis), code_bits(plan.spec)))
        if hasattr(new, "act_scale"):
            new.act_scale.zero_()
            new.act_zero.zero_()
        if self.trains:
            new.miss_range()

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        own = own_layers(model, context.by)
        asking = {n: layer for n, layer in own.items() if layer.spec["act"] == "static" or layer.spec["correct_bias"]}
        if not asking or context.samples is None:
            return
        with output_ranges(model, _outputs_asked(asking), context.samples) as outputs:
            found = collect_inputs(model, list(asking), context.samples, batch_norms=self.trains)
        for name, ends in outputs.items():
            asking[name].output_range.copy_(torch.tensor(ends))
        if not found and not self.trains:
            raise CalibrationError(
                f"Calibration reached none of the layers to be quantized ({', '.join(asking)}): the model's forward, "
                "or predict_step, does not call them on the given samples. Give samples that reach them."
            )
        for name, layer in asking.items():
            if name in found:
                layer.set_statistics(found[name], choose_range(found[name], self.observer, layer.spec["act_bits"]))
            else:
                layer.miss_range()
        _warn_missed({name: layer.described() for name, layer in asking.items() if name not in found})

    @classmethod
    def finalize(cls, model: nn.Module) -> None:
        fold_norms(model)


def _warn_missed(described: dict[str, str]) -> None:
    """One line for all layers that calibration has not reached, those that stay alike together."""
    alike: dict[str, list[str]] = {}
    for name, words in described.items():
        alike.setdefault(words, []).append(name)
    if alike:
        shown = "; ".join(f"{named(names)}: {words}" for words, names in alike.items())
        log.warning("Calibration never reached %s", shown)


def _outputs_asked(layers: dict[str, QuantLayer]) -> dict[str, str]:
    """The layers that keep the range of their outputs, with the modules that give these in deployed form."""
    norms = {name: layer.spec["norm"] for name, layer in layers.items() if hasattr(layer, "output_range")}
    return {name: name if norm is None else absolute_path(name, norm) for name, norm in norms.items()}


def own_layers(model: nn.Module, by: str) -> dict[str, QuantLayer]:
    """The layers in training form that this method or callback has made, by name."""
    found = compressed_layers(model).items()
    return {name: layer for name, layer in found if isinstance(layer, QuantLayer) and layer.spec["by"] == by}


def sensitivity_entries(name: str, layer: nn.Module, notes: dict[str, Any]) -> dict[str, Any]:
    """What a spec says of a layer's sensitivity: by bits, of which weight, and whether its bits are decided."""
    losses = notes.get("sensitivities", {}).get(name)
    if losses is None:
        return {}
    rounded = {str(bits): float(f"{loss:.4g}") for bits, loss in losses.items()}
    checksum = float(weight_of(layer).detach().double().square().sum())
    return {"sensitivity": rounded, "measured_on": checksum, "settled": notes.get("settled", True)}


def _error(layer: nn.Module, spec: dict[str, Any], channels: int | None = None) -> float:
    """Relative error of the rounded weight; of so many of its output channels, evenly spread."""
    if spec["bits"] == FLOAT:
        return 0.0
    weight, axis = weight_of(layer).detach(), TRAINING_KINDS[type(layer)].axis
    if channels is not None and weight.shape[axis] > channels:
        weight = weight.index_select(axis, torch.linspace(0, weight.shape[axis] - 1, channels).long())
    values = blocks(weight, axis, spec["group_size"])
    if spec["range"] == "hqq":
        spec = {**spec, "range": "mse"}  # nearly the same, and cheaper
    codes, scale, zero = nearest_codes(values, weight_grid(values, spec), code_bits(spec))
    levels = codes if zero is None else codes - zero[..., None]
    return relative_error(values, levels * scale[..., None])
