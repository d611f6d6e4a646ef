"""Before and after: quality on the user's data, size, work, speed and memory of two models on the same inputs."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from pquant_lightning.callbacks._lightning import is_a, overrides
from pquant_lightning.callbacks._validation import detached, validation_metrics
from pquant_lightning.core.calibration import (
    Samples,
    batch_size,
    bind_batch,
    describe_batch,
    main_output,
    run_forward,
    run_samples,
)
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import count_params, deploy, share_copy
from pquant_lightning.core.errors import ModelError, OptionError, known
from pquant_lightning.core.report import macs_per_sample
from pquant_lightning.core.serialization import file_bytes
from pquant_lightning.pipelines.metrics import METRICS as METRICS
from pquant_lightning.utils.benchmarking import Estimate, benchmark_models

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Where the target of a batch that is a dict is looked for, in this order."""

_FROM_BENCHMARK = ("latency", "throughput", "peak_memory")
_WHOLE = ("bytes", "parameters", "MACs", "samples")  # units of which there are no parts
_IGNORED_LABEL = -100  # as in torch's cross-entropy


@dataclass(frozen=True)
class Comparison:
    """One metric of both models.

    Attributes:
        name: as asked for.
        unit: of the values, "" where there is none.
        before, after: original and compressed; None where it cannot be told (MACs of a forward that looks at values).
        intervals: confidence intervals of both medians, for times.
    """

    name: str
    unit: str
    before: float | None
    after: float | None
    intervals: tuple[Estimate, Estimate] | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """All metrics of both models, in the order they were asked for; prints as a table.

    Attributes:
        metrics: the comparisons.
        samples: how many samples of the data were looked at; 0 where no metric needs data.
        batch_size: of the inputs for time, memory and MACs; 0 where no metric needs them.
    """

    metrics: tuple[Comparison, ...]
    samples: int
    batch_size: int

    @property
    def before(self) -> dict[str, float | None]:
        """The original's metrics by name."""
        return {metric.name: metric.before for metric in self.metrics}

    @property
    def after(self) -> dict[str, float | None]:
        """The compressed model's metrics by name."""
        return {metric.name: metric.after for metric in self.metrics}

    @property
    def units(self) -> dict[str, str]:
        """The unit of each metric by name."""
        return {metric.name: metric.unit for metric in self.metrics}

    def __getitem__(self, name: str) -> Comparison:
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise OptionError(f"{name!r} was not evaluated. {known(name, self.before)}")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-able data."""
        metrics = {metric.name: {k: v for k, v in asdict(metric).items() if k != "name"} for metric in self.metrics}
        return {"metrics": metrics, "samples": self.samples, "batch_size": self.batch_size}

    def __str__(self) -> str:
        title = f"Evaluation on {self.samples} samples" if self.samples else "Evaluation"
        title += f", time and memory on a batch of {self.batch_size}" if self.batch_size else ""
        table = Table(title=title, title_justify="left")
        table.add_column("Metric", overflow="fold")
        table.add_column("Unit")
        for heading in ("Before", "After", "After / before"):
            table.add_column(heading, justify="right")
        for metric in self.metrics:
            intervals = metric.intervals or (None, None)
            values = (metric.before, metric.after)
            shown = [_shown(v, metric.unit, i) for v, i in zip(values, intervals, strict=True)]
            ratio = f"{values[1] / values[0]:.2f}" if values[0] and values[1] is not None else ""
            table.add_row(metric.name, metric.unit, *shown, ratio)
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def _shown(value: float | None, unit: str, interval: Estimate | None) -> str:
    if value is None:
        return "not known"
    if unit == "share":
        return f"{value:.2%}"
    number = f"{value:,.0f}" if unit.startswith(_WHOLE) and value == int(value) else f"{value:.4g}"
    return number + (f" [{interval.low:.3g}, {interval.high:.3g}]" if interval else "")


class EvaluationPipeline:
    """Compares a compressed model with the original, on the same data, in eval mode.

    Everything is measured on the deployed form (masks baked, integers, adapters merged), which is what will be used;
    neither model is changed.

    Args:
        metrics: names, and objects of torchmetrics (called with the first output and the target). A name is one of

            * `accuracy`: share of right classes, over the last dimension of the outputs (or the second, as in
              `cross_entropy`); targets of -100 do not count
            * `compression_ratio`: parameters before / parameters after; `params`: the parameters themselves
            * `size`: bytes of the file that `save_compressed` writes
            * `macs`: multiply-accumulates per sample, counted on the first batch
            * `latency`, `throughput`, `peak_memory`: of the first batch (see `benchmark_models`), in turns
            * `output_error`: ||y - y'|| / ||y|| over all samples; `output_cosine`: mean over samples of the cosine
            * what the model's own `validation_step` logs, such as `val_acc`.
        seconds: about how long the timing may take, at most, beyond the seven rounds that it always makes.

    Raises:
        OptionError: no metric, one twice, or something that is neither a name nor a torchmetrics object.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> report = EvaluationPipeline(metrics=["params", "output_error"]).run(net, net, [torch.ones(2, 64)])
    >>> report.before, report.after
    ({'params': 4420, 'output_error': 0.0}, {'params': 4420, 'output_error': 0.0})
    """

    def __init__(
        self,
        metrics: Sequence[str | Metric] = ("accuracy", "compression_ratio", "size", "latency"),
        *,
        seconds: float = 5.0,
    ) -> None:
        if isinstance(metrics, str | Metric) or not metrics:
            raise OptionError(f"metrics is a list of at least one name, got {metrics!r}. Known: {', '.join(METRICS)}.")
        for metric in metrics:
            if not isinstance(metric, str | Metric):
                raise OptionError(f"A metric is a name or an object of torchmetrics, got {metric!r}.")
        self.seconds = seconds
        self.metrics = {m if isinstance(m, str) else type(m).__name__: m for m in metrics}
        if len(self.metrics) != len(metrics):
            raise OptionError(f"Each metric is given once, got {', '.join(self.metrics)} for {len(metrics)} entries.")

    def run(self, original: nn.Module, compressed: nn.Module, loader: Any = None) -> EvaluationReport:
        """Measures both models.

        Args:
            original: the uncompressed model.
            compressed: training form or deployed form.
            loader: a loader, a list of batches, or a datamodule (its validation data). A batch is a tensor (no target),
                a tuple with the inputs first and the target last, or a dict with the names of `forward`'s arguments
                and one of `LABEL_KEYS`. Not needed for `params`, `compression_ratio` and `size`.

        Raises:
            OptionError: a metric is neither known nor logged, data are missing, or targets do not fit.
            CalibrationError: a model cannot be run on the batches.
            ModelError: the two models give outputs of different shapes.
        """
        for model in (original, compressed):
            if not isinstance(model, nn.Module):
                raise ModelError(f"EvaluationPipeline compares two models, got {type(model).__name__}.")
        logged = [n for n, m in self.metrics.items() if isinstance(m, str) and n not in METRICS]
        self._check_names(logged, original)
        deployed = share_copy(compressed)
        deploy(deployed)
        models = (original, deployed)
        batches = None if loader is None else _batches_of(loader)
        found = _sizes(models, self.metrics)
        seen = size = 0
        if on_outputs := self._on_outputs():
            outputs, seen = _compare_outputs(models, self._given(batches, on_outputs), on_outputs)
            found |= outputs
        if work := [name for name in ("macs", *_FROM_BENCHMARK) if name in self.metrics]:
            first = next(iter(self._given(batches, work)), None)
            if first is None:
                raise OptionError("The data hold no batch; give a loader with at least one.")
            size = batch_size(first)
            found |= _work(models, first, work, self.seconds)
        if logged:
            data = self._given(batches, logged)
            found |= _logged(models, data, logged)
            seen = seen or sum(map(batch_size, data))
        return EvaluationReport(tuple(found[name] for name in self.metrics), seen, size)

    def _check_names(self, logged: list[str], model: nn.Module) -> None:
        """Names that are not known must be what `validation_step` logs."""
        if logged and not overrides("validation_step", model):
            raise OptionError(
                f"Unknown metric {logged[0]!r}. {known(logged[0], METRICS)} Other names are those that a "
                f"LightningModule's validation_step logs; {type(model).__name__} has none."
            )

    def _on_outputs(self) -> dict[str, Metric | None]:
        """The metrics that look at outputs; None for those made here."""
        own = ("accuracy", "output_error", "output_cosine")
        return {
            name: metric if isinstance(metric, Metric) else None
            for name, metric in self.metrics.items()
            if isinstance(metric, Metric) or name in own
        }

    def _given(self, batches: Iterable[Any] | None, names: Iterable[str]) -> Iterable[Any]:
        if batches is None:
            raise OptionError(f"{', '.join(names)} need data: give run(original, compressed, loader) a loader.")
        return batches


def _batches_of(source: Any) -> Iterable[Any]:
    """The batches of a loader or datamodule, which can be iterated more than once."""
    if hasattr(source, "val_dataloader"):
        source.prepare_data()
        source.setup("validate")
        source = source.val_dataloader()
        if isinstance(source, list | tuple):
            raise OptionError(f"The datamodule has {len(source)} validation loaders; give one of them as the loader.")
    if not isinstance(source, Iterable) or isinstance(source, Tensor | Mapping | str):
        raise OptionError(
            f"The data are a DataLoader, a list of batches or a datamodule, got {describe_batch(source)}."
        )
    return list(source) if isinstance(source, Iterator) else source


def _sizes(models: tuple[nn.Module, nn.Module], names: Iterable[str]) -> dict[str, Comparison]:
    params: list[float] = [count_params(model) for model in models]
    rows: dict[str, list[float]] = {"params": params, "compression_ratio": [1.0, params[0] / max(params[1], 1)]}
    if "size" in names:
        rows["size"] = [file_bytes(model) for model in models]
    return {name: Comparison(name, METRICS[name], before, after) for name, (before, after) in rows.items()}


def _work(models: tuple[nn.Module, nn.Module], batch: Any, names: list[str], seconds: float) -> dict[str, Comparison]:
    """Multiply-accumulates, time and memory of one batch."""
    args, kwargs = bind_batch(models[0], batch)
    inputs = kwargs or args
    found = {}
    if "macs" in names:
        before, after = (None if c is None else c[""] for c in (macs_per_sample(model, inputs) for model in models))
        found["macs"] = Comparison("macs", METRICS["macs"], before, after)
    if set(names) & set(_FROM_BENCHMARK):
        benchmark = benchmark_models(dict(zip(("before", "after"), models, strict=True)), inputs, max_seconds=seconds)
        both = [benchmark.models[name] for name in ("before", "after")]
        times = both[0].timing.estimate_ms, both[1].timing.estimate_ms
        values: dict[str, list[float]] = {
            "latency": [time.median for time in times],
            "throughput": [model.samples_per_second for model in both],
            "peak_memory": [model.peak_memory_bytes for model in both],
        }
        for name, pair in values.items():
            intervals = times if name == "latency" else None
            found[name] = Comparison(name, METRICS[name], pair[0], pair[1], intervals)
    return found


def _logged(models: tuple[nn.Module, nn.Module], batches: Iterable[Any], names: list[str]) -> dict[str, Comparison]:
    """What both models' validation steps log."""
    held: Any = batches if isinstance(batches, DataLoader) else list(batches)
    loader = held if isinstance(held, DataLoader) else DataLoader(held, None, collate_fn=_as_it_is)
    values = []
    for model in models:
        assert is_a(model, LightningModule)
        logged = validation_metrics(detached(model), loader, accelerator=model.device.type)
        for name in names:
            if name not in logged:
                raise OptionError(
                    f"Unknown metric {name!r}: validation_step logs {', '.join(map(repr, logged)) or 'nothing'}. "
                    f"{known(name, [*METRICS, *logged])}"
                )
        values.append(logged)
    return {name: Comparison(name, "", values[0][name], values[1][name]) for name in names}


