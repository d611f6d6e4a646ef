"""Products of a tensor-train matrix: which order of pairwise products is the cheapest for a number of rows.

A train of d cores can be contracted with its input core by core (route d - 1), after its last cores have been merged
into one (routes between), or after all of them have (route 0: the weight is rebuilt). The more rows, the more merging
pays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Costs in multiply-accumulates, fitted to one AVX512 core (examples/benchmarks/tensor_networks.py shows the choices):
_PER_ELEMENT = 32  # reading or writing one number of an intermediate result
_PER_FAR_ELEMENT = 128  # the same where the step touches more numbers than `_NEAR`, and the memory is new each time
_NEAR = 2**19
_PER_WEIGHT = 16  # reading one number of a weight that is there


@dataclass(frozen=True)
class Step:
    """One product: multiply-accumulates and numbers read and written, per row."""

    macs: int
    elements: int

    def cost(self, rows: int) -> float:
        touched = rows * self.elements
        return rows * self.macs + touched * (_PER_ELEMENT if touched <= _NEAR else _PER_FAR_ELEMENT)


@dataclass(frozen=True)
class Route:
    """An order of products.

    Attributes:
        start: cores from here on are merged first.
        fixed: cost of merging.
        steps: products with the input.
    """

    start: int
    fixed: float
    steps: tuple[Step, ...]

    def cost(self, rows: int) -> float:
        """Cost with that many rows, merging included."""
        return self.fixed + sum(step.cost(rows) for step in self.steps)


class TrainShape:
    """Sizes of a tensor-train matrix, and the costs that follow from them.

    Attributes:
        cores: `(r_k, out_k, in_k, r_{k+1})`, the sizes of each core.
        out_size: product of the output modes.
        in_size: product of the input modes.
        routes: every order of products, by the number of cores that are not merged.
        look_up: the cost of one row of the weight, found by its index: a product of one small matrix per core.
    """

    def __init__(self, out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> None:
        self.out_modes, self.in_modes, self.ranks = tuple(out_modes), tuple(in_modes), tuple(ranks)
        self.cores = list(zip(self.ranks, self.out_modes, self.in_modes, self.ranks[1:], strict=False))
        self.out_size, self.in_size = math.prod(out_modes), math.prod(in_modes)
        self.routes = tuple(self._route(start) for start in range(len(self.cores)))
        self.look_up = self._look_up()
        self._choices: dict[int, tuple[int, bool]] = {}

    def _route(self, start: int) -> Route:
        last = len(self.cores) - 1
        fixed = 0.0
        out, in_ = self.out_modes[last], self.in_modes[last]
        for rank, core_out, core_in, right in reversed(self.cores[start:last]):
            merged = rank * core_out * core_in * out * in_
            fixed += merged * right + 3 * merged * _PER_ELEMENT  # the product is written, and then copied in order
            out, in_ = out * core_out, in_ * core_in
        steps, done, rest = [], 1, math.prod(self.in_modes)
        for rank, core_out, core_in, right in [*self.cores[:start], (self.ranks[start], out, in_, 1)]:
            rest //= core_in
            before, after = done * rank * core_in * rest, done * core_out * right * rest
            steps.append(Step(done * core_out * right * rank * core_in * rest, before + after))
            done *= core_out
        return Route(start, fixed, tuple(steps))

    def _look_up(self) -> Step:
        macs, elements, width = 0, 0, 1
        for rank, _, in_, right in self.cores:
            macs += width * rank * in_ * right
            elements += rank * in_ * right + width * in_ * right
            width *= in_
        return Step(macs, elements)

    def cheapest(self, rows: int) -> int:
        """The route that costs least with that many rows."""
        return self._choice(rows)[0]

    def prefers_dense(self, rows: int) -> bool:
        """Whether a weight that is there already is cheaper than every other route."""
        return self._choice(rows)[1]

    def _choice(self, rows: int) -> tuple[int, bool]:
        if torch.compiler.is_compiling():  # the number may be symbolic
            return self._choose(rows)
        if rows not in self._choices:
            self._choices[rows] = self._choose(rows)
        return self._choices[rows]

    def _choose(self, rows: int) -> tuple[int, bool]:
        costs = [route.cost(rows) for route in self.routes]
        there = costs[0] - self.routes[0].fixed + _PER_WEIGHT * self.out_size * self.in_size
        return costs.index(min(costs)), there < min(costs[1:])


def merged(cores: list[Tensor], start: int = 0) -> Tensor:
    """The cores from `start` on, `(r_k, out_k, in_k, r_{k+1})` each, as one matrix `(out, r_start * in)`."""
    last = cores[-1]
    matrix = last[..., 0].transpose(0, 1)  # (out, r, in)
    for core in reversed(cores[start:-1]):
        rank, core_out, core_in, right = core.shape
        out, _, in_ = matrix.shape
        product = core.transpose(0, 1).reshape(-1, right) @ matrix.transpose(0, 1).reshape(right, -1)
        matrix = product.reshape(core_out, rank * core_in, out, in_).transpose(1, 2)  # (core_out, out, r * core_in, in)
        matrix = matrix.reshape(core_out * out, rank, core_in * in_)
    return matrix.flatten(1)


def multiply(x: Tensor, matrices: list[Tensor], shape: TrainShape, start: int) -> Tensor:
    """`x @ W.T` for x `(rows, in)` along the route `start`, padding included.

    Args:
        x: `(rows, in)`.
        matrices: the cores as `(out_k * r_{k+1}, r_k * in_k)`, so that no step has to reorder its result.
        shape: their sizes.
        start: cores from here on are merged first.
    """
    rest = x.shape[-1]
    for matrix, (rank, _, in_, _) in zip(matrices[:start], shape.cores, strict=False):
        rest //= in_
        x = torch.matmul(matrix, x.reshape(-1, rank * in_, rest))  # (rows * done, out * right, rest)
    last = matrices[-1]
    if start < len(matrices) - 1:
        last = merged([to_core(matrix, sizes) for matrix, sizes in zip(matrices, shape.cores, strict=True)], start)
    return F.linear(x.reshape(-1, shape.ranks[start] * rest), last).reshape(-1, shape.out_size)


def to_core(matrix: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A core `(r_k, out_k, in_k, r_{k+1})` from its matrix `(out_k * r_{k+1}, r_k * in_k)`; a view."""
    rank, out, in_, right = sizes
    return matrix.reshape(out, right, rank, in_).permute(2, 0, 3, 1)
