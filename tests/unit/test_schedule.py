"""Schedules: zero before the start, the target from the end on, never falling, and the published formulas between."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.schedule import scheduled

SHAPES = ["constant", "linear", "cubic", "cosine", "exponential", "steps"]
share = st.floats(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@settings(deadline=None, max_examples=50)
@given(bounds=st.tuples(share, share).map(sorted), target=st.floats(-5, 5), first=share, second=share)
def test_bounded_monotone_and_exact_at_both_ends(shape, bounds, target, first, second):
    start, end = bounds
    early, late = sorted((first, second))
    values = [scheduled(shape, p, target, start=start, end=end) for p in (early, late)]
    assert 0 <= abs(values[0]) <= abs(values[1]) + 1e-12
    assert abs(values[1]) <= abs(target) + 1e-12
    assert scheduled(shape, 1.0, target, start=start, end=end) == target
    assert scheduled(shape, end, target, start=start, end=end) == target
    if early < start:
        assert values[0] == 0


@pytest.mark.parametrize("progress", np.linspace(0.2, 0.7, 7))
def test_cubic_is_zhu_and_gupta_equation_1(progress):
    t, t0, span, initial, final = progress, 0.2, 0.5, 0.0, 0.9
    expected = final + (initial - final) * (1 - (t - t0) / span) ** 3
    assert scheduled("cubic", progress, final, start=t0, end=t0 + span) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "halfway"),
    [
        ("constant", 1.0),
        ("linear", 0.5),
        ("cubic", 0.875),
        ("cosine", 0.5),
        ("exponential", (1 - math.exp(-2.5)) / (1 - math.exp(-5))),
        ("steps", 0.75),
    ],
)
def test_value_halfway(shape, halfway):
    assert scheduled(shape, 0.5, 2.0) == pytest.approx(2 * halfway)


def test_steps_has_four_equal_jumps():
    values = {scheduled("steps", p, 1.0) for p in np.linspace(0, 1, 101)}
    assert values == {0.25, 0.5, 0.75, 1.0}


def test_start_equal_to_end_is_a_jump():
    assert scheduled("linear", 0.49, 1.0, start=0.5, end=0.5) == 0.0
    assert scheduled("linear", 0.50, 1.0, start=0.5, end=0.5) == 1.0


def test_unknown_shape_names_the_nearest():
    with pytest.raises(OptionError, match="'cubik'.*Did you mean 'cubic'"):
        scheduled("cubik", 0.5, 1.0)


@pytest.mark.parametrize(("start", "end"), [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_impossible_bounds(start, end):
    with pytest.raises(OptionError, match="0 <= start <= end <= 1"):
        scheduled("linear", 0.5, 1.0, start=start, end=end)
