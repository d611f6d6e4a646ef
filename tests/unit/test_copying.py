"""Copies of models that hold what cannot be copied, and everything that makes copies, run on such a model."""

import copy
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    CompressionPipeline,
    CompressionReportCallback,
    DistillationCallback,
    EvaluationPipeline,
    LowRankCallback,
    PQuantError,
    QATCallback,
    compress_model,
    compression_report,
    export_model,
    finalize,
    save_compressed,
)
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.utils.benchmarking import benchmark_models
from tests.models import MLP, fit, quiet_trainer


class Handle:
    """An object of a user's own with a lock deep inside, and with a tensor."""

    def __init__(self) -> None:
        self.locks = [threading.Lock()]
        self.tensor = torch.ones(3)


class Locked(MLP):
    """Holds what cannot be copied: in itself, in its layers, in a list, in an object."""

    def __init__(self, lr: float = 0.01, width: int = 32) -> None:
        super().__init__(lr, width)
        self.lock = threading.Lock()
        self.socket = socket.socket()
        self.file = Path(__file__).open(encoding="utf-8")  # noqa: SIM115
        self.numbers = iter(number for number in range(3))
        self.handle = Handle()
        self.mean = {"weight": self.fc1.weight.mean(0), "of": self.fc1.weight}  # not a leaf: torch refuses, too
        for layer in (self.fc1, self.fc2, self.head):
            layer.lock = threading.Lock()


def closed(model: Locked) -> None:
    model.socket.close()
    model.file.close()


@pytest.fixture
def model() -> Any:
    locked = Locked()
    yield locked
    closed(locked)


class TestDeepCopy:
    def test_only_what_refuses_is_shared(self, model: Locked) -> None:
        with pytest.raises(TypeError, match="pickle"):
            copy.deepcopy(model)
        twin = deep_copy(model)
        for name in ("lock", "socket", "file", "numbers"):
            assert getattr(twin, name) is getattr(model, name)
        assert twin.handle is not model.handle
        assert twin.handle.locks is not model.handle.locks
        assert twin.handle.locks[0] is model.handle.locks[0]

    def test_no_tensor_is_shared(self, model: Locked) -> None:
        twin = deep_copy(model)
        assert all(twin.state_dict()[name].data_ptr() != t.data_ptr() for name, t in model.state_dict().items())
        assert twin.mean["of"] is twin.fc1.weight
        expected = [model.mean["weight"].detach().clone(), torch.ones(3)]
        twin.mean["weight"].add_(1)
        twin.handle.tensor.add_(1)
        assert torch.equal(model.mean["weight"], expected[0])
        assert torch.equal(model.handle.tensor, expected[1])

    def test_ties_and_views_stay(self, model: Locked) -> None:
        model.head.bias = model.fc2.bias  # not of one size, only of one object
        model.register_buffer("long", torch.zeros(6))
        model.part = model.long[:2]
        twin = deep_copy(model)
        assert twin.head.bias is twin.fc2.bias
        twin.long.fill_(3)
        assert twin.part.tolist() == [3, 3]
        assert model.part.tolist() == [0, 0]

    def test_a_plain_model_is_copied_as_ever(self) -> None:
        plain = MLP()
        plain.extra = [Handle().tensor]
        twin, expected = deep_copy(plain), copy.deepcopy(plain)
        assert list(twin.state_dict()) == list(expected.state_dict())
        assert torch.equal(twin.extra[0], expected.extra[0])
        assert twin.extra[0] is not plain.extra[0]

    def test_many_locks_take_no_quadratic_time(self) -> None:
        layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(500))
        for layer in layers:
            layer.lock = threading.Lock()
        start = time.monotonic()
        deep_copy(layers)
        assert time.monotonic() - start < 5

    def test_what_refuses_as_a_whole(self) -> None:
        class Alone(nn.Module):
            def __deepcopy__(self, memo: Any) -> Any:
                raise TypeError("never")

        with pytest.raises(PQuantError, match="Alone cannot be copied: never"):
            deep_copy(Alone())

    def test_what_makes_anew_what_refuses(self) -> None:
        class Maker:
            def __getstate__(self) -> Any:
                return {"lock": threading.Lock()}

        with pytest.raises(PQuantError, match="list cannot be copied: it makes anew"):
            deep_copy([Maker()])


def test_everything_that_copies_takes_such_a_model(model: Locked, tmp_path: Path) -> None:
    inputs = Locked.inputs()
    with torch.no_grad():
        expected: Tensor = model.eval()(*inputs)
    small = compress_model(model, "low_rank", rank=8)
    calibrated = compress_model(model, "ptq", train_loader=Locked.loader())
    compress_model(model, "mixed_precision", train_loader=Locked.loader(), average_bits=5)
    final = finalize(small)
    compression_report(model, final)
    save_compressed(small, tmp_path / "a.safetensors")
    export_model(small, inputs, tmp_path / "onnx.onnx", format="onnx")
    export_model(compress_model(model, "lora"), inputs, tmp_path / "peft", format="peft")
    benchmark_models({"before": model, "after": final}, inputs, max_seconds=0.1)
    EvaluationPipeline(["compression_ratio"]).run(model, calibrated, Locked.loader())
    CompressionPipeline(["low_rank", "ptq"]).run(model, train_loader=Locked.loader())
    with torch.no_grad():
        assert torch.equal(model(*inputs), expected)  # and none of them has touched it


def test_the_callbacks_that_copy_take_such_a_model(model: Locked, tmp_path: Path) -> None:
    report = CompressionReportCallback()
    trainer = quiet_trainer(tmp_path, [DistillationCallback(), LowRankCallback(rank=8), QATCallback(), report])
    fit(trainer, model)
    assert report.path is not None
    assert "latency" in report.path.with_suffix(".md").read_text(encoding="utf-8")
