"""The namespace in JAX: `jax.numpy` and `jax.lax`. Import this file only where JAX is installed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy
import torch
from jax import lax

from pquant_lightning.backends.lowering.namespace import Array, Namespace, Pairs, Size

_DTYPES = {
    torch.float32: jnp.float32,
    torch.float64: jnp.float64,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.int8: jnp.int8,
    torch.int16: jnp.int16,
    torch.int32: jnp.int32,
    torch.int64: jnp.int64,
    torch.uint8: jnp.uint8,
    torch.bool: jnp.bool_,
}
_TORCH = {numpy.dtype(theirs): ours for ours, theirs in _DTYPES.items()}


class JaxNamespace(Namespace):
    """Arrays are `jax.Array`; open sizes are symbolic dimensions of `jax.export`."""

    def __init__(self) -> None:
        special = jax.scipy.special
        self.unary = {
            **{name: getattr(jnp, name) for name in _NUMPY_UNARY},
            "acos": jnp.arccos,
            "acosh": jnp.arccosh,
            "asin": jnp.arcsin,
            "asinh": jnp.arcsinh,
            "atan": jnp.arctan,
            "atanh": jnp.arctanh,
            "erf": special.erf,
            "erfc": special.erfc,
            "lgamma": special.gammaln,
            "neg": jnp.negative,
            "rsqrt": lax.rsqrt,
            "sigmoid": jax.nn.sigmoid,
        }
        self.binary = {
            **{name: getattr(jnp, name) for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift")},
            **{name: getattr(jnp, name) for name in ("maximum", "minimum", "right_shift")},
            "add": jnp.add,
            "atan2": jnp.arctan2,
            "div": jnp.divide,
            "eq": jnp.equal,
            "floor_div": jnp.floor_divide,
            "ge": jnp.greater_equal,
            "gt": jnp.greater,
            "le": jnp.less_equal,
            "lt": jnp.less,
            "mod": jnp.mod,
            "mul": jnp.multiply,
            "ne": jnp.not_equal,
            "pow": jnp.power,
            "sub": jnp.subtract,
        }
        self.reductions = {
            name: _reduction(getattr(jnp, name)) for name in ("all", "any", "max", "mean", "min", "prod", "sum")
        }

    def is_array(self, value: Any) -> bool:
        return isinstance(value, jax.Array | numpy.ndarray | numpy.generic)

    def asarray(self, value: Any, dtype: torch.dtype | None = None) -> Array:
        return jnp.asarray(value, None if dtype is None else self._native(dtype))

    def _native(self, dtype: torch.dtype) -> Any:
        if dtype not in _DTYPES:
            raise TypeError(f"JAX has no counterpart for {dtype}")
        return jax.dtypes.canonicalize_dtype(_DTYPES[dtype])

    def dtype(self, x: Array) -> torch.dtype:
        return _TORCH[numpy.dtype(x.dtype)]

    def shape(self, x: Array) -> list[Size]:
        return list(x.shape)

    def cast(self, x: Array, dtype: torch.dtype) -> Array:
        native = self._native(dtype)
        return x if x.dtype == native else jnp.asarray(x).astype(native)

    def reshape(self, x: Array, sizes: Sequence[Size]) -> Array:
        return jnp.reshape(x, tuple(sizes))

    def transpose(self, x: Array, order: Sequence[int]) -> Array:
        return jnp.transpose(x, order)

    def broadcast_to(self, x: Array, sizes: Sequence[Size]) -> Array:
        return jnp.broadcast_to(x, tuple(sizes))

    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        return jnp.concatenate(arrays, axis)

    def pad(self, x: Array, widths: Pairs, value: float) -> Array:
        return lax.pad(x, jnp.asarray(value, x.dtype), [(before, after, 0) for before, after in widths])

    def slice(self, x: Array, axis: int, start: Size, stop: Size, step: int) -> Array:
        return lax.slice_in_dim(x, start, stop, step, axis)

    def flip(self, x: Array, axes: Sequence[int]) -> Array:
        return jnp.flip(x, tuple(axes))

    def take(self, x: Array, indices: Array, axis: int) -> Array:
        return jnp.take(x, indices, axis)

    def take_along(self, x: Array, indices: Array, axis: int) -> Array:
        for other in range(x.ndim):  # torch takes the first so many of the other dimensions
            if other != axis:
                x = lax.slice_in_dim(x, 0, indices.shape[other], 1, other)
        return jnp.take_along_axis(x, indices, axis)

    def take_points(self, x: Array, indices: Sequence[Array]) -> Array:
        return x[tuple(indices)]

    def put_points(self, x: Array, indices: Sequence[Array], values: Array, add: bool) -> Array:
        target = jnp.asarray(x).at[tuple(indices)]
        return target.add(values) if add else target.set(values)

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        return jnp.where(condition, x, y)

    def arange(self, start: Size, stop: Size, step: Size, dtype: torch.dtype) -> Array:
        return jnp.arange(start, stop, step, self._native(dtype))

    def full(self, sizes: Sequence[Size], value: Any, dtype: torch.dtype) -> Array:
        return jnp.full(tuple(sizes), value, self._native(dtype))

    def cumsum(self, x: Array, axis: int) -> Array:
        return jnp.cumsum(x, axis)

    def argmax(self, x: Array, axis: int) -> Array:
        return jnp.argmax(x, axis)

    def top_k(self, x: Array, count: Size) -> tuple[Array, Array]:
        values, places = lax.top_k(x, count)
        return values, places

    def matmul(self, x: Array, y: Array) -> Array:
        return jnp.matmul(x, y)

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
        letters = "DHW"[3 - len(stride) :]
        layout = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
        return lax.conv_general_dilated(
            x, weight, stride, padding, spread, dilation, dimension_numbers=layout, feature_group_count=groups
        )

    def pool(
        self,
        x: Array,
        window: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        largest: bool,
    ) -> Array:
        lead = x.ndim - len(window)
        ones = (1,) * lead
        start = (-jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min) if largest else 0
        return lax.reduce_window(
            x,
            jnp.asarray(start, x.dtype),
            lax.max if largest else lax.add,
            (*ones, *window),
            (*ones, *stride),
            (*((0, 0),) * lead, *padding),
            window_dilation=(*ones, *dilation),
        )

    def scan(
        self, step: Callable[[tuple[Array, ...], Array], tuple[Array, ...]], start: tuple[Array, ...], xs: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        def once(state: tuple[Array, ...], x: Array) -> tuple[tuple[Array, ...], Array]:
            new = step(state, x)
            return new, new[0]

        last, outputs = lax.scan(once, start, xs)
        return outputs, last

    def quantize(self, x: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
        inverse = jnp.asarray(1 / numpy.float32(scale) if isinstance(scale, float) else 1 / scale, jnp.float32)
        codes = jnp.round(x.astype(jnp.float32) * inverse) + zero_point
        return jnp.clip(codes, low, high).astype(self._native(dtype))

    def dequantize(self, codes: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
        return ((codes.astype(jnp.float32) - zero_point) * jnp.asarray(scale, jnp.float32)).astype(self._native(dtype))


_NUMPY_UNARY = (  # noqa: SIM905
    "abs ceil cos cosh exp expm1 floor isfinite isinf isnan log log10 log1p log2 logical_not bitwise_not reciprocal "
    "round sign sin sinh sqrt square tan tanh trunc"
).split()


def _reduction(function: Any) -> Callable[[Array, list[int], bool], Array]:
    return lambda x, axes, keepdims: function(x, axis=tuple(axes), keepdims=keepdims)
