"""Which scores are dropped: exact counts, exact thresholds, ties, rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pquant_lightning.core.deploy import pack_bits, unpack_bits
from pquant_lightning.methods.pruning import _selection
from pquant_lightning.methods.pruning._selection import keep_largest, keep_largest_in_rows, kth_smallest

FEW = st.lists(st.integers(-3, 3), min_size=1, max_size=40)


@given(st.lists(FEW, min_size=1, max_size=4), st.floats(0, 1), st.booleans())
@settings(max_examples=200, deadline=None)
def test_exactly_the_smallest_are_dropped(values: list[list[int]], share: float, absolute: bool) -> None:
    scores = [torch.tensor(part, dtype=torch.float32) for part in values]
    everything = torch.cat(scores).abs() if absolute else torch.cat(scores)
    drop = int(share * everything.numel())

    kept = torch.cat(keep_largest(scores, drop, absolute))

    assert int((~kept).sum()) == drop
    expected = everything.sort().values
    assert torch.equal(everything[~kept].sort().values, expected[:drop])
    assert torch.equal(everything[kept].sort().values, expected[drop:])


def test_of_equal_values_the_first_are_dropped() -> None:
    first, second = keep_largest([torch.ones(2, 2), torch.ones(3)], 5)
    assert not first.any()
    assert second.tolist() == [False, True, True]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand, lambda n: torch.randn(n).round(decimals=1)])
def test_the_bracket_finds_the_threshold_of_millions(share: float, draw: object) -> None:
    torch.manual_seed(0)
    scores = [draw(700_001), draw(1_000_003)]  # type: ignore[operator]
    ordered = torch.cat(scores).abs().sort().values
    k = int(share * ordered.numel())
    value, ties = kth_smallest(scores, k, absolute=True)
    assert value == float(ordered[k - 1])
    assert ties == k - int((ordered < value).sum())


def test_a_bracket_that_misses_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_selection, "_bracket", lambda *args: (5.0, 6.0))
    scores = [torch.randn(2_000_000)]
    assert kth_smallest(scores, 1000)[0] == float(scores[0].kthvalue(1000).values)


def test_rows() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    mask = keep_largest_in_rows(scores, 2)
    assert mask[0].tolist() == [True, False, False, True]
    assert mask.sum(1).tolist() == [2, 2]
    assert keep_largest_in_rows(scores, 0).all()


@given(st.lists(st.booleans(), min_size=1, max_size=50))
@settings(deadline=None)
def test_bits(values: list[bool]) -> None:
    mask: Tensor = torch.tensor(values)
    bits = pack_bits(mask)
    assert bits.shape == (-(-len(values) // 8),)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)
