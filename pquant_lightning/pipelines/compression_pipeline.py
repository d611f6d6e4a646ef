"""Several methods one after another, with training where wanted, a metric that is watched, and a way to go on."""

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from pquant_lightning.callbacks._validation import check_logged, validation_metrics
from pquant_lightning.callbacks.base import CompressionCallback
from pquant_lightning.core.calibration import describe_batch
from pquant_lightning.core.compressed_layer import changed_layers, install_hook
from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.deploy import deploy
from pquant_lightning.core.errors import (
    CallbackOrderError,
    CheckpointError,
    ModelError,
    NothingToCompressError,
    OptionError,
    PQuantError,
)
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import CompressionReport, make_report
from pquant_lightning.core.serialization import (
    ARTIFACT_NAME,
    artifact_metadata,
    atomic_file,
    read_checkpoint,
    write_artifact,
)
from pquant_lightning.pipelines._settings import GuardSettings, Settings, TrainingSettings
from pquant_lightning.pipelines._training import SetLearningRate, fine_tune, with_batch_size
from pquant_lightning.pipelines.evaluation_pipeline import EvaluationPipeline, EvaluationReport

log = logging.getLogger(__name__)

STATE_NAME = "pipeline.json"
_VERSION = 1


@dataclass(frozen=True)
class PipelineStage:
    """Methods that act together, and the training that follows.

    Args:
        methods: method objects, names, or `{name: options}`; one or a list.
        epochs: of the fine-tuning, by a Trainer with the methods' callbacks; 0 trains nothing.
        lr: learning rate in place of the module's own; the ratios between its parameter groups stay.
        trainer: further options of the Trainer, `callbacks` among them.

    Raises:
        OptionError: no method, or options of a training without epochs.
    """

    methods: Any
    epochs: int = 0
    lr: float | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.methods if isinstance(self.methods, list | tuple) else [self.methods]
        methods = tuple(method for entry in given for method in _as_methods(entry))
        if not methods:
            raise OptionError("A stage needs at least one method.")
        TrainingSettings(self.epochs, self.lr)
        if self.epochs == 0 and (self.lr is not None or self.trainer):
            raise OptionError(f"lr and trainer are for a stage that trains; give it epochs, got epochs=0 and {self!r}.")
        object.__setattr__(self, "methods", tuple(sorted(methods, key=lambda method: method.stage)))

    @property
    def name(self) -> str:
        """The methods' names, joined by "+"."""
        return "+".join(method.name for method in self.methods)


def _as_methods(entry: Any) -> list[CompressionMethod]:
    if isinstance(entry, CompressionMethod):
        return [entry]
    if isinstance(entry, str):
        return [CompressionMethodRegistry.get(entry, {})]
    if isinstance(entry, Mapping):
        return [CompressionMethodRegistry.get(name, options) for name, options in entry.items()]
    raise OptionError(f"A stage is a method, its name, {{name: options}} or a PipelineStage, got {entry!r}.")


@dataclass(frozen=True)
class StageResult:
    """What one stage did.

    Attributes:
        name: of the stage.
        seconds: how long it took.
        size_ratio: stored bytes after it / those of the uncompressed model.
        metric: the monitored metric after it; None where none is.
        put_back: layers that were left alone because the metric lost too much with them; all of them where the whole
            stage was.
        resumed: whether it had been done by an earlier, interrupted run.
    """

    name: str
    seconds: float
    size_ratio: float
    metric: float | None = None
    put_back: tuple[str, ...] = ()
    resumed: bool = False


@dataclass(frozen=True)
class CompressionResult:
    """What a pipeline gives.

    Attributes:
        model: the compressed model in deployed form, in eval mode.
        report: parameters, bytes, MACs and errors, layer by layer.
        stages: what each stage did.
        evaluation: metrics before and after; None where none were asked for.
        artifact: the file with the model; None without a `dirpath`.
    """

    model: nn.Module
    report: CompressionReport
    stages: tuple[StageResult, ...]
    evaluation: EvaluationReport | None = None
    artifact: Path | None = None


