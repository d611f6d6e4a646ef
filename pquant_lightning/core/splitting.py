"""Fused layers, which hold several projections in one weight, are split so that any method can change the parts.

`nn.MultiheadAttention` is the one torch has. A method plans on a view of the model in which its projections are Linear
layers (`split_view`); where it changes one of them, the attention itself is replaced by `UnfusedAttention`.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.attention import PROJECTIONS, UnfusedAttention
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import ModelError, a_or_an
from pquant_lightning.core.layer_adapter import FUSED, layer_spec
from pquant_lightning.core.plan import LayerPlan
from pquant_lightning.core.surgery import get_layer, replace_layer


def _projected(attention: nn.MultiheadAttention) -> dict[str, tuple[Tensor, bool]]:
    """The values of the unfused parameters that are parts of fused ones, and whether they are trained."""
    found: dict[str, tuple[Tensor, bool]] = {}
    fused, bias = attention.in_proj_weight, attention.in_proj_bias
    for position, name in enumerate(PROJECTIONS):
        whole = getattr(attention, f"{name}_weight") if fused is None else fused
        part = whole.detach() if fused is None else whole.detach().chunk(3)[position]
        found[f"{name}.weight"] = (part, whole.requires_grad)
        if bias is not None:
            found[f"{name}.bias"] = (bias.detach().chunk(3)[position], bias.requires_grad)
    return found


def _unfuse(attention: nn.MultiheadAttention, spec: dict[str, Any], *, share_memory: bool) -> CompressedLayer:
    template = share_copy(attention, "meta") if share_memory else attention
    new = CompressedLayer.build(spec, template)
    with torch.no_grad():
        for name, (values, trained) in _projected(attention).items():
            module, own = new.get_submodule(name.split(".")[0]), name.split(".")[1]
            if share_memory:
                setattr(module, own, nn.Parameter(values, trained))
            else:
                module.get_parameter(own).copy_(values)
                module.get_parameter(own).requires_grad_(trained)
    if share_memory:
        for name, parameter in attention.named_parameters():
            if not name.startswith("in_proj") and not name.endswith("_weight"):
                module_name, _, own = name.rpartition(".")
                setattr(new.get_submodule(module_name), own, parameter)
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
    names = ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS))
    return [getattr(layer, name) for name in names]


def split_view(model: nn.Module, kept: Collection[str] = ()) -> nn.Module:
    """The model with every fused layer as its parts; it shares all memory with the model, which is not touched.

    The model itself where there is nothing to split.

    Args:
        model: any module.
        kept: names of parameters that others keep track of: the layers that hold them stay as they are.
    """
    fused = {n: module for n, module in model.named_modules() if type(module) in FUSED and n}
    fused = {name: module for name, module in fused.items() if why_whole(model, name, kept) is None}
    if not fused:
        return model
    view = share_copy(model)
    for name, module in fused.items():
        assert isinstance(module, nn.MultiheadAttention)
        replace_layer(view, name, _unfuse(module, _spec(module), share_memory=True))
    return view


def split_like(model: nn.Module, other: nn.Module) -> nn.Module:
    """The model with those layers split that are so in the other one; it shares all memory with the model."""
    view = share_copy(model)
    for name in (n for n, layer in compressed_layers(other).items() if layer.stage is Stage.UNFUSE):
        if type(module := get_layer(model, name)) in FUSED:
            assert isinstance(module, nn.MultiheadAttention)
            replace_layer(view, name, _unfuse(module, _spec(module), share_memory=True))
    return view


def _spec(layer: nn.Module) -> dict[str, Any]:
    return {"kind": UnfusedAttention.kind, "layer": layer_spec(layer)}


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
    found: dict[str, tuple[str, ...]] = {}
    for entry in splits:
        layer, names = entry.spec["layer"], [f"{entry.name}.{projection}" for projection in PROJECTIONS]
        found[f"{entry.name}.in_proj_bias"] = tuple(f"{name}.bias" for name in names)
        if layer["kdim"] == layer["vdim"] == layer["embed_dim"]:
            found[f"{entry.name}.in_proj_weight"] = tuple(f"{name}.weight" for name in names)
        else:
            found.update({f"{name}_weight": (f"{name}.weight",) for name in names})
    return found


def split_as_planned(model: nn.Module, splits: Sequence[LayerPlan]) -> None:
    """Splits layers in place, as `planned_splits` says; what is split already is left as it is.

    Raises:
        ModelError: a layer is of another type.
    """
    for entry in splits:
        old = get_layer(model, entry.name)
        if isinstance(old, UnfusedAttention):
            continue
        if not isinstance(old, nn.MultiheadAttention):
            raise ModelError(f"The plan splits {entry.name!r}, {a_or_an(type(old).__name__)}, which is no fused layer.")
        replace_layer(model, entry.name, _unfuse(old, entry.spec, share_memory=False))
