"""Post-training quantization: the trained weights and measured ranges of inputs are rounded, once, at the end."""

from typing import Any, Literal

from torch import nn

from pquant_lightning.core.compressed_layer import compressed_layers, weight_of
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError
from pquant_lightning.core.options import check_count
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.quantization._base import QuantizationMethod
from pquant_lightning.methods.quantization._forms import FLOAT
from pquant_lightning.methods.quantization._integer import IntLayer
from pquant_lightning.methods.quantization._layers import TRAINING_KINDS, QuantLayer


@CompressionMethodRegistry.register("ptq")
class PTQCompression(QuantizationMethod):
    """Post-training quantization of Linear, Conv, ConvTranspose and Embedding layers.

    In a Trainer the model stays in floating point; at the end of fit the ranges of its layers' inputs are measured on
    training data, and the artefact holds integers. Weights are rounded per output channel (or group), symmetric, below
    8 bits with the scale of least squared error. Norms, softmax and biases stay in floating point; embeddings have no
    inputs to round. Batch norms are folded into the layer before them; the mean error of each layer is taken into its
    bias.

    Args:
        bits: bits of weights and inputs, 2 to 8.
        weight_bits: bits of the weights where they differ from `bits`.
        act_bits: bits of the inputs where they differ from `bits`.
        scheme: "static" measures ranges of inputs by calibration; "dynamic" takes them from each row (of a convolution:
            each sample) when it comes; "weight_only" leaves inputs in floating point.
        group_size: so many values along the inputs share a scale, instead of a whole output channel; layers whose
            channels it does not divide keep a scale per channel.
        fold_norms: fold batch norms away; needs samples of data, to see what feeds them.
        correct_bias: correct the mean output of each layer, by its mean input in calibration.
        overrides: bits of single layers: glob patterns over module names to `bits`, `weight_bits` or `act_bits`; the
            last pattern that matches counts, e.g. `{"head": {"bits": 8}}`.
        first_last_bits: at least so many bits in the first and the last layer, in models of three layers or more. None
            means 8, or no exception where weights have a scale per group.
        observer: how a range of inputs is chosen from calibration: "histogram" and "mse" for the least squared error
            (each end by itself, or both alike), "minmax", "moving_average" of the batches' extremes, "percentile"
            (99.999), "entropy".
        num_samples: samples of the training data to calibrate on; 0 does without, which "static" cannot.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: bits outside 2..8 (or 16), 16 for both, or options that exclude each other.

    References:
        Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.

    >>> PTQCompression(bits=4, scheme="weight_only", group_size=32).bits_of("fc", False)
    (4, 16)
    """

    scheme: Literal["static", "dynamic", "weight_only"] = "static"
    group_size: int | None = None
    fold_norms: bool = True
    correct_bias: bool = True

    acts_after_training = True

    def validate_config(self) -> None:
        super().validate_config()
        if self.group_size is not None:
            check_count(type(self), "group_size", self.group_size, 2)
        if self.scheme == "weight_only" and self.act_bits not in (None, FLOAT):
            raise OptionError(
                f"PTQCompression: scheme='weight_only' leaves inputs in floating point, got act_bits={self.act_bits}. "
                "Use scheme='static' or 'dynamic'."
            )
        if self.scheme == "static" and self.num_samples == 0:
            raise OptionError("PTQCompression: scheme='static' measures inputs, so num_samples is at least 1, got 0.")

    @property
    def needs_samples(self) -> bool:
        return self.scheme == "static"

    def bits_of(self, name: str, is_end: bool) -> tuple[int, int]:
        protected = is_end and not (self.first_last_bits is None and self.group_size is not None)
        weight_bits, act_bits = super().bits_of(name, protected)
        return weight_bits, FLOAT if self.scheme == "weight_only" else act_bits

    def layer_options(self, layer: nn.Module, spec: dict[str, Any]) -> dict[str, Any]:
        axis = TRAINING_KINDS[type(layer)].axis
        weight = weight_of(layer)
        divides = self.group_size is not None and (weight.numel() // weight.shape[axis]) % self.group_size == 0
        correctable = not isinstance(layer, nn.Embedding) and axis == 0
        return {
            "act": self.scheme if spec["act_bits"] < FLOAT else None,
            "range": "max" if spec["bits"] == 8 else "mse",
            "group_size": self.group_size if divides else None,
            "norm": spec["norm"] if self.fold_norms else None,
            "correct_bias": self.correct_bias and correctable and self.num_samples > 0,
        }

    def calibrate(self, model: nn.Module, context: CompressionContext) -> None:
        if context.samples is None and self.needs_samples:
            raise CalibrationError(
                "ptq with scheme='static' measures the inputs of the layers: give compress_model a train_loader (a "
                "loader, a list of batches or a datamodule), or use scheme='dynamic' or 'weight_only'."
            )
        super().calibrate(model, context)

    @classmethod
    def finalize(cls, model: nn.Module) -> None:
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
