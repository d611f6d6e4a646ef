"""The commands beside fit, validate, test and predict: one function each, in one table."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from torch import nn

from pquant_lightning._targets import Target, add_target, read_json, read_target
from pquant_lightning.api import compression_report, load_compressed, save_compressed
from pquant_lightning.core.calibration import Samples, bind_batch
from pquant_lightning.core.compression_method import CompressionContext, CompressionMethod, LayerMethod
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.hyperparameters import loading_line
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.plan import CompressionPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import make_report
from pquant_lightning.core.splitting import split_view
from pquant_lightning.core.surgery import get_layer
from pquant_lightning.exporters.export import EXPORTERS, export_model
from pquant_lightning.pipelines.compression_pipeline import CompressionPipeline, PipelineStage
from pquant_lightning.pipelines.evaluation_pipeline import METRICS, EvaluationPipeline
from pquant_lightning.utils.benchmarking import benchmark_models
from pquant_lightning.utils.model_analysis import analyze_model
from pquant_lightning.utils.report_page import NAME, Metric, ReportPage

_PLAN_VERSION = 1


@dataclass(frozen=True)
class Command:
    """A command: its one line in the overview, its arguments, and what it does; it returns text and data to print."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[str, Any]]
    example: str


def run_command(name: str, arguments: list[str]) -> None:
    """Parses the arguments of a command, runs it, and prints what it found; with --json nothing else goes to stdout."""
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
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # progress bars of a Trainer
        text, data = command.run(options)
    sys.stdout.write((json.dumps(data, indent=2) if options.json else text) + "\n")


def _track(items: Iterable[Any], description: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(list(items), description, console=console, transient=True, disable=not console.is_terminal)


def _need_methods(target: Target) -> list[CompressionMethod]:
    if not target.methods:
        raise OptionError(
            "Nothing says how to compress: give --method (and --option key=value), or a YAML with callbacks or a "
            "section `compression`."
        )
    return sorted(target.methods, key=lambda method: method.stage)


def _example(target: Target) -> Any:
    """Inputs of `forward`: a batch of the data, or the module's own example."""
    if target.data is not None:
        batch = Samples.take(target.data, 32).batches[0]
        args, kwargs = bind_batch(target.model, batch)
        return kwargs or args
    return target.example_inputs


# -- plan and compress -------------------------------------------------------------------------------------------------


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, methods=True)
    parser.add_argument("--output", metavar="FILE.json", help="write the plan, to be edited and applied by compress")


