"""Layers that may have fewer channels than the model's own code gives them, and the removal of channels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pquant_lightning.core.compressed_layer import (
    CompressedLayer,
    Stage,
    changed_layers,
    compressed_layers,
    weight_of,
)
from pquant_lightning.core.layer_adapter import NORMS, SUPPORTED, build_layer, register_adapter, resized_spec
from pquant_lightning.core.structure import (
    Kept,
    Resized,
    absolute_path,
    decode_indices,
    encode_indices,
    relative_path,
    replace_tensors,
    take,
    tensor_at,
)

Removed = list[list[int]]  # for each group the units that are zero, and go when the model is deployed
Lengths = dict[str, tuple[str, int]]  # by attribute, the tensor and the dimension of it whose length it is


class Sized(CompressedLayer, stage=Stage.MASK):
    """An ordinary layer that carries the model's groups of channels in `spec["group"]`.

    The group holds `by`, who made it; for each group of channels `parts`, the indices of each of its units along a
    dimension of a tensor, `follow`, names of attributes that count its units, by module, and `lengths`, those that
    are the length of a tensor of their module, with its name and dimension; `removed`, the units that
    are zero and go when the model is deployed; and of those that are gone, the shapes of `tensors` and the values of
    `attributes`, each before and now.
    """

    resizable = True

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        size = {key: tuple(v) if isinstance(v, list) else v for key, v in spec["layer"].items() if key != "type"}
        return cls(**size)

    def described(self) -> str:
        waiting = sum(map(len, self.spec["group"]["removed"]))
        return f"channels, {waiting:,} units to be removed" if waiting else "channels"


class SizedLinear(Sized, nn.Linear, kind="sized_linear"):
    """`nn.Linear`."""


class SizedConv1d(Sized, nn.Conv1d, kind="sized_conv1d"):
    """`nn.Conv1d`."""


class SizedConv2d(Sized, nn.Conv2d, kind="sized_conv2d"):
    """`nn.Conv2d`."""


class SizedConv3d(Sized, nn.Conv3d, kind="sized_conv3d"):
    """`nn.Conv3d`."""


class SizedConvTranspose1d(Sized, nn.ConvTranspose1d, kind="sized_conv_transpose1d"):
    """`nn.ConvTranspose1d`."""


class SizedConvTranspose2d(Sized, nn.ConvTranspose2d, kind="sized_conv_transpose2d"):
    """`nn.ConvTranspose2d`."""


class SizedConvTranspose3d(Sized, nn.ConvTranspose3d, kind="sized_conv_transpose3d"):
    """`nn.ConvTranspose3d`."""


class SizedEmbedding(Sized, nn.Embedding, kind="sized_embedding"):
    """`nn.Embedding`."""


CARRIERS: dict[type[nn.Module], type[Sized]] = {
    ordinary: kind for kind in Sized.__subclasses__() for ordinary in SUPPORTED if issubclass(kind, ordinary)
}


def _as_ordinary(layer: Any) -> nn.Module:
    """The ordinary layer of equal sizes, with the same parameters."""
    ordinary = build_layer(layer.spec["layer"], device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(ordinary, name, parameter)
    return ordinary


for _kind in CARRIERS.values():
    register_adapter(_kind, _as_ordinary)


@dataclass(frozen=True)
class Units:
    """A group of channels in a model, by the names that its modules have now.

    Attributes:
        parts: tensors by name, with a dimension and the indices of each unit along it, int64 `(units, width)`.
        follow: names of integer attributes that are a multiple of the number of units, by module.
        lengths: integer attributes that are the length of one of their module's own tensors, by module; None in files
            of old releases, which took every equal number for a length.
    """

    parts: tuple[tuple[str, int, Tensor], ...]
    follow: dict[str, list[str]]
    lengths: dict[str, Lengths] | None

    @property
    def count(self) -> int:
        return self.parts[0][2].shape[0]

    @property
    def modules(self) -> list[str]:
        """Names of the modules that have slices of the units, each once."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name, _, _ in self.parts))


def carrier_of(model: nn.Module) -> tuple[str, CompressedLayer] | None:
    """The layer that carries the groups, by name; None where the model has none."""
    return next(((n, layer) for n, layer in compressed_layers(model).items() if "group" in layer.spec), None)


# by carrier: its name, the parts in its spec, and the groups they describe, which a training reads at every step
_GROUPS: WeakKeyDictionary[nn.Module, tuple[str, Any, list[Units]]] = WeakKeyDictionary()


