"""The `pquant` command: what is asked for is understood, or answered with the nearest name, before torch is loaded."""

import importlib
import sys
from pathlib import Path
from typing import Any, NoReturn

from pquant_lightning._arguments import COMMANDS, pairs, parse
from pquant_lightning.core.errors import OptionError, PQuantError, known
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods import BUILT_IN

_LIGHTNING = ("fit", "validate", "test", "predict")

OVERVIEW = """pquant: compress PyTorch Lightning models, while you fine-tune or afterwards.

with a Trainer (LightningCLI; callbacks by short name):
{trainer}
with a model:
{commands}
`pquant COMMAND --help` explains each. Exit codes: 0 done, 1 it could not be done, 2 the command line or the
configuration is wrong, 130 interrupted."""


def overview() -> str:
    """All commands, a line each."""
    trainer = "\n".join(f"  {name}" for name in _LIGHTNING)
    commands = "\n".join(f"  {name:10} {command.help}" for name, command in COMMANDS.items())
    return OVERVIEW.format(trainer=trainer, commands=commands)


def main(args: Any = None) -> None:
    """Runs a command; modules of the working directory are found.

    Args:
        args: the arguments as a list (None: those of the process), or what LightningCLI takes instead.
    """
    sys.path.insert(0, str(Path.cwd()))
    given = sys.argv[1:] if args is None else args
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(given, list) and first in (None, "-h", "--help"):
        sys.stdout.write(overview() + "\n")
        sys.exit(0 if first else 2)
    if isinstance(first, str) and not first.startswith("-") and first not in (*_LIGHTNING, *COMMANDS):
        _stop(f"there is no command {first!r}. {known(first, (*_LIGHTNING, *COMMANDS))}", 2)
    try:
        _run(first, given)
    except KeyboardInterrupt as interruption:
        _stop(str(interruption) or "interrupted.", 130)
    except SystemExit as end:  # Lightning ends the process where it has caught an interruption
        if isinstance(end.__context__, KeyboardInterrupt):
            _stop("interrupted.", 130)
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PQuantError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        _stop(str(cause), 2 if isinstance(cause, OptionError) else 1)


def _stop(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"pquant: {message}\n")
    sys.exit(code)


def _run(first: str | None, given: Any) -> None:
    if first not in COMMANDS or not isinstance(given, list):
        _load().run_trainer_command(given)
        return
    options = parse(first, given[1:])
    if getattr(options, "method", None):  # methods need torch, but neither Lightning nor the user's model
        for module in BUILT_IN.values():
            importlib.import_module(f"pquant_lightning.methods.{module}")
        for method in options.method:
            CompressionMethodRegistry.get(method.name, pairs(method.options))
    _load("_commands").run_command(first, options)


def _load(module: str = "_lightning_cli") -> Any:
    """A module that does the work; all public names are there when it is imported."""
    importlib.import_module("pquant_lightning._public")
    return importlib.import_module(f"pquant_lightning.{module}")
