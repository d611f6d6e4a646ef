"""The driver: how any method lives in a Trainer, from setup to the artefact; it knows no method by name."""

import inspect
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pquant_lightning.callbacks._checkpoints import best_path, read_as_trainer
from pquant_lightning.callbacks._gradients import observe_step
from pquant_lightning.callbacks._lightning import is_a
from pquant_lightning.callbacks._monitors import reset_monitors, reset_would_matter
from pquant_lightning.callbacks._optimizers import follow_resized, repair_optimizers
from pquant_lightning.callbacks._second_fit import made_with, note_options, warn_of_other_options
from pquant_lightning.core._private import averaged_models, launches_copies, resume_path, resume_switch
from pquant_lightning.core.calibration import Samples, bind_batch, first_samples, run_samples
from pquant_lightning.core.compiled import rename_to_plain, renamed_as_saved, unwrap
from pquant_lightning.core.compressed_layer import (
    Stage,
    compressed_layers,
    install_hook,
    is_hooked,
    read_specs,
    rebuild,
)
from pquant_lightning.core.compression_method import CompressionContext, CompressionMethod, names_in
from pquant_lightning.core.coverage import note_plan, warn_where_most_is_left
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import (
    CalibrationError,
    CallbackOrderError,
    CheckpointError,
    ModelError,
    NothingToCompressError,
    OptionError,
)
from pquant_lightning.core.hyperparameters import loading_line
from pquant_lightning.core.modes import to_training
from pquant_lightning.core.optimizer import separate_groups
from pquant_lightning.core.options import option_texts
from pquant_lightning.core.partial import HINT, complete, omit_frozen
from pquant_lightning.core.plan import CompressionPlan, Skip
from pquant_lightning.core.reduction import on_all
from pquant_lightning.core.report import CompressionReport, count_macs, make_report
from pquant_lightning.core.serialization import (
    artifact_metadata,
    read_sharded_specs,
    share_equal_storage,
    write_artifact,
)
from pquant_lightning.core.splitting import split_names
from pquant_lightning.core.undo import Undo, unchanged_on_error

log = logging.getLogger(__name__)


class BeforeCompression:
    """A callback that looks at the model when it is complete and nothing has been compressed in this fit."""

    def before_compression(self, trainer: Trainer, module: LightningModule) -> None:
        """Called once per run, whatever the order of the callbacks, if any method acts in the Trainer."""
        raise NotImplementedError


