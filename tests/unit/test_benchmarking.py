"""Timing and memory: the statistics by a clock of our own, the order of calls, bytes counted by hand."""

import itertools

import pytest
import torch
from torch import nn

from pquant_lightning.core.errors import OptionError
from pquant_lightning.utils.benchmarking import Timing, benchmark_models, measure_latency, peak_bytes


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_contenders_take_turns_and_the_medians_are_theirs() -> None:
    clock, calls = Clock(), []
    spent = {"slow": itertools.cycle([0.030, 0.031, 0.5]), "fast": itertools.cycle([0.010, 0.010, 0.011])}

    def run(name: str) -> None:
        calls.append(name)
        clock.now += next(spent[name])

    found = measure_latency({n: lambda n=n: run(n) for n in spent}, seconds=1.0, warmup=3, clock=clock)
    assert calls[6:10] == ["slow", "fast", "fast", "slow"]  # after the warm-up, each round begins with another
    assert found["slow"].median_ms == pytest.approx(31.0)
    assert found["fast"].median_ms == pytest.approx(10.0)
    assert found["slow"].runs == found["fast"].runs == (len(calls) - 6) // 2


def test_at_least_nine_rounds_and_then_until_the_time_is_up() -> None:
    clock = Clock()

    def run() -> None:
        clock.now += 1.0

    assert measure_latency({"a": run}, seconds=0.0, clock=clock)["a"].runs == 9
    assert measure_latency({"a": run}, seconds=20.0, clock=clock)["a"].runs == 20


def test_the_interval_covers_the_median_of_most_samples() -> None:
    torch.manual_seed(0)
    inside = 0
    for _ in range(300):
        timing = Timing.of(torch.randn(41).add(10).tolist())
        inside += timing.low_ms <= 10_000 <= timing.high_ms
    assert 0.92 <= inside / 300 <= 0.995


def test_peak_of_live_tensors() -> None:
    def chain() -> torch.Tensor:
        x = torch.zeros(1000)  # 4000 bytes
        x = x + 1  # two of them at a time
        return x.view(10, 100) + 1  # a view takes nothing

    assert peak_bytes(chain) == 8000

    def in_place() -> torch.Tensor:
        return torch.zeros(1000).add_(1).mul_(2)

    assert peak_bytes(in_place) == 4000


def test_weights_and_inputs_are_not_counted() -> None:
    layer, x = nn.Linear(100, 50), torch.zeros(4, 100)
    with torch.no_grad():
        assert peak_bytes(lambda: layer(x)) == 4 * 50 * 4


def test_models_side_by_side() -> None:
    models = {"wide": nn.Linear(256, 512).train(), "narrow": nn.Linear(256, 8)}
    report = benchmark_models(models, (torch.zeros(16, 256),), seconds=0.01)
    assert report.batch_size == 16
    assert report.models["wide"].peak_bytes == 16 * 512 * 4
    assert report.models["narrow"].peak_bytes == 16 * 8 * 4
    assert report.speed_up("wide") == 1.0
    assert models["wide"].training
    assert "narrow" in str(report)
    data = report.to_dict()
    wide = data["models"]["wide"]
    assert wide["throughput"] == pytest.approx(16_000 / wide["latency"]["median_ms"])


def test_nothing_to_measure() -> None:
    with pytest.raises(OptionError, match="at least one contender"):
        measure_latency({})
