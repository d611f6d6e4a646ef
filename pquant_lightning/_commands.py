"""What the commands beside fit, validate, test and predict do: one function each, in one table."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from torch import nn

from pquant_lightning._arguments import PAGE_ENDINGS, parse_budget
from pquant_lightning._targets import Target, read_json, read_target
from pquant_lightning.api import compression_report, finalize, load_compressed, save_compressed
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
from pquant_lightning.core.serialization import file_bytes
from pquant_lightning.core.splitting import split_view
from pquant_lightning.core.surgery import get_layer
from pquant_lightning.exporters.export import export_model
from pquant_lightning.pipelines.compression_pipeline import CompressionPipeline, PipelineStage
from pquant_lightning.pipelines.evaluation_pipeline import EvaluationPipeline
from pquant_lightning.utils.benchmarking import benchmark_models
from pquant_lightning.utils.layer_timing import layer_table, time_layers
from pquant_lightning.utils.model_analysis import analyze_model
from pquant_lightning.utils.report_page import NAME, Metric, ReportPage

_PLAN_VERSION = 1
_QUICK = ("low_rank", "ptq")  # methods whose offers cost about as much as the singular values


def run_command(name: str, options: argparse.Namespace) -> None:
    """Runs a command and prints what it found; with --json nothing else goes to stdout."""
    with contextlib.redirect_stdout(sys.stderr):  # progress bars of a Trainer
        text, data = _RUN[name](options)
    sys.stdout.write((json.dumps(data, indent=2) if options.json else text) + "\n")


def _track(items: Iterable[Any], description: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(list(items), description, console=console, transient=True, disable=not console.is_terminal)


def _need_methods(target: Target) -> list[CompressionMethod]:
    if not target.methods:
        raise OptionError(
            "Nothing says how to compress: give --method (and --option key=value), or a YAML with callbacks or a "
            "section `compression`; compress also takes --budget or --plan."
        )
    return sorted(target.methods, key=lambda method: method.stage)


def _example(target: Target, own_first: bool = False) -> Any:
    """Inputs of `forward`: a batch of the data, or the module's own example; None where there are neither."""
    if target.data is not None and not (own_first and target.example_inputs is not None):
        batch = Samples.take(target.data, 32).batches[0]
        args, kwargs = bind_batch(target.model, batch)
        return kwargs or args
    return target.example_inputs


# -- plan and compress -------------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    methods = _need_methods(target)
    model = share_copy(target.model)  # the weights themselves are shared, only what is made anew takes memory
    original: nn.Module | None = None
    entries, texts = [], []
    skipped: list[Skip] = []
    errors: dict[str, float] = {}
    for method in methods:
        context = CompressionContext(by=method.name, track=_track, samples=method.samples_of(target.data, model))
        plan = method.checked_plan(model, context)
        entries.append({"method": method.name, "config": method.config, "plan": json.loads(plan.to_json())})
        texts.append(str(plan))
        skipped += plan.skipped
        outline = _outline(model, method, plan, context) if len(methods) == 1 else None
        if outline is None:  # applied to a copy, and compared with what was there
            if original is None:
                original, model = model, deep_copy(model)
            method.carry_out(model, plan, context)
        else:
            model, errors = outline, context.errors
    report = make_report(
        model, original=original, example_inputs=_example(target, own_first=True), errors=errors, skipped=skipped
    )
    data = {"version": _PLAN_VERSION, "plans": entries, "report": report.to_dict()}
    if options.output is not None:
        Path(options.output).write_text(json.dumps({k: data[k] for k in ("version", "plans")}, indent=2), "utf-8")
        texts.append(f"Written to {options.output}; apply it with: pquant compress --plan {options.output} ...")
    about = ", estimated without applying the plan" if original is None else ""
    note = f"Weight errors are ||W - W'|| / ||W||{about}. This was a dry run: the model is as it was."
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


