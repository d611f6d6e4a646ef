"""Plots of models before and after compression, as matplotlib figures and as SVG for pages in light and dark mode."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.errors import OptionError, PQuantError
from pquant_lightning.core.report import CompressionReport, folded_factor
from pquant_lightning.utils.model_analysis import ModelAnalysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart by colour-blind readers, in an order that is readable on black and on white."""

WIDTH = 4.5
"""Inches; with text of 9 points a figure stays readable on a phone, 360 pixels wide."""

_MARKERS = "osD^vP"
_INK = "#010203"  # a colour nobody chooses: in the SVG it becomes currentColor
_MOST_CELLS = 256  # rows and columns of a sparsity map


@dataclass(frozen=True)
class SizePoint:
    """One model in a plot of size against quality.

    Attributes:
        label: what it is.
        size_bytes: of the file.
        quality: larger is better.
        group: points of a group have one colour and marker.
    """

    label: str
    size_bytes: float
    quality: float
    group: str = ""


def _figure(height: float, rows: int = 1) -> tuple["Figure", list[Any]]:
    """An empty figure that no global state knows, with its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PQuantError(
            "Plots need matplotlib, which is not installed: pip install 'pquant-lightning[plot]'"
        ) from error
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        for spine in axis.spines.values():
            spine.set_color(_INK)
        axis.tick_params(which="both", colors=_INK, labelsize=8)
        axis.grid(color=_INK, alpha=0.15, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, color=_INK, loc="left")
    axis.set_xlabel(x, fontsize=9, color=_INK)
    axis.set_ylabel(y, fontsize=9, color=_INK)


def plot_spectra(analysis: ModelAnalysis, layers: Sequence[str] | None = None) -> "Figure":
    """Singular values by rank, both as shares, for the layers with the most bytes (six at most), or those named.

    Raises:
        OptionError: no such layer has a spectrum.
    """
    known = {layer.name: layer for layer in analysis.layers if layer.spectrum is not None}
    largest = sorted(known, key=lambda name: -known[name].size_bytes)[: len(COLOURS)]
    chosen = largest if layers is None else [name for name in layers if name in known]
    if not chosen:
        raise OptionError("There is no spectrum to plot: give analyze_model(model, spectra=True) and a layer's name.")
    figure, (axis,) = _figure(3.4)
    for place, name in enumerate(chosen):
        spectrum = known[name].spectrum
        assert spectrum is not None
        values, count = spectrum.singular_values, len(spectrum.singular_values)
        ranks = [100 * (i + 1) / count for i in range(count)]
        label = f"{_short(name)} (effective rank {spectrum.effective_rank:.0f} of {count})"
        top = max(values[0], 1e-30)
        style = ("-", "--", ":")[place // 2 % 3]
        axis.plot(ranks, [v / top for v in values], style, color=_colour(place), linewidth=1.6, label=label)
    _label(axis, "Singular values", "rank, % of the full rank", "value / largest value")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, 100)
    _below(figure, axis)
    return figure


def plot_weight_histograms(original: nn.Module, compressed: nn.Module, layers: Sequence[str]) -> "Figure":
    """Weights of layers before and after, one panel per layer; a compressed layer by the weight that it stands for.

    Where a batch norm is folded into the compressed layer, it is into the weight before, too.

    Args:
        original: the uncompressed model.
        compressed: training form or deployed form.
        layers: names of layers that both models have.

    Raises:
        OptionError: no layer is named.
    """
    if not layers:
        raise OptionError("plot_weight_histograms takes the names of at least one layer.")
    figure, axes = _figure(0.6 + 1.7 * len(layers), len(layers))
    for axis, name in zip(axes, layers, strict=True):
        pair = [weight_of(model.get_submodule(name)).detach().float().cpu() for model in (original, compressed)]
        if (factor := folded_factor(original, compressed, name)) is not None:
            pair[0] = pair[0] * factor.float().cpu()
        low, high = (float(f(*(getattr(w, e)() for w in pair))) for f, e in ((min, "min"), (max, "max")))
        high = high if high > low else low + 1e-6
        edges = torch.linspace(low, high, 61)
        middles = ((edges[1:] + edges[:-1]) / 2).tolist()
        for place, (weight, label) in enumerate(zip(pair, ("before", "after"), strict=True)):
            share = torch.histc(weight, 60, low, high) / weight.numel() * 100
            line = ("-", "--")[place]
            axis.step(middles, share.tolist(), line, where="mid", color=_colour(place), linewidth=1.4, label=label)
        axis.set_yscale("log")
        _label(axis, _short(name), "", "% of weights")
    axes[-1].set_xlabel("weight", fontsize=9, color=_INK)
    _below(figure, axes[0])
    return figure


def plot_sparsity(weight: Tensor, name: str = "weight") -> "Figure":
    """Where a weight `(rows, ...)` is zero: share of zeros in each cell of a map with at most 256 x 256 cells."""
    matrix = (weight.detach().flatten(1) if weight.dim() > 1 else weight.detach()[None]).cpu()
    zeros = (matrix == 0).float()[None, None]
    rows, columns = (min(size, _MOST_CELLS) for size in matrix.shape)
    cells = torch.nn.functional.adaptive_avg_pool2d(zeros, (rows, columns))[0, 0]
    figure, (axis,) = _figure(3.2)
    extent = (0, matrix.shape[1], matrix.shape[0], 0)
    image = axis.imshow(100 * cells.numpy(), cmap="cividis", vmin=0, vmax=100, extent=extent, aspect="auto")
    image.set_interpolation("nearest")
    axis.grid(visible=False)
    total = float(zeros.mean())
    _label(axis, f"{_short(name)}: {total:.1%} zeros", "input (all other dimensions)", "output (first dimension)")
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("zeros in the cell, %", fontsize=9, color=_INK)
    bar.ax.tick_params(colors=_INK, labelsize=8)
    bar.outline.set_edgecolor(_INK)
    return figure


def plot_sensitivity(analysis: ModelAnalysis, most: int = 20) -> "Figure":
    """Loss of each layer by each method, with `analysis.share` of its bytes; the layers with the most bytes on top.

    Args:
        analysis: with offers of methods (`analyze_model(model, methods=...)`).
        most: layers that are shown.

    Raises:
        OptionError: no method makes an offer.
    """
    rows = [layer for layer in analysis.layers if any(layer.best(m, analysis.share) for m in analysis.methods)]
    rows = sorted(rows, key=lambda layer: -layer.size_bytes)[:most]
    if not rows:
        raise OptionError('No method offers anything to plot: give analyze_model(model, methods="all").')
    figure, (axis,) = _figure(1.6 + 0.26 * len(rows))
    for place, method in enumerate(analysis.methods):
        found = [(i, best.loss) for i, r in enumerate(rows) if (best := r.best(method, analysis.share)) is not None]
        positions, losses = [i for i, _ in found], [max(loss, 1e-9) for _, loss in found]
        marker = _MARKERS[place % len(_MARKERS)]
        axis.plot(losses, positions, marker, color=_colour(place), markersize=6, label=method)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    _label(axis, f"Loss with {analysis.share:.0%} of the bytes", "squared relative error of the weight", "")
    _below(figure, axis)
    return figure


def pareto_front(points: Sequence[SizePoint]) -> list[SizePoint]:
    """The points that no other one beats: none is at most as large and at least as good, and better in one of both.

    >>> points = [SizePoint("a", 10, 0.9), SizePoint("b", 20, 0.9), SizePoint("c", 30, 0.95)]
    >>> [point.label for point in pareto_front(points)]
    ['a', 'c']
    """
    front: list[SizePoint] = []
    for point in sorted(points, key=lambda p: (p.size_bytes, -p.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front


def plot_size_against_quality(points: Sequence[SizePoint], quality: str = "accuracy") -> "Figure":
    """Models by bytes (logarithmic) and quality; the Pareto front is a line, and its points carry their labels.

    Raises:
        OptionError: there is no point.
    """
    if not points:
        raise OptionError("plot_size_against_quality takes at least one point.")
    figure, (axis,) = _figure(3.4)
    from matplotlib.ticker import LogLocator, NullLocator

    front = pareto_front(points)
    sizes = [point.size_bytes / 1e3 for point in front]
    best = [point.quality for point in front]
    axis.plot(sizes, best, color=_INK, alpha=0.5, linewidth=1.2, label="Pareto front", drawstyle="steps-post")
    for place, group in enumerate(dict.fromkeys(point.group for point in points)):
        own = [point for point in points if point.group == group]
        marker = _MARKERS[place % len(_MARKERS)]
        xs, ys = [p.size_bytes / 1e3 for p in own], [p.quality for p in own]
        axis.plot(xs, ys, marker, color=_colour(place), markersize=6, label=group or None)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(0.12, 0.15)
    middle = (min(p.size_bytes for p in points) * max(p.size_bytes for p in points)) ** 0.5
    for point in front:
        right = point.size_bytes > middle  # of the plot: its label is written to the left
        axis.annotate(
            point.label,
            (point.size_bytes / 1e3, point.quality),
            xytext=(-6 if right else 6, 5),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8,
            color=_INK,
        )
    _label(axis, f"Size against {quality}", "size, kB (logarithmic)", quality)
    _below(figure, axis)
    return figure


def plot_layer_sizes(report: CompressionReport, most: int = 20) -> "Figure":
    """Stored bytes of the compressed layers, before and after, one pair of bars each, the largest on top.

    Args:
        report: of a compression.
        most: layers that are shown.

    Raises:
        OptionError: no layer was compressed.
    """
    rows = sorted(report.layers, key=lambda layer: -layer.size_bytes[0])[:most]
    if not rows:
        raise OptionError("plot_layer_sizes takes a report with at least one compressed layer.")
    figure, (axis,) = _figure(1.4 + 0.34 * len(rows))
    for shift, which, colour, label in ((-0.2, 0, 5, "before"), (0.2, 1, 0, "after")):
        sizes = [row.size_bytes[which] / 1e3 for row in rows]
        axis.barh([i + shift for i in range(len(rows))], sizes, 0.38, color=_colour(colour), label=label)
    axis.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.xaxis.set_major_formatter("{x:,g}")
    _label(axis, "Bytes by layer", "kB", "")
    _below(figure, axis)
    return figure


def plot_training(
    curves: Mapping[str, Sequence[tuple[float, float]]], moments: Mapping[str, float] | None = None
) -> "Figure":
    """Metrics over training, one panel each, with lines where compression happened.

    Args:
        curves: `(step, value)` pairs by metric name, in the order of steps.
        moments: what happened, by name, and at which step.

    Raises:
        OptionError: there is no curve.
    """
    if not curves:
        raise OptionError("plot_training takes at least one curve.")
    figure, axes = _figure(0.6 + 1.8 * len(curves), len(curves))
    for place, (axis, (name, pairs)) in enumerate(zip(axes, curves.items(), strict=True)):
        steps, values = [step for step, _ in pairs], [value for _, value in pairs]
        axis.plot(steps, values, color=_colour(0), linewidth=1.6, marker="o" if len(pairs) < 30 else None, markersize=3)
        for number, (moment, step) in enumerate((moments or {}).items(), start=1):
            style = ("--", "-.", ":")[(number - 1) % 3]
            label = moment if place == 0 else None
            axis.axvline(step, linestyle=style, color=_colour(number), linewidth=1.3, label=label)
        _label(axis, name, "", name)
        axis.locator_params("x", integer=True)
    axes[-1].set_xlabel("step", fontsize=9, color=_INK)
    _below(figure, axes[0])
    return figure


def figure_to_svg(figure: "Figure", prefix: str) -> str:
    """One `<svg>` element to stand inside a page: text and axes in the page's own colour, nothing behind them.

    Text stays text in the page's font. Nothing is loaded from elsewhere.

    Args:
        figure: of one of the functions here.
        prefix: begins every id in it; give each figure of a page its own (letters, digits, `-`, `_`).

    Raises:
        OptionError: the prefix is no valid start of an id.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", prefix, re.ASCII):
        raise OptionError(f"prefix begins ids: a letter, then letters, digits, - and _; got {prefix!r}.")
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{prefix}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    title = html.escape(" · ".join(axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")))
    start = f'<svg role="img" aria-label="{title}" style="max-width: 100%; height: auto" width="100%"'
    return re.sub(r'<svg([^>]*?) width="[^"]*"', lambda match: start + match[1], text, count=1)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _short(name: str, most: int = 28) -> str:
    """The end of a long name, which is what tells layers apart, as text that matplotlib takes as it is."""
    text = name if len(name) <= most else f"…{name[1 - most :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # which legends leave out


def _below(figure: "Figure", axis: Any) -> None:
    """The legend under the plot, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 18 else min(3, len(labels))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=_INK
        )
