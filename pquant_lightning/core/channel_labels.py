"""Identities of the indices of tensors' dimensions: which are one and the same channel, and which cannot go.

A tensor's labels are blocks, each over some of its dimensions; an array gives every element of these dimensions the
identity of its channel. A dimension without a label has a fixed size. Labels are immutable; what is learned later, that
two identities are one or that one is fixed, is kept in `Identities`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Ids = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

# why channels stay; each is read after "left alone, "
PICKED = "the model's code picks single ones of them by their number"
MERGED = "a reshape merges them with another dimension"
FIXED_SIZE = "they are combined with something whose size is fixed: an input, a buffer or a constant"
HEAD_WIDTH = "they are the width of a head"
MIXED = "they are mixed with another dimension"


class Identities:
    """A union-find over the indices of all dimensions, with the reason why a class is fixed.

    A class without a parameter's index is soft: it belongs to constants that the model's code makes, such as zeros, or
    to a key that is repeated for each head, and these are as large as the code asks for.
    """

    def __init__(self) -> None:
        self._parents: Ids = numpy.zeros(1024, numpy.int64)
        self._soft = numpy.zeros(1024, bool)  # by root
        self._read = numpy.zeros(1024, bool)  # by root
        self._reason = numpy.zeros(1024, numpy.int64)  # by root: a place in `_reasons`
        self._reasons: list[str | None] = [None]
        self._count = 0

    def fresh(self, count: int, soft: bool = False) -> Ids:
        """`(count,)` identities that nothing else has."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._parents):
            self._parents = numpy.concatenate([self._parents, numpy.zeros(self._count, numpy.int64)])
            self._reason = numpy.concatenate([self._reason, numpy.zeros(self._count, numpy.int64)])
            self._soft = numpy.concatenate([self._soft, numpy.zeros(self._count, bool)])
            self._read = numpy.concatenate([self._read, numpy.zeros(self._count, bool)])
        ids = numpy.arange(first, self._count)
        self._parents[ids], self._soft[ids] = ids, soft
        return ids

    def roots(self, nodes: Ids) -> Ids:
        """Each node's class."""
        found = self._parents[nodes]
        while not numpy.array_equal(further := self._parents[found], found):
            found = further
        self._parents[nodes] = found
        return found

    def free_roots(self, nodes: Ids) -> Ids:
        """Each node's class; -1 for all that are fixed."""
        found = self.roots(nodes)
        return numpy.where(self._reason[found] > 0, -1, found)

    def soft(self, nodes: Ids) -> bool:
        """Whether all of these are as large as the code asks for."""
        return bool(self._soft[self.roots(nodes)].all())

    def join(self, one: Ids, other: Ids) -> None:
        """Makes the indices at equal places one; the arrays broadcast."""
        one, other = numpy.broadcast_arrays(self.roots(one), self.roots(other))
        differ = one != other
        pairs = numpy.unique(numpy.stack([one[differ], other[differ]]), axis=1)
        while pairs.size:
            keep, gone = pairs
            _, first = numpy.unique(gone, return_index=True)  # each joins one other, at a time
            first = first[~numpy.isin(gone[first], keep[first])]
            if not len(first):
                first = numpy.array([0])
            self._attach(keep[first], gone[first])
            pairs = self.roots(pairs)
            pairs = numpy.unique(pairs[:, pairs[0] != pairs[1]], axis=1)

    def _attach(self, keep: Ids, gone: Ids) -> None:
        """Puts classes, each named once, under others that are none of them; the first reason counts."""
        self._parents[gone] = keep
        numpy.logical_and.at(self._soft, keep, self._soft[gone])
        numpy.logical_or.at(self._read, keep, self._read[gone])
        fixed = (self._reason[gone] > 0) & (self._reason[keep] == 0)
        self._reason[keep[fixed]] = self._reason[gone[fixed]]

    def fix(self, nodes: Ids, reason: str) -> None:
        """These cannot go; the first reason counts."""
        roots = self.roots(nodes)
        roots = roots[self._reason[roots] == 0]
        if roots.size:
            if reason not in self._reasons:
                self._reasons.append(reason)
            self._reason[roots] = self._reasons.index(reason)

    def read(self, nodes: Ids) -> None:
        """A product sums over these, so that what they hold matters."""
        self._read[self.roots(nodes)] = True

    def is_read(self, root: int) -> bool:
        """Whether a product sums over an index of this class."""
        return bool(self._read[root])

    def reason(self, root: int) -> str | None:
        """Why a class is fixed; None where it is not."""
        return self._reasons[self._reason[root]]