def _compress(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    stages: list[str] = []
    if options.plan is not None:
        original = deep_copy(target.model)
        model = _apply_plans(target, options.plan)
        report = make_report(model, original=original, example_inputs=_example(target, own_first=True))
    else:
        try:
            pipeline = _pipeline(target, options)
            pipeline.shows_report = False  # it is printed here
            result = pipeline.run(target.model, target.data, dirpath=options.dirpath)
        except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the one into the other
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            raise KeyboardInterrupt(_how_to_go_on(options)) from None
        model, report = result.model, result.report
        stages = [
            f"{stage.name}: {', '.join(stage.put_back)} left alone for max_drop"
            for stage in result.stages
            if stage.put_back
        ]
    path = save_compressed(model, options.output)
    size = path.stat().st_size
    report = replace(report, file_bytes=(file_bytes(target.fresh_model()), size))
    lines = [
        str(report),
        *stages,
        f"{path}: {size:,} bytes. Load it with",
        f"    {loading_line(model, path)}",
    ]
    return "\n".join(lines), {"path": str(path), "size_bytes": size, "report": report.to_dict()}


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.dirpath is None:
        return (
            "interrupted, and nothing was written. With --dirpath DIR the same command keeps what is done after each "
            "stage and each epoch of a training, and goes on from there."
        )
    return (
        f"interrupted. {options.dirpath} holds what was done up to the last finished stage or epoch: give the same "
        "command again, and it goes on from there."
    )


def _pipeline(target: Target, options: argparse.Namespace) -> CompressionPipeline:
    settings = target.settings
    guard: dict[str, Any] = {"monitor": options.monitor, "max_drop": options.max_drop, "mode": options.mode}
    budget = parse_budget(options.budget)
    if budget is not None and not target.methods:
        return CompressionPipeline(budget=budget, **guard)
    methods = _need_methods(target)
    if trained := [m.name for m in methods if m.trains and (settings is None or not settings.training.epochs)]:
        raise OptionError(
            f"{trained[0]} must be trained: give a YAML with a section `training: {{epochs: ...}}` and --data, or use "
            "pquant fit with its callback."
        )
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


def _apply_plans(target: Target, path: str) -> nn.Module:
    data = read_json(path)
    if not isinstance(data, dict) or data.get("version") != _PLAN_VERSION or "plans" not in data:
        raise OptionError(f"{path} is no plan of this release; write one with pquant plan --output.")
    model = target.model
    for entry in data["plans"]:
        method = CompressionMethodRegistry.get(entry["method"], entry["config"])
        plan = CompressionPlan.from_json(json.dumps(entry["plan"]))
        context = CompressionContext(by=plan.by, track=_track, samples=method.samples_of(target.data, model))
        method.carry_out(model, plan, context)
    return model


# -- evaluate, analyze, benchmark, report ------------------------------------------------------------------------------


def _evaluate(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    compressed = load_compressed(target.fresh_model(), options.compressed)
    configured = target.settings.metrics if target.settings is not None else ()
    metrics = options.metric or configured
    pipeline = EvaluationPipeline(metrics) if metrics else EvaluationPipeline()
    report = pipeline.run(target.model, compressed, target.data)
    return str(report), report.to_dict()


def _analyze(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    found = analyze_model(
        target.model,
        target.example_inputs,
        loader=target.data,
        spectra=not options.no_spectra,
        methods="all" if options.sensitivity else _QUICK,
        track=_track,
    )
    return str(found), found.to_dict()


def _benchmark(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    example = _example(target)
    if example is None:
        raise OptionError("Timing needs inputs: give --data, or set example_input_array in the module.")
    compressed = finalize(load_compressed(target.fresh_model(), options.compressed), inplace=True)
    report = benchmark_models({"original": target.model, "compressed": compressed}, example)
    layers = time_layers(target.model, compressed, example)
    text = f"{report}\n{layer_table(layers)}" if layers else str(report)
    return text, {**report.to_dict(), "layers": [asdict(layer) for layer in layers]}


def _report(options: argparse.Namespace) -> tuple[str, Any]:
    if options.run is not None:
        page = ReportPage.from_json(json.dumps(read_json(Path(options.run) / f"{NAME}.json")))
    else:
        page = _page(read_target(options), options)
    place = Path(options.output)
    one_file = place.suffix in PAGE_ENDINGS and not place.is_dir()
    path = page.write_file(place) if one_file else page.write(place)
    return f"{page.summary}\n{path}", {"path": str(path), "summary": page.summary, "report": page.report.to_dict()}


def _page(target: Target, options: argparse.Namespace) -> ReportPage:
    compressed = load_compressed(target.fresh_model(), options.compressed)
    example = _example(target, own_first=True)
    report = compression_report(target.model, compressed, example, timed=example is not None)
    metrics = []
    if options.metric:
        found = EvaluationPipeline(options.metric).run(target.model, compressed, target.data)
        metrics = [Metric(m.name, m.before, m.after, m.unit, True) for m in found.metrics if m.after is not None]
    name = type(target.model).__name__
    load = f"from pquant_lightning import load_compressed\n\nmodel = {loading_line(target.model, options.compressed)}"
    return ReportPage(name, report, metrics, commands={"Load it": load})


def _export(options: argparse.Namespace) -> tuple[str, Any]:
    target = read_target(options)
    example = _example(target)
    if example is None:
        raise OptionError("A trace needs inputs: give --data, or set example_input_array in the module.")
    compressed = options.compressed
    model = target.model if compressed is None else load_compressed(target.fresh_model(), compressed)
    axes = None if options.dynamic_axes is None else yaml.safe_load(options.dynamic_axes)
    how = {"dynamic_axes": axes, "verify": not options.no_verify, "overwrite": options.overwrite}
    how |= {"target": options.target, "accuracy_level": options.accuracy_level}
    result = export_model(model, example, options.output, options.format, **how)
    return str(result), {**asdict(result), "path": str(result.path)}


_RUN: dict[str, Callable[[argparse.Namespace], tuple[str, Any]]] = {
    "plan": _plan,
    "compress": _compress,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "benchmark": _benchmark,
    "report": _report,
    "export": _export,
}
