"""What the methods of this family share: a structure from an option, factors with or without data, choices to offer."""

from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, weight_of
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.data_aware import DataAwareMethod, moments_of
from pquant_lightning.core.deploy import deployed_bytes, share_copy
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.moments import InputMoments, covariance, energy, mean_shift
from pquant_lightning.core.plan import Candidate, LayerPlan, Skip
from pquant_lightning.methods.tensor_networks._convs import CONVS, is_transposed, to_kernel
from pquant_lightning.methods.tensor_networks._layers import FactoredLayer
from pquant_lightning.methods.tensor_networks._output_fit import kernel_rows

_STEPS = 8  # shares of a layer's weights that are offered to a budget


class TensorNetworkMethod(DataAwareMethod):
    """Base of the methods: give `why_not`, `target`, `spec_for` and `factors_for`."""

    stage = Stage.FACTORIZE
    protects_output = True
    opens_recurrent = False  # cores would be multiplied one after the other at every step: slower than one matrix

    def target(self) -> tuple[str, Any]:
        """The option that gives the ranks, and its value."""
        raise NotImplementedError

    def why_not(self, layer: nn.Module) -> str | None:
        """Why an ordinary layer has no such decomposition; None where it has."""
        raise NotImplementedError

    def spec_for(self, layer: nn.Module, target: str, value: Any, moments: InputMoments | None) -> dict[str, Any] | str:
        """The structure that an option gives a layer, or why there is none."""
        raise NotImplementedError

    def factors_for(self, layer: nn.Module, spec: dict[str, Any], moments: InputMoments | None) -> list[Tensor]:
        """What the new layer's `set_factors` takes: of least output error where the moments of the inputs are known."""
        raise NotImplementedError

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> LayerPlan | Skip:
        if (reason := self.why_not(layer)) is not None:
            return Skip(name, reason)
        target, value = self.target()
        spec = self.spec_for(layer, target, value, moments_of(name, context))
        if not isinstance(spec, str) and target == "param_ratio":
            spec = self._too_coarse(layer, spec, value) or spec
        return Skip(name, spec) if isinstance(spec, str) else LayerPlan(name, spec)

    def _too_coarse(self, layer: nn.Module, spec: dict[str, Any], share: float) -> str | None:
        whole = {**spec, "layer": {**layer_spec(layer), "bias": False}}
        new = CompressedLayer.build(whole, share_copy(layer, "meta"))
        return self.why_too_coarse(sum(p.numel() for p in new.parameters()), share, weight_of(layer).numel())

    def choose(self, name: str, layer: nn.Module, options: dict[str, Any], context: CompressionContext) -> LayerPlan:
        return LayerPlan(name, dict(options))

    def fill(self, new: Any, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        moments, bias = self.note_fit(old, plan, context), getattr(old, "bias", None)
        new.set_factors(self.factors_for(old, plan.spec, moments), bias)
        if moments is not None and bias is not None and has_centred_outputs(old):
            before, after = (output_rows(weight, old, moments) for weight in (weight_of(old), new.weight))
            bias.add_(mean_shift(before, after, moments))

    def candidates(self, name: str, module: nn.Module, context: CompressionContext | None) -> list[Candidate]:
        if self.why_not(module) is not None:
            return []
        moments = moments_of(name, context)
        shares = [self.spec_for(module, "param_ratio", step / _STEPS, moments) for step in range(1, _STEPS + 1)]
        found: list[Candidate] = []
        for spec in (spec for spec in shares if not isinstance(spec, str)):
            if found and spec == found[-1].options:
                continue
            whole = {**spec, "by": self.name, "layer": layer_spec(module)}
            new: Any = CompressedLayer.build(whole, module)
            with torch.no_grad():
                new.set_factors(self.factors_for(module, whole, moments), getattr(module, "bias", None))
                loss = output_loss(module, new, moments)
            if not found or loss < found[-1].loss:
                size, parts = deployed_bytes(whole, module), len(list(new.parameters()))
                found.append(Candidate(spec, size, new.macs_per_position(), loss, factors=parts))
        return found


def has_centred_outputs(layer: nn.Module) -> bool:
    """Whether a bias can take the mean error (of a transposed convolution, whose outputs overlap, it does not)."""
    return getattr(layer, "bias", None) is not None and not is_transposed(layer_spec(layer))


def output_rows(weight: Tensor, layer: nn.Module, moments: InputMoments) -> Tensor:
    """The weight of a layer as `(groups, rows, n)`, over what its moments are of."""
    weight = weight.detach().double()
    if not isinstance(layer, CONVS):
        return weight.unsqueeze(0)
    kernel = to_kernel(weight, layer_spec(layer)).flatten(3)
    return kernel_rows(kernel, moments.width).flatten(1, 2)


def output_moment(layer: nn.Module, moments: InputMoments) -> Tensor:
    """E[x x^T] `(groups, n, n)`, around the mean where the bias takes care of that."""
    return covariance(moments, has_centred_outputs(layer))


def output_loss(layer: nn.Module, new: FactoredLayer, moments: InputMoments | None) -> float:
    """Squared relative error: of the outputs where there are moments, else of the weight."""
    before, after = weight_of(layer).detach().double(), new.weight.double()
    if moments is None:
        return float((before - after).square().sum() / before.square().sum().clamp_min(1e-300))
    moment = output_moment(layer, moments).double()
    rows = [output_rows(weight, layer, moments) for weight in (before - after, before)]
    return max(energy(rows[0], moment), 0.0) / max(energy(rows[1], moment), 1e-300)  # of rounding, it may be below 0
