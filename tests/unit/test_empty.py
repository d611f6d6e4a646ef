"""Nothing at all: batches of no samples, and layers of no weights, work wherever torch's own layers do."""

from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import compress_model, finalize
from pquant_lightning.core.compressed_layer import compressed_layers

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "low_rank": ("low_rank", {"rank": 2}),
    "sparse_low_rank": ("factorization", {"kind": "sparse_low_rank"}),
    "kronecker": ("factorization", {"kind": "kronecker"}),
    "monarch": ("factorization", {"kind": "monarch", "blocks": 2}),
    "lora": ("lora", {"r": 2}),
    "dora": ("lora", {"r": 2, "use_dora": True, "dropout": 0.1}),
    "tensor_train": ("tensor_train", {"rank": 2}),
    "tucker": ("tucker", {"rank": 2}),
    "cp": ("cp", {"rank": 2}),
}
NET = (nn.Linear(16, 12), nn.Unflatten(-1, (12, 1)), nn.Conv1d(12, 8, 3, padding=1), nn.Flatten(-2), nn.Linear(8, 8))


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_of_no_samples(name: str) -> None:
    method, options = ROWS[name]
    small = compress_model(nn.Sequential(*NET), method, min_saving=0.0, include=["*"], **options).train()
    assert compressed_layers(small)
    out = small(torch.randn(0, 16, requires_grad=True))
    out.sum().backward()
    for model in (small.eval(), finalize(small)):
        with torch.no_grad():
            assert model(torch.randn(0, 16)).shape == out.shape == (0, 8)


@pytest.mark.parametrize("empty", [nn.Linear(0, 8), nn.Linear(8, 0)], ids=["no_inputs", "no_outputs"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_is_left_alone(empty: nn.Linear) -> None:
    rows = [
        *ROWS.values(),
        ("ptq", {"scheme": "weight_only"}),
        ("qat", {}),
        ("unstructured_pruning", {"sparsity": 0.5}),
    ]
    for method, options in [row for row in rows if row[0] != "tucker"]:
        model = nn.Sequential(nn.Linear(24, 24), empty, nn.Linear(24, 24), nn.Linear(24, 24))
        small = compress_model(model, method, include=["*"], **options)
        assert type(small[1]) is nn.Linear, method
        assert small[1](torch.randn(2, empty.in_features)).shape == (2, empty.out_features)
