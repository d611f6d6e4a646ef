"""The functions a user calls: compress, finalize, save, load, report."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
from torch import Tensor, nn

from pquant_lightning.callbacks._lightning import is_a, is_subclass
from pquant_lightning.config import ConfigManager
from pquant_lightning.core.compiled import rename_to_plain, unwrap
from pquant_lightning.core.compressed_layer import install_hook
from pquant_lightning.core.compression_method import CompressionContext, CompressionMethod
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.coverage import warn_where_most_is_left
from pquant_lightning.core.deploy import deploy, with_plain_names
from pquant_lightning.core.errors import CheckpointError, OptionError, PQuantError
from pquant_lightning.core.hyperparameters import Arguments, arguments_of
from pquant_lightning.core.modes import to_eval
from pquant_lightning.core.options import check_model
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import CompressionReport, make_report
from pquant_lightning.core.serialization import (
    ARTIFACT_NAME,
    artifact_metadata,
    read_checkpoint,
    read_model,
    write_artifact,
    write_state_dict,
)
from pquant_lightning.core.undo import NoUndo, Undo, unchanged_on_error
from pquant_lightning.pipelines._settings import Settings
from pquant_lightning.pipelines.compression_pipeline import CompressionPipeline
from pquant_lightning.utils.layer_timing import time_layers

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def compress_model(
    model: nn.Module,
    method_or_config: str | CompressionMethod | dict[str, Any] | Path,
    *,
    train_loader: Any = None,
    val_loader: Any = None,
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Compresses a model outside of a Trainer.

    Gives the deployed form of post-training methods and the training form of those that train (`qat`).

    Args:
        model: any module that contains layers; not touched unless `inplace`.
        method_or_config: a method's name, a method object, a configuration dict or the path of a YAML file. With a
            section `training`, a LightningModule is fine-tuned as `CompressionPipeline.from_config` does, and the
            deployed form is returned.
        train_loader: data for methods that calibrate: a loader, a list of batches, or a datamodule. A batch is a
            tensor, a tuple with the inputs first, or a dict with the names of `forward`'s arguments.
        val_loader: data for methods that measure.
        inplace: change the given model instead of a copy; it is what it was where an error is raised.
        **options: the method's options, with a name only.

    Returns:
        The compressed model, which reloads its own state dicts.

    Raises:
        PQuantError: unknown method or option, no layer to change, weights that are not finite.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> small = compress_model(net, "low_rank", rank=8)
    >>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in small.parameters())
    (4810, 1690)
    """
    check_model("compress_model", model)
    config = _configuration(method_or_config, options)
    settings = None if config is None else Settings.read(config)
    if config is not None and settings is not None and (settings.training.epochs or settings.budget is not None):
        trains = is_a(model, pl.LightningModule) and train_loader is not None
        if trains or not settings.training.epochs:
            return _run_pipeline(model, config, train_loader, val_loader, inplace)
        log.warning(
            "The section 'training' asks for epochs, and %s: the model is compressed without training.",
            "there is no train_loader" if train_loader is None else f"{type(model).__name__} is no LightningModule",
        )
    methods = _methods(method_or_config if config is None else config, options)
    if not inplace:
        return _act(methods, deep_copy(model), train_loader, val_loader, NoUndo())
    model = unwrap(model)
    with unchanged_on_error(model) as undo:
        return _act(methods, model, train_loader, val_loader, undo)


def _act(methods: list[CompressionMethod], model: nn.Module, train: Any, val: Any, undo: Undo | NoUndo) -> Any:
    """Applies methods to a model in place, one after another."""
    for method in methods:
        if type(method).compress is not CompressionMethod.compress:  # the specification's shape: it does all itself
            with undo.writing():
                model = method.compress(model, train, val)
            continue
        samples = method.samples_of(train, model)
        context = CompressionContext(by=method.name, samples=samples, undo=undo)
        method.compress_in_place(model, context=context)
    warn_where_most_is_left(model)
    install_hook(model)
    if not any(method.trains for method in methods):
        with undo.writing():
            deploy(model)
    return model


