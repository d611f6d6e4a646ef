"""Lowerings of what is computed value by value: arithmetic, comparison, activations, casts."""

import math
from typing import Any

import torch

from pquant_lightning.backends.lowering.namespace import Array, Namespace
from pquant_lightning.backends.lowering.table import lowers, names

_SAME_NAME = (  # noqa: SIM905
    "abs acos acosh asin asinh atan atanh ceil cos cosh erf erfc exp expm1 floor isfinite isinf isnan lgamma log log10 "
    "log1p log2 logical_not bitwise_not neg reciprocal rsqrt sigmoid sign sin sinh sqrt square tan tanh trunc"
).split()
_OF_FLOATS = {"isfinite", "isinf", "isnan", "ceil", "floor", "trunc", "round"}  # nothing to do for integers
_KEEPS_INTEGERS = {"abs", "neg", "sign", "square", "bitwise_not", "logical_not"}

_BINARY = {  # torch's name: ours, and its overloads
    "add": ("add", "Tensor"),
    "sub": ("sub", "Tensor"),
    "mul": ("mul", "Tensor Scalar"),
    "div": ("div", "Tensor"),
    "eq": ("eq", "Tensor Scalar"),
    "ne": ("ne", "Tensor Scalar"),
    "lt": ("lt", "Tensor Scalar"),
    "le": ("le", "Tensor Scalar"),
    "gt": ("gt", "Tensor Scalar"),
    "ge": ("ge", "Tensor Scalar"),
    "maximum": ("maximum", "default"),
    "minimum": ("minimum", "default"),
    "pow": ("pow", "Tensor_Tensor Tensor_Scalar Scalar"),
    "remainder": ("mod", "Scalar Tensor"),
    "floor_divide": ("floor_div", "default"),
    "bitwise_and": ("bitwise_and", "Tensor Scalar"),
    "bitwise_or": ("bitwise_or", "Tensor Scalar"),
    "bitwise_xor": ("bitwise_xor", "Tensor Scalar"),
    "bitwise_left_shift": ("left_shift", "Tensor Tensor_Scalar"),
    "bitwise_right_shift": ("right_shift", "Tensor Tensor_Scalar"),
    "__and__": ("bitwise_and", "Tensor Scalar"),
    "__or__": ("bitwise_or", "Tensor Scalar"),
    "__xor__": ("bitwise_xor", "Tensor Scalar"),
    "__lshift__": ("left_shift", "Tensor Scalar"),
    "__rshift__": ("right_shift", "Tensor Scalar"),
    "atan2": ("atan2", "default"),
}


def promoted(ns: Namespace, *values: Any, floating: bool = False) -> list[Array]:
    """Arrays of one dtype, by torch's rules; numbers bend to the arrays."""
    examples = [_example(ns, value) for value in values]
    dtype = torch.result_type(examples[0], examples[1]) if len(examples) > 1 else examples[0].dtype
    for example in examples[2:]:
        dtype = torch.promote_types(dtype, example.dtype)
    if floating and not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return [ns.cast(value, dtype) if ns.is_array(value) else ns.asarray(value, dtype) for value in values]


def _example(ns: Namespace, value: Any) -> Any:
    if ns.is_array(value):
        return torch.empty([1] * ns.rank(value), dtype=ns.dtype(value), device="meta")
    return value if isinstance(value, bool | int | float) else 1  # an open size is an integer


def _enter_unary(operation: str) -> None:
    @lowers(f"aten.{operation}.default")
    def lowering(ns: Namespace, x: Array) -> Array:
        floating = ns.dtype(x).is_floating_point
        if operation in _OF_FLOATS and not floating:
            return (
                x
                if operation not in ("isfinite", "isinf", "isnan")
                else ns.full(ns.shape(x), operation == "isfinite", torch.bool)
            )
        if operation == "logical_not":
            return ns.logical_not(ns.cast(x, torch.bool))
        if operation not in _KEEPS_INTEGERS and not floating:
            x = ns.cast(x, torch.get_default_dtype())
        return getattr(ns, operation)(x)


def _enter_binary(operation: str, name: str, overloads: str) -> None:
    @lowers(*names(f"aten.{operation}.{{}}", overloads.split()))
    def lowering(ns: Namespace, x: Any, y: Any, alpha: Any = 1) -> Array:
        x, y = promoted(ns, x, y, floating=operation in ("div", "atan2"))
        if alpha != 1:
            y = ns.mul(y, ns.asarray(alpha, ns.dtype(y)))
        if name.startswith("bitwise_") and ns.dtype(x) is torch.bool:
            pick = {"bitwise_and": ns.minimum, "bitwise_or": ns.maximum, "bitwise_xor": ns.ne}[name]
            return _as_numbers(ns, pick, x, y)
        return getattr(ns, name)(x, y)


