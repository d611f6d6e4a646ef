"""Lowerings of layers: products, convolutions, pooling, norms, attention, recurrent layers, resizing, quantization."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from pquant_lightning.backends.lowering.elementwise import clamp, constant, promoted
from pquant_lightning.backends.lowering.namespace import Array, Namespace, Size
from pquant_lightning.backends.lowering.shaping import reduced, select, stack, transpose, unsqueeze
from pquant_lightning.backends.lowering.table import UnsupportedOperationError, lowers, names

# -- products ----------------------------------------------------------------------------------------------------------


@lowers("aten.linear.default")
def linear(ns: Namespace, x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = ns.matmul(x, ns.transpose(weight, [1, 0])) if ns.rank(x) > 1 else matmul(ns, weight, x)
    return y if bias is None else ns.add(y, bias)


@lowers("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def matmul(ns: Namespace, x: Array, y: Array) -> Array:
    x, y = promoted(ns, x, y)
    row, column = ns.rank(x) == 1, ns.rank(y) == 1
    product = ns.matmul(unsqueeze(ns, x, 0) if row else x, unsqueeze(ns, y, 1) if column else y)
    if column:
        product = select(ns, product, -1, 0)
    return select(ns, product, -1 if column else -2, 0) if row else product


@lowers("aten.addmm.default", "aten.baddbmm.default")
def addmm(ns: Namespace, x: Array, a: Array, b: Array, beta: float = 1, alpha: float = 1) -> Array:
    product = ns.matmul(a, b)
    if alpha != 1:
        product = ns.mul(product, constant(ns, alpha, product))
    return ns.add(product, x if beta == 1 else ns.mul(x, constant(ns, beta, x)))


@lowers("aten.outer.default")
def outer(ns: Namespace, x: Array, y: Array) -> Array:
    return ns.mul(unsqueeze(ns, x, 1), unsqueeze(ns, y, 0))


@lowers("aten.einsum.default")
def einsum(ns: Namespace, equation: str, operands: Sequence[Array], path: Any = None) -> Array:
    """By products of matrices, two operands at a time."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in equation:
        terms, result = _named_dots(ns, terms, operands, result)
    if not arrow:
        letters = "".join(terms)
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    label, x = terms[0], operands[0]
    for i in range(1, len(operands)):
        kept = set(result).union(*terms[i + 1 :])
        label, x = _contract(ns, label, x, terms[i], operands[i], kept)
    gone = [axis for axis, letter in enumerate(label) if letter not in result]
    if gone:
        x, label = ns.sum(x, gone, False), "".join(letter for letter in label if letter in result)
    return ns.transpose(x, [label.index(letter) for letter in result])


def _named_dots(ns: Namespace, terms: list[str], operands: Sequence[Array], result: str) -> tuple[list[str], str]:
    """The dimensions of "..." under letters that are free."""
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in "".join(terms)]
    counts = [ns.rank(x) - len(term.replace(".", "")) for term, x in zip(terms, operands, strict=True)]
    letters = "".join(free[: max(counts)])
    named = [t.replace("...", letters[len(letters) - n :]) for t, n in zip(terms, counts, strict=True)]
    return named, result.replace("...", letters)


def _contract(ns: Namespace, first: str, x: Array, second: str, y: Array, kept: set[str]) -> tuple[str, Array]:
    x, y = promoted(ns, x, y)
    for own, other in ((first, second), (second, first)):  # what only one has, and nobody needs, is summed first
        alone = [i for i, letter in enumerate(own) if letter not in other and letter not in kept]
        if alone and own is first:
            x, first = ns.sum(x, alone, False), "".join(c for i, c in enumerate(own) if i not in alone)
        elif alone:
            y, second = ns.sum(y, alone, False), "".join(c for i, c in enumerate(own) if i not in alone)
    sizes = dict(zip(first, ns.shape(x), strict=True)) | dict(zip(second, ns.shape(y), strict=True))
    both = [letter for letter in first if letter in second]
    batch, inner = [c for c in both if c in kept], [c for c in both if c not in kept]
    rows, columns = [c for c in first if c not in both], [c for c in second if c not in both]

    def size(letters: Sequence[str]) -> Size:
        return math.prod(sizes[letter] for letter in letters)

    left = ns.transpose(x, [first.index(c) for c in (*batch, *rows, *inner)])
    right = ns.transpose(y, [second.index(c) for c in (*batch, *inner, *columns)])
    left = ns.reshape(left, [*(sizes[c] for c in batch), size(rows), size(inner)])
    right = ns.reshape(right, [*(sizes[c] for c in batch), size(inner), size(columns)])
    product = ns.reshape(ns.matmul(left, right), [sizes[c] for c in (*batch, *rows, *columns)])
    return "".join((*batch, *rows, *columns)), product


