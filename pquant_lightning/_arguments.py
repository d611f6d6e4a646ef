"""The command line of `pquant`, command by command: what may be given, checked without loading torch."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pquant_lightning.core.errors import OptionError, known
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.exporters.formats import DEFAULT, ENDINGS, choose_format
from pquant_lightning.methods import BUILT_IN
from pquant_lightning.pipelines.metrics import METRICS

PAGE_ENDINGS = (".html", ".md", ".json")
"""What `pquant report --output` may end in to name one file."""


class GivenMethod(NamedTuple):
    """A `--method` and the `--option`s that follow it, as `key=value`."""

    name: str
    options: list[str]


@dataclass(frozen=True)
class Command:
    """A command: its one line in the overview, its arguments, what is checked of them at once, and an example."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    example: str
    check: Callable[[argparse.Namespace], None] = lambda options: None


def parse(name: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments of a command; a mistake in them ends the process with exit code 2.

    Raises:
        OptionError: arguments that do not go together.
    """
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        f"pquant {name}",
        description=command.help,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = set(re.findall(r"--\w+", parser.format_help()))
        given = unknown[0].partition("=")[0]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {known(given, flags)}")
    command.check(options)
    return options


# -- what several commands take ----------------------------------------------------------------------------------------

_HELP = {
    "config": "a YAML: of `pquant fit` (model, data, trainer.callbacks), or with a section `compression`",
    "model": "class of the model, e.g. my_package.MyModule",
    "model_arg": "an argument of the model, e.g. width=32; may be repeated",
    "ckpt_path": "its weights: .ckpt, .safetensors or .pt",
    "data": "class of the LightningDataModule",
    "data_arg": "an argument of the datamodule; may be repeated",
    "option": "an option of the --method before it, e.g. rank=8; may be repeated",
}


def method_names() -> list[str]:
    """The registry names of the methods that are installed."""
    return list(dict.fromkeys([*BUILT_IN, *CompressionMethodRegistry.list_available()]))


class _AddMethod(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values not in method_names():
            parser.error(f"there is no method {values!r}. {known(values, method_names())}")
        namespace.method = [*(namespace.method or []), GivenMethod(values, [])]


class _AddOption(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if not namespace.method:
            parser.error(f"--option {values} goes with the --method before it: name that method first")
        namespace.method[-1].options.append(values)


def add_target(parser: argparse.ArgumentParser, methods: bool = False) -> None:
    """The arguments by which commands name what they work on."""
    group = parser.add_argument_group("what to work on")
    for name in ("config", "model", "ckpt_path", "data"):
        group.add_argument(f"--{name}", metavar=name.split("_")[0].upper(), help=_HELP[name])
    for name in ("model_arg", "data_arg"):
        group.add_argument(f"--{name}", action="append", default=[], metavar="KEY=VALUE", help=_HELP[name])
    if methods:
        group = parser.add_argument_group("how to compress (or in the YAML)")
        text = f"what to compress with, may be repeated: {', '.join(method_names())}"
        group.add_argument("--method", action=_AddMethod, metavar="NAME", help=text)
        group.add_argument("--option", action=_AddOption, metavar="KEY=VALUE", help=_HELP["option"])


def pairs(given: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments, the values as YAML reads them.

    Raises:
        OptionError: one is not of that form.

    >>> pairs(["rank=8", "include=[fc*]"])
    {'rank': 8, 'include': ['fc*']}
    """
    found = {}
    for pair in given:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise OptionError(f"An argument is given as key=value, got {pair!r}.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"The value in {pair!r} is no YAML: {' '.join(str(error).split())}.") from error
    return found


def _check_target(options: argparse.Namespace) -> None:
    if options.model is None and options.config is None:
        raise OptionError("No model was named: give --model my_package.MyModule, or a YAML with a section 'model'.")
    for path, flag in ((options.config, "--config"), (options.ckpt_path, "--ckpt_path")):
        if path is not None and not Path(path).exists():
            raise OptionError(f"{flag} {path} cannot be read: there is no such file.")
    for given in (options.model_arg, options.data_arg):
        pairs(given)


# -- the commands ------------------------------------------------------------------------------------------------------


def _plan(parser: argparse.ArgumentParser) -> None:
    add_target(parser, methods=True)
    parser.add_argument("--output", metavar="FILE.json", help="write the plan, to be edited and applied by compress")


def _compress(parser: argparse.ArgumentParser) -> None:
    add_target(parser, methods=True)
    parser.add_argument("--plan", metavar="FILE.json", help="what `pquant plan --output` has written, edited or not")
    parser.add_argument("--output", default="compressed.safetensors", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--dirpath", metavar="DIR", help="what an interrupted run goes on from")
    parser.add_argument("--budget", metavar="KEY=SHARE", help="one budget over all methods, e.g. size=0.1 or macs=0.5")
    parser.add_argument("--monitor", help="a metric that validation_step logs")
    parser.add_argument("--max_drop", type=float, help="what the metric may lose")
    parser.add_argument("--mode", choices=["max", "min"], default="max", help="which way the metric is better")


def _check_methods(options: argparse.Namespace) -> None:
    _check_target(options)
    for method in options.method or []:
        pairs(method.options)


def _check_compress(options: argparse.Namespace) -> None:
    _check_methods(options)
    if Path(options.output).suffix not in ("", ".safetensors", ".pt"):  # said before the work is done, not after it
        raise OptionError(
            f"--output {options.output}: compress writes .safetensors, .pt or a directory; pquant export writes other "
            "formats from such a file."
        )
    parse_budget(options.budget)
    if options.plan is not None and not Path(options.plan).exists():
        raise OptionError(f"--plan {options.plan} cannot be read: there is no such file.")


def parse_budget(given: str | None) -> dict[str, float] | None:
    """A `--budget`, such as `size=0.1`.

    Raises:
        OptionError: it is not of that form.
    """
    if given is None:
        return None
    name, _, value = given.partition("=")
    try:
        return {name: float(value)}
    except ValueError as error:
        raise OptionError(f"--budget is given as size=0.1, got {given!r}.") from error


def _compressed(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--compressed", required=True, metavar="FILE", help="the compressed model")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _compressed(parser)
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help=f"one of {', '.join(METRICS)}, or a name that is logged"
    )


def _check_compressed(options: argparse.Namespace) -> None:
    _check_target(options)
    if options.compressed is not None and not Path(options.compressed).exists():
        raise OptionError(f"--compressed {options.compressed} cannot be read: there is no such file.")


def _analyze(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    text = "what every method would cost each layer, not only the two quickest (slower)"
    parser.add_argument("--sensitivity", action="store_true", help=text)
    parser.add_argument("--no_spectra", action="store_true", help="leave singular values out (faster)")


def _report(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--compressed", metavar="FILE", help="the compressed model, beside the original one (--model)")
    parser.add_argument("--run", metavar="DIR", help="a run's directory, which holds compression_report.json")
    text = "a directory for the page in all forms (default: here), or one file that ends in .html, .md or .json"
    parser.add_argument("--output", default=".", metavar="PATH", help=text)
    parser.add_argument("--metric", action="append", metavar="NAME", help="measured before and after (--compressed)")


def _check_report(options: argparse.Namespace) -> None:
    if (options.run is None) == (options.compressed is None):
        raise OptionError("pquant report takes --run DIR, or --compressed FILE together with --model and its weights.")
    if (ending := Path(options.output).suffix) and ending not in PAGE_ENDINGS and not Path(options.output).is_dir():
        raise OptionError(
            f"--output {options.output} ends in {ending!r}: a page is a file that ends in {', '.join(PAGE_ENDINGS)}, "
            "or a directory, whose name has no ending."
        )
    if options.run is None:
        _check_compressed(options)


def _export(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--compressed", metavar="FILE", help="the compressed model; without it that of --ckpt_path")
    text = f"{', '.join(ENDINGS)}, or a runtime such as litert; default: by the ending of --output, else {DEFAULT}"
    parser.add_argument("--format", metavar="NAME", help=text)
    parser.add_argument("--output", required=True, metavar="PATH", help="a file; a directory for some formats")
    parser.add_argument("--dynamic_axes", metavar="YAML", help="e.g. '{input_ids: {0: batch, 1: tokens}}'")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--target", metavar="NAME", help="processors that an ONNX file is for: any (default), or vnni")
    text = "of ONNX's few-bit products: 4 (default) rounds their inputs, 0 does not"
    parser.add_argument("--accuracy_level", type=int, metavar="N", help=text)
    parser.add_argument("--no_verify", action="store_true", help="do not open the file again and compare")


def _check_export(options: argparse.Namespace) -> None:
    choose_format(options.output, options.format)
    _check_compressed(options)


COMMANDS: dict[str, Command] = {
    "plan": Command(
        "Dry run: what would happen to each layer, how large it would be, what it would lose, and what is left alone.",
        _plan,
        "pquant plan --model my_package.MyModule --ckpt_path dense.ckpt --method low_rank --option rank=8",
        _check_methods,
    ),
    "compress": Command(
        "Compress a model and write it: by methods, by a plan, by a configuration, or by one budget over all methods.",
        _compress,
        "pquant compress --model my_package.MyModule --ckpt_path dense.ckpt --data my_package.Data "
        "--method low_rank --option rank=8 --method ptq --option bits=4",
        _check_compress,
    ),
    "evaluate": Command(
        "Measure a compressed model against the original: metric, size, speed, memory, output error.",
        _evaluate,
        "pquant evaluate --model my_package.MyModule --ckpt_path dense.ckpt --compressed compressed.safetensors "
        "--data my_package.Data --metric accuracy --metric latency",
        _check_compressed,
    ),
    "analyze": Command(
        "What a model is made of, layer by layer, and what to compress first.",
        _analyze,
        "pquant analyze --model my_package.MyModule --ckpt_path dense.ckpt",
        _check_target,
    ),
    "benchmark": Command(
        "Time a compressed model against the original, in turns, on the same inputs.",
        _compressed,
        "pquant benchmark --model my_package.MyModule --compressed compressed.safetensors --data my_package.Data",
        _check_compressed,
    ),
    "report": Command(
        "Make the page about a compression (HTML, Markdown, JSON), of a run or of a file.",
        _report,
        "pquant report --run lightning_logs/version_0 --output page.html",
        _check_report,
    ),
    "export": Command(
        "Write a model for another runtime: ONNX, TensorFlow, LiteRT, JAX, torch.export, safetensors, PEFT.",
        _export,
        "pquant export --model my_package.MyModule --compressed compressed.safetensors --data my_package.Data "
        "--output model.onnx",
        _check_export,
    ),
}
