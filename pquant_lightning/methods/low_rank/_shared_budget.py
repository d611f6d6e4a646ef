"""One budget over all layers: each gets the rank at which the sum of their losses is least."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pquant_lightning.core.budget import allocate
from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import BudgetError
from pquant_lightning.core.plan import Candidate, LayerPlan
from pquant_lightning.methods.low_rank._choices import macs_per_position
from pquant_lightning.methods.low_rank._layers import find_low_rank_kind, low_rank_spec

BUDGETS = ("params", "macs", "error")


def allowed_offers(
    layers: Mapping[str, Any], offers: Mapping[str, Sequence[Candidate]], min_saving: float
) -> dict[str, list[Candidate]]:
    """Of what the layers may become, what saves enough of their bytes; layers for which nothing does are missing."""
    allowed = {}
    for name, layer in layers.items():
        whole, weight = stored_bytes(layer), _dense(layer).size_bytes
        most = (1 - min_saving) * whole - (whole - weight) if min_saving > 0 else math.inf
        if kept := [offer for offer in offers[name] if offer.size_bytes <= most]:
            allowed[name] = kept
    return allowed


def probe_of(layer: Any, offers: Sequence[Candidate], budget: Mapping[str, float]) -> Candidate:
    """The choice at which a layer is tried: about the size it will have, but not one that loses nothing."""
    quantity, share = next(iter(budget.items()))
    size = (0.5 if quantity == "error" else share) * _dense(layer).size_bytes
    lossy = [offer for offer in offers if offer.loss > 1e-6] or offers
    return min(lossy, key=lambda offer: abs(offer.size_bytes - size))


def share_budget(
    budget: Mapping[str, float],
    layers: Mapping[str, Any],
    offers: Mapping[str, Sequence[Candidate]],
    positions: Mapping[str, int],
    weights: Mapping[str, float],
) -> dict[str, LayerPlan]:
    """What becomes of each layer; layers that are best left dense are missing.

    Args:
        budget: `{"params": share kept}`, `{"macs": share kept}` or `{"error": relative error allowed}`.
        layers: ordinary layers by name.
        offers: what each of them may become.
        positions: at how many positions each is used; multiply-accumulates count so often.
        weights: how much the loss of each counts in the sum.

    Raises:
        BudgetError: even the lowest ranks take more, with the share that can be reached.
    """
    quantity, share = next(iter(budget.items()))
    choices = {
        name: [
            replace(offer, macs=offer.macs * positions[name], loss=offer.loss * weights[name])
            for offer in (_dense(layers[name]), *own)
        ]
        for name, own in offers.items()
    }
    chosen = _smallest(choices, share) if quantity == "error" else _best(choices, quantity, share)
    return {
        name: LayerPlan(
            name,
            low_rank_spec(layers[name], choice.options["rank"], find_low_rank_kind(choice.options["kind"])),
        )
        for name, choice in chosen.items()
        if choice.options
    }


def _dense(layer: Any) -> Candidate:
    weight = weight_of(layer)
    return Candidate({}, weight.numel() * weight.element_size(), macs_per_position(layer, None, 1), 0.0)


def _best(choices: Mapping[str, Sequence[Candidate]], quantity: str, share: float) -> dict[str, Candidate]:
    """The least sum of losses within a share of the parameters or multiply-accumulates."""

    def cost(candidate: Candidate) -> float:
        return candidate.size_bytes if quantity == "params" else candidate.macs

    whole = sum(cost(offers[0]) for offers in choices.values())
    least = sum(min(map(cost, offers)) for offers in choices.values())
    if least > share * whole:
        raise BudgetError(
            f"low_rank: budget={{{quantity!r}: {share}}} cannot be met: with every layer at its lowest rank "
            f"{least / whole:.2%} are kept. Allow at least that."
        )
    return allocate(choices, share * whole, cost)


def _smallest(choices: Mapping[str, Sequence[Candidate]], error: float) -> dict[str, Candidate]:
    """The least bytes at which the sum of the weighted losses is at most the square of the error."""
    swapped = {
        name: [Candidate({"at": at}, 0, 0, loss=offer.size_bytes) for at, offer in enumerate(offers)]
        for name, offers in choices.items()
    }
    lost = {id(twin): choices[name][at].loss for name, offers in swapped.items() for at, twin in enumerate(offers)}
    chosen = allocate(swapped, error**2, lambda candidate: lost[id(candidate)])
    return {name: choices[name][twin.options["at"]] for name, twin in chosen.items()}
