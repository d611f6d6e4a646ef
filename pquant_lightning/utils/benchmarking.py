"""Honest timing: contenders in turn, after a warm-up, medians with their confidence; and peak memory."""

import io
import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pquant_lightning.core._private import DispatchMode
from pquant_lightning.core.calibration import batch_size
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.report import as_call

CONFIDENCE = 0.95
MIN_RUNS = 9


@dataclass(frozen=True)
class Timing:
    """Time of one call, over repeated calls.

    Attributes:
        median_ms: the median, in milliseconds.
        low_ms: lower end of the 95 % confidence interval of the median.
        high_ms: its upper end.
        runs: calls that were timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """The median and the order statistics around it between which the true median lies with 95 %.

        References:
            The number of measurements below the median is binomial; the normal approximation of its quantiles (Conover,
            "Practical Nonparametric Statistics", 1999, section 3.2).

        >>> Timing.of([0.003, 0.001, 0.002])
        Timing(median_ms=2.0, low_ms=1.0, high_ms=3.0, runs=3)
        """
        ordered, count = sorted(seconds), len(seconds)
        spread = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(count) / 2
        low, high = max(math.floor(count / 2 - spread), 0), min(math.ceil(count / 2 + spread), count - 1)
        return cls(statistics.median(ordered) * 1e3, ordered[low] * 1e3, ordered[high] * 1e3, count)


def measure_latency(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times several calls side by side: in turn, each round beginning with another, so that drifts hit all alike.

    Args:
        contenders: what is called, by name.
        seconds: about how long all of it may take; at least nine rounds are made.
        warmup: calls of each before anything is timed.
        clock: seconds that have passed; work on CUDA is waited for before it is read.

    Raises:
        OptionError: no contender.
    """
    if not contenders:
        raise OptionError("measure_latency needs at least one contender.")
    names = list(contenders)
    for _ in range(warmup):
        for name in names:
            contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    started, turn = _now(clock), 0
    while turn < MIN_RUNS or _now(clock) - started < seconds:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before = _now(clock)
            contenders[name]()
            times[name].append(_now(clock) - before)
        turn += 1
    return {name: Timing.of(measured) for name, measured in times.items()}


def _now(clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


class _LiveTensors(DispatchMode):  # type: ignore[misc] # its base has no types
    """Counts the bytes of tensors that come into being and go, by the storages they share."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            key = tensor.untyped_storage().data_ptr()
            if key in self._users or key not in known:
                self._add(tensor, key)
        return result

    def _add(self, tensor: Tensor, key: int) -> None:
        size = tensor.untyped_storage().nbytes()
        if key not in self._users:
            self._users[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._users[key] += 1
        weakref.finalize(tensor, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.layout is torch.strided else []  # others (repacked weights) have no storage to look at
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a call makes, at the moment when most of them are alive.

    On CUDA what the allocator has handed out; on the CPU the tensors themselves, without what a kernel uses inside.
    Tensors that were there before (weights, inputs) are not counted.

    >>> peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000))
    12000
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        if (used := torch.cuda.max_memory_allocated() - before) > 0:
            return used
    with _LiveTensors() as counter:
        run()
    peak: int = counter.peak
    return peak


@dataclass(frozen=True)
class Benchmark:
    """One model on one batch: the time of a call, samples per second, and bytes of activations at the peak."""

    latency: Timing
    throughput: float
    peak_bytes: int


@dataclass(frozen=True)
class BenchmarkReport:
    """Models side by side on the same batch; prints as a table whose ratios are to the first model."""

    batch_size: int
    threads: int
    device: str
    models: dict[str, Benchmark]

    def speed_up(self, name: str) -> float:
        """How many times as fast as the first model."""
        first = next(iter(self.models.values()))
        return first.latency.median_ms / self.models[name].latency.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return {**asdict(self), "speed_up": {name: self.speed_up(name) for name in self.models}}

    def __str__(self) -> str:
        table = Table(
            title=f"Batch of {self.batch_size}, {self.device}, {self.threads} thread(s)", title_justify="left"
        )
        table.add_column("Model")
        for heading in ("Latency, ms", "95 % interval", "Samples / s", "Activations", "Times faster"):
            table.add_column(heading, justify="right")
        for name, found in self.models.items():
            time_ = found.latency
            table.add_row(
                name,
                f"{time_.median_ms:.3f}",
                f"{time_.low_ms:.3f} - {time_.high_ms:.3f}",
                f"{found.throughput:,.0f}",
                f"{found.peak_bytes:,}",
                f"{self.speed_up(name):.2f}",
            )
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(table)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def benchmark_models(models: Mapping[str, nn.Module], example_inputs: Any, *, seconds: float = 2.0) -> BenchmarkReport:
    """Times models on the same inputs, in turn, in eval mode without gradients.

    Args:
        models: by name; the first is what the others are compared with.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; their first dimension is the
            batch.
        seconds: about how long the timing may take.

    >>> report = benchmark_models({"net": nn.Linear(8, 8)}, torch.zeros(4, 8), seconds=0.01)
    >>> report.batch_size, report.models["net"].peak_bytes
    (4, 128)
    """
    args, kwargs = as_call(example_inputs)
    reference = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), torch.empty(0))
    runs = {name: _forward(model, args, kwargs) for name, model in models.items()}
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    for model in models.values():
        model.eval()
    try:
        timings = measure_latency(runs, seconds=seconds)
        peaks = {name: peak_bytes(run) for name, run in runs.items()}
    finally:
        for module, training in modes:
            module.training = training
    size = batch_size([*args, *kwargs.values()])
    found = {
        name: Benchmark(timing, size / max(timing.median_ms, 1e-9) * 1e3, peaks[name])
        for name, timing in timings.items()
    }
    return BenchmarkReport(size, torch.get_num_threads(), str(reference.device), found)


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return model(*args, **kwargs)

    return call