def _configuration(method_or_config: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration that was given as a dict or a YAML file; None where something else was."""
    if isinstance(method_or_config, str) and method_or_config.endswith((".yaml", ".yml")):
        method_or_config = Path(method_or_config)
    if isinstance(method_or_config, Path):
        method_or_config = ConfigManager.load_config(method_or_config)
    if isinstance(method_or_config, dict) and options:
        raise OptionError(f"Options ({', '.join(options)}) go with a method's name; put them into the configuration.")
    return method_or_config if isinstance(method_or_config, dict) else None


def _methods(method_or_config: Any, options: dict[str, Any]) -> list[CompressionMethod]:
    """The methods in the order in which they act."""
    if isinstance(method_or_config, str):
        return [CompressionMethodRegistry.get(method_or_config, options)]
    if options:
        raise OptionError(f"Options ({', '.join(options)}) go with a method's name; put them into the method.")
    if isinstance(method_or_config, CompressionMethod):
        return [method_or_config]
    if not isinstance(method_or_config, dict):
        raise OptionError(
            f"compress_model takes a method's name, a method or a configuration, got {method_or_config!r}."
        )
    return sorted(ConfigManager.methods(method_or_config), key=lambda method: method.stage)


def _run_pipeline(model: nn.Module, config: dict[str, Any], train: Any, val: Any, inplace: bool) -> nn.Module:
    if inplace:
        raise OptionError("A configuration with training or a budget compares with the given model: no inplace.")
    if config.get("evaluation") and val is None and not hasattr(train, "val_dataloader"):
        log.warning("The section 'evaluation' needs a val_loader (or a datamodule): nothing is evaluated.")
        config = {key: value for key, value in config.items() if key != "evaluation"}
    return CompressionPipeline.from_config(config).run(model, train, val).model


def finalize(model: Model, inplace: bool = False) -> Model:
    """The deployed form: masks baked, weights as integers, nothing left that only training needs; in eval mode.

    Args:
        model: a model in training form; not touched unless `inplace`.
        inplace: change the given model instead of a copy; it is what it was where an error is raised.

    Raises:
        ModelError: it is no model.
    """
    check_model("finalize", model)
    result = cast(Model, unwrap(model)) if inplace else deep_copy(model)
    if inplace:
        with unchanged_on_error(result) as undo, undo.writing():
            deploy(result)
    else:
        deploy(result)
    install_hook(result)
    return to_eval(result)


def prepare(model: Model) -> Model:
    """Makes `model.load_state_dict` rebuild compressed layers from the state dict; returns the same model.

    The callbacks do this by themselves; it is needed for a plain `load_state_dict`, and before `fit` with a strategy
    that trains copies of the model (`ddp_spawn`, `ddp_notebook`).
    """
    check_model("prepare", model)
    install_hook(model)
    return model


class CompressedModule:
    """Mixin, first base of a LightningModule: plain `MyModule.load_from_checkpoint` then loads compressed checkpoints.

    >>> class Net(CompressedModule, pl.LightningModule):
    ...     pass
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self, nn.Module)
        install_hook(self)


def compression_report(
    original: nn.Module, compressed: nn.Module, example_inputs: Any = None, timed: bool = False
) -> CompressionReport:
    """Parameters, stored bytes, multiply-accumulates and weight errors, before and after; prints as a table.

    Args:
        original: the uncompressed model.
        compressed: training form or deployed form.
        example_inputs: what `forward` takes (tensor, tuple or dict), for the multiply-accumulates.
        timed: time each layer on these inputs, before and after; its row then says how long it takes, and by which
            kernel.

    Raises:
        OptionError: `timed` without inputs.
    """
    check_model("compression_report", original)
    check_model("compression_report", compressed)
    report = make_report(compressed, original=original, example_inputs=example_inputs, files=True)
    if not timed:
        return report
    if example_inputs is None:
        raise OptionError("compression_report(timed=True) times the layers on example_inputs; give some.")
    found = {timing.name: timing.summary for timing in time_layers(original, finalize(compressed), example_inputs)}
    words = {row.name: "; ".join(filter(None, (row.method, found.get(row.name)))) for row in report.layers}
    return replace(report, layers=tuple(replace(row, method=words[row.name]) for row in report.layers))


def save_compressed(model: nn.Module, path: str | Path) -> Path:
    """Writes the deployed form of a model; the model is not changed.

    Args:
        model: training form or deployed form.
        path: `*.safetensors` (with the hyperparameters of a LightningModule), `*.pt` (a state dict), or a directory.

    Returns:
        The file that was written.

    Raises:
        OptionError: another ending.
    """
    check_model("save_compressed", model)
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"save_compressed takes a path as text or pathlib.Path, got {path!r}.")
    path, model = Path(path), with_plain_names(model)
    if path.suffix == "":
        path = path / ARTIFACT_NAME
    if path.suffix == ".pt":
        write_state_dict(model, path)
    elif path.suffix == ".safetensors":
        write_artifact(model, path, artifact_metadata(model))
    else:
        raise OptionError(
            f"save_compressed writes .safetensors, .pt or a directory, got {path.name!r}; export_model writes others."
        )
    return path


def load_compressed(model_or_class: Any, path: str | Path, *, weights_only: bool = True, **init_kwargs: Any) -> Any:
    """Loads a compressed model, whatever was done to it, and returns it in eval mode.

    Args:
        model_or_class: the uncompressed model (it is changed and returned), or its class.
        path: a Lightning `.ckpt`, a `.safetensors` or `.pt` file, or a directory written by `save_compressed`.
        weights_only: False reads checkpoints that hold objects (losses, enums, classes) as hyperparameters; that can
            run code from the file, so only for files that you trust.
        **init_kwargs: arguments of the class; those of a LightningModule's saved hyperparameters are known.

    Raises:
        CheckpointError: the file is truncated, foreign, hostile, or does not fit the model.
        OptionError: the class needs an argument that the file does not hold; the message names it.
    """
    is_class = isinstance(model_or_class, type) and issubclass(model_or_class, nn.Module)
    if not is_class:
        check_model("load_compressed", model_or_class, or_class=True)
    path = _file(path)
    if not is_class and init_kwargs:
        raise OptionError(
            f"Arguments ({', '.join(init_kwargs)}) go with a class; {type(model_or_class).__name__} is made already."
        )
    if path.suffix == ".safetensors":
        state, saved = read_model(path)
    else:
        checkpoint = read_checkpoint(path, weights_only)
        state, saved = checkpoint.get("state_dict", checkpoint), _arguments_in(checkpoint, model_or_class)
        if is_subclass(model_or_class, pl.LightningModule) and "state_dict" in checkpoint:
            return to_eval(_load_from_checkpoint(model_or_class, path, weights_only, saved, init_kwargs))
    if is_class:
        model = _make(model_or_class, saved, init_kwargs)
    else:
        model = unwrap(model_or_class)
        _compare_arguments(model, saved)
    _load(model, state, path)
    return to_eval(model)


