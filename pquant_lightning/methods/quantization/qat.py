"""Quantization-aware training: weights and inputs are rounded in the forward, gradients pass straight through."""

from dataclasses import replace
from typing import Any

from torch import nn

from pquant_lightning.core.affine import fake_quantize_weight
from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.compression_method import CompressionContext, LayerMethod, Stage, relative_error
from pquant_lightning.core.deploy import deployed_bytes
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.plan import Candidate, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.quantization._layers import TRAINING_KINDS


@CompressionMethodRegistry.register("qat")
class QATCompression(LayerMethod):
    """Quantization-aware training of Linear, Conv and Embedding layers, from the start of fit.

    Weights are rounded per output channel, symmetric; inputs per tensor, affine, over a moving range of what the layer
    has seen in training (embeddings: weights only). Norms, softmax and biases stay in floating point. `finalize` turns
    the weights into int8 codes with one scale per channel.

    Args:
        bits: bits of weights and inputs, 2 to 8; 16 leaves them in floating point.
        weight_bits: bits of the weights where they differ from `bits`.
        act_bits: bits of the inputs where they differ from `bits`.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: bits outside 2..8 (or 16), or 16 for both.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, section 3. We differ: a weight's scale is that of its largest magnitude, so that nothing is clipped.

    >>> QATCompression(bits=4).plan(nn.Sequential(nn.Linear(64, 32))).layers[0].spec["bits"]
    4
    """

    bits: int = 8
    weight_bits: int | None = None
    act_bits: int | None = None

    stage = Stage.QUANTIZE
    trains = True
    keeps_ties = True

    def validate_config(self) -> None:
        super().validate_config()
        for name in ("bits", "weight_bits", "act_bits"):
            value = getattr(self, name)
            if value is not None and not (2 <= value <= 8 or value == 16):
                raise OptionError(f"QATCompression: {name} is an int in 2..8, or 16 to leave it alone, got {value}.")
        if self._bits() == (16, 16):
            raise OptionError(
                "QATCompression with 16 bits for weights and inputs would change nothing; use bits in 2..8."
            )

    def _bits(self) -> tuple[int, int]:
        return self.weight_bits or self.bits, self.act_bits or self.bits

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict[str, Any] | Skip:
        kind = TRAINING_KINDS.get(type(layer))
        if kind is None:
            return Skip(name, f"qat does not cover {type(layer).__name__} in this release")
        if getattr(layer, "max_norm", None) is not None:
            return Skip(name, "its max_norm rewrites the weight in the forward")
        weight_bits, act_bits = self._bits()
        if isinstance(layer, nn.Embedding):
            act_bits = 16  # indices are not rounded
            if weight_bits == 16:
                return Skip(name, "an embedding has nothing but a weight, and weight_bits is 16")
        return {"kind": kind.kind, "bits": weight_bits, "act_bits": act_bits}

    def candidates(self, name: str, module: nn.Module, context: CompressionContext) -> list[Candidate]:
        found = []
        for bits in (2, 3, 4, 6, 8):
            spec = replace(self, bits=bits, weight_bits=None).plan_layer(name, module, context)
            if isinstance(spec, Skip):
                return []
            size = deployed_bytes({**spec, "layer": layer_spec(module)}, module)
            weight = weight_of(module).detach()
            loss = relative_error(weight, fake_quantize_weight(weight, bits)) ** 2
            found.append(Candidate({"bits": bits}, size, weight.numel(), loss))
        return found
