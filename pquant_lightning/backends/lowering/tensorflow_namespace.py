"""The namespace in TensorFlow. Import this file only where TensorFlow is installed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import tensorflow as tf
import torch

from pquant_lightning.backends.lowering.namespace import Array, Namespace, Pairs, Size

_DTYPES = {
    torch.float32: tf.float32,
    torch.float64: tf.float64,
    torch.float16: tf.float16,
    torch.bfloat16: tf.bfloat16,
    torch.int8: tf.int8,
    torch.int16: tf.int16,
    torch.int32: tf.int32,
    torch.int64: tf.int64,
    torch.uint8: tf.uint8,
    torch.bool: tf.bool,
}
_TORCH = {theirs: ours for ours, theirs in _DTYPES.items()}
_NARROW = (tf.int8, tf.uint8, tf.int16)


class TensorFlowNamespace(Namespace):
    """Arrays are `tf.Tensor`; open sizes are int32 scalars of `tf.shape`.

    Args:
        lite: only operations that TFLite has, too: quotients of integers then fit in 32 bits, and recurrent layers over
            a fixed number of steps are unrolled.
    """

    def __init__(self, lite: bool = False) -> None:
        bits, self.lite = tf.bitwise, lite
        self.unary = {
            **{name: getattr(tf.math, name) for name in _MATH_UNARY},
            "bitwise_not": lambda x: tf.logical_not(x) if x.dtype == tf.bool else bits.invert(x),
            "erfc": tf.math.erfc,
            "isfinite": tf.math.is_finite,
            "isinf": tf.math.is_inf,
            "isnan": tf.math.is_nan,
            "log10": lambda x: tf.math.log(x) / tf.cast(numpy.log(10.0), x.dtype),
            "log2": lambda x: tf.math.log(x) / tf.cast(numpy.log(2.0), x.dtype),
            "neg": tf.math.negative,
            "trunc": lambda x: tf.sign(x) * tf.floor(tf.abs(x)),
        }
        self.binary = {
            "add": tf.add,
            "atan2": tf.atan2,
            "bitwise_and": bits.bitwise_and,
            "bitwise_or": bits.bitwise_or,
            "bitwise_xor": bits.bitwise_xor,
            "div": tf.math.divide,
            "eq": tf.equal,
            "floor_div": _in_32_bits(tf.math.floordiv) if lite else tf.math.floordiv,
            "ge": tf.greater_equal,
            "gt": tf.greater,
            "le": tf.less_equal,
            "left_shift": bits.left_shift,
            "lt": tf.less,
            "maximum": _wide(tf.maximum),
            "minimum": _wide(tf.minimum),
            "mod": tf.math.floormod,
            "mul": tf.multiply,
            "ne": tf.not_equal,
            "pow": tf.pow,
            "right_shift": bits.right_shift,
            "sub": tf.subtract,
        }
        self.reductions = {
            "all": tf.reduce_all,
            "any": tf.reduce_any,
            "max": tf.reduce_max,
            "mean": tf.reduce_mean,
            "min": tf.reduce_min,
            "prod": tf.reduce_prod,
            "sum": tf.reduce_sum,
        }

    def is_array(self, value: Any) -> bool:
        return isinstance(value, tf.Tensor | tf.Variable | numpy.ndarray | numpy.generic)

    def asarray(self, value: Any, dtype: torch.dtype | None = None) -> Array:
        if dtype is None:
            return tf.convert_to_tensor(value)
        native = self._native(dtype)
        return tf.cast(value, native) if self.is_array(value) or tf.is_tensor(value) else tf.constant(value, native)

    def _native(self, dtype: torch.dtype) -> Any:
        if dtype not in _DTYPES:
            raise TypeError(f"TensorFlow has no counterpart for {dtype}")
        return _DTYPES[dtype]

    def dtype(self, x: Array) -> torch.dtype:
        return _TORCH[tf.as_dtype(x.dtype)]

    def shape(self, x: Array) -> list[Size]:
        static = [int(size) if size is not None else None for size in x.shape]
        if None not in static:
            return static
        sizes = tf.shape(x)
        return [sizes[axis] if size is None else size for axis, size in enumerate(static)]

    def cast(self, x: Array, dtype: torch.dtype) -> Array:
        native = self._native(dtype)
        if x.dtype == native:
            return x
        return tf.not_equal(x, tf.zeros([], x.dtype)) if native == tf.bool else tf.cast(x, native)

    def reshape(self, x: Array, sizes: Sequence[Size]) -> Array:
        return tf.reshape(x, _packed(sizes))

    def transpose(self, x: Array, order: Sequence[int]) -> Array:
        return x if list(order) == list(range(len(order))) else tf.transpose(x, order)

    def broadcast_to(self, x: Array, sizes: Sequence[Size]) -> Array:
        return tf.broadcast_to(x, _packed(sizes))

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        return tf.concat(arrays, axis)

    def pad(self, x: Array, widths: Pairs, value: float) -> Array:
        return tf.pad(x, [list(pair) for pair in widths], constant_values=tf.cast(value, x.dtype))

    def slice(self, x: Array, axis: int, start: Size, stop: Size, step: int) -> Array:
        return x[(*[slice(None)] * axis, slice(start, stop, step))]

    def flip(self, x: Array, axes: Sequence[int]) -> Array:
        return tf.reverse(x, list(axes))

    def take(self, x: Array, indices: Array, axis: int) -> Array:
        return tf.gather(x, indices, axis=axis)

    def take_along(self, x: Array, indices: Array, axis: int) -> Array:
        return tf.gather_nd(x, self._grid(indices, axis))

    def _grid(self, indices: Array, axis: int) -> Array:
        """Full coordinates `(..., rank)` of the values that indices along one dimension name."""
        sizes = self.shape(indices)
        places = []
        for other, size in enumerate(sizes):
            steps = tf.reshape(tf.range(size, dtype=tf.int32), [-1 if i == other else 1 for i in range(len(sizes))])
            places.append(tf.cast(indices, tf.int32) if other == axis else tf.broadcast_to(steps, _packed(sizes)))
        return tf.stack(places, -1)

    def take_points(self, x: Array, indices: Sequence[Array]) -> Array:
        if len(indices) == 1:
            return tf.gather(x, indices[0])
        return tf.gather_nd(x, tf.stack([tf.cast(place, tf.int32) for place in indices], -1))

    def put_points(self, x: Array, indices: Sequence[Array], values: Array, add: bool) -> Array:
        places = tf.stack([tf.cast(place, tf.int32) for place in indices], -1)
        return (tf.tensor_scatter_nd_add if add else tf.tensor_scatter_nd_update)(x, places, values)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return tf.where(condition, x, y)

    def arange(self, start: Size, stop: Size, step: Size, dtype: torch.dtype) -> Array:
        native = self._native(dtype)
        wide = native if native in (tf.float32, tf.float64, tf.int32, tf.int64) else tf.int32
        return tf.cast(tf.range(*(tf.cast(value, wide) for value in (start, stop, step))), native)

    def full(self, sizes: Sequence[Size], value: Any, dtype: torch.dtype) -> Array:
        return tf.fill(_packed(sizes), tf.cast(value, self._native(dtype)))

    def cumsum(self, x: Array, axis: int) -> Array:
        return tf.cumsum(x, axis)

    def argmax(self, x: Array, axis: int) -> Array:
        return tf.argmax(tf.cast(x, tf.int32) if x.dtype == tf.bool else x, axis)

    def top_k(self, x: Array, count: Size) -> tuple[Array, Array]:
        return tuple(tf.math.top_k(x, count))

    def matmul(self, x: Array, y: Array) -> Array:
        return tf.matmul(x, y)

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
        count = len(stride)
        if count == 1:  # with a height of one: TFLite has convolutions of images
            wide = (tf.expand_dims(x, 2), tf.expand_dims(weight, 2), [1, *stride], [(0, 0), *padding], [1, *dilation])
            return tf.squeeze(self.conv(*wide, groups, [1, *spread]), 2)
        x = tf.transpose(x, [0, *range(2, 2 + count), 1])  # TensorFlow's CPU kernels have the channels last
        x = self._widened(x, padding, spread)
        kernel = tf.transpose(weight, [*range(2, 2 + count), 1, 0])
        if max(stride) > 1 and max(dilation) > 1:  # TensorFlow has one or the other
            y = self._convolve(x, kernel, [1] * count, dilation, groups)
            for i, step in enumerate(stride):
                y = y[(*[slice(None)] * (i + 1), slice(None, None, step))]
        else:
            y = self._convolve(x, kernel, stride, dilation, groups)
        return tf.transpose(y, [0, count + 1, *range(1, count + 1)])

    def _convolve(self, x: Array, kernel: Array, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
        """`x (N, ..., in)`, `kernel (..., in/groups, out)`."""
        if groups == 1:
            return tf.nn.convolution(x, kernel, list(stride), "VALID", dilations=list(dilation))
        *window, inner, out = kernel.shape
        if inner == 1 and len(window) == 2 and stride[0] == stride[1]:
            turned = tf.reshape(kernel, [*window, groups, out // groups])
            return tf.nn.depthwise_conv2d(x, turned, [1, *stride, 1], "VALID", dilations=list(dilation))
        parts = zip(tf.split(x, groups, -1), tf.split(kernel, groups, -1), strict=True)
        found = [tf.nn.convolution(a, b, list(stride), "VALID", dilations=list(dilation)) for a, b in parts]
        return tf.concat(found, -1)

    def _widened(self, x: Array, padding: Sequence[tuple[int, int]], spread: Sequence[int]) -> Array:
        """`(N, ..., C)` with zeros between values and around them, or cut where padding is negative."""
        for i, factor in enumerate(spread):
            if factor > 1:
                axis, sizes = i + 1, self.shape(x)
                apart = tf.pad(tf.expand_dims(x, axis + 1), _only(axis + 1, len(sizes) + 1, factor - 1))
                joined = tf.reshape(apart, _packed([*sizes[:axis], sizes[axis] * factor, *sizes[axis + 1 :]]))
                x = self.slice(joined, axis, 0, (sizes[axis] - 1) * factor + 1, 1)
        for i, (before, after) in enumerate(padding):
            if before < 0 or after < 0:
                size = self.shape(x)[i + 1]
                x = self.slice(x, i + 1, max(-before, 0), size + min(after, 0), 1)
        pairs = [[0, 0], *([max(a, 0), max(b, 0)] for a, b in padding), [0, 0]]
        return tf.pad(x, pairs) if any(map(any, pairs)) else x

    def pool(
        self,
        x: Array,
        window: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        largest: bool,
    ) -> Array:
        """Of NHWC in between; a sum is the mean times the size of the window."""
        count, rank = len(window), len(x.shape)
        if rank == count + 1:
            return tf.squeeze(self.pool(tf.expand_dims(x, 0), window, stride, padding, dilation, largest), 0)
        if count == 1:
            wide = (tf.expand_dims(x, 2), [1, *window], [1, *stride], [(0, 0), *padding], [1, *dilation])
            return tf.squeeze(self.pool(*wide, largest), 2)
        lowest = x.dtype.min if largest else 0
        x = tf.transpose(x, [0, *range(2, 2 + count), 1])
        x = tf.pad(x, [[0, 0], *(list(pair) for pair in padding), [0, 0]], constant_values=tf.cast(lowest, x.dtype))
        kind = "MAX" if largest else "AVG"
        y = tf.nn.pool(x, list(window), kind, list(stride), "VALID", dilations=list(dilation))
        y = y if largest else y * tf.cast(int(numpy.prod(window)), y.dtype)
        return tf.transpose(y, [0, count + 1, *range(1, count + 1)])

    def scan(
        self, step: Callable[[tuple[Array, ...], Array], tuple[Array, ...]], start: tuple[Array, ...], xs: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        length = self.shape(xs)[0]
        if self.lite and isinstance(length, int):  # its loops want all sizes fixed
            return self._unrolled(step, start, tf.unstack(xs))
        found = tf.TensorArray(xs.dtype, size=length, element_shape=start[0].shape)

        def once(i: Array, state: tuple[Array, ...], outputs: Any) -> tuple[Array, tuple[Array, ...], Any]:
            new = step(state, xs[i])
            return i + 1, new, outputs.write(i, new[0])

        _, last, outputs = tf.while_loop(lambda i, *rest: i < length, once, (tf.constant(0), tuple(start), found))
        return outputs.stack(), last

    def _unrolled(self, step: Any, start: tuple[Array, ...], xs: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
        state, outputs = tuple(start), []
        for x in xs:
            state = step(state, x)
            outputs.append(state[0])
        return tf.stack(outputs), state

    def quantize(self, x: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
        inverse = tf.cast(1 / numpy.float32(scale) if isinstance(scale, float) else 1 / scale, tf.float32)
        codes = tf.round(tf.cast(x, tf.float32) * inverse) + tf.cast(zero_point, tf.float32)
        return tf.cast(tf.clip_by_value(codes, low, high), self._native(dtype))

    def dequantize(self, codes: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
        values = (tf.cast(codes, tf.float32) - tf.cast(zero_point, tf.float32)) * tf.cast(scale, tf.float32)
        return tf.cast(values, self._native(dtype))


_MATH_UNARY = (  # noqa: SIM905
    "abs acos acosh asin asinh atan atanh ceil cos cosh erf exp expm1 floor lgamma log log1p logical_not reciprocal "
    "round rsqrt sigmoid sign sin sinh sqrt square tan tanh"
).split()


def _wide(function: Any) -> Callable[[Array, Array], Array]:
    """TensorFlow's kernels lack some narrow integers."""

    def compute(x: Array, y: Array) -> Array:
        if x.dtype not in _NARROW:
            return function(x, y)
        return tf.cast(function(tf.cast(x, tf.int32), tf.cast(y, tf.int32)), x.dtype)

    return compute


def _in_32_bits(function: Any) -> Callable[[Array, Array], Array]:
    """TFLite divides no longer integers."""

    def compute(x: Array, y: Array) -> Array:
        if x.dtype != tf.int64:
            return function(x, y)
        return tf.cast(function(tf.cast(x, tf.int32), tf.cast(y, tf.int32)), tf.int64)

    return compute


def _packed(sizes: Sequence[Size]) -> Any:
    """Sizes as `tf.reshape` takes them: a list of ints, or one int32 tensor."""
    if all(isinstance(size, int) for size in sizes):
        return list(sizes)
    return tf.stack([tf.cast(size, tf.int32) for size in sizes])


def _only(axis: int, rank: int, after: int) -> list[list[int]]:
    return [[0, after if i == axis else 0] for i in range(rank)]
