"""Honest measurements on this machine: interleaved timings with confidence intervals, throughput, peak memory."""

import gc
import io
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pquant_lightning.core._private import DispatchMode
from pquant_lightning.core.calibration import Samples, batch_size, run_samples
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import OptionError, counted, known
from pquant_lightning.core.report import as_call

CONFIDENCE = 0.95
"""Coverage of the intervals; with fewer than six rounds the interval is the whole range, which covers less."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Estimate:
    """A median with a confidence interval for it.

    Attributes:
        median: of the samples.
        low, high: the interval, two of the samples (`CONFIDENCE`, from the order statistics alone).
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Estimate":
        """The median of independent samples of any one distribution.

        The k-th smallest and k-th largest of n samples enclose the median with probability 1 - 2 P(B < k),
        B ~ Binomial(n, 1/2); k is the largest that reaches `CONFIDENCE`.

        References:
            Le Boudec (2010), "Performance evaluation of computer and communication systems", theorem 2.1.

        >>> Estimate.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0])
        Estimate(median=5.0, low=2.0, high=8.0)
        """
        ordered, n = sorted(samples), len(samples)
        below, rank = 0.0, 0
        while (below := below + math.comb(n, rank) / 2**n) <= (1 - CONFIDENCE) / 2:
            rank += 1
        rank = max(rank, 1)
        return cls(statistics.median(ordered), ordered[rank - 1], ordered[n - rank])

    @property
    def precision(self) -> float:
        """Half the width of the interval, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        rounds_ms: milliseconds per call, one value per round; the rounds of contenders measured together correspond.
    """

    rounds_ms: tuple[float, ...]

    @property
    def estimate_ms(self) -> Estimate:
        """Median and interval in milliseconds."""
        return Estimate.of(self.rounds_ms)

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return statistics.median(self.rounds_ms)

    @property
    def spread_ms(self) -> float:
        """The interquartile range of the rounds in milliseconds."""
        if len(self.rounds_ms) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.rounds_ms, n=4, method="inclusive")
        return third - first

    def relative_to(self, other: "Timing") -> Estimate:
        """This time / the other's, round by round, so that what slows the machine down for both falls out.

        Raises:
            OptionError: they were not measured together.
        """
        if len(self.rounds_ms) != len(other.rounds_ms):
            raise OptionError(
                f"A ratio is taken round by round, got {len(self.rounds_ms)} and {len(other.rounds_ms)} rounds: "
                "measure both in one call of measure()."
            )
        return Estimate.of([mine / its for mine, its in zip(self.rounds_ms, other.rounds_ms, strict=True)])

    def __str__(self) -> str:
        found = self.estimate_ms
        return f"{found.median:.3g} ms [{found.low:.3g}, {found.high:.3g}]"


