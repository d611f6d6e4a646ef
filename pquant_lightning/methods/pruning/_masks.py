"""Masks: one bit per weight in a checkpointed state, numbers of the weight's type while they are in use."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pquant_lightning.core.deploy import pack_bits, unpack_bits
from pquant_lightning.core.structure import whole

_NOTED = 0.1  # from this share of exact zeros on, a weight is taken to have been pruned before

# by model: the packed masks these were made of, and the numbers to multiply with
_LIVE: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Tensor]]] = WeakKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the values."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that have been pruned before: those with a fair share of exact zeros, and not all zero."""
    masks = {name: whole(weight) != 0 for name, weight in weights.items()}
    return {name: mask for name, mask in masks.items() if _NOTED <= 1 - float(mask.float().mean()) < 1}


def packed(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Boolean masks as bits, uint8 `(ceil(weights / 8),)`."""
    return {name: pack_bits(mask) for name, mask in masks.items()}


def unpacked(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bits as boolean masks of the shapes and on the devices of the weights."""
    return {name: unpack_bits(bits, weights[name].shape).to(weights[name].device) for name, bits in masks.items()}


def store(model: nn.Module, state: dict[str, Any], masks: dict[str, Tensor]) -> None:
    """Puts new masks into the state, and into use."""
    state["masks"] = packed(masks)
    _LIVE[model] = (state["masks"], {name: _numbers(mask, model.get_parameter(name)) for name, mask in masks.items()})


def live(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    """The masks in force, as numbers of the type and on the device of the local weights.

    Where a state says that the weights themselves hold the zeros (`masks` is None), they are read from there.
    """
    if state["masks"] is None:
        state["masks"] = packed({name: whole(model.get_parameter(name)) != 0 for name in state["targets"]})
    held, numbers = _LIVE.get(model, (None, {}))
    fits = all(
        m.dtype == (w := local(model.get_parameter(n))).dtype and m.device == w.device for n, m in numbers.items()
    )
    if held is not state["masks"] or not fits:
        weights = {name: model.get_parameter(name) for name in state["masks"]}
        masks = {name: unpack_bits(bits, weights[name].shape) for name, bits in state["masks"].items()}
        numbers = {name: _numbers(mask, weights[name]) for name, mask in masks.items()}
        _LIVE[model] = (state["masks"], numbers)
    return numbers


def split(model: nn.Module, state: dict[str, Any], parts: Mapping[str, Sequence[str]]) -> None:
    """Lets the state of a pruning speak of the parts of weights that have been cut along dimension 0.

    Args:
        model: holds the parts.
        state: `targets`, `masks`, and statistics of the size of the weights, by the weights' names; changed in place.
        parts: names of the parts, by that of the weight.
    """

    def rows(name: str, value: Tensor) -> Sequence[Tensor]:
        new = parts[name]
        whole_rows = sum(model.get_parameter(part).shape[0] for part in new)
        return value.chunk(len(new)) if value.shape[0] == whole_rows else [value] * len(new)  # of the inputs: for all

    masks = state["masks"]
    for name, new in parts.items():
        if name in state["targets"]:
            state["targets"].update(dict.fromkeys(new, state["targets"].pop(name)))
        for statistics in (state["scores"], state["norms"], state["origin"]):
            if name in statistics:
                value = statistics.pop(name)
                statistics.update({own: part.clone() for own, part in zip(new, rows(name, value), strict=True)})
        if masks is not None and name in masks:
            shapes = [model.get_parameter(part).shape for part in new]
            mask = unpack_bits(masks.pop(name), torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:])))
            masks.update({own: pack_bits(part) for own, part in zip(new, mask.chunk(len(new)), strict=True)})
    _LIVE.pop(model, None)


def _numbers(mask: Tensor, weight: Tensor) -> Tensor:
    mask = mask.to(weight.device, weight.dtype)
    if isinstance(weight, DTensor):
        mask = distribute_tensor(mask, weight.device_mesh, weight.placements).to_local()
    return mask
