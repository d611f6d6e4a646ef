"""Batch norms folded into the quantized layer before them, when the model is deployed."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers
from pquant_lightning.core.graph import norm_affine
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.structure import absolute_path, relative_path
from pquant_lightning.core.surgery import get_layer, replace_layer
from pquant_lightning.methods.quantization._layers import QuantLayer, convolves_in_integers

SPREAD = 6.0  # standard deviations about the mean that a norm's outputs are taken to lie in


class FoldedNorm(CompressedLayer, kind="folded_norm", stage=Stage.QUANTIZE):
    """Stands where a batch norm was that is part of the layer before it; passes its input through.

    It stays in the deployed form, so that a file says that the norm is gone.
    """

    deployed = True
    unfolds = True

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def dense_weight(self) -> Tensor:
        return torch.empty(0)

    def described(self) -> str:
        return "folded into the layer before it"


def norm_of(model: nn.Module, name: str, layer: QuantLayer) -> tuple[str, nn.Module] | None:
    """Name and module of the norm behind a layer, as its spec says; None where there is none."""
    if layer.spec["norm"] is None:
        return None
    path = absolute_path(name, layer.spec["norm"])
    return path, get_layer(model, path)


def fold_norms(model: nn.Module) -> None:
    """Gives each layer that is about to be deployed the norm behind it, and takes that norm out of the model."""
    for name, layer in compressed_layers(model).items():
        if not (isinstance(layer, QuantLayer) and layer.deployable):
            continue
        found = norm_of(model, name, layer)
        if found is None or isinstance(found[1], FoldedNorm):
            continue
        path, norm = found
        layer.folded = norm_affine(norm)
        if not hasattr(layer, "output_range") and convolves_in_integers(layer.spec):
            layer.register_buffer("output_range", spread_of(norm))
        spec = {"kind": FoldedNorm.kind, "by": layer.spec["by"], "layer": layer_spec(norm)}
        spec["into"] = relative_path(path, name)
        replace_layer(model, path, CompressedLayer.build(spec, norm))


def spread_of(norm: Any) -> Tensor:
    """The range that the outputs of a batch norm lie in, float32 `(2,)`, as its parameters tell.

    References:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 5.
    """
    if not norm.affine:
        return norm.running_mean.new_tensor([-SPREAD, SPREAD], dtype=torch.float32)
    mean, deviation = norm.bias.detach().float(), norm.weight.detach().float().abs()
    return torch.stack([(mean - SPREAD * deviation).amin(), (mean + SPREAD * deviation).amax()])
