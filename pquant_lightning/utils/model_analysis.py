"""What a model is made of, layer by layer: sizes, work, spectra, ranges, and what compression would cost each layer."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pquant_lightning.core.calibration import InputStatistics, Samples, collect_inputs
from pquant_lightning.core.compressed_layer import CompressedLayer, changed_layers, weight_of
from pquant_lightning.core.compression_method import CompressionContext, CompressionMethod, MethodFamily
from pquant_lightning.core.deploy import count_params, deployed_form, stored_bytes
from pquant_lightning.core.errors import ModelError, OptionError
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.plan import Candidate
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.core.report import macs_per_sample
from pquant_lightning.core.splitting import split_view

ENERGIES = (0.9, 0.95, 0.99)
"""Shares of the squared Frobenius norm for which a spectrum tells the rank."""

Track = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight as a matrix `(first dimension, all others)`.

    Attributes:
        singular_values: descending, `min(rows, columns)` of them.
    """

    singular_values: tuple[float, ...]

    @classmethod
    def of(cls, weight: Tensor) -> "Spectrum":
        """Singular values by the eigenvalues of the smaller Gram matrix, in float64.

        That is about five times faster than an SVD for a matrix four times as wide as high. Squaring blurs values below
        1e-8 of the largest; in float32 it would be those below 3e-4, which are enough to spoil an effective rank.

        >>> Spectrum.of(torch.diag(torch.tensor([3.0, 1.0]))).singular_values
        (3.0, 1.0)
        """
        matrix = weight.detach().flatten(1).double()
        gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
        return cls(tuple(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).tolist()))

    @property
    def effective_rank(self) -> float:
        """exp(H(p)) of p = s / sum(s), in [1, n]: the number of equal singular values with the same entropy.

        References:
            Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality", definition 1.

        >>> Spectrum((2.0, 2.0, 2.0, 0.0)).effective_rank
        3.0
        """
        total = math.fsum(self.singular_values)
        shares = [s / total for s in self.singular_values if s > 0] if total > 0 else [1.0]
        return round(math.exp(-math.fsum(p * math.log(p) for p in shares)), 9)

    def energy_rank(self, energy: float) -> int:
        """The least rank whose truncation keeps that share of the squared norm.

        >>> Spectrum((3.0, 1.0)).energy_rank(0.9), Spectrum((3.0, 1.0)).energy_rank(0.95)
        (1, 2)
        """
        squares = [s * s for s in self.singular_values]
        wanted, kept = energy * math.fsum(squares) * (1 - 1e-12), 0.0
        for rank, square in enumerate(squares, start=1):
            kept += square
            if kept >= wanted:
                return rank
        return len(squares)


@dataclass(frozen=True)
class Range:
    """Values of a tensor, or of all that a layer receives.

    Attributes:
        minimum, maximum: of all values.
        std: standard deviation; of inputs, from their histogram.
    """

    minimum: float
    maximum: float
    std: float

    @property
    def outlier_ratio(self) -> float:
        """Largest absolute value / standard deviation: how much of a uniform grid few values take."""
        return max(-self.minimum, self.maximum) / self.std if self.std > 0 else 0.0


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer.

    Attributes:
        name: dotted module name; attention's projections are layers of their own.
        type: class name.
        shape: of the weight.
        params: parameters, the bias counted.
        size_bytes: stored bytes, the deployed form.
        macs: multiply-accumulates per sample of the example; None where there was none.
        weight: range of the weight.
        inputs: range of what the layer receives; None without samples, or where it receives no floats.
        spectrum: None where it was left out.
        candidates: what each method offers for it, by method name.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    params: int
    size_bytes: int
    macs: int | None
    weight: Range
    inputs: Range | None
    spectrum: Spectrum | None
    candidates: Mapping[str, tuple[Candidate, ...]]

    def best(self, method: str, share: float) -> Candidate | None:
        """The offer of a method with the least loss that takes at most this share of the bytes; None if there is none.

        Args:
            method: registry name.
            share: of `size_bytes` that is kept.
        """
        offers = [c for c in self.candidates.get(method, ()) if c.size_bytes <= share * self.size_bytes]
        return min(offers, key=lambda candidate: candidate.loss, default=None)


@dataclass(frozen=True)
class Suggestion:
    """What to do to one layer.

    Attributes:
        layer: its name.
        method: registry name.
        options: of the method, for this layer.
        saved_bytes: stored bytes that go.
        loss: squared relative error of the weight.
    """

    layer: str
    method: str
    options: Mapping[str, Any]
    saved_bytes: int
    loss: float


