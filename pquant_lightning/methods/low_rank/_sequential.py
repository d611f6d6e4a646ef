"""Compressing layers in the order in which they run, each fitted to what the compressed ones before it give."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import nn

from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.graph import trace
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.moments import collect_moments, has_moments
from pquant_lightning.core.plan import CompressionPlan, LayerPlan

Apply = Callable[[nn.Module, CompressionPlan, CompressionContext], None]


def apply_in_order(
    apply: Apply, model: nn.Module, plan: CompressionPlan, samples: Samples, context: CompressionContext
) -> None:
    """Applies a plan group by group; each group's moments compare its inputs with those in the uncompressed model.

    Args:
        apply: changes the layers of a plan, with moments in `context.notes["source"]`.
        model: changed in place.
        plan: the layers; those which the samples do not reach come last, without moments.
        samples: what both models are run on, twice per group (as they are, and as far as they are compressed).
        context: of `apply`.
    """
    original = share_copy(model)
    entries = {entry.name: replace(entry, scratch=None) for entry in plan.layers}
    for group in context.track(list(_groups(model, samples, entries)), "low_rank: fitting in order"):
        names = [name for name in group if has_moments(_ordinary(model, name))]
        found = collect_moments(model, names, samples, reference=original) if names else {}
        for name in group:  # the bias is corrected in place, and the original keeps its own
            twin = original.get_submodule(name)
            if isinstance(bias := getattr(twin, "bias", None), nn.Parameter):
                setattr(twin, "bias", nn.Parameter(bias.detach().clone(), bias.requires_grad))  # noqa: B010
        part = replace(plan, layers=tuple(entries[name] for name in group))
        apply(model, part, replace(context, track=lambda items, _: items, notes={**context.notes, "source": found}))


def _groups(model: nn.Module, samples: Samples, entries: dict[str, LayerPlan]) -> Iterable[list[str]]:
    """Layers in the order in which they run, those that read the same tensor together; unreached ones last."""
    groups: list[list[str]] = []
    seen: set[str] = set()
    read = None
    for name, inputs, _ in trace(model, samples).calls:
        if name not in entries or name in seen:
            continue
        seen.add(name)
        if groups and inputs[:1] == read:
            groups[-1].append(name)
        else:
            groups.append([name])
        read = inputs[:1]
    unreached = [name for name in entries if name not in seen]
    return [*groups, unreached] if unreached else groups


def _ordinary(model: nn.Module, name: str) -> nn.Module:
    layer = as_torch(model.get_submodule(name))
    assert layer is not None, name
    return layer
