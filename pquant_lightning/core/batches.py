"""Batches and outputs of any shape: what tensors they hold, how many samples, and what of them `forward` takes."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pquant_lightning.core._private import pytree
from pquant_lightning.core.errors import CalibrationError, a_or_an, counted

_IMAGE_CHANNELS = (1, 3, 4)


# -- tensors in nested values ----------------------------------------------------------------------------------------


def _is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_graph(value: Any) -> bool:
    """Whether it is shaped like torch_geometric's `Data`: holds tensors, and applies a function to all of them."""
    ways = (getattr(value, name, None) for name in ("apply", "to", "to_dict"))
    return not isinstance(value, Tensor | nn.Module | type) and all(map(callable, ways))


def _entries(record: Any) -> dict[str, Any]:
    """The attributes of a dataclass instance, those that are no fields among them."""
    own = vars(record) if hasattr(record, "__dict__") else {}
    return {**{f.name: getattr(record, f.name) for f in dataclasses.fields(record) if hasattr(record, f.name)}, **own}


def _open(value: Any) -> tuple[Iterable[Any], Callable[[list[Any]], Any]] | None:
    """The values directly inside, and how others in their place make such a value; None where there are none."""
    if isinstance(value, Tensor | PackedSequence):
        return None
    children, structure = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
    if len(children) != 1 or children[0] is not value:
        return children, lambda new: pytree.tree_unflatten(new, structure)
    if isinstance(value, Mapping):
        return value.values(), lambda new: _refilled(value, dict(zip(value, new, strict=True)))
    if isinstance(value, list | tuple):
        return value, lambda new: type(value)(new)
    if _is_record(value):
        return _entries(value).values(), lambda new: _with_entries(value, dict(zip(_entries(value), new, strict=True)))
    if _is_graph(value):
        return value.to_dict().values(), lambda new: value  # made anew by its own `apply`, see `map_tensors`
    return None


def _refilled(mapping: Mapping[str, Any], entries: dict[str, Any]) -> Mapping[str, Any]:
    if not isinstance(mapping, MutableMapping):
        return entries
    twin = copy.copy(mapping)
    for key, value in entries.items():
        twin[key] = value
    return twin


def _with_entries(record: Any, entries: dict[str, Any]) -> Any:
    """A copy with other attributes; its `__init__` is not run, and it may be frozen."""
    twin = copy.copy(record)
    for name, value in entries.items():
        object.__setattr__(twin, name, value)
    return twin


