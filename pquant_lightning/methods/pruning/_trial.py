"""Trying out groups of channels: does the model without some of its units compute what it does with them zero?

Besides the sizes of tensors, a model may hold numbers that go with them (heads, widths of a split). Which of a module's
integer attributes those are is not guessed from their names or values: a number is changed only where the model needs
it, in each of the ways in which it runs (`_ways.py`), or where it is known to be the length of a tensor (`_widths.py`).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.structure import replace_tensors, tensor_at
from pquant_lightning.methods.pruning._sized import Lengths, Removed, Units, places_of, possible_lengths, take_out
from pquant_lightning.methods.pruning._ways import own_copy, ways_through, without_constants
from pquant_lightning.methods.pruning._widths import Widths

_TOLERANCE = 1e-4  # relative difference of outputs that rounding may cause
_TIMES_SPREAD = 30  # of what the last digits of the parameters come to
_MOST_TRIES = 60
_ERRORS = (CalibrationError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Number:
    """An attribute that may count a group's units, in all modules of one class.

    Attributes:
        attribute: its name.
        owner: the class of the modules.
        follow: by module, relative to the innermost one around the group: what is a multiple of the number of units.
        lengths: likewise, what is the length of a tensor.
    """

    attribute: str
    owner: str
    follow: tuple[str, ...] = ()
    lengths: tuple[tuple[str, tuple[str, int]], ...] = ()


Choice = tuple[Number, ...]


class Trial:
    """Tries groups of one model; what it finds for one block is tried first on the next one like it.

    Args:
        model: is not changed.
        sizes: the example, and the same at other lengths and batch sizes.
    """

    def __init__(self, model: nn.Module, sizes: Samples) -> None:
        self.model = without_constants(model)
        self.ways = ways_through(self.model, sizes)
        self.widths = Widths(model)
        self.found: dict[Any, Choice] = {}

    # -- one group -----------------------------------------------------------------------------------------------------

    def of(self, units: Units, thorough: bool = False) -> Units | str:
        """The group with the attributes that count its units; why the model cannot do without some of them else.

        Args:
            units: whose attributes are not known.
            thorough: try each way through the model also where no number needs a change for the example to run;
                `together` does so for all groups at once.
        """
        around = _common(units.modules)
        key = self._key(units, around)
        attempt = _Attempt(self, units, around)
        if not thorough and key in self.found and attempt.why_not(self.found[key], ways=1) is None:
            return attempt.with_numbers(self.found[key])
        found = self._search(units, attempt, around, thorough)
        if isinstance(found, str):
            return found
        self.found[key] = found
        return attempt.with_numbers(found)

    def _key(self, units: Units, around: str) -> Any:
        parts = [(name.removeprefix(f"{around}."), dim, len(ids[0])) for name, dim, ids in units.parts]
        kinds = [type(self.model.get_submodule(name.rpartition(".")[0])) for name, _, _ in units.parts]
        return tuple(parts), tuple(kinds), units.count

    def _search(self, units: Units, attempt: "_Attempt", around: str, thorough: bool) -> Choice | str:
        known, numbers = self._numbers(units, around)
        reason = attempt.why_not(known, None if thorough else 1)
        if reason is None:
            return known
        if known and attempt.why_not(()) is None:
            return ()
        tries = itertools.islice(_choices(numbers), _MOST_TRIES)
        for _, choices in itertools.groupby(tries, key=lambda choice: len({n.attribute for n in choice})):
            passing = [choice for choice in choices if attempt.why_not((*known, *choice)) is None]
            least = list(dict.fromkeys(self._least(known, choice, attempt) for choice in passing))
            if len(least) > 1:
                names = " or ".join(", ".join(dict.fromkeys(n.attribute for n in choice)) for choice in least)
                return f"it cannot be told which numbers of the model count them: {names}"
            if least:
                return (*known, *least[0])
        return reason

    def _least(self, known: Choice, choice: Choice, attempt: "_Attempt") -> Choice:
        """Without the numbers that the model does not need changed."""
        for number in choice if len(choice) > 1 else ():
            smaller = tuple(other for other in choice if other is not number)
            if attempt.why_not((*known, *smaller)) is None:
                choice = smaller
        return choice

    def _numbers(self, units: Units, around: str) -> tuple[Choice, list[Number]]:
        """Numbers that are known to be lengths of the group's tensors, and those that may count its units.

        Looked for in the modules that hold some of the group, or no parameters at all: whole numbers that are the
        length of a tensor that loses units, or a multiple of their count.
        """
        possible = possible_lengths(self.model, places_of([units], [[0]]))
        found: dict[tuple[bool, str, str], tuple[list[str], list[tuple[str, tuple[str, int]]]]] = {}
        holders = [name.rpartition(".")[0] for name, _, _ in units.parts]
        for path, module in self.model.get_submodule(around).named_modules():
            name = _joined(around, path)
            holds = any(f"{holder}.".startswith(f"{name}.") or not name for holder in holders)
            if type(module).__module__.startswith("torch.nn.") or not (holds or _has_no_parameters(module)):
                continue
            for attribute, value in vars(module).items():
                if type(value) is not int or value < 1:
                    continue
                place = possible.get(name, {}).get(attribute)
                counts = self._counts(units, name, attribute, place)
                if counts is False or (place is None and (value < units.count or value % units.count)):
                    continue
                known = counts is True and place is not None
                follow, lengths = found.setdefault((known, attribute, type(module).__qualname__), ([], []))
                if place is None:
                    follow.append(path)
                else:
                    lengths.append((path, place))
        numbers = [
            (known, Number(attribute, owner, tuple(follow), tuple(lengths)))
            for (known, attribute, owner), (follow, lengths) in sorted(found.items())
        ]
        return tuple(n for known, n in numbers if known), [n for known, n in numbers if not known]

    def _counts(self, units: Units, name: str, attribute: str, place: tuple[str, int] | None) -> bool | None:
        """Whether a number is a length that loses units, or else the width of a layer that has just these."""
        if place is not None:
            return self.widths.counts(name, attribute, place)
        inside = f"{name}." if name else ""
        for tensor, dim, indices in units.parts:
            whole = indices.shape[1] == 1 and tensor_at(self.model, tensor).shape[dim] == units.count
            if (
                whole
                and tensor.startswith(inside)
                and getattr(self.model.get_submodule(name), attribute) == units.count
            ):
                return self.widths.counts(name, attribute, (tensor.removeprefix(inside), dim))
        return None

    # -- all groups ----------------------------------------------------------------------------------------------------

    def together(self, groups: Sequence[Units], counts: Sequence[int]) -> list[str | None]:
        """Why groups cannot lose so many units beside the others; None for those that can."""
        random, left = Random(0), [place for place, count in enumerate(counts) if count]
        removed = [random.sample(range(units.count), n) for units, n in zip(groups, counts, strict=True)]
        reasons: list[str | None] = [None] * len(groups)

        def why_not(chosen: Sequence[int]) -> str | None:
            return self.why_not([groups[i] for i in chosen], [removed[i] for i in chosen])

        while left and (reason := why_not(left)) is not None:
            works, fails = 0, len(left)  # numbers of groups, from the first on
            while fails - works > 1:
                middle = (works + fails) // 2
                if (other := why_not(left[:middle])) is None:
                    works = middle
                else:
                    fails, reason = middle, other
            reasons[left.pop(works)] = f"{reason}, when other channels go too"
        return reasons

    def why_not(self, groups: Sequence[Units], removed: Removed) -> str | None:
        """Why the model cannot do without some units; None where it computes what it does with them zero."""
        places = places_of(groups, removed)
        masked = (_Masked(self, way, places) for way in range(len(self.ways)))
        return next(filter(None, (self.differs(expected, groups, removed) for expected in masked)), None)

    def differs(self, expected: "_Masked", groups: Sequence[Units], removed: Removed) -> str | None:
        """In which manner one way through the model is another without some units; None where it is the same."""
        small = own_copy(self.model)
        try:
            take_out(small, groups, removed)
            found = self.ways[expected.way](small)
        except _ERRORS as error:
            return f"without some of them the model stops with an error: {_brief(error)}"
        if expected.equals(found):
            return None
        return (
            "without some of them the model computes something else than with zeros in their place (a number of them "
            "may be kept in a list, a dict, a config or the code)"
        )


class _Masked:
    """What a way through the model computes with zeros at some places, and how much rounding may change that."""

    def __init__(self, trial: Trial, way: int, places: Mapping[tuple[str, int], Sequence[int]]) -> None:
        self.trial, self.way, self.places = trial, way, places

    @cached_property
    def outputs(self) -> list[Tensor]:
        return self._run(self._model())

    @cached_property
    def spread(self) -> list[float]:
        """By output, what a relative change of all parameters in their last digits comes to: norms may enlarge it."""
        near, generator = self._model(), torch.Generator().manual_seed(0)
        new: dict[int, Tensor] = {}
        for parameter in near.parameters():
            if parameter.is_floating_point() and not isinstance(parameter, DTensor):
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                digits = 4 * torch.finfo(parameter.dtype).eps * noise
                new[id(parameter)] = nn.Parameter(parameter.detach() * (1 + digits).to(parameter.dtype), False)
        replace_tensors(near, new)
        return [float((a - b).abs().nan_to_num().max()) for a, b in zip(self._run(near), self.outputs, strict=True)]

    def equals(self, found: list[Tensor]) -> bool:
        """Whether a model computes the same, up to rounding."""
        pairs = list(zip(found, self.outputs, strict=False))
        if len(found) != len(self.outputs) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return False
        if all(_alike(a, b) for a, b in pairs):
            return True
        return all(_alike(a, b, limit) for (a, b), limit in zip(pairs, self.spread, strict=True))

    def _model(self) -> nn.Module:
        masked = own_copy(self.trial.model)
        zeroed: dict[int, Tensor] = {}
        for (name, dim), indices in self.places.items():
            tensor = tensor_at(masked, name)
            if isinstance(tensor, nn.Parameter):
                twin = zeroed.setdefault(id(tensor), nn.Parameter(tensor.detach().clone(), requires_grad=False))
                twin.data.index_fill_(dim, torch.tensor(indices, device=twin.device), 0)
        replace_tensors(masked, zeroed)
        return masked

    def _run(self, model: nn.Module) -> list[Tensor]:
        return self.trial.ways[self.way](model)


class _Attempt:
    """One group, without its first and without its last half: code may name places by number."""

    def __init__(self, trial: Trial, units: Units, around: str) -> None:
        self.trial, self.units, self.around = trial, units, around
        half = max(units.count // 2, 1)
        self.removals: list[Removed] = [[list(range(half))], [list(range(units.count - half, units.count))]]
        self.expected = [
            [_Masked(trial, way, places_of([units], removed)) for removed in self.removals]
            for way in range(len(trial.ways))
        ]

    def with_numbers(self, choice: Choice) -> Units:
        follow: dict[str, list[str]] = {}
        lengths: dict[str, Lengths] = {}
        for number in choice:
            for path in number.follow:
                follow.setdefault(_joined(self.around, path), []).append(number.attribute)
            for path, place in number.lengths:
                lengths.setdefault(_joined(self.around, path), {})[number.attribute] = place
        return replace(self.units, follow=follow, lengths=lengths)

    def why_not(self, choice: Choice, ways: int | None = None) -> str | None:
        """Why the model cannot do without either half with these numbers changed; None where it can."""
        tried = self.with_numbers(choice)
        for masked in self.expected[:ways]:
            for expected, removed in zip(masked, self.removals, strict=True):
                if (reason := self.trial.differs(expected, [tried], removed)) is not None:
                    return reason
        return None


def _choices(numbers: Sequence[Number]) -> Iterator[Choice]:
    """Sets of numbers, small ones first: an attribute in all classes alike, then in single ones."""
    by_name: dict[str, list[Number]] = {}
    for number in numbers:
        by_name.setdefault(number.attribute, []).append(number)
    for size in range(1, len(by_name) + 1):
        for names in itertools.combinations(by_name, size):
            yield tuple(number for name in names for number in by_name[name])
        if size == 1:
            yield from ((number,) for own in by_name.values() if len(own) > 1 for number in own)


def _has_no_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None


def _brief(error: Exception) -> str:
    """The first line of what an error says, without what calibration says around it."""
    inner = error.__cause__ if isinstance(error, CalibrationError) and error.__cause__ is not None else error
    line = (str(inner).strip().splitlines() or [""])[0]
    return f"{type(inner).__name__}: {line[:120]}"


def _alike(one: Tensor, other: Tensor, spread: float = 0.0) -> bool:
    """Whether tensors of the same shape are equal up to rounding, or up to some times what it is known to come to."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = other[torch.isfinite(other)]
    limit = _TOLERANCE * float(finite.abs().max() if finite.numel() else 0) + 1e-7
    return bool(((one == other) | ((one - other).abs() <= max(limit, _TIMES_SPREAD * spread))).all())


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