def groups_of(model: nn.Module) -> list[Units]:
    """The groups that the model's carrier knows; none where it has no carrier."""
    found = carrier_of(model)
    if found is None:
        return []
    name, carrier = found
    group = carrier.spec["group"]
    held = _GROUPS.get(carrier)
    if held is None or held[0] != name or held[1] is not group["parts"]:
        held = _GROUPS[carrier] = (name, group["parts"], _decoded(name, group))
    return held[2]


def _decoded(name: str, group: Mapping[str, Any]) -> list[Units]:
    return [
        Units(
            tuple(
                (absolute_path(name, part["tensor"]), part["dim"], torch.tensor(decode_indices(part["indices"])))
                for part in parts
            ),
            {absolute_path(name, path): names for path, names in follow.items()},
            decoded_lengths(name, lengths),
        )
        for parts, follow, lengths in zip(
            group["parts"], group["follow"], group.get("lengths") or [None] * len(group["parts"]), strict=True
        )
    ]


def decoded_lengths(carrier: str, lengths: Mapping[str, Any] | None) -> dict[str, Lengths] | None:
    """`Units.lengths` out of what `as_json` makes of it."""
    if lengths is None:
        return None
    return {
        absolute_path(carrier, path): {attribute: (tensor, dim) for attribute, (tensor, dim) in own.items()}
        for path, own in lengths.items()
    }


def _encoded_lengths(carrier: str, lengths: dict[str, Lengths] | None) -> Any:
    if lengths is None:
        return None
    return {
        relative_path(carrier, name): {attribute: list(place) for attribute, place in own.items()}
        for name, own in lengths.items()
    }


def as_json(carrier: str, groups: Sequence[Units]) -> dict[str, Any]:
    """`parts`, `follow` and `lengths` of a carrier's group."""
    return {
        "lengths": [_encoded_lengths(carrier, units.lengths) for units in groups],
        "parts": [
            [
                {"tensor": relative_path(carrier, name), "dim": dim, "indices": encode_indices(indices.tolist())}
                for name, dim, indices in units.parts
            ]
            for units in groups
        ],
        "follow": [{relative_path(carrier, name): own for name, own in units.follow.items()} for units in groups],
    }


def places_of(groups: Sequence[Units], removed: Removed) -> dict[tuple[str, int], list[int]]:
    """For each tensor, by name, and dimension the sorted indices of some units of each group."""
    gone: dict[tuple[str, int], set[int]] = {}
    for units, chosen in zip(groups, removed, strict=True):
        for name, dim, indices in units.parts if chosen else ():
            gone.setdefault((name, dim), set()).update(indices[chosen].flatten().tolist())
    return {place: sorted(indices) for place, indices in gone.items()}


# by model: the removed units these are made of, and for each parameter that is shared out the indices along a dimension
_ZEROS: WeakKeyDictionary[nn.Module, tuple[Removed, dict[tuple[str, int], Tensor]]] = WeakKeyDictionary()


def zero_units(model: nn.Module, removed: Removed, held: Callable[[Tensor], bool] = lambda _: True) -> None:
    """Makes these units zero in all parameters that are `held`."""
    known, places = _ZEROS.get(model, (None, {}))
    if known is not removed:
        found = places_of(groups_of(model), removed)
        places = {place: torch.tensor(indices) for place, indices in found.items()}
        _ZEROS[model] = (removed, places)
    with torch.no_grad():
        for (name, dim), indices in places.items():
            tensor = tensor_at(model, name)
            if not held(tensor):
                continue
            if isinstance(tensor, DTensor):
                mask = torch.ones(tensor.shape, dtype=tensor.dtype, device=tensor.device).index_fill_(dim, indices, 0)
                tensor.to_local().mul_(distribute_tensor(mask, tensor.device_mesh, tensor.placements).to_local())
            elif isinstance(tensor, nn.Parameter):
                tensor.index_fill_(dim, indices.to(tensor.device), 0)


# -- removal ---------------------------------------------------------------------------------------------------------


