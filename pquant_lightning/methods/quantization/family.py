"""The family name `quantization` of configurations: `{bits: 8, method: ptq}`."""

from typing import ClassVar

from pquant_lightning.core.compression_method import CompressionMethod, MethodFamily
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.quantization.mixed_precision import MixedPrecisionCompression
from pquant_lightning.methods.quantization.ptq import PTQCompression
from pquant_lightning.methods.quantization.qat import QATCompression


@CompressionMethodRegistry.register("quantization")
class QuantizationCompression(MethodFamily):
    """Makes the method that `method` names, with the other options: "ptq" (the default), "qat" or
    "mixed_precision".

    Raises:
        OptionError: no such method, or an option it does not have.

    >>> QuantizationCompression(bits=4, method="qat").name
    'qat'
    """

    members: ClassVar[dict[str, type[CompressionMethod]]] = {
        "ptq": PTQCompression,
        "qat": QATCompression,
        "mixed_precision": MixedPrecisionCompression,
    }
