"""EvaluationPipeline: each metric against a figure known by hand, on every form of data."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassF1Score

from pquant_lightning import EvaluationPipeline, compress_model, save_compressed
from pquant_lightning.core.errors import CalibrationError, OptionError
from tests.models import MLP, SmallData


class Fixed(nn.Module):
    """Says class 1 for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.0, 1.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.expand(len(x), 3)


LABELS = torch.tensor([1, 1, 1, 0, 2, 1, 0, 1])  # five of eight are class 1
BATCHES = [(torch.zeros(4, 2), LABELS[:4]), (torch.zeros(4, 2), LABELS[4:])]


def other() -> Fixed:
    """Says class 2."""
    model = Fixed()
    model.scale.data = torch.tensor([0.0, 1.0, 3.0])
    return model


@pytest.mark.parametrize("form", [lambda x, y: (x, y), lambda x, y: {"x": x, "labels": y}], ids=["tuple", "dict"])
def test_accuracy(form: Any) -> None:
    report = EvaluationPipeline(["accuracy"]).run(Fixed(), other(), [form(x, y) for x, y in BATCHES])
    assert report["accuracy"].before == pytest.approx(5 / 8)
    assert report["accuracy"].after == pytest.approx(1 / 8)
    assert report.samples == 8


def test_a_metric_of_torchmetrics() -> None:
    report = EvaluationPipeline([MulticlassF1Score(3, average="micro")]).run(Fixed(), other(), BATCHES)
    assert report["MulticlassF1Score"].before == pytest.approx(5 / 8)


def test_output_errors() -> None:
    report = EvaluationPipeline(["output_error", "output_cosine"]).run(Fixed(), other(), BATCHES)
    a, b = Fixed().scale, other().scale
    assert report["output_error"].after == pytest.approx(float((b - a).norm() / a.norm()))
    assert report["output_cosine"].after == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert report["output_error"].before is None


def test_sizes_and_costs(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    small = compress_model(model, "low_rank", rank=8)
    metrics = ["size", "params", "compression_ratio", "macs", "peak_memory", "latency", "throughput"]
    report = EvaluationPipeline(metrics, seconds=0.05).run(model, small, [torch.randn(32, 64)])
    assert report["params"].before == 4810
    assert report["params"].after == 1690
    assert report["compression_ratio"].after == pytest.approx(4810 / 1690)
    assert report["macs"].before == 64 * 64 + 64 * 10
    assert report["macs"].after == 2 * 64 * 8 + 64 * 8 + 8 * 10
    assert report["size"].after == save_compressed(small, tmp_path / "a.safetensors").stat().st_size
    assert report["size"].before == save_compressed(model, tmp_path / "b.safetensors").stat().st_size
    assert report["throughput"].before == pytest.approx(32_000 / report["latency"].before)
    assert "parameters before / after" in str(report)
    assert report.to_dict()["metrics"]["params"]["after"] == 1690


def test_what_the_models_own_validation_logs() -> None:
    model = MLP()
    small = compress_model(model, "low_rank", rank=2)
    report = EvaluationPipeline(["val_loss"]).run(model, small, MLP.loader(1))
    with torch.no_grad():
        expected = torch.stack([model.loss(batch) for batch in MLP.loader(1)]).mean()
    assert report["val_loss"].before == pytest.approx(float(expected), rel=1e-5)
    assert report["val_loss"].after != report["val_loss"].before
    with pytest.raises(OptionError, match="'val_los' is not logged by the validation. Did you mean 'val_loss'"):
        EvaluationPipeline(["val_los"]).run(model, small, MLP.loader(1))


def test_a_datamodule_gives_its_validation_data() -> None:
    report = EvaluationPipeline(["val_loss", "output_error"]).run(MLP(), MLP(), SmallData())
    assert report.samples == 32
    assert report["val_loss"].before is not None


@pytest.mark.parametrize(
    ("metrics", "batches", "message"),
    [
        (["acuracy"], BATCHES, "There is no metric 'acuracy'. Did you mean 'accuracy'"),
        (["accuracy"], None, "need data"),
        (["accuracy"], [torch.zeros(4, 2)], "hold no target"),
        (["accuracy"], [{"x": torch.zeros(4, 2), "z": LABELS[:4]}], "a target is called labels"),
    ],
)
def test_bad_input(metrics: Any, batches: Any, message: str) -> None:
    with pytest.raises((OptionError, CalibrationError), match=message):
        EvaluationPipeline(metrics).run(Fixed(), Fixed(), batches)


@pytest.mark.parametrize("metrics", ["accuracy", [], [3]])
def test_bad_metrics(metrics: Any) -> None:
    with pytest.raises(OptionError, match="a list of names or torchmetrics objects"):
        EvaluationPipeline(metrics)
