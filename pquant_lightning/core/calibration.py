"""Calibration: what the layers of a model receive on a few samples of the user's own data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.batches import batch_size, bind_batch, describe_batch, first_samples, main_output
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.layer_adapter import channel_dim
from pquant_lightning.core.reduction import from_rank_zero, is_distributed, reduced, reduced_by_name
from pquant_lightning.core.samples import Samples, run_samples
from pquant_lightning.core.steps import run_forward

__all__ = [
    "InputStatistics",
    "Samples",
    "batch_size",
    "bind_batch",
    "collect_inputs",
    "describe_batch",
    "first_samples",
    "from_rank_zero",
    "is_distributed",
    "main_output",
    "output_ranges",
    "reduced",
    "run_forward",
    "run_samples",
    "visit_inputs",
]

MOVING_AVERAGE = 0.1  # weight of the newest batch
MAX_VALUES = 2**18  # values kept per layer, evenly spread over all it receives: 1 MiB


@dataclass
class InputStatistics:
    """What one layer has received over all samples and processes.

    Attributes:
        minimum: of all values.
        maximum: of all values.
        moving: exponential moving averages of the batches' minima and maxima.
        mean: float32 `(channels,)`, per input channel.
        histogram: float32 `(bins,)`, counts between `minimum` and `maximum` in equal bins.
    """

    minimum: float
    maximum: float
    moving: tuple[float, float]
    mean: Tensor
    histogram: Tensor


class _Collector:
    """Sums over the batches of one layer; `values` are an even selection, at most `MAX_VALUES`."""

    def __init__(self, layer: nn.Module, share: int) -> None:
        self.layer, self.share = layer, share
        self.extremes: Tensor | None = None  # (2,): -minimum, maximum, so that both are maxima
        self.moving = torch.zeros(2, dtype=torch.float32)
        self.total, self.count = torch.zeros(()), 0
        self.values: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        x = x.float()
        low, high = torch.aminmax(x)
        extremes = torch.stack([-low, high]).cpu()
        self.moving = extremes if self.extremes is None else self.moving.lerp(extremes, MOVING_AVERAGE)
        self.extremes = extremes if self.extremes is None else self.extremes.maximum(extremes)
        dim = channel_dim(self.layer)
        self.total = self.total + x.sum([d for d in range(x.dim()) if d != dim % x.dim()], dtype=torch.float64).cpu()
        self.count += x.numel() // x.shape[dim]
        stride = -(-x.numel() // self.share) | 1  # odd, so that it does not keep to the same channels
        self.values.append(x.flatten()[::stride].cpu())

    @property
    def sums(self) -> Tensor:
        """float64 `(channels + 4,)`: moving averages, sums per channel, 1 for this process, and positions."""
        ends = torch.tensor([1.0, self.count], dtype=torch.float64)
        return torch.cat([self.moving.double(), self.total.double(), ends])

    def histogram(self, bins: int, low: float, high: float) -> Tensor:
        """float32 `(bins,)`."""
        if not self.values or high <= low:
            return torch.zeros(bins, dtype=torch.float32)
        return torch.histc(torch.cat(self.values), bins, low, high)


def collect_inputs(
    model: nn.Module, names: Sequence[str], samples: Samples, bins: int = 2048, batch_norms: bool = False
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the named layers, in one pass over the samples (`batch_norms`: see `run_samples`).

    Layers that receive nothing (or no floating-point tensor), in no process, are not in the result.

    Raises:
        CalibrationError: a layer receives NaN or infinite values, or the model cannot be run.
    """
    share = max(MAX_VALUES // len(samples.batches), 1)
    collectors = {name: _Collector(model.get_submodule(name), share) for name in names}
    visit_inputs(model, names, samples, lambda name, x: collectors[name](x), batch_norms)
    reached = {name: own for name, own in collectors.items() if own.extremes is not None}
    extremes = reduced_by_name({n: [c.extremes.double()] for n, c in reached.items()}, names, samples, by="max")  # type: ignore[union-attr]
    sums = reduced_by_name({name: [own.sums] for name, own in reached.items()}, names, samples)
    ends = {name: (-float(found[0]), float(found[1])) for name, (found,) in extremes.items()}
    counts = {name: [collectors[name].histogram(bins, *ends[name])] for name in ends}
    histograms = reduced_by_name(counts, names, samples)
    return {name: _summary(ends[name], sums[name][0], histograms[name][0]) for name in ends}


def _summary(ends: tuple[float, float], sums: Tensor, histogram: Tensor) -> InputStatistics:
    processes, count = float(sums[-2]), float(sums[-1])
    low, high = (sums[:2] / processes).tolist()
    return InputStatistics(*ends, (-low, high), (sums[2:-2] / count).float(), histogram)


@contextmanager
def output_ranges(
    model: nn.Module, names: Mapping[str, str], samples: Samples
) -> Iterator[dict[str, tuple[float, float]]]:
    """The least and the largest output of modules while the block runs, filled in at its end.

    Args:
        model: what runs in the block.
        names: by the key that they get in the result, names of modules.
        samples: what it runs on.
    """
    seen: dict[str, list[Tensor]] = {}

    def hook(key: str) -> Any:
        def call(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                check_finite(output.detach(), f"The outputs of layer {names[key]!r}", "")
                ends = torch.stack([-output.detach().amin(), output.detach().amax()]).float()
                seen[key] = [ends if key not in seen else torch.maximum(seen[key][0], ends)]

        return call

    handles = [model.get_submodule(name).register_forward_hook(hook(key)) for key, name in names.items()]
    found: dict[str, tuple[float, float]] = {}
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for key, (ends,) in reduced_by_name(seen, names, samples, by="max").items():
        low, high = ends.tolist()
        found[key] = (-low, high)


def visit_inputs(
    model: nn.Module,
    names: Sequence[str],
    samples: Samples,
    visit: Callable[[str, Tensor], None],
    batch_norms: bool = False,
    number: int = 1,
) -> None:
    """Calls `visit(name, x)` with every floating-point input of the named layers, in one pass over the samples.

    Args:
        model: holds the layers.
        names: of the layers.
        samples: what it is run on.
        visit: may raise, too.
        batch_norms: see `run_samples`.
        number: of the first batch, for messages.

    Raises:
        CalibrationError: a layer receives NaN or infinite values, or the model cannot be run.
    """
    batch = number

    def hook(name: str) -> Any:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0):
                return
            check_finite(x.detach(), f"The inputs of layer {name!r}", f" (batch {batch})")
            visit(name, x.detach())

        return call

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    try:
        for _ in run_samples(model, samples, batch_norms):
            batch += 1
    finally:
        for handle in handles:
            handle.remove()


def check_finite(x: Tensor, what: str, where: str) -> None:
    """Refuses values that no statistic can be made of.

    Raises:
        CalibrationError: there are NaN or infinite values.
    """
    total = x.sum(dtype=None if x.dtype == torch.float64 else torch.float32)  # cheap, but may overflow
    if not torch.isfinite(total) and not torch.isfinite(x).all():
        raise CalibrationError(
            f"{what} hold NaN or infinite values in calibration{where}. Look at the data and the weights; a model that "
            "gives NaN cannot be calibrated."
        )
