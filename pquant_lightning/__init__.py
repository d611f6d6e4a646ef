"""Model compression as Lightning callbacks: fine-tune while compressing, resume, load again, deploy."""

import logging

from pquant_lightning.api import (
    CompressedModule,
    compress_model,
    compression_report,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.callbacks.base import CompressionCallback
from pquant_lightning.callbacks.low_rank import LowRankCallback
from pquant_lightning.callbacks.pruning import PruningCallback
from pquant_lightning.callbacks.quantization import MixedPrecisionCallback, PTQCallback, QATCallback
from pquant_lightning.config import ConfigManager
from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.compression_method import CompressionMethod, LayerMethod
from pquant_lightning.core.errors import PQuantError
from pquant_lightning.core.layer_adapter import LayerAdapter, register_adapter
from pquant_lightning.core.plan import CompressionPlan
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import CompressionReport
from pquant_lightning.methods.low_rank.svd import LowRankCompression
from pquant_lightning.methods.pruning.family import PruningCompression
from pquant_lightning.methods.pruning.unstructured import UnstructuredPruning
from pquant_lightning.methods.quantization.family import QuantizationCompression
from pquant_lightning.methods.quantization.mixed_precision import MixedPrecisionCompression
from pquant_lightning.methods.quantization.ptq import PTQCompression
from pquant_lightning.methods.quantization.qat import QATCompression

__version__ = "0.1.0"

__all__ = [
    "CompressedLayer",
    "CompressedModule",
    "CompressionCallback",
    "CompressionMethod",
    "CompressionMethodRegistry",
    "CompressionPlan",
    "CompressionReport",
    "ConfigManager",
    "LayerAdapter",
    "LayerMethod",
    "LowRankCallback",
    "LowRankCompression",
    "MixedPrecisionCallback",
    "MixedPrecisionCompression",
    "PQuantError",
    "PTQCallback",
    "PTQCompression",
    "PruningCallback",
    "PruningCompression",
    "QATCallback",
    "QATCompression",
    "QuantizationCompression",
    "UnstructuredPruning",
    "compress_model",
    "compression_report",
    "finalize",
    "load_compressed",
    "prepare",
    "register_adapter",
    "save_compressed",
]

# Like Lightning, show our messages even where the program sets up no logging.
_log = logging.getLogger(__name__)
if not _log.hasHandlers():
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.INFO)
    _log.propagate = False