def measure(
    contenders: Mapping[str, Call],
    *,
    min_rounds: int = 7,
    max_rounds: int = 101,
    precision: float = 0.02,
    max_seconds: float = 10.0,
    min_round_ms: float = 2.0,
    warm_up: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times contenders in turns: every round runs each of them once, and the next round starts with another one.

    After the warm-up, rounds are added until every interval is as narrow as `precision` asks, or time is up. Short
    calls are repeated within a round. The garbage collector rests meanwhile, and CUDA is waited for before each look at
    the clock.

    Args:
        contenders: what to call, by name; results are thrown away.
        min_rounds: rounds that are always made; 6 is the least that gives an interval of 95 %.
        max_rounds: rounds after which it ends.
        precision: half the width of the interval / the median, for every contender, at which it ends.
        max_seconds: time after which no round is begun, beyond `min_rounds`.
        min_round_ms: a contender's calls in one round take about this long at least.
        warm_up: untimed calls of each contender before the first round, at least 1.
        clock: seconds; `time.process_time` leaves out what other programs take, and every thread counts.

    Raises:
        OptionError: there is no contender, or a number is out of range.

    >>> times = measure({"a": lambda: sum(range(1000)), "b": lambda: sum(range(9000))}, max_seconds=0.1)
    >>> times["b"].relative_to(times["a"]).low > 1
    True
    """
    if not contenders:
        raise OptionError("measure takes at least one contender to call, got none.")
    if not 1 <= min_rounds <= max_rounds:
        raise OptionError(f"measure needs 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}.")
    if warm_up < 1 or precision < 0:
        raise OptionError(f"measure needs warm_up >= 1 and precision >= 0, got {warm_up} and {precision}.")
    names = list(contenders)
    repeats = {name: _repeats(call, warm_up, min_round_ms, clock) for name, call in contenders.items()}
    rounds_ms: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    with _no_collection():
        for turn in range(max_rounds):
            narrow = turn >= min_rounds and all(Estimate.of(v).precision <= precision for v in rounds_ms.values())
            if narrow or (turn >= min_rounds and clock() - start >= max_seconds):
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                rounds_ms[name].append(1000 * _seconds(contenders[name], repeats[name], clock))
    return {name: Timing(tuple(values)) for name, values in rounds_ms.items()}


def _repeats(call: Call, warm_up: int, min_round_ms: float, clock: Callable[[], float]) -> int:
    """Calls per round; the last call of the warm-up says how long one takes."""
    for _ in range(warm_up - 1):
        call()
    seconds = _seconds(call, 1, clock)
    return max(1, math.ceil(min_round_ms / 1000 / seconds)) if seconds > 0 else 1


def _seconds(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    for _ in range(repeats):
        call()
    _synchronize()
    return (clock() - start) / repeats


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _LiveTensors(DispatchMode):  # type: ignore[misc]
    """Counts the bytes of the tensors that operations make, from their creation until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self.alive:
                self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size_bytes = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self.live_bytes -= size_bytes
            self.alive.pop(key)

        self.alive[key] = weakref.ref(storage, gone)
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storages(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield value.untyped_storage()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _storages(item)


def peak_bytes(call: Call) -> int:
    """Most bytes of memory that a call holds at once, beyond what there was before.

    On a GPU, by CUDA's caching allocator. On a CPU, by the tensors that torch's operations make and the time they live:
    the same number on every run and machine, which the resident size of the process is not (freed memory stays with
    it). Scratch space inside one kernel is not seen on a CPU.

    >>> peak_bytes(lambda: torch.ones(1000) + 1)  # two tensors of 4000 bytes
    8000
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        on_device = torch.cuda.max_memory_allocated() - before
        if on_device > 0:
            return on_device
    with _LiveTensors() as tensors:
        call()
    return tensors.peak_bytes


@dataclass(frozen=True)
class ModelBenchmark:
    """What one model takes for one batch.

    Attributes:
        timing: of a forward pass, in eval mode without gradients.
        samples_per_second: samples of the batch / median time.
        peak_memory_bytes: parameters and buffers, and the most that a forward pass holds beside them (`peak_bytes`).
    """

    timing: Timing
    samples_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class BenchmarkReport:
    """Models on the same inputs, measured in turns; prints as a table.

    Attributes:
        models: by name; the first is what the others are compared with.
        batch_size: samples in a batch.
        device: where they ran.
        threads: that torch used on the CPU.
    """

    models: dict[str, ModelBenchmark]
    batch_size: int
    device: str
    threads: int

    def relative_time(self, name: str) -> Estimate:
        """Time of a model / time of the first one, with its interval.

        Raises:
            OptionError: no model has that name.
        """
        if name not in self.models:
            raise OptionError(f"No model {name!r} was measured. {known(name, self.models)}")
        return self.models[name].timing.relative_to(next(iter(self.models.values())).timing)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-able data."""
        rows = {}
        for name, model in self.models.items():
            rows[name] = {
                "latency_ms": asdict(model.timing.estimate_ms),
                "spread_ms": model.timing.spread_ms,
                "rounds": len(model.timing.rounds_ms),
                "samples_per_second": model.samples_per_second,
                "peak_memory_bytes": model.peak_memory_bytes,
                "relative_time": asdict(self.relative_time(name)),
            }
        return {"models": rows, "batch_size": self.batch_size, "device": self.device, "threads": self.threads}

    def __str__(self) -> str:
        title = f"Benchmark: batch {self.batch_size}, {self.device}, {counted(self.threads, 'thread')}"
        table = Table(title=title, title_justify="left")
        table.add_column("Model", overflow="fold")
        for heading in ("ms, median [95 %]", "Relative time", "Samples/s", "Peak memory, bytes"):
            table.add_column(heading, justify="right")
        for name, model in self.models.items():
            ratio = self.relative_time(name)
            relative = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            time_ms = str(model.timing).replace(" ms", "")
            table.add_row(name, time_ms, relative, f"{model.samples_per_second:,.0f}", f"{model.peak_memory_bytes:,}")
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(table, markup=False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip()


def benchmark_models(models: Mapping[str, nn.Module], example_inputs: Any, **options: Any) -> BenchmarkReport:
    """Latency, throughput and peak memory of models on the same inputs, in eval mode without gradients.

    Args:
        models: by name, the first to compare the others with: `{"original": a, "compressed": b}`. Each stays on its
            device and is as before afterwards. Give deployed forms (`finalize`): the training form is slower.
        example_inputs: what `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        **options: of `measure`, such as `max_seconds=2` or `precision=0.01`.

    Raises:
        OptionError: there is no model, or an option of `measure` is out of range.
        CalibrationError: a model cannot be run on the inputs.

    >>> small, large = nn.Linear(8, 8), nn.Linear(8, 800)
    >>> report = benchmark_models({"large": large, "small": small}, torch.ones(4, 8), max_seconds=0.1)
    >>> report.batch_size, report.models["small"].peak_memory_bytes  # (72 + 4 * 8) * 4 bytes
    (4, 416)
    """
    if not models:
        raise OptionError("benchmark_models takes at least one model by name, got none.")
    runs = {name: _forward(model, example_inputs) for name, model in models.items()}
    with evaluating(models.values()):
        held = {name: stored_bytes(models[name]) + peak_bytes(run) for name, run in runs.items()}
        timings = measure(runs, **options)
    size = batch_size(example_inputs)
    measured = {
        name: ModelBenchmark(timing, size / timing.median_ms * 1000, held[name]) for name, timing in timings.items()
    }
    device = next((p.device.type for m in models.values() for p in m.parameters()), "cpu")
    return BenchmarkReport(measured, size, device, torch.get_num_threads())


def _forward(model: nn.Module, example_inputs: Any) -> Call:
    """A forward pass as a call without arguments; one has been made, which says what is wrong if it cannot."""
    placed: list[Any] = []  # the inputs, on the model's device

    def call_with(module: nn.Module, batch: Any) -> None:
        placed[:] = batch
        module(*batch[0], **batch[1])

    for _ in run_samples(model, Samples((as_call(example_inputs),), call_with)):
        pass
    args, kwargs = placed
    return lambda: model(*args, **kwargs)


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Models in eval mode, without gradients; every module is in its own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
