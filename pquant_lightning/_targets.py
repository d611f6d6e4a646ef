"""What a command works on: model, weights, data and methods, as the command line or a YAML names them."""

import argparse
import importlib
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from pquant_lightning._arguments import pairs
from pquant_lightning.api import load_compressed
from pquant_lightning.callbacks._lightning import is_a
from pquant_lightning.callbacks.base import _MethodCallback
from pquant_lightning.config import ConfigManager
from pquant_lightning.core.compression_method import CompressionMethod
from pquant_lightning.core.errors import OptionError, a_or_an, known
from pquant_lightning.core.modes import to_eval
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.pipelines._settings import Settings


@dataclass
class Target:
    """What a command works on.

    Attributes:
        model: with its weights, in eval mode.
        data: a datamodule; None where none was named.
        methods: in the order of the configuration; empty where none were named.
        settings: of a YAML with a section `compression`.
    """

    model: nn.Module
    data: Any = None
    methods: list[CompressionMethod] = field(default_factory=list)
    settings: Settings | None = None

    @property
    def example_inputs(self) -> Any:
        """What `forward` takes: the module's own example; None where it has none."""
        return getattr(self.model, "example_input_array", None)

    def fresh_model(self) -> nn.Module:
        """Another model of the same structure, to load a compressed file into."""
        return self._make()

    _make: Any = None


def read_target(options: argparse.Namespace) -> Target:
    """Makes the model, the data and the methods; what is random is the same each time, so that a run can go on.

    The seed is the `seed_everything` of a configuration of `pquant fit`, else 0.

    Raises:
        OptionError: a class cannot be found or made, something is missing, or a YAML is wrong.
    """
    config = {} if options.config is None else ConfigManager.load_config(options.config)
    seed = config.get("seed_everything")
    seed_everything(seed if isinstance(seed, int) and not isinstance(seed, bool) else 0, verbose=False)
    settings = Settings.read(config) if "compression" in config else None
    model_entry = _entry(options.model, options.model_arg, config.get("model"))
    if model_entry is None:
        raise OptionError("No model was named: give --model my_package.MyModule, or a YAML with a section 'model'.")
    data_entry = _entry(options.data, options.data_arg, config.get("data"))
    methods = list(settings.methods) if settings is not None else _methods_of(config)
    if given := getattr(options, "method", None):
        methods = [CompressionMethodRegistry.get(method.name, pairs(method.options)) for method in given]

    def make() -> nn.Module:
        return make_model(model_entry)

    model = make()
    if options.ckpt_path is not None:
        model = load_compressed(model, options.ckpt_path)
    data = None if data_entry is None else _build(data_entry, "data")
    target = Target(to_eval(model), data, methods, settings)
    target._make = make
    return target


def make_model(entry: dict[str, Any]) -> nn.Module:
    """The model of a `{class_path, init_args}`, with the layers that its `configure_model` makes."""
    model = _build(entry, "model")
    if is_a(model, LightningModule):
        model.configure_model()
    if not isinstance(model, nn.Module):
        raise OptionError(f"{entry['class_path']} gives {a_or_an(type(model).__name__)}, which is no torch.nn.Module.")
    return model


def _entry(name: str | None, given: list[str], configured: Any) -> dict[str, Any] | None:
    if name is not None:
        return {"class_path": name, "init_args": pairs(given)}
    if configured is None:
        return None
    if not isinstance(configured, dict) or "class_path" not in configured:
        raise OptionError(f"A section names a class: {{class_path: my_package.MyModule}}, got {configured!r}.")
    return {**configured, "init_args": {**(configured.get("init_args") or {}), **pairs(given)}}


def find_class(path: str) -> Any:
    """The class (or function) of a dotted path; a short name is one of this package.

    Raises:
        OptionError: there is none; the message has the nearest names.
    """
    module_name, _, name = (path if "." in path else f"pquant_lightning.{path}").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise OptionError(
            f"{path!r} cannot be imported: {error}. The directory in which pquant is called is looked at, too."
        ) from error
    if not hasattr(module, name):
        public = [n for n in dir(module) if n[0].isupper()]
        raise OptionError(f"{module_name} has no class {name!r}. {known(name, public)}")
    return getattr(module, name)


def _build(entry: dict[str, Any], what: str) -> Any:
    made = find_class(entry["class_path"])
    arguments = dict(entry.get("init_args") or {})
    accepted = inspect.signature(made).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for name in arguments:
            if name not in accepted:
                raise OptionError(f"{entry['class_path']} has no argument {name!r}. {known(name, accepted)}")
    try:
        return made(**arguments)
    except TypeError as error:
        raise OptionError(
            f"{entry['class_path']} cannot be made from {arguments!r}: {error}. Give --{what}_arg key=value."
        ) from error


def _methods_of(config: dict[str, Any]) -> list[CompressionMethod]:
    """The methods of our callbacks in a YAML of `pquant fit`."""
    trainer = config.get("trainer") or {}
    entries = trainer.get("callbacks") or []
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        path = entry.get("class_path", "") if isinstance(entry, dict) else str(entry)
        made = find_class(path) if "pquant_lightning" in path or "." not in path else None
        if isinstance(made, type) and issubclass(made, _MethodCallback):
            found.append(_build(entry if isinstance(entry, dict) else {"class_path": path}, "model").method)
    return found


def read_json(path: str | Path) -> Any:
    """A JSON file.

    Raises:
        OptionError: it is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise OptionError(f"{path} cannot be read as JSON: {error}") from error
