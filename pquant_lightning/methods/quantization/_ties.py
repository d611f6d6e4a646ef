"""Weights that several layers share: all of them are quantized, to the same codes, or none."""

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from pquant_lightning.core.compression_method import matches
from pquant_lightning.core.deploy import deployed_bytes
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.plan import CompressionPlan
from pquant_lightning.core.surgery import get_layer

log = logging.getLogger(__name__)

Ties = Mapping[int, tuple[str, ...]]  # id of a weight -> names of the modules that share it, two or more
Overrides = Mapping[str, Mapping[str, int]]


def shared_weights(modules: Mapping[str, nn.Module]) -> Ties:
    """The weights that are the `weight` of several modules."""
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = dict(module.named_parameters(recurse=False)).get("weight")  # its own, not that of a layer inside
        if weight is not None:
            users.setdefault(id(weight), []).append(name)
    return {key: tuple(names) for key, names in users.items() if len(names) > 1}


def others(layer: nn.Module, name: str, ties: Ties) -> tuple[str, ...]:
    """Names of the other modules that have the weight of this layer."""
    return tuple(other for other in ties.get(id(getattr(layer, "weight", None)), ()) if other != name)


def weight_bits(options: Mapping[str, int]) -> int | None:
    """Bits of the weight that one of the `overrides` gives."""
    return options.get("weight_bits") or options.get("bits")


def warn_of_contradictions(ties: Ties, overrides: Overrides) -> None:
    """Says where overrides give one weight different bits under the names of its layers."""
    for names in ties.values():
        given = {}
        for name in names:
            found = [bits for pattern, o in overrides.items() if matches(name, pattern) and (bits := weight_bits(o))]
            if found:
                given[name] = found[-1]
        if len(set(given.values())) > 1:
            matching = [o for p, o in overrides.items() if weight_bits(o) and any(matches(name, p) for name in names)]
            log.warning(
                "%s share one weight, and overrides give it %s bits: it has %s, by the last pattern that matches.",
                " and ".join(map(repr, names)),
                " and ".join(f"{bits} ({name!r})" for name, bits in given.items()),
                weight_bits(matching[-1]),
            )


def losing(model: nn.Module, plan: CompressionPlan, ties: Ties, least_saving: float) -> dict[str, str]:
    """Planned layers that would make the model larger, each with the reason.

    A weight that stays in floating point in one of its layers is stored all the same, and the codes come on top; layers
    whose channels lie along different dimensions have codes of their own.

    Args:
        model: what the plan is of.
        plan: layers, all on their own smaller.
        ties: weights that are shared.
        least_saving: share of the weight's bytes that must go.
    """
    specs = {entry.name: entry.spec for entry in plan.layers}
    found: dict[str, str] = {}
    for names in ties.values():
        planned = [name for name in names if name in specs]
        left = [name for name in names if name not in specs]
        for name in planned if left else ():
            found[name] = (
                f"shares its weight with {left[0]!r}, which stays in floating point, so that both would be stored "
                "(min_saving=0 quantizes it all the same)"
            )
        if planned and not left and (reason := _why_apart(model, planned, specs, least_saving)) is not None:
            found.update(dict.fromkeys(planned, reason))
    return found


def _why_apart(
    model: nn.Module, names: Sequence[str], specs: Mapping[str, dict[str, object]], least_saving: float
) -> str | None:
    """Why layers that share a weight, and not its codes, do not get smaller; None where they do."""
    layers = {name: as_torch(get_layer(model, name)) for name in names}
    by_axis: dict[bool, int] = {}
    for name, layer in layers.items():
        assert layer is not None
        by_axis.setdefault("Transpose" in type(layer).__name__, deployed_bytes(dict(specs[name]), layer))
    weight = layers[names[0]].weight  # type: ignore[union-attr]
    assert isinstance(weight, nn.Parameter)
    before, after = weight.numel() * weight.element_size(), sum(by_axis.values())
    if len(by_axis) == 1 or after <= (1 - least_saving) * before:
        return None
    return (
        f"shares its weight with {' and '.join(map(repr, names[1:]))} of another layout: their codes would take "
        f"{after:,} bytes instead of {before:,}"
    )