def _as_numbers(ns: Namespace, function: Any, x: Array, y: Array) -> Array:
    return ns.cast(function(ns.cast(x, torch.int32), ns.cast(y, torch.int32)), torch.bool)


for _name in _SAME_NAME:
    _enter_unary(_name)
for _torch, (_ours, _overloads) in _BINARY.items():
    _enter_binary(_torch, _ours, _overloads)


@lowers("aten.round.default", "aten.round.decimals")
def round_(ns: Namespace, x: Array, decimals: int = 0) -> Array:
    if not ns.dtype(x).is_floating_point:
        return x
    unit = ns.asarray(10.0**decimals, ns.dtype(x))
    return ns.round(x) if decimals == 0 else ns.div(ns.round(ns.mul(x, unit)), unit)


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(ns: Namespace, x: Array, y: Any, alpha: Any = 1) -> Array:
    x, y = promoted(ns, x, y)
    return ns.sub(y, x if alpha == 1 else ns.mul(x, ns.asarray(alpha, ns.dtype(x))))


@lowers("aten.div.Tensor_mode")
def div_mode(ns: Namespace, x: Any, y: Any, rounding_mode: str | None = None) -> Array:
    x, y = promoted(ns, x, y, floating=rounding_mode is None)
    if rounding_mode == "floor":
        return ns.floor_div(x, y)
    if ns.dtype(x).is_floating_point:
        return ns.trunc(ns.div(x, y)) if rounding_mode == "trunc" else ns.div(x, y)
    signs = ns.mul(ns.sign(x), ns.sign(y))
    return ns.mul(signs, ns.floor_div(ns.abs(x), ns.abs(y)))


@lowers("aten.fmod.Scalar", "aten.fmod.Tensor")
def fmod(ns: Namespace, x: Any, y: Any) -> Array:
    x, y = promoted(ns, x, y)
    return ns.sub(x, ns.mul(y, div_mode(ns, x, y, "trunc")))


@lowers("aten.max.other", "aten.fmax.default")
def max_other(ns: Namespace, x: Array, y: Array) -> Array:
    return ns.maximum(*promoted(ns, x, y))


@lowers("aten.min.other", "aten.fmin.default")
def min_other(ns: Namespace, x: Array, y: Array) -> Array:
    return ns.minimum(*promoted(ns, x, y))


def _enter_logical(operation: str, name: str) -> None:
    @lowers(f"aten.logical_{operation}.default")
    def lowering(ns: Namespace, x: Array, y: Array) -> Array:
        return _as_numbers(ns, getattr(ns, name), ns.cast(x, torch.bool), ns.cast(y, torch.bool))


for _torch, _ours in (("and", "minimum"), ("or", "maximum"), ("xor", "ne")):
    _enter_logical(_torch, _ours)


@lowers("aten.clamp.default", "aten.clamp.Tensor")
def clamp(ns: Namespace, x: Array, low: Any = None, high: Any = None) -> Array:
    if low is not None:
        x = ns.maximum(*promoted(ns, x, low))
    return x if high is None else ns.minimum(*promoted(ns, x, high))


