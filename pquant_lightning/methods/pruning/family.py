"""The family name `pruning` of configurations: `{sparsity: 0.9, method: unstructured}`."""

from typing import ClassVar

from pquant_lightning.core.compression_method import CompressionMethod, MethodFamily
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.pruning.structured import StructuredPruning
from pquant_lightning.methods.pruning.unstructured import UnstructuredPruning


@CompressionMethodRegistry.register("pruning")
class PruningCompression(MethodFamily):
    """Makes the method that `method` names, with the other options: "unstructured" or "structured".

    Raises:
        OptionError: no such method, or an option it does not have.

    >>> PruningCompression(sparsity=0.75).name
    'unstructured_pruning'
    """

    members: ClassVar[dict[str, type[CompressionMethod]]] = {
        "unstructured": UnstructuredPruning,
        "structured": StructuredPruning,
    }
