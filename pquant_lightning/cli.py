"""The `pquant` command: LightningCLI with the compression callbacks at hand by short name, and errors one can read."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from pquant_lightning.core.errors import PQuantError, known


class _CLI(LightningCLI):
    """LightningCLI that answers a typo with the nearest name instead of its full usage."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.error = _exit_explained  # type: ignore[method-assign]
        return parser


def _exit_explained(message: str, *_: Any, **__: Any) -> NoReturn:
    sys.exit(f"pquant: {explain(message)}")


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
    if found := re.search(r"does not accept option 'trainer\.(\w+)'", text):
        names = list(inspect.signature(Trainer).parameters)
        return f"The Trainer has no option {found[1]!r}. {known(found[1], names)}"
    return message


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _subclasses(cls: type[Callback]) -> list[type[Callback]]:
    direct = cls.__subclasses__()
    return [*direct, *(sub for child in direct for sub in _subclasses(child))]


def main(args: ArgsType = None) -> None:
    """Runs `pquant fit|validate|test|predict --config file.yaml`; modules of the working directory are found."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        _CLI(args=args, save_config_kwargs={"overwrite": True})
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PQuantError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        sys.exit(f"pquant: {cause}")