# -- convolutions and pooling ------------------------------------------------------------------------------------------


def _spread(values: Any, count: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * count if len(values) == 1 else values


def _with_bias(ns: Namespace, y: Array, bias: Array | None) -> Array:
    return y if bias is None else ns.add(y, ns.reshape(bias, [-1, *[1] * (ns.rank(y) - 2)]))


@lowers(
    *names("aten.conv{}.default", ("1d", "2d", "3d")),
    *names("aten.conv{}.padding", ("1d", "2d", "3d")),
)
def conv(
    ns: Namespace,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Array:
    count = ns.rank(weight) - 2
    if ns.rank(x) == count + 1:  # one sample
        return select(ns, conv(ns, unsqueeze(ns, x, 0), weight, bias, stride, padding, dilation, groups), 0, 0)
    stride, dilation, window = _spread(stride, count), _spread(dilation, count), ns.shape(weight)[2:]
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
        pairs = [(w // 2, w - w // 2) for w in whole]
    else:
        pairs = [(p, p) for p in _spread(0 if padding == "valid" else padding, count)]
    y = ns.conv(x, weight, stride, pairs, dilation, groups, [1] * count)
    return _with_bias(ns, y, bias)


@lowers("aten.convolution.default")
def convolution(
    ns: Namespace,
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Array:
    if transposed:
        return conv_transpose(ns, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(ns, x, weight, bias, stride, padding, dilation, groups)


@lowers("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def conv_transpose(
    ns: Namespace,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Array:
    """As a convolution of the input, spread by the stride, with the window turned round."""
    in_, out, *window = ns.shape(weight)
    count = len(window)
    stride, padding, dilation = (_spread(v, count) for v in (stride, padding, dilation))
    apart = ns.reshape(weight, [groups, in_ // groups, out, *window])
    turned = ns.transpose(apart, [0, 2, 1, *range(3, 3 + count)])  # (groups, out, in/groups, ...)
    kernel = ns.flip(ns.reshape(turned, [groups * out, in_ // groups, *window]), list(range(2, 2 + count)))
    pairs = []
    for d, k, p, extra in zip(dilation, window, padding, _spread(output_padding, count), strict=True):
        pairs.append((d * (k - 1) - p, d * (k - 1) - p + extra))
    y = ns.conv(x, kernel, [1] * count, pairs, dilation, groups, stride)
    return _with_bias(ns, y, bias)


def _windows(
    ns: Namespace, x: Array, window: Any, stride: Any, padding: Any, ceil_mode: bool, dilation: Any = 1
) -> Any:
    """Window, stride, pairs of padding and dilation of a pooling; `ceil_mode` pads the end further."""
    count = 1 if isinstance(window, int) else len(window)
    window, dilation = _spread(window, count), _spread(dilation, count)
    stride = _spread(stride, count) if stride not in (None, []) else window
    pairs = []
    for i, p in enumerate(_spread(padding, count)):
        end = p
        if ceil_mode:
            size, reach = ns.shape(x)[i - count], dilation[i] * (window[i] - 1) + 1
            rest = -(size + 2 * p - reach) % stride[i]
            starts_inside = (size + 2 * p - reach + rest) < size + p
            end += rest if starts_inside else 0
        pairs.append((p, end))
    return window, stride, pairs, dilation


@lowers(*names("aten.max_pool{}.default", ("1d", "2d", "3d")))
def max_pool(
    ns: Namespace,
    x: Array,
    window: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Array:
    window, stride, pairs, dilation = _windows(ns, x, window, stride, padding, ceil_mode, dilation)
    return ns.pool(x, window, stride, pairs, dilation, largest=True)


@lowers(*names("aten.avg_pool{}.default", ("1d", "2d", "3d")))
def avg_pool(
    ns: Namespace,
    x: Array,
    window: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Array:
    window, stride, pairs, dilation = _windows(ns, x, window, stride, padding, ceil_mode)
    total = ns.pool(x, window, stride, pairs, dilation, largest=False)
    if divisor is not None:
        return ns.div(total, constant(ns, divisor, x))
    sizes = [1, 1, *ns.shape(x)[-len(window) :]]
    ones = ns.full(sizes, 1, ns.dtype(x))
    if count_include_pad:
        ones = ns.pad(ones, [(0, 0), (0, 0), *((p, p) for p, _ in pairs)], 1)
        pairs = [(0, end - start) for start, end in pairs]
    return ns.div(total, ns.pool(ones, window, stride, pairs, dilation, largest=False))


@lowers(*names("aten.adaptive_avg_pool{}.default", ("1d", "2d", "3d")))
def adaptive_avg_pool(ns: Namespace, x: Array, sizes: Any) -> Array:
    return _adaptive(ns, x, sizes, "mean")


@lowers(*names("aten.adaptive_max_pool{}.default", ("1d", "2d", "3d")))
def adaptive_max_pool(ns: Namespace, x: Array, sizes: Any) -> tuple[Array, None]:
    return _adaptive(ns, x, sizes, "max"), None


def _adaptive(ns: Namespace, x: Array, sizes: Any, name: str) -> Array:
    """One dimension after the other: `sizes[i]` windows from floor(i n / m) to ceil((i + 1) n / m)."""
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    for i, wanted in enumerate(sizes):
        axis = ns.rank(x) - len(sizes) + i
        have = ns.shape(x)[axis]
        if isinstance(have, int) and have == wanted:
            continue
        if wanted == 1:
            x = reduced(ns, name, x, axis, True)
            continue
        bounds = [(j * have // wanted, -(-(j + 1) * have // wanted)) for j in range(wanted)]
        x = ns.concat([reduced(ns, name, ns.slice(x, axis, a, b, 1), axis, True) for a, b in bounds], axis)
    return x


# -- norms -------------------------------------------------------------------------------------------------------------


@lowers("aten._native_batch_norm_legit_no_training.default")
def batch_norm_no_training(
    ns: Namespace, x: Array, weight: Any, bias: Any, mean: Array, variance: Array, momentum: float, eps: float
) -> tuple[Array, None, None]:
    return batch_norm(ns, x, weight, bias, mean, variance, False, momentum, eps), None, None


@lowers("aten._native_batch_norm_legit.no_stats")
def batch_norm_of_batch(
    ns: Namespace, x: Array, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Array, None, None]:
    return batch_norm(ns, x, weight, bias, None, None, True, momentum, eps), None, None


def batch_norm(
    ns: Namespace,
    x: Array,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> Array:
    wide = ns.cast(x, torch.float32) if ns.dtype(x) in (torch.float16, torch.bfloat16) else x
    if mean is None or training:
        axes = [0, *range(2, ns.rank(x))]
        mean = ns.mean(wide, axes, False)
        variance = ns.mean(ns.square(ns.sub(wide, _of_channels(ns, mean, wide))), axes, False)
    scale = ns.rsqrt(ns.add(constant(ns, variance, wide), constant(ns, eps, wide)))
    if weight is not None:
        scale = ns.mul(scale, constant(ns, weight, wide))
    y = ns.mul(ns.sub(wide, _of_channels(ns, constant(ns, mean, wide), wide)), _of_channels(ns, scale, wide))
    y = y if bias is None else ns.add(y, _of_channels(ns, constant(ns, bias, wide), wide))
    return ns.cast(y, ns.dtype(x))


def _of_channels(ns: Namespace, values: Array, x: Array) -> Array:
    return ns.reshape(values, [-1, *[1] * (ns.rank(x) - 2)])


def _normalized(ns: Namespace, x: Array, axes: list[int], eps: float, centered: bool = True) -> Array:
    """With mean zero and variance one over axes, in float32 for 16-bit inputs."""
    wide = ns.cast(x, torch.float32) if ns.dtype(x) in (torch.float16, torch.bfloat16) else x
    if centered:
        wide = ns.sub(wide, ns.mean(wide, axes, True))
    return ns.mul(wide, ns.rsqrt(ns.add(ns.mean(ns.square(wide), axes, True), constant(ns, eps, wide))))


def _affine(ns: Namespace, y: Array, weight: Any, bias: Any, dtype: torch.dtype) -> Array:
    if weight is not None:
        y = ns.mul(y, constant(ns, weight, y))
    return ns.cast(y if bias is None else ns.add(y, constant(ns, bias, y)), dtype)


@lowers("aten.layer_norm.default")
def layer_norm(
    ns: Namespace, x: Array, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Array:
    axes = list(range(ns.rank(x) - len(shape), ns.rank(x)))
    return _affine(ns, _normalized(ns, x, axes, eps), weight, bias, ns.dtype(x))


@lowers("aten.rms_norm.default")
def rms_norm(ns: Namespace, x: Array, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Array:
    axes = list(range(ns.rank(x) - len(shape), ns.rank(x)))
    eps = torch.finfo(ns.dtype(x)).eps if eps is None else eps
    return _affine(ns, _normalized(ns, x, axes, eps, centered=False), weight, None, ns.dtype(x))


@lowers("aten.group_norm.default")
def group_norm(
    ns: Namespace, x: Array, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Array:
    sizes = ns.shape(x)
    apart = ns.reshape(x, [sizes[0], groups, -1])
    y = ns.reshape(_normalized(ns, apart, [2], eps), sizes)
    weight, bias = (None if v is None else _of_channels(ns, v, x) for v in (weight, bias))
    return _affine(ns, y, weight, bias, ns.dtype(x))


@lowers("aten.instance_norm.default")
def instance_norm(
    ns: Namespace,
    x: Array,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    own: bool,
    momentum: float,
    eps: float,
    *rest: Any,
) -> Array:
    if not own:
        return batch_norm(ns, x, weight, bias, mean, variance, False, momentum, eps)
    weight, bias = (None if v is None else _of_channels(ns, v, x) for v in (weight, bias))
    return _affine(ns, _normalized(ns, x, list(range(2, ns.rank(x))), eps), weight, bias, ns.dtype(x))


# -- attention ---------------------------------------------------------------------------------------------------------


@lowers("aten.softmax.int", "aten._softmax.default")
def softmax(ns: Namespace, x: Array, dim: int, dtype: Any = None) -> Array:
    x = ns.cast(x, dtype) if isinstance(dtype, torch.dtype) else x
    axis = [dim % ns.rank(x)]
    powers = ns.exp(ns.sub(x, ns.max(x, axis, True)))
    return ns.div(powers, ns.sum(powers, axis, True))


@lowers("aten.log_softmax.int", "aten._log_softmax.default")
def log_softmax(ns: Namespace, x: Array, dim: int, dtype: Any = None) -> Array:
    x = ns.cast(x, dtype) if isinstance(dtype, torch.dtype) else x
    axis = [dim % ns.rank(x)]
    off = ns.sub(x, ns.max(x, axis, True))
    return ns.sub(off, ns.log(ns.sum(ns.exp(off), axis, True)))


@lowers("aten.scaled_dot_product_attention.default")
def attention(
    ns: Namespace,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """`(..., heads, queries, d)`; a row that a mask of booleans hides altogether gives zeros, as in torch."""
    if enable_gqa:
        key, value = (_repeat_heads(ns, x, ns.shape(query)[-3]) for x in (key, value))
    dtype = ns.dtype(query)
    factor = 1 / math.sqrt(ns.shape(query)[-1]) if scale is None else scale
    scores = ns.matmul(ns.mul(query, constant(ns, factor, query)), transpose(ns, key, -1, -2))
    scores = ns.cast(scores, torch.float32) if dtype in (torch.float16, torch.bfloat16) else scores
    if is_causal:
        rows, columns = (ns.arange(0, ns.shape(scores)[axis], 1, torch.int64) for axis in (-2, -1))
        mask = ns.ge(ns.reshape(rows, [-1, 1]), ns.reshape(columns, [1, -1]))
    if mask is not None and ns.dtype(mask) is not torch.bool:
        scores, mask = ns.add(scores, constant(ns, mask, scores)), None
    if mask is not None:
        scores = ns.where(mask, scores, constant(ns, -1e30, scores))
    weights = softmax(ns, scores, -1)
    if mask is not None:
        weights = ns.where(mask, weights, constant(ns, 0, weights))
    return ns.matmul(ns.cast(weights, dtype), value)


def _repeat_heads(ns: Namespace, x: Array, heads: Size) -> Array:
    sizes = ns.shape(x)
    apart = ns.broadcast_to(unsqueeze(ns, x, -3), [*sizes[:-2], heads // sizes[-3], *sizes[-2:]])
    return ns.reshape(apart, [*sizes[:-3], heads, *sizes[-2:]])


# -- recurrent layers --------------------------------------------------------------------------------------------------


def _run_layers(
    ns: Namespace,
    x: Array,
    starts: tuple[Array, ...],
    weights: Sequence[Array],
    has_biases: bool,
    layers: int,
    both: bool,
    batch_first: bool,
    cell: Any,
) -> tuple[Array, ...]:
    """All layers and directions: the outputs, and the last states `(layers * directions, N, hidden)`."""
    x = transpose(ns, x, 0, 1) if batch_first else x
    per, directions = 4 if has_biases else 2, 2 if both else 1
    lasts: list[tuple[Array, ...]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            own = list(weights[per * place : per * (place + 1)])
            steps = ns.flip(x, [0]) if direction else x
            start = tuple(select(ns, state, 0, place) for state in starts)
            found, last = ns.scan(cell(ns, *own, *([None, None] if per == 2 else [])), start, steps)
            outputs.append(ns.flip(found, [0]) if direction else found)
            lasts.append(last)
        x = outputs[0] if directions == 1 else ns.concat(outputs, 2)
    y = transpose(ns, x, 0, 1) if batch_first else x
    return y, *(stack(ns, list(states), 0) for states in zip(*lasts, strict=True))


def _parts(ns: Namespace, x: Array, count: int) -> list[Array]:
    size = ns.shape(x)[-1] // count
    return [ns.slice(x, ns.rank(x) - 1, i * size, (i + 1) * size, 1) for i in range(count)]


def _lstm_cell(ns: Namespace, w_in: Array, w_hidden: Array, b_in: Any, b_hidden: Any) -> Any:
    def step(state: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        hidden, cell = state
        gates = ns.add(linear(ns, x, w_in, b_in), linear(ns, hidden, w_hidden, b_hidden))
        take, forget, new, give = _parts(ns, gates, 4)
        cell = ns.add(ns.mul(ns.sigmoid(forget), cell), ns.mul(ns.sigmoid(take), ns.tanh(new)))
        return ns.mul(ns.sigmoid(give), ns.tanh(cell)), cell

    return step


def _gru_cell(ns: Namespace, w_in: Array, w_hidden: Array, b_in: Any, b_hidden: Any) -> Any:
    def step(state: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
        (hidden,) = state
        from_x, from_hidden = (
            _parts(ns, linear(ns, *terms), 3) for terms in ((x, w_in, b_in), (hidden, w_hidden, b_hidden))
        )
        reset, update = (ns.sigmoid(ns.add(from_x[i], from_hidden[i])) for i in (0, 1))
        new = ns.tanh(ns.add(from_x[2], ns.mul(reset, from_hidden[2])))
        return (ns.add(new, ns.mul(update, ns.sub(hidden, new))),)

    return step


def _rnn_cell(activation: str) -> Any:
    def make(ns: Namespace, w_in: Array, w_hidden: Array, b_in: Any, b_hidden: Any) -> Any:
        def step(state: tuple[Array, ...], x: Array) -> tuple[Array, ...]:
            total = ns.add(linear(ns, x, w_in, b_in), linear(ns, state[0], w_hidden, b_hidden))
            return (ns.tanh(total) if activation == "tanh" else ns.maximum(total, constant(ns, 0, total)),)

        return step

    return make


@lowers("aten.lstm.input")
def lstm(ns: Namespace, x: Array, starts: Sequence[Array], weights: Sequence[Array], *how: Any) -> tuple[Array, ...]:
    has_biases, layers, _, _, both, batch_first = how
    _check_no_projection(ns, weights)
    return _run_layers(ns, x, tuple(starts), weights, has_biases, layers, both, batch_first, _lstm_cell)


def _enter_recurrent(operation: str, cell: Any) -> None:
    @lowers(operation)
    def lowering(ns: Namespace, x: Array, start: Array, weights: Sequence[Array], *how: Any) -> tuple[Array, ...]:
        has_biases, layers, _, _, both, batch_first = how
        return _run_layers(ns, x, (start,), weights, has_biases, layers, both, batch_first, cell)


_enter_recurrent("aten.gru.input", _gru_cell)
for _activation in ("tanh", "relu"):
    _enter_recurrent(f"aten.rnn_{_activation}.input", _rnn_cell(_activation))


def _check_no_projection(ns: Namespace, weights: Sequence[Array]) -> None:
    gates, hidden = ns.shape(weights[1])
    if gates != 4 * hidden:
        raise UnsupportedOperationError("An LSTM with proj_size has no counterpart here: export to 'onnx' or 'pt2'.")


# -- resizing ----------------------------------------------------------------------------------------------------------


def _sizes(ns: Namespace, x: Array, given: Any, factors: Any) -> tuple[list[Size], list[float | None]]:
    own = ns.shape(x)[2:]
    if factors is None:
        return list(given), [None] * len(own)
    return [math.floor(size * factor) for size, factor in zip(own, factors, strict=True)], list(factors)


@lowers(*names("aten.upsample_nearest{}.vec", ("1d", "2d", "3d")))
def upsample_nearest(ns: Namespace, x: Array, sizes: Any, factors: Any = None) -> Array:
    wanted, scales = _sizes(ns, x, sizes, factors)
    for i, (size, scale) in enumerate(zip(wanted, scales, strict=True)):
        have = ns.shape(x)[i + 2]
        ratio = have / size if scale is None else 1 / scale
        places = [min(math.floor(j * ratio), have - 1) for j in range(size)]
        x = ns.take(x, ns.asarray(torch.tensor(places).numpy()), i + 2)
    return x


@lowers("aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec", "aten.upsample_trilinear3d.vec")
def upsample_linear(ns: Namespace, x: Array, sizes: Any, align_corners: bool, factors: Any = None) -> Array:
    wanted, scales = _sizes(ns, x, sizes, factors)
    for i, (size, scale) in enumerate(zip(wanted, scales, strict=True)):
        have = ns.shape(x)[i + 2]
        steps = torch.arange(size, dtype=torch.float64)
        if align_corners:
            places = steps * ((have - 1) / max(size - 1, 1))
        else:
            places = ((steps + 0.5) * (have / size if scale is None else 1 / scale) - 0.5).clamp_min(0)
        low = places.floor().long().clamp_max(have - 1)
        share = ns.asarray((places - low).float().reshape(-1, *[1] * (ns.rank(x) - i - 3)).numpy())
        below = ns.take(x, ns.asarray(low.numpy()), i + 2)
        above = ns.take(x, ns.asarray((low + 1).clamp_max(have - 1).numpy()), i + 2)
        x = ns.add(below, ns.mul(constant(ns, share, x), ns.sub(above, below)))
    return x


@lowers("aten.pixel_shuffle.default")
def pixel_shuffle(ns: Namespace, x: Array, factor: int) -> Array:
    *lead, channels, height, width = ns.shape(x)
    count, out = len(lead), channels // factor**2
    apart = ns.reshape(x, [*lead, out, factor, factor, height, width])
    order = [*range(count), count, count + 3, count + 1, count + 4, count + 2]
    return ns.reshape(ns.transpose(apart, order), [*lead, out, height * factor, width * factor])


# -- quantization ------------------------------------------------------------------------------------------------------


@lowers("quantized_decomposed.quantize_per_tensor.default")
def quantize(ns: Namespace, x: Array, scale: Any, zero_point: Any, low: int, high: int, dtype: torch.dtype) -> Array:
    return ns.quantize(x, scale, zero_point, low, high, dtype)


@lowers("quantized_decomposed.dequantize_per_tensor.default")
def dequantize(
    ns: Namespace,
    codes: Array,
    scale: Any,
    zero_point: Any,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: Any = None,
) -> Array:
    return ns.dequantize(codes, scale, zero_point, low, high, out_dtype or torch.float32)


@lowers("quantized_decomposed.quantize_per_channel.default")
def quantize_per_channel(
    ns: Namespace, x: Array, scales: Array, zero_points: Array, axis: int, low: int, high: int, dtype: torch.dtype
) -> Array:
    scale, zero = (_along(ns, ns.cast(v, ns.dtype(x)), x, axis) for v in (scales, zero_points))
    return ns.cast(clamp(ns, ns.add(ns.round(ns.div(x, scale)), zero), low, high), dtype)


@lowers("quantized_decomposed.dequantize_per_channel.default")
def dequantize_per_channel(
    ns: Namespace,
    codes: Array,
    scales: Array,
    zero_points: Any,
    axis: int,
    *range_and_dtype: Any,
    out_dtype: Any = None,
) -> Array:
    values = ns.cast(codes, torch.float32)
    if zero_points is not None:
        values = ns.sub(values, _along(ns, ns.cast(zero_points, torch.float32), codes, axis))
    return ns.mul(values, _along(ns, ns.cast(scales, torch.float32), codes, axis))


def _along(ns: Namespace, values: Array, x: Array, axis: int) -> Array:
    return ns.reshape(values, [-1 if i == axis % ns.rank(x) else 1 for i in range(ns.rank(x))])
