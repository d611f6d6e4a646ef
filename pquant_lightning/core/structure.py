"""Sizes of a whole model beside those of one layer: what a spec's `group` says, and how a model is given them.

A layer that carries a group knows, by paths relative to itself, the tensors outside of compressed layers that have
another shape than the model's own code makes, and the integer attributes (numbers of heads, widths) that go with them.
"""

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Form = Literal["before", "now"]
Kept = tuple[tuple[int, Tensor], ...]  # dimensions that have lost indices, and those that are left


@dataclass(frozen=True)
class Resized:
    """A parameter that has taken the place of a larger one.

    Attributes:
        old: the parameter that is gone.
        new: the one in its place.
        kept: for each dimension that has lost indices, those that are left.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Kept

    def follow(self, tensor: Tensor) -> Tensor:
        """The same part of another tensor of the old parameter's shape (the state of an optimizer)."""
        for dim, indices in self.kept:
            tensor = tensor.index_select(dim, indices)
        return tensor


def relative_path(carrier: str, name: str) -> str:
    """How a module is found from another one, wherever both are put.

    >>> relative_path("block.conv", "block.bn")
    '../bn'
    """
    return posixpath.relpath(f"/{name.replace('.', '/')}", f"/{carrier.replace('.', '/')}")


def absolute_path(carrier: str, path: str) -> str:
    """The inverse of `relative_path`: the module's name.

    >>> absolute_path("block.conv", "../bn")
    'block.bn'
    """
    joined = posixpath.normpath(posixpath.join(f"/{carrier.replace('.', '/')}", path))
    return joined.strip("/").replace("/", ".")


def tensor_at(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name.

    Raises:
        AttributeError: there is none.
    """
    module, _, attribute = name.rpartition(".")
    found = getattr(root.get_submodule(module), attribute)
    if not isinstance(found, Tensor):
        raise AttributeError(f"{name!r} is no tensor")
    return found


def arrange(root: nn.Module, carrier: str, group: Mapping[str, Any], form: Form, skip: Iterable[str] = ()) -> None:
    """Gives the tensors and attributes of a group their shapes and values before or after; new tensors are empty.

    Args:
        root: the model, or one that holds it.
        carrier: name of the layer whose spec holds the group.
        group: `tensors` by relative path, `attributes` by relative path of their module; each value `{before, now}`.
        form: which of the two.
        skip: names of modules that are left as they are.
    """
    left = set(skip)
    new: dict[int, Tensor] = {}
    for path, shapes in group["tensors"].items():
        name = absolute_path(carrier, path)
        if name.rpartition(".")[0] not in left:
            old = tensor_at(root, name)
            if list(old.shape) != shapes[form]:
                new[id(old)] = _like(old, torch.empty(shapes[form], dtype=old.dtype, device=old.device))
    replace_tensors(root, new)
    for path, values in group["attributes"].items():
        if (name := absolute_path(carrier, path)) not in left:
            for attribute, value in values.items():
                setattr(root.get_submodule(name), attribute, value[form])


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor that may be sharded, on every process; to be called on all of them."""
    values = tensor.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def take(tensors: Mapping[int, tuple[Tensor, Kept]]) -> dict[int, Tensor]:
    """What is left of parameters and buffers, by the id of each, as `replace_tensors` takes it."""
    new = {}
    for key, (old, kept) in tensors.items():
        small = whole(old)
        for dim, indices in kept:
            small = small.index_select(dim, indices)
        new[key] = _like(old, small)
    return new


def replace_tensors(root: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Puts parameters and buffers in the place of others, by the id of the old one, in every module that holds it."""
    for module in root.modules() if new else ():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for attribute, held in own:
            if id(held) in new:
                setattr(module, attribute, new[id(held)])


def encode_indices(units: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Lists of equal length as JSON-able runs `[start, step, count]` of all their indices, one after the other.

    >>> encode_indices([[0, 1], [2, 3]])
    {'width': 2, 'runs': [[0, 1, 4]]}
    """
    flat = [index for unit in units for index in unit]
    runs: list[list[int]] = []
    for index in flat:
        if runs and runs[-1][2] == 1:
            runs[-1][1:] = [index - runs[-1][0], 2]
        elif runs and index == runs[-1][0] + runs[-1][1] * runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([index, 0, 1])
    return {"width": len(units[0]) if units else 1, "runs": runs}


def decode_indices(encoded: Mapping[str, Any]) -> list[list[int]]:
    """The inverse of `encode_indices`."""
    flat = list(_unrolled(encoded["runs"]))
    width = encoded["width"]
    return [flat[place : place + width] for place in range(0, len(flat), width)]


def _unrolled(runs: Iterable[Sequence[int]]) -> Iterator[int]:
    for start, step, count in runs:
        for place in range(count):
            yield start + step * place
