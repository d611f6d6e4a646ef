"""Timing logic by a clock of its own, intervals by the binomial distribution, memory by counting bytes by hand."""

import json
from math import comb

import pytest
import torch
from torch import nn

from pquant_lightning import PQuantError
from pquant_lightning.utils.benchmarking import Estimate, Timing, benchmark_models, measure, peak_bytes


class Machine:
    """A clock that only its own calls advance; they are noted in order."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def clock(self) -> float:
        return self.now

    def takes(self, name, *seconds):
        """A contender that takes these seconds in turn."""
        turns = iter([])

        def call():
            nonlocal turns
            self.calls.append(name)
            step = next(turns, None)
            if step is None:
                turns = iter(seconds)
                step = next(turns)
            self.now += step

        return call


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (30, 10), (100, 40)])
def test_interval_of_the_median_by_order_statistics(n, rank):
    found = Estimate.of([float(i) for i in range(n, 0, -1)])
    assert (found.low, found.high) == (rank, n + 1 - rank)
    covered = 1 - 2 * sum(comb(n, k) for k in range(rank)) / 2**n
    narrower = 1 - 2 * sum(comb(n, k) for k in range(rank + 1)) / 2**n
    assert narrower < 0.95
    assert covered >= 0.95 or n < 6


def test_contenders_take_turns_and_each_round_starts_with_another():
    machine = Machine()
    runs = {name: machine.takes(name, 0.01) for name in "abc"}
    measure(runs, min_rounds=4, max_rounds=4, warm_up=2, clock=machine.clock)
    assert "".join(machine.calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_times_medians_and_ratios_are_those_of_the_clock():
    machine = Machine()
    runs = {"a": machine.takes("a", 0.010), "b": machine.takes("b", 0.005)}
    times = measure(runs, clock=machine.clock)
    assert times["a"].median_ms == pytest.approx(10)
    assert times["b"].relative_to(times["a"]).median == pytest.approx(0.5)
    assert len(times["a"].rounds_ms) == 7  # nothing varies: the least number of rounds


def test_warm_up_is_not_timed():
    machine = Machine()
    first = machine.takes("a", 5.0, *[0.01] * 50)
    assert measure({"a": first}, warm_up=1, max_rounds=9, clock=machine.clock)["a"].median_ms == pytest.approx(10)


def test_noise_asks_for_more_rounds():
    def rounds(**options):
        machine = Machine()
        noisy = machine.takes("a", *[0.010, 0.014, 0.011, 0.013, 0.012])
        return len(measure({"a": noisy}, clock=machine.clock, **options)["a"].rounds_ms)

    assert rounds(precision=0.5) == 7
    assert 7 < rounds(precision=0.05) < 101
    assert rounds(precision=0.0) == 101
    assert rounds(precision=0.0, max_rounds=20) == 20
    assert rounds(precision=0.0, max_seconds=0.1, max_rounds=50) == 9  # 12 ms each


def test_short_calls_are_repeated_within_a_round():
    machine = Machine()
    times = measure({"a": machine.takes("a", 0.0005)}, min_round_ms=2.0, warm_up=1, max_rounds=7, clock=machine.clock)
    assert len(machine.calls) == 1 + 7 * 4
    assert times["a"].median_ms == pytest.approx(0.5)


def test_a_ratio_is_paired():
    slowing, twice = Timing((1.0, 2.0, 4.0)), Timing((2.0, 4.0, 8.0))
    assert twice.relative_to(slowing) == Estimate(2.0, 2.0, 2.0)
    with pytest.raises(PQuantError, match="one call of measure"):
        twice.relative_to(Timing((1.0,)))


def test_spread_is_the_interquartile_range():
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).spread_ms == 2.0
    assert Timing((1.0,)).spread_ms == 0.0


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(100)  # 400 bytes, there before

    def chain():
        y = x + 1  # 400
        z = y * 2  # 800
        del y
        return z.view(10, 10)[2:].add_(1) + 0  # 400 + 320: views and in-place writes take nothing

    assert peak_bytes(chain) == 800
    assert peak_bytes(lambda: x.view(10, 10).t()) == 0
    assert peak_bytes(lambda: x.chunk(2)) == 0


def test_models_on_the_same_inputs():
    large = nn.Sequential(nn.Linear(8, 400), nn.Dropout(0.5), nn.Linear(400, 4)).train()
    small = nn.Sequential(nn.Linear(8, 4))
    report = benchmark_models({"original": large, "small": small}, (torch.ones(5, 8),), max_rounds=7)
    assert report.batch_size == 5
    weights = (8 * 400 + 400 + 400 * 4 + 4) * 4
    assert report.models["original"].peak_memory_bytes == weights + 5 * (400 + 4) * 4
    assert large.training  # as before
    assert large[1].training
    original = report.models["original"]
    assert original.samples_per_second == pytest.approx(5000 / original.timing.median_ms)
    assert report.relative_time("original") == Estimate(1.0, 1.0, 1.0)
    assert "small" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["models"]["small"]["rounds"] == 7


def test_keyword_inputs_and_precision():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, shift):
            assert not torch.is_grad_enabled()
            return self.layer(x) + shift

    halved = Named().to(torch.bfloat16)  # float32 inputs are cast, as in calibration
    inputs = {"x": torch.ones(3, 4), "shift": torch.ones(2)}
    assert benchmark_models({"a": Named(), "b": halved}, inputs, max_rounds=7).batch_size == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure({}), "at least one contender"),
        (lambda: measure({"a": int}, min_rounds=5, max_rounds=3), "min_rounds <= max_rounds"),
        (lambda: measure({"a": int}, warm_up=0), "warm_up >= 1"),
        (lambda: benchmark_models({}, torch.ones(1)), "at least one model"),
        (lambda: benchmark_models({"a": nn.Linear(3, 3)}, torch.ones(2, 4)), "cannot be run"),
        (
            lambda: benchmark_models({"small": nn.Linear(3, 3)}, torch.ones(2, 3), max_rounds=7).relative_time("smal"),
            "Did you mean 'small'",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(PQuantError, match=message):
        call()
