"""Every metric of EvaluationPipeline against numbers known beforehand, every kind of data, and bad input."""

import json

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

from pquant_lightning import (
    EvaluationPipeline,
    PQuantError,
    UnstructuredPruning,
    benchmark_models,
    compress_model,
    finalize,
    save_compressed,
)
from pquant_lightning.pipelines import evaluation_pipeline
from pquant_lightning.pipelines.evaluation_pipeline import METRICS

X = torch.eye(4)  # the logits of `Net` are its weight's columns
TARGET = torch.tensor([0, 1, 2, 3])


class Net(LightningModule):
    """A linear map with a given weight (4, 4), row = class."""

    def __init__(self, weight=None):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.layer.weight.data = (torch.eye(4) if weight is None else weight).clone()

    def forward(self, x):
        return self.layer(x)

    def validation_step(self, batch, batch_idx):
        x, target = batch
        self.log("val_acc", (self(x).argmax(-1) == target).float().mean())
        self.log("val_loss", F.cross_entropy(self(x), target))


def wrong_once():
    """Gives class 0 for the last sample, else what Net() gives."""
    weight = torch.eye(4)
    weight[:, 3] = torch.tensor([1.0, 0, 0, 0])
    return Net(weight)


def evaluated(metrics, data, before=None, after=None):
    return EvaluationPipeline(metrics=metrics).run(before or Net(), after or wrong_once(), data)


class Data(LightningDataModule):
    def setup(self, stage):
        self.ready = stage

    def val_dataloader(self):
        assert self.ready == "validate"
        return DataLoader(TensorDataset(X, TARGET), 2)


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TensorDataset(X, TARGET), 3),
        [(X[:1], TARGET[:1]), (X[1:], TARGET[1:])],
        [{"x": X, "labels": TARGET, "unused": X}],
        iter([(X, TARGET)]),
        Data(),
    ],
    ids=["loader", "list", "dict", "iterator", "datamodule"],
)
def test_accuracy_by_hand_on_every_kind_of_data(data):
    report = evaluated(["accuracy"], data)
    assert report.before == {"accuracy": 1.0}
    assert report.after == {"accuracy": 0.75}
    assert report.samples == 4


def test_output_error_and_cosine_by_hand():
    report = evaluated(["output_error", "output_cosine"], [X[:1], X[1:]])  # no target needed
    assert report.after["output_error"] == pytest.approx((2 / 4) ** 0.5)
    assert report.after["output_cosine"] == pytest.approx(3 / 4)
    assert report.before == {"output_error": 0.0, "output_cosine": 1.0}


def test_accuracy_of_tokens_and_of_pixels():
    class Tokens(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.scale, self.dim = nn.Parameter(torch.ones(1)), dim

        def forward(self, x):
            return {"loss": torch.zeros(()), "logits": (self.scale * x).movedim(-1, self.dim)}

    logits = F.one_hot(torch.tensor([[0, 1, 2], [2, 1, 0]]), 4).float()  # (2, 3, 4)
    target = torch.tensor([[0, 1, -100], [2, 3, -100]])  # three of four that count are right
    for dim in (-1, 1):
        net = Tokens(dim)
        assert evaluated(["accuracy"], [(logits, target)], net, net).before == {"accuracy": 0.75}


def test_a_torchmetrics_object_is_used_for_each_model_afresh():
    metric = MulticlassF1Score(4, average="macro")
    report = evaluated([metric], [(X, TARGET)])
    assert report.before == {"MulticlassF1Score": 1.0}
    f1 = (2 / 3 + 1 + 1 + 0) / 4  # class 0: precision 1/2, recall 1; class 3 is never given
    assert report.after["MulticlassF1Score"] == pytest.approx(f1)
    assert metric.update_count == 0


@pytest.mark.parametrize("data", [Data(), [(X, TARGET)]], ids=["datamodule", "list"])
def test_what_the_users_own_validation_step_logs(data):
    before, after = Net(), wrong_once()
    report = evaluated(["val_acc", "val_loss"], data, before, after)
    assert report.before["val_acc"] == 1.0
    assert report.samples == 4
    assert "Evaluation on 4 samples" in str(report)
    assert report.after["val_acc"] == 0.75
    assert report.before["val_loss"] == pytest.approx(float(F.cross_entropy(X, TARGET)))
    assert before.training
    assert before._trainer is None


def test_sizes_are_those_of_the_file_that_is_written(tmp_path):
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    small = compress_model(net, "low_rank", rank=8)
    example = torch.randn(3, 64)
    report = EvaluationPipeline(["size", "params", "compression_ratio", "macs"]).run(net, small, [example])
    assert report.after["size"] == save_compressed(small, tmp_path / "a.safetensors").stat().st_size
    assert report.before["size"] == save_compressed(net, tmp_path / "b.safetensors").stat().st_size
    before, after = 2 * (64 * 64 + 64), 2 * (64 * 8 + 8 * 64 + 64)
    assert (report.before["params"], report.after["params"]) == (before, after)
    assert report.after["compression_ratio"] == before / after
    assert (report.before["macs"], report.after["macs"]) == (2 * 64 * 64, 2 * 2 * 64 * 8)  # of one of three samples
    assert report.batch_size == 3


def test_the_training_form_is_measured_as_deployed():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    trained = compress_model(net, "qat", bits=8, train_loader=[torch.randn(16, 64)])
    metrics = ["size", "params", "output_error"]
    data = [torch.randn(8, 64)]
    pipeline = EvaluationPipeline(metrics)
    kinds = [type(m) for m in trained.modules()]
    report = pipeline.run(net, trained, data)
    assert report.after == pipeline.run(net, finalize(trained), data).after
    assert report.after["size"] < 0.5 * report.before["size"]
    assert 0 < report.after["output_error"] < 0.1
    assert [type(m) for m in trained.modules()] == kinds


@pytest.mark.parametrize(
    ("method", "options"),
    [("qat", {"bits": 4}), ("lora", {"r": 4}), ("structured_pruning", {"sparsity": 0.5}), ("low_rank", {"rank": 4})],
)
def test_neither_model_is_changed(method, options):
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).train()
    small = compress_model(net, method, train_loader=[torch.randn(8, 64)], **options).train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (net, small)]
    tensors = [[id(p) for p in model.parameters()] for model in (net, small)]
    EvaluationPipeline(["size", "output_error", "latency"]).run(net, small, [torch.randn(4, 64)])
    for model, state, ids in zip((net, small), before, tensors, strict=True):
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[name], state[name]) for name in state)
        assert [id(p) for p in model.parameters()] == ids
        assert model.training


