"""How long each compressed layer takes beside the layer it stands for, on the inputs that a model gives it."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pquant_lightning.core._private import pytree
from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.compressed_layer import CompressedLayer, changed_layers
from pquant_lightning.core.report import as_call
from pquant_lightning.core.splitting import split_like
from pquant_lightning.utils.benchmarking import Estimate, evaluating, measure

SLOWER = 1.05  # times the original's time, from which a layer counts as slower


@dataclass(frozen=True)
class LayerTiming:
    """One layer, alone, before and after.

    Attributes:
        name: dotted module name.
        method: the compressed layer in a few words.
        kernel: what computes it for these inputs; None where torch's own operations do.
        before_ms, after_ms: medians.
        relative_time: time after / time before, with its interval.
    """

    name: str
    method: str
    kernel: str | None
    before_ms: float
    after_ms: float
    relative_time: Estimate

    @property
    def summary(self) -> str:
        """The time in a few words.

        >>> LayerTiming("fc", "8 bits", "fbgemm", 1.0, 1.8, Estimate(1.8, 1.7, 1.9)).summary
        'slower than the original here: 1.8x (fbgemm)'
        >>> LayerTiming("fc", "8 bits", None, 1.0, 0.5, Estimate(0.5, 0.4, 0.6)).summary
        '0.50 of the time here'
        """
        ratio, kernel = self.relative_time.median, f" ({self.kernel})" if self.kernel else ""
        if ratio > SLOWER:
            return f"slower than the original here: {ratio:.1f}x{kernel}"
        return f"{ratio:.2f} of the time here{kernel}"


def time_layers(
    original: nn.Module, compressed: nn.Module, example_inputs: Any, max_seconds: float = 0.5
) -> list[LayerTiming]:
    """Times each changed layer against the one it stands for, in turns, on the first inputs that it gets.

    Args:
        original: the uncompressed model.
        compressed: its deployed form (`finalize`).
        example_inputs: what `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        max_seconds: for each layer.

    Returns:
        The layers in the model's order; those that the inputs do not reach are left out.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> time_layers(net, net, torch.ones(2, 8))
    []
    """
    before, changed = split_like(original, compressed), changed_layers(compressed)
    found = []
    with evaluating([before, compressed]):
        for name, (args, kwargs) in _first_inputs(compressed, changed, example_inputs).items():
            old, new = before.get_submodule(name), changed[name]
            calls = {"before": _call(old, args, kwargs), "after": _call(new, args, kwargs)}
            times = measure(calls, max_seconds=max_seconds, min_round_ms=0.5)
            ratio = times["after"].relative_to(times["before"])
            kernel = next((new.kernel_for(x) for x in args if isinstance(x, Tensor)), None)
            figures = times["before"].median_ms, times["after"].median_ms, ratio
            found.append(LayerTiming(name, new.described(), kernel, *figures))
    return found


def _call(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    return lambda: layer(*args, **kwargs)


def _first_inputs(model: nn.Module, layers: dict[str, CompressedLayer], example_inputs: Any) -> dict[str, Any]:
    """Copies of what the first call of each layer gets, in the order of the calls."""
    found: dict[str, Any] = {}

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    with _noting(layers, lambda name, given: found.setdefault(name, pytree.tree_map(copied, given))):
        for _ in run_samples(model, Samples((as_call(example_inputs),), lambda m, call: m(*call[0], **call[1]))):
            pass
    return found


@contextmanager
def _noting(layers: dict[str, CompressedLayer], note: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, args, kwargs: note(name, (args, kwargs)) and None

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def layer_table(timings: Sequence[LayerTiming]) -> str:
    """The timings as a table, the whole of what was timed by layer."""
    table = Table(title="Layers, each alone", title_justify="left")
    for heading in ("Layer", "Method", "Kernel"):
        table.add_column(heading, overflow="fold")
    for heading in ("ms before", "ms after", "Relative time"):
        table.add_column(heading, justify="right")
    for timing in timings:
        remark = ", slower" if timing.relative_time.median > SLOWER else ""
        ratio = f"{timing.relative_time.median:.2f}{remark}"
        figures = (f"{timing.before_ms:.3g}", f"{timing.after_ms:.3g}", ratio)
        table.add_row(timing.name, timing.method, timing.kernel or "torch", *figures)
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table, markup=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()
