"""One budget shared over layers and methods: one candidate per entry, the least total loss at a bounded total cost."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pquant_lightning.core.errors import BudgetError
from pquant_lightning.core.plan import Candidate

MAX_STATES = 1 << 21
"""Partial solutions the exact search may look at (about half a second); beyond, the bound of `allocate` holds."""

ROUNDING = 1e-12
"""Relative slack of the budget: sums of floats differ in their last bits by the order of their terms."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def allocate(
    choices: Mapping[str, Sequence[Candidate]], budget: float, cost: Callable[[Candidate], float]
) -> dict[str, Candidate]:
    """One candidate per entry with the smallest sum of losses whose costs sum to at most `budget`.

    This is the multiple-choice knapsack problem. The Lagrangian relaxation solves it exactly at certain budgets (the
    corners of the lower convex hulls of loss over cost, taken in the order of gain per cost). Between two such corners
    only candidates whose reduced cost is below the gain between them can take part; over those an exact search for
    all undominated sums runs. It is exact whenever it ends within `MAX_STATES` (usual up to some hundreds of
    entries); where it does not, it stops early, and the sum of losses is above the optimum by less than the gain of
    one step of one entry. More budget never gives a larger loss.

    Args:
        choices: per entry (a layer, a group) what it may become; `Candidate.loss` adds up over entries.
        budget: what the costs may sum to, in the unit of `cost`; met up to rounding (1e-12, relative).
        cost: what one candidate costs, >= 0 (`lambda candidate: candidate.size_bytes`); called once per candidate.

    Returns:
        The candidate chosen for each entry, in the order of `choices`.

    Raises:
        BudgetError: an entry offers nothing, a loss or cost is no finite number (or a cost is negative), or even the
            cheapest candidates cost more than `budget`; the message says what can be reached.

    References:
        Sinha and Zoltners (1979), "The multiple-choice knapsack problem"; Pisinger (1995), "A minimal algorithm for
        the multiple-choice knapsack problem": the same core, but searched for the whole interval between two corners
        instead of one budget, so that the result is monotone in the budget.

    >>> small, large = Candidate({"rank": 4}, 10, 0, loss=0.5), Candidate({"rank": 8}, 20, 0, loss=0.1)
    >>> chosen = allocate({"a": [small, large], "b": [small]}, 30, lambda candidate: candidate.size_bytes)
    >>> chosen["a"].options, chosen["b"].options
    ({'rank': 8}, {'rank': 4})
    """
    if not math.isfinite(budget):
        raise BudgetError(f"A budget is a finite number, got {budget!r}.")
    entries = list(choices.items())
    if not entries:
        return {}
    table = _table(entries, cost)
    cheapest = math.fsum(table.cost[table.start])
    if cheapest > budget + ROUNDING * abs(budget):
        raise BudgetError(
            f"The budget of {budget:g} cannot be met: the cheapest choices of the {len(entries)} entries cost "
            f"{cheapest:g} together. Give at least that, offer cheaper choices, or leave fewer layers to the budget."
        )
    rows = _search(table, budget + ROUNDING * abs(budget))
    return {name: offers[table.index[row]] for (name, offers), row in zip(entries, rows, strict=True)}


@dataclass(frozen=True)
class _Table:
    """The undominated candidates of all entries in one list, by entry and then by rising cost (and falling loss).

    Attributes:
        cost, loss: per row.
        entry: which entry a row belongs to; `start` is the first (cheapest) row of each entry.
        index: where the row's candidate stands among what its entry offers.
    """

    cost: Floats
    loss: Floats
    entry: Ints
    start: Ints
    index: list[int]


def _table(entries: list[tuple[str, Sequence[Candidate]]], cost: Callable[[Candidate], float]) -> _Table:
    costs: list[float] = []
    losses: list[float] = []
    index: list[int] = []
    owner: list[int] = []
    start: list[int] = []
    for number, (name, offers) in enumerate(entries):
        if not offers:
            raise BudgetError(f"{name!r} offers no choice; a budget needs at least one per entry (leave it out).")
        pairs = [(float(cost(offer)), float(offer.loss)) for offer in offers]
        for offer, (price, loss) in zip(offers, pairs, strict=True):
            if not (math.isfinite(price) and math.isfinite(loss)) or price < 0:
                raise BudgetError(
                    f"{name!r} offers {offer.options} at a cost of {price!r} with a loss of {loss!r}; both must be "
                    "finite numbers and the cost at least 0."
                )
        start.append(len(index))
        for row in undominated(pairs):
            costs.append(pairs[row][0])
            losses.append(pairs[row][1])
            index.append(row)
            owner.append(number)
    return _Table(np.array(costs), np.array(losses), np.array(owner), np.array(start), index)


