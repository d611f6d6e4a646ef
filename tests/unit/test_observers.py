"""From measured inputs to the range of their codes, against direct computations on the values themselves."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pquant_lightning.core.affine import affine_scale, fake_quantize_activation, make_grid
from pquant_lightning.core.calibration import MOVING_AVERAGE, InputStatistics, Samples, collect_inputs
from pquant_lightning.methods.quantization._observers import Observer, choose_range

BINS = 2048
OBSERVERS = get_args(Observer)


def measured(*batches: Tensor) -> InputStatistics:
    """What calibration says of these batches `(count, 1)`."""
    model = nn.Sequential(nn.Linear(1, 1))
    return collect_inputs(model, ["0"], Samples(tuple(batches), lambda m, batch: m(batch)), BINS)["0"]


def column(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1)


def error(x: Tensor, limits: tuple[float, float], bits: int) -> float:
    """Mean squared error of the values rounded over this range."""
    scale, zero_point = affine_scale(torch.tensor(limits[0]), torch.tensor(limits[1]), bits)
    return float((fake_quantize_activation(x, make_grid(scale, zero_point, bits)) - x).square().mean())


@pytest.fixture(scope="module")
def normal() -> Tensor:
    return torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def outlier(normal: Tensor) -> Tensor:
    return torch.cat([normal, column([60.0])])


@pytest.fixture(scope="module")
def relu(normal: Tensor) -> Tensor:
    return normal.relu()


@pytest.mark.parametrize("bits", [4, 8])
def test_minmax(bits: int) -> None:
    found = measured(column([-2.0, 1.0]), column([0.5, 7.0]))
    assert choose_range(found, "minmax", bits) == (-2.0, 7.0)


def test_moving_average() -> None:
    found = measured(column([-2.0, 1.0]), column([0.0, 11.0]), column([-7.0, 1.0]))
    low = [-2.0, -2 + MOVING_AVERAGE * 2]
    low.append(low[-1] + MOVING_AVERAGE * (-7 - low[-1]))
    high = 1 + MOVING_AVERAGE * 10
    high = high + MOVING_AVERAGE * (1 - high)
    assert choose_range(found, "moving_average", 8) == pytest.approx((low[-1], high))


def test_percentile_is_that_of_numpy() -> None:
    x = column(np.random.default_rng(0).standard_t(3, 200_000))
    low, high = choose_range(measured(x), "percentile", 8)
    width = float(x.max() - x.min()) / BINS
    expected = np.percentile(x.numpy(), [0.001, 99.999])
    assert x.min() < low
    assert high < x.max()
    assert (low, high) == pytest.approx(expected, abs=2 * width)


def test_percentile_clips_outliers_where_they_are_few() -> None:
    body = torch.rand(250_000, 1)
    low, high = choose_range(measured(torch.cat([body, column([-100.0, 1000.0])])), "percentile", 8)
    assert -1 <= low <= 0
    assert 0.9 < high < 2  # a bin is about half a unit wide
    low, high = choose_range(measured(torch.cat([body[:1000], column([-100.0, 1000.0])])), "percentile", 8)
    assert (low, high) == pytest.approx((-100, 1000), abs=1)  # two of a thousand are no outliers at 99.999 %


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("observer", ["mse", "histogram"])
@pytest.mark.parametrize("data", ["normal", "outlier", "relu"])
def test_least_squares_is_at_least_as_good_as_minmax(
    data: str, observer: Observer, bits: int, request: pytest.FixtureRequest
) -> None:
    x = request.getfixturevalue(data)
    found = measured(x)
    assert error(x, choose_range(found, observer, bits), bits) <= 1.02 * error(x, (found.minimum, found.maximum), bits)


@pytest.mark.parametrize("observer", ["mse", "histogram"])
def test_least_squares_clips_an_outlier_where_bits_are_few(observer: Observer, outlier: Tensor) -> None:
    found = measured(outlier)
    minmax = error(outlier, (found.minimum, found.maximum), 4)
    assert error(outlier, choose_range(found, observer, 4), 4) < 0.5 * minmax
    reach = {bits: choose_range(found, observer, bits)[1] for bits in (4, 8)}
    assert reach[4] < reach[8]  # more bits can afford a wider range
    assert reach[4] < 20


def test_mse_is_the_best_of_its_grid(outlier: Tensor) -> None:
    """An exhaustive search over shrunk ranges, on the values themselves, finds no better one."""
    found = measured(outlier)
    shares = torch.linspace(0.04, 1, 25).tolist()
    best = min(error(outlier, (found.minimum * s, found.maximum * s), 4) for s in shares)
    assert error(outlier, choose_range(found, "mse", 4), 4) <= 1.05 * best


def test_histogram_shrinks_each_end_by_itself() -> None:
    """An outlier on one side only: one factor for both ends must give up values on the other side."""
    x = torch.cat([-torch.rand(5000, 1), column([10.0])])
    found = measured(x)
    both, each = (choose_range(found, observer, 3) for observer in ("mse", "histogram"))
    assert error(x, each, 3) < 0.5 * error(x, both, 3)
    assert each[0] < -0.8
    assert each[1] < 5


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_clips_outliers(bits: int, normal: Tensor) -> None:
    x = torch.cat([normal, column([60.0, -60.0])])
    low, high = choose_range(measured(x), "entropy", bits)
    assert -10 < low < -2
    assert 2 < high < 10
    body = error(normal, (low, high), bits)
    assert body < error(normal, (-60.0, 60.0), bits) / 10


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_keeps_a_normal_distribution(bits: int, normal: Tensor) -> None:
    found = measured(normal)
    minmax = error(normal, (found.minimum, found.maximum), bits)
    assert error(normal, choose_range(found, "entropy", bits), bits) <= 1.02 * minmax


def test_entropy_on_what_relu_gives(relu: Tensor) -> None:
    """Half of the values are zero; that must not be paid for by all values beyond 1.5 of 4.1."""
    found = measured(relu)
    errors = {bits: error(relu, choose_range(found, "entropy", bits), bits) for bits in (4, 8)}
    assert errors[8] < errors[4]
    assert errors[8] < 10 * error(relu, (found.minimum, found.maximum), 8)


def test_entropy_is_wider_with_more_bits(normal: Tensor) -> None:
    found = measured(normal)
    (low4, high4), (low8, high8) = (choose_range(found, "entropy", bits) for bits in (4, 8))
    assert high8 - low8 > high4 - low4


def test_entropy_keeps_a_uniform_distribution() -> None:
    """Clipping would pile up mass at the ends of a flat distribution."""
    found = measured(column(np.linspace(-1, 1, 40_000)))
    assert choose_range(found, "entropy", 8) == pytest.approx((-1, 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_no_observer_leaves_the_extremes(observer: Observer, bits: int, normal: Tensor, relu: Tensor) -> None:
    for x in (normal, relu, -relu, normal + 10):
        found = measured(x)
        low, high = choose_range(found, observer, bits)
        assert low < high or bits == 2
        width = (found.maximum - found.minimum) / BINS
        assert found.minimum - width <= min(low, 0) + max(found.minimum, 0)
        assert max(high, 0) <= max(found.maximum, 0) + width


@pytest.mark.parametrize("observer", OBSERVERS)
def test_more_bits_lose_less(observer: Observer, normal: Tensor, outlier: Tensor) -> None:
    for x in (normal, outlier):
        errors = [error(x, choose_range(measured(x), observer, bits), bits) for bits in (2, 4, 8)]
        assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_constant_input(observer: Observer, value: float) -> None:
    x = torch.full((10, 1), value)
    limits = choose_range(measured(x), observer, 8)
    assert limits == (value, value)
    assert error(x, limits, 8) < 1e-12


@pytest.mark.parametrize("observer", OBSERVERS)
def test_inputs_that_are_all_of_one_sign(observer: Observer, relu: Tensor) -> None:
    """Zero is in every range, so that half of a grid is not spent on values that never come."""
    low, high = choose_range(measured(relu), observer, 8)
    assert low == pytest.approx(0, abs=0.01)
    assert error(relu, (low, high), 8) < (1e-3 if observer != "entropy" else 0.1)
    low, high = choose_range(measured(-relu), observer, 8)
    assert high == pytest.approx(0, abs=0.01)
    low, high = choose_range(measured(relu + 3), observer, 8)
    assert high > 3
    assert error(relu + 3, (low, high), 8) < (1e-3 if observer != "entropy" else 0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_two_values(observer: Observer) -> None:
    x = column([0.0] * 50 + [3.0] * 50)
    assert error(x, choose_range(measured(x), observer, 8), 8) < 1e-3