class _MethodCallback(Callback):
    """One method in a Trainer. Of all such callbacks in a Trainer, the first sets up and the last reports and writes.

    Attributes:
        method: what it does.
        report: after the start of a fit, parameters, bytes, MACs and errors; on the last such callback.
        artifact: after a fit, the file with the deployed model; on the last such callback.
        writes_artifact: whether it writes one.
        optional: whether it may change no layer, which is then only a warning.
        shows_report: whether the report is logged.
    """

    writes_artifact = True
    optional = False
    shows_report = True

    def __init__(self, method: CompressionMethod, name: str | None = None, reset_monitors: bool = True) -> None:
        if not isinstance(method, CompressionMethod):
            raise OptionError(f"{type(self).__name__} takes a compression method, got {method!r}.")
        self.method = method
        self.name = name
        self.reset_monitors = reset_monitors
        self.report: CompressionReport | None = None
        self.artifact: Path | None = None
        self._state: dict[str, Any] = {}
        self._complete = False
        self._made_with: dict[str, str] | None = None  # options of the fit that made the layers, where known
        self._scratch = _Run()

    @property
    def state_key(self) -> str:
        """Class, method and the user's name, never options: a resume may change options."""
        named = f", {self.name}" if self.name else ""
        return f"{type(self).__name__}({self.method.name}{named})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "method": self.method.name,
            "complete": self._complete,
            "state": self._state,
            "options": self._made_with,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state, self._complete = state_dict["state"], state_dict["complete"]
        self._made_with = state_dict.get("options")  # files of version 0.1.0 have none
        warn_of_other_options(self.state_key, self.method, self._made_with)

    # -- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        prepared = is_hooked(pl_module)
        install_hook(pl_module)
        ours = _ours(trainer)
        if self is ours[0]:
            self._prepare_run(trainer, pl_module, prepared)
        copying = any(is_a(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if self is ours[-1] and copying and _is_wrapped(pl_module):
            pl_module.configure_model()  # SWA copies the model in its own setup, which comes next

    def _prepare_run(self, trainer: Trainer, pl_module: LightningModule, prepared: bool) -> None:
        _check_order(trainer)
        _check_resizing(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            to_training(pl_module)  # `load_compressed` gives it in eval mode
        if fitting and launches_copies(trainer) and not prepared:
            raise ModelError(
                "This strategy trains a copy of the model in other processes, and the model here would not take over "
                "the compressed layers. Call pquant_lightning.prepare(model) before fit, or derive the module from "
                "pquant_lightning.CompressedModule, or use strategy='ddp'."
            )
        if fitting or resume_path(trainer) is not None:
            previous = pl_module.__dict__.get("configure_model")
            pl_module.__dict__["configure_model"] = partial(_configure_model, pl_module, previous)

    def compress(self, trainer: Trainer, module: LightningModule, undo: Undo) -> None:
        """Plans on rank 0, applies everywhere; does nothing where this callback's layers are in the model already."""
        layers = [layer for layer in compressed_layers(module).values() if layer.stage is not Stage.UNFUSE]
        own = [layer for layer in layers if layer.spec.get("by") == self.state_key]
        if any(layer.deployed for layer in own):
            raise ModelError(
                f"{type(module).__name__} is finalized: the layers of {self.state_key} hold integers, which cannot be "
                "trained. Fit the model in training form: load a checkpoint of the fit (.ckpt) instead of the artefact."
            )
        if own or self.method.applied_to(module, self._state, self.state_key):
            self._made_with = made_with(module, self.state_key)
            warn_of_other_options(self.state_key, self.method, self._made_with)
            return
        samples = _take_samples(trainer, module, self.method)
        self._state, self._complete = {}, False
        everyone = None if samples is None else samples.of_all_processes()
        track = partial(_track, trainer)
        others = [callback for callback in _ours(trainer) if callback is not self]
        earlier = [callback for callback in others if callback.method.stage < self.method.stage]
        kept = [c.method.kept_whole(module, c._state) if c in earlier else names_in(c._state) for c in others]
        names = frozenset(itertools.chain.from_iterable(kept))
        context = CompressionContext(
            undo=undo, by=self.state_key, track=track, samples=samples, state=self._state, kept=names
        )
        try:
            plan = self._shared_plan(trainer, module, context, everyone)
        except NothingToCompressError as error:
            if not self.optional:
                raise
            self._complete = True
            log.warning("%s", error)
            return
        note_plan(module, plan)
        with undo.writing():
            self.method.apply(module, plan, context)
            parts = split_names(plan.splits)
            for callback in earlier if parts else ():
                callback.method.follow_split(module, callback._state, parts)
            if not self.method.acts_after_training:
                self.method.calibrate(module, context)
        self._made_with = note_options(module, self.state_key, self.method)
        self._scratch = _Run(errors=context.errors, skipped=plan.skipped, compressed=True)
        if trainer.strategy.restore_checkpoint_after_setup:  # sharded strategies do not synchronise the ranks
            for entry in plan.layers:
                for tensor in module.get_submodule(entry.name).state_dict(keep_vars=True).values():
                    tensor.data.copy_(trainer.strategy.broadcast(tensor.data))

    def compress_untrained(
        self, model: nn.Module, samples: Samples | None, choices: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Compresses a model outside of a Trainer, so that a later fit with this callback goes on with it.

        Args:
            model: changed in place.
            samples: what the method wants.
            choices: what a budget has chosen for its layers.
        """
        self._state, self._complete = {}, True
        context = CompressionContext(by=self.state_key, samples=samples, state=self._state, choices=choices)
        try:
            self.method.compress_in_place(model, context=context)
        except NothingToCompressError as error:
            if not self.optional:
                raise
            log.warning("%s", error)

    def _shared_plan(
        self, trainer: Trainer, module: LightningModule, context: CompressionContext, samples: Samples | None
    ) -> CompressionPlan:
        """The plan of rank 0 from the samples of all; what it notes there goes with them."""
        if samples is not context.samples:
            context = replace(context, samples=samples, notes=dict(context.notes))
        plan: CompressionPlan | Exception | None = None
        if trainer.is_global_zero:
            try:
                plan = self.method.checked_plan(module, context)
            except Exception as error:  # raised below, on every rank: the others must not wait for ever
                plan = error
        plan = trainer.strategy.broadcast(plan)
        if isinstance(plan, Exception):
            raise plan
        assert plan is not None
        return plan

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self is _ours(trainer)[-1]:
            repair_optimizers(trainer, pl_module, self._scratch.names_before)
            for optimizer in trainer.optimizers:
                configs = [c.scheduler for c in trainer.lr_scheduler_configs]
                own = [s for s in configs if getattr(s, "optimizer", None) is optimizer]
                separate_groups(pl_module, optimizer, own)

    # -- during training ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ours = _ours(trainer)
        if self.method.completes_at > 0 and math.isinf(_limits(trainer)):
            raise ModelError(
                f"{self.state_key} follows a schedule over the training, and this training is open-ended "
                "(max_epochs=-1 without max_steps). Give the Trainer max_steps or max_epochs."
            )
        if self._scratch.compressed and self.reset_monitors and self.method.completes_at == 0:
            self._start_monitors_afresh(trainer)
        if type(self.method).project is not CompressionMethod.project:
            alone = len(trainer.optimizers) == 1
            hook = partial(_project, self.method, pl_module, self._state, alone)
            self._scratch.handles = [o.register_step_post_hook(hook) for o in trainer.optimizers]
            self.method.project(pl_module, self._state)
        if self is ours[-1]:
            self._scratch.best_before = best_path(trainer)
        if self is ours[-1] and resume_path(trainer) is not None:
            _report(trainer, pl_module, shown=_act_at_start(ours))  # before, the values of the file were not there
        if self is ours[-1] and self.report is not None:
            pl_module.log("pquant/compression_ratio", self.report.compression_ratio, sync_dist=True)
            pl_module.log("pquant/size_ratio", self.report.size_ratio, sync_dist=True)
            pl_module.log("pquant/size_bytes", float(self.report.size_bytes[1]), sync_dist=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._scratch.example is None and self is _ours(trainer)[-1]:
            self._scratch.example = first_samples(batch, 1)
        if type(self.method).step is CompressionMethod.step:
            return
        progress = self._scratch.progress = _progress(trainer, batch_idx)
        completes = not self._complete and progress >= self.method.completes_at
        if not (self._is_due(trainer.global_step, batch_idx) or completes):
            return
        resized = self.method.step(pl_module, self._state, progress)
        if resized:
            follow_resized(trainer, resized)
        for average in averaged_models(trainer):
            self.method.project(average, self._state)
        if completes:
            self._complete = True
            if self.reset_monitors and self.method.completes_at > 0:
                self._start_monitors_afresh(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        observe_step(self.method, pl_module, self._state, trainer, optimizer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        whole = trainer.strategy.restore_checkpoint_after_setup or averaged_models(trainer)
        if self.method.omits_frozen and not whole:
            checkpoint["state_dict"] = omit_frozen(pl_module, checkpoint["state_dict"])
        if self is _ours(trainer)[-1] and not trainer.strategy.restore_checkpoint_after_setup:
            checkpoint["state_dict"] = renamed_as_saved(pl_module, checkpoint["state_dict"])
        if self is _ours(trainer)[-1] and compressed_layers(pl_module) and not whole:
            hint = torch.empty(0, dtype=torch.uint8)
            checkpoint["state_dict"] = {**checkpoint["state_dict"], HINT: hint}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in self.method.metrics(pl_module, self._state).items():
            pl_module.log(f"pquant/{name}" + (f"/{self.name}" if self.name else ""), value, sync_dist=True)

    def _is_due(self, step: int, batch_idx: int) -> bool:
        period = self.method.steps_between
        before, self._scratch.step = self._scratch.step, step
        if not period:
            return period == 0 or batch_idx == 0
        return step // period > (step - 1 if before is None else before) // period

    def _start_monitors_afresh(self, trainer: Trainer) -> None:
        if reset_would_matter(trainer):
            reset_monitors(trainer)
            log.info(
                "%s has reached its target: ModelCheckpoint and EarlyStopping start afresh, so that the best model "
                "is a compressed one (reset_monitors=False keeps their scores).",
                self.state_key,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_handles()
        smoke_test: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.method.acts_after_training:
            samples = self._scratch.samples = _take_samples(trainer, pl_module, self.method)
            self.method.calibrate(pl_module, CompressionContext(by=self.state_key, samples=samples))
        if self is _ours(trainer)[-1]:
            _report(trainer, pl_module, shown=not _act_at_start(_ours(trainer)))
        if self.method.completes_at > 0 and not self._complete and not smoke_test:
            log.warning(
                "%s reaches its target at %.0f %% of the training, and the training ended at %.0f %%. Train longer, or "
                "let the schedule end earlier.",
                self.state_key,
                100 * self.method.completes_at,
                100 * self._scratch.progress,
            )
        if self is _ours(trainer)[-1] and self.writes_artifact and not smoke_test:
            directory = trainer.log_dir or trainer.default_root_dir  # asks all ranks, so not only on rank 0
            self.artifact = Path(directory) / "compressed.safetensors"
            if trainer.strategy.restore_checkpoint_after_setup:
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                self._scratch.gathered = get_model_state_dict(pl_module, options=options)

    # -- after training ----------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = self is _ours(trainer)[-1] and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if last and self.artifact is not None and self.report is not None and trainer.is_global_zero:
            try:
                size = _write_artifact(trainer, pl_module, self.artifact, self._scratch)
            except CheckpointError as error:  # the trained model and its checkpoints must not be lost for this
                log.error("No artefact was written: %s", error)
                self.artifact = None
                return
            _close_bar(trainer)
            log.info(
                "Compressed model: %s (%s bytes, %.1f %% of the uncompressed weights). Load it with\n    %s",
                self.artifact,
                f"{size:,}",
                100 * size / self.report.size_bytes[0],
                loading_line(pl_module, self.artifact),
            )
        self._scratch = _Run()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _restore_configure_model(pl_module)
        self._remove_handles()

    def _remove_handles(self) -> None:
        for handle in self._scratch.handles:
            handle.remove()
        self._scratch.handles = []


class _Run:
    """What a callback knows only during one fit."""

    def __init__(
        self, errors: dict[str, float] | None = None, skipped: tuple[Skip, ...] = (), compressed: bool = False
    ) -> None:
        self.errors = errors or {}
        self.skipped = skipped
        self.compressed = compressed
        self.progress = 0.0
        self.step: int | None = None  # the optimizer step before which the last batch was
        self.names_before: dict[int, str] = {}
        self.handles: list[Any] = []
        self.gathered: dict[str, Any] | None = None
        self.best_before = ""  # the best checkpoint of an earlier fit, which this one has not written
        self.samples: Samples | None = None
        self.example: Any = None  # one sample of the first batch

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Run":
        return _Run()


def _ours(trainer: Trainer) -> list[_MethodCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, _MethodCallback)]


def _check_order(trainer: Trainer) -> None:
    """Methods act in the order of their stages, and before any callback that copies the model."""
    ours = _ours(trainer)
    right = sorted(ours, key=lambda callback: callback.method.stage)
    if right != ours:
        shown = ", ".join(callback.state_key for callback in right)
        raise CallbackOrderError(
            f"The callbacks stand in the order [{', '.join(c.state_key for c in ours)}], so that one undoes the other. "
            f"Give the Trainer callbacks=[{shown}]."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(ours[-1])]:
        if _copies_model(callback):
            shown = ", ".join([*(c.state_key for c in ours), type(callback).__name__])
            raise CallbackOrderError(
                f"{type(callback).__name__} copies the model and stands before {ours[-1].state_key}, which changes it. "
                f"Give the Trainer callbacks=[{shown}]."
            )


def _check_resizing(trainer: Trainer) -> None:
    """Where parameters get smaller during training, nothing else may keep something of their old shapes."""
    for callback in (c for c in _ours(trainer) if c.method.resizes):
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if _copies_model(c)]
        keeping = [c for c in _ours(trainer) if c.method.keeps_shapes and c is not callback]
        names = [type(c).__name__ for c in others] + [c.state_key for c in keeping]
        if trainer.strategy.restore_checkpoint_after_setup:
            names.append(f"the strategy {type(trainer.strategy).__name__}, which shards the parameters,")
        if names:
            raise CallbackOrderError(
                f"{callback.state_key} is to make parameters smaller during training, and {names[0]} keeps copies or "
                "masks of their first shapes. Let it act at the end of the fit, or leave the other out."
            )


def _copies_model(callback: object) -> bool:
    return is_a(callback, WeightAveraging) or is_a(callback, StochasticWeightAveraging)


def _is_wrapped(module: LightningModule) -> bool:
    wrapper = module.__dict__.get("configure_model")
    return isinstance(wrapper, partial) and wrapper.func is _configure_model


def _restore_configure_model(module: LightningModule) -> None:
    if _is_wrapped(module):
        wrapper = module.__dict__["configure_model"]
        del module.__dict__["configure_model"]
        if wrapper.args[1] is not None:
            module.__dict__["configure_model"] = wrapper.args[1]


def _configure_model(module: LightningModule, previous: Any) -> None:
    """Stands in for the instance's `configure_model` once: the user's own, then all compression of this run.

    A strategy that shards the model does so in the user's `configure_model`, so there compression comes first.
    """
    _restore_configure_model(module)
    trainer = module.trainer
    if not trainer.strategy.restore_checkpoint_after_setup:
        module.configure_model()
    unwrap(module)
    names_before = {id(parameter): name for name, parameter in module.named_parameters()}
    path = resume_path(trainer)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks:
        if isinstance(other, BeforeCompression):
            other.before_compression(trainer, module)
    with unchanged_on_error(module) as undo, _kept_on_error(_ours(trainer)), torch.device("cpu"):
        if path is not None:
            _take_structure(trainer, module, path)
        else:
            for callback in _ours(trainer):
                callback.compress(trainer, module, undo)
        if trainer.state.fn == TrainerFn.FITTING:
            _finish(trainer, module, undo)
            _ours(trainer)[-1]._scratch.names_before = names_before
    if trainer.strategy.restore_checkpoint_after_setup:
        module.configure_model()


@contextmanager
def _kept_on_error(callbacks: list[_MethodCallback]) -> Iterator[None]:
    """Within the block callbacks learn of a model; where it raises they have not."""
    before = [{**callback.__dict__, "_state": dict(callback._state)} for callback in callbacks]
    try:
        yield
    except BaseException:
        for callback, attributes in zip(callbacks, before, strict=True):
            callback.__dict__.update(attributes)
        raise


def _take_structure(trainer: Trainer, module: LightningModule, path: str) -> None:
    """Resume: the file's specs are the plan; nothing is planned, calibrated or decomposed."""
    file = Path(path)
    if file.is_dir():
        checkpoint, specs, state = read_sharded_specs(file)
    else:
        checkpoint = read_as_trainer(trainer, path, resume_switch(trainer))
        state = dict(checkpoint.get("state_dict", {}))
        rename_to_plain(state)
        complete(module, state)
        specs = read_specs(state)
    if trainer.state.fn == TrainerFn.FITTING:
        made_by = {spec.get("by") for spec in specs.values()} | set(checkpoint.get("callbacks", {}))
        for callback in _ours(trainer):
            if callback.state_key not in made_by:
                raise CheckpointError(
                    f"{path} was written without {callback.state_key}, so resuming would train without it. Load "
                    "the weights first and fit without ckpt_path, which compresses them: "
                    f"model = {loading_line(module, path)}; or take the callback out of the list."
                )
    rebuild(module, specs, state)


def _finish(trainer: Trainer, module: LightningModule, undo: Undo) -> None:
    """Prepares training on the compressed model and reports it."""
    with undo.writing():
        for callback in _ours(trainer):
            callback.method.attach(module, callback._state)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ModelError(
            f"{type(module).__name__} has no parameter to train: all are frozen or integers. Unfreeze some "
            "(parameter.requires_grad_(True)); a finalized model is not trained again: load a checkpoint of the fit."
        )
    if resume_path(trainer) is None:
        _report(trainer, module, shown=_act_at_start(_ours(trainer)))
    if trainer.is_global_zero:
        warn_where_most_is_left(module)


def _act_at_start(callbacks: list[_MethodCallback]) -> bool:
    """Whether what is done to the model is done when the training starts; else the table is that of the end."""
    return all(c.method.completes_at == 0 and not c.method.acts_after_training for c in callbacks)


def _example(module: LightningModule, sample: Any) -> Any:
    """Inputs of `forward`: the module's own example, or out of a training batch where it can be seen how; else None."""
    own = getattr(module, "example_input_array", None)
    if own is not None or sample is None:
        return own
    try:
        args, kwargs = bind_batch(module, sample)
        count_macs(module, kwargs or args)
    except Exception:  # whatever a forward may raise on a batch that training_step takes apart
        return None
    return kwargs or args


def _report(trainer: Trainer, module: LightningModule, shown: bool) -> None:
    """Reports the model on the last of our callbacks, and logs the table where it is to be `shown`: once in a fit."""
    ours = _ours(trainer)
    runs = [callback._scratch for callback in ours]
    errors = {name: error for run in runs for name, error in run.errors.items()}
    skipped = [skip for run in runs for skip in run.skipped if skip.name not in compressed_layers(module)]
    example = _example(module, ours[-1]._scratch.example)
    report = make_report(module, example_inputs=example, errors=errors, skipped=skipped)
    if trainer.is_global_zero and ours[-1].shows_report and shown:
        needs = (
            "" if report.macs is not None else "\nTo have MACs counted here, give the module an example_input_array."
        )
        log.info("%s%s", report, needs)
    ours[-1].report = report


def _write_artifact(trainer: Trainer, module: LightningModule, path: Path, run: _Run) -> int:
    """Writes the best checkpoint's model where one is monitored, else the current one; returns the bytes."""
    shell = share_copy(module)
    state = run.gathered
    best = best_path(trainer)
    if best and Path(best).is_file():
        checkpointer: Any = trainer.checkpoint_callback
        # what this run has written may hold its own objects; of another file that is for the user to say
        weights_only = False if best != run.best_before else resume_switch(trainer)
        state = read_as_trainer(trainer, best, weights_only)["state_dict"]
        log.info("The artefact holds the best checkpoint by %s: %s", checkpointer.monitor, best)
    if state is not None:
        rename_to_plain(state)
        complete(shell, state)
        rebuild(shell, read_specs(state), state)
        shell.load_state_dict(state, strict=module.strict_loading, assign=True)
        share_equal_storage(shell)
        for callback in _ours(trainer):  # what was measured at the end of the fit belongs to the last weights
            if (samples := callback._scratch.samples) is not None:
                context = CompressionContext(by=callback.state_key, samples=samples.on_one_process())
                callback.method.calibrate(shell, context)
    return write_artifact(shell, path, artifact_metadata(module))


def _take_samples(trainer: Trainer, module: LightningModule, method: CompressionMethod) -> Samples | None:
    """Each process takes its share of the training data; None where the method wants none.

    Where the model cannot be run on them, a method that does not need them goes on without, with a warning.
    """
    if not method.wanted_samples_in_trainer:
        return None
    trainer.fit_loop.setup_data()
    samples, failure = _fitting_samples(trainer, module, -(-method.wanted_samples_in_trainer // trainer.world_size))
    if on_all(failure is None):
        return samples
    failure = failure or CalibrationError("The model cannot be run on the training batches of another process.")
    if method.needs_samples:
        raise failure
    log.warning("%s goes on without calibration: %s", method.name, failure)
    return None


def _fitting_samples(
    trainer: Trainer, module: LightningModule, count: int
) -> tuple[Samples | None, CalibrationError | None]:
    """Samples that the model can be run on, or why there are none; the processes go through this together."""
    loader, samples, failure = trainer.train_dataloader, None, None
    try:
        if isinstance(loader, list | tuple | dict):
            raise CalibrationError(
                "There are several training loaders, and it is not known which batches forward takes."
            )
        samples = Samples.take(loader, count, datamodule=getattr(trainer, "datamodule", None))
    except CalibrationError as error:
        failure = error
    taken = on_all(samples is not None)
    if samples is None or not taken:
        return samples, failure
    samples = samples.fitted_to(module)
    try:
        for _ in run_samples(module, samples.few()):
            pass
    except CalibrationError as error:
        failure = error
    return samples, failure


def _close_bar(trainer: Trainer) -> None:
    """Ends a progress bar that is redrawn until the Trainer is torn down: it would wipe out what is printed now."""
    live: Any = getattr(trainer.progress_bar_callback, "progress", None)
    if hasattr(live, "stop"):
        live.stop()


def _track(trainer: Trainer, items: Iterable[Any], description: str) -> Iterable[Any]:
    """A progress bar while layers are decomposed: on rank 0, in a terminal, unless bars are switched off."""
    bar: Any = trainer.progress_bar_callback
    visible = trainer.is_global_zero and bar is not None and bar.is_enabled and sys.stderr.isatty()
    return track(list(items), description, console=Console(stderr=True), transient=True, disable=not visible)


def _limits(trainer: Trainer) -> float:
    """Epochs or steps after which training ends; infinite if it is open-ended."""
    epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    steps = trainer.max_steps if trainer.max_steps != -1 else math.inf
    return min(float(epochs or 0), float(steps))


def _progress(trainer: Trainer, batch_idx: int) -> float:
    """Share of the training's batches or steps that is done, whichever is further: 0 at the first, 1 at the last."""
    done = 0.0
    if trainer.max_epochs not in (None, -1):
        batches = trainer.num_training_batches
        per_epoch = 1 if math.isinf(batches) else int(batches)
        within = 0 if math.isinf(batches) else batch_idx
        done = (trainer.current_epoch * per_epoch + within) / max((trainer.max_epochs or 1) * per_epoch - 1, 1)
    if trainer.max_steps > 0:
        done = max(done, trainer.global_step / max(trainer.max_steps - 1, 1))
    return min(done, 1.0)


def _project(
    method: CompressionMethod, module: nn.Module, state: dict[str, Any], alone: bool, optimizer: Any, *_: Any
) -> None:
    """After a step: of the only optimizer, or of one of several (GANs), whose backward passes may interleave."""
    if alone:
        method.project(module, state)
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    method.project_held(module, state, lambda parameter: id(parameter) in held)


def show_signature(callback_class: type[_MethodCallback], method_class: type[CompressionMethod]) -> None:
    """Gives a named callback the signature and the texts of its method's options, for `inspect`, `help` and editors."""
    options = [p for p in inspect.signature(method_class).parameters.values() if p.kind is p.KEYWORD_ONLY]
    texts = option_texts(method_class)
    shown = "\n".join(f"        {option.name}: {texts[option.name]}" for option in options)
    whole = f"        **options: of `{method_class.__name__}`."
    callback_class.__doc__ = (callback_class.__doc__ or "").replace(whole, shown)
    own = [p for p in inspect.signature(callback_class.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    callback_class.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]


class CompressionCallback(_MethodCallback):
    """Runs any compression method in a Trainer.

    Args:
        method: the method, e.g. `LowRankCompression(rank=64)`.
        name: tells two callbacks of one method apart; part of what a checkpoint remembers.
        reset_monitors: when the target is reached, ModelCheckpoint and EarlyStopping start afresh.

    >>> from pquant_lightning import LowRankCompression
    >>> CompressionCallback(LowRankCompression(rank=8)).state_key
    'CompressionCallback(low_rank)'
    """

    def __init__(self, method: CompressionMethod, name: str | None = None, reset_monitors: bool = True) -> None:
        super().__init__(method, name, reset_monitors)