@lowers("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(ns: Namespace, x: Array, low: Any) -> Array:
    return clamp(ns, x, low)


@lowers("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(ns: Namespace, x: Array, high: Any) -> Array:
    return clamp(ns, x, None, high)


@lowers("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf")
def where(ns: Namespace, condition: Array, x: Any, y: Any) -> Array:
    return ns.where(ns.cast(condition, torch.bool), *promoted(ns, x, y))


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(ns: Namespace, x: Array, mask: Array, value: Any) -> Array:
    return ns.where(ns.cast(mask, torch.bool), constant(ns, value, x), x)


@lowers("aten.addcmul.default")
def addcmul(ns: Namespace, x: Array, y: Array, z: Array, value: Any = 1) -> Array:
    return ns.add(x, ns.mul(ns.mul(y, z), constant(ns, value, x)))


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(ns: Namespace, x: Array, y: Array, weight: Any) -> Array:
    return ns.add(x, ns.mul(constant(ns, weight, x), ns.sub(y, x)))


@lowers("aten._to_copy.default")
def to_copy(ns: Namespace, x: Array, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Array:
    return x if dtype is None else ns.cast(x, dtype)


@lowers("aten.clone.default", "aten.alias.default", "aten.type_as.default")
def identity(ns: Namespace, x: Array, *args: Any, **kwargs: Any) -> Array:
    return x  # the caller casts to the dtype that the graph says


# -- activations -------------------------------------------------------------------------------------------------------


def constant(ns: Namespace, value: Any, like: Array) -> Array:
    """A number, or an array, in the dtype of another array."""
    return ns.cast(value, ns.dtype(like)) if ns.is_array(value) else ns.asarray(value, ns.dtype(like))


@lowers("aten.relu.default")
def relu(ns: Namespace, x: Array) -> Array:
    return ns.maximum(x, constant(ns, 0, x))


@lowers("aten.relu6.default")
def relu6(ns: Namespace, x: Array) -> Array:
    return clamp(ns, x, 0, 6)


@lowers("aten.hardtanh.default")
def hardtanh(ns: Namespace, x: Array, low: float = -1.0, high: float = 1.0) -> Array:
    return clamp(ns, x, low, high)


@lowers("aten.leaky_relu.default")
def leaky_relu(ns: Namespace, x: Array, slope: float = 0.01) -> Array:
    return ns.where(ns.gt(x, constant(ns, 0, x)), x, ns.mul(x, constant(ns, slope, x)))


@lowers("aten.prelu.default")
def prelu(ns: Namespace, x: Array, weight: Array) -> Array:
    if ns.rank(weight) == 1:
        weight = ns.reshape(weight, [-1, *[1] * (ns.rank(x) - 2)])
    return ns.where(ns.gt(x, constant(ns, 0, x)), x, ns.mul(x, weight))


@lowers("aten.elu.default")
def elu(ns: Namespace, x: Array, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Array:
    zero = constant(ns, 0, x)
    low = ns.expm1(ns.mul(ns.minimum(x, zero), constant(ns, input_scale, x)))
    y = ns.where(ns.gt(x, zero), x, ns.mul(constant(ns, alpha, x), low))
    return ns.mul(constant(ns, scale, x), y)


@lowers("aten.celu.default")
def celu(ns: Namespace, x: Array, alpha: float = 1.0) -> Array:
    return elu(ns, x, alpha, 1.0, 1 / alpha)


@lowers("aten.selu.default")
def selu(ns: Namespace, x: Array) -> Array:
    return elu(ns, x, 1.6732632423543772, 1.0507009873554805)


@lowers("aten.gelu.default")
def gelu(ns: Namespace, x: Array, approximate: str = "none") -> Array:
    half = ns.mul(x, constant(ns, 0.5, x))
    if approximate == "tanh":
        cube = ns.mul(ns.mul(x, x), x)
        inner = ns.mul(constant(ns, math.sqrt(2 / math.pi), x), ns.add(x, ns.mul(constant(ns, 0.044715, x), cube)))
        return ns.mul(half, ns.add(constant(ns, 1, x), ns.tanh(inner)))
    return ns.mul(half, ns.add(constant(ns, 1, x), ns.erf(ns.mul(x, constant(ns, math.sqrt(0.5), x)))))


@lowers("aten.silu.default")
def silu(ns: Namespace, x: Array) -> Array:
    return ns.mul(x, ns.sigmoid(x))


@lowers("aten.hardsigmoid.default")
def hardsigmoid(ns: Namespace, x: Array) -> Array:
    return ns.div(clamp(ns, ns.add(x, constant(ns, 3, x)), 0, 6), constant(ns, 6, x))


@lowers("aten.hardswish.default")
def hardswish(ns: Namespace, x: Array) -> Array:
    return ns.mul(x, hardsigmoid(ns, x))


@lowers("aten.softplus.default")
def softplus(ns: Namespace, x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    scaled = ns.mul(x, constant(ns, beta, x))
    high = constant(ns, threshold, x)
    soft = ns.div(ns.log1p(ns.exp(ns.minimum(scaled, high))), constant(ns, beta, x))
    return ns.where(ns.gt(scaled, high), x, soft)


@lowers("aten.mish.default")
def mish(ns: Namespace, x: Array) -> Array:
    return ns.mul(x, ns.tanh(softplus(ns, x)))


@lowers("aten.log_sigmoid.default")
def log_sigmoid(ns: Namespace, x: Array) -> Array:
    return ns.neg(softplus(ns, ns.neg(x)))


@lowers("aten.threshold.default")
def threshold(ns: Namespace, x: Array, limit: float, value: float) -> Array:
    return ns.where(ns.gt(x, constant(ns, limit, x)), x, ns.full(ns.shape(x), value, ns.dtype(x)))
