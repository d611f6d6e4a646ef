"""Several methods one after another, with training where wanted, a metric that is watched, and a way to go on."""

import contextlib
import hashlib
import itertools
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from pquant_lightning.callbacks._lightning import is_a
from pquant_lightning.callbacks._validation import check_logged, validation_metrics
from pquant_lightning.callbacks.base import CompressionCallback
from pquant_lightning.core.calibration import Samples, bind_batch, describe_batch
from pquant_lightning.core.compressed_layer import changed_layers, install_hook
from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import deploy
from pquant_lightning.core.errors import (
    CalibrationError,
    CallbackOrderError,
    ModelError,
    NothingToCompressError,
    OptionError,
)
from pquant_lightning.core.joint_budget import Step, check_budget, share_budget
from pquant_lightning.core.modes import to_eval
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import CompressionReport, make_report
from pquant_lightning.core.serialization import ARTIFACT_NAME, artifact_metadata, write_artifact
from pquant_lightning.pipelines._journal import Journal
from pquant_lightning.pipelines._settings import GuardSettings, Settings, TrainingSettings
from pquant_lightning.pipelines._training import SetLearningRate, fine_tune, with_batch_size
from pquant_lightning.pipelines.evaluation_pipeline import EvaluationPipeline, EvaluationReport

log = logging.getLogger(__name__)

BUDGET_METHODS = ("low_rank", "structured_pruning", "ptq")
"""What a budget is shared out among where no stage is given: ranks, channels and bits, none of which need training."""