def _file(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"A path is text or a pathlib.Path, got {path!r}.")
    path = Path(path)
    path = path / ARTIFACT_NAME if path.is_dir() and (path / ARTIFACT_NAME).exists() else path
    if path.is_dir():
        raise CheckpointError(f"The directory {path} holds no {ARTIFACT_NAME}; name the checkpoint file itself.")
    return path


def _arguments_in(checkpoint: Mapping[str, Any], model_or_class: Any) -> Arguments:
    """What a Lightning checkpoint says about the arguments of its model."""
    known = checkpoint.get("hyper_parameters", {})
    if not isinstance(known, Mapping):
        return Arguments()
    known, holder = {str(name): value for name, value in known.items()}, checkpoint.get("hparams_name")
    cls = model_or_class if isinstance(model_or_class, type) else type(model_or_class)
    return Arguments.of_values(cls, known, holder if isinstance(holder, str) else None)


def _load_from_checkpoint(
    model_class: Any, path: Path, weights_only: bool, saved: Arguments, given: dict[str, Any]
) -> pl.LightningModule:
    """By Lightning's own way, which knows its hyperparameters and older versions of its checkpoints."""
    given = {name: value for name, value in given.items() if value is not ...}
    if "_instantiator" not in saved.known:  # else LightningCLI makes the arguments
        saved.for_class(model_class, given)
    _warn_of_defaults(model_class, saved, given)
    try:
        with _hooked(model_class):
            model: pl.LightningModule = model_class.load_from_checkpoint(
                path, map_location="cpu", weights_only=weights_only, **given
            )
    except PQuantError:
        raise
    except TypeError as error:
        raise OptionError(_cannot_be_made(model_class, {**saved.known, **given}, error)) from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {model_class.__name__}: {error}") from error
    return model


def _make(model_class: type[nn.Module], saved: Arguments, given: dict[str, Any]) -> nn.Module:
    arguments = saved.for_class(model_class, given)
    _warn_of_defaults(model_class, saved, given)
    try:
        model = model_class(**arguments)
    except TypeError as error:
        raise OptionError(_cannot_be_made(model_class, arguments, error)) from error
    if is_a(model, pl.LightningModule):
        model.configure_model()
    return model


def _cannot_be_made(model_class: type[nn.Module], arguments: Mapping[str, Any], error: TypeError) -> str:
    return (
        f"{model_class.__name__} cannot be made from {dict(arguments)!r}: {error}. Pass its arguments to "
        "load_compressed, or a model."
    )


def _warn_of_defaults(model_class: type[nn.Module], saved: Arguments, given: Mapping[str, Any]) -> None:
    if names := saved.not_known(model_class, given):
        keeps = " (self.save_hyperparameters() in its __init__ keeps them)"
        log.warning(
            "The file does not hold the arguments %s of %s%s: it is made with their defaults. If the saved model had "
            "others, pass them to load_compressed.",
            ", ".join(names),
            model_class.__name__,
            keeps if is_subclass(model_class, pl.LightningModule) else "",
        )


def _compare_arguments(model: nn.Module, saved: Arguments) -> None:
    """A model that was made with other arguments may compute something else with the same weights."""
    if others := saved.differences(arguments_of(model)):
        shown = "; ".join(f"{name}={there!r}, here {here!r}" for name, (there, here) in others.items())
        log.warning("The file was written by a %s with other arguments: %s.", type(model).__name__, shown)


def _load(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Loads strictly, in the floating-point types of the file."""
    install_hook(model)
    rename_to_plain(state)
    try:
        model.load_state_dict(state)
    except PQuantError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        stored = state.get(name)
        if isinstance(stored, Tensor) and stored.dtype != tensor.dtype:
            tensor.data = stored.to(tensor.device)


@contextlib.contextmanager
def _hooked(model_class: type[pl.LightningModule]) -> Iterator[None]:
    """Fresh instances get the load hook in `on_load_checkpoint`, which Lightning calls just before the weights."""
    changed: Any = model_class
    own = "on_load_checkpoint" in model_class.__dict__
    original = model_class.on_load_checkpoint

    def on_load_checkpoint(self: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        install_hook(self)
        original(self, checkpoint)

    changed.on_load_checkpoint = on_load_checkpoint
    try:
        yield
    finally:
        if own:
            changed.on_load_checkpoint = original
        else:
            del changed.on_load_checkpoint