def undominated(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (cost, loss) pairs that no other pair undercuts in both, by rising cost.

    >>> undominated([(3.0, 0.1), (1.0, 0.5), (2.0, 0.6)])
    [1, 0]
    """
    kept: list[int] = []
    for row in sorted(range(len(pairs)), key=pairs.__getitem__):
        if not kept or pairs[row][1] < pairs[kept[-1]][1]:
            kept.append(row)
    return kept


def _corners(cost: list[float], loss: list[float]) -> list[int]:
    """Positions on the lower convex hull of undominated points given by rising cost and falling loss."""
    hull: list[int] = []
    for row in range(len(cost)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (cost[row] - cost[b]) > (loss[b] - loss[row]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(row)
    return hull


def _steps(table: _Table) -> tuple[Floats, Floats, Ints]:
    """Every step from one corner to the next: `(cost, gain, row reached)`, most gain per cost first."""
    costs, losses = table.cost.tolist(), table.loss.tolist()
    bounds = [*table.start.tolist(), len(costs)]
    before: list[int] = []
    after: list[int] = []
    for first, last in itertools.pairwise(bounds):
        corners = [first + row for row in _corners(costs[first:last], losses[first:last])]
        before += corners[:-1]
        after += corners[1:]
    left, right = np.array(before, dtype=np.int64), np.array(after, dtype=np.int64)
    price, gain = table.cost[right] - table.cost[left], table.loss[left] - table.loss[right]
    order = np.argsort(-gain / price, kind="stable")
    return price[order], gain[order], right[order]


def _search(table: _Table, budget: float) -> list[int]:
    """The chosen row per entry: steps in order while they fit, then the exact search between the two corners."""
    price, gain, reached = _steps(table)
    spent = table.cost[table.start].sum() + np.cumsum(price)
    taken = int(np.searchsorted(spent, budget, side="right"))
    chosen = table.start.copy()
    # The later step of an entry comes later in the list, so the last write is the furthest corner.
    chosen[table.entry[reached[:taken]]] = reached[:taken]
    if taken < len(price):
        gap = budget - math.fsum(table.cost[chosen])
        for entry, row in _fill(table, chosen, price[taken], gain[taken], gap):
            chosen[entry] = row
    return [int(row) for row in chosen]


def _fill(table: _Table, chosen: Ints, price: float, gain: float, gap: float) -> list[tuple[int, int]]:
    """Changes of `chosen` that lower the loss most at no more than `gap`, as (entry, row).

    `price` and `gain` belong to the next step, which does not fit. Everything but the last selection depends on them
    alone and not on `gap`, so a larger gap selects from the same list.
    """
    slope = gain / price
    reduced = table.loss + slope * table.cost
    reduced -= np.minimum.reduceat(reduced, table.start)[table.entry]
    rows = np.flatnonzero((reduced < gain) | np.isin(np.arange(len(reduced)), chosen))
    core = _core(table, rows, reduced, chosen)
    cost, loss, rest = np.zeros(1), np.zeros(1), np.zeros(1)
    trail: list[tuple[int, Ints, Ints, Ints]] = []
    lowest = np.array([float((table.cost[group] - table.cost[chosen[entry]]).min()) for entry, group in core])
    remaining = np.append(np.cumsum(lowest[::-1])[::-1], 0.0)
    looked_at = 0
    for number, (entry, group) in enumerate(core):
        looked_at += len(cost) * len(group)
        if looked_at > MAX_STATES:
            break
        here = chosen[entry]
        cost = (cost[:, None] + (table.cost[group] - table.cost[here])).ravel()
        loss = (loss[:, None] + (table.loss[group] - table.loss[here])).ravel()
        rest = (rest[:, None] + reduced[group]).ravel()
        alive = np.flatnonzero((rest <= gain * (1 + ROUNDING)) & (cost + remaining[number + 1] <= price))
        alive = alive[np.lexsort((loss[alive], cost[alive]))]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], loss[alive][:-1])))
        alive = alive[loss[alive] < best_before]
        cost, loss, rest = cost[alive], loss[alive], rest[alive]
        trail.append((entry, group, alive // len(group), alive % len(group)))
    return _trace(trail, int(np.argmin(np.where(cost <= gap, loss, np.inf))))


def _core(table: _Table, rows: Ints, reduced: Floats, chosen: Ints) -> list[tuple[int, Ints]]:
    """The entries that still have a choice among `rows`, each with its rows; the most promising entries first."""
    groups = np.split(rows, np.flatnonzero(np.diff(table.entry[rows])) + 1)
    core = [(int(table.entry[group[0]]), group) for group in groups if len(group) > 1]
    return sorted(core, key=lambda pair: float(reduced[pair[1][pair[1] != chosen[pair[0]]]].min()))


def _trace(trail: list[tuple[int, Ints, Ints, Ints]], state: int) -> list[tuple[int, int]]:
    changes: list[tuple[int, int]] = []
    for entry, group, parent, pick in reversed(trail):
        changes.append((entry, int(group[pick[state]])))
        state = int(parent[state])
    return changes