_SAMPLES = 300  # that a budget looks at, or more if a method wants more


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
            and are fine-tuned. They act in the order factorize, adapt, prune, quantize. A `budget` does without them:
            it then chooses among `BUDGET_METHODS`.
        monitor: a metric that the model's `validation_step` logs; it is measured before and after each stage.
        max_drop: what the metric may be worse than before all stages, in its own unit. A stage that costs more leaves
            out the layers with the largest errors, as few as it takes, found by bisection, or is put back.
        mode: whether more of the metric is better ("max") or less ("min").
        budget: `{"size": 0.1}` of the stored bytes, `{"macs": 0.5}`, `{"latency": 0.5}` (measured on this machine), or
            `{"max_drop": 0.01}` of the monitored metric: ranks, bits and channels are shared out over layers and
            methods together, see `core.joint_budget`; a method that does not pay is left out. Needs training data.
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

    shows_report = True  # whether the report is logged at the end

    def __init__(
        self,
        stages: Sequence[Any] | None = None,
        *,
        monitor: str | None = None,
        max_drop: float | None = None,
        mode: str = "max",
        budget: Mapping[str, float] | None = None,
        metrics: Sequence[str] = (),
        batch_size: int | None = None,
    ) -> None:
        if stages is None and budget is not None:
            stages = BUDGET_METHODS
        if isinstance(stages, str | Mapping | CompressionMethod | PipelineStage) or not stages:
            raise OptionError(
                f"CompressionPipeline takes a list of stages, got {stages!r}. Name at least one method, or give "
                "a budget, which chooses by itself."
            )
        self.stages = _ordered([s if isinstance(s, PipelineStage) else PipelineStage(s) for s in stages])
        self.guard = GuardSettings(monitor, max_drop, mode)
        self.budget = None if budget is None else dict(budget)
        if self.budget is not None and check_budget(self.budget)[0] == "max_drop" and monitor is None:
            raise OptionError("budget={'max_drop': ...} goes with monitor='...', the metric that may lose it.")
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
        return cls([stage], metrics=settings.metrics, batch_size=size, budget=settings.budget, **asdict(settings.guard))

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
        if trained and not is_a(model, LightningModule):
            raise ModelError(
                f"The stage {trained[0].name} trains, and {type(model).__name__} has no training_step: give a "
                "LightningModule, or leave the epochs out."
            )
        if trained and train is None:
            raise OptionError(f"The stage {trained[0].name} trains: give run a train_loader or a datamodule.")
        if self.budget is not None and train is None:
            raise OptionError("budget measures what layers cost the outputs: give run a train_loader or a datamodule.")
        if self.guard.monitor is not None and not is_a(model, LightningModule):
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
        self.model = deep_copy(model)
        install_hook(self.model)
        self.callbacks: list[CompressionCallback] = []
        self.before = self._metric(model)
        self.journal = None if dirpath is None else Journal(dirpath, self._fingerprint())
        self.finished = [] if self.journal is None else self.journal.finished
        self.steps = self._shared()

    # -- stages ------------------------------------------------------------------------------------------------------

    def stage(self, place: int) -> StageResult:
        """Runs a stage, or takes it from an earlier run."""
        stage, started = self.pipeline.stages[place], time.perf_counter()
        if place < len(self.finished):
            if place == len(self.finished) - 1:
                self._take_over(place)
            found: Any = self.finished[place]
            return StageResult(**{**found, "put_back": tuple(found["put_back"]), "resumed": True})
        log.info("Stage %d of %d: %s", place + 1, len(self.pipeline.stages), stage.name)
        put_back = self._guarded(stage, place)
        metric = self._metric(self.model)
        ratio = make_report(self.model, original=self.original).size_ratio
        result = StageResult(stage.name, time.perf_counter() - started, ratio, metric, tuple(put_back))
        self.finished.append(asdict(result))
        if self.journal is not None:
            self.journal.save(place, self.model, self.callbacks, self.finished)
        return result

    def _shared(self) -> dict[int, Step | None] | None:
        """What the budget has decided for each method, by its id: None for one that it leaves out."""
        pipeline = self.pipeline
        if pipeline.budget is None:
            return None
        methods = [method for stage in pipeline.stages for method in stage.methods]
        if self.journal is not None and self.journal.share is not None:
            steps: dict[int, Step | None] = dict.fromkeys(map(id, methods))
            for method, saved in zip(methods, self.journal.share, strict=True):
                if saved is not None:
                    steps[id(method)] = Step(method, replace(method, **saved["config"]), saved["choices"])
            return steps
        wanted = max([method.wanted_samples for method in methods] + [_SAMPLES])
        samples = Samples.take(self.train, wanted).fitted_to(self.model)
        share = share_budget(self.model, methods, pipeline.budget, samples, drop=self._drop)
        found = {id(m): next((step for step in share.steps if step.given is m), None) for m in methods}
        for method in methods:
            if found[id(method)] is None:
                log.info("The budget leaves %s out.", method.name)
        if self.journal is not None:
            self.journal.note_share([_plain(found[id(method)]) for method in methods])
        return found

    def _drop(self, model: nn.Module) -> float:
        """How much worse the monitored metric of a deployed model is."""
        guard = self.pipeline.guard
        found = validation_metrics(model, self.val)
        check_logged(str(guard.monitor), found)
        assert self.before is not None
        return (self.before - found[str(guard.monitor)]) * (1 if guard.mode == "max" else -1)

    def _take_over(self, place: int) -> None:
        """The model and the callbacks' state after a stage of an earlier run."""
        assert self.journal is not None
        stages = enumerate(self.pipeline.stages[: place + 1])
        made = [callback for i, stage in stages for callback in self._callbacks(stage, i)]
        self.callbacks = self.journal.load(place, self.model, made)
        log.info("Stage %d of %d is taken from %s", place + 1, len(self.pipeline.stages), self.dirpath)

    def _guarded(self, stage: PipelineStage, place: int) -> list[str]:
        """Runs a stage so that the metric keeps to `max_drop`; returns the layers it leaves alone for that."""
        model, callbacks = self.model, self.callbacks

        def attempt(left_out: Sequence[str]) -> None:
            self.model, self.callbacks = deep_copy(model), deep_copy(callbacks)
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
            log.warning(
                "%s is left out: it costs more of %s than max_drop allows.", stage.name, self.pipeline.guard.monitor
            )
        else:
            attempt(layers[:many])
            log.warning(
                "%s leaves %s alone, as %s would lose more than max_drop with them.",
                stage.name,
                ", ".join(layers[:many]),
                self.pipeline.guard.monitor,
            )
        return layers[:many]

    def _act(self, stage: PipelineStage, place: int, left_out: Sequence[str]) -> None:
        added = self._callbacks(stage, place, left_out)
        if stage.epochs:
            assert is_a(self.model, LightningModule)
            for callback in added:
                if (choices := self._choices(stage, callback)) is not None:
                    callback.compress_untrained(self.model, callback.method.samples_of(self.train, self.model), choices)
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
            choices = self._choices(stage, callback)
            callback.compress_untrained(self.model, method.samples_of(self.train, self.model), choices)
            self.callbacks.append(callback)

    def _callbacks(self, stage: PipelineStage, place: int, left_out: Sequence[str] = ()) -> list[CompressionCallback]:
        """One for each method that acts; they are named by the stage, as a method may act in several."""
        found = []
        for method in stage.methods:
            step = Step(method, method) if self.steps is None else self.steps[id(method)]
            if step is None:
                continue
            chosen = step.method
            spared = replace(chosen, exclude=[*(chosen.exclude or []), *left_out]) if left_out else chosen
            callback = CompressionCallback(spared, name=f"stage {place + 1}")
            callback.writes_artifact, callback.optional, callback.shows_report = False, True, False
            found.append(callback)
        return found

    def _choices(self, stage: PipelineStage, callback: CompressionCallback) -> Any:
        if self.steps is None:
            return None
        steps = [self.steps[id(method)] for method in stage.methods]
        return next(s.choices for s in steps if s is not None and s.given.name == callback.method.name)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to go on, part by part."""
        pipeline, parameters = self.pipeline, list(self.original.named_parameters())
        return {
            "stages": [
                (s.epochs, s.lr, [(method.name, method.config) for method in s.methods]) for s in pipeline.stages
            ],
            "monitor": asdict(pipeline.guard),
            "budget": pipeline.budget,
            "model": [(name, tuple(parameter.shape)) for name, parameter in parameters],
            "weights": sum(float(p.detach().double().sum()) for _, p in parameters if p.is_floating_point()),
            "data": _described(self.train),
        }

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
        log.info("%s: %.6g now, %.6g before all stages", guard.monitor, after, self.before)
        return drop <= guard.max_drop

    def _worst_first(self, before: nn.Module) -> list[str]:
        """Names of the layers that the last attempt changed, those with the largest errors first."""
        report = make_report(self.model, original=before)
        return [layer.name for layer in sorted(report.layers, key=lambda layer: -(layer.error or 0.0)) if layer.name]

    def _metric(self, model: nn.Module) -> float | None:
        monitor = self.pipeline.guard.monitor
        if monitor is None:
            return None
        copy = deep_copy(model)
        if model is not self.original:
            deploy(copy)
        found = validation_metrics(copy, self.val)
        check_logged(monitor, found)
        return found[monitor]

    def _example(self) -> Any:
        """Inputs to count multiply-accumulates on: the module's own, or a batch of the training; None without both."""
        own = getattr(self.original, "example_input_array", None)
        if own is not None or self.train is None:
            return own
        with contextlib.suppress(CalibrationError):  # the batches may be none that forward takes
            args, kwargs = bind_batch(self.original, Samples.take(self.train, 1).batches[0])
            return kwargs or args
        return None

    def finish(self, results: Iterable[StageResult]) -> CompressionResult:
        """Deploys the model, reports, evaluates, and writes the artefact."""
        if not changed_layers(self.model) and not any(callback._state for callback in self.callbacks):
            raise NothingToCompressError("No stage changes a layer; the lines above give the reasons.")
        example = self._example()
        # before norms are folded into weights, which are then no longer comparable
        report = make_report(self.model, original=self.original, example_inputs=example, files=True)
        deploy(self.model)
        to_eval(self.model)
        if self.pipeline.shows_report:
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


def _described(train: Any) -> str:
    """Types and shapes of the first batch; of a datamodule, its class."""
    if train is None or hasattr(train, "train_dataloader"):
        return type(train).__name__
    return describe_batch(next(iter(train), None))


def _plain(step: Step | None) -> dict[str, Any] | None:
    return None if step is None else {"config": step.method.config, "choices": step.choices}
