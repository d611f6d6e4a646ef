"""The page about a compression, written at the end of a fit; and the same figures for the logger."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from pquant_lightning.callbacks._validation import dense_metrics
from pquant_lightning.callbacks.base import BeforeCompression, _ours
from pquant_lightning.core._private import resume_path
from pquant_lightning.core.calibration import bind_batch, first_samples
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import dense_form, deploy
from pquant_lightning.core.errors import CallbackOrderError, PQuantError
from pquant_lightning.core.hyperparameters import loading_line
from pquant_lightning.core.report import CompressionReport
from pquant_lightning.core.serialization import file_bytes
from pquant_lightning.utils.benchmarking import benchmark_models
from pquant_lightning.utils.report_page import Figure, Metric, ReportPage
from pquant_lightning.utils.visualization import figure_to_svg, plot_layer_sizes, plot_training

log = logging.getLogger(__name__)

_MOST_CURVES = 6
_BATCH = 32  # samples that models are timed on, or as many as a batch has


class CompressionReportCallback(BeforeCompression, Callback):
    """Writes `compression_report.html`, `.md` and `.json` at the end of a fit, beside the artefact.

    The page says in a sentence what was reached, and shows the layers, what was left alone and why, the metrics over
    training with the moments of compression, the configuration, and how to load the model. It needs no network. The
    uncompressed model is validated before anything is compressed, to compare with; in one process, and where there are
    validation data. Where the module has an `example_input_array`, the deployed model is timed against an uncompressed
    one of the same structure. The figures also go to the Trainer's loggers as `pquant/final_*`. It may stand anywhere
    in the list.

    Args:
        dirpath: where to write; None: the run's directory.

    Raises:
        CallbackOrderError: no callback in the list compresses anything.

    >>> CompressionReportCallback().dirpath is None
    True
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.path: Path | None = None
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._moments: dict[str, float] = {}
        self._complete: set[str] = set()
        self._dense: dict[str, float] = {}  # what the validation of the uncompressed model logs

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self._curves, "moments": self._moments, "dense": self._dense}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._curves = {name: [(x, y) for x, y in pairs] for name, pairs in state_dict["curves"].items()}
        self._moments = state_dict["moments"]
        self._dense = state_dict.get("dense", {})  # checkpoints of version 0.1.0 have none
        self._complete = set(self._moments)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not _ours(trainer):
            raise CallbackOrderError(
                "CompressionReportCallback reports what compression callbacks do, and there is none in the list. Add "
                "one, e.g. callbacks=[QATCallback(), CompressionReportCallback()]."
            )

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Validates the uncompressed model, to have something to compare with."""
        whole = resume_path(trainer) is None and not compressed_layers(module)
        self._dense = dense_metrics(trainer, module) if whole else {}

    # -- during training -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in trainer.callback_metrics.items():
            if not name.startswith("pquant/") and value.numel() == 1:
                self._curves.setdefault(name, []).append((trainer.global_step, float(value)))

    def _note(self, trainer: Trainer) -> None:
        """Notes which of our callbacks have reached their targets since the last look."""
        for callback in _ours(trainer):
            key, method = callback.state_key, callback.method
            acted = method.completes_at == 0 and not method.acts_after_training
            if key not in self._complete and (acted or callback._complete):
                self._complete.add(key)
                self._moments[key] = trainer.global_step if not acted else 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in _ours(trainer):
            if callback.method.acts_after_training:
                self._moments.setdefault(callback.state_key, trainer.global_step)

    # -- the page ------------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After `on_fit_end`, in which the artefact is written."""
        smoke_test: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        last = _ours(trainer)[-1] if stage == "fit" and _ours(trainer) else None
        if last is None or last.report is None or smoke_test or not trainer.is_global_zero:
            return
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        report = last.report
        if last.artifact is not None:
            before = file_bytes(dense_form(pl_module), like=pl_module)
            report = replace(report, file_bytes=(before, last.artifact.stat().st_size))
        page = self._page(trainer, pl_module, report, last.artifact)
        self.path = page.write(folder)
        figures = {f"pquant/final_{m.name}": m.after for m in page.metrics if not m.name.startswith("val")}
        figures["pquant/final_size_ratio"] = last.report.size_ratio
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        log.info("%s\nThe report: %s", page.summary, self.path)

    def _page(
        self, trainer: Trainer, module: LightningModule, report: CompressionReport, artifact: Path | None
    ) -> ReportPage:
        figures, note = _figures(self._curves, self._moments, report)
        metrics = [*_latency(trainer, module), *_sizes(report)]
        metrics += [
            Metric(name, self._dense.get(name), pairs[-1][1], "uncompressed, and at the end", name in self._dense)
            for name, pairs in list(self._curves.items())[:_MOST_CURVES]
        ]
        name = type(module).__name__
        commands = {}
        if artifact is not None:
            commands["Load it"] = (
                f"from pquant_lightning import load_compressed\n\nmodel = {loading_line(module, artifact)}"
            )
        methods = {callback.state_key: _plain(callback.method.config) for callback in _ours(trainer)}
        return ReportPage(name, report, metrics, self._curves, self._moments, methods, commands, figures, note)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them; those that are not given are left out."""
    return {
        key: value if isinstance(value, str | int | float | bool | list | dict) else repr(value)
        for key, value in config.items()
        if value is not None
    }


def _sizes(report: CompressionReport) -> list[Metric]:
    size = Metric("size", *(report.file_bytes or report.size_bytes), "bytes")
    found = [Metric("parameters", *report.params), size]
    return found if report.macs is None else [*found, Metric("MACs", *report.macs, "per sample")]


def _figures(curves: Any, moments: Any, report: CompressionReport) -> tuple[list[Figure], str]:
    """The plots, or why there are none."""
    try:
        found = [Figure("Bytes of the layers, before and after.", figure_to_svg(plot_layer_sizes(report), "sizes"))]
        shown = {name: pairs for name, pairs in list(curves.items())[:_MOST_CURVES] if len(pairs) > 1}
        if shown:
            svg = figure_to_svg(plot_training(shown, moments), "training")
            found.append(Figure("Metrics over training; the lines mark when a method has reached its target.", svg))
    except PQuantError as error:  # matplotlib is not there
        return [], str(error)
    return found, ""


def _latency(trainer: Trainer, module: LightningModule) -> list[Metric]:
    """The deployed model against an uncompressed one of the same structure, on inputs of the training."""
    loader = trainer.train_dataloader
    if isinstance(loader, list | tuple | dict) or loader is None:
        return []
    after = deep_copy(module).cpu()
    deploy(after)
    before = _with_values(dense_form(after), after)
    try:
        batch = first_samples(next(iter(loader)), _BATCH)
        args, kwargs = bind_batch(after, batch)
        found = benchmark_models({"before": before, "after": after}, kwargs or args, max_seconds=2.0)
    except Exception as error:  # whatever a user's forward may raise on a batch that its training_step takes apart
        log.info(
            "The report holds no latency: %s cannot be called on a training batch (%s).", type(module).__name__, error
        )
        return []
    times = [found.models[name].timing.median_ms for name in ("before", "after")]
    return [Metric("latency", times[0], times[1], f"ms for a batch of {found.batch_size}")]


def _with_values(dense: nn.Module, like: nn.Module) -> nn.Module:
    """The structure with values: those of another model where they fit, else small ones; time depends on none."""
    known = {**dict(like.named_parameters()), **dict(like.named_buffers())}
    dense.to_empty(device="cpu")
    for name, tensor in (*dense.named_parameters(), *dense.named_buffers()):
        other = known.get(name)
        if other is not None and other.shape == tensor.shape:
            tensor.data.copy_(other.data)
        elif tensor.is_floating_point():
            tensor.data.uniform_(0.01, 0.02)  # variances among them
        else:
            tensor.data.zero_()
    return dense
