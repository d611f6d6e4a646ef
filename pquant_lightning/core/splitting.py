"""Fused layers, which hold several projections in one weight, are split so that any method can change the parts.

They are `nn.MultiheadAttention` and torch's recurrent layers. A method plans on a view of the model in which the parts
are Linear layers (`split_view`); where it changes one of them, the layer itself is replaced by `UnfusedAttention` or
`UnfusedRecurrent`.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pquant_lightning.core.attention import PROJECTIONS, UnfusedAttention
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import ModelError, a_or_an
from pquant_lightning.core.layer_adapter import FUSED, layer_spec
from pquant_lightning.core.plan import LayerPlan
from pquant_lightning.core.recurrent import UnfusedRecurrent, recurrent_parts
from pquant_lightning.core.surgery import get_layer, replace_layer

log = logging.getLogger(__name__)


def _parts(layer: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By a parameter of the fused layer, what it is cut into, in equal parts along dimension 0; others keep their name.

    Args:
        layer: what `layer_spec` says of it.
    """
    if layer["type"] != "MultiheadAttention":
        return {own: (part,) for own, part in recurrent_parts(dict(layer)).items()}
    found = {"in_proj_bias": tuple(f"{name}.bias" for name in PROJECTIONS)}
    if layer["kdim"] == layer["vdim"] == layer["embed_dim"]:
        return {**found, "in_proj_weight": tuple(f"{name}.weight" for name in PROJECTIONS)}
    return {**found, **{f"{name}_weight": (f"{name}.weight",) for name in PROJECTIONS}}


def _unfuse(fused: nn.Module, spec: dict[str, Any], *, share_memory: bool) -> CompressedLayer:
    new = CompressedLayer.build(spec, share_copy(fused, "meta") if share_memory else fused)
    parts = _parts(layer_spec(fused))
    with torch.no_grad():
        for own, whole in fused.named_parameters():
            names = parts.get(own, (own,))
            for name, values in zip(names, whole.detach().chunk(len(names)), strict=True):
                module, attribute = new.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                if share_memory:
                    shared = nn.Parameter(values, whole.requires_grad) if own in parts else whole
                    setattr(module, attribute, shared)
                elif own in parts:
                    module.get_parameter(attribute).copy_(values)
                    module.get_parameter(attribute).requires_grad_(whole.requires_grad)
    return new


def why_whole(model: nn.Module, name: str, kept: Collection[str] = ()) -> str | None:
    """Why a fused layer is not split; None where it can be.

    Args:
        model: the whole model.
        name: of the layer.
        kept: names of parameters that others keep track of.
    """
    layer = model.get_submodule(name)
    own = dict(layer.named_parameters())
    if held := next((own_name for own_name in own if f"{name}.{own_name}" in kept), None):
        return f"another method keeps track of its {held}"
    if not all(isinstance(parameter, nn.Parameter | None) for parameter in _fused_tensors(layer)):
        return "its weights come from a hook (prune, weight_norm): make them permanent"
    mine = {id(parameter) for parameter in layer.parameters(recurse=False)}
    for other, module in model.named_modules():
        if module is not layer and any(id(p) in mine for p in module.parameters(recurse=False)):
            return f"shares a parameter with {other!r}"
    return None


def _fused_tensors(layer: nn.Module) -> list[Any]:
    if isinstance(layer, nn.RNNBase):
        return [getattr(layer, name) for name in recurrent_parts(layer_spec(layer))]
    names = ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS))
    return [getattr(layer, name) for name in names]


def split_view(model: nn.Module, kept: Collection[str] = (), *, recurrent: bool = True) -> nn.Module:
    """The model with every fused layer as its parts; it shares all memory with the model, which is not touched.

    The model itself where there is nothing to split.

    Args:
        model: any module.
        kept: names of parameters that others keep track of: the layers that hold them stay as they are.
        recurrent: whether recurrent layers are split, too.
    """
    fused = {n: module for n, module in model.named_modules() if type(module) in FUSED and n}
    fused = {n: module for n, module in fused.items() if recurrent or not isinstance(module, nn.RNNBase)}
    fused = {name: module for name, module in fused.items() if why_whole(model, name, kept) is None}
    if not fused:
        return model
    view = share_copy(model)
    for name, module in fused.items():
        replace_layer(view, name, _unfuse(module, _spec(module), share_memory=True))
    return view


def split_like(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with those layers split that are so in the other one; it shares all memory with the model."""
    view = share_copy(model)
    for name in (n for n, layer in compressed_layers(other).items() if layer.stage is Stage.UNFUSE):
        if type(module := get_layer(model, name)) in FUSED:
            replace_layer(view, name, _unfuse(module, _spec(module), share_memory=True))
    return view


def _spec(layer: nn.Module) -> dict[str, Any]:
    kind = UnfusedAttention.kind if isinstance(layer, nn.MultiheadAttention) else UnfusedRecurrent.kind
    return {"kind": kind, "layer": layer_spec(layer)}


def planned_splits(view: nn.Module, layers: Sequence[LayerPlan], by: str) -> tuple[LayerPlan, ...]:
    """The layers of a `split_view` that are split because a plan changes parts of them.

    Args:
        view: what the plan was made on.
        layers: the plan's entries.
        by: who plans.
    """
    new = {n: layer.spec for n, layer in compressed_layers(view).items() if "by" not in layer.spec}
    changed = [name for name in new if any(entry.name.startswith(f"{name}.") for entry in layers)]
    return tuple(LayerPlan(n, {**{k: v for k, v in new[n].items() if k != "version"}, "by": by}) for n in changed)


def split_names(splits: Sequence[LayerPlan]) -> dict[str, tuple[str, ...]]:
    """What becomes of the parameters of planned splits.

    Returns:
        By the name of a parameter, the names of those that it is cut into, in equal parts along dimension 0.
    """
    return {
        f"{entry.name}.{own}": tuple(f"{entry.name}.{part}" for part in parts)
        for entry in splits
        for own, parts in _parts(entry.spec["layer"]).items()
    }


def split_as_planned(model: nn.Module, splits: Sequence[LayerPlan]) -> None:
    """Splits layers in place, as `planned_splits` says; what is split already is left as it is.

    Raises:
        ModelError: a layer is of another type.
    """
    opened = [e.name for e in splits if isinstance(get_layer(model, e.name), nn.RNNBase)]
    if opened and not any(parameter.is_meta for parameter in model.parameters()):
        log.info(
            "%s: taken apart into ordinary products, one for all steps and one for every step, so that they can be "
            "compressed. On CPUs this takes 1.2 to 4.5 times as long as torch's own layer in floating point, and small "
            "products in integers, one a step, take longer still: time it where speed counts.",
            ", ".join(map(repr, opened)),
        )
    for entry in splits:
        old = get_layer(model, entry.name)
        if isinstance(old, UnfusedAttention | UnfusedRecurrent):
            continue
        if type(old) not in FUSED:
            raise ModelError(f"The plan splits {entry.name!r}, {a_or_an(type(old).__name__)}, which is no fused layer.")
        replace_layer(model, entry.name, _unfuse(old, entry.spec, share_memory=False))