class CompressionPipeline:
    """Compresses a model in stages.

    Args:
        stages: in any order: methods, their names, `{name: options}`, or `PipelineStage` for methods that act together
            and are fine-tuned. They act in the order factorize, adapt, prune, quantize.
        monitor: a metric that the model's `validation_step` logs; it is measured before and after each stage.
        max_drop: what the metric may be worse than before all stages, in its own unit. A stage that costs more leaves
            out the layers with the largest errors, as few as it takes, found by bisection, or is put back.
        mode: whether more of the metric is better ("max") or less ("min").
        metrics: for `EvaluationPipeline`, measured at the end.
        batch_size: samples per batch in place of the data's own.

    Raises:
        OptionError: no stage, or `max_drop` without `monitor`.
        CallbackOrderError: stages that cannot be brought into an order.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> result = CompressionPipeline([{"ptq": {"scheme": "dynamic"}}, {"low_rank": {"rank": 8}}]).run(net)
    >>> [stage.name for stage in result.stages], result.report.params
    (['low_rank', 'ptq'], (4810, 1706))
    """

    def __init__(
        self,
        stages: Sequence[Any],
        *,
        monitor: str | None = None,
        max_drop: float | None = None,
        mode: str = "max",
        metrics: Sequence[str] = (),
        batch_size: int | None = None,
    ) -> None:
        if isinstance(stages, str | Mapping | CompressionMethod | PipelineStage) or not stages:
            raise OptionError(f"CompressionPipeline takes a list of stages, got {stages!r}.")
        self.stages = _ordered([s if isinstance(s, PipelineStage) else PipelineStage(s) for s in stages])
        self.guard = GuardSettings(monitor, max_drop, mode)
        self.evaluation = EvaluationPipeline(metrics) if metrics else None
        self.batch_size = TrainingSettings(batch_size=batch_size).batch_size

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CompressionPipeline":
        """From the specification's layout: `compression`, `training`, `evaluation`; without `training` nothing trains.

        All methods act together, in one fine-tuning.

        Raises:
            OptionError: a section or key is missing or unknown, or a value is wrong.
        """
        settings = Settings.read(config)
        training = settings.training
        stage = PipelineStage(settings.methods, training.epochs, training.lr if training.epochs else None)
        size = training.batch_size if training.epochs else None
        return cls([stage], metrics=settings.metrics, batch_size=size, **asdict(settings.guard))

    def run(
        self,
        model: nn.Module,
        train_loader: Any = None,
        val_loader: Any = None,
        *,
        dirpath: str | Path | None = None,
    ) -> CompressionResult:
        """Runs all stages on a copy of the model.

        Args:
            model: a LightningModule where a stage trains or a metric is monitored, else any module.
            train_loader: a loader, a list of batches, or a datamodule.
            val_loader: likewise; a datamodule given as `train_loader` serves for both.
            dirpath: where the artefact is written, and after each stage (and epoch) what a later run with the same
                `dirpath` goes on from.

        Raises:
            ModelError: a stage trains or a metric is monitored, and the model is no LightningModule.
            OptionError: data are missing; a method that must be trained has no epochs; a metric is not logged.
            CheckpointError: `dirpath` holds the state of another pipeline, model or data.
        """
        train = with_batch_size(train_loader, self.batch_size)
        val = (
            val_loader if val_loader is not None else train_loader if hasattr(train_loader, "val_dataloader") else None
        )
        self._check(model, train, val)
        run = _Run(self, model, train, val, None if dirpath is None else Path(dirpath))
        results = [run.stage(place) for place in range(len(self.stages))]
        return run.finish(results)

    def _check(self, model: nn.Module, train: Any, val: Any) -> None:
        trained = [stage for stage in self.stages if stage.epochs]
        for stage in self.stages:
            untrained = [method.name for method in stage.methods if method.trains]
            if untrained and not stage.epochs:
                raise OptionError(f"{untrained[0]} must be trained: PipelineStage({untrained[0]!r}, epochs=...).")
        if trained and not isinstance(model, LightningModule):
            raise ModelError(
                f"The stage {trained[0].name} trains, and {type(model).__name__} has no training_step: give a "
                "LightningModule, or leave the epochs out."
            )
        if trained and train is None:
            raise OptionError(f"The stage {trained[0].name} trains: give run a train_loader or a datamodule.")
        if self.guard.monitor is not None and not isinstance(model, LightningModule):
            raise ModelError(
                f"monitor={self.guard.monitor!r} is what a validation_step logs, and {type(model).__name__} has none: "
                "give a LightningModule."
            )
        if self.guard.monitor is not None and val is None:
            raise OptionError("monitor needs validation data: give run a val_loader or a datamodule.")


def _ordered(stages: list[PipelineStage]) -> list[PipelineStage]:
    """By the order of the methods' stages; those that are equal stay as they are given.

    Raises:
        CallbackOrderError: one stage would have to act both before and after another.
    """
    right = sorted(stages, key=lambda stage: stage.methods[0].stage)
    for before, after in itertools.pairwise(right):
        late = before.methods[-1]
        early = next((method for method in after.methods if method.stage < late.stage), None)
        if early is not None:
            raise CallbackOrderError(
                f"The stage {before.name} quantizes or prunes by {late.name} before {early.name} of the stage "
                f"{after.name} acts. Put {early.name} into the first of them, or {late.name} into the second."
            )
    if right != stages:
        log.info("The stages act in the order [%s].", ", ".join(stage.name for stage in right))
    return right


