"""The family name `tensor_network` of configurations: `{rank: 8, method: tucker}`."""

from typing import ClassVar

from pquant_lightning.core.compression_method import CompressionMethod, MethodFamily
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.tensor_networks.cp import CPCompression
from pquant_lightning.methods.tensor_networks.tensor_train import TensorTrainCompression
from pquant_lightning.methods.tensor_networks.tucker import TuckerCompression


@CompressionMethodRegistry.register("tensor_network")
class TensorNetworkCompression(MethodFamily):
    """Makes the method that `method` names, with the other options: "tensor_train", "tucker" or "cp".

    Raises:
        OptionError: no such method, or an option it does not have.

    >>> TensorNetworkCompression(method="tucker", rank=16).name
    'tucker'
    """

    members: ClassVar[dict[str, type[CompressionMethod]]] = {
        "tensor_train": TensorTrainCompression,
        "tucker": TuckerCompression,
        "cp": CPCompression,
    }
