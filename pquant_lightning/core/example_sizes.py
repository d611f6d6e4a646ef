"""The same example at other lengths and batch sizes, as far as a model runs on them.

What holds for one length may be a coincidence: a table of positions is read as far as the first batch is long, and a
number of tokens may equal a number of channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.batches import map_tensors
from pquant_lightning.core.calibration import Samples, batch_size, run_samples
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import CalibrationError

_MOST_PARAMS_ON_CPU = 10**9

Place = tuple[int, int]  # which of the batch's tensors, in order, and a dimension of it


def other_sizes(model: nn.Module, samples: Samples) -> Samples:
    """Further batches like the first one: a shorter one with three samples, and a longer one with one.

    Which dimensions can be of another length is found by running the model, first with all dimensions of equal size
    changed together, then with each alone. Batches of one size only where it runs on no other.

    Args:
        model: is not changed.
        samples: the first batch is the example.
    """
    example = samples.batches[0]
    found = []
    for count, lengths in ((3, _shorter), (1, _longer)):
        batch, changed = example, False
        for places in _equal_places(example):
            size = _size(example, places[0])
            candidates = [(group, length) for group in _together_then_alone(places) for length in lengths(size)]
            for group, length in candidates:
                tried = _resized(batch, group, length)
                if _runs(model, replace(samples, batches=(tried,)), longer=length > size):
                    batch, changed = tried, True
                    break
        other = _with_samples(batch, count)
        if _runs(model, replace(samples, batches=(other,))):
            found.append(other)
        elif changed:
            found.append(batch)
    return replace(samples, batches=tuple(found))


def _shorter(size: int) -> list[int]:
    return [length for length in dict.fromkeys((size * 2 // 3, size // 2)) if 0 < length < size]


def _longer(size: int) -> list[int]:
    return [size + size // 2, 2 * size, size + 1] if size > 1 else []


def _together_then_alone(places: list[Place]) -> Iterator[list[Place]]:
    yield places
    if len(places) > 1:
        yield from ([place] for place in places)


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def _equal_places(batch: Any) -> list[list[Place]]:
    """Dimensions of the batch's tensors other than the samples', those of equal size together."""
    found: dict[int, list[Place]] = {}
    for number, tensor in enumerate(_tensors(batch)):
        for dim, size in enumerate(tensor.shape):
            if dim > 0 and size > 1:
                found.setdefault(size, []).append((number, dim))
    return list(found.values())


def _size(batch: Any, place: Place) -> int:
    return _tensors(batch)[place[0]].shape[place[1]]


def _by_number(change: Callable[[int, Tensor], Tensor], batch: Any) -> Any:
    count = iter(range(len(_tensors(batch))))
    return map_tensors(lambda tensor: change(next(count), tensor), batch)


def _resized(batch: Any, places: list[Place], length: int) -> Any:
    def change(number: int, tensor: Tensor) -> Tensor:
        for dim in [dim for place, dim in places if place == number]:
            tensor = _repeated(tensor, dim, length)
        return tensor

    return _by_number(change, batch)


def _with_samples(batch: Any, count: int) -> Any:
    size = batch_size(batch)
    return map_tensors(lambda t: _repeated(t, 0, count) if t.dim() and t.shape[0] == size else t, batch)


def _repeated(tensor: Tensor, dim: int, length: int) -> Tensor:
    """A tensor of another length along a dimension: its beginning, or itself and its beginning again."""
    if not tensor.shape[dim]:
        return tensor
    times = -(-length // tensor.shape[dim])
    return torch.cat([tensor] * times, dim).narrow(dim, 0, length)


def _runs(model: nn.Module, samples: Samples, longer: bool = False) -> bool:
    """Whether a model runs on a batch.

    An index that is out of range ends the whole process's use of an accelerator: there, what is longer than the example
    is tried with a copy on the CPU.
    """
    if longer and any(parameter.device.type != "cpu" for parameter in model.parameters()):
        if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMS_ON_CPU:
            return False
        model = share_copy(model, "cpu")
    try:
        for _ in run_samples(share_copy(model), samples):
            pass
    except CalibrationError:
        return False
    return True
