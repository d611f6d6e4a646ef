"""Every kind of layer in its deployed form is exported to every format, whose own runtime computes the same."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import CompressedLayer, compress_model, export_model, finalize
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.exporters.base import ExportError
from pquant_lightning.exporters.export import EXPORTERS

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(24, 40), (4, 24)),
    "conv1d": (nn.Conv1d(4, 16, 3), (4, 4, 9)),
    "conv2d": (nn.Conv2d(4, 16, 3, groups=2, padding=1), (4, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 16, 3), (4, 4, 5, 5, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(8, 12, 3), (4, 8, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(8, 12, 3, stride=2), (4, 8, 5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(8, 12, 2), (4, 8, 3, 3, 3)),
    "embedding": (nn.Embedding(40, 24), (4, 6)),
    "attention": (nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0, batch_first=True), (4, 6, 24)),
}
INT_ROWS = [(layer, "ptq", {"min_saving": 0.0}) for layer in LAYERS]
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    *INT_ROWS,
    ("linear", "ptq", {"scheme": "dynamic"}),
    ("conv2d", "ptq", {"scheme": "dynamic", "min_saving": 0.0}),
    ("linear", "ptq", {"bits": 4, "scheme": "weight_only", "group_size": 8}),
    ("linear", "ptq", {"bits": 3}),
    ("embedding", "ptq", {"bits": 4, "scheme": "weight_only"}),
    ("linear", "low_rank", {"rank": 4}),
    ("conv2d", "low_rank", {"rank": 2}),
    ("conv2d", "low_rank", {"rank": 2, "split": "spatial"}),
    ("conv_transpose2d", "low_rank", {"rank": 2}),
    ("embedding", "low_rank", {"rank": 4}),
    ("linear", "factorization", {"kind": "kronecker", "rank": 4}),
    ("linear", "factorization", {"kind": "monarch", "rank": 2}),
    ("linear", "factorization", {"rank": 4}),
    ("conv2d", "factorization", {"rank": 2}),
    ("conv_transpose2d", "factorization", {"rank": 2}),
    ("embedding", "factorization", {"rank": 4}),
    *((layer, "structured_pruning", {"round_to": 1}) for layer in LAYERS),
    ("linear", "lora on integers", {"r": 4}),
    ("conv2d", "lora on integers", {"r": 4, "use_dora": True}),
    ("embedding", "lora on integers", {"r": 4, "init": "pissa"}),
    ("linear", "tensor_train", {"rank": 3}),
    ("embedding", "tensor_train", {"rank": 3}),
    ("conv2d", "tensor_train", {"rank": 1}),
    ("conv2d", "tucker", {"rank": 2, "min_saving": 0.0}),
    ("conv_transpose2d", "tucker", {"rank": 2}),
    ("linear", "cp", {"rank": 4}),
    ("conv2d", "cp", {"rank": 2, "min_saving": 0.0}),
]


def _inputs(name: str) -> torch.Tensor:
    shape = LAYERS[name][1]
    torch.manual_seed(1)
    return torch.randint(40, shape) if name == "embedding" else torch.randn(shape)


def _deployed(name: str, method: str, options: dict[str, Any]) -> nn.Module:
    model = nn.Sequential(LAYERS[name][0])
    if method == "structured_pruning" and name != "attention":  # whose channels somebody reads
        with torch.no_grad():
            channels = model(_inputs(name)).shape[-1 if name in ("linear", "embedding") else 1]
        dims = getattr(LAYERS[name][0], "kernel_size", ())
        reader: Any = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(dims)]
        model.append(reader(channels, 6, *([1] if dims else [])))
        if getattr(LAYERS[name][0], "groups", 1) > 1:  # groups go with their inputs
            model.insert(0, nn.Conv2d(4, 4, 1))
    if method == "lora on integers":  # elsewhere an adapter is merged
        model = compress_model(model, "ptq", train_loader=[_inputs(name)], min_saving=0.0)
        model = compress_model(model, "lora", **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return finalize(model)
    return finalize(compress_model(model, method, train_loader=[_inputs(name)], **options))


@cache
def _case(place: int) -> tuple[nn.Module, torch.Tensor]:
    layer, method, options = ROWS[place]
    return _deployed(layer, method, options), _inputs(layer)


@pytest.mark.parametrize("kind", ["onnx", "pt2", "jax", "tensorflow", "tflite"])
@pytest.mark.parametrize("place", range(len(ROWS)), ids=[" ".join(map(str, row)) for row in ROWS])
def test_every_format_computes_the_same(kind: str, place: int, tmp_path: Path) -> None:
    model, x = _case(place)
    specs = [layer.spec for layer in compressed_layers(model).values()]
    assert specs
    bits = {spec["bits"] for spec in specs if "bits" in spec}
    if not bits <= set(EXPORTERS[kind].bits):
        with pytest.raises(ExportError, match=f"{kind} has no type for weights of"):
            export_model(model, x, tmp_path / "model", kind)
        return
    if kind == "tflite" and ROWS[place][:2] == ("conv3d", "ptq"):  # which its converter leaves in floating point
        with pytest.raises(ExportError, match="turned some into floating point.*3-d convolutions"):
            export_model(model, x, tmp_path / "model", kind)
        return
    result = export_model(model, x, tmp_path / "model", kind)
    assert result.integer_weights is (bool(bits) and _holds_integers(model, kind))
    # a value between two codes may fall on either side; LiteRT rounds the inputs of layers by itself
    rounds = any(spec.get("act") for spec in specs) or (kind == "tflite" and bits)
    assert result.max_error is not None
    assert result.max_error <= (5e-2 if rounds else 1e-5)


def _holds_integers(model: nn.Module, kind: str) -> bool:
    least = EXPORTERS[kind].least_integers
    return any(t.numel() >= least for t in model.buffers() if t.dtype in (torch.int8, torch.uint8))


@pytest.mark.parametrize("kind", ["onnx", "pt2", "jax", "tensorflow", "tflite"])
def test_a_folded_norm_is_exported(kind: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    x = _inputs("conv2d")
    net.train()(x)
    model = compress_model(net.eval(), "ptq", train_loader=[x], min_saving=0.0)
    assert type(model[1]).__name__ == "FoldedNorm"
    result = export_model(model, x, tmp_path / "model", kind)
    assert result.max_error is not None
    assert result.max_error <= 5e-2


def test_every_deployed_kind_has_a_row() -> None:
    exported = set()
    for name, method, options in ROWS:
        exported |= {layer.kind for layer in compressed_layers(_deployed(name, method, options)).values()}
    exported |= {"folded_norm", "adapted_layer", "unfused_recurrent"}  # around layers that have rows of their own
    own = {kind: cls for kind, cls in CompressedLayer.kinds.items() if cls.__module__.startswith("pquant_lightning.")}
    training_only = {kind for kind, cls in own.items() if kind.startswith("quant_")}
    assert set(own) - training_only == exported
