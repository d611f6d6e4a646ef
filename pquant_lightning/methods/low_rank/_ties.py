"""Layers that share a weight, an embedding and a head: they go on sharing the large factor of it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.compression_method import CompressionContext, LayerMethod
from pquant_lightning.core.plan import CompressionPlan, LayerPlan, Skip
from pquant_lightning.core.splitting import split_view


class TyingMethod(LayerMethod):
    """Base of methods whose layers hold a weight as left @ right and can share `left`, their `tied_parameters`.

    Args:
        factorize_ties: whether layers that share their weights are changed.
    """

    factorize_ties: bool = False

    @property
    def changes_shared(self) -> bool:
        return self.factorize_ties

    def plan(self, model: nn.Module, context: CompressionContext | None = None) -> CompressionPlan:
        plan = super().plan(model, context)
        return _with_ties(model, plan) if self.factorize_ties else plan

    def apply(self, model: nn.Module, plan: CompressionPlan, context: CompressionContext | None = None) -> None:
        super().apply(model, plan, context)
        tie_factors(model, plan)

    def apply_structure(self, model: nn.Module, plan: CompressionPlan) -> None:
        super().apply_structure(model, plan)
        tie_factors(model, plan)


@torch.no_grad()
def tie_factors(model: nn.Module, plan: CompressionPlan) -> None:
    """Ties what the plan says is tied, as far as the layers have been changed already; idempotent."""
    for entry in plan.layers:
        for own, target in entry.spec.get("tied_to", {}).items():
            owner = model.get_submodule(target.removesuffix(".weight").rpartition(".")[0])
            if isinstance(owner, CompressedLayer) and isinstance(model.get_submodule(entry.name), CompressedLayer):
                _tie(model, entry.name, own, target)


def _with_ties(model: nn.Module, plan: CompressionPlan) -> CompressionPlan:
    """The plan with `tied_to` in the specs of all but the first layer of each shared weight, and one rank for all.

    Where not all layers of a weight can be changed alike, they are left alone.
    """
    view = split_view(model)
    entries = {entry.name: entry for entry in plan.layers}
    holders: dict[int, list[str]] = {}
    for name, module in view.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    skipped = list(plan.skipped)
    for names in [names for names in holders.values() if len(names) > 1 and any(name in entries for name in names)]:
        if (reason := _why_not_tied(view, names, entries)) is not None:
            dropped = [name for name in names if entries.pop(name, None) is not None]
            skipped += [Skip(name, reason, plan.by) for name in dropped]
            continue
        rank = min(entries[name].spec["rank"] for name in names)
        for name in names:
            entry = entries[name]
            if entry.spec["rank"] != rank:
                entries[name] = LayerPlan(name, {**entry.spec, "rank": rank})
        owner, *others = names
        target = f"{owner}.{_left_of(entries[owner])}"
        for name in others:
            entry = entries[name]
            spec = {**entry.spec, "tied_to": {_left_of(entry): target}}
            entries[name] = LayerPlan(name, spec, entry.scratch)
    kept = tuple(entries[entry.name] for entry in plan.layers if entry.name in entries)
    return dataclasses.replace(plan, layers=kept, skipped=tuple(skipped))


def _why_not_tied(view: nn.Module, names: list[str], entries: dict[str, LayerPlan]) -> str | None:
    if missing := [name for name in names if name not in entries]:
        return f"shares a parameter with {missing[0]!r}, which is not factorized with it"
    first = view.get_submodule(names[0]).get_parameter("weight")
    for name in names:
        if view.get_submodule(name)._parameters.get("weight") is not first:
            return f"shares more than its weight with {names[0]!r}"
        if not CompressedLayer.kinds[entries[name].spec["kind"]].tied_parameters:
            return f"shares its weight with {names[0]!r}, and layers of this type cannot share a factor"
    return None


def _left_of(entry: LayerPlan) -> str:
    (left,) = CompressedLayer.kinds[entry.spec["kind"]].tied_parameters
    return left


def _tie(model: nn.Module, name: str, own: str, target: str) -> None:
    """Gives a filled layer the owner's left factor, and the right one that fits it best to what it was filled with."""
    layer: Any = model.get_submodule(name)
    shared = model.get_parameter(target)
    left, right = layer.factors()
    fitted: Tensor = torch.linalg.pinv(shared.double()) @ (left[0] @ right[0]).double()
    layer.set_factors(left, fitted.to(right.dtype)[None])
    holder, _, attribute = own.rpartition(".")
    setattr(layer.get_submodule(holder), attribute, shared)