def test_zeros_make_the_file_smaller_not_the_parameters():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparse = UnstructuredPruning(sparsity=0.9).compress(net)
    report = EvaluationPipeline(["size", "params"]).run(net, sparse)
    assert report.after["size"] < 0.3 * report.before["size"]
    assert report.after["params"] == report.before["params"]


def test_time_and_memory_of_both_on_the_same_batch_in_turns(monkeypatch):
    order = []

    class Noted(nn.Linear):
        def __init__(self, name, width):
            super().__init__(8, width)
            self.name = name

        def forward(self, x):
            order.append((self.name, tuple(x.shape)))
            return super().forward(x)

    data = [(torch.ones(5, 8), torch.zeros(5)), (torch.ones(2, 8), torch.zeros(2))]
    nets = nn.Sequential(Noted("a", 800)), nn.Sequential(Noted("b", 8))
    report = EvaluationPipeline(["latency", "throughput", "peak_memory"], seconds=0.1).run(*nets, data)
    assert {shape for _, shape in order} == {(5, 8)}
    timed = "".join(name for name, _ in order)
    assert {"ab", "ba"} <= {timed[i : i + 2] for i in range(len(timed))}
    assert report.before["peak_memory"] == (9 * 800 + 5 * 800) * 4
    assert report.after["peak_memory"] == (9 * 8 + 5 * 8) * 4
    latency = report.metrics[0]
    assert latency.intervals[0].low <= latency.before <= latency.intervals[0].high
    assert report.before["throughput"] == pytest.approx(5000 / latency.before)


def test_the_report_prints_and_is_json():
    report = evaluated(list(METRICS), [(X, TARGET)])
    assert list(report.before) == list(METRICS) == list(report.units)
    text = str(report)
    assert "75.00%" in text
    assert "bytes" in text
    payload = json.loads(json.dumps(report.to_dict()))
    assert payload["metrics"]["accuracy"] == {"unit": "share", "before": 1.0, "after": 0.75, "intervals": None}


def test_macs_that_cannot_be_counted_are_not_known():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    report = EvaluationPipeline(["macs"]).run(Looks(), Looks(), [X])
    assert report.before == {"macs": None}
    assert "not known" in str(report)


def test_the_timing_takes_as_long_as_it_may(monkeypatch):
    given = []
    monkeypatch.setattr(
        evaluation_pipeline, "benchmark_models", lambda *a, **k: given.append(k) or benchmark_models(*a, max_rounds=7)
    )
    EvaluationPipeline(["latency"], seconds=0.25).run(TWO, TWO, [X])
    assert given == [{"max_seconds": 0.25}]


TWO = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EvaluationPipeline([]), "at least one name"),
        (lambda: EvaluationPipeline("accuracy"), "a list of at least one"),
        (lambda: EvaluationPipeline([3]), "an object of torchmetrics, got 3"),
        (lambda: EvaluationPipeline(["size", "size"]), "given once"),
        (lambda: EvaluationPipeline(["acuracy"]).run(TWO, TWO, [X]), "Did you mean 'accuracy'"),
        (lambda: evaluated(["size"], None)["sizes"], "not evaluated. Did you mean 'size'"),
        (lambda: evaluated(["val_ac"], Data()), "logs 'val_acc', 'val_loss'.*Did you mean 'val_acc'"),
        (lambda: EvaluationPipeline(["accuracy", "latency"]).run(TWO, TWO), "accuracy need data"),
        (lambda: evaluated(["accuracy"], []), "hold no batch"),
        (lambda: evaluated(["macs"], []), "hold no batch"),
        (lambda: evaluated(["accuracy"], X), "got float32"),
        (lambda: evaluated(["accuracy"], [X]), "hold no target"),
        (lambda: evaluated(["accuracy"], [(X, TARGET.float())]), "integer targets"),
        (lambda: evaluated(["accuracy"], [(X, X)]), "integer targets"),
        (lambda: evaluated(["accuracy"], [(torch.ones(2, 3), TARGET)]), "cannot be run"),
        (lambda: evaluated(["output_error"], [X], after=nn.Linear(4, 3)), "differ in shape"),
        (lambda: evaluated([MulticlassF1Score(4, average=None)], [(X, TARGET)]), "no single number"),
        (lambda: evaluated(["size"], None, after=3), "compares two models, got int"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PQuantError, match=message):
        call()
