"""Figures say what they show, SVGs can stand together in a dark page, and what cannot be drawn is explained."""

import inspect
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn

from pquant_lightning import PQuantError, analyze_model, compress_model
from pquant_lightning.utils import visualization
from pquant_lightning.utils.visualization import (
    SizePoint,
    figure_to_svg,
    pareto_front,
    plot_sensitivity,
    plot_size_against_quality,
    plot_sparsity,
    plot_spectra,
    plot_training,
    plot_weight_histograms,
)

POINTS = [
    SizePoint("large", 100e3, 0.99, "plain"),
    SizePoint("beaten", 60e3, 0.90, "a"),
    SizePoint("middle", 50e3, 0.95, "a"),
    SizePoint("same size, worse", 50e3, 0.94, "b"),
    SizePoint("same quality, larger", 55e3, 0.95, "b"),
    SizePoint("small", 20e3, 0.80, "b"),
]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))


def sparse() -> torch.Tensor:
    weight = torch.ones(600, 8)
    weight[:300] = 0
    return weight


FIGURES = {
    "spectra": lambda: plot_spectra(analyze_model(net())),
    "histograms": lambda: plot_weight_histograms(net(), compress_model(net(), "low_rank", rank=2), ["0", "2"]),
    "sparsity": lambda: plot_sparsity(sparse(), "0"),
    "sensitivity": lambda: plot_sensitivity(analyze_model(net(), methods=["low_rank", "ptq"])),
    "size": lambda: plot_size_against_quality(POINTS),
    "training": lambda: plot_training({"loss": [(0, 1.0), (5, 0.5)], "acc": [(0, 0.1), (5, 0.9)]}, {"pruned": 3}),
}
each_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


@each_figure
def test_figures_have_titles_and_labels(draw):
    figure = draw()
    assert figure.axes[0].get_title(loc="left")
    assert any(axis.get_xlabel() for axis in figure.axes)
    assert figure.get_figwidth() == visualization.WIDTH
    texts = [axis.title.get_fontsize() for axis in figure.axes]
    assert min(texts) >= 9


@each_figure
def test_svg_is_self_contained_and_takes_the_colour_of_the_page(draw):
    text = figure_to_svg(draw(), "one")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "currentColor" in text
    assert visualization._INK not in text
    assert "<style" not in text
    assert "<text" in text  # letters, not their outlines
    assert not re.search(r"#000000|fill: *black|@font-face|DejaVu", text)
    assert {link for link in re.findall(r'href="([^"]{0,5})', text) if link[:1] != "#"} <= {"data:"}
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("one-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_svgs_of_one_page_share_no_id_and_come_out_the_same_again():
    first, again, other = (figure_to_svg(FIGURES["size"](), prefix) for prefix in ("a", "a", "b"))
    assert first == again
    found = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, other)]
    assert not found[0] & found[1]


def test_pareto_front():
    assert [point.label for point in pareto_front(POINTS)] == ["small", "middle", "large"]
    assert pareto_front(POINTS[:1]) == POINTS[:1]
    assert pareto_front([]) == []
    axis = plot_size_against_quality(POINTS).axes[0]
    front = next(line for line in axis.lines if line.get_label() == "Pareto front")
    assert list(front.get_xdata()) == [20, 50, 100]
    assert [text.get_text() for text in axis.texts] == ["small", "middle", "large"]


def test_the_numbers_are_in_the_plots():
    analysis = analyze_model(net(), methods=["low_rank"], share=0.6)
    (largest, _) = plot_spectra(analysis).axes[0].lines
    values = analysis.layers[0].spectrum.singular_values
    assert list(largest.get_ydata()) == pytest.approx([v / values[0] for v in values])
    assert len(plot_spectra(analysis, ["2"]).axes[0].lines) == 1
    losses = list(plot_sensitivity(analysis).axes[0].lines[0].get_xdata())
    assert losses == [layer.best("low_rank", 0.6).loss for layer in analysis.layers]
    assert len(plot_sensitivity(analysis, most=1).axes[0].get_yticks()) == 1
    histogram = plot_weight_histograms(net(), net(), ["0"]).axes[0]
    assert [sum(line.get_ydata()) for line in histogram.lines] == pytest.approx([100, 100])
    image = plot_sparsity(sparse()).axes[0].images[0].get_array()
    assert image.shape == (256, 8)
    assert image.mean() == pytest.approx(50, abs=0.5)
    moment = plot_training({"loss": [(0, 1.0)]}, {"pruned": 3}).axes[0].lines[-1]
    assert moment.get_xdata() == [3, 3]


def test_names_that_matplotlib_would_read_otherwise():
    odd = nn.ModuleDict({"_stem": nn.Linear(8, 8), "a$b$c^": nn.Linear(8, 4)})
    figure = plot_spectra(analyze_model(odd))
    text = figure_to_svg(figure, "odd")
    assert "_stem" in text
    assert "a$b$c^" in text


def test_colours_are_told_apart_on_black_and_on_white():
    def luminance(colour):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for colour in visualization.COLOURS[:4]:
        light = luminance(colour)
        assert min(1.05 / (light + 0.05), (light + 0.05) / 0.05) >= 2.5


def test_no_global_state_of_pyplot():
    assert "pyplot" not in inspect.getsource(visualization)


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PQuantError, match=r"pip install 'pquant-lightning\[plot\]'"):
        plot_sparsity(torch.eye(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_spectra(analyze_model(net(), spectra=False)), "spectra=True"),
        (lambda: plot_sensitivity(analyze_model(net())), 'methods="all"'),
        (lambda: plot_weight_histograms(net(), net(), []), "at least one layer"),
        (lambda: plot_size_against_quality([]), "at least one point"),
        (lambda: plot_training({}), "at least one curve"),
        (lambda: figure_to_svg(plot_sparsity(torch.eye(3)), '"><script>'), "begins ids"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PQuantError, match=message):
        call()
