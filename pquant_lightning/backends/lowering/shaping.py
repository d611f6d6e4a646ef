"""Lowerings of what moves values: sizes, views, joining and splitting, indices, reductions, sorting, constants."""

from collections.abc import Sequence
from typing import Any

import torch

from pquant_lightning.backends.lowering.elementwise import constant, promoted
from pquant_lightning.backends.lowering.namespace import Array, Namespace, Size
from pquant_lightning.backends.lowering.table import UnsupportedOperationError, lowers, names

_END = 2**62  # what stands for "to the end" in a slice


@lowers("aten._assert_tensor_metadata.default")
def nothing(ns: Namespace, *args: Any, **kwargs: Any) -> None:
    """What torch checks while it traces."""


@lowers("aten.sym_size.int")
def sym_size(ns: Namespace, x: Array, dim: int) -> Size:
    return ns.shape(x)[dim]


# -- views -------------------------------------------------------------------------------------------------------------


@lowers("aten.view.default")
def reshape(ns: Namespace, x: Array, sizes: Sequence[Size], *strides: Any) -> Array:
    return ns.reshape(x, sizes)


@lowers("aten.unsqueeze.default")
def unsqueeze(ns: Namespace, x: Array, dim: int) -> Array:
    sizes = ns.shape(x)
    dim %= len(sizes) + 1
    return ns.reshape(x, [*sizes[:dim], 1, *sizes[dim:]])


