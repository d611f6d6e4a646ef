"""Layers and batches at the edge: no samples, no weights, sparse gradients, float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    CompressionMethodRegistry,
    FactorizationCallback,
    LoRACallback,
    LowRankCallback,
    MixedPrecisionCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    TensorTrainCallback,
    compress_model,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from tests.models import CLASSES, Inputs, SmallModule, built, fit, quiet_trainer


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


MODELS: dict[str, tuple[nn.Module, tuple[int, ...] | None]] = {
    "linear": (nn.Sequential(nn.Linear(24, 16)), (8, 3, 24)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 16, 3)), (8, 4, 9)),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 16, 3, groups=2)), (8, 4, 9, 9)),
    "conv3d": (nn.Sequential(nn.Conv3d(4, 8, 2)), (4, 4, 4, 4, 4)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), (8, 4, 9, 9)),
    "embedding": (nn.Sequential(nn.Embedding(32, 16)), None),
    "attention": (Attending(), (4, 5, 16)),
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("ptq", {}),
    ("ptq", {"scheme": "dynamic", "bits": 4, "first_last_bits": 4}),
    ("ptq", {"scheme": "weight_only", "bits": 4, "group_size": 4}),
    ("mixed_precision", {"average_bits": 4.0}),
    ("qat", {"bits": 8}),
    ("qat", {"bits": 4, "quantizer": "lsq", "first_last_bits": 4, "num_samples": 0}),
    ("qat", {"bits": 4, "quantizer": "pact", "first_last_bits": 4}),
]


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_no_samples(name: str) -> None:
    model, shape = MODELS[name]
    x = torch.randint(32, (8, 5)) if shape is None else torch.randn(shape)
    nothing = x[:0]
    for method, options in METHODS:
        small = compress_model(model, method, train_loader=[x, nothing], min_saving=0.0, **options)
        assert compressed_layers(small)
        if method == "qat":
            small.train()
            for batch in (nothing, x, nothing):  # it neither starts a range nor changes one
                small(batch).sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)
        for form in (small.eval(), finalize(small).eval()):
            for tracking in (True, False):
                with torch.set_grad_enabled(tracking):
                    assert form(nothing).shape == model(nothing).shape, (method, options)
            assert torch.isfinite(form(x)).all()


EMPTY: dict[str, tuple[nn.Module, str]] = {
    "no inputs": (nn.Sequential(nn.Linear(0, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32)), "0"),
    "no inputs, no bias": (nn.Sequential(nn.Linear(0, 32, bias=False), nn.Linear(32, 32)), "0"),
    "no outputs": (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 0)), "2"),
    "embedding": (nn.Sequential(nn.Embedding(16, 0), nn.Linear(0, 32), nn.Linear(32, 32)), "1"),
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("low_rank", {"rank": 2}),
    ("tensor_train", {"rank": 2}),
    ("factorization", {}),
    ("lora", {}),
    ("unstructured_pruning", {"sparsity": 0.5, "include": ["*"]}),
]


@pytest.mark.parametrize("name", EMPTY)
def test_layers_without_weights_are_left_alone_with_the_reason(name: str) -> None:
    model, empty = EMPTY[name]
    first: Any = model[0]  # type: ignore[index]
    x = torch.randint(16, (5,)) if name == "embedding" else torch.randn(5, first.in_features)
    for method, options in METHODS + OTHERS:
        options = {**options, "min_saving": 0.0}
        plan = CompressionMethodRegistry.get(method, options).plan(model)
        assert "holds no" in {skip.name: skip.reason for skip in plan.skipped}[empty], method
        small = compress_model(model, method, train_loader=[x], **options)
        assert small(x).shape == finalize(small)(x).shape == model(x).shape


class SparseWords(SmallModule):
    """An embedding under SparseAdam, the other layers under Adam."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.automatic_optimization = False
        self.words = nn.Embedding(64, 32, sparse=True)
        self.body, self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)), nn.Linear(64, CLASSES)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randint(64, (count, 5), generator=generator),)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.words(tokens).mean(1))))

    def configure_optimizers(self) -> Any:
        rest = [p for name, p in self.named_parameters() if not name.startswith("words")]
        return [torch.optim.SparseAdam(self.words.parameters(), lr=0.01), torch.optim.Adam(rest, lr=0.01)]

    def training_step(self, batch: Inputs, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


CALLBACKS: dict[str, Any] = {
    "low_rank": lambda: LowRankCallback(rank=4),
    "factorization": lambda: FactorizationCallback(kind="nmf"),
    "tensor_train": lambda: TensorTrainCallback(rank=4),
    "lora": lambda: LoRACallback(r=2),
    "qat": lambda: QATCallback(bits=4),
    "taylor": lambda: PruningCallback(sparsity=0.5, criterion="taylor", include=["words", "body.*"]),
    "channels": lambda: StructuredPruningCallback(sparsity=0.5, round_to=1, criterion="taylor"),
    "during": lambda: StructuredPruningCallback(sparsity=0.5, round_to=1, remove="during"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_an_embedding_with_sparse_gradients_is_left_alone_with_the_reason(name: str, tmp_path: Path) -> None:
    callback = CALLBACKS[name]()
    model: Any = fit(quiet_trainer(tmp_path, [callback]), built(SparseWords))
    reasons = [skip.reason for skip in callback.report.skipped if "words" in skip.name]
    assert len(reasons) == 1
    assert "its gradients are sparse" in reasons[0]
    assert type(model.words) is nn.Embedding
    assert model.words.weight.shape == (64, 32)
    trained = not torch.equal(model.words.weight, built(SparseWords).words.weight)
    assert trained == (name != "lora")  # which freezes it
    assert callback.report.size_bytes[1] < callback.report.size_bytes[0] or name in ("taylor", "lora")


@pytest.mark.parametrize("callback", [PTQCallback, MixedPrecisionCallback])
def test_after_the_training_it_is_rounded_like_any_other(callback: Any, tmp_path: Path) -> None:
    quantizing = callback()
    fit(quiet_trainer(tmp_path, [quantizing]), built(SparseWords))
    assert load_compressed(SparseWords, quantizing.artifact).words.kind == "int_embedding"


class Doubles(nn.Module):
    """Every kind of layer that is quantized, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(32, 16), nn.Linear(16, 48)
        self.conv, self.norm = nn.Conv1d(48, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.up, self.attend = nn.ConvTranspose1d(16, 16, 3), Attending()
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.fc(self.words(tokens))).transpose(1, 2)
        hidden = self.up(torch.relu(self.norm(self.conv(hidden)))).transpose(1, 2)
        return hidden + self.attend(hidden)


DOUBLES: list[tuple[str, dict[str, Any]]] = [
    *(("ptq", {"scheme": s, "bits": b}) for s in ("static", "dynamic", "weight_only") for b in (8, 4)),
    ("ptq", {"weight_bits": 4, "act_bits": 8}),
    *(("ptq", {"bits": 4, "rounding": rounding}) for rounding in ("adaround", "awq", "hqq", "nearest")),
    ("ptq", {"smooth": 0.5, "equalize": True}),
    ("mixed_precision", {"average_bits": 4.0}),
    *(("qat", {"bits": 4, "quantizer": quantizer}) for quantizer in ("ste", "lsq", "pact")),
]


@pytest.mark.parametrize(("method", "options"), DOUBLES, ids=str)
def test_float64_is_as_good_as_float32(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    tokens = torch.randint(32, (16, 6), generator=torch.Generator().manual_seed(0))
    errors = []
    torch.manual_seed(0)
    model = Doubles().eval()
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        small = finalize(compress_model(model, method, train_loader=[tokens], min_saving=0.0, **options)).eval()
        loaded = load_compressed(Doubles().to(dtype), save_compressed(small, tmp_path / "small.safetensors")).eval()
        with torch.no_grad():
            found = small(tokens)
            assert found.dtype == dtype
            torch.testing.assert_close(loaded(tokens), found, rtol=1e-5, atol=1e-5)  # kernels are chosen by time
            errors.append(float((found - model(tokens)).norm() / model(tokens).norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.05, abs=0.002)
    assert 0 < errors[0] < 0.5