def _as_it_is(batch: Any) -> Any:
    return batch


class _OutputDistance:
    """How far outputs lie apart, summed up over batches."""

    def __init__(self) -> None:
        self.error = self.norm = self.cosine = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def update(self, before: Tensor, after: Tensor) -> None:
        before, after = (y.detach().cpu().double().reshape(len(y) if y.dim() > 1 else 1, -1) for y in (before, after))
        self.error = self.error + (before - after).square().sum()
        self.norm = self.norm + before.square().sum()
        self.cosine = self.cosine + torch.cosine_similarity(before, after, dim=1, eps=1e-30).sum()
        self.count += len(before)

    def compared(self) -> dict[str, Comparison]:
        error = float((self.error / self.norm.clamp_min(1e-300)).sqrt())
        cosine = float(self.cosine) / max(self.count, 1)
        values = {"output_error": (0.0, error), "output_cosine": (1.0, cosine)}
        return {name: Comparison(name, METRICS[name], *pair) for name, pair in values.items()}


def _compare_outputs(
    models: tuple[nn.Module, nn.Module], batches: Iterable[Any], metrics: Mapping[str, Metric | None]
) -> tuple[dict[str, Comparison], int]:
    """Metrics of the outputs and the targets, in one pass over the data, and the number of samples."""
    distance, count = _OutputDistance(), 0
    meters: dict[str, list[Metric]] = {n: [deep_copy(m), deep_copy(m)] for n, m in metrics.items() if m is not None}
    for batch in batches:
        before, after = (_output(model, batch) for model in models)
        if before.shape != after.shape:
            raise ModelError(
                f"The outputs of the two models differ in shape: {tuple(before.shape)} and {tuple(after.shape)}. Give "
                "the original that the compressed model was made of."
            )
        distance.update(before, after)
        count += batch_size(batch)
        if "accuracy" in metrics or meters:
            target = _target(batch)
        if "accuracy" in metrics:
            dim = _class_dim(before, target)
            if "accuracy" not in meters:
                classes = before.shape[dim]
                meters["accuracy"] = [
                    MulticlassAccuracy(classes, average="micro", ignore_index=_IGNORED_LABEL) for _ in models
                ]
        for name, pair in meters.items():
            for meter, output in zip(pair, (before, after), strict=True):
                output = output.argmax(dim) if name == "accuracy" else output
                meter.to(output.device).update(output, target.to(output.device))
    if count == 0:
        raise OptionError("The data hold no batch; give a loader with at least one.")
    unit = {name: METRICS.get(name, "") for name in meters}
    found = {name: Comparison(name, unit[name], _scalar(a), _scalar(b)) for name, (a, b) in meters.items()}
    return distance.compared() | found, count


def _output(model: nn.Module, batch: Any) -> Tensor:
    (output,) = run_samples(model, Samples((batch,), run_forward))
    return main_output(output)


def _target(batch: Any) -> Tensor:
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[-1]
    if not isinstance(found, Tensor):
        raise OptionError(
            f"The batches ({describe_batch(batch)}) hold no target. A target is the last entry of a tuple, or an entry "
            f"of a dict named {', '.join(LABEL_KEYS)}; without one, use output_error."
        )
    return found


def _class_dim(output: Tensor, target: Tensor) -> int:
    """The dimension of the classes: the last one, or the second as in `cross_entropy`."""
    for dim in (-1, 1):
        if output.dim() > 1 and target.shape == output.shape[:dim] + output.shape[dim:][1:]:
            if target.is_floating_point():
                break
            return dim
    raise OptionError(
        f"accuracy compares outputs (..., classes) with integer targets (...), got {describe_batch(output)} and "
        f"{describe_batch(target)}. Give a torchmetrics object for other tasks."
    )


def _scalar(meter: Metric) -> float:
    value = meter.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise OptionError(f"{type(meter).__name__} gives no single number; choose an average, or one of its parts.")
    return float(value)