def map_tensors(change: Callable[[Tensor], Tensor], value: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """A value of the same structure with every tensor changed; what is given is not written into.

    Args:
        change: of each tensor.
        value: tensors in dicts, lists, tuples, named tuples, dataclasses, graphs (torch_geometric's `Data`) and what
            else is registered with torch's pytree.
        other: of what is none of these.
    """
    if isinstance(value, Tensor):
        return change(value)
    if _is_graph(value) and not _is_record(value):
        twin = copy.copy(value)
        changed = twin.apply(change)
        return twin if changed is None else changed
    if (opened := _open(value)) is None:
        return other(value)
    children, rebuild = opened
    return rebuild([map_tensors(change, child, other) for child in children])


def _walk(value: Any) -> Iterator[Any]:
    """The value and all inside it, outermost first."""
    yield value
    for child in (_open(value) or ((), None))[0]:
        yield from _walk(child)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested value, in order (see `map_tensors`)."""
    return (inner for inner in _walk(value) if isinstance(inner, Tensor))


def main_output(output: Any) -> Tensor:
    """The tensor that a model's output is about: itself, its `logits`, or the first floating-point tensor in it.

    Raises:
        CalibrationError: there is none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    for tensor in tensors_in(output if logits is None else logits):
        if tensor.is_floating_point() or tensor is output:
            return tensor
    raise CalibrationError(f"The model returns {a_or_an(type(output).__name__)}, which holds no tensor to compare.")


# -- samples ---------------------------------------------------------------------------------------------------------


class _Extent(NamedTuple):
    """How many samples a batch has, and along what they lie: "rows" of tensors, a "list", "graphs", or unknown."""

    size: int
    along: str | None
    samples: Any = None  # the list whose entries are samples


def _extent(batch: Any) -> _Extent:
    if isinstance(batch, Tensor):
        return _Extent(batch.shape[0] if batch.dim() else 1, "rows")
    for value in _walk(batch):
        if (count := _own_count(value)) is not None:
            return _Extent(count, "graphs" if value is batch and hasattr(value, "to_data_list") else "object")
    if (found := _listed(batch)) is not None:
        return found
    first = next(tensors_in(batch), None)
    if first is not None:
        return _Extent(first.shape[0] if first.dim() else 1, "rows")
    texts = next((v for v in _walk(batch) if isinstance(v, list | tuple) and v and isinstance(v[0], str)), None)
    return _Extent(1, None) if texts is None else _Extent(len(texts), "list", texts)


def _own_count(value: Any) -> int | None:
    """The number of samples that an object itself gives."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) if len(value.batch_sizes) else 0
    if not (_is_graph(value) or _is_record(value)):
        return None
    for name in ("num_graphs", "batch_size"):
        if isinstance(count := getattr(value, name, None), int):
            return count
    if _is_graph(value):
        return 1
    return len(value) if hasattr(value, "__len__") else None


def _listed(batch: Any) -> _Extent | None:
    """The extent of a batch that is, or begins with, a list of samples: images, or dicts of an image each.

    A list of whole batches (two views of the same samples, several inputs) looks alike, but there all tensors have
    the same number of rows. Where nothing tells one from the other, nothing is cut.
    """
    value, found = batch, None
    while found is None and isinstance(value, list | tuple) and not hasattr(value, "_fields") and value:
        pair = value is batch and isinstance(value[0], Tensor)  # inputs and target, by convention
        if _alike(value) and not pair:
            found = value
        value = value[0]
    if found is None:
        return None
    inside = list(tensors_in(found))
    if not inside:
        return None
    mine = {id(tensor) for tensor in inside}
    others = [tensor for tensor in tensors_in(batch) if tensor.dim() and id(tensor) not in mine]
    lists = [v for v in _walk(batch) if isinstance(v, list | tuple) and v is not batch and v is not found]
    rows = {tensor.shape[0] for tensor in inside if tensor.dim()}
    certain = len(rows) > 1 or not all(tensor.dim() for tensor in inside) or _holds_numbers(found[0])
    certain = certain or any(len(v) == len(found) and isinstance(v[0], Mapping) for v in lists if v)
    if not certain and others:
        if all(tensor.shape[0] in rows for tensor in others):
            return None
        certain = all(tensor.shape[0] == len(found) for tensor in others)
    if not certain and not _images(inside):
        return None
    return _Extent(len(found), "list" if certain else None, found)


def _alike(values: Any) -> bool:
    """Whether these may be samples: tensors of one type and number of dimensions, or dicts, tuples or objects."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        return False
    if isinstance(first, Tensor):
        return all(value.dim() == first.dim() and value.dtype == first.dtype for value in values)
    if isinstance(first, Mapping):
        return all(value.keys() == first.keys() for value in values)
    if isinstance(first, list | tuple):  # an image and its label, not all images and then all labels
        same_length = len({len(value) for value in values}) == 1
        return same_length and not _uniform(first) and all(map(_uniform, zip(*values, strict=True)))
    return _is_record(first)


def _uniform(values: Any) -> bool:
    """Whether these are of one type, tensors with the same number of dimensions."""
    return len({(type(value), value.dim() if isinstance(value, Tensor) else 0) for value in values}) <= 1


def _holds_numbers(sample: Any) -> bool:
    """Whether it is a dict with plain numbers or texts, of which a batch would have several."""
    return isinstance(sample, Mapping) and any(isinstance(value, int | float | str) for value in sample.values())


def _images(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.dim() == 3 and tensor.shape[0] in _IMAGE_CHANNELS for tensor in tensors)


def batch_size(batch: Any) -> int:
    """The number of samples in a batch.

    What an object says of itself (graphs in a torch_geometric `Batch`, `len` of a dataclass), else the entries of a
    list of samples, else those along the first dimension of the first tensor; 1 if there is none.
    """
    return _extent(batch).size


def first_samples(batch: Any, count: int) -> Any:
    """The batch with the first `count` of its samples; the whole batch where it is not known how to cut it."""
    size, along, samples = _extent(batch)
    if count >= size or along is None:
        return batch
    if along == "graphs":
        return type(batch).from_data_list(batch.to_data_list()[:count])
    if along == "object" and any(not t.dim() or t.shape[0] != size for t in tensors_in(batch)):
        return batch  # nodes of graphs, steps of packed sequences
    if along == "list":
        return _cut_lists(batch, samples, size, count)
    return map_tensors(lambda tensor: tensor[:count] if tensor.dim() and tensor.shape[0] == size else tensor, batch)


def _cut_lists(value: Any, samples: Any, size: int, count: int) -> Any:
    """Cuts the list of samples, and what beside it has an entry for each sample."""
    if isinstance(value, Tensor):
        return value[:count] if value.dim() and value.shape[0] == size else value
    holds = isinstance(value, list | tuple) and not hasattr(value, "_fields") and len(value) == size
    if holds and (value is samples or not any(inner is samples for inner in _walk(value))):
        return value[:count]
    if (opened := _open(value)) is None:
        return value
    children, rebuild = opened
    return rebuild([_cut_lists(child, samples, size, count) for child in children])


# -- arguments of forward --------------------------------------------------------------------------------------------


class _Signature:
    """The parameters of a model's `forward`."""

    def __init__(self, model: nn.Module) -> None:
        self.owner = type(model).__name__
        parameters = list(inspect.signature(model.forward).parameters.values())
        self.names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.required = [p.name for p in self.positional if p.default is p.empty]
        self.any_names = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)