def take_out(
    model: nn.Module, groups: Sequence[Units], removed: Removed
) -> tuple[list[Resized], dict[str, dict[str, tuple[int, int]]]]:
    """Takes units out of the model, in place: what has changed, and for each module the attributes before and now."""
    places = places_of(groups, removed)
    changed = _lengths(model, places, groups)
    resized = _cut(model, places)
    for units, chosen in zip(groups, removed, strict=True):
        for name, attributes in units.follow.items() if chosen else ():
            for attribute in attributes:
                first, old = changed.setdefault(name, {}).get(attribute, (None, None))
                old = getattr(model.get_submodule(name), attribute) if old is None else old
                changed[name][attribute] = (
                    old if first is None else first,
                    old * (units.count - len(chosen)) // units.count,
                )
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor, _ in places):
        if sizes := own_sizes(model.get_submodule(name)):
            changed.setdefault(name, {}).update(sizes)
    for name, values in changed.items():
        for attribute, (_, now) in values.items():
            setattr(model.get_submodule(name), attribute, now)
    return resized, changed


def _lengths(
    model: nn.Module, places: Mapping[tuple[str, int], Sequence[int]], groups: Sequence[Units]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Attributes that are the length of one of their module's own tensors, before and after."""
    known: dict[str, Lengths] = {}
    for units in groups:
        for name, own in (possible_lengths(model, places) if units.lengths is None else units.lengths).items():
            known.setdefault(name, {}).update(own)
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, own in known.items():
        for attribute, (tensor, dim) in own.items():
            if gone := len(places.get((f"{name}.{tensor}" if name else tensor, dim), ())):
                value = getattr(model.get_submodule(name), attribute)
                found.setdefault(name, {})[attribute] = value, value - gone
    return found


def possible_lengths(model: nn.Module, places: Mapping[tuple[str, int], Sequence[int]]) -> dict[str, Lengths]:
    """Numbers of modules that are no torch layers and equal the length of one of their own tensors that loses indices.

    A number that is also the length of something that loses none, or others, is not among them.
    """
    cut = {place: len(gone) for place, gone in places.items()}
    found: dict[str, Lengths] = {}
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor, _ in cut):
        module = model.get_submodule(name)
        if type(module).__module__.startswith("torch.nn."):
            continue
        before: dict[int, dict[int, tuple[str, int]]] = {}  # by size, by how many go
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            for dim, size in enumerate(tensor.shape):
                gone = cut.get((f"{name}.{key}" if name else key, dim), 0)
                before.setdefault(size, {}).setdefault(gone, (key, dim))
        for attribute, value in vars(module).items():
            sizes = before.get(value, {}) if type(value) is int else {}
            if len(sizes) == 1 and 0 not in sizes:
                found.setdefault(name, {})[attribute] = next(iter(sizes.values()))
    return found


def remove_channels(model: nn.Module) -> list[Resized]:
    """Takes the units that are marked as removed out of the model, in place, and notes it in the carrier's spec."""
    found = carrier_of(model)
    if found is None or not any(found[1].spec["group"]["removed"]):
        return []
    name, carrier = found
    group, groups = carrier.spec["group"], groups_of(model)
    removed = group["removed"]
    gone = places_of(groups, removed)
    before = {tensor: list(tensor_at(model, tensor).shape) for tensor, _ in gone}
    resized, changed = take_out(model, groups, removed)
    inside = tuple(f"{layer}." for layer in changed_layers(model))
    tensors = dict(group["tensors"])
    for tensor, shape in before.items():
        if not tensor.startswith(inside):
            path = relative_path(name, tensor)
            tensors[path] = {**tensors.get(path, {"before": shape}), "now": list(tensor_at(model, tensor).shape)}
    attributes = {path: dict(values) for path, values in group["attributes"].items()}
    for module, values in changed.items():
        own = attributes.setdefault(relative_path(name, module), {}) if not f"{module}.".startswith(inside) else {}
        for attribute, (old, now) in values.items():
            own[attribute] = {**own.get(attribute, {"before": old}), "now": now}
    left = [_renumbered(units, chosen, gone) for units, chosen in zip(groups, removed, strict=True)]
    noted = {"removed": [[] for _ in left], "tensors": tensors, "attributes": attributes}
    carrier.spec = {**carrier.spec, "group": {**group, **as_json(name, left), **noted}}
    return resized


def _renumbered(units: Units, removed: Sequence[int], gone: Mapping[tuple[str, int], Sequence[int]]) -> Units:
    """The units that are left, by the indices that they have now."""
    kept = _all_but(removed, units.count)
    parts = []
    for name, dim, indices in units.parts:
        sorted_gone = torch.tensor(gone.get((name, dim), []), dtype=torch.long)
        parts.append((name, dim, indices[kept] - torch.searchsorted(sorted_gone, indices[kept].contiguous())))
    return Units(tuple(parts), units.follow, units.lengths)


