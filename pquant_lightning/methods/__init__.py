"""The methods of this package by registry name, so that they can be listed before any of them is imported."""

BUILT_IN = {
    "lora": "low_rank.lora",
    "low_rank": "low_rank.svd",
    "factorization": "low_rank.factorization",
    "structured_pruning": "pruning.structured",
    "unstructured_pruning": "pruning.unstructured",
    "ptq": "quantization.ptq",
    "mixed_precision": "quantization.mixed_precision",
    "qat": "quantization.qat",
    "cp": "tensor_networks.cp",
    "tensor_train": "tensor_networks.tensor_train",
    "tucker": "tensor_networks.tucker",
    "pruning": "pruning.family",
    "quantization": "quantization.family",
    "tensor_network": "tensor_networks.family",
}
"""Registry name -> module of this package that registers it, in the order in which they are registered."""