def bind_batch(model: nn.Module, batch: Any, labelled: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `model.forward` out of a batch.

    A tensor is the first argument. Of a tuple or list with several entries the last is the target, unless `forward`
    requires them all; it gives as many positional arguments as `forward` takes. Where the first entry is a tuple or a
    dict, it holds all inputs; where it is a list of samples, it is the first argument. Of a dict, the entries that
    `forward` has names for are passed by name; where it has none, the dict is the first argument. An object is the
    first argument, or, where `forward` requires several, holds them by their names.

    Raises:
        CalibrationError: `forward` requires more than the batch holds.
    """
    signature = _Signature(model)
    if isinstance(batch, Mapping):
        return _bind_names(signature, batch)
    if not isinstance(batch, list | tuple) or isinstance(batch, PackedSequence):
        held = len(signature.required) > 1 and all(hasattr(batch, name) for name in signature.required)
        if held and not isinstance(batch, Tensor):
            return (), {name: getattr(batch, name) for name in signature.names if hasattr(batch, name)}
        return (batch,), {}
    samples = _extent(batch).samples if len(signature.required) <= 1 else None
    if samples is batch:
        return (batch,), {}
    if batch and isinstance(batch[0], Mapping | list | tuple) and batch[0] is not samples:
        return bind_batch(model, batch[0], labelled=False)
    required, positional = signature.required, signature.positional
    inputs = batch[:-1] if labelled and len(batch) > max(1, len(required)) else batch
    if not signature.any_number:
        inputs = inputs[: len(positional)]
    if len(inputs) < len(required):
        raise CalibrationError(
            f"{signature.owner}.forward requires {', '.join(required)}, and the calibration "
            f"batches hold {counted(len(inputs), 'input')}. Give a loader whose batches have forward's arguments first."
        )
    return tuple(inputs), {}


def _bind_names(signature: _Signature, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    known = [key for key in batch if key in signature.names]
    if not known and (len(signature.required) == 1 or not (signature.required or signature.any_names)):
        return (batch,), {}
    if missing := [name for name in signature.required if name not in batch]:
        raise CalibrationError(
            f"{signature.owner}.forward requires {', '.join(missing)}, and the calibration batches are dicts "
            f"with {', '.join(map(repr, batch))}. Give a loader whose dicts have the names of forward's arguments."
        )
    return (), dict(batch) if signature.any_names else {key: batch[key] for key in known}


def describe_batch(batch: Any) -> str:
    """Types and shapes in a few words."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "a dict of " + ", ".join(f"{key}: {describe_batch(value)}" for key, value in batch.items())
    if isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence):
        return f"a {type(batch).__name__} of " + ", ".join(map(describe_batch, batch))
    if _is_record(batch) or _is_graph(batch):
        entries = _entries(batch) if _is_record(batch) else batch.to_dict()
        shown = ", ".join(f"{key}: {describe_batch(value)}" for key, value in entries.items())
        return f"{type(batch).__name__} with {shown}"
    return type(batch).__name__