def _cut(model: nn.Module, gone: Mapping[tuple[str, int], Sequence[int]]) -> list[Resized]:
    """Takes indices out of tensors, by name and dimension, and out of what goes with them in compressed layers."""
    places: dict[str, dict[int, Sequence[int]]] = {}
    for (tensor, dim), indices in gone.items():
        places.setdefault(tensor, {})[dim] = indices
    for tensor, dims in list(places.items()):
        owner, _, attribute = tensor.rpartition(".")
        layer = model.get_submodule(owner)
        if attribute == "weight" and isinstance(layer, CompressedLayer):
            channels = _channels_gone(layer.spec["layer"], weight_of(layer).shape, dims)
            for names, own in zip((layer.output_tensors, layer.input_tensors), channels, strict=True):
                places.update({f"{owner}.{other}": {0: own} for other in names if own and hasattr(layer, other)})
    old: dict[int, tuple[Tensor, Kept]] = {}  # a tied tensor once
    kept_of: dict[str, Kept] = {}
    for tensor, dims in places.items():
        held = tensor_at(model, tensor)
        kept_of[tensor] = tuple((d, _all_but(out, held.shape[d], held.device)) for d, out in dims.items())
        old[id(held)] = held, kept_of[tensor]
    new = take(old)
    replace_tensors(model, new)
    for tensor in places:
        owner, _, attribute = tensor.rpartition(".")
        layer = model.get_submodule(owner)
        if attribute == "weight" and isinstance(layer, CompressedLayer):
            layer.follow_resized(dict(kept_of[tensor]))
    for name, layer in compressed_layers(model).items():
        if layer.stage > Stage.UNFUSE and any(tensor.startswith(f"{name}.") for tensor in places):
            spec, now = layer.spec, resized_spec(layer.spec["layer"], weight_of(layer).shape)
            if now != spec["layer"]:
                layer.spec = {**spec, "layer": now, "original": spec.get("original", spec["layer"])}
    pairs = [(held, new[key], kept) for key, (held, kept) in old.items()]
    return [Resized(a, b, kept) for a, b, kept in pairs if isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter)]


def _all_but(gone: Sequence[int], size: int, device: torch.device | None = None) -> Tensor:
    out = set(gone)
    return torch.tensor([index for index in range(size) if index not in out], device=device)


def _channels_gone(
    layer: Mapping[str, Any], shape: torch.Size, dims: Mapping[int, Sequence[int]]
) -> tuple[Sequence[int], Sequence[int]]:
    """Output and input channels that go with indices of a layer's weight."""
    first, second = dims.get(0, []), dims.get(1, [])
    if (groups := layer.get("groups", 1)) > 1:  # a group goes as a whole
        width = range(shape[1])
        starts = sorted({index // (shape[0] // groups) * shape[1] for index in first})
        second = [start + place for start in starts for place in width]
    return (second, first) if "Transpose" in layer["type"] else (first, second)


def own_sizes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """The attributes of torch's own layers that say the sizes of their tensors: what they are and should be."""
    module: Any = layer
    sizes: dict[str, Any] = {}
    ordinary = next((cls for cls in (*SUPPORTED, *NORMS) if isinstance(module, cls)), None)
    if ordinary is not None:
        tensor = module.running_mean if module.weight is None else module.weight
        names = {**SUPPORTED, **NORMS}[ordinary]
        spec = {"type": ordinary.__name__, **{name: getattr(module, name) for name in names}}
        sizes = {name: value for name, value in resized_spec(spec, tensor.shape).items() if name != "type"}
    elif isinstance(module, nn.GroupNorm):
        channels = module.weight.shape[0]
        sizes = {"num_channels": channels, "num_groups": channels * module.num_groups // module.num_channels}
    elif isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        sizes = {"num_features": module.weight.shape[0]}
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        ending = "_l0" if isinstance(module, nn.RNNBase) else ""
        rows, inputs = tensor_at(layer, f"weight_ih{ending}").shape
        gates = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
        sizes = {"input_size": inputs, "hidden_size": rows // gates.get(type(module), 1)}
        if getattr(module, "proj_size", 0):
            sizes["proj_size"] = tensor_at(layer, "weight_hr_l0").shape[0]
    return {name: (getattr(module, name), value) for name, value in sizes.items() if getattr(module, name) != value}