@dataclass(frozen=True)
class Block:
    """Identities over some dimensions of a tensor jointly: `ids` has one axis for each of `dims`, in that order."""

    dims: tuple[int, ...]
    ids: Ids

    def size(self, dim: int) -> int:
        return self.ids.shape[self.dims.index(dim)]

    def transposed(self, order: Sequence[int]) -> Ids:
        """The identities with their axes in another order of the dimensions."""
        return self.ids.transpose([self.dims.index(dim) for dim in order])


Labels = list[Block]
Operand = tuple[Labels, Sequence[int]]  # labels and shape


def block_at(labels: Labels, dim: int) -> Block | None:
    """The block that covers a dimension."""
    return next((block for block in labels if dim in block.dims), None)


def moved(labels: Labels, place: Callable[[int], int]) -> Labels:
    """The labels of a tensor whose dimensions have moved."""
    return [Block(tuple(map(place, block.dims)), block.ids) for block in labels]


def simple(block: Block) -> Block | None:
    """Without the dimensions along which nothing changes; None where none is left."""
    dims, ids = list(block.dims), block.ids
    for axis in reversed(range(ids.ndim)):
        first = ids.take([0], axis)
        if ids.ndim > 1 and (ids == first).all():
            ids = first.squeeze(axis)
            del dims[axis]
    return Block(tuple(dims), ids) if dims else None


def take(labels: Labels, dim: int, indices: Any, drop: bool = False) -> Labels:
    """The labels of some indices along a dimension; `drop`: of a single one, and the dimension is gone."""
    found = []
    for block in labels:
        dims, ids = block.dims, block.ids
        if dim in dims:
            ids = ids.take(indices, dims.index(dim))
            dims = tuple(d for d in dims if d != dim) if drop else dims
        if drop:
            dims = tuple(d - (d > dim) for d in dims)
        if dims:
            found.append(Block(dims, ids))
    return found


