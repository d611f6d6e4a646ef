"""The public names; importing them registers every method, kind, adapter and callback."""

from pquant_lightning.api import (
    CompressedModule,
    compress_model,
    compression_report,
    finalize,
    load_compressed,
    prepare,
    save_compressed,
)
from pquant_lightning.backends.base import BackendUnavailable, get_backend
from pquant_lightning.backends.jax import to_jax, to_nnx
from pquant_lightning.backends.lowering.table import register_lowering
from pquant_lightning.backends.tensorflow import to_keras
from pquant_lightning.callbacks.base import CompressionCallback
from pquant_lightning.callbacks.distillation import DistillationCallback
from pquant_lightning.callbacks.lora import LoRACallback
from pquant_lightning.callbacks.low_rank import FactorizationCallback, LowRankCallback
from pquant_lightning.callbacks.pruning import PruningCallback, StructuredPruningCallback
from pquant_lightning.callbacks.quantization import MixedPrecisionCallback, PTQCallback, QATCallback
from pquant_lightning.callbacks.report import CompressionReportCallback
from pquant_lightning.callbacks.tensor_networks import CPCallback, TensorTrainCallback, TuckerCallback
from pquant_lightning.config import ConfigManager
from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.compression_method import CompressionMethod, LayerMethod
from pquant_lightning.core.errors import PQuantError
from pquant_lightning.core.layer_adapter import LayerAdapter, register_adapter
from pquant_lightning.core.optimizer import add_proximal_step
from pquant_lightning.core.plan import CompressionPlan
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import CompressionReport
from pquant_lightning.exporters.base import ExportResult
from pquant_lightning.exporters.export import export_model
from pquant_lightning.exporters.jax import load_jax
from pquant_lightning.exporters.peft import load_adapter, save_adapter
from pquant_lightning.methods.low_rank.factorization import FactorizationCompression
from pquant_lightning.methods.low_rank.lora import LoRACompression, merge_lora, unmerge_lora
from pquant_lightning.methods.low_rank.svd import LowRankCompression
from pquant_lightning.methods.pruning.family import PruningCompression
from pquant_lightning.methods.pruning.structured import StructuredPruning
from pquant_lightning.methods.pruning.unstructured import UnstructuredPruning
from pquant_lightning.methods.quantization.family import QuantizationCompression
from pquant_lightning.methods.quantization.mixed_precision import MixedPrecisionCompression
from pquant_lightning.methods.quantization.ptq import PTQCompression
from pquant_lightning.methods.quantization.qat import QATCompression
from pquant_lightning.methods.tensor_networks.cp import CPCompression
from pquant_lightning.methods.tensor_networks.family import TensorNetworkCompression
from pquant_lightning.methods.tensor_networks.tensor_train import TensorTrainCompression
from pquant_lightning.methods.tensor_networks.tucker import TuckerCompression
from pquant_lightning.pipelines.compression_pipeline import CompressionPipeline, CompressionResult, PipelineStage
from pquant_lightning.pipelines.evaluation_pipeline import EvaluationPipeline, EvaluationReport
from pquant_lightning.utils.benchmarking import benchmark_models
from pquant_lightning.utils.model_analysis import ModelAnalysis, analyze_model

__all__ = [
    "BackendUnavailable",
    "CPCallback",
    "CPCompression",
    "CompressedLayer",
    "CompressedModule",
    "CompressionCallback",
    "CompressionMethod",
    "CompressionMethodRegistry",
    "CompressionPipeline",
    "CompressionPlan",
    "CompressionReport",
    "CompressionReportCallback",
    "CompressionResult",
    "ConfigManager",
    "DistillationCallback",
    "EvaluationPipeline",
    "EvaluationReport",
    "ExportResult",
    "FactorizationCallback",
    "FactorizationCompression",
    "LayerAdapter",
    "LayerMethod",
    "LoRACallback",
    "LoRACompression",
    "LowRankCallback",
    "LowRankCompression",
    "MixedPrecisionCallback",
    "MixedPrecisionCompression",
    "ModelAnalysis",
    "PQuantError",
    "PTQCallback",
    "PTQCompression",
    "PipelineStage",
    "PruningCallback",
    "PruningCompression",
    "QATCallback",
    "QATCompression",
    "QuantizationCompression",
    "StructuredPruning",
    "StructuredPruningCallback",
    "TensorNetworkCompression",
    "TensorTrainCallback",
    "TensorTrainCompression",
    "TuckerCallback",
    "TuckerCompression",
    "UnstructuredPruning",
    "add_proximal_step",
    "analyze_model",
    "benchmark_models",
    "compress_model",
    "compression_report",
    "export_model",
    "finalize",
    "get_backend",
    "load_adapter",
    "load_compressed",
    "load_jax",
    "merge_lora",
    "prepare",
    "register_adapter",
    "register_lowering",
    "save_adapter",
    "save_compressed",
    "to_jax",
    "to_keras",
    "to_nnx",
    "unmerge_lora",
]