@lowers("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def squeeze(ns: Namespace, x: Array, dims: Any = None) -> Array:
    sizes = ns.shape(x)
    dims = range(len(sizes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % max(len(sizes), 1) for dim in dims}
    return ns.reshape(x, [size for i, size in enumerate(sizes) if i not in gone or not _is_one(size)])


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


@lowers("aten.transpose.int")
def transpose(ns: Namespace, x: Array, first: int, second: int) -> Array:
    order = list(range(ns.rank(x)))
    if order:
        order[first], order[second] = order[second], order[first]
    return ns.transpose(x, order)


@lowers("aten.t.default")
def t(ns: Namespace, x: Array) -> Array:
    return ns.transpose(x, list(reversed(range(ns.rank(x)))))


@lowers("aten.permute.default")
def permute(ns: Namespace, x: Array, order: Sequence[int]) -> Array:
    return ns.transpose(x, [dim % ns.rank(x) for dim in order])


@lowers("aten.expand.default")
def expand(ns: Namespace, x: Array, sizes: Sequence[Size], implicit: bool = False) -> Array:
    own = [1] * (len(sizes) - ns.rank(x)) + ns.shape(x)
    wanted = [have if isinstance(size, int) and size == -1 else size for size, have in zip(sizes, own, strict=True)]
    return ns.broadcast_to(x, wanted)


@lowers("aten.repeat.default")
def repeat(ns: Namespace, x: Array, counts: Sequence[Size]) -> Array:
    sizes = [1] * (len(counts) - ns.rank(x)) + ns.shape(x)
    counts = [1] * (len(sizes) - len(counts)) + list(counts)
    apart = ns.reshape(x, [part for size in sizes for part in (1, size)])
    spread = ns.broadcast_to(apart, [part for pair in zip(counts, sizes, strict=True) for part in pair])
    return ns.reshape(spread, [count * size for count, size in zip(counts, sizes, strict=True)])


@lowers("aten.repeat_interleave.self_int")
def repeat_interleave(ns: Namespace, x: Array, count: Size, dim: int | None = None, output_size: Any = None) -> Array:
    if dim is None:
        x, dim = ns.reshape(x, [-1]), 0
    sizes = ns.shape(x)
    dim %= len(sizes)
    apart = ns.reshape(x, [*sizes[: dim + 1], 1, *sizes[dim + 1 :]])
    spread = ns.broadcast_to(apart, [*sizes[: dim + 1], count, *sizes[dim + 1 :]])
    return ns.reshape(spread, [*sizes[:dim], sizes[dim] * count, *sizes[dim + 1 :]])


# -- joining and splitting ---------------------------------------------------------------------------------------------


@lowers("aten.cat.default")
def cat(ns: Namespace, arrays: Sequence[Array], dim: int = 0) -> Array:
    kept = [x for x in arrays if not (ns.rank(x) == 1 and ns.shape(x)[0] == 0)]  # torch skips empty vectors
    return ns.concat(promoted(ns, *kept), dim % ns.rank(kept[0]))


@lowers("aten.stack.default")
def stack(ns: Namespace, arrays: Sequence[Array], dim: int = 0) -> Array:
    arrays = promoted(ns, *arrays)
    return ns.concat([unsqueeze(ns, x, dim) for x in arrays], dim % (ns.rank(arrays[0]) + 1))


@lowers("aten.slice.Tensor")
def slice_(ns: Namespace, x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    dim %= ns.rank(x)
    size = ns.shape(x)[dim]
    first, last = _inside(0 if start is None else start, size), _inside(_END if end is None else end, size)
    if isinstance(first, int) and isinstance(last, int):
        last = max(first, last)
    return (
        x
        if isinstance(first, int) and first == 0 and last is size and step == 1
        else ns.slice(x, dim, first, last, step)
    )


def _inside(place: Size, size: Size) -> Size:
    """A place in a slice, counted from the front, and not beyond the end."""
    if isinstance(place, int) and place >= _END:
        return size
    if isinstance(place, int) and place < 0:
        place = place + size
        return max(place, 0) if isinstance(place, int) else place
    return min(place, size) if isinstance(place, int) and isinstance(size, int) else place


@lowers("aten.select.int")
def select(ns: Namespace, x: Array, dim: int, index: Size) -> Array:
    sizes = ns.shape(x)
    dim %= len(sizes)
    if isinstance(index, int) and index < 0:
        index = index + sizes[dim]
    return ns.reshape(ns.slice(x, dim, index, index + 1, 1), [*sizes[:dim], *sizes[dim + 1 :]])


@lowers("aten.split.Tensor", "aten.split_with_sizes.default")
def split(ns: Namespace, x: Array, sizes: Any, dim: int = 0) -> list[Array]:
    dim %= ns.rank(x)
    whole = ns.shape(x)[dim]
    if not isinstance(sizes, list | tuple):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [ns.slice(x, dim, start, start + size, 1) for start, size in zip(starts, sizes, strict=True)]


@lowers("aten.unbind.int")
def unbind(ns: Namespace, x: Array, dim: int = 0) -> list[Array]:
    return [select(ns, x, dim, i) for i in range(ns.shape(x)[dim])]


@lowers("aten.pad.default", "aten.constant_pad_nd.default")
def pad(ns: Namespace, x: Array, widths: Sequence[int], mode: Any = "constant", value: float | None = None) -> Array:
    if not isinstance(mode, str):  # constant_pad_nd has the value here
        mode, value = "constant", mode
    pairs = [(0, 0)] * ns.rank(x)
    for i in range(len(widths) // 2):
        pairs[-1 - i] = widths[2 * i], widths[2 * i + 1]
    if mode == "constant":
        for axis, (before, after) in enumerate(pairs):
            if before < 0 or after < 0:
                x = slice_(ns, x, axis, max(-before, 0), _END if after >= 0 else after)
        return ns.pad(x, [(max(a, 0), max(b, 0)) for a, b in pairs], 0 if value is None else value)
    for axis, (before, after) in enumerate(pairs):
        if before or after:
            x = _pad_by_values(ns, x, axis, before, after, mode)
    return x


def _pad_by_values(ns: Namespace, x: Array, axis: int, before: int, after: int, mode: str) -> Array:
    """With values of the dimension itself: "reflect", "replicate" or "circular"."""
    size = ns.shape(x)[axis]

    def part(start: Size, stop: Size) -> Array:
        return ns.slice(x, axis, start, stop, 1)

    if mode == "replicate":
        left, right = [part(0, 1)] * before, [part(size - 1, size)] * after
    elif mode == "circular":
        left, right = [part(size - before, size)] if before else [], [part(0, after)] if after else []
    else:
        left = [ns.flip(part(1, before + 1), [axis])] if before else []
        right = [ns.flip(part(size - after - 1, size - 1), [axis])] if after else []
    return ns.concat([*left, x, *right], axis)


@lowers("aten.flip.default")
def flip(ns: Namespace, x: Array, dims: Sequence[int]) -> Array:
    return ns.flip(x, [dim % ns.rank(x) for dim in dims])


@lowers("aten.roll.default")
def roll(ns: Namespace, x: Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> Array:
    sizes = ns.shape(x)
    if not dims:
        return ns.reshape(roll(ns, ns.reshape(x, [-1]), shifts, [0]), sizes)
    for shift, dim in zip(shifts, dims, strict=True):
        size, axis = ns.shape(x)[dim], dim % len(sizes)
        cut = size - shift % size
        x = ns.concat([ns.slice(x, axis, cut, size, 1), ns.slice(x, axis, 0, cut, 1)], axis)
    return x


# -- indices -----------------------------------------------------------------------------------------------------------


@lowers("aten.embedding.default")
def embedding(ns: Namespace, weight: Array, indices: Array, *rest: Any) -> Array:
    return ns.take(weight, indices, 0)


@lowers("aten.index_select.default")
def index_select(ns: Namespace, x: Array, dim: int, indices: Array) -> Array:
    return ns.take(x, indices, dim % ns.rank(x))


@lowers("aten.take_along_dim.default")
def take_along_dim(ns: Namespace, x: Array, indices: Array, dim: int | None = None) -> Array:
    if dim is None:
        return ns.take_along(ns.reshape(x, [-1]), ns.reshape(indices, [-1]), 0)
    return ns.take_along(x, indices, dim % ns.rank(x))


@lowers("aten.gather.default")
def gather(ns: Namespace, x: Array, dim: int, indices: Array, **kwargs: Any) -> Array:
    return ns.take_along(x, indices, dim % ns.rank(x))


@lowers("aten.index.Tensor")
def index(ns: Namespace, x: Array, indices: Sequence[Any]) -> Array:
    x, places, back = _points(ns, x, indices)
    return ns.transpose(ns.take_points(x, places), back) if back else ns.take_points(x, places)


@lowers("aten.index_put.default")
def index_put(ns: Namespace, x: Array, indices: Sequence[Any], values: Array, accumulate: bool = False) -> Array:
    if len(indices) == 1 and indices[0] is not None and ns.dtype(indices[0]) is torch.bool and ns.rank(values) == 0:
        mask = ns.reshape(indices[0], ns.shape(indices[0]) + [1] * (ns.rank(x) - ns.rank(indices[0])))
        return ns.where(mask, ns.add(x, values) if accumulate else ns.cast(values, ns.dtype(x)), x)
    order = _front(ns, x, indices)
    moved, places, back = _points(ns, x, indices)
    sizes = ns.shape(places[0]) + ns.shape(moved)[len(places) :]
    values = ns.broadcast_to(ns.cast(values, ns.dtype(x)), [sizes[i] for i in back] if back else sizes)
    if back:  # values are laid out as the result of indexing is
        values = ns.transpose(values, [back.index(i) for i in range(len(back))])
    result = ns.put_points(moved, places, values, accumulate)
    return result if order == sorted(order) else ns.transpose(result, [order.index(i) for i in range(len(order))])


def _front(ns: Namespace, x: Array, indices: Sequence[Any]) -> list[int]:
    """The dimensions of x, those that are indexed first."""
    indexed = [dim for dim, found in enumerate(indices) if found is not None]
    return indexed + [dim for dim in range(ns.rank(x)) if dim not in indexed]


def _points(ns: Namespace, x: Array, indices: Sequence[Any]) -> tuple[Array, list[Array], list[int] | None]:
    """x with its indexed dimensions in front, indices of one shape, and how the result is laid out afterwards."""
    given = [found for found in indices if found is not None]
    order = _front(ns, x, indices)
    sizes = [ns.shape(x)[dim] for dim in order[: len(given)]]
    zero = [constant(ns, 0, found) for found in given]
    inside = [
        ns.where(ns.lt(found, low), ns.add(found, ns.cast(ns.asarray(size), ns.dtype(found))), found)
        for found, low, size in zip(given, zero, sizes, strict=True)
    ]
    rank = max(map(ns.rank, inside))
    shape = _broadcast_shape([[1] * (rank - ns.rank(found)) + ns.shape(found) for found in inside])
    places = [found if len(inside) == 1 else ns.broadcast_to(found, shape) for found in inside]
    moved = x if order == sorted(order) else ns.transpose(x, order)
    indexed, others = order[: len(given)], order[len(given) :]
    if indexed != list(range(indexed[0], indexed[0] + len(indexed))) or indexed[0] == 0:
        return moved, places, None  # the indexed dimensions come first
    before = sum(dim < indexed[0] for dim in others)
    back = [rank + i for i in range(before)] + list(range(rank)) + [rank + i for i in range(before, len(others))]
    return moved, places, back


def _broadcast_shape(shapes: Sequence[Sequence[Size]]) -> list[Size]:
    return [next((size for size in sizes if not _is_one(size)), 1) for sizes in zip(*shapes, strict=True)]


@lowers("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default")
def scatter(ns: Namespace, x: Array, dim: int, indices: Array, values: Any) -> Array:
    return _scattered(ns, x, dim, indices, values, add=False)


@lowers("aten.scatter_add.default")
def scatter_add(ns: Namespace, x: Array, dim: int, indices: Array, values: Any) -> Array:
    return _scattered(ns, x, dim, indices, values, add=True)


def _scattered(ns: Namespace, x: Array, dim: int, indices: Array, values: Any, add: bool) -> Array:
    sizes, dim = ns.shape(indices), dim % ns.rank(x)
    values = constant(ns, values, x)
    if ns.rank(values):
        for axis, size in enumerate(sizes):
            values = ns.slice(values, axis, 0, size, 1)
    dtype, places = ns.dtype(indices), []
    for axis, size in enumerate(sizes):
        steps = ns.reshape(ns.arange(0, size, 1, dtype), [-1 if i == axis else 1 for i in range(len(sizes))])
        places.append(indices if axis == dim else ns.broadcast_to(steps, sizes))
    return ns.put_points(x, places, ns.broadcast_to(values, sizes), add)


@lowers("aten.select_scatter.default")
def select_scatter(ns: Namespace, x: Array, source: Array, dim: int, index: Size) -> Array:
    return slice_scatter(ns, x, unsqueeze(ns, source, dim), dim, index, index + 1)


@lowers("aten.slice_scatter.default")
def slice_scatter(
    ns: Namespace, x: Array, source: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Array:
    dim %= ns.rank(x)
    size = ns.shape(x)[dim]
    first, last = _inside(0 if start is None else start, size), _inside(_END if end is None else end, size)
    if step == 1:
        return ns.concat([ns.slice(x, dim, 0, first, 1), source, ns.slice(x, dim, last, size, 1)], dim)
    moved = transpose(ns, x, 0, dim)
    places = ns.arange(first, last, step, torch.int64)
    return transpose(ns, ns.put_points(moved, [places], transpose(ns, source, 0, dim), False), 0, dim)


@lowers("aten.tril.default")
def tril(ns: Namespace, x: Array, diagonal: int = 0) -> Array:
    return _triangle(ns, x, diagonal, lower=True)


@lowers("aten.triu.default")
def triu(ns: Namespace, x: Array, diagonal: int = 0) -> Array:
    return _triangle(ns, x, diagonal, lower=False)


def _triangle(ns: Namespace, x: Array, diagonal: int, lower: bool) -> Array:
    rows, columns = ns.shape(x)[-2:]
    row = ns.reshape(ns.arange(0, rows, 1, torch.int64), [-1, 1])
    column = ns.reshape(ns.arange(0, columns, 1, torch.int64), [1, -1])
    limit = ns.add(row, constant(ns, diagonal, row))
    return ns.where(ns.le(column, limit) if lower else ns.ge(column, limit), x, constant(ns, 0, x))


@lowers("aten.one_hot.default")
def one_hot(ns: Namespace, x: Array, count: int = -1) -> Array:
    if count < 0:
        raise UnsupportedOperationError("torch.nn.functional.one_hot needs num_classes to be exported: give it.")
    return ns.cast(ns.eq(unsqueeze(ns, x, -1), ns.arange(0, count, 1, ns.dtype(x))), torch.int64)


# -- reductions --------------------------------------------------------------------------------------------------------


def reduced(ns: Namespace, name: str, x: Array, dims: Any, keepdim: bool, dtype: torch.dtype | None = None) -> Array:
    """A reduction over dimensions, all of them for None or an empty list."""
    if dtype is not None:
        x = ns.cast(x, dtype)
    if name in ("all", "any"):
        x = ns.cast(x, torch.bool)
    elif name in ("sum", "prod") and not ns.dtype(x).is_floating_point:
        x = ns.cast(x, torch.int64)
    dims = [dims] if isinstance(dims, int) else dims
    count = ns.rank(x)
    return getattr(ns, name)(x, [d % count for d in dims] if dims else list(range(count)), keepdim)


def _enter_reduction(name: str, operations: Sequence[str]) -> None:
    @lowers(*operations)
    def lowering(ns: Namespace, x: Array, dims: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
        return reduced(ns, name, x, dims, keepdim, dtype)


for _name, _operations in {
    "all": ("all.default", "all.dim", "all.dims"),
    "any": ("any.default", "any.dim", "any.dims"),
    "max": ("amax.default",),
    "mean": ("mean.default", "mean.dim"),
    "min": ("amin.default",),
    "prod": ("prod.default", "prod.dim_int"),
    "sum": ("sum.default", "sum.dim_IntList"),
}.items():
    _enter_reduction(_name, names("aten.{}", _operations))


@lowers("aten.max.default")
def max_all(ns: Namespace, x: Array) -> Array:
    return reduced(ns, "max", x, None, False)


@lowers("aten.min.default")
def min_all(ns: Namespace, x: Array) -> Array:
    return reduced(ns, "min", x, None, False)


@lowers("aten.max.dim")
def max_dim(ns: Namespace, x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return reduced(ns, "max", x, dim, keepdim), argmax(ns, x, dim, keepdim)


@lowers("aten.min.dim")
def min_dim(ns: Namespace, x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return reduced(ns, "min", x, dim, keepdim), argmax(ns, ns.neg(x), dim, keepdim)


@lowers("aten.argmax.default")
def argmax(ns: Namespace, x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    if dim is None:
        return argmax(ns, ns.reshape(x, [-1]), 0)
    places = ns.argmax(x, dim % ns.rank(x))
    return unsqueeze(ns, places, dim % ns.rank(x)) if keepdim else places


@lowers("aten.argmin.default")
def argmin(ns: Namespace, x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return argmax(ns, ns.neg(x), dim, keepdim)


@lowers("aten.var.dim", "aten.var.correction")
def var(
    ns: Namespace, x: Array, dims: Any = None, unbiased: bool = True, keepdim: bool = False, correction: Any = None
) -> Array:
    off = ns.sub(x, reduced(ns, "mean", x, dims, True))
    correction = (1 if unbiased else 0) if correction is None else correction
    count = ns.cast(ns.asarray(_count(ns, x, dims)), ns.dtype(x))
    total = reduced(ns, "sum", ns.mul(off, off), dims, keepdim)
    return ns.div(total, ns.sub(count, constant(ns, correction, x)))


@lowers("aten.std.dim", "aten.std.correction")
def std(ns: Namespace, x: Array, *args: Any, **kwargs: Any) -> Array:
    return ns.sqrt(var(ns, x, *args, **kwargs))


def _count(ns: Namespace, x: Array, dims: Any) -> Size:
    sizes = ns.shape(x)
    count: Size = 1
    for dim in range(len(sizes)) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims:
        count = count * sizes[dim]
    return count


@lowers("aten.logsumexp.default")
def logsumexp(ns: Namespace, x: Array, dims: Any, keepdim: bool = False) -> Array:
    top = reduced(ns, "max", x, dims, True)
    total = reduced(ns, "sum", ns.exp(ns.sub(x, top)), dims, keepdim)
    return ns.add(ns.log(total), top if keepdim else reduced(ns, "max", x, dims, False))


@lowers("aten.linalg_vector_norm.default")
def vector_norm(
    ns: Namespace, x: Array, order: Any = 2, dims: Any = None, keepdim: bool = False, dtype: Any = None
) -> Array:
    order = 2 if order is None else order
    if order == 2:
        return ns.sqrt(reduced(ns, "sum", ns.mul(x, x), dims, keepdim))
    if order == float("inf"):
        return reduced(ns, "max", ns.abs(x), dims, keepdim)
    total = reduced(ns, "sum", ns.pow(ns.abs(x), constant(ns, order, x)), dims, keepdim)
    return ns.pow(total, constant(ns, 1 / order, x))


@lowers("aten.cumsum.default")
def cumsum(ns: Namespace, x: Array, dim: int, dtype: torch.dtype | None = None) -> Array:
    wide = x if ns.dtype(x).is_floating_point else ns.cast(x, torch.int64)
    return ns.cumsum(wide, dim % ns.rank(x))


@lowers("aten.diff.default")
def diff(ns: Namespace, x: Array, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Array:
    x = cat(ns, [part for part in (prepend, x, append) if part is not None], dim)
    for _ in range(n):
        x = ns.sub(slice_(ns, x, dim, 1), slice_(ns, x, dim, 0, -1))
    return x


@lowers("aten.topk.default")
def topk(
    ns: Namespace,
    x: Array,
    count: Size,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002
) -> tuple[Array, Array]:
    moved = transpose(ns, x if largest else ns.neg(x), dim, -1)
    values, places = (transpose(ns, found, dim, -1) for found in ns.top_k(moved, count))
    return values if largest else ns.neg(values), places


@lowers("aten.sort.default")
def sort(ns: Namespace, x: Array, dim: int = -1, descending: bool = False) -> tuple[Array, Array]:
    return topk(ns, x, ns.shape(x)[dim], dim, largest=descending)


@lowers("aten.sort.stable")
def stable_sort(ns: Namespace, x: Array, *, dim: int = -1, descending: bool = False, **how: Any) -> tuple[Array, Array]:
    return sort(ns, x, dim, descending)


@lowers("aten.argsort.default")
def argsort(ns: Namespace, x: Array, dim: int = -1, descending: bool = False) -> Array:
    return sort(ns, x, dim, descending)[1]


# -- constants ---------------------------------------------------------------------------------------------------------


def _dtype_for(given: torch.dtype | None, *values: Any) -> torch.dtype:
    if given is not None:
        return given
    return torch.get_default_dtype() if any(isinstance(value, float) for value in values) else torch.int64


@lowers("aten.arange.default")
def arange(ns: Namespace, stop: Size, dtype: torch.dtype | None = None) -> Array:
    return ns.arange(0, stop, 1, _dtype_for(dtype, stop))


@lowers("aten.arange.start_step")
def arange_from(ns: Namespace, start: Size, stop: Size, step: Size = 1, dtype: torch.dtype | None = None) -> Array:
    return ns.arange(start, stop, step, _dtype_for(dtype, start, stop, step))


@lowers("aten.full.default")
def full(ns: Namespace, sizes: Sequence[Size], value: Any, dtype: torch.dtype | None = None) -> Array:
    if dtype is None and isinstance(value, bool):
        dtype = torch.bool
    return ns.full(sizes, value, _dtype_for(dtype, value))


@lowers("aten.scalar_tensor.default")
def scalar_tensor(ns: Namespace, value: Any, dtype: torch.dtype | None = None) -> Array:
    return ns.asarray(value, dtype or torch.get_default_dtype())


def _enter_filled(name: str, value: int) -> None:
    @lowers(f"aten.{name}.default")
    def of_sizes(ns: Namespace, sizes: Sequence[Size], dtype: torch.dtype | None = None) -> Array:
        return ns.full(sizes, value, dtype or torch.get_default_dtype())

    @lowers(f"aten.new_{name}.default")
    def new(ns: Namespace, x: Array, sizes: Sequence[Size], dtype: torch.dtype | None = None) -> Array:
        return ns.full(sizes, value, dtype or ns.dtype(x))

    @lowers(f"aten.{name}_like.default")
    def like(ns: Namespace, x: Array, dtype: torch.dtype | None = None) -> Array:
        return ns.full(ns.shape(x), value, dtype or ns.dtype(x))


for _name, _value in (("zeros", 0), ("ones", 1)):
    _enter_filled(_name, _value)


@lowers("aten.empty.memory_format")
def empty(ns: Namespace, sizes: Sequence[Size], dtype: torch.dtype | None = None, **how: Any) -> Array:
    return ns.full(sizes, 0, dtype or torch.get_default_dtype())


@lowers("aten.empty_like.default")
def empty_like(ns: Namespace, x: Array, dtype: torch.dtype | None = None) -> Array:
    return ns.full(ns.shape(x), 0, dtype or ns.dtype(x))


@lowers("aten.full_like.default")
def full_like(ns: Namespace, x: Array, value: Any, dtype: torch.dtype | None = None) -> Array:
    return ns.full(ns.shape(x), value, dtype or ns.dtype(x))


@lowers("aten.new_full.default")
def new_full(ns: Namespace, x: Array, sizes: Sequence[Size], value: Any, dtype: torch.dtype | None = None) -> Array:
    return ns.full(sizes, value, dtype or ns.dtype(x))


@lowers("aten.fill.Scalar")
def fill(ns: Namespace, x: Array, value: Any) -> Array:
    return ns.broadcast_to(constant(ns, value, x), ns.shape(x))


@lowers("aten.copy.default")
def copy(ns: Namespace, x: Array, source: Array, non_blocking: bool = False) -> Array:
    return ns.broadcast_to(ns.cast(source, ns.dtype(x)), ns.shape(x))
