"""Which of a module's numbers are widths of its tensors: seen by building the module again with other numbers.

Two numbers of 8 may be a count of channels and the length of a window. Where a module's constructor can be called again
with what the module has kept of its arguments (attributes of the same names, a config, Lightning's hyperparameters),
one argument after the other is doubled, on "meta": the numbers that move with a dimension in every case are its width.
"""

import inspect
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pquant_lightning.core.copying import deep_copy

_MOST_FIELDS = 64  # of a config
_LOADS = ("pretrained", "checkpoint", "path", "model_name")  # arguments by which a constructor may read files

Sizes = tuple[dict[str, int], dict[tuple[str, int], int]]  # a module's numbers, and sizes by tensor and dimension


class Widths:
    """The numbers of one model's modules, compared with those of the same modules built with other arguments.

    Args:
        model: is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: WeakKeyDictionary[nn.Module, list[Sizes]] = WeakKeyDictionary()

    def counts(self, name: str, attribute: str, place: tuple[str, int]) -> bool | None:
        """Whether a number of a module is the size of one of its tensors; None where it cannot be told.

        Args:
            name: of the module.
            attribute: name of its number.
            place: name of a tensor in the module, relative to it, and a dimension.
        """
        module = self.model.get_submodule(name)
        if module not in self._seen:
            self._seen[module] = self._others(name)
        found: list[tuple[int, int]] = []
        for numbers, sizes in self._seen[module]:
            if attribute in numbers and place in sizes:
                found.append((numbers[attribute], sizes[place]))
        if any(number != size for number, size in found):
            return False
        value = getattr(module, attribute)
        return True if any(number != value for number, _ in found) else None

    def _others(self, name: str) -> list[Sizes]:
        """The sizes of a module in twins of itself, or of the innermost module around it that can be built again."""
        parts = name.split(".") if name else []
        for depth in range(len(parts), -1, -1):
            outer, path = self.model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
            arguments = _arguments(outer)
            if arguments is None or _sizes_in(_built(outer, arguments), path) != _sizes_in(outer, path):
                continue
            twins = (_sizes_in(_built(outer, other), path) for other in _doubled(arguments))
            return [sizes for sizes in twins if sizes is not None]
        return []


def _sizes_in(model: nn.Module | None, path: str) -> Sizes | None:
    """The sizes of a module inside of another one; None where it has none of that name."""
    try:
        module = None if model is None else model.get_submodule(path)
    except AttributeError:
        return None
    if module is None:
        return None
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return numbers, {(name, dim): size for name, tensor in tensors for dim, size in enumerate(tensor.shape)}


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """What a module's constructor was given, as far as it has kept it; None where something required is missing."""
    if type(module).__module__.startswith("torch."):
        return None
    try:
        parameters = inspect.signature(type(module)).parameters.values()
    except (TypeError, ValueError):
        return None
    kept = {**getattr(module, "hparams", {}), **vars(module)}
    found = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = kept.get(parameter.name)
        if any(word in parameter.name for word in _LOADS) and value:
            return None
        if isinstance(value, int | float | str):
            found[parameter.name] = value
        elif parameter.default is parameter.empty:
            if value is None or isinstance(value, torch.Tensor | nn.Module):
                return None
            found[parameter.name] = value
    return found


def _doubled(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with one number doubled, of themselves or of a config among them."""
    for name, value in arguments.items():
        if type(value) is int:
            yield {**arguments, name: 2 * value}
        elif not isinstance(value, int | float | str):
            fields = [key for key, number in getattr(value, "__dict__", {}).items() if type(number) is int]
            for field in fields[:_MOST_FIELDS]:
                other = deep_copy(value)
                object.__setattr__(other, field, 2 * getattr(value, field))  # a dataclass may be frozen
                yield {**arguments, name: other}


def _built(module: nn.Module, arguments: dict[str, Any]) -> nn.Module | None:
    """A module of the same class on "meta"; None where its constructor refuses the arguments."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(module)(**arguments)
    except Exception:  # whatever a constructor may raise for arguments that nobody gave it before
        return None
