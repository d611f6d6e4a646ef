"""The family name `quantization` of configurations: `{bits: 8, method: ptq}`."""

from typing import Any

from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.errors import OptionError, known
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.quantization.ptq import PTQCompression
from pquant_lightning.methods.quantization.qat import QATCompression

_MEMBERS: dict[str, type[CompressionMethod]] = {"ptq": PTQCompression, "qat": QATCompression}


@CompressionMethodRegistry.register("quantization")
class QuantizationCompression(CompressionMethod):
    """Makes the method that `method` names, with the other options: "ptq" (the default) or "qat".

    Raises:
        OptionError: no such method, or an option it does not have.

    >>> QuantizationCompression(bits=4, method="qat").name
    'qat'
    """

    def __new__(cls, config: dict[str, Any] | None = None, /, **options: Any) -> Any:
        chosen = {**(config or {}), **options}
        method = chosen.pop("method", "ptq")
        if method not in _MEMBERS:
            raise OptionError(
                f"QuantizationCompression has no method {method!r} in this release. {known(method, _MEMBERS)}"
            )
        return _MEMBERS[method](**chosen)
