"""Mixed precision: each layer has as many bits as its effect on the output asks for, within one budget."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pquant_lightning.core.compressed_layer import read_specs
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import ModelError, OptionError
from pquant_lightning.core.layer_adapter import build_layer
from pquant_lightning.core.options import one_of
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.serialization import read_artifact
from pquant_lightning.core.surgery import materialize
from pquant_lightning.methods.quantization._allocation import (
    Sensitivity,
    checksum,
    choices_of,
    measure,
    share_bits,
    share_bytes,
)
from pquant_lightning.methods.quantization._base import ALL_BITS, check_average_bits, own_layers
from pquant_lightning.methods.quantization._sensitivity import Losses
from pquant_lightning.methods.quantization._ties import others, shared_weights
from pquant_lightning.methods.quantization.ptq import PTQCompression

log = logging.getLogger(__name__)

_FOLLOWS_BITS = ("bits", "range", "zero_point", "rounding", "kernel", "sensitivity", "measured_on", "settled")


@CompressionMethodRegistry.register("mixed_precision")
class MixedPrecisionCompression(PTQCompression):
    """Post-training quantization whose weights have 2, 3, 4, 6, 8 or 16 bits, layer by layer, within one budget.

    The sensitivity of a layer is the squared error of the model's output, relative to the squared output, where its
    weight alone is rounded. The least sum of sensitivities within the budget is found exactly, or nearly (see
    `core.budget.allocate`). The plan shows the sensitivities (`plan.layers[i].spec["sensitivity"]`), the artefact keeps
    them, and `sensitivities` takes them from there for another budget. In a Trainer they are measured at the start of
    fit, which therefore starts from trained weights; with `max_drop`, at its end. `QATCompression(average_bits=...)`
    trains with bits that are shared out likewise.

    Args:
        average_bits: bits per weight, on average over the layers that are quantized; grids are not counted. The default
            is 6.
        target_size_mb: megabytes (10**6 bytes) of all tensors of the deployed model.
        max_drop: what the monitored metric may lose; needs a Trainer (`MixedPrecisionCallback`), which tries budgets.
        monitor: the metric of `max_drop`, as the validation logs it.
        mode: whether more of the metric is better ("max") or less ("min").
        sensitivity: "fisher" estimates it from gradients, in one pass; "output" rounds one layer after the other and
            runs the model, as often as there are layers times choices. Without samples it is the relative squared error
            of the weight.
        sensitivity_samples: samples that sensitivities are measured on.
        sensitivities: an artefact (.safetensors) that holds sensitivities of the same model: nothing is measured.
        choices: the bits to choose from.
        bits: bits of the inputs.
        weight_bits: not to be given: the budget says it. One layer's is pinned by `overrides`.
        act_bits: bits of the inputs where they differ from `bits`.
        first_last_bits: at least so many bits in the first and the last layer; None leaves them to the budget.
        scheme: see `PTQCompression`, as all further options.
        group_size: see `PTQCompression`.
        rounding: see `PTQCompression`.
        data_aware: see `PTQCompression`.
        act_order: see `PTQCompression`.
        damping: see `PTQCompression`.
        max_statistics_bytes: see `PTQCompression`.
        equalize: see `PTQCompression`; sensitivities are those before it.
        smooth: see `PTQCompression`.
        fold_norms: see `PTQCompression`.
        correct_bias: see `PTQCompression`.
        keep_if: see `PTQCompression`.
        overrides: see `PTQCompression`.
        observer: see `PTQCompression`.
        num_samples: see `PTQCompression`.
        reduce_range: 8-bit weights keep to the codes -63 .. 63 where inputs have 8 bits too, so that processors without
            VNNI multiply them exactly at full speed: they add two products in 16 bits. False takes all codes, for half
            of the rounding error of the weights, and about half of the speed on such processors.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: two budgets, a budget out of range, `max_drop` without `monitor`, unknown choices.

    References:
        Pandey et al., "A Practical Mixed Precision Algorithm for Post-Training Quantization", 2023. Dong et al.,
        "HAWQ-V2", 2020.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> plan = MixedPrecisionCompression(average_bits=3, scheme="weight_only").plan(net)
    >>> sum(entry.spec["bits"] for entry in plan.layers) / 2
    3.0
    """

    average_bits: float | None = None
    target_size_mb: float | None = None
    max_drop: float | None = None
    monitor: str | None = None
    mode: Literal["max", "min"] = "max"
    sensitivity: Sensitivity = "fisher"
    sensitivity_samples: int = 32
    sensitivities: str | None = None
    choices: list[int] | None = None

    def validate_config(self) -> None:
        super().validate_config()
        budget, value = self.budget
        if value <= 0 and budget != "max_drop":
            raise OptionError(f"MixedPrecisionCompression: {budget} is positive, got {value}.")
        if budget == "max_drop" and (value < 0 or self.monitor is None):
            raise OptionError(
                "MixedPrecisionCompression: max_drop is at least 0 and goes with monitor='...', the metric that may "
                f"lose it; got max_drop={value}, monitor={self.monitor!r}."
            )
        if budget == "max_drop" and self.first_last_bits is not None:
            raise OptionError(
                "MixedPrecisionCompression: with max_drop the metric protects the first and the last layer; leave "
                "first_last_bits out, or pin the layers by overrides."
            )
        if self.weight_bits is not None:
            raise OptionError(
                f"MixedPrecisionCompression: the budget chooses the bits of weights; got weight_bits={self.weight_bits}"
                ". Pin one layer by overrides={'name': {'weight_bits': 8}}, or use ptq for equal bits."
            )
        if self.sensitivity_samples < 1:
            raise OptionError(f"MixedPrecisionCompression: sensitivity_samples >= 1, got {self.sensitivity_samples}.")
        if self.choices is not None and not (self.choices and set(self.choices) <= set(ALL_BITS)):
            raise OptionError(f"MixedPrecisionCompression: choices are some of {ALL_BITS}, got {self.choices}.")
        if budget == "average_bits":
            pinned = self.choices is None or self.overrides or self.first_last_bits is not None
            check_average_bits(type(self), value, ALL_BITS[0] if pinned else min(self.choices or ALL_BITS))

    @property
    def budget(self) -> tuple[str, float]:
        """Name and value of the budget."""
        given = {name: getattr(self, name) for name in ("average_bits", "target_size_mb", "max_drop")}
        return one_of(type(self), {"average_bits": 6.0}, **given)

    def bits_of(self, name: str, is_end: bool, sharing: Sequence[str] = ()) -> tuple[int, int]:
        return super().bits_of(name, is_end and self.first_last_bits is not None, sharing)

    def bits_offered(self, name: str, is_end: bool, sharing: Sequence[str] = ()) -> list[int]:
        offered = super().bits_offered(name, is_end, sharing)
        return [bits for bits in offered if self.choices is None or bits in self.choices] or offered[:1]

    def shared_bits(
        self, model: nn.Module, layers: dict[str, nn.Module], context: CompressionContext
    ) -> dict[str, Any]:
        if self.sensitivities is not None:
            losses = saved_sensitivities(self.sensitivities, list(layers))
        else:
            losses = measure(self, model, layers, context, self.sensitivity, self.sensitivity_samples)
        return self._share(model, layers, losses, context)

    def _share(
        self, model: nn.Module, layers: dict[str, nn.Module], losses: Losses, context: CompressionContext
    ) -> dict[str, Any]:
        choices, owner_of = choices_of(self, layers, context, losses)
        budget, value = self.budget
        if budget == "target_size_mb":
            rest = stored_bytes(model) - sum(stored_bytes(model.get_submodule(name)) for name in choices)
            bits = share_bytes(choices, value, rest)
        else:
            bits = share_bits(choices, value if budget == "average_bits" else 8.0)
        bits = {name: bits[owner] for name, owner in owner_of.items()}
        return {"sensitivities": losses, "bits": bits, "settled": self.max_drop is None}

    def least_average(self, model: nn.Module, context: CompressionContext) -> float:
        """The fewest bits per weight, on average, that the choices of the layers allow."""
        own = own_layers(model, context.by)
        ties = shared_weights(own)
        bits = {name: min(self.bits_offered(name, False, others(layer, name, ties))) for name, layer in own.items()}
        weights = {name: layer.weight.numel() for name, layer in own.items()}
        return sum(bits[name] * count for name, count in weights.items()) / sum(weights.values())

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        if self.max_drop is not None:
            raise ModelError(
                "max_drop is of a metric that a Trainer's validation logs: use MixedPrecisionCallback(max_drop=..., "
                "monitor=...) in a fit. Without a Trainer give average_bits or target_size_mb."
            )
        if not all(layer.spec["settled"] for layer in own_layers(model, context.by).values()):
            self.share_again(model, context)
        super().calibrate(model, context)

    def share_again(self, model: nn.Module, context: CompressionContext) -> None:
        """Shares the budget out over the layers as their weights are now; measures where those have changed."""
        own = own_layers(model, context.by)
        context = replace(context, notes={**context.notes, "tied": shared_weights(own)})
        layers: dict[str, nn.Module] = {}
        for name, layer in own.items():
            layers[name] = build_layer(layer.spec["layer"], device="meta")
            materialize(layers[name], layer)
        if all(layer.spec["measured_on"] == checksum(layer) for layer in own.values()):
            known = {n: {int(k): v for k, v in layer.spec["sensitivity"].items()} for n, layer in own.items()}
            found = self._share(model, layers, known, context)
        else:
            found = self.shared_bits(model, layers, context)
        for name, layer in own.items():
            spec = self.plan_layer(name, layers[name], replace(context, notes={**context.notes, **found}))
            if isinstance(spec, dict):
                layer.spec = {**layer.spec, **{key: spec[key] for key in _FOLLOWS_BITS}}
            else:  # 16 bits
                layer.spec = {**layer.spec, "bits": 16}
            layer.rounded = None


def saved_sensitivities(path: str | Path, names: list[str]) -> Losses:
    """The sensitivities that an artefact holds, for the named layers.

    Raises:
        OptionError: it holds none for one of them.
    """
    specs: Mapping[str, dict[str, Any]] = read_specs(read_artifact(Path(path))[0])
    found = {
        n: {int(k): v for k, v in spec["sensitivity"].items()} for n, spec in specs.items() if spec.get("sensitivity")
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise OptionError(
            f"{path} holds no sensitivity of layer {missing[0]!r} (and {len(missing) - 1} more); it has those of "
            f"{', '.join(map(repr, found)) or 'no layer'}. Give the artefact of a mixed-precision run of this model."
        )
    return {name: found[name] for name in names}