def _plan(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    model = share_copy(target.model)  # the weights themselves are shared, only what is made anew takes memory
    entries, texts = [], []
    skipped: list[Skip] = []
    errors: dict[str, float] = {}
    original: nn.Module | None = None
    methods = _need_methods(target)
    for method in methods:
        context = CompressionContext(by=method.name, track=_track, samples=method.samples_of(target.data))
        plan = method.checked_plan(model, context)
        entries.append({"method": method.name, "config": method.config, "plan": json.loads(plan.to_json())})
        texts.append(str(plan))
        skipped += plan.skipped
        outline = _outline(model, method, plan, context) if method is methods[-1] else None
        if outline is not None:
            model = outline
        else:
            in_place = not isinstance(method, LayerMethod)
            original = deep_copy(model) if in_place and method is methods[-1] else None
            method.carry_out(model, plan, context)
        errors.update(context.errors)
    report = make_report(model, original=original, example_inputs=target.example_inputs, errors=errors, skipped=skipped)
    data = {"version": _PLAN_VERSION, "plans": entries, "report": report.to_dict()}
    if options.output is not None:
        Path(options.output).write_text(json.dumps({k: data[k] for k in ("version", "plans")}, indent=2), "utf-8")
        texts.append(f"Written to {options.output}; apply it with: pquant compress --plan {options.output} ...")
    note = "Errors are those of the weights, ||W - W'|| / ||W||, some of them estimated; nothing was changed."
    return "\n\n".join([*texts, str(report), note]), data


def _outline(
    model: nn.Module, method: CompressionMethod, plan: CompressionPlan, context: CompressionContext
) -> nn.Module | None:
    """The planned structure on "meta", its errors in the context, where the method knows them without applying it."""
    if not isinstance(method, LayerMethod):
        return None
    whole = split_view(model)
    for entry in context.track(plan.layers, f"{method.name}: errors"):
        layer = as_torch(get_layer(whole, entry.name))
        error = None if layer is None else method.expected_error(layer, entry, context)
        if error is None:
            return None
        context.errors[entry.name] = error
    outline = share_copy(model, "meta")
    method.apply_structure(outline, plan)
    return outline


def _compress_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, methods=True)
    parser.add_argument("--plan", metavar="FILE.json", help="what `pquant plan --output` has written, edited or not")
    parser.add_argument("--output", default="compressed.safetensors", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--dirpath", metavar="DIR", help="what an interrupted run goes on from")
    parser.add_argument("--budget", metavar="KEY=SHARE", help="one budget over all methods, e.g. size=0.1 or macs=0.5")
    parser.add_argument("--monitor", help="a metric that validation_step logs")
    parser.add_argument("--max_drop", type=float, help="what the metric may lose")
    parser.add_argument("--mode", choices=["max", "min"], default="max", help="which way the metric is better")


def _compress(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    if options.plan is not None:
        model = _apply_plans(target, options.plan)
        report, stages = compression_report(target.fresh_model(), model, target.example_inputs), []
    else:
        result = _pipeline(target, options).run(target.model, target.data, dirpath=options.dirpath)
        model, report = result.model, result.report
        stages = [f"{stage.name}: {', '.join(stage.put_back)} put back" for stage in result.stages if stage.put_back]
    path = save_compressed(model, options.output)
    size = path.stat().st_size
    lines = [
        str(report),
        *stages,
        f"{path}: {size:,} bytes. Load it with",
        f"    {loading_line(model, path)}",
    ]
    return "\n".join(lines), {"path": str(path), "size_bytes": size, "report": report.to_dict()}


def _pipeline(target: Target, options: argparse.Namespace) -> CompressionPipeline:
    methods, settings = _need_methods(target), target.settings
    guard: dict[str, Any] = {"monitor": options.monitor, "max_drop": options.max_drop, "mode": options.mode}
    budget = _budget(options.budget)
    stages = [PipelineStage(methods)]
    if settings is not None and options.method is None:
        training = settings.training
        stages = [PipelineStage(methods, training.epochs, training.lr if training.epochs else None)]
        given = {"monitor": settings.guard.monitor, "max_drop": settings.guard.max_drop, "mode": settings.guard.mode}
        guard = {key: given[key] if guard[key] in (None, "max") else guard[key] for key in guard}
        size = training.batch_size if training.epochs else None
        return CompressionPipeline(
            stages, budget=budget or settings.budget, batch_size=size, metrics=settings.metrics, **guard
        )
    return CompressionPipeline(stages, budget=budget, **guard)


def _budget(given: str | None) -> dict[str, float] | None:
    if given is None:
        return None
    name, _, value = given.partition("=")
    try:
        return {name: float(value)}
    except ValueError as error:
        raise OptionError(f"--budget is given as size=0.1, got {given!r}.") from error


def _apply_plans(target: Target, path: str) -> nn.Module:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("version") != _PLAN_VERSION or "plans" not in data:
        raise OptionError(f"{path} is no plan of this release; write one with pquant plan --output.")
    model = target.model
    for entry in data["plans"]:
        method = CompressionMethodRegistry.get(entry["method"], entry["config"])
        plan = CompressionPlan.from_json(json.dumps(entry["plan"]))
        context = CompressionContext(by=plan.by, track=_track, samples=method.samples_of(target.data))
        method.carry_out(model, plan, context)
    return model


# -- evaluate, analyze, benchmark, report ------------------------------------------------------------------------------


def _compressed_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--compressed", required=True, metavar="FILE", help="the compressed model")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _compressed_arguments(parser)
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help=f"one of {', '.join(METRICS)}, or a name that is logged"
    )


def _evaluate(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    compressed = load_compressed(target.fresh_model(), options.compressed)
    configured = target.settings.metrics if target.settings is not None else ()
    metrics = options.metric or configured or ("accuracy", "compression_ratio", "latency")
    report = EvaluationPipeline(metrics).run(target.model, compressed, target.data)
    return str(report), report.to_dict()


def _analyze_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--sensitivity", action="store_true", help="what each method would cost each layer (slower)")
    parser.add_argument("--no_spectra", action="store_true", help="leave singular values out (faster)")


def _analyze(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    found = analyze_model(
        target.model,
        target.example_inputs,
        loader=target.data,
        spectra=not options.no_spectra,
        methods="all" if options.sensitivity else (),
        track=_track,
    )
    return str(found), found.to_dict()


def _benchmark(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    example = _example(target)
    if example is None:
        raise OptionError("Timing needs inputs: give --data, or set example_input_array in the module.")
    compressed = load_compressed(target.fresh_model(), options.compressed)
    report = benchmark_models({"original": target.model, "compressed": compressed}, example)
    return str(report), report.to_dict()


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--compressed", metavar="FILE", help="the compressed model, beside the original one (--model)")
    parser.add_argument("--run", metavar="DIR", help=f"a run's directory, which holds {NAME}.json")
    parser.add_argument("--output", default=".", metavar="DIR", help="where the page goes; default: here")
    parser.add_argument("--metric", action="append", metavar="NAME", help="measured before and after (--compressed)")


def _report(options: argparse.Namespace) -> tuple[str, Any]:
    if (options.run is None) == (options.compressed is None):
        raise OptionError("pquant report takes --run DIR, or --compressed FILE together with --model and its weights.")
    if options.run is not None:
        page = ReportPage.from_json(json.dumps(read_json(Path(options.run) / f"{NAME}.json")))
    else:
        page = _page(read_target(options), options)
    path = page.write(Path(options.output))
    return f"{page.summary}\n{path}", {"path": str(path), "summary": page.summary, "report": page.report.to_dict()}


def _page(target: Target, options: argparse.Namespace) -> ReportPage:
    compressed = load_compressed(target.fresh_model(), options.compressed)
    report = compression_report(target.model, compressed, target.example_inputs)
    metrics = []
    if options.metric:
        found = EvaluationPipeline(options.metric).run(target.model, compressed, target.data)
        metrics = [Metric(m.name, m.before, m.after, m.unit, True) for m in found.metrics if m.after is not None]
    name = type(target.model).__name__
    load = f"from pquant_lightning import load_compressed\n\nmodel = {loading_line(target.model, options.compressed)}"
    return ReportPage(name, report, metrics, commands={"Load it": load})


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--compressed", metavar="FILE", help="the compressed model; without it that of --ckpt_path")
    parser.add_argument("--format", choices=list(EXPORTERS), default="onnx", help="default: %(default)s")
    parser.add_argument("--output", required=True, metavar="PATH", help="a file; a directory for some formats")
    parser.add_argument("--dynamic_axes", metavar="YAML", help="e.g. '{input_ids: {0: batch, 1: tokens}}'")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--no_verify", action="store_true", help="do not open the file again and compare")


def _export(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    example = _example(target)
    if example is None:
        raise OptionError("A trace needs inputs: give --data, or set example_input_array in the module.")
    compressed = options.compressed
    model = target.model if compressed is None else load_compressed(target.fresh_model(), compressed)
    axes = None if options.dynamic_axes is None else yaml.safe_load(options.dynamic_axes)
    how = {"dynamic_axes": axes, "verify": not options.no_verify, "overwrite": options.overwrite}
    result = export_model(model, example, options.output, options.format, **how)
    return str(result), {**asdict(result), "path": str(result.path)}


COMMANDS: dict[str, Command] = {
    "plan": Command(
        "Dry run: what would happen to each layer, how large it would be, what it would lose, and what is left alone.",
        _plan_arguments,
        _plan,
        "pquant plan --model my_package.MyModule --ckpt_path dense.ckpt --method low_rank --option rank=8",
    ),
    "compress": Command(
        "Compress a model and write it: by methods, by a plan, by a configuration, or by one budget over all methods.",
        _compress_arguments,
        _compress,
        "pquant compress --config c.yaml --model my_package.MyModule --ckpt_path dense.ckpt --data my_package.Data",
    ),
    "evaluate": Command(
        "Measure a compressed model against the original: metric, size, speed, memory, output error.",
        _evaluate_arguments,
        _evaluate,
        "pquant evaluate --model my_package.MyModule --ckpt_path dense.ckpt --compressed compressed.safetensors "
        "--data my_package.Data --metric accuracy --metric latency",
    ),
    "analyze": Command(
        "What a model is made of, layer by layer, and what to compress first.",
        _analyze_arguments,
        _analyze,
        "pquant analyze --model my_package.MyModule --ckpt_path dense.ckpt --sensitivity",
    ),
    "benchmark": Command(
        "Time a compressed model against the original, in turns, on the same inputs.",
        _compressed_arguments,
        _benchmark,
        "pquant benchmark --model my_package.MyModule --compressed compressed.safetensors --data my_package.Data",
    ),
    "report": Command(
        "Make the page about a compression (HTML, Markdown, JSON), of a run or of a file.",
        _report_arguments,
        _report,
        "pquant report --run lightning_logs/version_0 --output page",
    ),
    "export": Command(
        "Write a model for another runtime: ONNX, TensorFlow, LiteRT, JAX, torch.export, safetensors, PEFT.",
        _export_arguments,
        _export,
        "pquant export --model my_package.MyModule --compressed compressed.safetensors --data my_package.Data "
        "--format onnx --output model.onnx",
    ),
}
