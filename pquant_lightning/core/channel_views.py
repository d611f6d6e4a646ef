"""Rules of the operations that move, pick and repeat elements, or work on each (see `core/channel_rules.py`)."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from pquant_lightning.core.batches import tensors_in
from pquant_lightning.core.channel_labels import Block, Labelling, Labels, Operand, block_at, moved, take

KERNEL = "they are places in a kernel"
LOOKED_UP = "they are looked up by index"
PLACE_IN_PIXEL = "they are places in a pixel (pixel_shuffle)"
TOLD_APART = "the model's code tells them apart by their number (tril, roll, flip)"
WINDOWS = "they are seen through sliding windows"


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in the arguments or the result of an operation."""
    return list(tensors_in(values))


def argument(args: Sequence[Any], kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def fresh_labels(t: Labelling, shape: Sequence[int], dims: Sequence[int] | None = None) -> Labels:
    """Labels of what is the same along some dimensions (all of them), of whatever size is asked for."""
    chosen = range(len(shape)) if dims is None else dims
    return [Block((dim,), t.ids.fresh(shape[dim], soft=True)) for dim in chosen if shape[dim] > 1]


# -- element by element ----------------------------------------------------------------------------------------------


def pointwise(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """Element by element, with broadcasting."""
    outs = tensors_of(result)
    operands = [t.item(x, outs[0].dim() - x.dim()) for x in tensors_of((args, kwargs)) if x.dim()]
    labels = t.merge(operands, outs[0].shape)
    return [labels for _ in outs]


def carry(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """The first tensor's labels, where the dimension has kept its size (pooling, resizing, copying)."""
    return [same_sizes(t, args[0], out) for out in tensors_of(result)]


def same_sizes(t: Labelling, x: Tensor, out: Tensor) -> Labels:
    labels = t.of(x)
    for dim in range(x.dim()):
        if dim >= out.dim() or x.shape[dim] != out.shape[dim]:
            labels = t.collapse(labels, dim, "padding, pooling or resizing changes how many they are")
    return labels


def constant(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`zeros`, `new_ones` and the like: as large as the code asks for."""
    return [fresh_labels(t, result.shape)]


def like(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`zeros_like` and the like: as large as the given tensor."""
    return [t.of(args[0])]


# -- views -----------------------------------------------------------------------------------------------------------


def view(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    return [t.reshape(t.of(args[0]), args[0].shape, result.shape)]


def as_strided(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """Followed only where it changes no element's place, as after a mean over an image."""
    if list(args[0].shape) == list(result.shape) and result.squeeze().is_contiguous():
        return [t.of(args[0])]
    t.fix(t.of(args[0]), "they are seen through new strides (as_strided)")
    return [[]]


def permute(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x = args[0]
    order = [dim % x.dim() for dim in args[1]]
    return [moved(t.of(x), order.index)]


def transpose(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x = args[0]
    one, other = (args[1] % x.dim(), args[2] % x.dim()) if len(args) > 1 else (0, x.dim() - 1)
    swap = {one: other, other: one}
    return [moved(t.of(x), lambda dim: swap.get(dim, dim))]


def expand(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels, shape = t.item(args[0], result.dim() - args[0].dim())
    return [labels + fresh_labels(t, result.shape, [dim for dim, size in enumerate(shape) if size == 1])]


def repeat(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels, shape = t.item(args[0], result.dim() - args[0].dim())
    tiled = [Block(b.dims, numpy.tile(b.ids, [args[1][dim] for dim in b.dims])) for b in labels]
    return [tiled + fresh_labels(t, result.shape, [dim for dim, size in enumerate(shape) if size == 1])]


def select(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels, dim = t.of(args[0]), args[1] % args[0].dim()
    t.pick(labels, dim, [result])
    return [take(labels, dim, args[2], drop=True)]


def part(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x = args[0]
    dim, start, end, step = (
        argument(args, kwargs, place, name, default)
        for place, (name, default) in enumerate((("dim", 0), ("start", None), ("end", None), ("step", 1)), 1)
    )
    return [take(t.of(x), dim % x.dim(), numpy.arange(x.shape[dim])[slice(start, end, step)])]


def split(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    """Parts at given places; parts of equal sizes stay equal, as `chunk` makes them."""
    dim = argument(args, kwargs, 2, "dim", 0) % args[0].dim()
    labels = t.of(args[0])
    sizes = [out.shape[dim] for out in result]
    ends = numpy.cumsum(sizes)
    parts = [take(labels, dim, numpy.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    if len(set(sizes)) == 1 and len(parts) > 1:
        for first, other in ((block_at(parts[0], dim), block_at(part, dim)) for part in parts[1:]):
            if first is not None and other is not None:
                t.ids.join(first.ids, other.ids)
    return parts


def unbind(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    dim = argument(args, kwargs, 1, "dim", 0) % args[0].dim()
    labels = t.of(args[0])
    t.pick(labels, dim, result)
    return [take(labels, dim, index, drop=True) for index in range(len(result))]


def unfold(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`Tensor.unfold`: windows along a dimension."""
    return [t.collapse(t.of(args[0]), args[1] % args[0].dim(), WINDOWS)]


def windows(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`im2col`, `(batch, channels, height, width)` to `(batch, channels * kernel, windows)`, and `col2im`."""
    x = args[0]
    labels = t.of(x)
    for dim in range(2, x.dim()):
        labels = t.collapse(labels, dim, WINDOWS)
    if x.dim() == 4:
        return [tiled(labels, 1, result.shape[1] // x.shape[1])]
    labels = t.reshape(labels, x.shape[:2], [x.shape[0], result.shape[1], x.shape[1] // result.shape[1]])
    return [t.collapse(labels, 2, KERNEL)]


def tiled(labels: Labels, dim: int, times: int) -> Labels:
    """Each index of a dimension several times in a row."""
    return [Block(b.dims, b.ids.repeat(times, b.dims.index(dim)) if dim in b.dims else b.ids) for b in labels]


def pixel_shuffle(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x, factor = args
    *batch, channels, height, width = x.shape
    first = len(batch)
    wide = [*batch, channels // factor**2, factor, factor, height, width]
    labels = t.reshape(t.of(x), x.shape, wide)
    for dim in (first + 1, first + 2):
        labels = t.collapse(labels, dim, PLACE_IN_PIXEL)
    place = {first: first, first + 3: first + 1, first + 4: first + 2}
    return [t.merge([(moved(labels, lambda dim: place.get(dim, dim)), result.shape)], result.shape)]


def channel_shuffle(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`(batch, groups * channels, ...)` to `(batch, channels * groups, ...)`."""
    (batch, channels, *rest), groups = args[0].shape, args[1]
    wide = [batch, groups, channels // groups, *rest]
    labels = moved(t.reshape(t.of(args[0]), result.shape, wide), lambda dim: {1: 2, 2: 1}.get(dim, dim))
    return [t.reshape(labels, [batch, channels // groups, groups, *rest], result.shape)]


def pixel_unshuffle(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x, factor = args
    labels = t.of(x)
    for dim in (x.dim() - 1, x.dim() - 2):
        labels = t.collapse(labels, dim, PLACE_IN_PIXEL)
    return [tiled(labels, x.dim() - 3, factor**2)]


def positional(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`tril` and `triu`: what is at a place depends on its number."""
    labels = t.of(args[0])
    for dim in (result.dim() - 1, result.dim() - 2):
        labels = t.collapse(labels, dim, TOLD_APART)
    return [labels]


def rolled(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`roll` (x, shifts, dims) and `flip` (x, dims)."""
    labels = t.of(args[0])
    for dim in args[-1] if len(args) > 1 and args[-1] else range(result.dim()):
        labels = t.collapse(labels, dim % result.dim(), TOLD_APART)
    return [labels]


# -- indices ---------------------------------------------------------------------------------------------------------


def embedding(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    last = result.dim() - 1
    return [moved(t.collapse(t.of(args[0]), 0, LOOKED_UP), lambda d: last)]


def embedding_bag(t: Labelling, args: Any, kwargs: Any, result: Any) -> list[Labels]:
    return [moved(t.collapse(t.of(args[0]), 0, LOOKED_UP), lambda d: 1), *([] for _ in tensors_of(result)[1:])]


def index(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x, indices = args[0], args[1]
    taken = [dim for dim, index in enumerate(indices) if index is not None]
    labels = t.of(x)
    if len(taken) == 1 and indices[taken[0]] in t.literals and indices[taken[0]].dim() == 1:
        places = indices[taken[0]].cpu().numpy()
        if places.dtype != bool:
            return [take(labels, taken[0], places % x.shape[taken[0]])]
    for dim in taken:
        labels = t.collapse(labels, dim, LOOKED_UP)
    widths = {d: indices[d].dim() if indices[d].dtype in (torch.bool, torch.uint8) else 1 for d in taken}
    covered = [d + step for d in taken for step in range(widths[d])]
    for dim in covered:
        labels = t.collapse(labels, dim, LOOKED_UP)
    added = result.dim() - (x.dim() - len(covered))
    together = covered == list(range(covered[0], covered[-1] + 1))
    front = covered[0] if together else 0

    def place(dim: int) -> int:
        return dim - sum(d < dim for d in covered) + (added if dim >= front else 0)

    return [moved(labels, place)]


def pick(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`index_select` and `gather`: (x, dim, index)."""
    x, dim = args[0], args[1] % max(args[0].dim(), 1)
    labels = t.collapse(t.of(x), dim, LOOKED_UP)
    for other in range(x.dim()):
        if result.dim() != x.dim() or (other != dim and result.shape[other] != x.shape[other]):
            labels = t.collapse(labels, other, LOOKED_UP)
    return [labels]


def fill_places(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`index_fill` (x, dim, index, value)."""
    return [t.collapse(t.of(args[0]), args[1] % max(result.dim(), 1), LOOKED_UP)]


def put(t: Labelling, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """`index_add` and `scatter`: (x, dim, index, source)."""
    x, dim, source = args[0], args[1] % max(args[0].dim(), 1), args[3]
    items = [t.item(each) for each in (x, source) if isinstance(each, Tensor) and each.dim() == x.dim()]
    operands: list[Operand] = [
        (t.collapse(labels, dim, LOOKED_UP), [1 if d == dim else n for d, n in enumerate(shape)])
        for labels, shape in items
    ]
    return [t.merge(operands, result.shape)]
