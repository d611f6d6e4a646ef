"""Evaluation of a compressed model against the original: metric, size, cost, speed, memory and output error."""

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from pquant_lightning.callbacks._validation import check_logged, validation_metrics
from pquant_lightning.core.calibration import Samples, batch_size, bind_batch, run_samples
from pquant_lightning.core.deploy import count_params
from pquant_lightning.core.errors import CalibrationError, OptionError, known
from pquant_lightning.core.report import count_macs
from pquant_lightning.core.serialization import artifact_metadata, write_artifact
from pquant_lightning.utils.benchmarking import BenchmarkReport, benchmark_models

MAX_SAMPLES = 256  # for output errors and timing; metrics see all data
_TARGET_KEYS = ("labels", "label", "target", "targets", "y")


@dataclass(frozen=True)
class Measured:
    """One metric of both models; `unit` is a word for people, `after` is of the compressed model."""

    before: float | None
    after: float
    unit: str

    @property
    def change(self) -> float | None:
        """After / before, for what has a size; None without a before, or where that is zero."""
        return None if not self.before else self.after / self.before


@dataclass(frozen=True)
class EvaluationReport:
    """Metrics of the original and the compressed model, by name; prints as a table.

    Attributes:
        metrics: by name, in the order asked for.
        samples: how many samples the metrics of accuracy have seen.
    """

    metrics: dict[str, Measured]
    samples: int

    def __getitem__(self, name: str) -> Measured:
        if name not in self.metrics:
            raise OptionError(f"{name!r} was not evaluated. {known(name, self.metrics)}")
        return self.metrics[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return asdict(self)

    def __str__(self) -> str:
        table = Table(title=f"Evaluation on {self.samples} samples", title_justify="left")
        table.add_column("Metric")
        for heading in ("Original", "Compressed", "Unit"):
            table.add_column(heading, justify="right")
        for name, found in self.metrics.items():
            before = "" if found.before is None else f"{found.before:,.6g}"
            table.add_row(name, before, f"{found.after:,.6g}", found.unit)
        console = Console(file=io.StringIO(), width=100, color_system=None)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


class _Pair:
    """Both models on the same data, and what several metrics share."""

    def __init__(self, original: nn.Module, compressed: nn.Module, loader: Any, seconds: float) -> None:
        self.original, self.compressed, self.loader, self.seconds = original, compressed, loader, seconds

    @cached_property
    def few(self) -> Samples:
        """Up to `MAX_SAMPLES` samples."""
        if self.loader is None:
            raise OptionError("Accuracy, errors, MACs and speed need data: give EvaluationPipeline.run a loader.")
        batches, count = [], 0
        for batch in _batches(self.loader):
            batches.append(batch)
            count += batch_size(batch)
            if count >= MAX_SAMPLES:
                break
        return Samples.take(batches, min(count, MAX_SAMPLES))

    @cached_property
    def inputs(self) -> Any:
        args, kwargs = bind_batch(self.original, self.few.batches[0])
        return kwargs or args

    @cached_property
    def benchmark(self) -> BenchmarkReport:
        models = {"original": self.original, "compressed": self.compressed}
        return benchmark_models(models, self.inputs, seconds=self.seconds)

    @cached_property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """`(samples, values)` of both models."""
        found = [
            torch.cat([main_output(y).detach().float().flatten(1) for y in run_samples(model, self.few)])
            for model in (self.original, self.compressed)
        ]
        return found[0], found[1]

    def validation(self, name: str) -> tuple[float, float]:
        values = []
        for model in (self.original, self.compressed):
            metrics = self._validated(model)
            check_logged(name, metrics)
            values.append(metrics[name])
        return values[0], values[1]

    @cached_property
    def _logged(self) -> dict[int, dict[str, float]]:
        return {}

    def _validated(self, model: nn.Module) -> dict[str, float]:
        if id(model) not in self._logged:
            self._logged[id(model)] = validation_metrics(model, self.loader)
        return self._logged[id(model)]

    def scored(self, metric: Metric) -> tuple[float, float]:
        before, after = (_score(model, metric, self.loader) for model in (self.original, self.compressed))
        return before, after


def _batches(loader: Any) -> Any:
    """Validation batches of a datamodule, or the loader itself."""
    if not hasattr(loader, "val_dataloader"):
        return loader
    loader.prepare_data()
    loader.setup("validate")
    return loader.val_dataloader()


def main_output(output: Any) -> Tensor:
    """The tensor that a model's output is about: itself, `logits`, or the first tensor of a dict or tuple.

    Raises:
        CalibrationError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    for value in inner:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise CalibrationError(f"The model returns a {type(output).__name__} without a tensor to compare.")


def target_of(batch: Any) -> Tensor:
    """The target of a batch: the last entry of a tuple, or the entry of a dict called label(s) or target(s).

    Raises:
        CalibrationError: there is none.
    """
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return batch[key]
        raise CalibrationError(
            f"The batches are dicts with {', '.join(map(repr, batch))}; a target is called {', '.join(_TARGET_KEYS)}."
        )
    if isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[-1]
    raise CalibrationError("The batches hold no target; accuracy needs batches (inputs, target).")


def _score(model: nn.Module, metric: Metric, loader: Any) -> float:
    metric.reset()
    for outputs, batch in _predictions(model, loader):
        metric.update(outputs.cpu(), target_of(batch).cpu())
    return float(metric.compute())


def _predictions(model: nn.Module, loader: Any) -> Iterator[tuple[Tensor, Any]]:
    for batch in _batches(loader):
        one = Samples.take([batch], batch_size(batch))
        for output in run_samples(model, one):
            yield main_output(output), batch


def _accuracy(pair: _Pair) -> Measured:
    classes = next(main_output(output) for output in run_samples(pair.original, pair.few)).shape[1]
    before, after = pair.scored(MulticlassAccuracy(num_classes=classes, average="micro"))
    return Measured(before, after, "share")


def _bytes(model: nn.Module) -> int:
    """Bytes of the artefact."""
    with tempfile.TemporaryDirectory() as folder:
        return write_artifact(model, Path(folder, "model.safetensors"), artifact_metadata(model))


def _size(pair: _Pair) -> Measured:
    return Measured(_bytes(pair.original), _bytes(pair.compressed), "bytes on disk")


def _params(pair: _Pair) -> Measured:
    return Measured(count_params(pair.original), count_params(pair.compressed), "parameters")


def _ratio(pair: _Pair) -> Measured:
    found = _params(pair)
    return Measured(1.0, (found.before or 0) / max(found.after, 1), "parameters before / after")


def _macs(pair: _Pair) -> Measured:
    size = batch_size(pair.few.batches[0])
    before, after = (count_macs(model, pair.inputs) for model in (pair.original, pair.compressed))
    if before is None or after is None:
        raise OptionError("MACs cannot be counted: the model's forward looks at values. Leave 'macs' out.")
    return Measured(before[""] / size, after[""] / size, "multiply-accumulates per sample")


def _latency(pair: _Pair) -> Measured:
    models = pair.benchmark.models
    unit = f"ms for a batch of {pair.benchmark.batch_size}"
    return Measured(models["original"].latency.median_ms, models["compressed"].latency.median_ms, unit)


def _throughput(pair: _Pair) -> Measured:
    models = pair.benchmark.models
    return Measured(models["original"].throughput, models["compressed"].throughput, "samples per second")


def _peak_memory(pair: _Pair) -> Measured:
    models = pair.benchmark.models
    return Measured(models["original"].peak_bytes, models["compressed"].peak_bytes, "bytes of activations")


def _output_error(pair: _Pair) -> Measured:
    before, after = pair.outputs
    return Measured(None, float((after - before).norm() / before.norm().clamp_min(1e-30)), "relative")


def _cosine(pair: _Pair) -> Measured:
    return Measured(None, float(nn.functional.cosine_similarity(*pair.outputs).mean()), "mean over samples")


METRICS: dict[str, Callable[[_Pair], Measured]] = {
    "accuracy": _accuracy,
    "compression_ratio": _ratio,
    "latency": _latency,
    "throughput": _throughput,
    "size": _size,
    "params": _params,
    "macs": _macs,
    "peak_memory": _peak_memory,
    "output_error": _output_error,
    "output_cosine": _cosine,
}
"""What is known by name; any other name is one that the model's own `validation_step` logs."""


class EvaluationPipeline:
    """Measures a compressed model against the original, both on the same inputs, timing them in turn.

    Args:
        metrics: names of `METRICS`, names that the model's `validation_step` logs ("val_acc"), or torchmetrics objects,
            which are updated with `(output, target)`.
        seconds: about how long the timing may take.

    Raises:
        OptionError: no metric, or an entry that is neither a name nor a metric.

    >>> net, batches = nn.Linear(4, 3), [(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))]
    >>> report = EvaluationPipeline(["params", "output_error"]).run(net, net, batches)
    >>> report["params"].after, report["output_error"].after
    (15, 0.0)
    """

    def __init__(
        self, metrics: Sequence[str | Metric] = ("accuracy", "compression_ratio", "latency"), *, seconds: float = 2.0
    ) -> None:
        if isinstance(metrics, str) or not metrics or not all(isinstance(m, str | Metric) for m in metrics):
            raise OptionError(f"metrics is a list of names or torchmetrics objects, got {metrics!r}.")
        self.metrics, self.seconds = list(metrics), seconds

    def run(self, original: nn.Module, compressed: nn.Module, loader: Any = None) -> EvaluationReport:
        """Evaluates both models.

        Args:
            original: the uncompressed model.
            compressed: training form or deployed form.
            loader: a loader, a list of batches `(inputs, target)` or dicts, or a datamodule (its validation data).

        Raises:
            OptionError: a name is neither known nor logged by the validation, or data are missing.
        """
        pair = _Pair(original, compressed, loader, self.seconds)
        found = {_label(metric): self._measure(metric, pair) for metric in self.metrics}
        seen = 0 if loader is None else sum(batch_size(batch) for batch in _batches(loader))
        return EvaluationReport(found, seen)

    def _measure(self, metric: str | Metric, pair: _Pair) -> Measured:
        if isinstance(metric, Metric):
            return Measured(*pair.scored(metric), "")
        if metric in METRICS:
            return METRICS[metric](pair)
        if not isinstance(pair.original, LightningModule):
            raise OptionError(f"There is no metric {metric!r}. {known(metric, METRICS)}")
        return Measured(*pair.validation(metric), "as validation_step logs it")


def _label(metric: str | Metric) -> str:
    return metric if isinstance(metric, str) else type(metric).__name__