class _Run:
    """One run of a pipeline: the model as it is, the callbacks that know it, and what was written."""

    def __init__(
        self, pipeline: CompressionPipeline, model: nn.Module, train: Any, val: Any, dirpath: Path | None
    ) -> None:
        self.pipeline, self.original, self.train, self.val, self.dirpath = pipeline, model, train, val, dirpath
        self.model = deepcopy(model)
        install_hook(self.model)
        self.callbacks: list[CompressionCallback] = []
        self.before = self._metric(model)
        self.finished = self._resume()

    # -- stages ------------------------------------------------------------------------------------------------------

    def stage(self, place: int) -> StageResult:
        """Runs a stage, or takes it from an earlier run."""
        stage, started = self.pipeline.stages[place], time.perf_counter()
        if place < len(self.finished):
            if place == len(self.finished) - 1:
                self._load(place)
            found: Any = self.finished[place]
            return StageResult(**{**found, "put_back": tuple(found["put_back"]), "resumed": True})
        log.info("Stage %d of %d: %s", place + 1, len(self.pipeline.stages), stage.name)
        put_back = self._guarded(stage, place)
        metric = self._metric(self.model)
        ratio = make_report(self.model, original=self.original).size_ratio
        result = StageResult(stage.name, time.perf_counter() - started, ratio, metric, tuple(put_back))
        self.finished.append(asdict(result))
        self._save(place)
        return result

    def _guarded(self, stage: PipelineStage, place: int) -> list[str]:
        """Runs a stage so that the metric keeps to `max_drop`; returns the layers it leaves alone for that."""
        model, callbacks = self.model, self.callbacks

        def attempt(left_out: Sequence[str]) -> None:
            self.model, self.callbacks = deepcopy(model), deepcopy(callbacks)
            install_hook(self.model)
            self._act(stage, place, left_out)

        attempt([])
        if self._keeps():
            return []
        layers = self._worst_first(model)
        few, many = 0, len(layers)  # `few` left out lose too much; with all of them left out the stage does nothing
        while many - few > 1:
            middle = (few + many) // 2
            attempt(layers[:middle])
            few, many = (few, middle) if self._keeps() else (middle, many)
        if many == len(layers):
            self.model, self.callbacks = model, callbacks
            log.warning("%s is put back: it costs more of %s than max_drop.", stage.name, self.pipeline.guard.monitor)
        else:
            attempt(layers[:many])
            log.warning("%s leaves %s alone, so as to keep to max_drop.", stage.name, ", ".join(layers[:many]))
        return layers[:many]

    def _act(self, stage: PipelineStage, place: int, left_out: Sequence[str]) -> None:
        added = _callbacks(stage, place, left_out)
        if stage.epochs:
            assert isinstance(self.model, LightningModule)
            self.callbacks += added
            rate = [] if stage.lr is None else [SetLearningRate(stage.lr)]
            folder = self._folder(place, left_out)
            fine_tune(self.model, [*self.callbacks, *rate], self.train, self.val, stage.epochs, stage.trainer, folder)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return
        for callback in added:
            method = callback.method
            if type(method).compress is not CompressionMethod.compress:  # the specification's shape: all by itself
                self.model = method.compress(self.model, self.train, self.val)
                continue
            callback.compress_untrained(self.model, method.samples_of(self.train))
            self.callbacks.append(callback)

    def _folder(self, place: int, left_out: Sequence[str]) -> Path | None:
        mark = f"-{hashlib.sha256(' '.join(left_out).encode()).hexdigest()[:8]}" if left_out else ""
        return None if self.dirpath is None else self.dirpath / f"stage-{place + 1}{mark}"

    def _keeps(self) -> bool:
        guard = self.pipeline.guard
        if guard.max_drop is None:
            return True
        after = self._metric(self.model)
        assert self.before is not None
        assert after is not None
        drop = (self.before - after) * (1 if guard.mode == "max" else -1)
        log.info("%s: %.6g, before all stages %.6g", guard.monitor, after, self.before)
        return drop <= guard.max_drop

    def _worst_first(self, before: nn.Module) -> list[str]:
        """Names of the layers that the last attempt changed, those with the largest errors first."""
        report = make_report(self.model, original=before)
        return [layer.name for layer in sorted(report.layers, key=lambda layer: -(layer.error or 0.0)) if layer.name]

    def _metric(self, model: nn.Module) -> float | None:
        monitor = self.pipeline.guard.monitor
        if monitor is None:
            return None
        copy = deepcopy(model)
        if model is not self.original:
            deploy(copy)
        found = validation_metrics(copy, self.val)
        check_logged(monitor, found)
        return found[monitor]

    def finish(self, results: Iterable[StageResult]) -> CompressionResult:
        """Deploys the model, reports, evaluates, and writes the artefact."""
        if not changed_layers(self.model) and not any(callback._state for callback in self.callbacks):
            raise NothingToCompressError("No stage changes a layer; the log gives the reasons.")
        example = getattr(self.original, "example_input_array", None)
        # before norms are folded into weights, which are then no longer comparable
        report = make_report(self.model, original=self.original, example_inputs=example)
        deploy(self.model)
        self.model.eval()
        log.info("%s", report)
        evaluation = None
        if self.pipeline.evaluation is not None:
            evaluation = self.pipeline.evaluation.run(self.original, self.model, self.val)
            log.info("%s", evaluation)
        path = None
        if self.dirpath is not None:
            path = self.dirpath / ARTIFACT_NAME
            size = write_artifact(self.model, path, artifact_metadata(self.model))
            log.info("Compressed model: %s (%s bytes)", path, f"{size:,}")
        return CompressionResult(self.model, report, tuple(results), evaluation, path)

    # -- going on ----------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, str]:
        """What must be the same for a run to go on, part by part."""
        stages = [
            (stage.epochs, stage.lr, [(method.name, method.config) for method in stage.methods])
            for stage in self.pipeline.stages
        ]
        structure = [(name, tuple(tensor.shape)) for name, tensor in self.original.named_parameters()]
        weights = sum(float(p.detach().double().sum()) for p in self.original.parameters() if p.is_floating_point())
        parts = {
            "stages": stages,
            "monitor": asdict(self.pipeline.guard),
            "model": structure,
            "weights": weights,
            "data": _described(self.train),
        }
        return {key: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for key, value in parts.items()}

    def _resume(self) -> list[dict[str, Any]]:
        if self.dirpath is None:
            return []
        self.dirpath.mkdir(parents=True, exist_ok=True)
        path, own = self.dirpath / STATE_NAME, self._fingerprint()
        if path.is_file():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                found, finished, version = state["fingerprint"], list(state["finished"]), state["version"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} is damaged ({error!r}); remove it to start afresh.") from error
            changed = [key for key in own if found.get(key) != own[key]]
            if version != _VERSION or changed:
                raise CheckpointError(
                    f"{self.dirpath} holds a run of another pipeline: {', '.join(changed) or 'version'} differ(s). Run "
                    "it as it was, or give another dirpath."
                )
            return finished
        self._write_state([])
        return []

    def _write_state(self, finished: list[dict[str, Any]]) -> None:
        assert self.dirpath is not None
        state = {"version": _VERSION, "fingerprint": self._fingerprint(), "finished": finished}
        with atomic_file(self.dirpath / STATE_NAME) as file:
            file.write(json.dumps(state, indent=2).encode())

    def _save(self, place: int) -> None:
        if self.dirpath is None:
            return
        kept = {callback.state_key: callback.state_dict() for callback in self.callbacks}
        options = [callback.method.config for callback in self.callbacks]
        state = {"state_dict": self.model.state_dict(), "callbacks": kept, "options": options}
        with atomic_file(self.dirpath / f"stage-{place + 1}.ckpt") as file:
            torch.save(state, file)
        self._write_state(self.finished)
        (self.dirpath / f"stage-{place}.ckpt").unlink(missing_ok=True)

    def _load(self, place: int) -> None:
        """Takes over the model and the callbacks' state after a stage of an earlier run."""
        assert self.dirpath is not None
        saved = read_checkpoint(self.dirpath / f"stage-{place + 1}.ckpt")
        stages = enumerate(self.pipeline.stages[: place + 1])
        self.callbacks = [callback for i, stage in stages for callback in _callbacks(stage, i)]
        self.callbacks = [c for c in self.callbacks if c.state_key in saved["callbacks"]]
        for callback, options in zip(self.callbacks, saved["options"], strict=True):
            callback.method = replace(callback.method, **{"exclude": options["exclude"]})
            callback.load_state_dict(saved["callbacks"][callback.state_key])
        try:
            self.model.load_state_dict(saved["state_dict"])
        except PQuantError:
            raise
        except RuntimeError as error:
            raise CheckpointError(f"{self.dirpath} does not fit {type(self.model).__name__}: {error}") from error
        log.info("Stage %d of %d is taken from %s", place + 1, len(self.pipeline.stages), self.dirpath)


def _callbacks(stage: PipelineStage, place: int, left_out: Sequence[str] = ()) -> list[CompressionCallback]:
    """One for each method; they are named by the stage, as a method may act in several."""
    found = []
    for method in stage.methods:
        spared = replace(method, exclude=[*(method.exclude or []), *left_out]) if left_out else method
        callback = CompressionCallback(spared, name=f"stage {place + 1}")
        callback.writes_artifact, callback.optional = False, True
        found.append(callback)
    return found


def _described(train: Any) -> str:
    """Types and shapes of the first batch; of a datamodule, its class."""
    if train is None or hasattr(train, "train_dataloader"):
        return type(train).__name__
    return describe_batch(next(iter(train), None))