@dataclass(frozen=True)
class ModelAnalysis:
    """A whole model; prints as a table, largest layers first.

    Attributes:
        layers: in the order of the model.
        params: parameters of the whole model.
        size_bytes: stored bytes of the whole model, deployed form.
        macs: multiply-accumulates per sample of the example; None where there was none.
        share: of a layer's bytes that `suggestions` and the table keep.
    """

    layers: tuple[LayerAnalysis, ...]
    params: int
    size_bytes: int
    macs: int | None
    share: float

    @property
    def methods(self) -> list[str]:
        """The methods that offer something for a layer."""
        return list(dict.fromkeys(method for layer in self.layers for method in layer.candidates))

    @property
    def suggestions(self) -> list[Suggestion]:
        """For each layer the method with the least loss at `share`, most bytes saved per loss first."""
        found = []
        for layer in self.layers:
            offers = [(c.loss, m, c) for m in layer.candidates if (c := layer.best(m, self.share)) is not None]
            if offers:
                loss, method, best = min(offers, key=lambda offer: offer[0])
                saved = layer.size_bytes - best.size_bytes
                found.append(Suggestion(layer.name, method, best.options, saved, loss))
        return sorted(found, key=lambda s: s.loss / s.saved_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The analysis as plain JSON-able data."""
        layers = []
        for layer in self.layers:
            row = asdict(layer)
            if layer.spectrum is not None:
                row["spectrum"]["effective_rank"] = layer.spectrum.effective_rank
                row["spectrum"]["energy_ranks"] = {str(e): layer.spectrum.energy_rank(e) for e in ENERGIES}
            layers.append(row)
        totals = {"params": self.params, "size_bytes": self.size_bytes, "macs": self.macs, "share": self.share}
        return {"layers": layers, **totals, "suggestions": [asdict(s) for s in self.suggestions]}

    def __str__(self) -> str:
        title = "Layers, largest first" + (
            f"; below a method, the squared relative error of the weight with {self.share:.0%} of its bytes"
            if self.methods
            else ""
        )
        table = Table(title=title, title_justify="left")
        for heading in ("Layer", "Type", "Weight"):
            table.add_column(heading, overflow="fold")
        for heading in (
            "Parameters",
            "Bytes",
            "MACs per sample",
            "Rank: effective, 95 % of energy",
            "Range of weights",
            "of inputs",
        ):
            table.add_column(heading, justify="right")
        for method in self.methods:
            table.add_column(method, justify="right")
        for layer in sorted(self.layers, key=lambda layer: -layer.size_bytes):
            best = [layer.best(method, self.share) for method in self.methods]
            table.add_row(*_cells(layer), *("" if offer is None else f"{offer.loss:.2g}" for offer in best))
        table.add_section()
        whole = ("whole model", "", "", f"{self.params:,}", f"{self.size_bytes:,}", _number(self.macs))
        table.add_row(*whole)
        console = Console(file=io.StringIO(), width=140 + 18 * len(self.methods), color_system=None)
        console.print(table)
        for place, item in enumerate(self.suggestions[:5], start=1):
            options = ", ".join(f"{key}={value}" for key, value in item.options.items() if not isinstance(value, dict))
            console.print(
                f"compress first ({place}): {item.layer} by {item.method} ({options}) saves {item.saved_bytes:,} bytes "
                f"at a squared relative weight error of {item.loss:.2g}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def _cells(layer: LayerAnalysis) -> list[str]:
    rank = ""
    if layer.spectrum is not None:
        spectrum = layer.spectrum
        rank = f"{spectrum.effective_rank:.0f}, {spectrum.energy_rank(0.95)} of {len(spectrum.singular_values)}"
    ranges = ["" if r is None else f"{r.minimum:.2g} … {r.maximum:.2g}" for r in (layer.weight, layer.inputs)]
    numbers = [f"{layer.params:,}", f"{layer.size_bytes:,}", _number(layer.macs)]
    return [layer.name, layer.type, "x".join(map(str, layer.shape)), *numbers, rank, *ranges]


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def analyze_model(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    loader: Any = None,
    num_samples: int = 128,
    spectra: bool = True,
    methods: str | Sequence[str | CompressionMethod] = (),
    share: float = 0.5,
    track: Track | None = None,
) -> ModelAnalysis:
    """Looks at every layer of a model that this package could change, or has changed; the model stays as it is.

    Without options this reads the weights only. Spectra take most of that time; offers of methods take longer still,
    because each of them is computed.

    Args:
        model: any module.
        example_inputs: what `forward` takes, for MACs; with a loader, its first batch unless given.
        loader: a loader, a list of batches or a datamodule, for the ranges of inputs.
        num_samples: how many samples of it.
        spectra: whether to compute singular values.
        methods: whose offers to compute, by registry name or as objects; "all" means each registered method that makes
            offers, with its default options; of several with the same offers, the first.
        share: of a layer's bytes that is kept in `suggestions`, in (0, 1).
        track: wraps an iterable of layers and shows progress; `track(items, description)`.

    Raises:
        ModelError: there is no such layer.
        OptionError: `share` is out of range, or no method has that name.
        CalibrationError: the model cannot be run on the samples.

    >>> net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> found = analyze_model(net, torch.ones(2, 32), methods="all")
    >>> [(layer.name, layer.params, layer.macs) for layer in found.layers]
    [('0', 528, 512), ('2', 68, 64)]
    """
    if not 0 < share < 1:
        raise OptionError(f"share is the share of a layer's bytes that is kept, in (0, 1), got {share}.")
    view = split_view(model)
    layers = _layers(view)
    if not layers:
        raise ModelError(f"{type(model).__name__} has no layer to analyse: it holds no weights of a supported type.")
    offering = _offering(methods)
    inputs: dict[str, InputStatistics] = {}
    if loader is not None:
        samples = Samples.take(loader, num_samples).fitted_to(model)
        inputs = collect_inputs(view, list(layers), samples)
        if example_inputs is None:
            example_inputs = samples.arguments_of(view)
    deployed = deployed_form(view)
    macs = None if example_inputs is None else macs_per_sample(deployed, example_inputs)
    items: Iterable[Any] = layers.items() if track is None else track(list(layers.items()), "analysing")
    found = []
    for name, layer in items:
        weight = weight_of(layer).detach()
        found.append(
            LayerAnalysis(
                name,
                type(layer).__name__,
                tuple(weight.shape),
                count_params(layer),
                stored_bytes(deployed.get_submodule(name)),
                None if macs is None else macs.get(name, 0),
                Range(*(float(x) for x in (*torch.aminmax(weight), weight.float().std(correction=0)))),
                _input_range(inputs.get(name)),
                Spectrum.of(weight) if spectra and weight.dim() > 1 else None,
                {method.name: offers for method in offering if (offers := _offers(method, name, layer))},
            )
        )
    total = None if macs is None else macs[""]
    return ModelAnalysis(_without_repeats(found), count_params(view), stored_bytes(deployed), total, share)


def _layers(view: nn.Module) -> dict[str, nn.Module]:
    """Changed layers as they are, the others as the ordinary layers they stand for."""
    changed: dict[str, nn.Module] = dict(changed_layers(view))
    inside = tuple(f"{name}." for name in changed)
    found: dict[str, nn.Module] = {}
    for name, module in view.named_modules():
        layer = changed.get(name) or (None if name.startswith(inside) else as_torch(module))
        if layer is not None:
            found[name] = layer
    return found


def _offering(methods: str | Sequence[str | CompressionMethod]) -> list[CompressionMethod]:
    if methods != "all":
        named = [methods] if isinstance(methods, str) else methods
        return [CompressionMethodRegistry.get(method) if isinstance(method, str) else method for method in named]
    return [
        cls()
        for cls in CompressionMethodRegistry.loaded()
        if issubclass(cls, CompressionMethod)
        and not issubclass(cls, MethodFamily)
        and cls.candidates is not CompressionMethod.candidates
    ]


def _without_repeats(layers: list[LayerAnalysis]) -> tuple[LayerAnalysis, ...]:
    """Without the methods whose offers are those of an earlier method in every layer (two that differ in training)."""
    first: dict[Any, str] = {}
    for method in dict.fromkeys(method for layer in layers for method in layer.candidates):
        offers = [[(c.size_bytes, c.loss) for c in layer.candidates.get(method, ())] for layer in layers]
        first.setdefault(repr(offers), method)
    kept = set(first.values())
    return tuple(replace(x, candidates={m: c for m, c in x.candidates.items() if m in kept}) for x in layers)


def _offers(method: CompressionMethod, name: str, layer: nn.Module) -> tuple[Candidate, ...]:
    if isinstance(layer, CompressedLayer):
        return ()
    return tuple(method.candidates(name, layer, CompressionContext(by=method.name)))


def _input_range(statistics: InputStatistics | None) -> Range | None:
    if statistics is None:
        return None
    counts = statistics.histogram.double()
    low, high = statistics.minimum, statistics.maximum
    middles = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (high - low) / len(counts)
    shares = counts / counts.sum().clamp_min(1)
    mean = (shares * middles).sum()
    return Range(low, high, float((shares * (middles - mean).square()).sum().sqrt()))
