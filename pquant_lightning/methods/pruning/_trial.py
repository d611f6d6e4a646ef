"""Trying out a group of channels: does the model without some of its units compute what it computes with them zero?

Besides the sizes of tensors, a model may hold numbers that go with them (heads, widths of a split). Which of a module's
integer attributes those are is not guessed from their names: they are found by trying.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.graph import tensors_in
from pquant_lightning.core.structure import replace_tensors, tensor_at
from pquant_lightning.methods.pruning._sized import Removed, Units, places_of, take_out

Follow = dict[str, list[str]]  # names of attributes that count a group's units, by module

_TOLERANCE = 1e-4  # relative difference of outputs that rounding may cause
_MOST_TRIES = 40


class Trial:
    """Tries groups of one model; what it finds for one block is tried first on the next one like it.

    Args:
        model: is not changed.
        samples: what the model is run on, a few.
    """

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self.model, self.samples = model, samples
        self.found: dict[Any, Follow] = {}

    def attributes(self, units: Units) -> Follow | None:
        """The attributes that count the group's units; None where the model cannot do without some of them."""
        half = units.count // 2
        trials = [[list(range(half))], [list(range(units.count - half, units.count))]]  # code may name places by number
        expected = [self._outputs(self._masked(places_of([units], removed))) for removed in trials]
        kinds = [type(self.model.get_submodule(name.rpartition(".")[0])) for name, _, _ in units.parts]
        key = tuple(kinds), tuple(name.rpartition(".")[2] for name, _, _ in units.parts), units.count
        around = _common(units.modules)
        choices = _choices(self.model, around, units.count)
        for choice in [self.found[key], *choices] if key in self.found else choices:
            follow = {_joined(around, path): names for path, names in choice.items()}
            tried = replace(units, follow=follow)
            if all(self._agrees(tried, removed, outputs) for removed, outputs in zip(trials, expected, strict=True)):
                self.found[key] = choice
                return follow
        return None

    def _masked(self, places: dict[tuple[str, int], list[int]]) -> nn.Module:
        masked = share_copy(self.model)
        zeroed: dict[int, Tensor] = {}
        for (name, dim), indices in places.items():
            tensor = tensor_at(masked, name)
            if isinstance(tensor, nn.Parameter):
                twin = zeroed.setdefault(id(tensor), nn.Parameter(tensor.detach().clone(), requires_grad=False))
                twin.data.index_fill_(dim, torch.tensor(indices, device=twin.device), 0)
        replace_tensors(masked, zeroed)
        return masked

    def _agrees(self, units: Units, removed: Removed, expected: list[Tensor]) -> bool:
        small = share_copy(self.model)
        try:
            take_out(small, [units], removed)
            found = self._outputs(small)
        except (CalibrationError, AttributeError, IndexError, KeyError, RuntimeError):
            return False
        return len(found) == len(expected) and all(map(_alike, found, expected))

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return [tensor for output in run_samples(model, self.samples) for tensor in tensors_in(output)]


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    limit = _TOLERANCE * float(other.abs().max() if other.numel() else 0) + 1e-7
    return bool(((one - other).abs() <= limit).all())


def _common(names: Sequence[str]) -> str:
    """The innermost module around all of these."""
    split = [name.split(".") if name else [] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _joined(around: str, path: str) -> str:
    return ".".join(part for part in (around, path) if part)


def _choices(model: nn.Module, around: str, count: int) -> Iterator[Follow]:
    """Sets of attributes that may count `count` units, small ones first; an attribute goes in all modules alike.

    Looked for in the modules around and inside: whole numbers that are a multiple of the count.
    """
    found: dict[str, list[str]] = {}
    for path, module in model.get_submodule(around).named_modules():
        for attribute, value in vars(module).items():
            if (
                type(value) is int
                and value >= count
                and value % count == 0
                and type(module).__module__[:9] != "torch.nn."
            ):
                found.setdefault(attribute, []).append(path)
    yield {}
    tried = 0
    for size in range(1, len(found) + 1):
        for names in itertools.combinations(sorted(found), size):
            choice: Follow = {}
            for name in names:
                for path in found[name]:
                    choice.setdefault(path, []).append(name)
            yield choice
            if (tried := tried + 1) == _MOST_TRIES:
                return
