"""`allocate` against brute force, its bound against the Lagrangian, its behaviour as the budget grows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pquant_lightning.core import budget as budget_module
from pquant_lightning.core.budget import allocate, undominated
from pquant_lightning.core.errors import BudgetError, PQuantError
from pquant_lightning.core.plan import Candidate


def size(candidate):
    return candidate.size_bytes


def total(chosen, key):
    return math.fsum(getattr(candidate, key) for candidate in chosen.values())


def brute_force(choices, budget):
    best = math.inf
    for picked in itertools.product(*choices.values()):
        if sum(candidate.size_bytes for candidate in picked) <= budget:
            best = min(best, math.fsum(candidate.loss for candidate in picked))
    return best


def instances(max_entries=5, max_offers=5):
    offer = st.builds(
        lambda cost, loss: Candidate({}, cost, 0, loss / 8), st.integers(0, 30), st.integers(0, 40)
    )  # coarse numbers: ties in cost, loss and slope are common
    offers = st.lists(offer, min_size=1, max_size=max_offers)
    entries = st.lists(offers, min_size=1, max_size=max_entries)
    return entries.map(lambda lists: {f"layer{number}": offers for number, offers in enumerate(lists)})


def random_instance(entries, offers, seed=0):
    """Falling losses over rising costs, convex only on average, as layers give them."""
    random = np.random.default_rng(seed)
    choices = {}
    for number in range(entries):
        costs = np.sort(random.integers(1, 2000, offers))
        losses = random.uniform(0.1, 3) * np.exp(-costs / random.uniform(200, 900)) * random.uniform(0.8, 1.2, offers)
        choices[f"layer{number}"] = [
            Candidate({"at": i}, int(c), 0, float(loss)) for i, (c, loss) in enumerate(zip(costs, losses, strict=True))
        ]
    return choices


def lagrangian_bound(choices, budget):
    """max over prices of  sum min(loss + price * cost) - price * budget: no choice within the budget is below it."""
    costs = np.array([[c.size_bytes for c in offers] for offers in choices.values()], float)
    losses = np.array([[c.loss for c in offers] for offers in choices.values()])

    def value(price):
        return (losses + price * costs).min(axis=1).sum() - price * budget

    low, high = 0.0, 1.0  # concave in the price: golden section by thirds
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if value(a) < value(b) else (low, b)
    return value(low)


@settings(max_examples=400, deadline=None)
@given(instances(), st.integers(0, 150))
def test_equals_brute_force(choices, budget):
    best = brute_force(choices, budget)
    if math.isinf(best):
        with pytest.raises(BudgetError):
            allocate(choices, budget, size)
    else:
        chosen = allocate(choices, budget, size)
        assert list(chosen) == list(choices)
        assert all(any(chosen[name] is offer for offer in choices[name]) for name in choices)
        assert total(chosen, "size_bytes") <= budget
        assert total(chosen, "loss") == pytest.approx(best, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(instances(max_entries=8, max_offers=6))
def test_more_budget_never_loses_more(choices):
    floor = sum(min(map(size, offers)) for offers in choices.values())
    losses = [total(allocate(choices, floor + extra, size), "loss") for extra in range(0, 100, 3)]
    assert losses == sorted(losses, reverse=True)


def test_more_budget_never_loses_more_where_the_search_stops_early(monkeypatch):
    monkeypatch.setattr(budget_module, "MAX_STATES", 60)
    choices = random_instance(40, 8, seed=3)
    floor = sum(min(map(size, offers)) for offers in choices.values())
    budgets = np.linspace(floor, 2.5 * floor, 120)
    losses = [total(allocate(choices, budget, size), "loss") for budget in budgets]
    assert losses == sorted(losses, reverse=True)
    monkeypatch.undo()
    exact = [total(allocate(choices, budget, size), "loss") for budget in budgets]
    assert all(a <= b + 1e-12 for a, b in zip(exact, losses, strict=True))
    assert any(a < b - 1e-9 for a, b in zip(exact, losses, strict=True)), "the early stop must have cost something"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_large_instances_stay_within_one_step_of_the_bound(share):
    choices = random_instance(300, 16, seed=1)
    low = sum(min(map(size, offers)) for offers in choices.values())
    high = sum(max(map(size, offers)) for offers in choices.values())
    budget = low + share * (high - low)
    chosen = allocate(choices, budget, size)
    assert total(chosen, "size_bytes") <= budget
    assert total(chosen, "loss") <= lagrangian_bound(choices, budget) * 1.001


def test_ten_thousand_entries_cost_one_look_each():
    choices = random_instance(10_000, 16, seed=2)
    calls = 0

    def counted(candidate):
        nonlocal calls
        calls += 1
        return candidate.size_bytes

    budget = 10_000 * 600
    chosen = allocate(choices, budget, counted)
    assert calls == 160_000
    assert budget * 0.999 < total(chosen, "size_bytes") <= budget
    assert total(chosen, "loss") <= lagrangian_bound(choices, budget) * 1.0001


def test_a_generous_budget_takes_the_least_loss_at_its_least_cost():
    offers = [Candidate({}, 50, 0, 0.1), Candidate({}, 10, 0, 0.1), Candidate({}, 5, 0, 0.4)]
    assert allocate({"a": offers}, 1e9, size)["a"] is offers[1]


def test_the_exact_cost_as_a_budget_is_enough_in_floats():
    choices = {f"layer{i}": [Candidate({}, 1, 0, 1.0), Candidate({}, 3, 0, 0.0)] for i in range(11)}
    chosen = allocate(choices, sum([0.1] * 11), lambda candidate: candidate.size_bytes / 10)
    assert {candidate.size_bytes for candidate in chosen.values()} == {1}


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(BudgetError, match="budget of 29 cannot be met.* cost 30 together") as caught:
        allocate({"a": [Candidate({}, 20, 0, 0.0)], "b": [Candidate({}, 10, 0, 0.0)]}, 29, size)
    assert isinstance(caught.value, PQuantError)


def test_bad_input_names_the_entry():
    with pytest.raises(BudgetError, match="'a' offers no choice"):
        allocate({"a": []}, 10, size)
    with pytest.raises(BudgetError, match=r"'a' offers \{'rank': 3\} .* loss of nan"):
        allocate({"a": [Candidate({"rank": 3}, 1, 0, math.nan)]}, 10, size)
    with pytest.raises(BudgetError, match="cost of -1.0"):
        allocate({"a": [Candidate({}, -1, 0, 0.5)]}, 10, size)
    with pytest.raises(BudgetError, match="finite number"):
        allocate({"a": [Candidate({}, 1, 0, 0.5)]}, math.nan, size)
    assert allocate({}, 0, size) == {}


def test_undominated_keeps_the_lower_left_border():
    assert undominated([(1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (3.0, 0.5)]) == [0, 3]
