"""`pquant fit`, `validate`, `test` and `predict`: LightningCLI with compression callbacks by short name."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from pquant_lightning.api import load_compressed
from pquant_lightning.core.compressed_layer import install_hook
from pquant_lightning.core.errors import known
from pquant_lightning.core.serialization import read_checkpoint


def run_trainer_command(args: ArgsType) -> None:
    """Runs a command of LightningCLI; a mistake in the command line ends the process with exit code 2."""
    CompressionCLI(args=args, save_config_kwargs={"overwrite": True})


class CompressionCLI(LightningCLI):
    """LightningCLI that answers a typo with the nearest name, and that loads compressed files in every command."""

    _held: Any = None  # a --ckpt_path whose hyperparameters Lightning cannot read

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        path = settings.get("ckpt_path")
        if path is not None and Path(path).is_file() and not _names_its_class(Path(path)):
            self._held, settings["ckpt_path"] = path, None

    def before_instantiate_classes(self) -> None:
        if self._held is not None:
            self.config[self.config["subcommand"]]["ckpt_path"] = self._held

    def _prepare_model(self) -> None:
        """A compressed checkpoint rebuilds its layers also where no callback of ours is in the list."""
        install_hook(self.model)
        settings = self.config_init[self.config_init["subcommand"]]
        path = settings.get("ckpt_path")
        if path is not None and str(path).endswith(".safetensors"):  # an artefact, which is no Lightning checkpoint
            load_compressed(self.model, path)
            settings["ckpt_path"] = None

    before_validate = before_test = before_predict = _prepare_model

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.error = _exit_explained  # type: ignore[method-assign]
        return parser


def _names_its_class(path: Path) -> bool:
    """Whether a checkpoint was written by LightningCLI: its hyperparameters then say which class they are of."""
    return path.suffix != ".safetensors" and "_class_path" in read_checkpoint(path).get("hyper_parameters", {})


def _exit_explained(message: str, *_: Any, **__: Any) -> NoReturn:
    sys.stderr.write(f"pquant: {explain(message)}\n")
    sys.exit(2)


def explain(message: str) -> str:
    """The cause inside a parser's message: which class or option, what was given, the names there are.

    >>> explain("... class_path 'pquant_lightning.QATCallback': Option 'bit' is not accepted").split(" Known")[0]
    "QATCallback has no option 'bit'. Did you mean 'bits'?"
    """
    text = " ".join(message.split())
    if found := re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text):
        owner = _import(found[1])
        return f"{owner.__name__} has no option {found[2]!r}. {known(found[2], inspect.signature(owner).parameters)}"
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        names = [name for name in dir(importlib.import_module(found[1])) if name[0].isupper()]
        return f"{found[1]} has no class {found[2]!r}. {known(found[2], names)}"
    if found := re.search(r"class_path '([\w.]+)': Parser key \"([\w.]+)\": (.*?Got value: [^-]*)", text):
        return f"{found[1].rpartition('.')[2]}, option {found[2]}: {found[3].strip()}"
    if found := re.search(r"Expected a dot import path string: (\w+)", text):
        names = [cls.__name__ for cls in _subclasses(Callback) if not cls.__name__.startswith("_")]
        return f"There is no class {found[1]!r}. {known(found[1], names)}"
    if found := re.search(r"(?:does not accept option '|unrecognized arguments: --)trainer\.(\w+)", text):
        names = list(inspect.signature(Trainer).parameters)
        return f"The Trainer has no option {found[1]!r}. {known(found[1], names)}"
    return message


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _subclasses(cls: type[Callback]) -> list[type[Callback]]:
    direct = cls.__subclasses__()
    return [*direct, *(sub for child in direct for sub in _subclasses(child))]
