"""The small array namespace that lowerings are written in; JAX and TensorFlow each serve it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

Array = Any
Size = Any  # an int, or what the framework has for a size that is open
Pairs = Sequence[tuple[Size, Size]]

UNARY = (  # noqa: SIM905
    "abs acos acosh asin asinh atan atanh ceil cos cosh erf erfc exp expm1 floor isfinite isinf isnan lgamma log log10 "
    "log1p log2 logical_not bitwise_not neg reciprocal round rsqrt sigmoid sign sin sinh sqrt square tan tanh trunc"
).split()
BINARY = (  # noqa: SIM905
    "add atan2 bitwise_and bitwise_or bitwise_xor div eq floor_div ge gt le left_shift lt maximum minimum mod mul ne "
    "pow right_shift sub"
).split()


class Namespace(ABC):
    """Functions over a framework's arrays. Sizes are ints or, where they are open, what the framework has for them.

    Every name in `UNARY`, `BINARY` and `REDUCTIONS` is a method, too: `ns.exp(x)`, `ns.add(x, y)`,
    `ns.sum(x, axes, keepdims)`. Both operands of a binary function have one dtype.
    """

    unary: dict[str, Callable[[Array], Array]]
    binary: dict[str, Callable[[Array, Array], Array]]
    reductions: dict[str, Callable[[Array, list[int], bool], Array]]

    def __getattr__(self, name: str) -> Any:
        for table in ("unary", "binary", "reductions"):
            if not name.startswith("_") and name in self.__dict__.get(table, {}):
                return self.__dict__[table][name]
        raise AttributeError(f"{type(self).__name__} has no function {name!r}")

    @abstractmethod
    def is_array(self, value: Any) -> bool:
        """Whether a value is an array, and no number or size."""

    @abstractmethod
    def asarray(self, value: Any, dtype: torch.dtype | None = None) -> Array:
        """An array of a number, a size, a NumPy array or an array."""

    @abstractmethod
    def dtype(self, x: Array) -> torch.dtype:
        """Its dtype, as torch names it."""

    @abstractmethod
    def shape(self, x: Array) -> list[Size]:
        """Its sizes."""

    def rank(self, x: Array) -> int:
        """How many dimensions it has."""
        return len(x.shape)

    @abstractmethod
    def cast(self, x: Array, dtype: torch.dtype) -> Array:
        """The values in another dtype; fractions are cut off."""

    @abstractmethod
    def reshape(self, x: Array, sizes: Sequence[Size]) -> Array:
        """At most one size is -1."""

    @abstractmethod
    def transpose(self, x: Array, order: Sequence[int]) -> Array:
        """Dimensions in another order."""

    @abstractmethod
    def broadcast_to(self, x: Array, sizes: Sequence[Size]) -> Array:
        """Repeated along sizes of one and new leading dimensions."""

    @abstractmethod
    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        """Joined along a dimension."""

    @abstractmethod
    def pad(self, x: Array, widths: Pairs, value: float) -> Array:
        """With so many values before and after, by dimension."""

    @abstractmethod
    def slice(self, x: Array, axis: int, start: Size, stop: Size, step: int) -> Array:
        """Part of a dimension; start and stop are inside of it and not negative."""

    @abstractmethod
    def flip(self, x: Array, axes: Sequence[int]) -> Array:
        """Backwards along dimensions."""

    @abstractmethod
    def take(self, x: Array, indices: Array, axis: int) -> Array:
        """`x[:, indices]` along a dimension."""

    @abstractmethod
    def take_along(self, x: Array, indices: Array, axis: int) -> Array:
        """`torch.gather`."""

    @abstractmethod
    def take_points(self, x: Array, indices: Sequence[Array]) -> Array:
        """`x[i, j, ...]` with indices of one shape, not negative, for the leading dimensions."""

    @abstractmethod
    def put_points(self, x: Array, indices: Sequence[Array], values: Array, add: bool) -> Array:
        """A copy with `x[i, j, ...] = values`, or `+=`."""

    @abstractmethod
    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """x where the condition holds, else y."""

    @abstractmethod
    def arange(self, start: Size, stop: Size, step: Size, dtype: torch.dtype) -> Array:
        """A range of numbers."""

    @abstractmethod
    def full(self, sizes: Sequence[Size], value: Any, dtype: torch.dtype) -> Array:
        """All the same value."""

    @abstractmethod
    def cumsum(self, x: Array, axis: int) -> Array:
        """Cumulative sums."""

    @abstractmethod
    def argmax(self, x: Array, axis: int) -> Array:
        """int64 places of the first largest."""

    @abstractmethod
    def top_k(self, x: Array, count: Size) -> tuple[Array, Array]:
        """The largest along the last dimension, in descending order, and their places."""

    @abstractmethod
    def matmul(self, x: Array, y: Array) -> Array:
        """Products of matrices, leading dimensions broadcast."""

    @abstractmethod
    def conv(
        self,
        x: Array,
        weight: Array,
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
        spread: Sequence[int],
    ) -> Array:
        """`x (N, in, ...)` with `weight (out, in/groups, ...)`; `spread` puts zeros between the values of x."""

    @abstractmethod
    def pool(
        self,
        x: Array,
        window: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        largest: bool,
    ) -> Array:
        """Largest value, or sum, of each window of `(N, C, ...)`."""

    @abstractmethod
    def scan(
        self, step: Callable[[tuple[Array, ...], Array], tuple[Array, ...]], start: tuple[Array, ...], xs: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Runs `state = step(state, x)` over the first dimension; all of the first state, and the last states."""

    @abstractmethod
    def quantize(self, x: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
        """Codes of a grid, rounded half to even."""

    @abstractmethod
    def dequantize(self, codes: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
        """Values of codes."""