class Labelling:
    """What happens to labels where tensors meet, are summed over or change their shape."""

    def __init__(self) -> None:
        self.ids = Identities()
        self.literals: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # numbers written in the model's code
        self._labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._picked: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._grids: list[Ids] = []

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """A tensor has these labels from now on."""
        found = [block for each in labels if (block := simple(each)) is not None]
        for block in found:
            if block.ids.size == 1:
                self.ids.fix(block.ids, PICKED)
        self._labels[tensor] = [block for block in found if block.ids.size > 1]

    def pick(self, labels: Labels, dim: int, results: Iterable[Tensor]) -> None:
        """Single indices of a dimension are taken: once they are read, all must stay, or others would be read."""
        block = block_at(labels, dim)
        if block is not None and len(block.dims) == 1:
            for tensor in results:
                self._picked[tensor] = block.ids

    def of(self, tensor: Any) -> Labels:
        """The labels of a tensor, as far as its indices are still told apart; none for anything else."""
        if not isinstance(tensor, Tensor):
            return []
        if (ids := self._picked.pop(tensor, None)) is not None:
            self.ids.fix(ids, PICKED)
        held = self._labels.get(tensor, ())
        found = (simple(Block(block.dims, self.ids.roots(block.ids))) for block in held)
        return [block for block in found if block is not None]

    def item(self, tensor: Tensor, offset: int = 0) -> Operand:
        """An operand of `merge` whose dimensions begin at `offset`."""
        return moved(self.of(tensor), lambda dim: dim + offset), [1] * offset + list(tensor.shape)

    def fix(self, labels: Labels, reason: str) -> None:
        """Nothing that these labels name can go."""
        for block in labels:
            self.ids.fix(block.ids, reason)

    def collapse(self, labels: Labels, dim: int, reason: str) -> Labels:
        """Indices along a dimension can only go together, or where it stands alone not at all; its label is gone."""
        block = block_at(labels, dim)
        if block is None:
            return labels
        others = [other for other in labels if other is not block]
        if len(block.dims) == 1:
            self.ids.fix(block.ids, reason)
            return others
        axis = block.dims.index(dim)
        whole = self._one(numpy.moveaxis(block.ids, axis, -1))
        return [*others, Block(tuple(d for d in block.dims if d != dim), whole)]

    def _one(self, ids: Ids) -> Ids:
        """Joins what lies along the last axis, and gives the array without it."""
        flat = ids.reshape(-1, ids.shape[-1])
        self.ids.join(flat, flat[:, :1])
        return flat[:, 0].reshape(ids.shape[:-1])

    def settle(self, labels: Labels, dim: int, reason: str) -> Labels:
        """As `collapse`, but what stands alone stays labelled: it is fixed, and known."""
        block = block_at(labels, dim)
        if block is not None and len(block.dims) == 1 and not self.ids.soft(block.ids):
            self.ids.fix(block.ids, reason)
            return labels
        return self.collapse(labels, dim, reason)

    def merge(self, operands: Iterable[Operand], shape: Sequence[int]) -> Labels:
        """The labels of what is computed element by element from operands of the same dimensions.

        Args:
            operands: labels and shape (1 = is broadcast).
            shape: of the result.
        """
        items = list(operands)
        merged: Labels = []
        for labels, _ in items:
            for dim in {dim for block in labels for dim in block.dims}:
                if any(size[dim] > 1 and block_at(own, dim) is None for own, size in items):
                    labels = self.settle(labels, dim, FIXED_SIZE)
            for block in labels:
                merged = self._with(merged, block)
        return [block for block in merged if all(shape[dim] > 1 for dim in block.dims)]

    def _with(self, labels: Labels, block: Block) -> Labels:
        """Adds a block; where it names dimensions that another names, their elements are joined."""
        while (other := next((o for o in labels if set(o.dims) & set(block.dims)), None)) is not None:
            labels = [o for o in labels if o is not other]
            small, large = sorted((block, other), key=lambda b: len(b.dims))
            rest: Labels = [small]
            for dim in set(small.dims) - set(large.dims):
                rest = self.collapse(rest, dim, MIXED)
            if not rest:
                block = large
                continue
            (small,) = rest
            ids = small.transposed([dim for dim in large.dims if dim in small.dims])
            ids = ids.reshape([n if d in small.dims else 1 for d, n in zip(large.dims, large.ids.shape, strict=True)])
            self.ids.join(ids, large.ids)
            block = large
        return [*labels, block]

    # -- sums --------------------------------------------------------------------------------------------------------

    def contract(
        self, one: Labels, first: int, other: Labels, second: int, batch: Sequence[tuple[int, int]] = ()
    ) -> tuple[Labels, Labels]:
        """Joins what is multiplied and summed over; returns both labels without that dimension, batches not merged.

        Args:
            one: labels of a tensor.
            first: its dimension that is summed over.
            other: labels of another.
            second: likewise.
            batch: pairs of dimensions of the two that run along with each other.
        """
        x, y = block_at(one, first), block_at(other, second)
        if x is None or y is None:
            one, other = (self.settle(labels, dim, FIXED_SIZE) for labels, dim in ((one, first), (other, second)))
        elif (shared := self._shared(x, other, batch)) or self._shared(y, one, [(b, a) for a, b in batch]):
            wide, dim = (x, first) if shared else (y, second)
            self._heads(wide, dim, shared or self._shared(y, one, [(b, a) for a, b in batch]))
            self.ids.fix((y if shared else x).ids, HEAD_WIDTH)
        else:
            pairs = dict(batch)
            aligned = [(d, pairs[d]) for d in x.dims if d in pairs and pairs[d] in y.dims]
            left = self._spread(x, [d for d, _ in aligned], first)
            right = self._spread(y, [d for _, d in aligned], second)
            self.ids.join(left, left[:, :1])  # what else the blocks run over shares these indices
            self.ids.join(right, right[:, :1])
            self.ids.join(left[:, 0], right[:, 0])
            self.ids.read(left[:, 0])
        return self.summed(one, first), self.summed(other, second)

    def _shared(self, x: Block, other: Labels, batch: Sequence[tuple[int, int]]) -> list[int]:
        """The dimensions of a block along which the other operand is the same for all, as one key for many heads."""
        found = []
        for mine, its in batch:
            block = block_at(other, its)
            if mine in x.dims and block is not None and self.ids.soft(block.ids):
                found.append(mine)
        return found

    def _heads(self, block: Block, dim: int, heads: Sequence[int]) -> None:
        """Makes all that lies within a head one."""
        self._one(self._spread(block, heads, dim).reshape(math.prod(block.size(d) for d in heads), -1))

    def _spread(self, block: Block, aligned: Sequence[int], dim: int) -> Ids:
        """As `(aligned, others, dim)`, the aligned dimensions flattened."""
        others = [d for d in block.dims if d not in aligned and d != dim]
        ids = block.transposed([*aligned, *others, dim])
        return ids.reshape(math.prod(block.size(d) for d in aligned), -1, block.size(dim))

    def summed(self, labels: Labels, dim: int) -> Labels:
        """After a sum over a dimension: what else its block names stays, as a whole."""
        block = block_at(labels, dim)
        if block is not None and len(block.dims) == 1:
            return [other for other in labels if other is not block]
        return self.collapse(labels, dim, "a sum runs over them")

    # -- shapes ------------------------------------------------------------------------------------------------------

    def reshape(self, labels: Labels, old: Sequence[int], new: Sequence[int]) -> Labels:
        """The labels after a change of shape that keeps the order of the elements."""
        if math.prod(old) == 0:
            return []
        hard = any(not self.ids.soft(block.ids) for block in labels)
        for before, after in segments(old, new):
            held = labels
            labels, block = self.single(labels, before)
            if block is None:
                continue
            labels = [other for other in labels if other is not block]
            if not hard and len(before) > 1:
                if all(block_at(held, dim) is not None for dim in before):
                    labels += [Block((-1 - dim,), self.ids.fresh(new[dim], soft=True)) for dim in after]
                continue
            outer = [dim for dim in block.dims if dim not in before]
            ids = block.transposed([dim for dim in (*before, *outer) if dim in block.dims])
            rest = [block.size(dim) for dim in outer]
            ids = ids.reshape([old[dim] if dim in block.dims else 1 for dim in before] + rest)
            ids = numpy.broadcast_to(ids, [old[dim] for dim in before] + rest)
            ids = ids.reshape([new[dim] for dim in after] + rest)
            if len(after) > 1:
                self._grids.append(ids)
            # new dimensions are told from old ones by being negative, until all segments are done
            changed = simple(Block(tuple([-1 - dim for dim in after] + outer), ids))
            labels += [] if changed is None else [changed]
        return [Block(tuple(-1 - d for d in b.dims), b.ids) for b in labels if all(d < 0 for d in b.dims)]

    def single(self, labels: Labels, dims: Sequence[int]) -> tuple[Labels, Block | None]:
        """The labels with at most one block over these dimensions, and that block."""
        inside = [block for block in labels if set(block.dims) & set(dims)]
        real = [block for block in inside if not self.ids.soft(block.ids)]
        kept = [id(block) for block in real or inside[:1]]
        labels = [block for block in labels if id(block) in kept or all(block is not other for other in inside)]
        for block in real[1:]:
            for dim in set(block.dims) & set(dims):
                labels = self.collapse(labels, dim, MERGED)
        return labels, next((block for block in labels if set(block.dims) & set(dims)), None)

    def close_grids(self) -> None:
        """What has been split over several dimensions must stay a grid: whole slices along one of them go.

        Where later operations have not said along which, it is the longest, the first of equals.
        """
        for grid in self._grids:
            ids = self.ids.free_roots(grid)
            axes = sorted(range(ids.ndim), key=lambda axis: -ids.shape[axis])
            if not any(self._only_along(ids, axis) for axis in axes):
                lines = numpy.moveaxis(grid, axes[0], 0)
                self._one(lines.reshape(len(lines), -1))

    @staticmethod
    def _only_along(ids: Ids, axis: int) -> bool:
        lines = numpy.moveaxis(ids, axis, 0).reshape(ids.shape[axis], -1)
        return bool((lines == lines[:, :1]).all())


def segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same elements before and after a change of shape.

    >>> segments([2, 12, 5], [2, 3, 4, 5])
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    i, j, found = 0, 0, []
    first = [dim for dim, size in enumerate(old) if size != 1]
    second = [dim for dim, size in enumerate(new) if size != 1]
    while i < len(first) and j < len(second):
        before, after = [first[i]], [second[j]]
        left, right = old[first[i]], new[second[j]]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                before.append(first[i])
                left, i = left * old[first[i]], i + 1
            else:
                after.append(second[j])
                right, j = right * new[second[j]], j + 1
        found.append((before, after))
    return found
